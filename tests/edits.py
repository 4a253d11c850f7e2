"""Altering a run's files, and what `compressor.verify` says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.verify import verify


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


def named(run: Path) -> dict[tuple[str, str], str]:
    """(file, key) -> sentence of every failure."""
    found = verify(run)
    assert found.ok is (not found.failures)
    return {(one.file, one.key): one.sentence for one in found.failures}
