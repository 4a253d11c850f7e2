"""The training loop: what a step is, when it stops, and going on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor.errors import RunError
from compressor.speculate import training
from compressor.speculate.training import (
    BEST,
    FACTS,
    STATE,
    SpeculatorOptions,
    steps_per_epoch,
    train,
)

SAMPLES = 10
INPUTS = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
WANTED = INPUTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
HELD_OUT = 2


class Fit:
    """A linear fit by `train`."""

    def __init__(self) -> None:
        self.parameters = {
            "weight": nn.Parameter(torch.zeros(1, 3)),
            "bias": nn.Parameter(torch.zeros(1)),
        }
        self.batches: list[list[int]] = []
        self.spoiled: set[int] = set()

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        made = INPUTS[list(rows)] @ self.parameters["weight"][0] + self.parameters["bias"]
        return (made - WANTED[list(rows)]).square().sum()

    def backward(self, rows: Sequence[int], weight: float) -> dict[str, float]:
        self.batches.append(list(rows))
        loss = self.loss(rows)
        if len(self.batches) in self.spoiled:
            loss = loss * math.inf
        (loss * weight).backward()
        return {"loss": float(loss.detach()), "samples": float(len(rows))}

    def evaluate(self) -> dict[str, float]:
        return {"score": -float(self.loss(range(SAMPLES)).detach())}

    def train(
        self, directory: Path, advance: Callable[[str], None] = lambda note: None, **options: Any
    ) -> dict[str, Any]:
        settings = {"epochs": 5, "batch_size": 3, "learning_rate": 0.05, "patience": 0, **options}
        return train(
            self.parameters,
            self.backward,
            self.evaluate,
            range(SAMPLES - HELD_OUT),
            SpeculatorOptions(**settings),
            directory,
            size=lambda row: 1.0,
            advance=advance,
        )

    def values(self) -> list[float]:
        return [*self.parameters["weight"].flatten().tolist(), *self.parameters["bias"].tolist()]


def test_it_fits_and_every_epoch_sees_every_sample_once(tmp_path: Path) -> None:
    fit = Fit()
    facts = fit.train(tmp_path, epochs=60)
    assert fit.values() == pytest.approx([1.0, -2.0, 0.5, 0.3], abs=0.05)
    assert len(facts["steps"]) == 180
    orders = [[row for batch in fit.batches[i : i + 3] for row in batch] for i in range(0, 180, 3)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) > 50
    assert [one["step"] for one in facts["evaluations"]] == [0, *range(3, 181, 3)]
    assert facts["steps"][-1]["loss"] < 0.01 * facts["steps"][0]["loss"]
    assert facts["steps"][2] == {"step": 3, "loss": facts["steps"][2]["loss"], "samples": 1.0}


def test_the_steps_are_those_of_plain_adamw(tmp_path: Path) -> None:
    fit, plain = Fit(), Fit()
    fit.train(tmp_path, epochs=4, batch_size=8, warm_up=0.5, weight_decay=0.1)
    optimizer = torch.optim.AdamW(
        [
            {"params": [plain.parameters["weight"]], "weight_decay": 0.1},
            {"params": [plain.parameters["bias"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    rates = [0.025, 0.05, 0.05, 0.025]  # two steps up, then a cosine over the other two
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        (plain.loss(range(8)) / 8).backward()
        torch.nn.utils.clip_grad_norm_(list(plain.parameters.values()), 1.0)
        optimizer.step()
    assert fit.values() == pytest.approx(plain.values(), rel=1e-5)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    one, other = Fit(), Fit()
    one.train(tmp_path / "one", batch_size=4)
    other.train(tmp_path / "other", batch_size=1, accumulate=4)
    assert one.values() == pytest.approx(other.values(), rel=1e-5)
    assert [len(batch) for batch in other.batches] == [1] * 40


def test_a_rate_of_its_own_by_name(tmp_path: Path) -> None:
    fit = Fit()
    train(
        fit.parameters,
        fit.backward,
        fit.evaluate,
        range(8),
        SpeculatorOptions(epochs=3),
        tmp_path,
        size=lambda row: 1.0,
        groups={"bias": 0.0},
    )
    assert fit.values()[3] == 0
    assert all(fit.values()[:3])


@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_evaluations_are_spread_evenly(tmp_path: Path, evaluations: int) -> None:
    facts = Fit().train(tmp_path, epochs=2, batch_size=2, evaluations=evaluations)
    each = 4 // evaluations
    assert [one["step"] for one in facts["evaluations"]] == list(range(0, 9, each))


def test_the_best_step_is_kept_and_training_stops(tmp_path: Path) -> None:
    fit = Fit()
    scores = iter([0.0, 1.0, 5.0, 4.0, 5.0, 3.0, 9.0])
    seen: list[list[float]] = []

    def evaluate() -> dict[str, float]:
        seen.append(fit.values())
        return {"score": next(scores)}

    fit.evaluate = evaluate  # type: ignore[method-assign]
    facts = fit.train(tmp_path, epochs=9, patience=3)
    assert facts["stopped_early"]
    assert facts["best_step"] == 6
    assert len(facts["steps"]) == 15
    assert fit.values() == seen[2] != seen[-1]


def test_no_gain_keeps_the_start(tmp_path: Path) -> None:
    fit = Fit()
    scores = iter([1.0, 0.5, 0.5])
    fit.evaluate = lambda: {"score": next(scores)}  # type: ignore[method-assign]
    facts = fit.train(tmp_path, epochs=2)
    assert facts["best_step"] == 0
    assert not facts["stopped_early"]
    assert fit.values() == [0, 0, 0, 0]


def test_steps_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    fit = Fit()
    fit.spoiled = {2, 3, 6}
    facts = fit.train(tmp_path, epochs=60)
    assert facts["skipped"] == [2, 3, 6]
    assert len(facts["steps"]) == 177
    assert fit.values() == pytest.approx([1.0, -2.0, 0.5, 0.3], abs=0.5)


def test_three_such_steps_in_a_row_are_an_error(tmp_path: Path) -> None:
    fit = Fit()
    fit.spoiled = {4, 5, 6}
    with pytest.raises(RunError, match="step 6: 3 steps in a row"):
        fit.train(tmp_path)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    fit = Fit()
    with pytest.raises(RunError, match="no sample to train on"):
        train(
            fit.parameters,
            fit.backward,
            fit.evaluate,
            [],
            SpeculatorOptions(),
            tmp_path,
            size=lambda row: 1.0,
        )


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first, second = Fit(), Fit()
    facts = first.train(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([BEST, FACTS])
    notes: list[str] = []
    assert second.train(tmp_path, notes.append) == facts
    assert notes == ["already done"] * 15
    assert second.values() == first.values()
    assert not second.batches


@pytest.mark.parametrize("step", [1, 3, 7, 14, 15])
def test_a_run_that_was_cut_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "_WRITING_SHARE", math.inf)
    undisturbed = Fit()
    facts = undisturbed.train(tmp_path / "whole", evaluations=2)
    seen: list[str] = []

    def cut(note: str) -> None:
        seen.append(note)
        if len(seen) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fit().train(tmp_path / "cut", cut, evaluations=2)
    assert (tmp_path / "cut" / STATE).exists()
    resumed = Fit()
    notes: list[str] = []
    again = resumed.train(tmp_path / "cut", notes.append, evaluations=2)
    assert notes.count("already done") == step
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}
    assert resumed.values() == undisturbed.values()
    assert (tmp_path / "cut" / BEST).read_bytes() == (tmp_path / "whole" / BEST).read_bytes()
    assert len(resumed.batches) == 15 - step


_SLOW = """
import sys, time
from pathlib import Path
from compressor.speculate import training
from tests.speculate.test_training import Fit
training.CHECKPOINT_SECONDS, training._WRITING_SHARE = 0.0, float("inf")
Fit().train(Path(sys.argv[1]), lambda note: time.sleep(0.05), epochs=8)
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SLOW, str(tmp_path / "killed")]
    process = subprocess.Popen(command)
    while not (tmp_path / "killed" / STATE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / FACTS).exists()
    subprocess.run(command, check=True)
    fit = Fit()
    fit.train(tmp_path / "whole", epochs=8)
    killed = load_file(tmp_path / "killed" / BEST)
    assert (tmp_path / "killed" / BEST).read_bytes() == (tmp_path / "whole" / BEST).read_bytes()
    assert killed["weight"].flatten().tolist() == fit.values()[:3]


