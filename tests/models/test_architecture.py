"""Walking a model block by block against transformers' own forward."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from compressor.errors import RunError
from compressor.models.architecture import FUSED_EXPERTS, CausalLM
from compressor.models.checkpoint import Checkpoint
from tests import tiny

# Linears of one block, and how many distinct inputs they read.
COUNTS = {
    "llama": (7, 4),
    "mistral": (7, 4),
    "qwen2": (7, 4),
    "qwen3": (7, 4),
    "phi3": (4, 4),
    "gemma2": (7, 4),
    "gemma3": (7, 4),
    "gpt_neox": (4, 4),
    "opt": (6, 4),
    "mixtral": (4 + 3 * tiny.EXPERTS, 2 + 2 * tiny.EXPERTS),
    "qwen2_moe": (4 + 3 * tiny.EXPERTS + 3, 2 + 2 * tiny.EXPERTS + 2),
    "qwen3_moe": (4 + 3 * tiny.EXPERTS, 2 + 2 * tiny.EXPERTS),
    "bloom": (4, 4),
}
MOE = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {arch: tiny.build(arch, root / arch) for arch in tiny.ARCHITECTURES}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def reference(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_walk_equals_own_forward(
    arch: str, directories: dict[str, Path], ids: torch.Tensor
) -> None:
    expected = reference(directories[arch])(ids, output_hidden_states=True, use_cache=False)
    model = CausalLM.open(directories[arch])
    with torch.no_grad():
        inputs = model.embed(ids)
        hidden = inputs.hidden
        assert torch.allclose(hidden, expected.hidden_states[0], atol=1e-6)
        for i in range(len(model.blocks)):
            model.load_block(i, "cpu", torch.float32)
            hidden = model.run_block(i, hidden, inputs)
            model.unload_block(i)
            assert all(p.is_meta for p in model.blocks[i].parameters())
            if i + 1 < len(model.blocks):  # the last one is given after the final norm
                assert torch.allclose(hidden, expected.hidden_states[i + 1], atol=1e-5, rtol=1e-5)
        full = model.load_full(torch.float32)
        last: list[torch.Tensor] = []
        model.blocks[-1].register_forward_hook(
            lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
        logits = full(ids, use_cache=False).logits
    assert torch.allclose(hidden, last[0], atol=1e-5, rtol=1e-5)
    assert torch.allclose(logits, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_linears_and_their_inputs(
    arch: str, directories: dict[str, Path], ids: torch.Tensor
) -> None:
    model = CausalLM.open(directories[arch])
    assert len(model.blocks) == 2
    stored = Checkpoint(directories[arch])
    model.load_block(0, "cpu", torch.float32)
    refs = model.linears(0)
    assert (len(refs), len({r.input_group for r in refs})) == COUNTS[arch]
    assert len({r.name for r in refs}) == len(refs)
    read: dict[str, list[torch.Tensor]] = defaultdict(list)
    for ref in refs:
        assert stored.shape(f"{ref.name}.weight") == tuple(ref.module.weight.shape)
        assert torch.equal(stored.tensor(f"{ref.name}.weight").float(), ref.module.weight)
        ref.module.register_forward_pre_hook(
            lambda _, args, group=ref.input_group: read[group].append(args[0])
        )
    with torch.no_grad():
        inputs = model.embed(ids)
        model.run_block(0, inputs.hidden, inputs)
    assert read
    for seen in read.values():  # linears of one group do read the same tensor
        assert all(torch.equal(seen[0], other) for other in seen)


@pytest.mark.parametrize("arch", MOE)
def test_routers_are_left_alone(arch: str, directories: dict[str, Path]) -> None:
    model = CausalLM.open(directories[arch])
    skipped = dict(model.skipped(0))
    prefix = "model.layers.0.block_sparse_moe" if arch == "mixtral" else "model.layers.0.mlp"
    assert skipped[f"{prefix}.gate"] == "router"
    assert (f"{prefix}.shared_expert_gate" in skipped) == (arch == "qwen2_moe")
    assert not set(skipped) & {ref.name for ref in model.linears(0)}


def test_names_on_disk(directories: dict[str, Path]) -> None:
    mixtral = CausalLM.open(directories["mixtral"])
    names = {ref.path: ref.name for ref in mixtral.linears(0)}
    where = "model.layers.0.block_sparse_moe.experts.3"
    assert names["model.layers.0.mlp.experts.3.gate_proj"] == f"{where}.w1"
    assert names["model.layers.0.mlp.experts.3.down_proj"] == f"{where}.w2"
    assert names["model.layers.0.mlp.experts.3.up_proj"] == f"{where}.w3"
    neox = CausalLM.open(directories["gpt_neox"])
    assert [name for name, _ in neox.outside_linears()] == ["embed_out"]


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_names_of_a_quantized_checkpoint(
    tmp_path: Path, directories: dict[str, Path], part: str
) -> None:
    directory = tiny.build("mixtral", tmp_path)
    weights = load_file(directory / "model.safetensors")
    moved = {
        name.replace(".weight", f".{part}") if ".w" in name else name: value
        for name, value in weights.items()
    }
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    plain, quantized = CausalLM.open(directories["mixtral"]), CausalLM.open(directory)
    assert [r.name for r in quantized.linears(1)] == [r.name for r in plain.linears(1)]


def test_experts_stored_fused_stay_fused(
    tmp_path: Path, directories: dict[str, Path], ids: torch.Tensor
) -> None:
    directory = tiny.build("qwen3_moe", tmp_path)
    weights = load_file(directory / "model.safetensors")
    for i in range(2):
        prefix = f"model.layers.{i}.mlp.experts"

        gate, up, down = (
            [weights.pop(f"{prefix}.{e}.{leaf}.weight") for e in range(tiny.EXPERTS)]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        gate_up = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        weights[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        weights[f"{prefix}.down_proj"] = torch.stack(down)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = CausalLM.open(directory)
    assert len(model.linears(0)) == 4
    assert ("model.layers.0.mlp.experts.down_proj", FUSED_EXPERTS) in model.skipped(0)
    assert model.numel("model.layers.0.mlp.experts.down_proj") == tiny.EXPERTS * 64 * 64
    assert model.check_weights() == []
    expected = reference(directories["qwen3_moe"])(ids).logits
    assert torch.allclose(model.load_full(torch.float32)(ids).logits, expected, atol=1e-5)


def test_blocks_that_get_more_of_the_text_are_refused(
    directories: dict[str, Path], ids: torch.Tensor
) -> None:
    model = CausalLM.open(directories["llama"])
    model.embed(ids)
    model.embed(ids.flip(1))  # other text of that shape: the blocks' arguments are the same
    model.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": kwargs["input_ids"] % 64}),
        with_kwargs=True,
    )
    model.embed(ids[:1])
    with pytest.raises(RunError, match="depend on the text"):
        model.embed(ids[:1].flip(1))


@pytest.mark.parametrize(("error", "refused"), [(2e-4, False), (2e-2, True)])
def test_rounding_of_the_blocks_inputs_is_no_dependence_on_the_text(
    directories: dict[str, Path], ids: torch.Tensor, error: float, refused: bool
) -> None:
    model = CausalLM.open(directories["llama"])
    model.embed(ids)
    model.model.model.rotary_emb.register_forward_hook(
        lambda _, __, tables: tuple(table + error for table in tables)
    )
    with pytest.raises(RunError, match="depend on the text") if refused else nullcontext():
        model.embed(ids)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_weights_are_complete(arch: str, directories: dict[str, Path]) -> None:
    model = CausalLM.open(directories[arch])
    assert model.check_weights() == []
    assert model.num_parameters == sum(p.numel() for p in reference(directories[arch]).parameters())


def test_equal_bits_from_run_to_run(directories: dict[str, Path], ids: torch.Tensor) -> None:
    def run() -> torch.Tensor:
        model = CausalLM.open(directories["llama"])
        with torch.no_grad():
            inputs = model.embed(ids)
            model.load_block(0, "cpu", torch.float32)
            return model.run_block(0, inputs.hidden, inputs)

    assert torch.equal(run(), run())


def test_replaced_linear_survives_loading(directories: dict[str, Path], ids: torch.Tensor) -> None:
    model = CausalLM.open(directories["llama"])
    ref = model.linears(1)[0]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight: torch.Tensor
            self.register_buffer("weight", torch.zeros(ref.module.weight.shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    model.replace_linear(ref, Holder())
    full = model.load_full(torch.float32)
    assert not full.get_submodule(ref.path).weight.any()
    assert torch.isfinite(full(ids).logits).all()


def test_tied_weights_stay_tied_whichever_name_is_stored(
    tmp_path: Path, directories: dict[str, Path], ids: torch.Tensor
) -> None:
    expected = reference(directories["llama"])(ids).logits
    other = tiny.build("llama", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for directory in (directories["llama"], other):
        model = CausalLM.open(directory)
        model.check_weights()
        full = model.load_full(torch.float32)
        assert full.lm_head.weight is full.model.embed_tokens.weight
        assert torch.allclose(full(ids).logits, expected, atol=1e-5)


def test_dtype_is_the_one_on_disk(tmp_path: Path, ids: torch.Tensor) -> None:
    directory = tiny.build("llama", tmp_path)
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    model = CausalLM.open(directory)
    assert model.config.dtype == torch.bfloat16
    full = model.load_full(torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert torch.equal(full(ids).logits, expected(ids).logits)


def test_checkpoint_without_the_models_prefix(
    tmp_path: Path, directories: dict[str, Path], ids: torch.Tensor
) -> None:
    directory = tiny.build("llama", tmp_path)
    weights = load_file(directory / "model.safetensors")
    stripped = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(stripped, directory / "model.safetensors", metadata={"format": "pt"})
    model = CausalLM.open(directory)
    assert model.check_weights() == []
    assert model.linears(0)[0].name == "layers.0.self_attn.q_proj"
    expected = reference(directories["llama"])(ids).logits
    assert torch.allclose(model.load_full(torch.float32)(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda w, k: w.pop(k), "missing"),
        (lambda w, k: w.update({k: w[k][:-1].contiguous()}), "config.json says"),
        (lambda w, k: w[k].view(-1)[5:6].fill_(float("nan")), "NaN"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, damage: object, words: str) -> None:
    directory = tiny.build("llama", tmp_path)
    weights = load_file(directory / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    damage(weights, key)  # type: ignore[operator]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=words) as caught:
        CausalLM.open(directory).check_weights()
    assert key in str(caught.value)


def test_surplus_weights_are_noted(tmp_path: Path) -> None:
    directory = tiny.build("llama", tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.extra.weight"] = torch.zeros(3)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (note,) = CausalLM.open(directory).check_weights()
    assert "model.extra.weight" in note


def test_unknown_architecture_is_one_clear_error(tmp_path: Path) -> None:
    directory = tiny.build("llama", tmp_path)
    config = (directory / "config.json").read_text().replace('"llama"', '"no_such_model"')
    (directory / "config.json").write_text(config)
    with pytest.raises(RunError, match="cannot build"):
        CausalLM.open(directory)
