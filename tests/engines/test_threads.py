"""Workers of threads that compute no more, in processes of their own: OpenMP is one a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")

_START = """
import psutil, threading, torch
from compressor.measure.engines.threads import release_workers
torch.set_num_threads(4)
def work():
    return torch.ones(2048, 2048).mul_(2).sum().item()
def count():
    return psutil.Process().num_threads()
"""


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _START + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_workers_go_and_come_again() -> None:
    code = """
before = count(); first = work(); during = count()
release_workers(); released = count()
print(during - before, during - released, work() == first, count() - released)
"""
    assert run(code) == ["3", "3", "True", "3"]


def test_only_the_calling_threads_workers_go() -> None:
    code = """
release, done = threading.Event(), threading.Event()
def other():
    torch.set_num_threads(4); work(); done.set(); release.wait()
thread = threading.Thread(target=other); thread.start(); done.wait()
before = count(); release_workers(); print(before - count()); release.set(); thread.join()
"""
    assert run(code) == ["0"]
