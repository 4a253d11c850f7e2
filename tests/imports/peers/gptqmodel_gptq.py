"""Quantize a model by GPTQModel, W4A16, and say what its own tools make of it.

    PYTHON_WITH_GPTQMODEL gptqmodel_gptq.py MODEL OUTPUT WINDOWS.json WEIGHTS.safetensors OPTIONS

WINDOWS is a list of lists of token ids, calibrated on and scored; OPTIONS is JSON, arguments of
``QuantizeConfig``. WEIGHTS gets every linear's weight as GPTQModel dequantizes it; the last line is
the mean loss over the windows.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

# On two cores it gives itself one worker, and then refuses to start for having too few.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main() -> None:
    source, output, windows, weights, options = sys.argv[1:6]
    with open(windows, encoding="utf-8") as file:
        rows = json.load(file)
    config = QuantizeConfig(bits=4, **json.loads(options))
    model = GPTQModel.load(source, config, device="cpu", backend=BACKEND.AUTO)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    model.save(output)
    AutoTokenizer.from_pretrained(source).save_pretrained(output)
    back = GPTQModel.load(output, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    inner = back.model.float()
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = inner(torch.tensor([row]), use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]))))
        made = {
            name: module.dequantize_weight().T.float().contiguous()
            for name, module in inner.named_modules()
            if hasattr(module, "dequantize_weight") and hasattr(module, "qweight")
        }
    save_file(made, weights)
    print(json.dumps(sum(losses) / len(losses)))


if __name__ == "__main__":
    main()
