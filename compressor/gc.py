"""Free what no run refers to: stages of runs that were deleted, and what they left unfinished.

A run refers to every stage that its ``log.jsonl`` and ``stages.json`` name, so also to those that
an interrupted run has made or begun; a search (``optimise.json``) to those of its trials. Artifacts
of runs are links: freeing a stage never takes a file out of a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import RunError
from compressor.optimise.record import DIRECTORY
from compressor.record import LOG, OPTIMISE, STAGES
from compressor.store import Store

_KEY = re.compile(r'"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Freed:
    """What was (or would be) freed.

    Attributes:
        stages: number of finished stages.
        unfinished: number of stages that were begun.
        bytes: of both, those of files that nothing else links to.
        kept: number of finished stages that stay.
    """

    stages: int
    unfinished: int
    bytes: int
    kept: int


def collect(store: Store, runs: Iterable[Path], *, dry_run: bool = False) -> Freed:
    """Free the stages that no run refers to.

    Args:
        store: to free from.
        runs: directories that hold runs, at any depth. All runs that use the store must be there.
        dry_run: only count.

    Raises:
        RunError: there is no such directory, or a file of a run cannot be read.
    """
    wanted = set(_named(store.root / DIRECTORY, ("*.jsonl",)))  # searches, which may go on
    for directory in runs:
        if not directory.is_dir():
            raise RunError(
                "there is no such directory of runs",
                where=str(directory),
                fix="name the directories of all runs that use this store",
            )
        wanted |= set(_named(directory, (f"**/{LOG}", f"**/{STAGES}", f"**/{OPTIMISE}")))
    every = list(store.root.glob("objects/*/*"))
    kept = sum(path.name in wanted for path in every)
    stages = _free(store, every, wanted, dry_run)
    unfinished = _free(store, store.root.glob("partial/*"), wanted, dry_run)
    if not dry_run:
        _remove_locks(store)
    return Freed(len(stages), len(unfinished), sum(stages) + sum(unfinished), kept)


def _free(store: Store, paths: Iterable[Path], wanted: set[str], dry_run: bool) -> list[int]:
    """Remove those directories of stages that are not wanted, and that nobody is making; the bytes
    of each."""
    sizes = []
    for path in paths:
        if path.name in wanted:
            continue
        with store.lock(path.name, wait=False) as held:
            if held:
                sizes.append(_bytes(path))
                if not dry_run:
                    _remove(store, path)
    return sizes


def _named(directory: Path, patterns: Iterable[str]) -> Iterator[str]:
    """Keys of stages in files of a directory; in JSON a key is always a whole string."""
    for pattern in patterns:
        for path in directory.glob(pattern):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise RunError(
                    f"cannot be read: {error}",
                    where=str(path),
                    fix="mend it or delete its run; nothing was freed",
                ) from error
            yield from _KEY.findall(text)


def _bytes(directory: Path) -> int:
    """Bytes of files that are linked from nowhere else."""
    found = 0
    for path in directory.rglob("*"):
        facts = path.lstat()
        found += facts.st_size if path.is_file() and facts.st_nlink == 1 else 0
    return found


def _remove(store: Store, path: Path) -> None:
    """Out of sight by one rename first: a stage is whole or it is not there."""
    aside = store.root / "partial" / f"{path.name}.gone"  # which the next call frees, if need be
    if path.parent != aside.parent:
        os.rename(path, aside)
        path = aside
    shutil.rmtree(path)


def _remove_locks(store: Store) -> None:
    """Lock files of stages that are gone; one that is held stays."""
    for path in store.root.glob("locks/*.lock"):
        key = path.name.removesuffix(".lock")
        if store.path(key).exists() or (store.root / "partial" / key).exists():
            continue
        with store.lock(key, wait=False) as held:
            if held:
                path.unlink(missing_ok=True)
