"""A draft model as engines take it: a Hugging Face directory with the target's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compressor.export.artifact import complete
from compressor.models.checkpoint import INDEX, SINGLE
from compressor.speculate.draft import check_tokenizer

NAME = "draft-model"


def export(draft: Path, target: Path, provenance: dict[str, Any], directory: Path) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        draft: ``config.json`` and weights, as `speculate.draft.write_draft` leaves them.
        target: directory of the target, whose tokenizer, licence and generation config go along.
        provenance: written as ``compression.json``; must hold no times.
        directory: made if need be.

    Raises:
        RunError: the draft's logits are not of the target's vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = ["config.json", *(path.name for path in sorted(draft.glob("model*.safetensors")))]
    if SINGLE not in names:
        names.append(INDEX)
    for name in names:
        shutil.copyfile(draft / name, directory / name)
    complete(target, provenance, directory)
    check_tokenizer(target, directory)
