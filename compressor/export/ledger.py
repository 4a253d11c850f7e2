"""What an artifact holds against the checkpoint that it was made from.

Format-neutral as far as tensors of a quantized linear X are called ``X.<part>``, as they are in
compressed-tensors, GPTQ and AWQ checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compressor.models.checkpoint import Checkpoint

# The part that holds a linear's codes, by format: compressed-tensors, GPTQ and AWQ.
_CODES = ("weight_packed", "weight", "qweight")


@dataclass(frozen=True)
class TensorLedger:
    """Every source tensor accounted for.

    Attributes:
        missing: tensors of the source that the artifact holds in no form.
        added: tensors of the artifact that the source does not have and that are no part of a
            quantized linear, such as an ``lm_head.weight`` that a rotation untied.
        unread: tensors that were carried over although the modelling code never reads them.
        bytes_by_scheme: size of the tensors [bytes] by scheme (``W4A16``: codes, scales and zero
            points) or, of those that are not quantized, by dtype (``bfloat16``).
    """

    missing: list[str]
    added: list[str]
    unread: list[str]
    bytes_by_scheme: dict[str, int]


def compare_tensors(
    source: Checkpoint,
    artifact: Checkpoint,
    schemes: Mapping[str, str],
    *,
    unread: Iterable[str] = (),
    lost: Iterable[str] = (),
) -> TensorLedger:
    """Compare an artifact with its source by the headers alone; no tensor is read.

    Args:
        source: the original checkpoint.
        artifact: what was exported.
        schemes: name of the scheme of every quantized linear, by the linear's name.
        unread: tensors of the source that the modelling code never reads.
        lost: tensors that went missing before ``source`` was written.
    """
    present = set(artifact.names)
    missing = {name for name in source.names if not _kept(name, present, schemes)}
    added, sizes = [], Counter[str]()
    for name in artifact.names:
        linear, _, part = name.partition(".weight.")  # bitsandbytes: X.weight.absmax
        if not part:
            linear, _, part = name.rpartition(".")
        quantized = linear in schemes and part != "bias"
        if not quantized and not source.has(name):
            added.append(name)
        dtype = artifact.dtype(name)
        key = schemes[linear] if quantized else str(dtype).removeprefix("torch.")
        sizes[key] += artifact.numel(name) * dtype.itemsize
    return TensorLedger(
        missing=sorted(missing.union(lost)),
        added=added,
        unread=sorted(present.intersection(unread)),
        bytes_by_scheme=dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
    )


def _kept(name: str, present: set[str], schemes: Mapping[str, str]) -> bool:
    """Whether a source tensor is in the artifact as it was, or as a quantized linear's codes."""
    linear = name.removesuffix(".weight")
    if linear in schemes:
        return any(f"{linear}.{part}" in present for part in _CODES)
    return name in present
