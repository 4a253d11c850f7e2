"""How much memory there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
