"""Logits of a GPTQ or AWQ directory by GPTQModel, for `compressor.export.verify`.

    PYTHON_WITH_GPTQMODEL gptqmodel_logits.py DIRECTORY SEQUENCES.json OUTPUT.safetensors [COUNT]

SEQUENCES is a list of lists of token ids. OUTPUT gets ``0``, ``1``, ...: float32 [length,
vocabulary] each. Runs in an environment of its own, which need not have this package. The last line
is JSON: the library's version, the class that computed the quantized linears, and, with COUNT, how
many tokens a second it generates behind the first sequence, measured over so many.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from safetensors.torch import save_file

# On two cores it gives itself one worker, and then refuses to start for having too few.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))


def main() -> None:
    directory, sequences, output = sys.argv[1:4]
    import gptqmodel
    from gptqmodel import BACKEND, GPTQModel

    with open(sequences, encoding="utf-8") as file:
        rows = json.load(file)
    with open(f"{directory}/config.json", encoding="utf-8") as file:
        method = json.load(file)["quantization_config"]["quant_method"]
    backend = BACKEND.TORCH_AWQ if method == "awq" else BACKEND.TORCH
    model = GPTQModel.load(directory, device="cpu", backend=backend, dtype=torch.float16)
    # Its kernel is offered for 16 bits alone, and computes in whatever scales and inputs have.
    inner = getattr(model, "model", model).float()
    kernels = sorted(
        {
            type(m).__name__
            for m in inner.modules()
            if hasattr(m, "qweight") and hasattr(m, "scales")
        }
    )
    found = {}
    with torch.no_grad():
        for number, row in enumerate(rows):
            logits = inner(torch.tensor([row]), use_cache=False).logits[0]
            found[str(number)] = logits.float().contiguous()
    save_file(found, output)
    facts = {"version": gptqmodel.__version__, "kernels": kernels}
    if len(sys.argv) > 4:
        facts["tokens_per_s"] = speed(inner, rows[0], int(sys.argv[4]))
    print(json.dumps(facts))


@torch.no_grad()
def speed(model: torch.nn.Module, prompt: list[int], count: int) -> float:
    """Tokens generated per second behind a prompt, the prompt's own time not counted."""
    out = model(torch.tensor([prompt]), use_cache=True)
    started = time.perf_counter()
    for _ in range(count):
        step = out.logits[:, -1:].argmax(-1)
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
