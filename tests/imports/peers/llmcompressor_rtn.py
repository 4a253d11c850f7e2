"""Quantize a model by llmcompressor, round-to-nearest W4A16, and say what its own tools make of it.

    PYTHON_WITH_LLMCOMPRESSOR llmcompressor_rtn.py MODEL OUTPUT WINDOWS.json WEIGHTS.safetensors

WINDOWS is a list of lists of token ids. WEIGHTS gets every linear's weight as transformers and
compressed-tensors decompress the saved checkpoint; the last line is the mean loss over the windows.
"""

from __future__ import annotations

import json
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    source, output, windows, weights = sys.argv[1:5]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    grid = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(output, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(output)
    back = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    losses = []
    with open(windows, encoding="utf-8") as file, torch.no_grad():
        for row in json.load(file):
            ids = torch.tensor([row])
            losses.append(float(back(ids, labels=ids).loss))
    made = {
        name: module.weight.detach().float().contiguous()
        for name, module in back.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and hasattr(module, "weight")
    }
    save_file(made, weights)
    print(json.dumps(sum(losses) / len(losses)))


if __name__ == "__main__":
    main()
