"""What a benchmark leaves behind: its figures with the command, the time and the machine."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write_record(path: Path, machine: str, facts: dict[str, Any]) -> str:
    """Write a record as JSON, its directory if need be; returns what was written."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        **facts,
    }
    text = json.dumps(record, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text
