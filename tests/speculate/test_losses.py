"""Losses made a few tokens at a time: the same as over whole logits, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from compressor.speculate import losses
from compressor.speculate.losses import (
    KINDS,
    Target,
    draft_places,
    output_losses,
    ranks,
    top_k_accuracy,
)

WIDTH, VOCABULARY, PLACES = 6, 17, 11
TOKEN_MAP = torch.tensor([0, 2, 3, 7, 8, 11, 16])


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGET_HEAD = random(VOCABULARY, WIDTH, seed=1)


def target(token_map: torch.Tensor | None) -> Target:
    tokens = torch.randint(VOCABULARY, (PLACES,), generator=torch.Generator().manual_seed(2))
    return Target(
        tokens, random(PLACES, WIDTH, seed=3), lambda hidden: hidden @ TARGET_HEAD.T, token_map
    )


def plain(
    kind: str, logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The loss of each token as its definition reads; ``wanted`` are probabilities."""
    q = torch.softmax(logits, -1)
    if kind == "cross_entropy":
        known = labels >= 0
        return torch.where(known, -q.log().gather(-1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
    if kind == "kl":
        p = wanted / wanted.sum(-1, keepdim=True)
        return (p * (p.log() - q.log())).sum(-1)
    accepted = torch.minimum(wanted, q).sum(-1)
    return 1 - accepted if kind == "total_variation" else -accepted.log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, 2.0)])
