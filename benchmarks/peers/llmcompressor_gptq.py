"""(SmoothQuant and) GPTQ by llmcompressor on given tokens, for `benchmarks/quantizers.py`.

    PYTHON_WITH_LLMCOMPRESSOR benchmarks/peers/llmcompressor_gptq.py MODEL TOKENS.npy OUTPUT OPTIONS

TOKENS is int32 [samples, length]; OPTIONS is JSON: dtype, and either group_size, symmetric and
actorder for 4-bit weights, or `"scheme": "W8A8"` for SmoothQuant and GPTQ to int8. Writes
llmcompressor's own compressed-tensors checkpoint and, last, a line of JSON with the seconds that
`oneshot` took (loading the model not counted).
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_dir, tokens_file, output, text = sys.argv[1:5]
    options = json.loads(text)
    tokens = np.load(tokens_file)
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    if options.get("scheme") == "W8A8":
        recipe = [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ]
    else:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": options["symmetric"],
            "strategy": "group",
            "group_size": options["group_size"],
            "actorder": options["actorder"],
            "observer": "mse",
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(output, save_compressed=True)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(output)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
