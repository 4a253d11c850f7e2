"""Refinements that look at the whole model at once, after its last block was quantized.

They need what the walk over the blocks does not: memory for the whole model in the dtype that it
runs in, twice. The original model is there first, for the states in front of its head, then the
quantized one. What they change goes into ``refined.safetensors`` (see `codes.py`).
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.head import Head, last_hidden, split
from compressor.numerics.memory import free_bytes, release_freed_pages, training_bytes
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize.codes import (
    REFINED,
    replace_linears,
    replaced_tensors,
    save_synced,
)
from compressor.quantize.distillation import Distillation, ScaledLinear, ScaledNorm, State
from compressor.quantize.stream import CHECKPOINT_SECONDS

STATE = "refining.safetensors"


def refine_whole(
    model_dir: Path,
    directory: Path,
    refinement: Distillation,
    tokens: np.ndarray,
    *,
    head: bool,
    dtype: torch.dtype,
    device: str,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Refine what `driver.quantize_model` left in ``directory``; resume what is already there.

    Args:
        model_dir: the checkpoint that was quantized.
        directory: of the codes.
        refinement: the algorithm.
        tokens: int32 [samples, length].
        head: whether the output layer was quantized.
        dtype: what the model runs in.
        device: where it runs.
        advance: called with a note after each step.

    Returns:
        seconds, and what `Distillation.refine` returns.

    Raises:
        RunError: the device's memory does not hold the model.
    """
    if (directory / REFINED).exists():
        (directory / STATE).unlink(missing_ok=True)
        with safe_open(directory / REFINED, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        for _ in range(refinement.options.steps):
            advance("already done")
        return facts
    started = time.perf_counter()
    model = CausalLM.open(model_dir)
    config = model.model.config.get_text_config()
    parameters = sum(p.numel() for p in model.model.parameters())
    _free(device)
    needed = training_bytes(
        parameters,
        dtype.itemsize,
        tokens.shape,
        config.hidden_size,
        len(model.blocks),
        config.vocab_size,
    )
    if needed > free_bytes(device):
        raise RunError(
            f"distillation has the whole model in memory, about {needed / 1e9:.1f} GB; "
            f"{free_bytes(device) / 1e9:.1f} GB are free",
            where=device,
            fix="remove the step `distillation`, shorten `calibration.length`, or use a larger "
            "device",
        )
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    original = model.load_full(dtype, device)
    targets = _targets(original, ids, refinement.rows(len(ids)))
    heads = [split(original)]
    del original, model
    _free(device)

    quantized, factors, keys = _quantized(model_dir, directory, refinement, head, dtype, device)
    heads.append(Head(quantized.get_output_embeddings(), quantized.config))
    saved = directory / STATE
    state = load_file(saved) if saved.exists() else None
    written = time.monotonic()

    def save(state: State) -> None:
        nonlocal written
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            save_synced({k: v.detach().cpu().clone() for k, v in state.items()}, saved, {})
            written = time.monotonic()

    facts = refinement.refine(
        factors,
        lambda ids: last_hidden(quantized, ids),
        (heads[0], heads[1]),
        ids,
        targets,
        state=state,
        save=save,
        advance=advance,
    )
    facts["seconds"] = time.perf_counter() - started
    changed = {}
    for key, module in keys.items():
        if isinstance(module, ScaledLinear):
            changed[f"{key}.scale"] = module.stored_scale().detach().float().cpu()
        else:
            changed[f"{key}.replaced"] = module.stored_weight().detach().cpu()
    save_synced(changed if facts["kept"] else {}, directory / REFINED, {"facts": json.dumps(facts)})
    (directory / STATE).unlink(missing_ok=True)
    return facts


def _free(device: str) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    release_freed_pages()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@torch.no_grad()
def _targets(original: Any, ids: torch.Tensor, rows: list[int]) -> dict[int, torch.Tensor]:
    """The original's input of its head, [length, hidden] on the CPU, by sample."""
    return {row: last_hidden(original, ids[row : row + 1])[0].cpu() for row in rows}


def _quantized(
    model_dir: Path,
    directory: Path,
    refinement: Distillation,
    head: bool,
    dtype: torch.dtype,
    device: str,
) -> tuple[Any, dict[str, nn.Parameter], dict[str, Any]]:
    """The quantized model, ready to be trained, its factors, and their modules, by the name of a
    linear or of a norm's weight in the checkpoint."""
    model = CausalLM.open(model_dir)

    def scaled(tensor: QuantizedTensor, scheme: Scheme, bias: torch.Tensor | None) -> ScaledLinear:
        activations = scheme.input_activations
        return ScaledLinear(tensor.to(device), activations, bias, dtype, refinement.scale_dtype)

    keys: dict[str, Any] = dict(replace_linears(model, directory, scaled, untie_head=head))
    whole = model.load_full(dtype, device, replaced_tensors(directory))
    whole.requires_grad_(False)
    if refinement.options.norms:
        for path, module in list(whole.named_modules()):
            weight = getattr(module, "weight", None)
            if not type(module).__name__.endswith("Norm") or weight is None or weight.ndim != 1:
                continue
            key = model.disk_name(f"{path}.weight")
            keys[key] = ScaledNorm(module, model.checkpoint.dtype(key))
            whole.set_submodule(path, keys[key])
    factors = {key: module.factor for key, module in keys.items()}
    for factor in factors.values():
        factor.requires_grad_(True)
    return whole, factors, keys
