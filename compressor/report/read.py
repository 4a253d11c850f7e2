"""A written report, read and checked; without what draws one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.errors import RunError
from compressor.report.model import ReportModel


def read_report(path: Path) -> dict[str, Any]:
    """A `report.json` again, checked; RunError when it cannot be read or does not fit."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"the report cannot be read: {error}",
            where=str(path),
            fix="name a run directory that holds report/report.json",
        ) from error
    return validate_report(data)


def validate_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report in normal form (every key present, plain JSON types); RunError if it is wrong."""
    try:
        return ReportModel.model_validate(report).model_dump(mode="json")
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:8]
        )
        raise RunError(
            f"the report's figures do not fit its schema ({error.error_count()} problems): "
            f"{problems}",
            where="report",
            fix="the report was written by another version or altered; run the recipe again",
        ) from error
