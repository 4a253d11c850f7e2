"""Plain safetensors: every quantized linear as the values that its codes stand for, in a floating
point dtype. Loads in anything that loads the original; saves no memory.

Activations and cached keys and values are not rounded by who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.export.artifact import MAX_SHARD_BYTES, complete, write_json
from compressor.export.options import DenseDtype
from compressor.export.weights import Quantized, write_weights
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

NAME = "safetensors"


def export(
    model_dir: Path,
    quantized: Quantized,
    provenance: dict[str, Any],
    directory: Path,
    replaced: Mapping[str, torch.Tensor] | None = None,
    head: str | None = None,
    dtype: DenseDtype = "stored",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
        replaced: unquantized tensors that differ from the baseline's, by name.
        head: name of the output layer, where it is among those quantized.
        dtype: of the quantized linears; ``stored`` for that of the source. Codes times scales need
            more digits than bfloat16 has, float32 holds them exactly.
        max_shard_bytes: size at which a shard is closed.

    Returns:
        What the artifact does not carry over.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lost: set[str] = set()
    worst = 0.0

    def make(
        _: str, tensor: QuantizedTensor, scheme: Scheme, stored: torch.dtype
    ) -> dict[str, torch.Tensor]:
        nonlocal worst
        exact = tensor.dequantize()
        value = exact.to(stored if dtype == "stored" else getattr(torch, dtype))
        off = float((value.float() - exact).norm() / exact.norm().clamp_min(1e-30))
        worst = max(worst, off)
        if scheme.input_activations is not None:
            lost.add(f"{scheme.name}: activations are not rounded by who reads plain weights")
        return {"weight": value}

    config, _ = write_weights(
        model_dir,
        quantized,
        make,
        directory,
        replaced=replaced,
        head=head,
        max_shard_bytes=max_shard_bytes,
    )
    write_json(directory / "config.json", config)
    if worst:
        lost.add(
            f"the dequantized weights are rounded to the dtype that they are stored in (relative "
            f"error up to {worst:.1e})"
        )
    complete(model_dir, provenance, directory)
    return sorted(lost)
