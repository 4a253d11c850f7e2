"""Tests and intervals against scipy, statsmodels and torchmetrics, and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as golden_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from torchmetrics.functional.classification import multiclass_calibration_error

from compressor.evaluate import significance as s


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_statsmodels(broken: int, mended: int) -> None:
    table = [[100, broken], [mended, 40]]
    assert s.mcnemar(broken, mended) == pytest.approx(golden_mcnemar(table, exact=True).pvalue)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    np.testing.assert_allclose(s.holm(p_values), multipletests(p_values, method="holm")[1])


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_shares_have_clopper_and_pearsons_interval(given_: tuple[int, int]) -> None:
    count, n = given_
    golden = proportion_confint(count, n, 0.05, method="beta")
    np.testing.assert_allclose(s.share_interval(count, n), golden, atol=1e-9)
    assert s.most_unseen(n) == pytest.approx(s.share_interval(0, n)[1])


def test_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).exponential(size=80)
    golden = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    ours = s.interval(s.resampled_means(values, resamples=20_000))
    np.testing.assert_allclose(ours, golden, atol=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(0), 0
    for turn in range(400):
        # Differences of two right-or-wrong answers: 8% broken, 3% mended.
        values = rng.choice([1.0, -1.0, 0.0], size=200, p=[0.08, 0.03, 0.89])
        low, high = s.interval(s.resampled_means(values, seed=turn, resamples=500))
        hits += low <= 0.05 <= high
    assert 0.92 < hits / 400 < 0.975


def test_bootstrap_p_is_near_the_t_test_and_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.2):
        values = rng.normal(shift, 1, 300)
        golden = stats.ttest_1samp(values, 0).pvalue
        assert s.bootstrap_p(s.resampled_means(values)) == pytest.approx(golden, abs=0.03)
    found = [
        s.bootstrap_p(s.resampled_means(rng.normal(0, 1, 100), seed=i, resamples=400))
        for i in range(400)
    ]
    assert 0.03 < np.mean(np.array(found) < 0.05) < 0.085
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_draws_do_not_depend_on_how_many_are_made_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    whole = s.resampled_means(values, resamples=100)
    monkeypatch.setattr(s, "_AT_ONCE", 350)
    np.testing.assert_allclose(s.resampled_means(values, resamples=100), whole)
    assert whole.shape == (100, 3)


def brute_force_power(n: int, discordance: float, loss: float) -> float:
    """Every table that can come out, with its probability."""
    broken, mended = (discordance + loss) / 2, (discordance - loss) / 2
    model = stats.multinomial(n, [broken, mended, 1 - discordance])
    return sum(
        model.pmf([b, c, n - b - c])
        for b, c in itertools.product(range(n + 1), repeat=2)
        if b + c <= n and b > c and golden_mcnemar([[0, b], [c, 0]], exact=True).pvalue <= 0.05
    )


@pytest.mark.parametrize(("discordance", "loss"), [(0.4, 0.3), (0.5, 0.1), (0.3, 0.3)])
def test_power_is_that_of_every_table(discordance: float, loss: float) -> None:
    golden = brute_force_power(24, discordance, loss)
    assert s.mcnemar_power(24, discordance, loss) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(("n", "discordant"), [(200, 30), (1000, 20), (2000, 200), (500, 0)])
def test_the_visible_loss_is_seen_in_four_of_five_simulations(n: int, discordant: int) -> None:
    loss = s.visible_loss(n, discordant)
    assert loss is not None
    share = max(discordant / n, loss)
    rng = np.random.default_rng(1)
    tables = rng.multinomial(n, [(share + loss) / 2, (share - loss) / 2, 1 - share], size=4000)
    p = {(b, c): s.mcnemar(b, c) for b, c in {(int(b), int(c)) for b, c, _ in tables}}
    seen = np.mean([b > c and p[int(b), int(c)] < 0.05 for b, c, _ in tables])
    assert seen == pytest.approx(0.8, abs=0.025)


def test_fewer_documents_see_less_and_too_few_nothing() -> None:
    found = [s.visible_loss(n, n // 20) for n in (100, 400, 1600, 6400)]
    assert all(a > b for a, b in itertools.pairwise(found))  # type: ignore[operator]
    assert s.visible_loss(5, 0) is None  # five losses of five have p = 0.0625
    assert s.visible_loss(6, 0) is not None
    assert s.visible_loss(1000, 0) == pytest.approx(8 / 1000, abs=5e-4)  # six of them, nearly sure


def test_visible_mean_is_that_of_the_t_test() -> None:
    values = np.random.default_rng(0).normal(0, 2, 600)
    golden = TTestPower().solve_power(nobs=600, alpha=0.05, power=0.8) * values.std(ddof=1)
    assert s.visible_mean(values) == pytest.approx(golden, rel=0.01)


@pytest.mark.parametrize("choices", [2, 3, 5])
def test_calibration_error_is_torchmetrics(choices: int) -> None:
    rng = np.random.default_rng(choices)
    logits = rng.normal(0, 2, (700, choices))
    target = rng.integers(choices, size=700)
    probabilities = torch.softmax(torch.from_numpy(logits), -1)
    golden = multiclass_calibration_error(
        probabilities, torch.from_numpy(target), num_classes=choices, n_bins=15, norm="l1"
    )
    confidence, correct = probabilities.max(-1).values.numpy(), logits.argmax(-1) == target
    gaps = s.calibration_gaps(confidence, correct.astype(float))
    assert s.calibration_error(gaps.mean(0)) == pytest.approx(float(golden), abs=1e-6)
    assert s.calibration_gaps(np.array([0.0, 1.0]), np.array([0.0, 1.0])).shape == (2, 15)


def test_a_confident_fool_is_uncalibrated_and_an_honest_coin_is_not() -> None:
    wrong = s.calibration_gaps(np.full(40, 0.99), np.zeros(40))
    assert s.calibration_error(wrong.mean(0)) == pytest.approx(0.99)
    coin = s.calibration_gaps(np.full(40, 0.5), np.arange(40) % 2)
    assert s.calibration_error(coin.mean(0)) == 0.0
