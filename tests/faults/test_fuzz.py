"""Some random damage; `python -m tests.faults.fuzzing` gives as much as is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzzing import TARGETS, fuzz

COUNTS = {
    "recipe": 300,
    "safetensors": 1000,
    "gguf": 600,
    "config": 60,
    "samples": 1000,
    "verify": 60,
}


@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_input_is_refused_and_never_worse(tmp_path: Path, name: str) -> None:
    assert 0 < fuzz(TARGETS[name](tmp_path), COUNTS[name]) <= COUNTS[name] + 50
