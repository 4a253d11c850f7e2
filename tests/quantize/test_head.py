"""The output layer: its codes against the algorithm run directly, its parts, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.quantize import codes, driver, head, registry, stream
from tests import tiny
from tests.quantize.cuts import Cut, cut_after

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)
IDS = torch.from_numpy(TOKENS.astype(np.int64))


def algorithm(name: str = "gptq", **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}), torch.float32)


def refinement(name: str, **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**options), torch.float32)


def plain(model_dir: Path, out: Path) -> Any:
    """transformers' own model with the dequantized weights of the blocks."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor, _ in codes.iterate_quantized(out):
            if name != "lm_head":
                model.get_submodule(name).weight.copy_(tensor.dequantize())
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "refine"),
    [
        ("rtn", {"scheme": "W8A16", "group_size": None}, False),
        ("gptq", {"scheme": "W4A16"}, False),
        ("gptq", {"scheme": "W8A8", "group_size": None, "desc_act": True}, False),
        ("gptq", {"scheme": "W4A16"}, True),
    ],
)
def test_codes_are_the_algorithms_own_on_the_final_norms_output(
    tmp_path: Path, tied: bool, name: str, options: dict[str, Any], refine: bool
) -> None:
    tiny.build("llama", tmp_path / "model", tie_word_embeddings=tied)
    quantizer = algorithm(name, **options)
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    original = quantizer.quantize_all
    quantizer.quantize_all = lambda w, h: (seen.append((w[0], h)), original(w, h))[1]
    steps = [refinement("coordinate_descent", passes=2)] if refine else []
    facts = driver.quantize_model(
        CausalLM.open(tmp_path / "model"), algorithm(name), tmp_path / "out", head=quantizer,
        refinements=steps, tokens=TOKENS, batch_size=3,
    )  # fmt: skip
    found = {n: t for n, t, _ in codes.iterate_quantized(tmp_path / "out")}["lm_head"]
    found.validate()
    model = plain(tmp_path / "model", tmp_path / "out")
    with torch.no_grad():
        x = model.model(IDS).last_hidden_state.flatten(0, 1).double()
    weight = model.lm_head.weight.detach()
    ((solved, hessian),) = seen
    target = weight.double()
    if options["scheme"] == "W8A8":
        # Statistics of the inputs as they are served, and weights that make up for the difference.
        size = x.abs().amax(1, keepdim=True) / 127
        exact, x = x, torch.round(x / size) * size
        second = x.T @ x
        damped = second + 0.01 * second.diagonal().mean() * torch.eye(len(second))
        target = target + target @ ((exact - x).T @ x) @ torch.linalg.inv(damped)
    # A rounding of an input at a tie may differ.
    rtol, atol = (1e-2, 1e-3) if options["scheme"] == "W8A8" else (1e-3, 1e-4)
    torch.testing.assert_close(solved.double(), target, rtol=rtol, atol=atol)
    if name == "gptq":
        assert hessian is not None
        torch.testing.assert_close(hessian.double(), 2 / len(x) * x.T @ x, rtol=rtol, atol=atol)
    expected = quantizer.quantize(solved, hessian)
    for step in steps:
        expected = step.refine(solved, expected, hessian)
    assert torch.equal(found.codes, expected.tensor.codes)
    assert torch.equal(found.scale, expected.tensor.scale)
    record = codes.read_layers(tmp_path / "out")[-1]
    assert record["name"] == "lm_head" and record["parameters"] == weight.numel()
    assert record["scheme"] == quantizer.scheme.to_dict()
    assert record["tokens"] == (TOKENS.size if name == "gptq" else None)
    assert record["error"] == pytest.approx(expected.error)
    assert record["rtn_error"] == pytest.approx(expected.rtn_error)
    coverage = facts["coverage"]
    assert "lm_head" not in {entry["name"] for entry in coverage["skipped"]}
    stored = sum(p.numel() for p in model.parameters()) + (weight.numel() if tied else 0)
    assert coverage["total_parameters"] == stored
    layers = codes.read_layers(tmp_path / "out")
    assert coverage["quantized_parameters"] == sum(r["parameters"] for r in layers)
    assert coverage["head_parameters"] == weight.numel()


@pytest.mark.parametrize("arch", ["bloom", "gemma3", "gpt_neox", "opt", "mixtral", "phi3"])
def test_the_input_is_found_in_every_architecture(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    ref = model.head()
    assert ref is not None
    whole = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    seen: dict[str, torch.Tensor] = {}
    last = whole.get_submodule(model.block_names[-1])
    last.register_forward_hook(
        lambda _, args, out: seen.update(hidden=out[0] if isinstance(out, tuple) else out)
    )
    whole.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.update(input=args[0])
    )
    with torch.no_grad():
        whole(IDS)
        got = model.head_input(seen["hidden"], IDS)
    assert torch.equal(got, seen["input"])
    assert all(p.is_meta for p in ref.module.parameters()) or model.head_is_tied


