"""What every artifact directory carries beside its weights and config, whatever its format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.store import file_sha256s

MAX_SHARD_BYTES = 5_000_000_000
SUMS, PROVENANCE = "SHA256SUMS", "compression.json"
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def complete(
    model_dir: Path,
    provenance: dict[str, Any],
    directory: Path,
    further: Sequence[Path] = (),
) -> None:
    """Add what every artifact carries beside its weights and config, and the hashes of it all.

    Args:
        model_dir: the baseline's checkpoint directory.
        provenance: written as ``compression.json``; must hold no times.
        directory: holds weights and config already.
        further: files that go along too, in place of the directory's own of those names.
    """
    write_json(directory / PROVENANCE, provenance)
    for pattern in _COPIED:
        for path in sorted(model_dir.glob(pattern)):
            shutil.copyfile(path, directory / path.name)
    for path in further:
        shutil.copyfile(path, directory / path.name)
    write_sums(directory)


def write_sums(directory: Path) -> None:
    """``SHA256SUMS`` in the format of sha256sum(1), over every other file."""
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != SUMS)
    hashes = file_sha256s(files)
    lines = [f"{one}  {path.name}\n" for one, path in zip(hashes, files, strict=True)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON in a fixed form: equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
