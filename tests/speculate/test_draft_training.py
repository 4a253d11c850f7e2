"""Distillation of drafts: the loss, what is stored, and figures that decoding bears out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import SINGLE
from compressor.speculate.cached import CachedModel
from compressor.speculate.decoding import speculative_decode
from compressor.speculate.draft import choose_blocks, write_draft
from compressor.speculate.draft_proposer import DraftProposer
from compressor.speculate.draft_training import (
    DraftOptions,
    distil_draft,
    held_out_accuracy,
    train_draft,
)
from tests.speculate.samples import Sample, load, make


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make(tmp_path_factory.mktemp("sample"))


def distil(sample: Sample, directory: Path, **more: Any) -> dict[str, Any]:
    settings = {"epochs": 4, "batch_size": 6, "learning_rate": 3e-3, "patience": 0}
    advance = more.pop("advance", lambda note: None)
    return distil_draft(
        sample.directory,
        [0, 3],
        sample.output,
        sample.corpus,
        sample.features,
        DraftOptions(**{**settings, **more}),
        directory / "draft",
        directory / "work",
        advance=advance,
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_loss_is_the_divergence_over_the_answer(tmp_path: Path, arch: str) -> None:
    sample = make(tmp_path, arch, prompts=8, held_out=2, output_length=8)
    write_draft(sample.directory, [0, 2], tmp_path / "draft")
    draft = CausalLM.open(tmp_path / "draft").load_full(torch.float32)
    rows, expected = [0, 4, 5], 0.0
    for row in rows:
        ids = torch.from_numpy(sample.corpus.row(row).astype("int64"))[None]
        at = slice(int(sample.corpus.starts[row]), -1)
        with torch.no_grad():
            # What the target is compared by was stored in bfloat16.
            p = functional.log_softmax(sample.output(sample.features.hidden(row)[at]).double(), -1)
            q = functional.log_softmax(draft(ids, use_cache=False).logits[0, at].double(), -1)
        expected += float((p.exp() * (p - q)).sum())
    seen: dict[str, float] = {}

    def once(parameters: Any, backward: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        seen.update(backward(rows, 0.5))
        assert all(p.grad is not None for p in parameters.values())
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.speculate.draft_training.train", once)
        train_draft(draft, sample.output, sample.corpus, sample.features, DraftOptions(), tmp_path)
    assert seen["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_distilled_draft_says_more_of_what_the_target_says(
    sample: Sample, tmp_path: Path
) -> None:
    facts = distil(sample, tmp_path, epochs=25)
    scores = [one["score"] for one in facts["evaluations"]]
    assert facts["steps"][-1]["loss"] < 0.7 * facts["steps"][0]["loss"]
    assert max(scores) > scores[0] + 0.1
    draft, depth = load(tmp_path / "draft"), 4
    figures = held_out_accuracy(draft, sample.corpus, depth)
    assert figures["score"] == pytest.approx(max(scores), rel=1e-3)
    rows = sample.corpus.rows("held_out")
    texts = [sample.corpus.row(row).tolist() for row in rows]
    starts = [int(sample.corpus.starts[row]) for row in rows]
    decoded = speculative_decode(
        CachedModel(sample.target),
        DraftProposer(CachedModel(draft)),
        [text[:start] for text, start in zip(texts, starts, strict=True)],
        output_length=20,
        depth=depth,
    )
    for text, start, one in zip(texts, starts, decoded, strict=True):
        assert one.tokens == text[start:]
    steps = sum(len(text) - start for text, start in zip(texts, starts, strict=True))
    assert sum(one.steps for one in decoded) == pytest.approx(
        steps / figures["tokens_per_step"], abs=len(rows)
    )


def test_distillation_cut_short_goes_on_to_the_same_bytes(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.speculate.training.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("compressor.speculate.training._WRITING_SHARE", 1e9)
    distil(sample, tmp_path / "whole")
    notes: list[str] = []

    def cut(note: str) -> None:
        notes.append(note)
        if len(notes) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(sample, tmp_path / "cut", advance=cut)
    again: list[str] = []
    distil(sample, tmp_path / "cut", advance=again.append)
    assert again.count("already done") == 5
    whole, cut_short = (tmp_path / name / "draft" / SINGLE for name in ("whole", "cut"))
    assert whole.read_bytes() == cut_short.read_bytes()
    untrained = tmp_path / "whole" / "work" / SINGLE
    assert untrained.read_bytes() != whole.read_bytes()


def test_other_losses_are_trained_as_well(sample: Sample, tmp_path: Path) -> None:
    for loss in ("cross_entropy", "total_variation", "lk"):
        facts = distil(sample, tmp_path / loss, loss=loss)
        assert facts["steps"][-1]["loss"] < facts["steps"][0]["loss"]


def test_blocks_are_chosen_and_distilled_in_one_go(sample: Sample, tmp_path: Path) -> None:
    kept, _ = choose_blocks(sample.target, sample.corpus, 3)
    assert len(kept) == 3
    write_draft(sample.directory, kept, tmp_path / "draft")
    draft = load(tmp_path / "draft")
    figures = held_out_accuracy(draft, sample.corpus, 2)
    assert len(figures["per_position"]) == 2
    assert figures["per_position"][0] >= figures["per_position"][1]
    assert (
        figures["top"][4]
        >= figures["top"][0]
        == pytest.approx(right_share(draft, sample), abs=1e-6)
    )


def right_share(draft: Any, sample: Sample) -> float:
    """How often the draft's likeliest token is the text's, from its own logits."""
    right = []
    for row in sample.corpus.rows("held_out"):
        ids = torch.from_numpy(sample.corpus.row(row).astype("int64"))
        with torch.no_grad():
            best = draft(ids[None], use_cache=False).logits[0].argmax(-1)
        start = int(sample.corpus.starts[row])
        right.append((best[start:-1] == ids[start + 1 :]).double())
    return float(torch.cat(right).mean())


def test_an_output_layer_with_a_bias_is_refused(sample: Sample, tmp_path: Path) -> None:
    model = CausalLM.open(sample.directory).load_full(torch.float32)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(RunError, match="bias"):
        train_draft(model, sample.output, sample.corpus, sample.features, DraftOptions(), tmp_path)
