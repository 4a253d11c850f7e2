"""Medusa-2: the target is trained with its heads, and stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.head import split
from compressor.speculate import training
from compressor.speculate.medusa import MedusaHeads, train_medusa
from compressor.speculate.medusa_joint import train_jointly
from compressor.speculate.options import JointOptions, MedusaOptions
from tests.speculate.test_medusa import make, options, quantized


def joint(loss: Any = "cross_entropy", **changes: Any) -> MedusaOptions:
    settings = {"epochs": 4, "learning_rate": 2e-3, "patience": 0, **changes}
    return MedusaOptions(heads=3, loss=loss, joint=JointOptions(**settings))


def started(directory: Path, arch: str = "llama") -> tuple[Any, Any, Any, MedusaHeads]:
    model, corpus, features = make(arch, directory)
    heads, _ = train_medusa(split(model), corpus, features, options(), directory / "first")
    return model, corpus, features, heads


@pytest.mark.parametrize(("arch", "loss"), [("llama", "cross_entropy"), ("gemma2", "kl")])
def test_both_are_trained_and_the_target_hardly_moves(tmp_path: Path, arch: str, loss: str) -> None:
    model, corpus, features, heads = started(tmp_path, arch)
    original = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    first = {name: value.clone() for name, value in heads.state_dict().items()}
    changed, facts = train_jointly(
        model, heads, corpus, features, joint(loss=loss), tmp_path / "second"
    )
    start, best = facts["evaluations"][0], facts["evaluations"][-1]
    assert start["backbone_kl"] < 0.01  # the stored states are rounded to bfloat16
    assert [step["heads"] for step in facts["steps"]][-1] < facts["steps"][0]["heads"]
    assert any(not torch.equal(first[n], v) for n, v in heads.state_dict().items())
    untrained = dict(original.named_parameters())
    assert changed.keys() == untrained.keys()
    assert all(not torch.equal(changed[name], untrained[name]) for name in changed)
    assert all(torch.equal(changed[n], p) for n, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    row = corpus.rows("held_out")[0]
    ids = torch.from_numpy(corpus.row(row)).long().unsqueeze(0)
    answer = slice(int(corpus.starts[row]) - 1, ids.shape[1] - 1)
    with torch.no_grad():
        p, q = (functional.log_softmax(m(ids).logits[0, answer], -1) for m in (original, model))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.5
    assert best["backbone_kl"] < 0.5


def test_the_divergence_reported_is_that_of_the_models_own_logits(tmp_path: Path) -> None:
    model, corpus, features, heads = started(tmp_path)
    original = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    settings = joint(epochs=1, learning_rate=0.02)
    _, facts = train_jointly(model, heads, corpus, features, settings, tmp_path / "second")
    at_best = next(e for e in facts["evaluations"] if e["step"] == facts["best_step"])
    total, count = 0.0, 0
    for row in corpus.rows("held_out"):
        ids = torch.from_numpy(corpus.row(row)).long().unsqueeze(0)
        answer = slice(int(corpus.starts[row]) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            p, q = (functional.log_softmax(m(ids).logits[0, answer], -1) for m in (original, model))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert at_best["backbone_kl"] == pytest.approx(total / count, rel=0.05, abs=5e-3)


def test_the_targets_rate_is_a_share_of_the_heads(tmp_path: Path) -> None:
    model, corpus, features, heads = started(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = joint(epochs=1, backbone_rate=1e-12)
    changed, _ = train_jointly(model, heads, corpus, features, settings, tmp_path / "second")
    assert all(torch.equal(changed[name], before[name]) for name in before)


def test_training_cut_short_goes_on_to_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "_WRITING_SHARE", float("inf"))

    def run(name: str, **arguments: Any) -> dict[str, torch.Tensor]:
        model, corpus, features, heads = started(tmp_path)
        directory = tmp_path / name
        changed, _ = train_jointly(
            model, heads, corpus, features, joint(epochs=1), directory, **arguments
        )
        return {**changed, **heads.state_dict()}

    notes: list[str] = []

    def cut(note: str) -> None:
        notes.append(note)
        if len(notes) == 3:
            raise KeyboardInterrupt

    undisturbed = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", advance=cut)
    resumed = run("cut")
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


def test_a_target_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    _, corpus, features, heads = started(tmp_path)
    whole = CausalLM.open(tmp_path / "model")
    for model in (quantized(tmp_path / "model"), whole.load_full(torch.bfloat16)):
        with pytest.raises(RunError, match="must be in float32, none quantized"):
            train_jointly(model, heads, corpus, features, joint(), tmp_path / "second")
