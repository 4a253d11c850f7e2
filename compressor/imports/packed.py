"""Linears of GPTQ, AWQ and compressed-tensors checkpoints, whoever wrote them, as codes and scales.

`compressor.export.gptq`, `awq` and `compressed_tensors` describe the layouts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.export import compressed_tensors
from compressor.export.awq import ORDER
from compressor.export.gptq import CONFIG
from compressor.models.checkpoint import Checkpoint
from compressor.numerics.packing import unpack_words
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme, WeightScheme

FORMATS = ("gptq", "awq", "compressed-tensors")
_GPTQ_BITS = (2, 4, 8)
_ANOTHER = "give a checkpoint in one of GPTQ's, AWQ's (gemm) and the compressed-tensors formats"
# AutoAWQ's configs, and those of transformers.
_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class PackedCheckpoint:
    """A quantized checkpoint.

    Attributes:
        format: one of `FORMATS`.
        config: its ``quantization_config``.
        source: its tensors.
        names: of its quantized linears, sorted.
        read: the tensor and scheme of one of them.
    """

    format: str
    config: Mapping[str, Any]
    source: Checkpoint
    names: list[str]
    read: Callable[[str], tuple[QuantizedTensor, Scheme]]


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """What a directory says of its quantization; None for one that is not quantized.

    It stands in config.json, or beside it in ``quantize_config.json`` (AutoGPTQ) or
    ``quant_config.json`` (AutoAWQ).
    """
    config = _json(directory / "config.json")
    for part in (config, config.get("text_config") or {}):
        if isinstance(found := part.get("quantization_config"), dict):
            return found
    for name, method in ((CONFIG, "gptq"), ("quant_config.json", "awq")):
        if (directory / name).is_file():
            return {"quant_method": method, **_json(directory / name)}
    return None


def open_packed(directory: Path) -> PackedCheckpoint:
    """Open a quantized checkpoint.

    Raises:
        RunError: it is not quantized, or in a format or with settings that are not read.
    """
    where = str(directory / "config.json")
    config = quantization_config(directory)
    if config is None:
        raise RunError("this checkpoint is not quantized", where=where, fix=_ANOTHER)
    method = str(config.get("quant_method", "")).lower()
    source = Checkpoint(directory)
    if method == "compressed-tensors":
        scheme_of = compressed_tensors.read_schemes(config, directory)

        def compressed(name: str) -> tuple[QuantizedTensor, Scheme]:
            scheme = scheme_of(name)
            return compressed_tensors.read_tensor(source, name, scheme), scheme

        names = _with_part(source, "weight_scale")
        return PackedCheckpoint(method, config, source, names, compressed)
    readers = {"gptq": _gptq_reader, "awq": _awq_reader}
    if method not in readers:
        raise RunError(
            f"checkpoints of quant_method {method!r} are not read", where=where, fix=_ANOTHER
        )
    read = readers[method](config, source, where)
    return PackedCheckpoint(method, config, source, _with_part(source, "qweight"), read)


def _with_part(source: Checkpoint, part: str) -> list[str]:
    """Linears that have a tensor of that name."""
    return [n.removesuffix(f".{part}") for n in source.names if n.endswith(f".{part}")]


def _gptq_reader(
    config: Mapping[str, Any], source: Checkpoint, where: str
) -> Callable[[str], tuple[QuantizedTensor, Scheme]]:
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise RunError(f"GPTQ's checkpoint_format {form!r} is not read", where=where, fix=_ANOTHER)

    def read(name: str) -> tuple[QuantizedTensor, Scheme]:
        bits, group_size, symmetric = _gptq_grid(config, name)
        if bits not in _GPTQ_BITS:
            raise RunError(f"GPTQ with {bits} bits is not read", where=where, fix=_ANOTHER)
        codes = unpack_words(source.tensor(f"{name}.qweight"), bits, 0).T
        words = source.tensor(f"{name}.qzeros")
        if form == "gptq":  # one is added to whole words, as GPTQModel does it
            words = words + sum(1 << shift for shift in range(0, 31, bits))
        zeros = unpack_words(words, bits, 1).T
        scale = source.tensor(f"{name}.scales").float().T
        g_idx = source.tensor(f"{name}.g_idx") if source.has(f"{name}.g_idx") else None
        return _tensor(name, codes, zeros, scale, g_idx, (bits, group_size, symmetric), where)

    return read


def _gptq_grid(config: Mapping[str, Any], name: str) -> tuple[int, int, bool]:
    """(bits, group size, whether symmetric) of a layer."""
    found = {key: config.get(key) for key in ("bits", "group_size", "sym")}
    for pattern, own in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            found |= {key: value for key, value in own.items() if key in found}
            break
    return int(found["bits"] or 0), int(found["group_size"] or -1), bool(found["sym"])


def _awq_reader(
    config: Mapping[str, Any], source: Checkpoint, where: str
) -> Callable[[str], tuple[QuantizedTensor, Scheme]]:
    named = {_AWQ_NAMES.get(key, key): value for key, value in config.items()}
    bits, version = int(named.get("bits", 0)), str(named.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise RunError(
            f"AWQ of {bits} bits, version {version}, is not read", where=where, fix=_ANOTHER
        )
    back = torch.tensor(ORDER).argsort()

    def unpack(words: torch.Tensor) -> torch.Tensor:
        return unpack_words(words, bits, 1).unflatten(1, (-1, len(ORDER)))[..., back].flatten(1)

    def read(name: str) -> tuple[QuantizedTensor, Scheme]:
        codes = unpack(source.tensor(f"{name}.qweight")).T
        scale = source.tensor(f"{name}.scales").float().T
        zeros = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int32)
        if source.has(f"{name}.qzeros"):
            zeros = unpack(source.tensor(f"{name}.qzeros")).T
        symmetric = bool((zeros == 1 << (bits - 1)).all())
        return _tensor(
            name, codes, zeros, scale, None, (bits, int(named["group_size"]), symmetric), where
        )

    return read


def _tensor(
    name: str,
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scale: torch.Tensor,
    g_idx: torch.Tensor | None,
    grid: tuple[int, int, bool],
    where: str,
) -> tuple[QuantizedTensor, Scheme]:
    """Codes [out, in] and zero points [out, groups] from 0, scales [out, groups] as a tensor."""
    bits, group_size, symmetric = grid
    columns, offset = codes.shape[1], 1 << (bits - 1)
    if symmetric and not bool((zeros == offset).all()):
        symmetric = False  # the config says so, the zero points do not
    grouped = group_size > 0 and group_size < columns
    weights = WeightScheme(
        bits, symmetric, "group" if grouped else "channel", group_size if grouped else None
    )
    if g_idx is not None:
        width = group_size if grouped else columns
        contiguous = torch.equal(g_idx.long(), torch.arange(columns) // width)
        g_idx = None if contiguous else g_idx.to(torch.int32)
    tensor = QuantizedTensor(
        codes=(codes - offset).to(torch.int8).contiguous(),
        scale=scale.contiguous(),
        zero_point=None if symmetric else (zeros - offset).to(torch.int8).contiguous(),
        g_idx=g_idx,
        scheme=weights,
    )
    try:
        tensor.validate()
    except ValueError as error:
        raise RunError(
            f"{name}: {error}",
            where=where,
            fix="config and weights do not belong together: download or quantize them again",
        ) from error
    return tensor, Scheme(f"W{bits}A16", weights)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot be read ({error})", where=str(path), fix="give a model directory"
        ) from error
    return found if isinstance(found, dict) else {}
