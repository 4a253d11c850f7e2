"""What exporters to safetensors share: the quantized linears in a format's own tensors, everything
else as it is in the source, one shard in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.export.artifact import MAX_SHARD_BYTES
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint, TensorWriter, untie
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

_MAX_ERROR = 1 / 8  # of a step of the grid
Quantized = Iterable[tuple[str, QuantizedTensor, Scheme]]


def write_weights(
    model_dir: Path,
    quantized: Quantized,
    tensors: Callable[[str, QuantizedTensor, Scheme, torch.dtype], Mapping[str, torch.Tensor]],
    directory: Path,
    *,
    replaced: Mapping[str, torch.Tensor] | None = None,
    head: str | None = None,
    further: Mapping[str, torch.Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[dict[str, Any], dict[str, Scheme]]:
    """Write the weights of an artifact, shard by shard; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once.
        tensors: the format's tensors of a linear, by what follows its name and a dot, from its
            name, tensor and scheme and the dtype that the source has for its weight.
        directory: receives the shards; must exist.
        replaced: unquantized tensors that differ from the baseline's, by name.
        head: name of the output layer, where it is among those quantized. Where it shared the
            embeddings' weight, that stays, and the config says that it is no longer shared.
        further: tensors that the source does not have, by name.
        max_shard_bytes: size at which a shard is closed.

    Returns:
        config.json of the source as the artifact needs it, without ``quantization_config``; the
        scheme of every quantized linear, by name.
    """
    source = Checkpoint(model_dir)
    shared = _shared_weight(model_dir) if head is not None else None
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    schemes: dict[str, Scheme] = {}
    writer = TensorWriter(directory, max_shard_bytes)
    for name, tensor, scheme in quantized:
        stored = f"{name}.weight"
        if name == head and shared is not None:
            stored = shared[0]
        for key, value in tensors(name, tensor, scheme, source.dtype(stored)).items():
            writer.add(f"{name}.{key}", value)
        schemes[name] = scheme
    for name in source.names:
        if name.removesuffix(".weight") not in schemes:
            changed = (replaced or {}).get(name)
            writer.add(name, source.tensor(name) if changed is None else changed)
    if shared is not None and shared[0] == f"{head}.weight":
        writer.add(shared[1], source.tensor(shared[0]))  # it was stored under the head's name only
    for name, value in sorted((further or {}).items()):
        writer.add(name, value)
    writer.close()
    if head is not None:
        untie(config)
    return config, schemes


def _shared_weight(model_dir: Path) -> tuple[str, str] | None:
    """Where the weight that embeddings and output layer share is stored, and the embeddings' own
    name for it; None where they share none."""
    model = CausalLM.open(model_dir)
    if not model.head_is_tied:
        return None
    embeddings = model.model.get_input_embeddings()
    path = next(path for path, module in model.model.named_modules() if module is embeddings)
    return model.head_key(), f"{path}.weight"


def float16_scales(name: str, tensor: QuantizedTensor) -> torch.Tensor:
    """Scales in float16, in which GPTQ and AWQ keep them: exact for scales of a bfloat16 model from
    2^-17 on.

    Raises:
        RunError: a value would be more than an eighth of a step off, which is what float16 may do
            to codes of 8 bits.
    """
    scale = tensor.scale.float()
    half = scale.half()
    steps = 1 << (tensor.scheme.num_bits - tensor.scheme.symmetric)  # from zero, at most
    off = ((half.float() - scale).abs() / scale.abs()).nan_to_num(torch.inf) * steps
    if float(off.max()) > _MAX_ERROR:
        raise RunError(
            f"its scales, down to {float(scale.abs().min()):.1e}, are too far from float16, in "
            "which this format keeps them",
            where=name,
            fix="name the layer under `ignore`, or export it as compressed-tensors",
        )
    return half


def check_multiples(name: str, tensor: QuantizedTensor, columns: int, rows: int) -> None:
    """Raise `RunError` unless words are filled: input features in multiples of ``columns``, output
    features of ``rows``."""
    out, width = tensor.codes.shape
    if out % rows or width % columns:
        raise RunError(
            f"{out} x {width} weights do not fill 32-bit words: rows come in multiples of {rows}, "
            f"columns of {columns}",
            where=name,
            fix="name the layer under `ignore`, or export it as compressed-tensors",
        )
