"""bitsandbytes' format, as transformers writes and reads it.

``config.json`` carries ``quantization_config`` (transformers' ``BitsAndBytesConfig``); each
quantized linear has the tensors described in `compressor.numerics.bitsandbytes`, under its own name
in the checkpoint. Everything else is as in the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import RunError
from compressor.export.artifact import MAX_SHARD_BYTES, complete, write_json
from compressor.models.checkpoint import Checkpoint, TensorWriter
from compressor.numerics.bitsandbytes import library, prepare_modules

NAME = "bitsandbytes"


def export(
    model_dir: Path,
    quantized: Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    settings: Mapping[str, Any],
    provenance: dict[str, Any],
    directory: Path,
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, its tensors by part), in any order, read once.
        settings: arguments of ``BitsAndBytesConfig``.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
    """
    from transformers import BitsAndBytesConfig

    directory.mkdir(parents=True, exist_ok=True)
    source = Checkpoint(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    writer = TensorWriter(directory, MAX_SHARD_BYTES)
    replaced = set()
    for name, tensors in quantized:
        for part, value in tensors.items():
            writer.add(f"{name}.{part}", value)
        replaced.add(f"{name}.weight")
    for name in source.names:
        if name not in replaced:
            writer.add(name, source.tensor(name))
    writer.close()
    config["quantization_config"] = BitsAndBytesConfig(**settings).to_dict()
    write_json(directory / "config.json", config)
    complete(model_dir, provenance, directory)


def load_model(
    directory: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A bitsandbytes directory (ours or another tool's), loaded by transformers with the library's
    own modules and kernels.

    Args:
        directory: the artifact.
        dtype: of activations and of everything that is not quantized.
        device: of the model.

    Raises:
        RunError: the library is missing, or transformers cannot load the directory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    library()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map={"": device}, local_files_only=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError) as error:
        raise RunError(
            f"transformers cannot load it ({str(error).splitlines()[0]})",
            where=str(directory),
            fix="export the model again with the library versions in constraints.txt",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    prepare_modules(model)
    return model.eval()
