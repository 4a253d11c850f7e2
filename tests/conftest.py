"""A directory with a tiny model and a recipe, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.projects import RECIPE, write


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tiny.build("llama", tmp_path / "model")
    write(tmp_path, RECIPE)
    return tmp_path