def test_a_transform_or_rotation_before_it_reaches_the_head_by_its_input_only(
    tmp_path: Path,
) -> None:
    tiny.build("llama", tmp_path / "model")
    cls = registry.get("awq")
    driver.quantize_model(
        CausalLM.open(tmp_path / "model"), algorithm("rtn"), tmp_path / "out",
        head=algorithm("rtn"), transforms=[cls(cls.Options())], tokens=TOKENS,
    )  # fmt: skip
    assert "model.norm.weight" not in codes.replaced_tensors(tmp_path / "out")
    found = {n: t for n, t, _ in codes.iterate_quantized(tmp_path / "out")}["lm_head"]
    weight = CausalLM.open(tmp_path / "model").checkpoint.tensor("model.embed_tokens.weight")
    assert torch.equal(found.codes, algorithm("rtn").quantize(weight.float()).tensor.codes)
    assert codes.read_layers(tmp_path / "out")[-1]["tokens"] == TOKENS.size


def correlated(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    return weight, 2 / len(x) * x.T @ x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, refine: bool, dtype: torch.dtype
) -> None:
    weight, hessian = correlated(301, 32, 0)
    weight = weight.to(dtype)
    quantizer = algorithm(symmetric=symmetric, desc_act=True)
    steps = [refinement("coordinate_descent")] if refine else []
    expected = quantizer.quantize(weight.float(), hessian)
    for step in steps:
        expected = step.refine(weight.float(), expected, hessian)
    monkeypatch.setattr(head, "PART_ELEMENTS", 1)  # parts of 128 rows: the last is shorter
    found = head.quantize_in_parts(weight, hessian, quantizer, steps)
    found.tensor.validate()
    assert float((found.tensor.codes != expected.tensor.codes).float().mean()) < 1e-3
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    assert found.rtn_error == pytest.approx(expected.rtn_error, rel=1e-3)
    assert found.damp == expected.damp and found.fallback == expected.fallback


def test_rows_share_one_order_of_groups_though_some_parts_fall_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, hessian = correlated(24, 32, 1)
    quantizer = algorithm(desc_act=True, static_groups=False, damp=1.0)
    monkeypatch.setattr(head, "PART_ELEMENTS", 32)
    monkeypatch.setattr(head, "_LEAST_ROWS", 0)
    alone = {quantizer.quantize(row, hessian).fallback for row in weight.split(1)}
    assert alone == {True, False}  # else this tests nothing
    found = head.quantize_in_parts(weight, hessian, quantizer)
    expected = quantizer.quantize(weight, hessian)
    assert found.tensor.g_idx is not None and expected.tensor.g_idx is not None
    assert torch.equal(found.tensor.g_idx, expected.tensor.g_idx)
    assert torch.equal(found.tensor.codes, expected.tensor.codes)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize(("last", "resumed_at"), [("block 1", 2), ("block 2", 3), ("lm_head", 4)])
def test_a_walk_cut_short_goes_on_to_the_same_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, last: str, resumed_at: int
) -> None:
    tiny.build("llama", tmp_path / "model", layers=3)
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)

    def run(out: str, advance: Any = lambda note: None) -> dict[str, Any]:
        return driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm(name), tmp_path / out,
            head=algorithm(name), tokens=TOKENS, batch_size=4, advance=advance,
        )  # fmt: skip

    run("whole")
    with pytest.raises(Cut):
        run("parts", cut_after(last))
    assert run("parts")["resumed_at_block"] == resumed_at
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert "head.safetensors" in names
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names
    for file in names:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_a_head_killed_before_its_file_is_there_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its record is written first: it must not be there twice."""
    tiny.build("llama", tmp_path / "model")
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)
    save = codes.save_synced

    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        if path.name == "head.safetensors":
            raise Cut
        save(tensors, path, metadata)

    def run(out: str) -> None:
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm(name), tmp_path / out,
            head=algorithm(name), tokens=TOKENS,
        )  # fmt: skip

    run("whole")
    monkeypatch.setattr(driver, "save_synced", killed)
    with pytest.raises(Cut):
        run("parts")
    assert codes.read_layers(tmp_path / "parts")[-1]["name"] == "lm_head"
    monkeypatch.setattr(driver, "save_synced", save)
    run("parts")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_a_group_size_that_does_not_fit_is_refused_before_the_walk(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    with pytest.raises(RunError, match="48") as caught:
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm("rtn"), tmp_path / "out",
            head=algorithm("rtn", group_size=48),
        )  # fmt: skip
    assert caught.value.where == "lm_head" and "lm_head" in (caught.value.fix or "")
    assert not list((tmp_path / "out").iterdir())
