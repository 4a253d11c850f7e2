"""The EAGLE-3 head against transformers' Llama layer, and its training-time test against the plain
chain that it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.head import split
from compressor.speculate import eagle3
from compressor.speculate.eagle3 import Eagle3, start_from_target
from compressor.speculate.eagle3_config import Eagle3Config, config_for, default_aux_layers
from tests import tiny
from tests.speculate.samples import CONFIG

STEPS = 4


def head_of(seed: int = 0, **changes: object) -> Eagle3:
    head = Eagle3(
        Eagle3Config(**{**vars(CONFIG), **changes}),  # type: ignore[arg-type]
        torch.arange(20) * 2 + 3,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return head


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("before", [True, False])
def test_a_step_is_llamas_layer_over_embedding_and_hidden(before: bool) -> None:
    head = head_of(norm_before_residual=before)
    config = LlamaConfig(**CONFIG.layer_config(), attn_implementation="eager")
    layer = head.layers[0]
    attention, mlp = LlamaAttention(config, 0), LlamaMLP(config)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, getattr(layer.self_attn, name))
    mlp.load_state_dict(layer.mlp.state_dict())

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        made = LlamaRMSNorm(32, 1e-5)
        made.load_state_dict(getattr(layer, name).state_dict())
        return made(x)

    tokens = torch.randint(50, (2, 9))
    hidden = torch.randn(2, 9, 32)
    places = torch.arange(9).expand(2, -1)
    normed = norm("hidden_norm", hidden)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    both = torch.cat([norm("input_layernorm", head.embed_tokens(tokens)), normed], -1)
    mixed, _ = attention(both, head.rotary(hidden, places), mask)
    residual = (normed if before else hidden) + mixed
    expected = residual + mlp(norm("post_attention_layernorm", residual))
    got = head.step(tokens, hidden, places, plain_attention)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_features_are_normed_by_layer_then_fused() -> None:
    head = head_of()
    aux = torch.randn(3, 96)
    parts = [
        functional.rms_norm(part, (32,), norm.weight, 1e-5)
        for part, norm in zip(aux.split(32, -1), head.fc_norm or (), strict=True)
    ]
    torch.testing.assert_close(head.fuse(aux), torch.cat(parts, -1) @ head.fc.weight.T)
    without = head_of(fc_norm=False)
    torch.testing.assert_close(without.fuse(aux), aux @ without.fc.weight.T)


def chain(
    head: Eagle3, tokens: torch.Tensor, aux: torch.Tensor, start: int, steps: int
) -> torch.Tensor:
    """[steps, hidden]: the outputs of a chain that begins at ``start``, one pass over the whole
    sequence for each."""
    hidden = head.fuse(aux[None, : start + 1])
    made = []
    for k in range(steps):
        places = torch.arange(start + k + 1)[None]
        out = head.step(tokens[None, 1 : start + k + 2], hidden, places, plain_attention)
        made.append(out[0, -1])
        hidden = torch.cat([hidden, out[:, -1:]], 1)
    return torch.stack(made)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 14), st.integers(0, 9), st.integers(2, 6), st.integers(0, 10_000))
def test_unrolled_steps_are_chains_from_every_position(
    length: int, first: int, chunk: int, seed: int
) -> None:
    head = head_of(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (2, length), generator=generator)
    aux = torch.randn(2, length, 96, generator=generator)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(eagle3, "_CHUNK", chunk)
        states = list(head.unroll(tokens, aux, STEPS, first))
        for k, state in enumerate(states):
            begin = min(first, length - 1) if k else 0
            assert state.shape == (2, length - 1 - k - begin, 32)
            for row in range(2):
                for place in range(state.shape[1]):
                    expected = chain(head, tokens[row], aux[row], begin + place, k + 1)[-1]
                    torch.testing.assert_close(state[row, place], expected, rtol=1e-3, atol=1e-4)


def test_gradients_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, aux = torch.randint(50, (2, 13)), torch.randn(2, 13, 96)
    found = []
    for chunk in (3, 256):
        monkeypatch.setattr(eagle3, "_CHUNK", chunk)
        head = head_of()
        states = torch.cat(list(head.unroll(tokens, aux, STEPS, 2)), 1)
        (head.logits(states) ** 2).mean().backward()
        found.append({name: p.grad for name, p in head.trained().items()})
    for name, gradient in found[0].items():
        assert gradient is not None and float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)


def test_the_state_is_named_as_engines_load_it() -> None:
    head = head_of(fc_norm=False)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "d2t": (20,),
        "t2d": (50,),
        "embed_tokens.weight": (50, 32),
        "fc.weight": (32, 96),
        "layers.0.hidden_norm.weight": (32,),
        "layers.0.input_layernorm.weight": (32,),
        "layers.0.mlp.down_proj.weight": (32, 48),
        "layers.0.mlp.gate_proj.weight": (48, 32),
        "layers.0.mlp.up_proj.weight": (48, 32),
        "layers.0.post_attention_layernorm.weight": (32,),
        "layers.0.self_attn.k_proj.weight": (24, 64),
        "layers.0.self_attn.o_proj.weight": (32, 48),
        "layers.0.self_attn.q_proj.weight": (48, 64),
        "layers.0.self_attn.v_proj.weight": (24, 64),
        "lm_head.weight": (20, 32),
        "norm.weight": (32,),
    }
    assert head.token_map.tolist() == list(range(3, 43, 2))
    assert head.t2d.nonzero().flatten().tolist() == list(range(3, 43, 2))
    assert "embed_tokens.weight" not in head.trained()


@given(st.integers(1, 200))
def test_default_layers_are_depths_of_the_target(blocks: int) -> None:
    layers = default_aux_layers(blocks)
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 0 and layers[-1] < blocks
    assert len(layers) == min(blocks, 3)
    if blocks >= 7:
        assert layers == (2, blocks // 2, blocks - 3)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "opt", "gpt_neox", "bloom"])
def test_a_head_for_any_target_starts_from_its_embeddings_and_output_layer(
    tmp_path: Path, arch: str
) -> None:
    tiny.build(arch, tmp_path / "model", layers=4)
    model = CausalLM.open(tmp_path / "model")
    config = config_for(model.config, 100)
    assert config.hidden_size == tiny.HIDDEN and config.aux_layers == (1, 2, 3)
    tokens = torch.arange(5, 305, 3)
    heads = [Eagle3(config, tokens) for _ in range(2)]
    target = model.load_full(torch.float32)
    for head in heads:
        start_from_target(head, target.get_input_embeddings().weight, split(target), seed=3)
    one, two = (head.state_dict() for head in heads)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(one["embed_tokens.weight"], target.get_input_embeddings().weight)
    assert torch.equal(one["lm_head.weight"], target.get_output_embeddings().weight[tokens])
    states = list(heads[0].unroll(torch.arange(9)[None], torch.randn(1, 9, 192), 3))
    assert all(torch.isfinite(heads[0].logits(state)).all() for state in states)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = CausalLM.open(tiny.build("llama", tmp_path / "model")).config
    with pytest.raises(RunError, match="draft_vocab_size"):
        config_for(config, tiny.VOCABULARY + 1)
    with pytest.raises(RunError, match="aux_layers"):
        config_for(config, 10, aux_layers=(0, 2))
    for wrong in (torch.arange(19), torch.zeros(20, dtype=torch.int64), torch.arange(40, 60)):
        with pytest.raises(RunError, match="token_map"):
            Eagle3(CONFIG, wrong)
