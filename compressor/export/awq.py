"""AWQ's format in its gemm version, as AutoAWQ laid it out: read by vLLM, SGLang, TGI, GPTQModel
and transformers.

Per linear (https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py):

- ``qweight`` int32 [in, out / 8]: codes from 0 to 15, eight output channels a word;
- ``qzeros`` int32 [groups, out / 8]: zero points, in the same order;
- ``scales`` float16 [groups, out].

Four bits number i of a word, from the lowest, hold channel [0, 2, 4, 6, 1, 3, 5, 7][i] of eight. A
symmetric grid is written with zero points of 8. Grids of 2 and 3 bits are stored in four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.export.artifact import complete, write_json
from compressor.export.weights import Quantized, check_multiples, float16_scales, write_weights
from compressor.numerics.packing import pack_words
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

NAME = "awq"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_OFFSET = 1 << (BITS - 1)


def export(
    model_dir: Path,
    quantized: Quantized,
    ignore: Sequence[str],
    provenance: dict[str, Any],
    directory: Path,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once.
        ignore: names of linears left unquantized.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
        replaced: unquantized tensors that differ from the baseline's, by name.

    Raises:
        RunError: a grid, shape or scale that the format does not hold, or grids that differ from
            layer to layer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, schemes = write_weights(model_dir, quantized, tensors, directory, replaced=replaced)
    sizes = {
        (scheme.weights.group_size or -1) if scheme.weights.strategy == "group" else -1
        for scheme in schemes.values()
    }
    if len(sizes) > 1:
        raise RunError(
            f"AWQ's format has one group size for all layers, not {sorted(sizes)}",
            where=NAME,
            fix="quantize every layer alike, or remove awq from `export:`",
        )
    config["quantization_config"] = {
        "quant_method": NAME,
        "version": "gemm",
        "bits": BITS,
        "group_size": sizes.pop(),
        "zero_point": True,
        "modules_to_not_convert": sorted(ignore) or None,
    }
    write_json(directory / "config.json", config)
    complete(model_dir, provenance, directory)


def tensors(
    name: str, tensor: QuantizedTensor, scheme: Scheme, _: torch.dtype
) -> dict[str, torch.Tensor]:
    """The format's tensors of one linear."""
    weights = tensor.scheme
    if weights.type != "int" or weights.num_bits > BITS or scheme.input_activations is not None:
        raise RunError(
            f"AWQ's format holds integers of 4 bits and no rounded activations, not {scheme.name}",
            where=name,
            fix="quantize to W4A16, or remove awq from `export:`",
        )
    if tensor.g_idx is not None:
        raise RunError(
            "AWQ's format has no columns grouped by activation order",
            where=name,
            fix="set static_groups: true beside desc_act, or remove awq from `export:`",
        )
    check_multiples(name, tensor, 1, len(ORDER))
    zeros = torch.zeros_like(tensor.scale, dtype=torch.int32)
    if tensor.zero_point is not None:
        zeros = tensor.zero_point.int()
    return {
        "qweight": pack_interleaved((tensor.codes.int() + _OFFSET).T),
        "qzeros": pack_interleaved((zeros + _OFFSET).T),
        "scales": float16_scales(name, tensor).T.contiguous(),
    }


def pack_interleaved(values: torch.Tensor) -> torch.Tensor:
    """Integers [rows, out] from 0 to 15 -> int32 [rows, out / 8], in AWQ's order."""
    order = torch.tensor(ORDER)
    eights = values.unflatten(1, (-1, len(ORDER)))[..., order]
    return pack_words(eights.flatten(1), BITS, 1)
