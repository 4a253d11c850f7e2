"""The training loop that every speculator shares: AdamW, a cosine, exact resume, early stop.

Loshchilov, Hutter: "Decoupled Weight Decay Regularization", arXiv 1711.05101. A run that is killed
goes on from its last checkpoint and ends with the bytes of an undisturbed one (on as many threads:
the order of sums depends on that).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from compressor.errors import RunError
from compressor.models.checkpoint import drop_unfinished, save_whole
from compressor.speculate.options import SpeculatorOptions
from compressor.speculate.processes import processes

STATE = "training.safetensors"  # while it goes on
BEST = "best.safetensors"
FACTS = "training.json"  # once it is over
CHECKPOINT_SECONDS = 20.0

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_NON_FINITE = 3  # such steps in a row mean that something is wrong
_WRITING_SHARE = 0.05  # of the time that checkpoints may take, where the disk is slow


def steps_per_epoch(rows: int, options: SpeculatorOptions) -> int:
    """Optimizer steps of an epoch over so many samples."""
    return math.ceil(rows / (options.batch_size * options.accumulate))


def train(
    parameters: Mapping[str, nn.Parameter],
    backward: Callable[[Sequence[int], float], dict[str, float]],
    evaluate: Callable[[], dict[str, Any]],
    rows: Sequence[int],
    options: SpeculatorOptions,
    directory: Path,
    *,
    size: Callable[[int], float],
    advance: Callable[[str], None] = lambda note: None,
    groups: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Train parameters in place; resume what a killed call left in the directory.

    Under ``accelerate launch`` (or torchrun) the samples of each step are shared out among the
    processes and gradients are summed, so that the steps are the same on any number of processes
    but for rounding; the first process evaluates and writes.

    Args:
        parameters: float32 masters, by name.
        backward: given the samples of a micro-batch and a weight, adds weight x the gradient of
            the loss summed over what is predicted, and returns sums to log, ``loss`` among them
            (not weighted, one float each, the same keys every time).
        evaluate: figures on the samples held out; ``score`` among them, higher is better.
        rows: the samples to train on.
        options: see `SpeculatorOptions`.
        directory: for checkpoints; `BEST` (the best values by name) and `FACTS` stay there, and a
            finished call with the same directory only reads them.
        size: how much a sample counts: tokens that it predicts. A step's weight is one over the sum
            of its samples'.
        advance: called with a note after each step, also those that were done before.
        groups: factor on the learning rate by name; 1 where a name is missing.

    Returns:
        ``steps`` (of each: ``step``, and what ``backward`` returned over the step's size),
        ``evaluations`` (of each: ``step`` and what ``evaluate`` returned; the first before any
        step), ``best_step``, ``seconds``, ``skipped`` steps (the gradient was not finite),
        ``stopped_early``. The parameters hold the best step's values.

    Raises:
        RunError: there is nothing to train on, or three steps in a row were not finite.
    """
    if not rows:
        raise RunError(
            "there is no sample to train on",
            where="speculator",
            fix="give more prompts, or hold out fewer",
        )
    return _Run(parameters, options, directory, groups or {}).go(
        backward, evaluate, rows, size, advance
    )


