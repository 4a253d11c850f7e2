"""Stages on a Ray cluster of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compressor.cluster import ALONE, _Driver, parse_address
from compressor.errors import RecipeError
from compressor.plan import make_plan
from compressor.progress import SilentProgress
from compressor.recipe import load_recipe
from compressor.store import Store
from tests.projects import ENVIRONMENT, RECIPE, compress, report, write


def hashes(project: Path, store: str) -> dict[str, list[str]]:
    """SHA-256 of every file of every stage, by the stage's key."""
    found = {}
    for path in (project / store / "objects").glob("*/*/stage.json"):
        manifest = json.loads(path.read_text())
        if manifest["kind"] in ("measure", "accept"):
            continue  # times
        found[manifest["key"]] = [
            hashlib.sha256((path.parent / entry["path"]).read_bytes()).hexdigest()
            for entry in manifest["files"]
        ]
    return found


@pytest.mark.parametrize(("on", "address"), [("ray", None), ("ray=10.0.0.1:6379", "10.0.0.1:6379")])
def test_places_to_run(on: str, address: str | None) -> None:
    assert parse_address(on) == address


@pytest.mark.parametrize("on", ["rya", "ray=", "slurm", ""])
def test_other_places_are_one_clear_error(on: str) -> None:
    with pytest.raises(RecipeError, match="--on"):
        parse_address(on)


class Cluster:
    """What the driver asks of Ray, done at once and in this process: the order in which stages are
    handed out, and what they request."""

    def __init__(self, **node: float) -> None:
        self.node = {"CPU": 4.0, "memory": 8e9, **node}
        self.requests: dict[str, dict[str, Any]] = {}
        self.results: dict[int, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.node}]

    def remote(self, function: Any) -> Any:
        cluster = self

        class Function:
            def options(self, **request: Any) -> Any:
                self.request = request
                return self

            def remote(self, stage: Any, *arguments: Any) -> int:
                cluster.requests[stage.name] = self.request
                number = len(cluster.results)
                cluster.results[number] = function(stage, *arguments)
                return number

        return Function()

    def wait(self, refs: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        return refs[:1], refs[1:]

    def get(self, ref: int) -> Any:
        return self.results[ref]


def test_requests_keep_timed_stages_alone_and_give_the_others_one_gpu(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["measure"] = {"engine": "transformers"}
    write(project, recipe)
    plan = make_plan(load_recipe(project / "recipe.yaml"), Store(project / "store"))
    driver = _Driver(plan, Cluster(GPU=2.0), SilentProgress())
    for stage in plan.stages:
        request = driver._request(stage)
        assert request["memory"] is None or request["memory"] <= 0.9 * 8e9
        if stage.kind in ALONE:
            assert (request["num_cpus"], request["num_gpus"]) == (4.0, 2.0)
        else:
            assert request["num_cpus"] <= 4 and request["num_gpus"] == 1
        assert request["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]


def test_a_failed_variant_leaves_the_others_and_equal_stages_are_made_once(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["variants"] = {
        "broken": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 48}}]},
        "one": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]},
    }
    write(project, recipe)
    plan = make_plan(load_recipe(project / "recipe.yaml"), Store(project / "store"))
    cluster = Cluster()
    found = _Driver(plan, cluster, SilentProgress()).run()
    (message,) = found.broken.values()
    assert "48" in message
    assert "quantize:broken" in cluster.requests and "evaluate:broken" not in cluster.requests
    assert "evaluate:one" in cluster.requests
    assert found.made == {stage.key for stage in plan.stages if stage.variant != "broken"}


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes_and_survives_a_lost_worker(project: Path) -> None:
    pytest.importorskip("ray")
    threads = {"OMP_NUM_THREADS": "1", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    done = compress(project, "run", "recipe.yaml", "--store", "local", fresh=True, **threads)
    assert done.returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", "recipe.yaml", "--store", "spread",
         "--on", "ray"],
        cwd=project,
        env=ENVIRONMENT | threads,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    killed = False
    while process.poll() is None and not killed:
        for worker in workers("ray::quantize"):
            os.kill(worker, signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    assert process.wait(timeout=300) == 0, process.stderr and process.stderr.read()
    assert killed
    assert hashes(project, "spread") == hashes(project, "local")
    assert not any(stage["cached"] for stage in report(project)["stages"])


def workers(name: str) -> list[int]:
    """Process ids of Ray's workers that are at a stage of that name."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if command[0].startswith(name):
            found.append(process.pid)
    return found
