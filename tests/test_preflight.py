"""What is said before any work: kernels for the model's own shapes, memory, sources."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from compressor.errors import RecipeError, RunError
from compressor.estimates import Estimate
from compressor.plan import Plan, make_plan
from compressor.preflight import Preflight, llama_cpp_targets, preflight, vllm_targets
from compressor.recipe import load_recipe
from compressor.store import Store
from compressor.support import Target
from tests import tiny

CPU = Target("vllm", "cpu")


def planned(
    tmp_path: Path,
    arch: str = "llama",
    engine: str = "transformers",
    export: tuple[str, ...] = ("compressed-tensors",),
    **variants: Any,
) -> Plan:
    if not (tmp_path / "model").exists():
        tiny.build(arch, tmp_path / "model")
    recipe = {
        "version": 1,
        "model": {"source": "model"},
        "calibration": {"source": "builtin:calibration", "samples": 8, "length": 64},
        "variants": {
            name: variant if isinstance(variant, dict) else {"quantize": variant}
            for name, variant in variants.items()
        },
        "measure": {"engine": engine},
        "export": list(export),
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))


def rtn(**options: Any) -> list[dict[str, Any]]:
    return [{"rtn": options}]


def levels(found: Preflight) -> dict[tuple[str, str], str]:
    return {(f.variant, f.target.engine): f.support.level for f in found.findings}


def test_engines_are_checked_against_the_shapes_of_the_model(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        int8=rtn(scheme="W8A8"),
        weights=rtn(scheme="W8A16"),
        int4=rtn(scheme="W4A16", group_size=32),
        fine=rtn(scheme="W4A16", group_size=16),
        int2=rtn(scheme="W2A16", group_size=32),
    )
    found = preflight(plan, [CPU])
    assert levels(found) == {
        ("int8", "transformers"): "native",
        ("weights", "transformers"): "native",
        ("int4", "transformers"): "native",
        ("fine", "transformers"): "dequantized",
        ("int2", "transformers"): "dequantized",
        ("int8", "vllm"): "native",
        ("weights", "vllm"): "fails",
        ("int4", "vllm"): "native",
        ("fine", "vllm"): "native",
        ("int2", "vllm"): "fails",
    }
    found.check()  # nothing of it keeps the engine that measures from loading
    shown = "\n".join(found.warnings)
    assert "weights (W8A16): vllm 0.32, CPU: will not load: no kernel for W8A16" in shown
    assert (
        "fine (W4A16, groups of 16): transformers, CPU: runs by dequantized weights, no faster"
        in shown
    )
    assert "int8" not in shown
    json.dumps([f.to_dict() for f in found.findings])


def test_a_group_size_that_the_quantizer_will_refuse_is_known_beforehand(tmp_path: Path) -> None:
    found = preflight(planned(tmp_path, odd=rtn(scheme="W4A16", group_size=48)), [CPU])
    assert not found.findings
    (note,) = found.notes
    assert note.startswith("odd (W4A16): group_size 48 does not divide the") and "refuse" in note


def test_ignored_linears_do_not_count(tmp_path: Path) -> None:
    variant = {
        "quantize": rtn(scheme="W4A16", group_size=128),
        "ignore": [r".*(self_attn|gate_proj|up_proj).*"],
    }
    found = preflight(planned(tmp_path, down=variant), [CPU])  # down_proj alone has 128 inputs
    assert found.notes == () and set(levels(found).values()) == {"native"}


def test_activation_order_without_static_groups_is_known_to_fail_in_vllm(tmp_path: Path) -> None:
    options = {"scheme": "W4A16", "group_size": 32, "desc_act": True}
    plan = planned(
        tmp_path, free=[{"gptq": options | {"static_groups": False}}], static=[{"gptq": options}]
    )
    found = levels(preflight(plan, [CPU]))
    assert found["free", "vllm"] == "fails" and found["static", "vllm"] == "native"


def test_mixed_precision_has_a_line_for_each_scheme(tmp_path: Path) -> None:
    variant = {
        "quantize": rtn(scheme="W4A16", group_size=32),
        "precision": {"mean_bits": 5, "schemes": ["W4A16", "W3A16", "W8A16"]},
    }
    found = preflight(planned(tmp_path, mixed=variant), [CPU])
    assert [f.scheme.split(",")[0] for f in found.findings if f.target == CPU] == [
        "W4A16", "W3A16", "W8A16",
    ]  # fmt: skip


def test_experts_in_three_dimensions_are_noticed(tmp_path: Path) -> None:
    path = tiny.build("qwen3_moe", tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    import torch

    for leaf in ("gate_proj", "up_proj", "down_proj"):
        names = [n for n in weights if f"layers.0.mlp.experts.{leaf}" in n or (
            "layers.0.mlp.experts." in n and n.endswith(f"{leaf}.weight"))]  # fmt: skip
        stacked = torch.stack([weights.pop(name) for name in sorted(names)])
        weights[f"model.layers.0.mlp.experts.{leaf}"] = stacked
    save_file(weights, path, metadata={"format": "pt"})
    (note,) = preflight(planned(tmp_path, int8=rtn(scheme="W8A8")), [CPU]).notes
    assert note.startswith("3 tensors hold all experts of a layer in one (") and "%" in note


def test_memory_that_cannot_suffice_is_refused_with_figures(tmp_path: Path) -> None:
    found = preflight(planned(tmp_path, int8=rtn(scheme="W8A8")), [CPU])
    found.check()
    assert {stage.kind for stage in found.stages} >= {"load", "quantize", "export", "measure"}
    small = Estimate(1.0, 10**9, 0, 10**9)
    estimate = Estimate(1.0, 9 * 10**9, 0)
    light, stage = (
        dataclasses.replace(s, estimate=e)
        for s, e in zip(found.stages, (small, estimate), strict=False)
    )
    short = dataclasses.replace(found, stages=(light, stage), free_bytes=3 * 10**9)
    short.check()  # it may need 9 GB, but could do with less
    assert any("may need 9.0 GB of memory, 3.0 GB are free" in line for line in short.warnings)
    floor = dataclasses.replace(estimate, least_memory=4 * 10**9)
    stage = dataclasses.replace(stage, estimate=floor)
    with pytest.raises(RunError, match=r"needs about 4\.0 GB of memory, 3\.0 GB are free"):
        dataclasses.replace(short, stages=(stage, light)).check()


def test_a_chosen_engine_that_cannot_load_a_variant_is_an_error(tmp_path: Path) -> None:
    found = preflight(planned(tmp_path, int2=rtn(scheme="W2A16", group_size=32)), [CPU])
    chosen = tuple(dataclasses.replace(f, chosen=f.target == CPU) for f in found.findings)
    with pytest.raises(RecipeError, match=r"variants\.int2: vllm .*cannot load it.*W2A16"):
        dataclasses.replace(found, findings=chosen).check()


@pytest.mark.parametrize(
    ("engine", "variable", "export", "script"),
    [
        ("vllm", "COMPRESSOR_VLLM_PYTHON", "compressed-tensors", "setup_vllm_cpu.sh"),
        ("llama.cpp", "COMPRESSOR_LLAMA_SERVER", "gguf", "setup_llama_cpp.sh"),
    ],
)
def test_an_engine_that_is_not_installed_is_missed_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    variable: str,
    export: str,
    script: str,
) -> None:
    scheme = {"vllm": "W8A8", "llama.cpp": "W8A16"}[engine]
    plan = planned(tmp_path, engine=engine, export=(export,), int8=rtn(scheme=scheme))
    monkeypatch.chdir(tmp_path)  # away from what the scripts installed
    monkeypatch.setenv(variable, sys.executable)  # only that it is there is looked at
    preflight(plan).check()
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises((RecipeError, RunError), match=script):
        preflight(plan).check()


def test_llama_cpp_is_looked_at_where_it_gets_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_LLAMA_SERVER", sys.executable)
    variants = {"fine": rtn(scheme="W4A16", group_size=16), "int8": rtn(scheme="W8A16")}
    plan = planned(tmp_path, engine="llama.cpp", export=("gguf",), **variants)
    found = preflight(plan)
    assert levels(found) == {
        ("fine", "transformers"): "dequantized",
        ("int8", "transformers"): "native",
        ("fine", "llama.cpp"): "dequantized",
        ("int8", "llama.cpp"): "native",
    }
    assert {f.target.device for f in found.findings if f.chosen} == {"cpu"}
    (warning,) = found.warnings
    assert warning.startswith("fine (W4A16, groups of 16): llama.cpp 0.5, CPU: runs by 16-bit")
    found.check()
    both = preflight(planned(tmp_path, export=("compressed-tensors", "gguf"), **variants))
    assert {f.target.engine for f in both.findings} == {"transformers", "vllm", "llama.cpp"}
    assert {f.target.engine for f in both.findings if f.chosen} == {"transformers"}


def test_this_machine_comes_first() -> None:
    for engine, targets in (("vllm", vllm_targets()), ("llama.cpp", llama_cpp_targets())):
        assert targets and all(target.engine == engine for target in targets)
    assert llama_cpp_targets()[0].device == "cpu"
