"""Every fault that a run is to survive: how often it was tried, and what came of it.

    .venv/bin/python scripts/faults.py --output reports/faults [--random 100] [--fuzz 100000]
        [--requests 10000] [--only kills tests fuzz-verify ...]

Works on a tiny random model and a recipe with every kind of stage that needs no server. After each
kill, whatever counts as finished is compared with the hashes written beside it; in the end the
hashes are those of a run that nothing disturbed. Faults of engines, inputs and memory are those of
the test suite, counted. Writes faults.json and README.md; parts that are not run again stay as they
are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from compressor.doctor import cpu_name
from tests import tiny
from tests.faults.conftest import SMALL, WHOLE, Undisturbed, project
from tests.faults.fuzzing import TARGETS
from tests.faults.runs import NOBODY, let_nobody_read, new_zygote, small_disk, stored
from tests.faults.test_disk import flip
from tests.faults.test_kills import die_at_every_point, die_at_random
from tests.projects import write

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
_MEASURE, _ENGINES = "tests/measure", "tests/engines"
# (fault, outcome, tests) of those that the test suite has.
TESTS = [
    ("engine that dies at its start, or never gets healthy", "ended, one error with its log", [
        f"{_ENGINES}/test_process.py::test_a_death_at_the_start_is_told_with_the_log",
        f"{_ENGINES}/test_process.py::test_a_server_that_never_gets_healthy_is_ended",
        f"{_ENGINES}/test_server.py::test_a_server_that_never_gets_healthy_is_ended",
        f"{_ENGINES}/test_server.py::test_a_break_while_starting_ends_the_server",
    ]),
    ("engine that dies in the middle", "its samples kept and marked, other variants go on", [
        f"{_ENGINES}/test_server.py::test_a_death_while_answering_is_told_with_the_log",
        f"{_MEASURE}/test_runner.py::test_variant_whose_engine_dies_is_taken_out",
        f"{_MEASURE}/test_load.py::test_a_dead_server_is_not_asked_for_ever",
        f"{_MEASURE}/test_client.py::test_a_refused_connection_is_a_sample",
    ]),
    ("engine that answers 500s, stalls a stream, cuts it, sends garbage",
     "a marked sample with the tokens before it", [
        f"{_MEASURE}/test_client.py::test_faults_are_samples_with_the_tokens_before_them",
        f"{_MEASURE}/test_client.py::test_a_line_without_end_is_garbage",
        f"{_MEASURE}/test_load.py::test_a_server_that_stalls_does_not_hold_up_the_schedule",
        f"{_MEASURE}/test_load.py::test_a_server_that_fails_now_and_then_leaves_the_rest",
    ]),
    ("checkpoint, tokenizer or text at odds with itself", "one error that says what and where",
     ["tests/faults/test_inputs.py"]),
    ("too little memory", "smaller batches and the same figures, or one error", [
        "tests/faults/test_memory.py", "tests/quantize/test_out_of_memory.py",
    ]),
]  # fmt: skip


class Faults:
    """Tries faults in directories of their own.

    Args:
        scratch: for them.
        random: kills at random moments.
        fuzz: damaged inputs of each kind.
        requests: of the load that goes on for long.
    """

    def __init__(self, scratch: Path, random: int, fuzz: int, requests: int) -> None:
        self.scratch, self.random, self.fuzz_count = scratch, random, fuzz
        self.requests = requests
        self.zygote = new_zygote()
        self.whole = Undisturbed(self.zygote, scratch / "undisturbed", WHOLE)
        started = time.monotonic()  # again, now that all is imported
        self.finish(self.new())
        self.seconds = time.monotonic() - started

    def new(self) -> Path:
        return project(Path(tempfile.mkdtemp(dir=self.scratch)), self.whole.recipe)

    def finish(self, directory: Path) -> None:
        code, printed = self.zygote.run(directory)
        assert code == 0, printed
        self.whole.same(directory)

    def kills(self) -> list[Row]:
        directory = self.new()
        number = die_at_every_point(self.zygote, directory)
        self.whole.same(directory)
        rows = [row("SIGKILL before and after every publication of a file", number, "same hashes")]
        number, left = 0, self.random
        while left > 0:
            directory = self.new()
            count = min(left, 10)
            number += die_at_random(
                self.zygote, directory, count, self.seconds / 2, seed=self.random - left
            )
            self.finish(directory)
            left -= count
        return [*rows, row("SIGKILL at a random moment", number, "same hashes")]

    def interrupts(self) -> list[Row]:
        generator, number = random.Random(1), 0
        for _ in range(10):
            directory = self.new()
            after = generator.uniform(0.3, 0.8 * self.seconds)
            code, printed = self.zygote.run(directory, after=after, signal=int(signal.SIGINT))
            assert code in (0, 130) and "Traceback" not in printed, printed
            number += code == 130
            stored(directory)
            self.finish(directory)
        return [row("SIGINT at a random moment", number, "exit code 130, then same hashes")]

    def clock(self) -> list[Row]:
        for step in (-86400.0, -1.0, 86400.0):
            directory = self.new()
            code, printed = self.zygote.run(directory, clock=step)
            assert code == 0, printed
            self.whole.same(directory)
        return [row("wall clock that jumps at each look", 3, "same hashes")]

    def together(self) -> list[Row]:
        other = new_zygote()
        for number in range(8):
            directory, codes = self.new(), []
            thread = threading.Thread(
                target=lambda place=directory, made=codes: made.append(other.run(place))
            )
            thread.start()
            time.sleep(self.seconds * number / 10)
            codes.append(self.zygote.run(directory))
            thread.join()
            assert [code for code, _ in codes] == [0, 0], codes
            self.whole.same(directory)
        other.close()
        return [row("two runs at once on one store", 8, "both end, same hashes")]

    def disk(self) -> list[Row]:
        rows = []
        sizes = (200, 700, 1500, 3000)
        for size in sizes:
            directory = self.new()
            place = directory / "disk"
            with small_disk(place, size) as mounted:
                if not mounted:
                    return [row("full disk", 0, "not tried: nothing may be mounted here")]
                arguments = ("run", "recipe.yaml", "--store", str(place / "store"), "--force")
                code, printed = self.zygote.run(directory, *arguments)
                assert code == 1 and "fix:" in printed and "Traceback" not in printed, printed
                assert "unexpected" not in printed, printed
                shutil.copytree(place / "store", directory / ".compressor")
            stored(directory)
            self.finish(directory)
        rows.append(row("full disk (200 kB to 3 MB)", len(sizes), "one error, then same hashes"))
        if os.getuid() == 0:
            directory = self.new()
            let_nobody_read(directory)
            code, printed = self.zygote.run(directory, uid=NOBODY)
            assert code == 1 and "cannot write the store" in printed, printed
            rows.append(row("store that cannot be written", 1, "one error"))
        return rows

    def bits(self) -> list[Row]:
        directory = self.new()
        self.finish(directory)
        store = directory / ".compressor" / "objects"
        files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.name != "stage.json"]
        found = 0
        for number, path in enumerate(files):
            whole = path.read_bytes()
            if not whole:
                continue
            flip(path, 104_729 * (number + 1))
            try:
                stored(directory)
            except Exception as error:
                assert "SHA-256" in str(error)
                found += 1
            path.write_bytes(whole)
        nonempty = sum(path.stat().st_size > 0 for path in files)
        assert found == nonempty
        return [row("one bit flipped in a stored file", found, "named by its hash")]

    def tests(self) -> list[Row]:
        """Faults that the test suite has, one a test."""
        rows = []
        for fault, outcome, places in TESTS:
            path = self.scratch / "junit.xml"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", f"--junitxml={path}", *places],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            (suite,) = ElementTree.parse(path).getroot()
            passed = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
            rows.append(row(fault, passed, outcome))
        return rows

    def gc(self) -> list[Row]:
        """Many runs in one store, half of them deleted."""
        directory, runs = self.new(), 50
        for number in range(runs):
            write(directory, {
                **SMALL,
                "calibration": {**SMALL["calibration"], "samples": 4 + number},
            })  # fmt: skip
            code, printed = self.zygote.run(directory)
            assert code == 0, printed
        made = sorted((directory / "runs" / "recipe").iterdir())
        assert len(made) == runs
        for path in made[::2]:
            shutil.rmtree(path)
        kept = {
            stage["key"]
            for path in made[1::2]
            for stage in json.loads((path / "report" / "report.json").read_text())["stages"]
        }
        before = stored(directory)
        code, printed = self.zygote.run(directory, "gc")
        assert code == 0, printed
        after = stored(directory)
        assert set(after) == kept and len(before) > len(after), printed
        assert after == {key: before[key] for key in kept}
        freed = f"{len(before) - len(after)} stages freed, {len(after)} kept whole"
        return [row("50 runs in one store, 25 deleted, `compress gc`", runs, freed)]

    def soak(self) -> list[Row]:
        """A served model under load, in rounds as they are measured."""
        from compressor.measure import metrics
        from compressor.measure.engines.vllm import VllmServer
        from compressor.measure.fleet import vllm_interpreter
        from compressor.measure.load import closed_loop, run_load

        model = tiny.build("qwen3", self.scratch / "served")
        prompts, rounds = [[5 + n % 200] * (8 + n % 24) for n in range(64)], 20
        resident: list[float] = []
        flags = ("--max-model-len", "256")
        python, log = vllm_interpreter(None), self.scratch / "vllm.log"
        with VllmServer(python, model, log, flags) as server:
            for _ in range(rounds):
                result = run_load(
                    server.client,
                    lambda client: closed_loop(
                        client,
                        prompts,
                        concurrency=16,
                        requests=self.requests // rounds,
                        output_lengths=16,
                    ),
                )
                assert metrics.error_rate(result.samples) == 0
                resident.append(psutil.Process().memory_info().rss / 1e6)
        early, late = resident[rounds // 4], resident[-1]
        assert late < early + 5, resident
        outcome = (
            f"load generator: {early:.0f} MB resident after a quarter, {late:.0f} MB at the end"
        )
        return [row("measured load on vLLM, requests", self.requests, outcome)]

    def fuzz(self, name: str) -> list[Row]:
        """Damaged inputs of a kind, a share for each processor."""
        # Each config.json that is not refused builds a model.
        count = self.fuzz_count if name != "config" else self.fuzz_count // 20
        shares = os.cpu_count() or 1
        with ThreadPoolExecutor(shares) as pool:
            told = list(pool.map(partial(_fuzzed, name, -(-count // shares)), range(shares)))
        inputs, refused = (sum(one[key] for one in told) for key in ("inputs", "refused"))
        outcome = f"{refused:,} refused by one error each, the others read"
        return [row(f"damaged input: {name}", inputs, outcome)]


def _fuzzed(name: str, count: int, seed: int) -> dict[str, int]:
    """What a process of its own says of so many damaged inputs."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults.fuzzing", name),
            *("--count", str(count), "--seed", str(seed)),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def row(fault: str, tried: int, outcome: str) -> Row:
    """A line of the table."""
    now = datetime.now(UTC).isoformat(timespec="minutes")
    return {"fault": fault, "tried": tried, "outcome": outcome, "date": now, "machine": cpu_name()}


