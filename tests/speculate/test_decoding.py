"""Verified decoding against the target's own decoding, on models of several architectures."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from compressor.errors import RunError
from compressor.speculate.acceptance import compare
from compressor.speculate.cached import CachedModel
from compressor.speculate.candidates import Candidates
from compressor.speculate.decoding import speculative_decode
from compressor.speculate.draft_proposer import DraftProposer
from compressor.speculate.ngram import NgramProposer
from compressor.speculate.verification import Sampling
from tests import tiny
from tests.speculate.decoders import Foresight, chi_square, load, prompts, target

NOISE = 1e-4  # of float32 logits of the tiny models, which are about 10


def plain(cached: CachedModel, texts: list[list[int]], length: int) -> list[list[int]]:
    """By transformers' own decoding."""
    found = []
    for text in texts:
        ids = cached.model.generate(
            torch.tensor([text]), max_new_tokens=length, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        found.append(ids[0, len(text) :].tolist())
    return found


@pytest.mark.parametrize("branching", [True, False])
@pytest.mark.parametrize("arch", [arch for arch in tiny.ARCHITECTURES if arch != "bloom"])
def test_greedy_output_is_the_targets(tmp_path: Path, arch: str, branching: bool) -> None:
    cached = target(tmp_path / "model", arch)
    texts = prompts(5)
    expected = plain(cached, texts, 24)
    alone = speculative_decode(cached, None, texts, output_length=24)
    assert [each.tokens for each in alone] == expected
    assert all(each.accepted == [0] * 23 for each in alone)
    foresight = Foresight(expected, branching=branching)
    found = speculative_decode(cached, foresight, texts, output_length=24, depth=5)
    comparison = compare(alone, found)
    assert comparison.equal >= 4  # one tie is bad luck, two are a fault
    assert all(tie < NOISE for tie in comparison.ties)
    assert all(each.steps < 20 for each in found)
    assert any(max(each.accepted) > 2 for each in found)


@pytest.mark.parametrize("scheme", [None, "W4A16", "W8A8"])
def test_two_hundred_prompts_are_lossless(tmp_path: Path, scheme: str | None) -> None:
    cached = target(tmp_path / "model", "llama", scheme)
    texts = prompts(200)
    alone = speculative_decode(cached, None, texts, output_length=16, batch_size=50)
    outputs = [each.tokens for each in alone]
    for start in range(0, 200, 50):
        foresight = Foresight(outputs[start : start + 50])
        found = speculative_decode(
            cached, foresight, texts[start : start + 50], output_length=16, depth=4
        )
        comparison = compare(alone[start : start + 50], found)
        assert all(tie < NOISE for tie in comparison.ties)
        assert comparison.equal >= 49


def test_the_proposer_sees_the_targets_states(tmp_path: Path) -> None:
    cached = target(tmp_path / "model", layers=4)
    texts = prompts(4)
    outputs = plain(cached, texts, 20)
    foresight = Foresight(outputs, aux_layers=(1, 2))
    found = speculative_decode(cached, foresight, texts, output_length=20)
    for i, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        assert found[i].tokens == output
        seen = foresight.states(i)
        whole = [*text, *output]
        assert seen.tokens.tolist() == whole[: len(seen.tokens)]
        assert len(seen.tokens) > len(text) + 5
        with torch.no_grad():
            out = cached.model.base_model(torch.tensor([whole]), output_hidden_states=True)
        shown = slice(0, len(seen.tokens))
        torch.testing.assert_close(
            seen.hidden, out.last_hidden_state[0, shown], rtol=1e-4, atol=1e-4
        )
        expected = torch.cat([out.hidden_states[layer][0, shown] for layer in (1, 2)], -1)
        torch.testing.assert_close(seen.aux, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["greedy", "rejection", "typical"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_gives_what_its_prompts_give(tmp_path: Path, kind: str, size: int) -> None:
    cached, draft = target(tmp_path / "target"), target(tmp_path / "draft", layers=1, seed=1)
    settings = {
        "output_length": 12, "sampling": Sampling(kind, 3.0), "seed": 5, "ends": range(40),
    }  # fmt: skip
    for proposer in (NgramProposer(1, 3), DraftProposer(draft)):
        together = speculative_decode(cached, proposer, prompts(7), **settings)
        apart = speculative_decode(cached, proposer, prompts(7), batch_size=size, **settings)
        assert together == apart or kind == "greedy"  # margins are floats
        assert [each.tokens for each in together] == [each.tokens for each in apart]
        assert len({len(each.tokens) for each in together}) > 1 or kind != "rejection"


def test_sampling_with_a_draft_leaves_the_distribution(tmp_path: Path) -> None:
    """Of three tokens together: the first is the prompt's own, two are the draft's to guess."""
    cached = target(tmp_path / "target", vocab_size=6, layers=1)
    draft = target(tmp_path / "draft", vocab_size=6, layers=1, seed=3)
    count, temperature, prompt = 3000, 6.0, [3, 4]
    found = speculative_decode(
        cached, DraftProposer(draft), [prompt] * count, output_length=3, depth=2,
        sampling=Sampling("rejection", temperature), batch_size=500,
    )  # fmt: skip
    accepted = Counter(each.accepted[0] for each in found)
    assert min(accepted[0], accepted[1], accepted[2]) > 100  # all ways through are taken
    counts = Counter(tuple(each.tokens) for each in found)
    every = list(itertools.product(range(6), repeat=3))
    with torch.no_grad():
        logits = cached.model(torch.tensor([[*prompt, *tokens] for tokens in every])).logits
    p = torch.softmax(logits.double() / temperature, -1)
    expected = {
        (a, b, c): float(p[i, 1, a] * p[i, 2, b] * p[i, 3, c]) for i, (a, b, c) in enumerate(every)
    }
    assert chi_square(counts, expected) > 1e-3


def test_sequences_end_at_an_end_token_and_at_the_length(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    texts = prompts(6)
    outputs = plain(cached, texts, 20)
    ends = {outputs[0][4], outputs[1][0], outputs[2][11]}
    notes: list[str] = []
    found = speculative_decode(
        cached, Foresight(outputs, hits=0.9), texts, output_length=17, ends=ends,
        advance=notes.append,
    )  # fmt: skip
    for each, output in zip(found, outputs, strict=True):
        at = next((i for i, token in enumerate(output) if token in ends), 16)
        assert each.tokens == output[: min(at, 16) + 1]
        assert len(each.margins) == len(each.tokens)
        # What was accepted behind the end is in the counts.
        assert sum(each.accepted) + each.steps >= len(each.tokens) - 1
    assert found[1].steps == 0
    assert len(notes) == 6
    assert any(sum(each.accepted) + each.steps > len(each.tokens) - 1 for each in found)


def test_nothing_is_run_beyond_the_models_positions(tmp_path: Path) -> None:
    cached = target(tmp_path / "model", "opt", max_position_embeddings=32)
    text = prompts(1, 1)[0] * 12
    output = plain(cached, [text], 20)
    found = speculative_decode(cached, Foresight(output, hits=1.0), [text], output_length=20)
    assert [found[0].tokens] == output
    with pytest.raises(RunError, match="prompt 0: 12 tokens and 21 new ones are more than the 32"):
        speculative_decode(cached, None, [text], output_length=21)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    with pytest.raises(RunError, match="prompt 1: the prompt is empty"):
        speculative_decode(cached, None, [[5], []], output_length=3)
    for settings in ({"output_length": 0}, {"depth": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            speculative_decode(cached, None, [[5]], **{"output_length": 3, **settings})
    assert speculative_decode(cached, None, [], output_length=3) == []


def test_a_proposer_that_breaks_its_contract_is_named(tmp_path: Path) -> None:
    class Broken(NgramProposer):
        def propose(self, last: object, depth: int) -> list[Candidates]:
            return [Candidates.chain([9999])]

    cached = CachedModel(load(tmp_path / "model"))
    with pytest.raises(ValueError, match="not in the vocabulary of 384"):
        speculative_decode(cached, Broken(), [[5]], output_length=3)
    with pytest.raises(ValueError, match="1 proposals for 2 sequences"):
        speculative_decode(cached, Broken(), [[5], [6]], output_length=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["greedy", "rejection", "typical"])
def test_a_gpu_decodes_as_the_cpu_does(tmp_path: Path, kind: str) -> None:
    model, small = load(tmp_path / "target"), load(tmp_path / "draft", layers=1)
    settings = {"output_length": 12, "sampling": Sampling(kind, 1.5)}
    found = []
    for device in ("cpu", "cuda"):
        cached, draft = CachedModel(model.to(device)), CachedModel(small.to(device))
        found.append(speculative_decode(cached, DraftProposer(draft), prompts(8), **settings))
    same = [a.tokens == b.tokens for a, b in zip(*found, strict=True)]
    assert sum(same) >= 7  # float noise may tip one
