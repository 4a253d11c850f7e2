"""Stages spread over the workers of a Ray cluster, into a store that all of them see.

A stage goes to a worker as soon as its inputs are there, with a request for processors, memory and
(where the cluster has any) one GPU. Stages that take times ask for all processors and GPUs of a
node, so that nothing else runs beside them. A worker that is lost is replaced, and its stage goes
on from what it left in the store. Keys are those of a local run: each worker computes the key
itself and refuses where its own code would make something else.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, RecipeError, RunError, first_line
from compressor.plan import BASELINE, Plan, Stage
from compressor.progress import Progress
from compressor.store import Store

ALONE = ("measure", "served", "accept")  # kinds of stages that take times
RETRIES = 3  # of a stage whose worker was lost
_FIX = "start it (`ray start --head`), or leave the address out: `--on ray` starts one here"
_SHARED = "give a --store that every node sees under the same path, or `shared_store`"
# Of the driver's environment; no secrets, since Ray shows what it is given.
_ENVIRONMENT = ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "COMPRESSOR_CHECKPOINT_SECONDS")


@dataclass
class Spread:
    """What came of the stages.

    Attributes:
        made: keys of the stages that were made now.
        broken: error by key of a stage that failed.
    """

    made: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)


def parse_address(on: str) -> str | None:
    """Address of the cluster in ``ray`` or ``ray=ADDRESS``; None starts one on this machine.

    Raises RecipeError for anything else.
    """
    name, _, address = on.partition("=")
    if name != "ray" or (on != "ray" and not address):
        raise RecipeError(
            f"{on!r} is no place to run", where="--on", fix="use ray, or ray=ADDRESS of a cluster"
        )
    return address or None


def spread(plan: Plan, address: str | None, progress: Progress) -> Spread:
    """Make the stages that the store lacks on a cluster.

    A stage that fails takes its variant with it; the others go on, as in a local run.

    Args:
        plan: what to do; every node sees its store under the same path, or there is a shared one.
        address: of a running cluster; None starts one with this machine's processors.
        progress: where to report.

    Raises:
        CompressorError: Ray is not there, or a stage that every variant needs failed.
    """
    if not plan.remaining:
        return Spread()
    ray = _connect(address)
    try:
        return _Driver(plan, ray, progress).run()
    finally:
        ray.shutdown()


def _connect(address: str | None) -> Any:
    try:
        import ray
    except ImportError:
        raise RunError(
            "Ray is not installed", where="--on", fix="pip install 'compressor[ray]'"
        ) from None
    own: dict[str, Any] = {"include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises a dozen unrelated types here
        raise RunError(
            f"no cluster: {first_line(error)}", where=f"--on ray={address}", fix=_FIX
        ) from error
    return ray


class _Driver:
    def __init__(self, plan: Plan, ray: Any, progress: Progress) -> None:
        import torch

        self.plan, self.ray, self.progress = plan, ray, progress
        self.threads = torch.get_num_threads()  # the order of sums depends on it
        self.nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.gpus = any(node.get("GPU") for node in self.nodes)
        self.work = ray.remote(make_stage)
        self.keys: dict[str, str] = {}  # of finished stages, by name
        self.settled: set[str] = set()  # stages that will not be made
        self.failed: dict[str, int] = {}  # by variant: place of the stage that failed
        self.running: dict[Any, tuple[int, Stage, str]] = {}
        self.outcome = Spread()

    def run(self) -> Spread:
        waiting = list(enumerate(self.plan.stages))
        with self.progress.task("stages on ray", len(waiting)) as task:
            while waiting or self.running:
                left = []
                for place, stage in waiting:
                    if not self._begin(place, stage, waiting):
                        left.append((place, stage))
                    elif all(stage is not one for _, one, _ in self.running.values()):
                        task.advance()
                moved, waiting = len(left) < len(waiting), left
                if moved:  # others may wait for what was settled just now
                    continue
                task.update(note=", ".join(stage.name for _, stage, _ in self.running.values()))
                (ready,), _ = self.ray.wait(list(self.running), num_returns=1)
                self._end(ready)
                task.advance()
        return self.outcome

    def _begin(self, place: int, stage: Stage, waiting: list[tuple[int, Stage]]) -> bool:
        """Begin a stage if its inputs are settled; whether it waits no longer."""
        if self._dropped(place, stage):
            return True
        unsettled = {s.name for p, s in waiting if not self._dropped(p, s)} - set(self.keys)
        unsettled |= {s.name for _, s, _ in self.running.values()}
        unsettled -= self.settled
        if unsettled & set(stage.inputs):
            return False
        inputs = {name: self.keys[name] for name in stage.inputs if name in self.keys}
        if stage.variant is not None and len(inputs) < len(stage.inputs):
            self.settled.add(stage.name)
            return True  # `run.execute` says of it what is missing
        key = stage.key_given(inputs)
        if key in self.outcome.broken:
            self._fail(place, stage, key, self.outcome.broken[key])
            return True
        if self.plan.store.has(key):
            self.keys[stage.name] = key
            return True
        if any(key == other for _, _, other in self.running.values()):
            return False  # another variant's equal stage
        ref = self.work.options(**self._request(stage)).remote(
            stage, key, inputs, str(self.plan.store.root), self.plan.recipe.shared_store
        )
        self.running[ref] = (place, stage, key)
        return True

    def _dropped(self, place: int, stage: Stage) -> bool:
        return self.failed.get(str(stage.variant), place) < place

    def _request(self, stage: Stage) -> dict[str, Any]:
        """What a stage asks the cluster for."""
        most = max(self.nodes, key=lambda node: node.get("CPU", 0))
        memory = max(node.get("memory", 0) for node in self.nodes)
        alone = stage.kind in ALONE
        variables = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        return {
            "name": stage.name,
            "num_cpus": most["CPU"] if alone else min(self.threads, most["CPU"]),
            "num_gpus": (most.get("GPU", 1) if alone else 1) if self.gpus else 0,
            "memory": int(min(stage.estimate.memory_bytes, 0.9 * memory)) or None,
            "max_retries": RETRIES,
            "runtime_env": {"env_vars": variables | {"OMP_NUM_THREADS": str(self.threads)}},
        }

    def _end(self, ref: Any) -> None:
        place, stage, key = self.running.pop(ref)
        try:
            error = self.ray.get(ref)
        except Exception as lost:  # the worker was lost once too often, or of a fault of ours
            error = {"what": f"{stage.name}: lost on the cluster: {first_line(lost)}"}
        if error is None:
            if not self.plan.store.has(key):
                raise RunError(
                    f"{stage.name} was made elsewhere: the store is not shared",
                    where=str(self.plan.store.root),
                    fix=_SHARED,
                )
            self.keys[stage.name] = key
            self.outcome.made.add(key)
            return
        failure = RunError(error["what"], where=error.get("where"), fix=error.get("fix"))
        self._fail(place, stage, key, str(failure))
        if stage.variant in (None, BASELINE):
            raise failure

    def _fail(self, place: int, stage: Stage, key: str, message: str) -> None:
        self.outcome.broken[key] = message
        self.settled.add(stage.name)
        self.failed.setdefault(str(stage.variant), place)
        if stage.kind == "verify":  # an artifact that failed its proof is not measured
            for name in stage.inputs:
                if name.startswith("export:"):
                    self.keys.pop(name, None)


def make_stage(
    stage: Stage, key: str, inputs: dict[str, str], root: str, shared: str | None
) -> dict[str, str | None] | None:
    """Make a stage on a worker.

    Args:
        stage: as planned.
        key: its content key.
        inputs: keys of its inputs by name.
        root: of the store.
        shared: address of the shared store, if there is one.

    Returns:
        None, or what went wrong: ``what``, ``where`` and ``fix``.
    """
    from compressor.progress import SilentProgress
    from compressor.run import check_inputs, make

    try:
        if stage.key_given(inputs) != key:
            raise RunError(
                f"{stage.name}: a node has another version of compressor or its libraries",
                where=os.uname().nodename,
                fix="install the same versions everywhere (constraints.txt)",
            )
        store = Store(Path(root), shared)
        found = {name: store.get(own) for name, own in inputs.items()}
        known = {name: stored for name, stored in found.items() if stored is not None}
        if len(known) < len(found):
            raise RunError(
                f"{stage.name}: its inputs are not there: the store is not shared",
                where=f"{os.uname().nodename}:{root}",
                fix=_SHARED,
            )
        check_inputs(known, set())
        store.share(make(store, stage, key, known, SilentProgress()))
    except CompressorError as error:
        return {"what": error.what, "where": error.where, "fix": error.fix}
    return None
