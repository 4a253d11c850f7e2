"""Progress: what a terminal, a log and a quiet run see."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from compressor import progress
from compressor.progress import LogProgress, RichProgress, SilentProgress, make_progress


def _console(terminal: bool, width: int = 200) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width), file


def test_kind_follows_from_quiet_and_from_the_terminal() -> None:
    assert isinstance(make_progress(quiet=True), SilentProgress)
    assert isinstance(make_progress(console=_console(True)[0]), RichProgress)
    assert isinstance(make_progress(console=_console(False)[0]), LogProgress)


def test_silent_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with make_progress(quiet=True).task("quantize", 3) as task:
        task.advance()
        task.update(note="block 1")
    assert capfd.readouterr() == ("", "")


def test_bar_shows_count_note_and_markup_as_text() -> None:
    console, file = _console(True)
    with RichProgress(console).task("quantize [int4]", 3) as task:
        task.update(note="layers.[0]")
        task.advance()
        task.advance(2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "quantize [int4]" in shown and "layers.[0]" in shown
    assert "3/3" in shown and "left" in shown


def test_bar_with_unknown_total_and_two_tasks_in_turn() -> None:
    console, file = _console(True)
    bars = RichProgress(console)
    for name in ("first", "second"):
        with bars.task(name, None) as task:
            task.advance()
    assert "first" in file.getvalue() and "second" in file.getvalue()


def test_log_has_a_line_at_both_ends_and_one_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, file = _console(False, width=20)
    with LogProgress(console).task("quantize the variant int4", 100) as task:
        task.update(note="layers.[3].mlp")
        for _ in range(50):
            clock[0] += 0.5
            task.advance()
    lines = file.getvalue().splitlines()
    # 25 s: lines after 10 s and 20 s, whole although the console is narrow.
    assert lines == [
        "quantize the variant int4 ...",
        "quantize the variant int4: 20/100, 40 s left  layers.[3].mlp",
        "quantize the variant int4: 40/100, 30 s left  layers.[3].mlp",
        "quantize the variant int4: 25.0 s",
    ]


def test_log_without_total_and_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, file = _console(False)
    for total in (None, 1):
        with LogProgress(console).task("work", total) as task:
            clock[0] += 11
            task.advance(2)
    assert "work: 2\n" in file.getvalue() and "work: 2/1, 0 s left\n" in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_inside_passes_and_is_not_logged_as_done(terminal: bool) -> None:
    console, file = _console(terminal)
    with (
        pytest.raises(ValueError, match="broken"),
        make_progress(console=console).task("work", 2),
    ):
        raise ValueError("broken")
    assert not re.search(r"work: [\d.]+ s", file.getvalue())
    with make_progress(console=console).task("again", 1) as task:  # the display is free again
        task.advance()


def test_blocks_of_an_earlier_run_say_nothing_of_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, file = _console(False)
    with LogProgress(console).task("quantize", 30) as task:
        task.advance(20)  # found in the store: no time passes
        for _ in range(4):
            clock[0] += 5
            task.advance()
    # Two blocks in 10 s, eight left: 40 s, not 22/30 of the work in 10 s.
    assert "quantize: 22/30, 40 s left" in file.getvalue()
