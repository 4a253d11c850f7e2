"""AutoRound on given calibration tokens, for `benchmarks/quantizers.py`.

    PYTHON_WITH_AUTO_ROUND benchmarks/peers/autoround.py MODEL TOKENS.npy OUTPUT OPTIONS

TOKENS is int32 [samples, length]; OPTIONS is JSON: iterations, learning_rate (theirs when not
given), group_size, symmetric. Writes the model with its weights rounded ("fake quantized", in the
model's dtype) and, last, a line of JSON with the seconds that tuning took (loading and saving not
counted).
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_dir, tokens_file, output, text = sys.argv[1:5]
    options = json.loads(text)
    tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(8)
    ]
    tuner = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=options["group_size"],
        sym=options["symmetric"],
        iters=options["iterations"],
        lr=options.get("learning_rate"),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=8,
        dataset=batches,
        device_map="cpu",
        low_cpu_mem_usage=False,
    )
    started = time.perf_counter()
    tuned, _ = tuner.quantize()
    seconds = time.perf_counter() - started
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    weights = {name: value for name, value in tuned.state_dict().items()}
    missing = plain.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise SystemExit(f"AutoRound's model lacks {missing[:3]}")
    plain.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
