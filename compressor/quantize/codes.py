"""What quantization leaves on disk: written one block at a time, and read so.

Format-neutral. Every file is whole and synced before it gets its name, so that a killed run goes on
from there.

    block-00000.safetensors   {linear}.codes int8 or float8_e4m3fn [out, in],
                              .scale float32 [out, groups],
                              .zero_point int8 [out, groups], .g_idx int32 [in] and
                              .input_scale float32 [1] where used;
                              {parameter}.replaced: unquantized tensors that a transform changed;
                              {attention}.k_scale, .v_scale float32 [1]: of a low-bit cache
    head.safetensors          the same of the output layer (lm_head), where it is quantized
    refined.safetensors       {linear}.scale and {parameter}.replaced that take the place of the
                              above, from a refinement of the whole model
    layers.jsonl              one line per linear: scheme, error, RTN's error, fallback
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import save_whole
from compressor.models.kv_cache import KEY, VALUE
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

LAYERS = "layers.jsonl"
HEAD = "head.safetensors"
REFINED = "refined.safetensors"


def read_layers(directory: Path) -> list[dict[str, Any]]:
    """The per-linear records of a quantized directory, in model order."""
    path = directory / LAYERS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # a line cut short by a kill: its block has no file either
    return records


def iterate_quantized(directory: Path) -> Iterator[tuple[str, QuantizedTensor, Scheme]]:
    """(linear name, tensor, scheme) of a quantized directory, one block in memory at a time."""
    schemes = {
        layer["name"]: Scheme.from_dict(layer["scheme"])
        for layer in read_layers(directory)
        if "scheme" in layer
    }
    head = [path for path in (directory / HEAD,) if path.exists()]
    refined = _refined(directory)
    for path in sorted(directory.glob("block-*.safetensors")) + head:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in sorted(k for k in keys if k.endswith(".codes")):
                name = key.removesuffix(".codes")

                def part(what: str, name: str = name, keys: set[str] = keys) -> Any:
                    full = f"{name}.{what}"
                    return file.get_tensor(full).clone() if full in keys else None

                yield (
                    name,
                    QuantizedTensor(
                        codes=part("codes"),
                        scale=refined.get(f"{name}.scale", part("scale")),
                        zero_point=part("zero_point"),
                        g_idx=part("g_idx"),
                        input_scale=part("input_scale"),
                        scheme=schemes[name].weights,
                    ),
                    schemes[name],
                )


def replaced_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Unquantized tensors that were changed (norm weights), by name in the checkpoint."""
    found = _ending(directory, ".replaced")
    found |= {k: v for k, v in _refined(directory).items() if k.endswith(".replaced")}
    return {key.removesuffix(".replaced"): value for key, value in found.items()}


def _refined(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / REFINED) if (directory / REFINED).exists() else {}


def kv_scales(directory: Path) -> dict[str, torch.Tensor]:
    """Scales of cached keys and values, float32 [1], by name in the checkpoint; may be empty."""
    return _ending(directory, KEY, VALUE)


def _ending(directory: Path, *endings: str) -> dict[str, torch.Tensor]:
    """The blocks' tensors whose key ends so."""
    found = {}
    for path in sorted(directory.glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(endings):
                    found[key] = file.get_tensor(key).clone()
    return found


def replace_linears(
    model: CausalLM,
    directory: Path,
    make: Callable[[QuantizedTensor, Scheme, torch.Tensor | None], nn.Module],
    *,
    untie_head: bool,
) -> dict[str, nn.Module]:
    """Put a module in the place of every quantized linear.

    Args:
        model: the checkpoint that was quantized, not loaded yet.
        directory: of the codes.
        make: the module of a tensor, its scheme and its bias, which a transform may have changed.
        untie_head: whether the output layer was quantized, and so has a weight of its own.

    Returns:
        The modules, by the linear's name in the checkpoint.
    """
    refs = {ref.name: ref for i in range(len(model.blocks)) for ref in model.linears(i)}
    if (head := model.head()) is not None:
        refs[head.name] = head
    if untie_head:
        model.untie_head()
    replaced = replaced_tensors(directory)
    made = {}
    for name, tensor, scheme in iterate_quantized(directory):
        ref, bias = refs[name], None
        if ref.module.bias is not None:
            bias = replaced.get(f"{name}.bias")
            bias = model.checkpoint.tensor(f"{name}.bias") if bias is None else bias
        made[name] = make(tensor, scheme, bias)
        model.replace_linear(ref, made[name])
    return made


def flatten(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    parts = {
        "codes": tensor.codes,
        "scale": tensor.scale,
        "zero_point": tensor.zero_point,
        # Linears quantized together share theirs, and safetensors refuses to save one memory twice.
        "g_idx": None if tensor.g_idx is None else tensor.g_idx.clone(),
        "input_scale": tensor.input_scale,
    }
    return {f"{name}.{k}": v.cpu().contiguous() for k, v in parts.items() if v is not None}


def block_file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.safetensors"


def drop_from(directory: Path, block: int) -> None:
    """Forget the records and files of this block and those behind it."""
    records = [r for r in read_layers(directory) if r["block"] < block]
    write_synced(directory / LAYERS, [json.dumps(r) for r in records])
    for path in directory.glob("block-*.safetensors"):
        if int(path.stem.removeprefix("block-")) >= block:
            path.unlink()


def save_synced(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    # Neither tensors nor metadata, and an empty mapping: safetensors writes what it cannot read.
    save_whole(tensors, path, metadata or None)


def append_synced(path: Path, lines: list[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def write_synced(path: Path, lines: list[str]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
