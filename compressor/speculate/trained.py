"""A model that was trained here, written as a checkpoint like the one that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import write_checkpoint

_SHARD_BYTES = 4_000_000_000


def trained_tensors(opened: CausalLM, model: Any) -> dict[str, torch.Tensor]:
    """The parameters of a loaded model by their keys in the checkpoint that it was loaded from.

    Args:
        opened: the checkpoint.
        model: what it was loaded into; tied parameters may be stored once or twice.

    Raises:
        RunError: the checkpoint does not hold a parameter as it is: what training made of it would
            be lost.
    """
    found: dict[str, torch.Tensor] = {}
    kept, elsewhere = set(), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = opened.disk_name(name)
        if opened.checkpoint.has(key):
            found[key] = parameter.detach()
            kept.add(id(parameter))
        else:
            elsewhere[name] = id(parameter)
    lost = [name for name, one in elsewhere.items() if one not in kept]
    if lost:
        raise RunError(
            f"{len(lost)} weights are stored otherwise than they are trained, such as {lost[0]}",
            where=str(opened.checkpoint.directory),
            fix="train Medusa or EAGLE-3 heads for this model, which leave its weights alone",
        )
    return found


def write_trained(opened: CausalLM, trained: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write a checkpoint with other values, complete with its tokenizer and other files.

    Args:
        opened: the checkpoint that it started from.
        trained: by key there; they get its dtypes. Tensors that are not given stay as they are.
        directory: made anew.
    """
    source = opened.checkpoint
    tensors = (
        (key, trained[key].cpu().to(source.dtype(key)) if key in trained else source.tensor(key))
        for key in source.names
    )
    write_checkpoint(tensors, source.directory, directory, _SHARD_BYTES)
