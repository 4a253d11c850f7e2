"""A directory with a tiny model and a recipe, for tests of whole runs; and what has to be settled
before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.projects import RECIPE, write

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tiny.build("llama", tmp_path / "model")
    write(tmp_path, RECIPE)
    return tmp_path