_SHARED = """
import json, sys
from pathlib import Path
import torch
from tests.speculate.test_training import Fit
fit = Fit()
if int(sys.argv[2]):
    fit.parameters["bias"].data.fill_(7.0)  # what only the first process has must count
facts = fit.train(Path(sys.argv[1]), patience=2)
Path(sys.argv[1], f"{sys.argv[2]}.json").write_text(
    json.dumps([fit.values(), facts["steps"], fit.batches])
)
"""


def test_processes_share_the_samples_and_agree(tmp_path: Path) -> None:
    alone = Fit()
    facts = alone.train(tmp_path / "alone", patience=2)
    (tmp_path / "shared").mkdir()
    running = []
    for rank in range(2):
        variables = {
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29431",
        }
        command = [sys.executable, "-c", _SHARED, str(tmp_path / "shared"), str(rank)]
        running.append(subprocess.Popen(command, env={**os.environ, **variables}))
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    found = [json.loads((tmp_path / "shared" / f"{rank}.json").read_text()) for rank in range(2)]
    for values, steps, _ in found:
        assert values == pytest.approx(alone.values(), rel=1e-4)
        assert [s["loss"] for s in steps] == pytest.approx(
            [s["loss"] for s in facts["steps"]], rel=1e-4
        )
    assert found[0][0] == found[1][0]
    for mine, yours, both in zip(found[0][2], found[1][2], alone.batches, strict=False):
        assert sorted(mine + yours) == sorted(both)


def test_steps_of_an_epoch() -> None:
    assert steps_per_epoch(10, SpeculatorOptions(batch_size=3, accumulate=2)) == 2
    assert steps_per_epoch(12, SpeculatorOptions(batch_size=3, accumulate=2)) == 2
    assert steps_per_epoch(13, SpeculatorOptions(batch_size=3, accumulate=2)) == 3
