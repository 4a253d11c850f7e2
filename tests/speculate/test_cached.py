"""States over trees of tokens, rows of different lengths, against plain passes over the paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.errors import RunError
from compressor.models.head import last_hidden
from compressor.speculate.cached import CachedModel
from compressor.speculate.candidates import Candidates
from tests import tiny
from tests.speculate.decoders import load, prompts, target

TREES = [
    Candidates(torch.tensor([9, 8, 7, 6, 5]), torch.tensor([-1, -1, 0, 1, 3])),
    Candidates.chain([31, 32, 33]),
    Candidates(torch.tensor([3]), torch.tensor([-1])),
]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def check(cached: CachedModel, texts: list[list[int]], trees: list[Candidates]) -> None:
    states = cached.forward([t.tokens for t in trees], [t.parents for t in trees])
    for text, tree, state in zip(texts, trees, states, strict=True):
        assert torch.equal(state.tokens, tree.tokens)
        for node in range(len(tree)):
            ids = [*text, *tree.tokens[tree.path(node)].tolist()]
            close(state.hidden[node], last_hidden(cached.model, torch.tensor([ids]))[0, -1])


@pytest.mark.parametrize("arch", [arch for arch in tiny.ARCHITECTURES if arch != "bloom"])
def test_states_are_those_of_plain_passes_whatever_was_kept_before(
    tmp_path: Path, arch: str
) -> None:
    cached = target(tmp_path / "model", arch, layers=4)
    texts = [[11, 12, 13, 14, 15], [21, 22], list(range(40, 60))]  # one beyond the tiny windows
    with torch.inference_mode():
        for text, state in zip(texts, cached.prefill(texts), strict=True):
            close(state.hidden, last_hidden(cached.model, torch.tensor([text]))[0])
        check(cached, texts, TREES)
        paths = [[1, 3, 4], [0, 1], []]
        cached.keep(paths)
        texts = [
            [*text, *tree.tokens[path].tolist()]
            for text, tree, path in zip(texts, TREES, paths, strict=True)
        ]
        assert cached.lengths == [len(text) for text in texts]
        check(cached, texts, TREES[::-1])
        cached.drop([1])
        texts = [texts[0][:4], texts[2]]
        cached.rewind([4, 20])
        check(cached, texts, TREES[:2])


def test_a_cache_grows_with_what_it_holds(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    with torch.inference_mode():
        texts = [list(range(4, 10)), [7]]
        cached.prefill(texts)
        for turn in range(50):
            trees = [Candidates.chain([(turn * 7 + i) % 380 for i in range(12)])] * 2
            cached.forward([t.tokens for t in trees], [t.parents for t in trees])
            paths = [range(12), range(turn % 3)]
            cached.keep(paths)
            texts = [
                text + trees[0].tokens[list(path)].tolist()
                for text, path in zip(texts, paths, strict=True)
            ]
        check(cached, texts, TREES[:2])


def test_the_residual_stream_is_given_after_the_blocks_asked_for(tmp_path: Path) -> None:
    cached = target(tmp_path / "model", layers=4)
    layers = (0, 1, 3)
    text = list(range(5, 17))
    with torch.inference_mode():
        hidden = cached.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = torch.cat([hidden[layer][0] for layer in layers], -1)
        states = cached.prefill([text[:7]], layers)[0]
        assert states.aux is not None
        close(states.aux, expected[:7])
        chain = Candidates.chain(text[7:])
        states = cached.forward([chain.tokens], [chain.parents], layers)[0]
        assert states.aux is not None
        close(states.aux, expected[7:])
        assert cached.prefill([text])[0].aux is None
        with pytest.raises(RunError, match="after 4 decoder blocks are asked for, the model has 4"):
            cached.prefill([text], (4,))


def test_what_a_prompt_gives_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    together = cached.prefill(prompts(6))
    for prompt, state in zip(prompts(6), together, strict=True):
        assert torch.equal(cached.prefill([prompt])[0].hidden, state.hidden)


def test_a_model_in_bfloat16_is_served(tmp_path: Path) -> None:
    model = load(tmp_path / "model").bfloat16()
    cached = CachedModel(model)
    text = list(range(9, 30))
    with torch.inference_mode():
        cached.prefill([text])
        tree = TREES[0]
        state = cached.forward([tree.tokens], [tree.parents])[0]
        assert state.hidden.dtype == torch.bfloat16
        for node in range(len(tree)):
            ids = [*text, *tree.tokens[tree.path(node)].tolist()]
            plain = last_hidden(model, torch.tensor([ids]))[0, -1]
            assert (state.hidden[node] - plain).norm() < 0.03 * plain.norm()


def test_architectures_that_cannot_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="BloomForCausalLM: this architecture cannot run a tree"):
        target(tmp_path / "bloom", "bloom")
    model = load(tmp_path / "llama")
    own = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: own(
        *args, **{**kwargs, "position_ids": None}
    )
    with pytest.raises(RunError, match="something else over a tree of candidates"):
        CachedModel(model)


def test_a_recurrent_state_cannot_be_taken_back(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16,
    )  # fmt: skip
    with pytest.raises(RunError, match="cannot be taken back from a cache of LinearAttention"):
        CachedModel(AutoModelForCausalLM.from_config(config).eval())


def test_a_cache_is_not_rewound_forwards(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    cached.prefill([[5, 6]])
    with pytest.raises(ValueError, match="forwards"):
        cached.rewind([3])
