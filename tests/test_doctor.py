"""What this machine has: facts for reports, and what to install for what is missing."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import pytest
import torch

from compressor import doctor


def test_environment_holds_plain_facts_of_this_machine() -> None:
    facts = doctor.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory_bytes"] > 1e8
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["device"] and facts["cpu"]


def test_everything_that_is_missing_says_what_to_install(tmp_path: Path) -> None:
    found = doctor.checks(tmp_path)
    assert len({check.name for check in found}) == len(found)
    for check in found:
        assert check.found or check.fix, check.name
    required = {check.name for check in found if check.required}
    assert {"torch", "transformers", "compressed-tensors"} <= required
    assert not required & {"vLLM", "llama.cpp", "CUDA", "lm-eval"}


def test_torch_that_cannot_be_imported_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # the import system's mark of "not there"
    checks = {check.name: check for check in doctor.checks(tmp_path)}
    assert checks["torch"].found is None and checks["torch"].fix.startswith("pip install 'torch")
    assert checks["CUDA"].found is None and checks["device"].found
    assert doctor.environment()["threads"] is None


def test_llama_cpp_is_found_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "llama-server"
    monkeypatch.setenv("COMPRESSOR_LLAMA_SERVER", str(server))
    found = {check.name: check for check in doctor.checks(tmp_path)}["llama.cpp"]
    assert found.found is None and "setup_llama_cpp.sh" in found.fix
    server.touch(0o755)
    found = {check.name: check for check in doctor.checks(tmp_path)}["llama.cpp"]
    assert found.found == str(server)


def test_vllm_is_found_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    monkeypatch.setenv("COMPRESSOR_VLLM_PYTHON", str(python))
    assert doctor.vllm_python() in (None, Path(sys.executable))  # it names no file
    python.touch()
    assert doctor.vllm_python() == python
    monkeypatch.delenv("COMPRESSOR_VLLM_PYTHON")
    own = tmp_path / ".venv-vllm" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert doctor.vllm_python() == Path(".venv-vllm/bin/python")