def test_losses_and_gradients_are_those_of_whole_logits(
    kind: str, reduced: bool, shared: bool, scale: float, softcap: float | None
) -> None:
    token_map = TOKEN_MAP if reduced else None
    goal = target(token_map)
    draft = len(TOKEN_MAP) if reduced else VOCABULARY
    states = [random(PLACES, WIDTH, seed=4 + k).requires_grad_() for k in range(3)]
    weights = [random(draft, WIDTH, seed=8 + k).requires_grad_() for k in range(1 if shared else 3)]
    by_draft = weights * 3 if shared else weights
    counts = [random(PLACES, seed=12 + k).clamp_min(0) * 0.8**k for k in range(3)]
    made = output_losses(
        states, by_draft, goal, kind, counts, scale=scale, softcap=softcap, chunk=4
    )
    (made.total * 2).backward()
    got = [tensor.grad for tensor in (*states, *weights)]

    for tensor in (*states, *weights):
        tensor.grad = None
    wanted = torch.softmax(goal.hidden @ TARGET_HEAD.T, -1)
    wanted = wanted[:, TOKEN_MAP] if reduced else wanted
    parts, hits, overlaps = [], [], []
    for state, weight, count in zip(states, by_draft, counts, strict=True):
        logits = scale * state @ weight.T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        parts.append((plain(kind, logits, wanted, goal.labels()) * count).sum())
        hits.append(int(((logits.argmax(-1) == goal.labels()) & (count > 0)).sum()))
        overlap = torch.minimum(wanted, torch.softmax(logits, -1)).sum(-1).detach()
        overlaps.append(float(overlap[count > 0].sum()))
    total = sum(parts)
    (total * 2).backward()
    torch.testing.assert_close(made.total, total)
    torch.testing.assert_close(made.each.float(), torch.stack(parts).detach())
    assert made.hits.tolist() == hits
    assert made.places.tolist() == [int((count > 0).sum()) for count in counts]
    if kind != "cross_entropy":
        assert made.overlap.tolist() == pytest.approx(overlaps, rel=1e-4)
    for one, tensor in zip(got, (*states, *weights), strict=True):
        torch.testing.assert_close(one, tensor.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_is_no_matter(kind: str) -> None:
    weight = random(VOCABULARY, WIDTH, seed=8)
    counts = [torch.ones(PLACES)]
    totals = [
        output_losses(
            [random(PLACES, WIDTH, seed=4)], [weight], target(None), kind, counts, chunk=chunk
        ).total
        for chunk in (1, 5, PLACES, 100)
    ]
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_as_on_a_gpu_they_are_the_same(
    kind: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph without breaks, which overwrites the logits as the function does; the code that a
    GPU would run is not made here."""
    found = []
    compiled = torch.compile(losses._loss, fullgraph=True, backend="aot_eager")
    for function in (losses._loss, compiled):
        monkeypatch.setattr(losses, "_loss_of", lambda device, function=function: function)
        state = random(PLACES, WIDTH, seed=4).requires_grad_()
        weight = random(VOCABULARY, WIDTH, seed=8).requires_grad_()
        made = output_losses(
            [state], [weight], target(None), kind, [torch.ones(PLACES)], softcap=softcap, chunk=4
        )
        made.total.backward()
        found.append((made.total, made.overlap, state.grad, weight.grad))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager)


def test_chunks_on_a_gpu_are_larger_and_of_one_size_of_logits() -> None:
    sizes = {v: losses._chunk_size("cuda", v) for v in (1000, 32768, 131072, 1 << 24)}
    assert sizes == {1000: 2048, 32768: 2048, 131072: 512, 1 << 24: losses.CHUNK}
    assert losses._chunk_size("cpu", 1000) == losses.CHUNK


@pytest.mark.parametrize("kind", ["kl", "total_variation", "lk"])
def test_a_draft_that_is_the_target_loses_nothing(kind: str) -> None:
    goal = target(None)
    assert goal.hidden is not None
    states = goal.hidden.clone().requires_grad_()
    made = output_losses([states], [TARGET_HEAD], goal, kind, [torch.ones(PLACES)])
    made.total.backward()
    assert float(made.total.detach()) == pytest.approx(0, abs=1e-5)
    if kind == "kl":  # the others have a kink there
        assert states.grad is not None
        assert float(states.grad.abs().max()) < 1e-5
    assert made.overlap.tolist() == pytest.approx([PLACES])


def test_lk_of_a_certain_target_is_cross_entropy() -> None:
    """As the paper has it: with all of p on one token, sum min(p, q) is q of that token."""
    tokens = torch.arange(PLACES)

    def certain(hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(hidden > 0, 0.0, -torch.inf)

    goal = Target(tokens, functional.one_hot(tokens, VOCABULARY), certain)
    states = [random(PLACES, WIDTH, seed=4).requires_grad_() for _ in range(2)]
    weight = random(VOCABULARY, WIDTH, seed=8)
    for state, kind in zip(states, ("lk", "cross_entropy"), strict=True):
        output_losses([state], [weight], goal, kind, [torch.ones(PLACES)]).total.backward()
    assert states[0].grad is not None
    torch.testing.assert_close(states[0].grad, states[1].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_the_drafts_vocabulary_knows_nothing_of_counts_nothing(kind: str) -> None:
    """The target is certain of a token that the draft lacks."""
    goal = Target(
        torch.tensor([1]),
        torch.zeros(1, WIDTH),
        lambda hidden: torch.where(torch.arange(VOCABULARY) == 1, 0.0, -torch.inf).expand(1, -1),
        TOKEN_MAP,
    )
    state = random(1, WIDTH, seed=4).requires_grad_()
    weight = random(len(TOKEN_MAP), WIDTH, seed=8).requires_grad_()
    made = output_losses([state], [weight], goal, kind, [torch.ones(1)])
    made.total.backward()
    assert float(made.total.detach()) == 0
    assert (made.hits.tolist(), made.places.tolist()) == ([0], [1])
    assert state.grad is not None
    assert weight.grad is not None
    assert not state.grad.any()
    assert not weight.grad.any()


def test_under_autocast_products_are_of_bfloat16_and_near() -> None:
    def run(enabled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        weight = random(VOCABULARY, WIDTH, seed=8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            states = [random(PLACES, WIDTH, seed=4)]
            made = output_losses(states, [weight], target(None), "kl", [torch.ones(PLACES)])
        made.total.backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        return made.total.detach(), weight.grad

    (low, low_gradient), (high, gradient) = run(True), run(False)
    assert not torch.equal(low, high)
    torch.testing.assert_close(low, high, rtol=2e-2, atol=0)
    torch.testing.assert_close(low_gradient, gradient, rtol=0, atol=2e-2 * float(gradient.max()))


def test_without_gradients_none_are_made() -> None:
    weight = random(VOCABULARY, WIDTH, seed=8).requires_grad_()
    with torch.no_grad():
        made = output_losses(
            [random(PLACES, WIDTH, seed=4)], [weight], target(None), "kl", [torch.ones(PLACES)]
        )
    assert not made.total.requires_grad


def test_wrong_use_is_refused() -> None:
    goal = Target(torch.zeros(1, dtype=torch.int64))
    arguments = ([torch.zeros(1, WIDTH)], [torch.zeros(VOCABULARY, WIDTH)], goal)
    with pytest.raises(ValueError, match="no loss 'hinge': choose from cross_entropy, kl"):
        output_losses(*arguments, "hinge", [torch.ones(1)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the target's states"):
        output_losses(*arguments, "kl", [torch.ones(1)])


@settings(max_examples=40)
@given(
    st.sets(st.integers(0, 30), min_size=1),
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
)
def test_places_in_a_token_map(kept: set[int], tokens: list[int]) -> None:
    token_map = torch.tensor(sorted(kept))
    places = draft_places(torch.tensor(tokens), token_map)
    for token, place in zip(tokens, places.tolist(), strict=True):
        assert (place == -1) == (token not in kept)
        assert place == -1 or int(token_map[place]) == token


def by_sorting(logits: torch.Tensor, place: int) -> int:
    return int((logits.argsort(descending=True) == place).nonzero()[0])


@pytest.mark.parametrize("reduced", [False, True])
def test_ranks_are_places_in_the_sorted_logits(reduced: bool) -> None:
    token_map = TOKEN_MAP if reduced else None
    draft = len(TOKEN_MAP) if reduced else VOCABULARY
    states, weight = random(PLACES, WIDTH, seed=4), random(draft, WIDTH, seed=8)
    tokens = target(None).tokens
    found = ranks(states, weight, tokens, token_map=token_map, chunk=4)
    for i, place in enumerate(draft_places(tokens, token_map).tolist()):
        expected = by_sorting(states[i] @ weight.T, place) if place >= 0 else draft
        assert int(found[i]) == expected


def test_accuracies_are_shares_of_ranks() -> None:
    assert top_k_accuracy(torch.tensor([0, 0, 1, 5]), 3) == [0.5, 0.75, 0.75]
    assert top_k_accuracy(torch.tensor([], dtype=torch.int64), 2) == [0.0, 0.0]
    assert len(ranks(torch.zeros(0, 2), torch.zeros(3, 2), torch.zeros(0).long())) == 0
    assert math.isclose(sum(top_k_accuracy(torch.arange(10), 10)), 5.5)
