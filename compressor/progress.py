"""Progress of long work: a live bar with time left, lines in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar

LOG_SECONDS = 10.0
AT_ONCE_SECONDS = 0.01


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1, /) -> None:
        """Count ``n`` more steps as done."""

    def update(self, *, note: str) -> None:
        """Show a note beside the bar."""


def counting(task: Task) -> Callable[[str], None]:
    """Counts one step of a task as done, each time with a note."""

    def advance(note: str) -> None:
        task.update(note=note)
        task.advance(1)

    return advance


class Progress(Protocol):
    """Where work reports how far it is."""

    def task(self, description: str, total: int | None, /) -> AbstractContextManager[Task]:
        """Open a task of ``total`` steps (None when that is not known)."""

    def say(self, line: str, /) -> None:
        """Tell what is to be known and is no step."""


def telling_lowered(progress: Progress, work: str) -> Callable[[int], None]:
    """Tells of each smaller batch that lack of memory forces on some work."""

    def tell(size: int) -> None:
        progress.say(f"{work}: out of memory, batches of {size} from here on")

    return tell


class _Silent:
    def advance(self, n: int = 1, /) -> None:
        return

    def update(self, *, note: str) -> None:
        return


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def task(self, description: str, total: int | None, /) -> Iterator[Task]:
        yield _Silent()

    def say(self, line: str, /) -> None:
        return


class _Logged:
    def __init__(self, console: Console, description: str, total: int | None) -> None:
        self.console, self.description, self.total = console, description, total
        self.done, self.note = 0, ""
        self.found = 0  # steps that an earlier run did: they come at once and say nothing of speed
        self.started = self.printed = self.last = time.monotonic()

    def advance(self, n: int = 1, /) -> None:
        now = time.monotonic()
        if self.done == self.found and now - self.last < AT_ONCE_SECONDS:
            self.found += n
        self.done += n
        self.last = now
        if now - self.printed < LOG_SECONDS:
            return
        self.printed = now
        line = f"{self.description}: {self.done}"
        if self.total:
            worked = max(self.done - self.found, 1)
            left = (now - self.started) / worked * max(self.total - self.done, 0)
            line += f"/{self.total}, {left:.0f} s left"
        _print(self.console, f"{line}  {self.note}".rstrip())

    def update(self, *, note: str) -> None:
        self.note = note


class LogProgress:
    """A line when a task begins and ends, and every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, description: str, total: int | None, /) -> Iterator[Task]:
        started = time.monotonic()
        _print(self.console, f"{description} ...")
        yield _Logged(self.console, description, total)
        seconds = time.monotonic() - started
        _print(self.console, f"{description}: {seconds:.1f} s")

    def say(self, line: str, /) -> None:
        _print(self.console, line)


def _print(console: Console, line: str) -> None:
    """One line of a log: as it is, and not broken at the width of a terminal that is not there."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    def __init__(self, bar: RichBar, task: TaskID) -> None:
        self.bar, self.id = bar, task

    def advance(self, n: int = 1, /) -> None:
        self.bar.advance(self.id, n)

    def update(self, *, note: str) -> None:
        self.bar.update(self.id, note=escape(note))


class RichProgress:
    """A live bar with time elapsed and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, description: str, total: int | None, /) -> Iterator[Task]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with RichBar(*columns, console=self.console) as bar:
            yield _Bar(bar, bar.add_task(escape(description), total=total, note=""))

    def say(self, line: str, /) -> None:
        _print(self.console, line)


def make_progress(quiet: bool = False, console: Console | None = None) -> Progress:
    """Nothing when quiet, a live bar in a terminal, log lines elsewhere."""
    if quiet:
        return SilentProgress()
    console = console or Console(file=sys.stderr)
    return RichProgress(console) if console.is_terminal else LogProgress(console)
