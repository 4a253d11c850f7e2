"""A draft model's chains against its own decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.speculate.cached import CachedModel
from compressor.speculate.candidates import Candidates
from compressor.speculate.decoding import speculative_decode
from compressor.speculate.draft_proposer import DraftProposer
from compressor.speculate.proposer import States
from compressor.speculate.verification import Sampling, draw
from tests.speculate.decoders import load, prompts, target


class Recording(DraftProposer):
    """Notes what each sequence was given and what was proposed."""

    def __init__(self, draft: CachedModel) -> None:
        super().__init__(draft)
        self.notes: list[tuple[list[int], Candidates]] = []

    def propose(self, last: Any, depth: int) -> list[Candidates]:
        texts = [[*text, token] for text, token in zip(self._texts, last, strict=True)]
        found = super().propose(last, depth)
        self.notes += zip(texts, found, strict=True)
        return found


def test_every_chain_is_the_drafts_greedy_output_after_the_text(tmp_path: Path) -> None:
    cached, model = target(tmp_path / "target"), load(tmp_path / "draft", "gemma3", seed=1)
    # Near enough for some of each chain to be accepted: the target's own first block.
    near = load(tmp_path / "near")
    near.base_model.layers = near.base_model.layers[:1]
    near.config.num_hidden_layers = 1
    for draft in (model, near):
        proposer = Recording(CachedModel(draft))
        speculative_decode(cached, proposer, prompts(5), output_length=14, depth=3)
        assert len(proposer.notes) > 20
        for text, candidates in proposer.notes:
            assert candidates.probabilities is None
            expected = draft.generate(
                torch.tensor([text]), max_new_tokens=3, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )[0, len(text) :]  # fmt: skip
            assert torch.equal(candidates.tokens, expected)


def test_drawn_chains_come_from_the_distribution_they_name(tmp_path: Path) -> None:
    cached, draft = target(tmp_path / "target"), target(tmp_path / "draft", layers=1, seed=1)
    proposer = Recording(draft)
    speculative_decode(
        cached, proposer, prompts(4), output_length=8, depth=3, sampling=Sampling("rejection", 2.0)
    )
    for text, candidates in proposer.notes:
        whole = [*text, *candidates.tokens.tolist()]
        with torch.no_grad():
            logits = draft.model(torch.tensor([whole])).logits[0]
        q = torch.softmax(logits / 2.0, -1)[len(text) - 1 : -1]
        assert candidates.probabilities is not None
        torch.testing.assert_close(candidates.probabilities, q, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["greedy", "rejection"])
def test_a_draft_that_is_the_target_has_all_accepted(tmp_path: Path, kind: str) -> None:
    cached, draft = target(tmp_path / "target"), target(tmp_path / "draft")
    found = speculative_decode(
        cached, DraftProposer(draft), prompts(4), output_length=16, depth=4,
        sampling=Sampling(kind, 1.5),
    )  # fmt: skip
    for each in found:
        assert each.accepted == [4, 4, 4]
        assert each.drafted == [4, 4, 4]


@pytest.mark.parametrize("size", [380, 390])
def test_vocabularies_may_differ_in_their_padding(tmp_path: Path, size: int) -> None:
    cached = target(tmp_path / "target")
    draft = target(tmp_path / "draft", vocab_size=size, seed=1)
    proposer = DraftProposer(draft, cached.vocabulary)
    settings = {"output_length": 10, "sampling": Sampling("rejection", 2.0)}
    found = speculative_decode(cached, proposer, prompts(3), **settings)
    assert all(len(each.tokens) == 10 for each in found)
    start = [States(torch.tensor([5, 6]), torch.zeros(2, 64))]
    proposer.start(start, temperature=1.0, generators=[torch.Generator().manual_seed(0)])
    made = proposer.propose([7], 3)[0]
    assert made.probabilities is not None
    assert made.probabilities.shape == (3, 384)
    torch.testing.assert_close(made.probabilities.sum(-1), torch.ones(3))
    again = torch.Generator().manual_seed(0)
    drawn = [draw(row[: min(size, 384)], again) for row in made.probabilities]
    assert made.tokens.tolist() == drawn


def test_nothing_is_proposed_beyond_the_drafts_positions(tmp_path: Path) -> None:
    cached = target(tmp_path / "target")
    draft = target(tmp_path / "draft", "opt", max_position_embeddings=32, seed=1)
    texts = [[9] * 20, [8, 7], [6] * 40]
    alone = speculative_decode(cached, None, texts, output_length=24)
    found = speculative_decode(cached, DraftProposer(draft), texts, output_length=24, depth=5)
    assert [each.tokens for each in found] == [each.tokens for each in alone]
    assert found[0].drafted[0] == 5
    assert found[0].drafted[-1] == 0
    assert found[1].drafted[-1] == 5  # whatever is batched with it
    assert set(found[2].drafted) == {0}
