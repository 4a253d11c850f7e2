"""Independent variants on a local Ray cluster against a local run: wall time, and the same files?

    python benchmarks/spread.py RECIPE --output FILE

One run on one thread, one on as many Ray workers of one thread as there are processors, and one
local run on all processors; each in a store of its own. The first two must leave the same bytes (a
sum's last bits depend on the number of threads).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import write_record

from compressor.doctor import cpu_name
from compressor.store import file_sha256


def timed(recipe: Path, scratch: Path, threads: int, *further: str) -> tuple[float, dict[str, str]]:
    """Seconds of a run, and the SHA-256 of every file of its stages."""
    store = scratch / "store"
    command = [sys.executable, "-m", "compressor", "run", str(recipe), *further]
    command += ["--store", str(store), "--output", str(scratch / "runs")]
    started = time.monotonic()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    seconds = time.monotonic() - started
    objects = store / "objects"
    files = [path for path in objects.rglob("*") if path.is_file() and path.name != "stage.json"]
    return seconds, {str(path.relative_to(objects)): file_sha256(path) for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    ways: dict[str, tuple[int, tuple[str, ...]]] = {
        "local, one thread": (1, ()),
        "ray, workers of one thread": (1, ("--on", "ray")),
        "local, all processors": (processors, ()),
    }
    seconds: dict[str, float] = {}
    files: dict[str, dict[str, str]] = {}
    for name, (threads, further) in ways.items():
        with tempfile.TemporaryDirectory() as scratch:
            took, files[name] = timed(arguments.recipe, Path(scratch), threads, *further)
        seconds[name] = round(took, 1)
        print(name, seconds[name], flush=True)
    local, ray, _ = files.values()
    facts: dict[str, Any] = {
        "processors": processors,
        "seconds": seconds,
        "files": len(local),
        "differ": sorted(name for name in local | ray if local.get(name) != ray.get(name)),
    }
    print(write_record(arguments.output, cpu_name(), facts), end="")
    return int(bool(facts["differ"]))


if __name__ == "__main__":
    sys.exit(main())
