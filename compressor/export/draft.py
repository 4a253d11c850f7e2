"""A draft model as engines take it: a Hugging Face directory with the target's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.export import compressed_tensors
from compressor.export.artifact import complete
from compressor.export.weights import Quantized
from compressor.speculate.draft import check_tokenizer

NAME = "draft-model"


@dataclass(frozen=True)
class Codes:
    """What a draft was quantized to; arguments as of `compressed_tensors.export`."""

    quantized: Quantized
    ignore: Sequence[str]
    replaced: Mapping[str, torch.Tensor]


def export(
    draft: Path,
    origin: Path,
    target: Path,
    provenance: dict[str, Any],
    directory: Path,
    codes: Codes | None = None,
    *,
    licences: Sequence[Path] = (),
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        draft: ``config.json`` and weights in full precision.
        origin: directory that the draft was made of, or is: its tokenizer, licence and generation
            config go along.
        target: directory of the target.
        provenance: written as ``compression.json``; must hold no times.
        directory: made if need be.
        codes: of a quantized draft, which is written as compressed-tensors.
        licences: further licence files of the draft.

    Raises:
        RunError: the draft's logits are not of the target's vocabulary.
    """
    if codes is None:
        compressed_tensors.export_dense(draft, provenance, directory)
    else:
        compressed_tensors.export(
            draft, codes.quantized, codes.ignore, provenance, directory, codes.replaced
        )
    complete(origin, provenance, directory, licences)
    check_tokenizer(target, directory)