class _Run:
    """Training under way.

    Attributes:
        facts: what `train` returns, as far as it is known.
        updates: how often the parameters were changed.
        keys: of the sums that are logged.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: SpeculatorOptions,
        directory: Path,
        groups: Mapping[str, float],
    ) -> None:
        self.parameters = parameters
        self.options = options
        self.directory = directory
        self.device = next(iter(parameters.values())).device
        self.processes = processes(self.device)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "factor": groups.get(name, 1.0),
                    "weight_decay": options.weight_decay if parameter.ndim > 1 else 0.0,
                }
                for name, parameter in parameters.items()
            ],
            lr=options.learning_rate,
            betas=_BETAS,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.facts: dict[str, Any] = {
            "steps": [],
            "evaluations": [],
            "best_step": 0,
            "seconds": 0.0,
            "skipped": [],
            "stopped_early": False,
        }
        self.updates = 0
        self.keys: list[str] | None = None
        self._since = self._saved = time.monotonic()
        self._interval = CHECKPOINT_SECONDS

    def go(
        self,
        backward: Callable[[Sequence[int], float], dict[str, float]],
        evaluate: Callable[[], dict[str, Any]],
        rows: Sequence[int],
        size: Callable[[int], float],
        advance: Callable[[str], None],
    ) -> dict[str, Any]:
        """See `train`."""
        per_epoch = steps_per_epoch(len(rows), self.options)
        total = per_epoch * self.options.epochs
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / FACTS).exists():
            self.facts = json.loads((self.directory / FACTS).read_text(encoding="utf-8"))
            self._load_best()
            for _ in range(self._done()):
                advance("already done")
            return self.facts
        self._restore()
        self.processes.agree(self.parameters)
        for _ in range(self._done()):
            advance("already done")
        if not self.facts["evaluations"]:
            self._evaluate(0, evaluate)
        while self._done() < total and not self.facts["stopped_early"]:
            step = self._done()
            chosen = _rows_of(rows, step, per_epoch, self.options)
            note = self._step(step, total, chosen, backward, sum(map(size, chosen)))
            if _is_due(step % per_epoch, per_epoch, self.options.evaluations):
                self._evaluate(step + 1, evaluate)
                self.facts["stopped_early"] = self._should_stop() and self._done() < total
            self._save()
            advance(note)
        self._finish()
        return self.facts

    def _done(self) -> int:
        return len(self.facts["steps"]) + len(self.facts["skipped"])

    def _step(
        self,
        step: int,
        total: int,
        rows: Sequence[int],
        backward: Callable[[Sequence[int], float], dict[str, float]],
        size: float,
    ) -> str:
        """One step of the optimizer; returns a note on it."""
        mine = self.processes.share(rows)
        sums: dict[str, float] = {}
        for start in range(0, len(mine), self.options.batch_size):
            with self._autocast():
                found = backward(mine[start : start + self.options.batch_size], 1.0 / size)
            sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
        self.keys = self.keys or self.processes.first(sorted(sums))
        values = self.processes.add([sums.get(key, 0.0) for key in self.keys])
        means = {key: value / size for key, value in zip(self.keys, values, strict=True)}
        for parameter in self.parameters.values():
            if parameter.grad is None:  # an expert that no token went through
                parameter.grad = torch.zeros_like(parameter)
        self.processes.add_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)
        if math.isfinite(means["loss"]) and math.isfinite(float(norm)):
            rate = self.options.learning_rate * _schedule(step, total, self.options.warm_up)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            self.optimizer.step()
            self.updates += 1
            self.facts["steps"].append({"step": step + 1, **means})
            note = f"loss {means['loss']:.4f}"
        else:
            self.facts["skipped"].append(step + 1)
            note = "step skipped: not finite"
        self.optimizer.zero_grad()
        if self.facts["skipped"][-_NON_FINITE:] == list(range(step + 2 - _NON_FINITE, step + 2)):
            raise RunError(
                f"{_NON_FINITE} steps in a row had a loss or gradient that is not finite",
                where=f"speculator training, step {step + 1}",
                fix="lower learning_rate, or set dtype: float32",
            )
        return note

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"
        )

    def _evaluate(self, step: int, evaluate: Callable[[], dict[str, Any]]) -> None:
        figures: dict[str, Any] = {}
        if self.processes.rank == 0:
            with torch.no_grad(), self._autocast():
                figures = evaluate()
        figures = self.processes.first(figures)
        scores = [one["score"] for one in self.facts["evaluations"]]
        self.facts["evaluations"].append({"step": step, **figures})
        if not scores or figures["score"] > max(scores):
            self.facts["best_step"] = step
            if self.processes.rank == 0:
                save_whole(_on_cpu(self.parameters), self.directory / BEST)

    def _should_stop(self) -> bool:
        """Whether the last so many evaluations brought nothing; training itself is one chance."""
        evaluations = self.facts["evaluations"]
        best = next(
            i for i, one in enumerate(evaluations) if one["step"] == self.facts["best_step"]
        )
        patience = self.options.patience
        return bool(patience) and len(evaluations) - 1 - best >= patience

    def _save(self) -> None:
        """Write a checkpoint, where the last one is old enough."""
        now = time.monotonic()
        if now - self._saved < self._interval or self.processes.rank:
            return
        tensors = {f"{name}:value": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter)
            if moments:
                tensors[f"{name}:mean"] = moments["exp_avg"]
                tensors[f"{name}:square"] = moments["exp_avg_sq"]
        facts = {**self.facts, "seconds": self._seconds()}
        metadata = {"facts": json.dumps(facts), "updates": str(self.updates)}
        save_whole(_on_cpu(tensors), self.directory / STATE, metadata)
        self._saved = time.monotonic()
        self._interval = max(CHECKPOINT_SECONDS, (self._saved - now) / _WRITING_SHARE)

    def _restore(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        path = self.directory / STATE
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.facts = json.loads(metadata["facts"])
            self.updates = int(metadata["updates"])
            for name, parameter in self.parameters.items():
                parameter.data.copy_(file.get_tensor(f"{name}:value"))
                if self.updates:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.updates), device=self.device),
                        "exp_avg": file.get_tensor(f"{name}:mean").to(self.device),
                        "exp_avg_sq": file.get_tensor(f"{name}:square").to(self.device),
                    }

    def _finish(self) -> None:
        """Take the best step's values, and leave what a second call reads."""
        self.processes.wait()
        if self.facts["best_step"] != self._done():
            self._load_best()
        self.facts["seconds"] = self._seconds()
        if self.processes.rank == 0:
            temporary = self.directory / f"{FACTS}.tmp"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(self.facts) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.directory / FACTS)
            (self.directory / STATE).unlink(missing_ok=True)
            drop_unfinished(self.directory)
        self.processes.wait()

    def _load_best(self) -> None:
        with safe_open(self.directory / BEST, "pt") as file, torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(name))

    def _seconds(self) -> float:
        """Of training so far, in all calls."""
        now = time.monotonic()
        self.facts["seconds"] += now - self._since
        self._since = now
        return self.facts["seconds"]


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _rows_of(
    rows: Sequence[int], step: int, per_epoch: int, options: SpeculatorOptions
) -> list[int]:
    """Samples of a step: every one once an epoch, in an order of the epoch's own."""
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    size = options.batch_size * options.accumulate
    return [rows[index] for index in order[place * size : (place + 1) * size]]


def _is_due(place: int, per_epoch: int, evaluations: int) -> bool:
    """Whether one of so many evaluations an epoch, evenly spread, follows its step ``place``."""
    return (place + 1) * evaluations // per_epoch > place * evaluations // per_epoch


def _schedule(step: int, total: int, warm_up: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine that ends near zero."""
    rising = math.ceil(warm_up * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))
