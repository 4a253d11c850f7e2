"""A search that is interrupted at random moments: does it end with the same answer?

    python benchmarks/interrupted.py RECIPE --output FILE [--store DIR] [--interruptions 5]
        [--seconds 40 100] [--seed 0]

The first interruption comes as soon as the search has looked at the device, the others so many
seconds after it went on, with SIGKILL and SIGINT in turn. Then it is left to finish; and once more,
from what the first interruption left of its record, with nothing in between. Measured times are
stages of the store: both meet the same ones, and `optimise.json` must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import write_record

from compressor.doctor import cpu_name
from compressor.optimise.record import DIRECTORY
from compressor.recipe import load_recipe
from compressor.record import OPTIMISE

_ENDED = (0, 3)  # exit codes of a search that ended: something to deploy, or the baseline


def start(recipe: Path, store: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start the search in a process group of its own, with Ctrl-C as a terminal would send it."""
    command = [sys.executable, "-m", "compressor", "optimise", str(recipe)]
    command += ["--store", str(store), "--output", str(output)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def kill_at_first(process: subprocess.Popen[bytes], studies: Path) -> Path:
    """SIGKILL once the search knows the device; the file of its record."""
    known = set(studies.glob("*.sqlite3"))
    while process.poll() is None:
        for path in set(studies.glob("*.sqlite3")) - known:
            if _knows_device(path):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return path
        time.sleep(0.1)
    raise SystemExit("the search ended too early: give a store that does not know it")


def _knows_device(path: Path) -> bool:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
            return bool(base.execute("select count(*) from study_user_attributes").fetchone()[0])
    except sqlite3.Error:  # its tables are being made
        return False


def interrupt(process: subprocess.Popen[bytes], sent: signal.Signals, after: float) -> bool:
    """Whether the search still ran after so many seconds; it does not any more."""
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, sent)
        code = process.wait()
        if code not in (130, -signal.SIGKILL, *_ENDED):
            raise SystemExit(f"interrupted, it ended with exit code {code}") from None
        return code not in _ENDED


def answer(process: subprocess.Popen[bytes], output: Path) -> dict[str, Any]:
    """What the search left, once it has ended by itself."""
    if (code := process.wait()) not in _ENDED:
        raise SystemExit(f"left alone, the search ended with exit code {code}")
    found = max(output.glob(f"*/*/{OPTIMISE}"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(found.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--store", type=Path, help="the recipe's if not given")
    parser.add_argument("--interruptions", type=int, default=5)
    parser.add_argument("--seconds", type=float, nargs=2, default=(40.0, 100.0))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store = arguments.store or load_recipe(arguments.recipe).store_dir
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        begun, output = Path(scratch) / "begun.sqlite3", Path(scratch) / "runs"
        study = kill_at_first(start(arguments.recipe, store, output), store / DIRECTORY)
        shutil.copyfile(study, begun)
        moments: list[dict[str, Any]] = [{"signal": "SIGKILL", "after_seconds": None}]
        process = start(arguments.recipe, store, output)
        while len(moments) < arguments.interruptions:
            after = generator.uniform(*arguments.seconds)
            sent = signal.SIGINT if len(moments) % 2 else signal.SIGKILL
            if not interrupt(process, sent, after):
                break
            moments.append({"signal": sent.name, "after_seconds": round(after, 1)})
            process = start(arguments.recipe, store, output)
        interrupted = answer(process, output)
        shutil.copyfile(begun, study)
        whole = answer(start(arguments.recipe, store, output), output)
    facts = {
        "interruptions": moments,
        "chosen": interrupted["chosen"],
        "trials": [one["name"] for one in interrupted["trials"]],
        "same": interrupted == whole,
        "differ": sorted(k for k in interrupted if interrupted[k] != whole.get(k)),
    }
    print(write_record(arguments.output, cpu_name(), facts), end="")
    return int(not facts["same"])


if __name__ == "__main__":
    sys.exit(main())
