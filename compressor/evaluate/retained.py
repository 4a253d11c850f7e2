"""Retained quality: what a variant kept of its baseline, axis by axis, and how sure that is.

A ``loss`` is how much worse the variant is in the axis' own unit (positive: worse): points of
accuracy, calibration error, or relative growth of perplexity. A finding is one of

- ``equal``: every document got the same answer with the same likelihoods;
- ``loss``: the test of this row alone finds one (p < 5%); it is not adjusted for the number of
  tests, which would hide losses;
- ``gain``: a gain that stays significant with Holm's adjustment over the variant's axes;
- ``no-loss``: neither, and a loss as large as the tolerance would have been found in 80% of cases;
- ``not-shown``: neither, and the test was too weak to say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compressor.errors import RunError
from compressor.evaluate import significance
from compressor.evaluate.samples import TaskSample

ACCURACY, CALIBRATION, DIVERGENCE = "accuracy", "calibration", "divergence"
_EXACT, _BOOTSTRAP = "McNemar, exact", "bootstrap"


@dataclass(frozen=True)
class TaskResult:
    """One task of one model.

    Attributes:
        task: its name.
        axis: accuracy, robustness, safety or language:<code>.
        metric: which of the samples' scores counts; more is better.
        samples: document by document.
    """

    task: str
    axis: str
    metric: str
    samples: Sequence[TaskSample]


def retained_quality(
    own: Sequence[TaskResult],
    baseline: Sequence[TaskResult],
    texts: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    tolerance: float,
) -> list[dict[str, Any]]:
    """Rows of the quality table of one variant.

    Args:
        own: the variant's tasks.
        baseline: the baseline's, of the same names.
        texts: the variant's rows of `divergence.summarise` with the text's name.
        reference: the baseline's.
        tolerance: a loss that counts as none, if the test can see it.

    Returns:
        by axis one row over all its documents, with one for each of its tasks behind it where it
        has several (``task``); calibration, and divergence text by text, come last.

    Raises:
        RunError: the two models were not asked the same documents.
    """
    others = {result.task: result for result in baseline}
    pairs = [(_other(result, others), result) for result in own]
    rows = []
    for axis in dict.fromkeys(result.axis for result in own):
        inside = [pair for pair in pairs if pair[1].axis == axis]
        rows.append(_scored(axis, None, inside, tolerance))
        if len(inside) > 1:
            rows += [_scored(axis, pair[1].task, [pair], tolerance) for pair in inside]
    accuracy = [pair for pair in pairs if pair[1].axis == ACCURACY]
    if (row := _calibrated(accuracy, tolerance)) is not None:
        rows.append(row)
    words = {text["text"]: text for text in reference}
    rows += [_diverged(text, words[text["text"]], tolerance) for text in texts]
    _judge(rows)
    return rows


def _other(result: TaskResult, others: Mapping[str, TaskResult]) -> TaskResult:
    """The baseline's result of the same task, on the same documents in the same order."""
    found = others.get(result.task)
    fix = "run the recipe again with one store, so that all variants are asked the same"
    if found is None:
        raise RunError("the baseline has no such task", where=result.task, fix=fix)
    asked, wanted = (
        [(sample.id, sample.prompt_sha256) for sample in each.samples] for each in (result, found)
    )
    if asked != wanted:
        raise RunError(
            "variant and baseline were not asked the same documents", where=result.task, fix=fix
        )
    return replace(found, metric=result.metric)


def _scores(pairs: Sequence[tuple[TaskResult, TaskResult]], side: int) -> np.ndarray:
    try:
        return np.array(
            [sample.scores[p[side].metric] for p in pairs for sample in p[side].samples], np.float64
        )
    except KeyError as error:
        raise RunError(f"a sample has no score {error}", where=pairs[0][1].task) from error


def _scored(
    axis: str,
    task: str | None,
    pairs: Sequence[tuple[TaskResult, TaskResult]],
    tolerance: float,
) -> dict[str, Any]:
    """A row of scores; every document counts the same, whatever task it is of."""
    before, after = _scores(pairs, 0), _scores(pairs, 1)
    equal = all(
        _same(old, new) for a, b in pairs for old, new in zip(a.samples, b.samples, strict=True)
    )
    changed = sum(
        (old.choice, old.response) != (new.choice, new.response)
        for a, b in pairs
        for old, new in zip(a.samples, b.samples, strict=True)
    )
    documents = len(before)
    draws = significance.resampled_means(np.stack([before, after], 1))
    losses = draws[:, 0] - draws[:, 1]
    low, high = significance.interval(losses)
    ratio = None
    if draws[:, 0].min() > 0:
        ratio = _interval(
            after.mean() / before.mean(), significance.interval(draws[:, 1] / draws[:, 0])
        )
    flips = None
    if bool(np.isin(np.concatenate([before, after]), (0, 1)).all()):
        broken, mended = int((before > after).sum()), int((after > before).sum())
        test, p = _EXACT, significance.mcnemar(broken, mended)
        visible = significance.visible_loss(documents, broken + mended)
        if broken + mended == 0 and not equal:  # the bootstrap has nothing to draw from
            high = significance.most_unseen(documents)
            low = -high
        share = significance.share_interval(broken + mended, documents)
        flips = {
            "broken": broken,
            "mended": mended,
            "changed": changed,
            "share": _interval((broken + mended) / documents, (0.0, 0.0) if equal else share),
        }
    else:
        test, p = _BOOTSTRAP, significance.bootstrap_p(losses)
        visible = significance.visible_mean(before - after) if documents > 1 else None
    metrics = dict.fromkeys(own.metric for _, own in pairs)
    return {
        "axis": axis,
        "task": task or (pairs[0][1].task if len(pairs) == 1 else None),
        "overall": task is None,
        "metric": ", ".join(metrics),
        "documents": documents,
        "baseline": float(before.mean()),
        "value": float(after.mean()),
        "retained": ratio,
        "loss": _interval(before.mean() - after.mean(), (low, high)),
        "flips": flips,
        "test": test,
        "p": p,
        "visible_loss": visible,
        "tolerance": tolerance,
        "finding": "equal" if equal else None,
    }


