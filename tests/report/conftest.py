"""Fixtures around the invented report."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compressor.report.build import build_report


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "invented_report", Path(__file__).with_name("sample.py")
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sample() -> ModuleType:
    return _load()


@pytest.fixture
def inputs(sample: ModuleType) -> dict[str, Any]:
    return sample.sample_inputs()


@pytest.fixture
def report(inputs: dict[str, Any]) -> dict[str, Any]:
    return build_report(**inputs)