def markdown(rows: list[Row]) -> str:
    """The table as a page."""
    lines = [
        "# Faults",
        "",
        "Made by `python scripts/faults.py --output reports/faults`; `tests/faults` has a part of",
        "it in every test run.",
        "",
        "| fault | times tried | outcome | when |",
        "|---|---:|---|---|",
    ]
    lines += [
        f"| {r['fault']} | {r['tried']:,} | {r['outcome']} | {r['date'][:10]} |" for r in rows
    ]
    machines = sorted({str(r["machine"]) for r in rows})
    return "\n".join([*lines, "", f"Machine: {', '.join(machines)}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--fuzz", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=10_000)
    fuzz = {f"fuzz-{name}": name for name in TARGETS}
    parts = [
        *("kills", "interrupts", "clock", "together", "disk", "bits", "tests"),
        *fuzz,
        *("gc", "soak"),
    ]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    path = arguments.output / "faults.json"
    kept: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        faults = Faults(Path(scratch), arguments.random, arguments.fuzz, arguments.requests)
        for name in arguments.only:
            part: Callable[[], list[Row]]
            part = partial(faults.fuzz, fuzz[name]) if name in fuzz else getattr(faults, name)
            kept[name] = part()
            print(name, kept[name], flush=True)
            rows = [one for key in parts for one in kept.get(key, [])]
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            (arguments.output / "README.md").write_text(markdown(rows), encoding="utf-8")
        faults.zygote.close()


if __name__ == "__main__":
    main()
