"""Runs on disk: which there are, and which is the last."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import RecipeError

_REPORT = Path("report") / "report.json"


@dataclass(frozen=True)
class FoundRun:
    """A run with a report: its directory, its recipe's name and when it was made (ISO 8601)."""

    path: Path
    recipe: str
    created: str


def find_runs(directory: Path, recipe: str | None = None) -> list[FoundRun]:
    """The runs below a directory (``NAME/RUN``, or ``RUN`` of one recipe), the oldest first.

    Args:
        recipe: only those of the recipe of this name.

    Raises RecipeError when there is none.
    """
    found = []
    for path in sorted({*directory.glob(f"*/{_REPORT}"), *directory.glob(f"*/*/{_REPORT}")}):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            run = FoundRun(path.parent.parent, report["recipe"]["name"], report["created"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a report; reading that run itself says what is wrong
        if recipe in (None, run.recipe):
            found.append(run)
    if not found:
        of = f" of {recipe}" if recipe else ""
        raise RecipeError(
            f"there is no run{of} with a report",
            where=str(directory),
            fix="give the directory of runs, or run a recipe first",
        )
    return sorted(found, key=lambda run: run.created)
