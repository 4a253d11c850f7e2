"""Medusa heads as vLLM and as text-generation-inference (TGI) load them.

vLLM (`vllm/model_executor/models/medusa.py`): ``config.json`` and ``model.safetensors`` with
``blocks.{head}.layers.{layer}.weight|bias``, ``lm_heads.{head}.weight`` and ``token_map``. One
output layer for all heads is its ``original_lm_head``: the weight comes from the file, whether it
is the target's or was trained. It drafts the likeliest token of each head, no tree.

TGI (`server/text_generation_server/layers/medusa.py`): ``medusa_lm_head.safetensors`` with
``{head}.{layer}.linear.weight|bias`` and ``{head}.{layers}.weight``; without the last, heads of one
layer take the target's own output layer. It knows no reduced vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.export.artifact import write_json, write_sums
from compressor.models.checkpoint import SINGLE, Checkpoint, save_whole

TGI_FILE = "medusa_lm_head.safetensors"
_TOKEN_MAP = "token_map"


def export_vllm(
    state: Mapping[str, torch.Tensor],
    shape: Mapping[str, Any],
    provenance: Mapping[str, Any],
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write heads as vLLM loads them.

    Args:
        state: of `speculate.medusa.MedusaHeads`, by its names.
        shape: its ``shape()``.
        provenance: written as ``compression.json``; must hold no times.
        directory: made if need be.
        dtype: that weights are stored in.

    Raises:
        RunError: heads of a reduced vocabulary with an output layer for each: vLLM makes those for
            the whole vocabulary.
    """
    token_map = state.get(_TOKEN_MAP)
    if token_map is not None and shape["output"] == "own" and shape["heads"] > 1:
        raise RunError(
            "vLLM loads a reduced vocabulary only where all heads share one output layer",
            where="draft_vocabulary",
            fix="set output: shared (or original), or leave draft_vocabulary out",
        )
    # Its loader takes any key that holds "num" and "heads" or "layers" for one of these two.
    config: dict[str, Any] = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": shape["hidden"],
        "vocab_size": shape["vocabulary"],
        "truncated_vocab_size": shape["vocabulary"] if token_map is None else len(token_map),
        "num_heads": shape["heads"],
        "num_hidden_layers": shape["layers"],
        "medusa_fc_bias": True,
        "original_lm_head": shape["output"] != "own" or token_map is not None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if shape["scale"] != 1.0:
        config["logit_scale"] = shape["scale"]
    _write(_stored(state, dtype), directory / SINGLE, config, provenance)


def load_medusa(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `export_vllm` wrote, in float32: state and shape, for `MedusaHeads.from_state`.

    One output layer for all heads comes back as ``shared``: nothing tells whether it was trained.

    Raises:
        RunError: it is not there, or no such directory.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        shape = {
            "hidden": config["hidden_size"],
            "vocabulary": config["vocab_size"],
            "heads": config["num_heads"],
            "layers": config["num_hidden_layers"],
            "output": "shared" if config["original_lm_head"] else "own",
            "scale": config.get("logit_scale", 1.0),
        }
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"not a directory of Medusa heads ({error!r})",
            where=str(directory),
            fix="give one that was exported for vLLM",
        ) from error
    checkpoint = Checkpoint(directory)
    state = {
        name: checkpoint.tensor(name, None if name == _TOKEN_MAP else torch.float32)
        for name in checkpoint.names
    }
    return state, shape


def export_tgi(
    state: Mapping[str, torch.Tensor],
    shape: Mapping[str, Any],
    provenance: Mapping[str, Any],
    directory: Path,
    *,
    base_model: str,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write heads as TGI loads them (``text-generation-launcher --model-id DIRECTORY``).

    Args:
        state, shape, provenance, directory, dtype: as for `export_vllm`.
        base_model: id or directory of the target, which TGI loads from there; a relative one starts
            where TGI was started.

    Raises:
        RunError: the vocabulary is reduced and the output layer not the target's own.
    """
    heads, layers = shape["heads"], shape["layers"]
    # The target's own output layer knows every token: a reduced vocabulary is then no matter.
    bare = shape["output"] == "original" and layers == 1
    if _TOKEN_MAP in state and not bare:
        raise RunError(
            "TGI knows no reduced vocabulary",
            where="draft_vocabulary",
            fix="leave it out, or set output: original with layers: 1",
        )
    tensors = {}
    for name, value in _stored(state, dtype).items():
        if name.startswith("blocks."):
            _, block, _, layer, kind = name.split(".")
            tensors[f"{block}.{layer}.linear.{kind}"] = value
    if not bare:
        for head in range(heads):
            own = head if shape["output"] == "own" else 0
            tensors[f"{head}.{layers}.weight"] = state[f"lm_heads.{own}.weight"].to(dtype).clone()
    config = {
        "medusa_num_heads": heads,
        "medusa_num_layers": layers,
        "base_model_name_or_path": base_model,
    }
    _write(tensors, directory / TGI_FILE, config, provenance)


def _stored(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: value.to(dtype if value.is_floating_point() else value.dtype).cpu().contiguous()
        for name, value in state.items()
    }


def _write(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """The weights, their config, where they come from, and the hashes of it all."""
    os.makedirs(path.parent, exist_ok=True)
    save_whole(dict(tensors), path, {"format": "pt"})
    write_json(path.parent / "config.json", dict(config))
    write_json(path.parent / "compression.json", dict(provenance))
    write_sums(path.parent)
