"""GPTQ's format, as AutoGPTQ laid it out: read by vLLM, SGLang, TGI, GPTQModel and transformers.

Per linear (https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear):

- ``qweight`` int32 [in * bits / 32, out]: codes from 0 to 2^bits - 1, packed along ``in``;
- ``qzeros`` int32 [groups, out * bits / 32]: zero points packed along ``out``;
- ``scales`` float16 [groups, out];
- ``g_idx`` int32 [in]: the group of each column, also where groups are contiguous.

``gptq`` (v1) stores zero points less one, ``gptq_v2`` as they are. A symmetric grid has 2^(bits-1).
The settings stand in ``quantize_config.json`` and once more in ``config.json``; layers with a grid
of their own, or none, under GPTQModel's ``dynamic``: regular expressions by layer, with ``-:`` in
front where the layer is not quantized.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from compressor import __version__
from compressor.errors import RunError
from compressor.export.artifact import complete, write_json
from compressor.export.options import GPTQ_BITS, GPTQFormat
from compressor.export.weights import Quantized, check_multiples, float16_scales, write_weights
from compressor.numerics.packing import pack_words
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme, WeightScheme

NAME = "gptq"
CONFIG = "quantize_config.json"
# What engines fuse is looked up under the fused name too.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def export(
    model_dir: Path,
    quantized: Quantized,
    ignore: Sequence[str],
    provenance: dict[str, Any],
    directory: Path,
    replaced: Mapping[str, torch.Tensor] | None = None,
    head: str | None = None,
    checkpoint_format: GPTQFormat | Literal["auto"] = "auto",
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once.
        ignore: names of linears left unquantized.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
        replaced: unquantized tensors that differ from the baseline's, by name.
        head: name of the output layer, where it is among those quantized.
        checkpoint_format: ``gptq`` (v1) or ``gptq_v2``; ``auto`` takes v1, which every engine
            reads, but v2 where the first linear's grid is asymmetric (GPTQModel 7.6 refuses such a
            checkpoint in v1 of any tool but its own).

    Raises:
        RunError: a grid, shape, scale or zero point that the format does not hold.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ordered: set[str] = set()
    first = next(quantized := iter(quantized), None)
    if first is not None:
        quantized = itertools.chain([first], quantized)
    symmetric = first is None or first[1].scheme.symmetric
    if checkpoint_format == "auto":
        checkpoint_format = "gptq" if symmetric else "gptq_v2"
    form: GPTQFormat = checkpoint_format

    def make(
        name: str, tensor: QuantizedTensor, scheme: Scheme, _: torch.dtype
    ) -> dict[str, torch.Tensor]:
        if tensor.g_idx is not None:
            ordered.add(name)
        return tensors(name, tensor, scheme, form)

    config, schemes = write_weights(
        model_dir, quantized, make, directory, replaced=replaced, head=head
    )
    settings = quantization_config(
        schemes, ignore, head, desc_act=bool(ordered), checkpoint_format=form
    )
    config["quantization_config"] = settings
    write_json(directory / "config.json", config)
    write_json(directory / CONFIG, settings)
    complete(model_dir, provenance, directory)


def tensors(
    name: str, tensor: QuantizedTensor, scheme: Scheme, checkpoint_format: GPTQFormat
) -> dict[str, torch.Tensor]:
    """The format's tensors of one linear."""
    bits = tensor.scheme.num_bits
    if tensor.scheme.type != "int" or bits not in GPTQ_BITS or scheme.input_activations is not None:
        raise RunError(
            f"GPTQ's format holds integers of {', '.join(map(str, GPTQ_BITS))} bits and no rounded "
            f"activations, not {scheme.name}",
            where=name,
            fix="quantize to W4A16 or W8A16, or remove gptq from `export:`",
        )
    check_multiples(name, tensor, 32 // bits, 32 // bits)
    offset = 1 << (bits - 1)
    zeros = torch.full_like(tensor.scale, offset, dtype=torch.int32)
    if tensor.zero_point is not None:
        zeros = tensor.zero_point.int() + offset
    if checkpoint_format == "gptq":
        if int(zeros.min()) < 1:
            raise RunError(
                "a zero point is 0, which GPTQ's first format, storing it less one, cannot hold",
                where=name,
                fix="write `gptq: {checkpoint_format: gptq_v2}`, or use a symmetric grid",
            )
        zeros = zeros - 1
    return {
        "qweight": pack_words((tensor.codes.int() + offset).T, bits, 0),
        "qzeros": pack_words(zeros.T.contiguous(), bits, 1),
        "scales": float16_scales(name, tensor).T.contiguous(),
        "g_idx": tensor.column_groups().to(torch.int32),
    }


def quantization_config(
    schemes: Mapping[str, Scheme],
    ignore: Sequence[str],
    head: str | None = None,
    *,
    desc_act: bool = False,
    checkpoint_format: GPTQFormat = "gptq",
) -> dict[str, Any]:
    """The content of ``quantize_config.json``.

    Args:
        schemes: of every quantized linear, by name.
        ignore: names of linears that stay as they are.
        head: name of the output layer, where it is one of those quantized.
        desc_act: whether columns of some layer are grouped by activation order (``g_idx``).
        checkpoint_format: what zero points are stored as.
    """
    counts = Counter(scheme.weights for scheme in schemes.values())
    main = max(counts, key=lambda one: (counts[one], str(one)))
    dynamic = {_pattern("+", n): _grid(s.weights) for n, s in schemes.items() if s.weights != main}
    dynamic |= {_pattern("-", name): {} for name in ignore if name.rpartition(".")[0]}
    return {
        **_grid(main),
        "desc_act": desc_act,
        "lm_head": head is not None,
        "quant_method": NAME,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "dynamic": dict(sorted(dynamic.items())),
        "meta": {"quantizer": [f"compressor:{__version__}"]},
    }


def _grid(weights: WeightScheme) -> dict[str, Any]:
    return {
        "bits": weights.num_bits,
        "group_size": weights.group_size if weights.strategy == "group" else -1,
        "sym": weights.symmetric,
    }


@functools.cache
def _pattern(sign: str, name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    leaves = f"({leaf}|{_FUSED[leaf]})" if leaf in _FUSED else re.escape(leaf)
    return f"{sign}:^{re.escape(parent)}{re.escape('.') if parent else ''}{leaves}$"
