"""How sure a difference between two models is that answered the same documents.

Everything is paired: both models saw each document, so documents that are hard for both cancel.

- Intervals: 95% percentile bootstrap over documents (Efron and Tibshirani: "An Introduction to the
  Bootstrap", 1993, chapter 13).
- Right against wrong: McNemar's exact test, two-sided (McNemar, Psychometrika 12, 1947): of the
  documents that only one of the two got right, either is as likely to have got them.
- Power: the smallest true loss that the test finds in 80% of the cases at alpha = 5%, as many
  documents disagreeing as were seen to.
- Calibration: expected calibration error over 15 bins of equal width (Guo et al.: "On Calibration
  of Modern Neural Networks", arXiv 1706.04599, section 2).
- Several tests at once: Holm's adjustment (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

RESAMPLES = 2000
LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8
BINS = 15
_AT_ONCE = 1 << 22  # numbers drawn at a time


def resampled_means(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means over documents drawn with replacement.

    Args:
        values: [documents, ...]; what belongs to one document stays together.
        seed: of the draws.
        resamples: how many.

    Returns:
        float64 [resamples, ...].
    """
    n = len(values)
    flat = values.reshape(n, -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n)
        found.append(counts @ flat / n)
    return np.concatenate(found).reshape(resamples, *values.shape[1:])


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of what was drawn, float64 [resamples]."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return float(low), float(high)


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p-value of "the mean is zero" from resampled means: the interval turned around.

    At least 2 / (resamples + 1), which is what so many draws can show.
    """
    below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(draws) + 1))


def mcnemar(broken: int, mended: int) -> float:
    """Exact two-sided p-value; 1 where no document tells the two models apart.

    Args:
        broken: documents that the baseline alone got right.
        mended: documents that the variant alone got right.
    """
    if broken + mended == 0:
        return 1.0
    return float(stats.binomtest(broken, broken + mended, 0.5).pvalue)


def mcnemar_power(documents: int, discordance: float, loss: float, alpha: float = ALPHA) -> float:
    """Probability that the exact test finds a true loss.

    Args:
        documents: how many are answered.
        discordance: share of documents on which exactly one of the two models is right.
        loss: true drop of accuracy; where it is larger than the discordance, so is that.
        alpha: level of the two-sided test.
    """
    if loss <= 0:
        return 0.0
    discordance = max(discordance, loss)
    lost = (discordance + loss) / (2 * discordance)  # share of them that the variant got wrong
    among = stats.binom(documents, discordance)
    counts = np.arange(among.ppf(1e-9), among.isf(1e-9) + 1)
    critical = stats.binom.isf(alpha / 2, counts, 0.5) + 1  # fewest losses that are significant
    return float(np.sum(among.pmf(counts) * stats.binom.sf(critical - 1, counts, lost)))


def visible_loss(
    documents: int, discordant: int, *, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """The smallest drop of accuracy that McNemar's test would have found.

    Args:
        documents: how many were answered.
        discordant: on how many of them exactly one of the two models was right.
        alpha: level of the two-sided test.
        power: with which probability.

    Returns:
        A share of the documents; None where even a loss of all would have been missed.
    """
    observed = discordant / documents

    def found(loss: float) -> bool:
        return mcnemar_power(documents, observed, loss, alpha) >= power

    if not found(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def visible_mean(differences: np.ndarray, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest mean that a two-sided test of it would have found, by the normal approximation.

    Args:
        differences: [documents], at least 2.
        alpha: level of the test.
        power: with which probability.
    """
    spread = float(np.std(differences.astype(np.float64), ddof=1))
    return visible_from_error(spread / math.sqrt(len(differences)), alpha=alpha, power=power)


def visible_from_error(error: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The same from the standard error of the mean."""
    return float(special.ndtri(1 - alpha / 2) + special.ndtri(power)) * error


def most_unseen(documents: int) -> float:
    """Upper 97.5% limit of a share of which none was seen (Clopper and Pearson, 1934)."""
    return float(1 - ((1 - LEVEL) / 2) ** (1 / documents))


def share_interval(count: int, documents: int) -> tuple[float, float]:
    """Exact 95% interval of a share (Clopper and Pearson, 1934)."""
    found = stats.binomtest(count, documents).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def calibration_gaps(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Confidence - correctness of each document in the column of its bin.

    The expected calibration error of any set of documents is the sum over bins of the absolute mean
    of their rows, so resampling documents resamples it.

    Args:
        confidence: [documents], in [0, 1]; bins are closed on the right, as Guo et al. have them.
        correct: [documents], 0 or 1.
        bins: of equal width.

    Returns:
        float64 [documents, bins].
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.zeros((len(confidence), bins))
    gaps[np.arange(len(confidence)), place] = confidence - correct
    return gaps


def calibration_error(mean_gaps: np.ndarray) -> np.ndarray:
    """Expected calibration error of mean gaps [..., bins]."""
    return np.abs(mean_gaps).sum(-1)
