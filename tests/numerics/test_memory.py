"""How much memory there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.numerics import memory


def test_the_control_group_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.free_bytes() > 0 and memory.free_bytes(torch.device("cpu")) > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.free_bytes() == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 400_000


def test_asking_for_it_loads_no_torch() -> None:
    code = (
        "import sys, compressor.numerics.memory as m; m.free_bytes(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


FAILURES = {
    "torch": lambda: torch.empty(1 << 60, dtype=torch.int8),
    "numpy": lambda: np.empty(1 << 60, np.int8),
    "python": lambda: bytearray(1 << 60),
}


@pytest.mark.parametrize("what", sorted(FAILURES))
def test_a_failed_allocation_is_told_from_other_errors(what: str) -> None:
    with memory.suppress_out_of_memory():
        FAILURES[what]()
    with (
        pytest.raises(RunError, match="too large"),
        memory.refuse_out_of_memory("too large", "here", "x"),
    ):
        FAILURES[what]()
    for other in (RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("x")):
        with pytest.raises(type(other)), memory.suppress_out_of_memory():
            raise other


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))
def test_batches_shrink_to_what_fits(rows: int, size: int, fits: int) -> None:
    def work(part: list[int]) -> int:
        if len(part) > fits:
            torch.empty(1 << 60, dtype=torch.int8)
        return sum(part)

    told: list[int] = []
    found = list(memory.in_batches(list(range(rows)), size, work, told.append))
    assert [row for part, _ in found for row in part] == list(range(rows))
    assert all(made == sum(part) for part, made in found)
    assert told == sorted(told, reverse=True)
    assert bool(told) == (min(rows, size) > fits)


def test_one_row_that_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(RunError, match="batch of one"):
        list(memory.in_batches([1, 2], 2, lambda part: bytearray(1 << 60)))
