"""Training of EAGLE-3 heads: what is compared with what, and figures that decoding bears out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressor.errors import RunError
from compressor.speculate.cached import CachedModel
from compressor.speculate.chains import chain_figures
from compressor.speculate.decoding import speculative_decode
from compressor.speculate.eagle3 import Eagle3
from compressor.speculate.eagle3_proposer import Eagle3Proposer
from compressor.speculate.eagle3_training import (
    Batch,
    Eagle3Options,
    held_out_accuracy,
    make_head,
    train_eagle3,
)
from compressor.speculate.training import BEST
from tests.speculate.samples import Sample, make
from tests.speculate.test_eagle3 import chain


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make(tmp_path_factory.mktemp("sample"))


def options(**changes: Any) -> Eagle3Options:
    settings = {"depth": 3, "epochs": 3, "batch_size": 6, "learning_rate": 3e-3, "patience": 0}
    return Eagle3Options(**{**settings, **changes})


def head_for(sample: Sample, settings: Eagle3Options) -> Eagle3:
    embeddings = sample.target.get_input_embeddings().weight
    return make_head(sample.target.config, embeddings, sample.output, sample.corpus, settings)


def trained(sample: Sample, directory: Path, **changes: Any) -> tuple[Eagle3, dict[str, Any]]:
    settings = options(**changes)
    head = head_for(sample, settings)
    facts = train_eagle3(head, sample.output, sample.corpus, sample.features, settings, directory)
    return head, facts


@pytest.fixture(scope="module")
def learned(
    sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Eagle3, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("learned")
    return trained(sample, directory, epochs=30, draft_vocabulary=120)


def test_every_step_is_compared_with_the_target_at_the_place_it_speaks_of(sample: Sample) -> None:
    """The loss, from one chain after the other and whole logits."""
    settings = options(depth=3, decay=0.5, draft_vocabulary=150)
    head = head_for(sample, settings)
    rows, total, sums = [0, 3, 7], 0.0, [0.0] * 3
    shares = [0.5**k / 1.75 for k in range(3)]
    for row in rows:
        tokens = torch.from_numpy(sample.corpus.row(row).astype("int64"))
        aux = sample.features.aux(row).float()
        start = int(sample.corpus.starts[row])
        with torch.no_grad():
            p = torch.softmax(sample.output(sample.features.hidden(row)), -1)[:, head.token_map]
            p = p / p.sum(-1, keepdim=True)
            for begin in range(start - 1, len(tokens) - 2):
                count = min(3, len(tokens) - 2 - begin)
                states = chain(head, tokens, aux, begin, count)
                q = functional.log_softmax(head.logits(states), -1)
                for k in range(count):
                    wanted = p[begin + 1 + k]
                    loss = float((torch.special.xlogy(wanted, wanted) - wanted * q[k]).sum())
                    sums[k] += loss
                    total += loss * shares[k]
    seen: dict[str, float] = {}

    def once(parameters: Any, backward: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        seen.update(backward(rows, 0.25))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.speculate.eagle3_training.train", once)
        train_eagle3(head, sample.output, sample.corpus, sample.features, settings, Path("unused"))
    assert seen["loss"] == pytest.approx(total, rel=1e-4)
    gradient = {name: p.grad for name, p in head.trained().items()}
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradient.values())
    assert head.embed_tokens.weight.grad is None


def test_states_do_not_depend_on_the_batch(sample: Sample) -> None:
    head = head_for(sample, options())
    rows = [1, 8, 2]
    whole = Batch(sample.corpus, rows, sample.features, torch.device("cpu"))
    single = [Batch(sample.corpus, [row], sample.features, torch.device("cpu")) for row in rows]
    with torch.no_grad():
        together = [(states[known], known) for states, known in whole.steps(head, 3)]
        alone = [list(batch.steps(head, 3)) for batch in single]
    for k, (states, known) in enumerate(together):
        expected = torch.cat([steps[k][0][steps[k][1]] for steps in alone])
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-5)
        assert known.sum() == len(expected)


def test_training_brings_the_head_nearer_to_the_target(
    learned: tuple[Eagle3, dict[str, Any]],
) -> None:
    _, facts = learned
    scores = [one["score"] for one in facts["evaluations"]]
    assert facts["steps"][-1]["loss"] < 0.7 * facts["steps"][0]["loss"]
    assert max(scores) > scores[0] + 0.2
    best = max(facts["evaluations"], key=lambda one: one["score"])
    assert best["top"][0][4] > best["top"][0][0] > 0
    assert facts["steps"][-1]["right_1"] > facts["steps"][0]["right_1"]


def test_decoding_comes_to_what_was_measured_on_the_text(
    sample: Sample, learned: tuple[Eagle3, dict[str, Any]]
) -> None:
    """A lossless greedy decoder visits the positions that the figure was made of."""
    head, depth = learned[0].eval(), 3
    corpus = sample.corpus
    rows = corpus.rows("held_out")
    prompts = [corpus.row(row)[: corpus.starts[row]].tolist() for row in rows]
    decoded = speculative_decode(
        CachedModel(sample.target), Eagle3Proposer(head), prompts, output_length=20, depth=depth
    )
    for row, one in zip(rows, decoded, strict=True):
        assert one.tokens == corpus.row(row)[corpus.starts[row] :].tolist()
    figures = held_out_accuracy(head, corpus, sample.features, depth)
    accepted = [n for one in decoded for n in one.accepted]
    assert sum(accepted) > 0
    # Steps are the same but at the end, where decoding drafts beyond the text's end.
    steps = sum(int(corpus.lengths[row] - corpus.starts[row]) for row in rows)
    assert len(accepted) == pytest.approx(steps / figures["tokens_per_step"], abs=len(rows))


def test_trees_of_a_trained_head_gain_on_chains_and_lose_nothing(
    sample: Sample, learned: tuple[Eagle3, dict[str, Any]]
) -> None:
    head = learned[0].eval()
    corpus = sample.corpus
    rows = list(corpus.rows("held_out"))
    prompts = [corpus.row(row)[: corpus.starts[row]].tolist() for row in rows]
    steps = []
    for proposer in (Eagle3Proposer(head), Eagle3Proposer(head, branches=4, nodes=24)):
        decoded = speculative_decode(
            CachedModel(sample.target), proposer, prompts, output_length=20, depth=3, batch_size=4
        )
        for row, one in zip(rows, decoded, strict=True):
            assert one.tokens == corpus.row(row)[corpus.starts[row] :].tolist()
        steps.append(sum(one.steps for one in decoded))
    assert steps[1] < steps[0]


@pytest.mark.parametrize("loss", ["cross_entropy", "total_variation", "lk"])
def test_other_losses_are_trained_as_well(sample: Sample, tmp_path: Path, loss: str) -> None:
    _, facts = trained(sample, tmp_path, loss=loss, epochs=6)
    assert facts["steps"][-1]["loss"] < facts["steps"][0]["loss"]


def test_products_in_bfloat16_train_too(sample: Sample, tmp_path: Path) -> None:
    head, facts = trained(sample, tmp_path, dtype="bfloat16", epochs=6)
    assert facts["steps"][-1]["loss"] < facts["steps"][0]["loss"]
    assert all(p.dtype == torch.float32 for p in head.parameters())


def test_training_cut_short_goes_on_to_the_same_weights(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.speculate.training.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("compressor.speculate.training._WRITING_SHARE", 1e9)
    trained(sample, tmp_path / "whole")
    settings = options()
    notes: list[str] = []

    def cut(note: str) -> None:
        notes.append(note)
        if len(notes) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_eagle3(
            head_for(sample, settings),
            sample.output,
            sample.corpus,
            sample.features,
            settings,
            tmp_path / "cut",
            advance=cut,
        )
    again: list[str] = []
    train_eagle3(
        head_for(sample, settings),
        sample.output,
        sample.corpus,
        sample.features,
        settings,
        tmp_path / "cut",
        advance=again.append,
    )
    assert again.count("already done") == 5
    assert (tmp_path / "whole" / BEST).read_bytes() == (tmp_path / "cut" / BEST).read_bytes()


def test_features_of_other_layers_are_refused(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="after blocks 1, 2, 3, the head reads those after 0, 2"):
        trained(sample, tmp_path, aux_layers=(0, 2))


def test_chain_figures_of_known_texts() -> None:
    right = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    figures = chain_figures([right, torch.zeros(1, 2, dtype=torch.bool)])
    # Runs are 2, 0, 1, 0, 0; decoding visits positions 0, 3, 4 of the first text.
    assert figures["expected_length"] == pytest.approx(1 + 3 / 6)
    assert figures["per_position"] == pytest.approx([2 / 6, 1 / 6])
    assert figures["tokens_per_step"] == pytest.approx(6 / 4)
