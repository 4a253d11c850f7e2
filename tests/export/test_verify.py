"""Proof by consumers: what agrees is verified, what does not is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.export import compressed_tensors, dense, readers, verify
from compressor.quantize.codes import iterate_quantized
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests.export.test_gptq import quantized
from tests.projects import RECIPE, compress, report, write

PROMPTS = [[5, 6, 7, 8], [40, 50, 60]]


def reference(tmp_path: Path) -> verify.Reference:
    stage = StoredStage("", tmp_path / "codes", {"result": {}})
    return verify.make_reference(quantized_model(tmp_path / "model", stage, "cpu"), PROMPTS, 6)


def test_the_reference_is_greedy(tmp_path: Path) -> None:
    quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    made = reference(tmp_path)
    stage = StoredStage("", tmp_path / "codes", {"result": {}})
    model = quantized_model(tmp_path / "model", stage, "cpu")
    for row, start, logits, prompt in zip(
        made.sequences, made.starts, made.logits, PROMPTS, strict=True
    ):
        assert row[:start] == prompt and len(row) == len(prompt) + 6
        with torch.no_grad():
            whole = model(torch.tensor([row])).logits[0, start - 1 : -1]
        torch.testing.assert_close(whole, logits, rtol=1e-4, atol=1e-4)
        assert whole.argmax(-1).tolist() == row[start:]


@pytest.mark.parametrize("write_format", [dense.export, compressed_tensors.export])
def test_transformers_verifies_and_refuses(tmp_path: Path, write_format: Any) -> None:
    ignore = quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    fmt = "safetensors" if write_format is dense.export else "compressed-tensors"
    own = () if write_format is dense.export else (ignore,)
    out = tmp_path / "out"
    write_format(tmp_path / "model", iterate_quantized(tmp_path / "codes"), *own, {}, out)
    made = reference(tmp_path)
    found = verify.verify_artifact(out, fmt, made, ["transformers"], "")
    assert found.verified and found.loads and found.greedy_agreement == 1.0
    assert found.max_logit_difference is not None and found.max_logit_difference < 1e-3
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight" + ("" if fmt == "safetensors" else "_scale")
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = verify.verify_artifact(out, fmt, made, ["transformers"], "")
    assert found.verified is False and found.loads and "off" in found.why


def test_what_transformers_cannot_read_is_not_called_wrong(tmp_path: Path) -> None:
    ignore = quantized(tmp_path, "llama", scheme="W4A16", group_size=32, symmetric=False)
    codes = iterate_quantized(tmp_path / "codes")
    compressed_tensors.export(tmp_path / "model", codes, ignore, {}, tmp_path / "out")
    found = verify.verify_artifact(
        tmp_path / "out", "compressed-tensors", reference(tmp_path), ["transformers"], ""
    )
    assert found.verified is None and "zero points" in found.why


def test_plain_weights_that_do_not_load_are_refused(tmp_path: Path) -> None:
    quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    dense.export(tmp_path / "model", iterate_quantized(tmp_path / "codes"), {}, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"nothing")
    found = verify.verify_artifact(
        tmp_path / "out", "safetensors", reference(tmp_path), ["transformers"], ""
    )
    assert found.verified is False and not found.loads


def test_near_ties_may_fall_either_way() -> None:
    logits = torch.tensor([[1.0, 1.0 - 5e-4, 0.0], [0.0, 3.0, 1.0]])
    made = verify.Reference([[0, 0, 1]], [1], [logits])
    nearly = torch.cat([torch.tensor([[0.9997, 0.99975, 0.0], [0.0, 3.0, 1.0]]), logits[:1]])
    found = verify.compare_logits(made, [nearly], verify.EXACT, "x", "1")
    assert found.verified and found.greedy_agreement == 0.5
    other = torch.cat([logits[:1], torch.tensor([[0.0, 1.0, 3.0]]), logits[:1]])
    assert verify.compare_logits(made, [other], verify.EXACT, "x", "1").verified is False
    broken = torch.full((3, 3), float("nan"))
    assert verify.compare_logits(made, [broken], verify.EXACT, "x", "1").verified is False


LIBRARY = """
import json, sys
print("hello")
sequences = json.load(open(sys.argv[2]))
if {fails!r}:
    sys.exit("no kernel for this")
