"""SIGKILL at every point at which something is published, and at any moment between.

`scripts/faults.py` does the same over every kind of stage, some hundreds of times.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed, project
from tests.faults.runs import killed, new_zygote, stored
from tests.zygote import PUBLISHING, Zygote

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def die_at_every_point(
    zygote: Zygote, directory: Path, calls: tuple[str, ...] = PUBLISHING, limit: int = 10_000
) -> int:
    """Run and be killed at one new point after the other, until a run ends; the number of kills.
    After each, what counts as finished is whole."""
    for number in range(limit):
        code, printed = zygote.run(directory, points=directory / "points", calls=calls)
        stored(directory)
        if not killed(code):
            assert code == 0, printed
            return number
    raise AssertionError(f"not done after {limit} kills")


def die_at_random(
    zygote: Zygote, directory: Path, count: int, longest: float, seed: int = 0
) -> int:
    """Run and be killed so many times, each after at most ``longest`` seconds; the number of runs
    that were killed before they ended."""
    generator, number = random.Random(seed), 0
    for _ in range(count):
        code, printed = zygote.run(directory, after=generator.uniform(0.05, longest))
        stored(directory)
        assert killed(code) or code == 0, printed
        number += killed(code)
    return number


def test_killed_at_every_point(zygote: Zygote, small: Undisturbed, tmp_path: Path) -> None:
    directory = project(tmp_path, small.recipe)
    kills = die_at_every_point(zygote, directory, ("rename",))  # by which stages are published
    points = (directory / "points").read_text().splitlines()
    assert kills == len(points) == len(set(points))
    assert sum("objects/" in point for point in points) == 2 * len(small.stored)
    small.same(directory)


def test_killed_at_random(zygote: Zygote, small: Undisturbed, tmp_path: Path) -> None:
    directory = project(tmp_path, small.recipe)
    assert die_at_random(zygote, directory, 8, 0.8) > 2
    code, printed = zygote.run(directory)
    assert code == 0, printed
    small.same(directory)


def test_interrupted_is_said_so_and_goes_on(
    zygote: Zygote, small: Undisturbed, tmp_path: Path
) -> None:
    directory = project(tmp_path, small.recipe)
    code, printed = zygote.run(directory, after=0.4, signal=int(signal.SIGINT))
    assert code == 130 and "Traceback" not in printed
    assert "run the same command again" in printed
    code, printed = zygote.run(directory)
    assert code == 0, printed
    small.same(directory)


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_the_clock_may_jump(
    zygote: Zygote, small: Undisturbed, tmp_path: Path, step: float
) -> None:
    directory = project(tmp_path, small.recipe)
    code, printed = zygote.run(directory, clock=step)
    assert code == 0, printed
    small.same(directory)


def test_two_runs_at_once_on_one_store(zygote: Zygote, small: Undisturbed, tmp_path: Path) -> None:
    """Each stage is made once; the other run waits for it and uses it."""
    directory = project(tmp_path, small.recipe)
    other, codes = new_zygote(), []
    try:
        thread = threading.Thread(target=lambda: codes.append(other.run(directory)))
        thread.start()
        codes.append(zygote.run(directory))
        thread.join()
    finally:
        other.close()
    assert [code for code, _ in codes] == [0, 0], codes
    small.same(directory)


def test_the_lock_of_a_run_that_was_killed_is_free(
    zygote: Zygote, small: Undisturbed, tmp_path: Path
) -> None:
    directory = project(tmp_path, small.recipe)
    code, _ = zygote.run(directory, points=directory / "points", calls=("rename",))
    assert killed(code) and list((directory / ".compressor" / "locks").iterdir())
    started = time.monotonic()
    code, printed = zygote.run(directory)
    assert code == 0 and time.monotonic() - started < 60, printed
    small.same(directory)