def _same(one: TaskSample, other: TaskSample) -> bool:
    return (one.choice, one.loglikelihoods, one.response, dict(one.scores)) == (
        other.choice,
        other.loglikelihoods,
        other.response,
        dict(other.scores),
    )


def _calibrated(
    pairs: Sequence[tuple[TaskResult, TaskResult]], tolerance: float
) -> dict[str, Any] | None:
    """The row of calibration errors, over documents with choices of which one is right."""
    kept = [
        (old, new)
        for a, b in pairs
        for old, new in zip(a.samples, b.samples, strict=True)
        if old.loglikelihoods and new.loglikelihoods and isinstance(old.target, int)
    ]
    if not kept:
        return None
    sides = [
        significance.calibration_gaps(*_confidence([pair[side] for pair in kept]))
        for side in (0, 1)
    ]
    gaps = np.stack(sides, 1)  # [documents, 2, bins]
    before, after = significance.calibration_error(gaps.mean(0)).tolist()
    drawn = significance.calibration_error(significance.resampled_means(gaps))
    losses = drawn[:, 1] - drawn[:, 0]
    equal = all(_same(old, new) for old, new in kept)
    spread = significance.visible_from_error(float(losses.std(ddof=1)))
    return {
        "axis": CALIBRATION,
        "task": None,
        "overall": True,
        "metric": f"ece, {significance.BINS} bins of equal width",
        "documents": len(kept),
        "baseline": before,
        "value": after,
        "retained": None,
        "loss": _interval(after - before, significance.interval(losses)),
        "flips": None,
        "test": _BOOTSTRAP,
        "p": significance.bootstrap_p(losses),
        "visible_loss": spread,
        "tolerance": tolerance,
        "finding": "equal" if equal else None,
    }


def _confidence(samples: Sequence[TaskSample]) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the choices' log-likelihoods at the likeliest one, and whether it is right."""
    confidence, correct = np.zeros(len(samples)), np.zeros(len(samples))
    for row, sample in enumerate(samples):
        logits = np.array(sample.loglikelihoods)
        weights = np.exp(logits - logits.max())
        confidence[row] = weights.max() / weights.sum()
        correct[row] = int(logits.argmax()) == sample.target
    return confidence, correct


def _diverged(
    text: Mapping[str, Any], reference: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    """The row of a text's perplexity."""
    change, bounds = text["perplexity_change"], text["perplexity_ci"]
    ratio = _interval(1 / (1 + change), (1 / (1 + bounds[1]), 1 / (1 + bounds[0])))
    return {
        "axis": DIVERGENCE,
        "task": text["text"],
        "overall": True,
        "metric": "perplexity",
        "documents": text["windows"],
        "baseline": reference["perplexity"],
        "value": text["perplexity"],
        "retained": ratio,
        "loss": _interval(change, bounds),
        "flips": None,
        "test": _BOOTSTRAP,
        "p": text["change_p"],
        "visible_loss": text["visible_change"],
        "tolerance": tolerance,
        "finding": "equal" if text["kl_mean"] == change == 0 else None,
    }


def _interval(value: Any, bounds: Sequence[float]) -> dict[str, float]:
    return {"value": float(value), "low": float(bounds[0]), "high": float(bounds[1])}


def _judge(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in adjusted p-values and findings."""
    family = [row for row in rows if row["overall"] and row["p"] is not None]
    adjusted = significance.holm([row["p"] for row in family])
    for row in rows:
        row["p_holm"] = None
    for row, p in zip(family, adjusted, strict=True):
        row["p_holm"] = p
    for row in rows:
        if row["finding"] is not None:
            continue
        p, worse, visible = row["p"], row["loss"]["value"], row["visible_loss"]
        sure = p if row["p_holm"] is None else row["p_holm"]
        if p is not None and p < significance.ALPHA and worse > 0:
            row["finding"] = "loss"
        elif sure is not None and sure < significance.ALPHA and worse < 0:
            row["finding"] = "gain"
        elif visible is not None and visible <= row["tolerance"]:
            row["finding"] = "no-loss"
        else:
            row["finding"] = "not-shown"