import torch
from safetensors.torch import load_file, save_file
save_file(load_file({logits!r}), sys.argv[3])
print(json.dumps({{"version": "9.9", "kernels": []}}))
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_library_of_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """An interpreter that answers as the program does, with logits made here."""
    quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    made = reference(tmp_path)
    stage = StoredStage("", tmp_path / "codes", {"result": {}})
    model = quantized_model(tmp_path / "model", stage, "cpu")
    with torch.no_grad():
        rows = [model(torch.tensor([row])).logits[0] for row in made.sequences]
    save_file({str(i): row for i, row in enumerate(rows)}, tmp_path / "logits.safetensors")
    program = tmp_path / "program.py"
    program.write_text(LIBRARY.format(fails=fails, logits=str(tmp_path / "logits.safetensors")))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("COMPRESSOR_GPTQMODEL_PYTHON", str(python))
    assert readers.available("gptq", ["gptqmodel"])[0] == ["gptqmodel"]
    found = verify.verify_artifact(tmp_path, "gptq", made, ["gptqmodel"], "")
    assert found.verified is not fails and found.loads is not fails
    assert "no kernel" in found.why if fails else found.version == "9.9"


def test_what_is_not_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMPRESSOR_GPTQMODEL_PYTHON", raising=False)
    here, missing = readers.available("gptq", ["transformers", "gptqmodel"])
    assert here == [] and "GPTQModel is not installed" in missing and "verify.engines" in missing


def test_a_run_says_what_verified_it(project: Path) -> None:
    recipe: dict[str, Any] = copy.deepcopy(RECIPE)
    recipe["variants"] = {"int4": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]}}
    recipe["export"] = ["compressed-tensors", "safetensors", "gptq"]
    write(project, recipe)
    done = compress(project, COMPRESSOR_GPTQMODEL_PYTHON="")
    assert done.returncode == 0, done.stderr
    (variant,) = [v for v in report(project)["variants"] if v["name"] == "int4"]
    by_format = {a["format"]: a["verification"] for a in variant["artifacts"]}
    for fmt in ("compressed-tensors", "safetensors"):
        assert by_format[fmt]["consumer"] == "transformers" and by_format[fmt]["verified"] is True
        assert by_format[fmt]["greedy_agreement"] == 1.0
    assert by_format["gptq"]["verified"] is None and "GPTQModel" in by_format["gptq"]["why"]
    done = compress(project, "run", "recipe.yaml", "--no-verify")
    assert done.returncode == 0, done.stderr
    (variant,) = [v for v in report(project)["variants"] if v["name"] == "int4"]
    assert all(a["verification"] is None for a in variant["artifacts"])


def test_an_artifact_that_computes_something_else_is_not_done(project: Path) -> None:
    """A consumer that gives the logits of the unquantized model: the variant fails, and its
    artifact is not laid out; without proof it is."""
    program = project / "program.py"
    program.write_text(
        "import json, sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(project / 'model')!r})\n"
        "rows = json.load(open(sys.argv[2]))\n"
        "with torch.no_grad():\n"
        "    made = [model(torch.tensor([row])).logits[0].clone() for row in rows]\n"
        "save_file({str(i): logits for i, logits in enumerate(made)}, sys.argv[3])\n"
        "print(json.dumps({'version': '1', 'kernels': []}))\n"
    )
    python = project / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    recipe: dict[str, Any] = copy.deepcopy(RECIPE)
    recipe["variants"] = {"int4": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]}}
    recipe["export"] = ["gptq"]
    write(project, recipe)
    done = compress(project, COMPRESSOR_GPTQMODEL_PYTHON=str(python))
    assert done.returncode == 1 and "is not what was evaluated" in done.stderr
    (run,) = (project / "runs" / "recipe").iterdir()
    assert not (run / "artifacts" / "int4").exists()
    made = json.loads((run / "report" / "report.json").read_text())
    assert [v["status"] for v in made["variants"]] == ["ok", "failed"]
