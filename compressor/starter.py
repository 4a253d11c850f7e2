"""The commented recipe that `compress init` writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

_TEMPLATE = """\
# For completion in an editor: compress schema > recipe.schema.json
# Every key is described in docs/recipe.md. See what a run will take: compress plan {file}
version: 1

model:
  source: {source}
  # revision: <commit>            # pin a Hub model, so that the run can be repeated

# Text that statistics are collected on; never evaluate on it.
calibration:
  source: builtin:calibration     # or your own .txt/.jsonl file, or a data set on the Hub
  samples: 128
  length: 512

# Each variant is compared with the baseline, the model as it is.
variants:
  int8:
    quantize:
      - smoothquant:               # outlier channels of activations move into the weights
      - gptq: {{scheme: W8A8}}      # int8 weights and activations: cheaper under load
  int4:
    quantize:
      # int4 weights: smallest, cheapest per stream. The group must divide the model's hidden
      # sizes: where 128 does not, take 64 or 32.
      - gptq: {{scheme: W4A16, group_size: 128, observer: output}}

# What was lost: perplexity, KL divergence, top-1 agreement on text the model was not calibrated on.
evaluate:
  texts:
    - {{name: novel, source: "builtin:novel"}}
    - {{name: web, source: "builtin:web"}}
    - {{name: questions, source: "builtin:questions"}}

# What each token costs on this device, under your load.
measure:
  workload:
    input_length: 128
    output_length: 64
    concurrency: [1, 4]
  # prices: {{usd_per_hour: 0.10}}  # what you pay; a dated table is used when not given

export: [compressed-tensors]      # loads in vLLM, SGLang, TGI and transformers
"""


def starter(source: str, file: str) -> str:
    """The text of a starter recipe for a model."""
    # Plain only where YAML surely reads text: `123`, `no` or `1.5` would be something else.
    plain = re.fullmatch(r"[A-Za-z][\w.-]*/[\w./-]+", source, re.ASCII)
    quoted = source if plain else json.dumps(source)
    return _TEMPLATE.format(source=quoted, file=file)


def relative_source(source: str, directory: Path) -> str:
    """``source`` as a recipe in ``directory`` must name it: paths there start from the recipe.

    A Hub id, a ``package:`` source, an absolute path and a path that does not exist stay as given.
    """
    path = Path(source)
    if path.is_absolute() or not path.exists():
        return source
    found = Path(os.path.relpath(path.resolve(), directory.resolve())).as_posix()
    return found if found.startswith(".") else f"./{found}"


def default_file(source: str) -> Path:
    """File name for a model's recipe, such as ``smollm2-135m.yaml``."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name.removesuffix(".gguf")).strip("-.")
    return Path(f"{stem.lower() or 'recipe'}.yaml")
