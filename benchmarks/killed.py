"""A stage of a real recipe, killed with SIGKILL in the middle and resumed: are its files the same?

    python benchmarks/killed.py RECIPE STAGE --output FILE [--store DIR] [--kills 3] [--after 30]

The recipe must have run. Its store is copied (by links) without that stage, whose run there is
killed so many times, each some seconds after it went on, and then left to finish. The SHA-256 of
every file is compared with those of the run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from records import write_record

from compressor.plan import make_plan
from compressor.recipe import load_recipe
from compressor.store import Store, StoredStage


def copy_store(source: Store, target: Path, without: str) -> Store:
    """The finished stages by links, but for one key."""
    made = Store(target)
    left_out = source.path(without)
    for path in source.root.glob("objects/*/*"):
        if path != left_out:
            shutil.copytree(path, target / path.relative_to(source.root), copy_function=os.link)
    if (hashes := source.root / "file-hashes.json").exists():
        shutil.copyfile(hashes, target / hashes.name)
    return made


def run(recipe: Path, store: Store, output: Path) -> subprocess.Popen[bytes]:
    """Start the run in a process group of its own."""
    command = [sys.executable, "-m", "compressor", "run", str(recipe)]
    command += ["--store", str(store.root), "--output", str(output)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill_at(process: subprocess.Popen[bytes], store: Store, key: str, after: float) -> None:
    """SIGKILL to the whole group so many seconds after the stage went on."""
    partial = store.root / "partial" / key
    before = _newest(partial) if partial.exists() else 0
    deadline = time.monotonic() + 600
    while not partial.exists() or (before and _newest(partial) <= before):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the stage did not begin")
        time.sleep(0.05)
    time.sleep(after)
    if process.poll() is not None or store.get(key) is not None:
        raise SystemExit("the stage had finished before it was killed: give a smaller --after")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(process: subprocess.Popen[bytes], store: Store, key: str) -> StoredStage:
    """The stage, once a run that is left alone has made it; the rest is not waited for."""
    while (found := store.get(key)) is None:
        if process.poll() is not None:
            raise SystemExit(f"the run that was left alone ended with exit code {process.poll()}")
        time.sleep(0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return found


def _newest(directory: Path) -> int:
    return max(path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")])


def hashes(stored: StoredStage) -> dict[str, str]:
    """SHA-256 by file."""
    return {entry["path"]: entry["sha256"] for entry in stored.manifest["files"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("stage", help="such as speculate:int4-medusa")
    parser.add_argument("--store", type=Path, help="the recipe's if not given")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--after", type=float, default=30.0, help="seconds")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    store = Store(arguments.store or recipe.store_dir)
    stage = next(one for one in make_plan(recipe, store).stages if one.name == arguments.stage)
    undisturbed = store.get(stage.key)
    if undisturbed is None:
        raise SystemExit(f"{stage.name} is not in the store: run the recipe first")
    facts: dict[str, Any] = {
        "stage": stage.name,
        "seconds_undisturbed": undisturbed.manifest["seconds"],
        "killed_after_seconds": [],
    }
    with tempfile.TemporaryDirectory(dir=store.root.parent) as scratch:
        copy = copy_store(store, Path(scratch) / "store", stage.key)
        output = Path(scratch) / "runs"
        for _ in range(arguments.kills):
            kill_at(run(arguments.recipe, copy, output), copy, stage.key, arguments.after)
            facts["killed_after_seconds"].append(arguments.after)
        resumed = finished(run(arguments.recipe, copy, output), copy, stage.key)
        ours, theirs = hashes(undisturbed), hashes(resumed)
    facts["files"] = ours
    facts["differ"] = sorted(n for n in ours | theirs if ours.get(n) != theirs.get(n))
    machine = f"{platform.machine()}, {psutil.cpu_count()} CPUs"
    print(write_record(arguments.output, machine, facts), end="")


if __name__ == "__main__":
    main()
