"""GPTQ by GPTQModel on given calibration tokens, for `benchmarks/quantizers.py`.

    PYTHON_WITH_GPTQMODEL benchmarks/peers/gptqmodel_gptq.py MODEL TOKENS.npy OUTPUT OPTIONS

TOKENS is int32 [samples, length]; OPTIONS is JSON: group_size, symmetric, desc_act. GPTQModel's own
checkpoint is read back by hand and written as plain float32 weights, so that one evaluator serves
all. The last line is JSON with the seconds that `quantize` took (loading and saving not counted).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

# On two cores it gives itself one worker, and then refuses to start for having too few.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """int32 words to eight 4-bit values each, along ``dim``, lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    spread = (packed.unsqueeze(dim + 1) >> shifts.view([-1] + [1] * (packed.ndim - dim - 1))) & 15
    return spread.flatten(dim, dim + 1)


def main() -> None:
    model_dir, tokens_file, output, text = sys.argv[1:5]
    options = json.loads(text)
    tokens = np.load(tokens_file)
    config = QuantizeConfig(
        bits=4,
        group_size=options["group_size"],
        sym=options["symmetric"],
        desc_act=options["desc_act"],
    )
    model = GPTQModel.load(model_dir, config, device="cpu", backend=BACKEND.AUTO)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    started = time.perf_counter()
    model.quantize(rows, batch_size=8)
    seconds = time.perf_counter() - started
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        files = list(Path(scratch).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        tensors = {name: value for path in files for name, value in load_file(path).items()}
        written = json.loads((Path(scratch) / "quantize_config.json").read_text())
    offset = 1 if written.get("checkpoint_format", written.get("format")) == "gptq" else 0
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        codes = unpack(tensors[f"{name}.qweight"], 0)  # [in, out]
        zeros = unpack(tensors[f"{name}.qzeros"], 1) + offset  # [groups, out]
        index = tensors[f"{name}.g_idx"].long()
        scale = tensors[f"{name}.scales"].float()
        weight = (codes - zeros[index]).float() * scale[index]
        plain.get_submodule(name).weight.data.copy_(weight.T)
    plain.save_pretrained(output)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(output)
    print(json.dumps({"seconds": seconds, "size_bytes": size}))


if __name__ == "__main__":
    main()
