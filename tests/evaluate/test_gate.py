"""What the gate decides on, and what a recipe may ask of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compressor.evaluate.gate import judge
from compressor.evaluate.options import Gate, parse_share


def text(name: str, **figures: Any) -> dict[str, Any]:
    return {
        "text": name, "perplexity_change": 0.005, "perplexity_ci": [0.0, 0.008], "kl_mean": 0.01,
        "kl_ci": [0.008, 0.015], "kl_p99": 0.1, "top1_agreement": 0.98, "top1_ci": [0.96, 0.99],
    } | figures  # fmt: skip


def axis(name: str, loss: tuple[float, float, float], flips: Any = None) -> dict[str, Any]:
    return {
        "axis": name, "overall": True,
        "loss": dict(zip(("value", "low", "high"), loss, strict=True)),
        "flips": {"share": dict(zip(("value", "low", "high"), flips, strict=True))}
        if flips else None,
    }  # fmt: skip


VARIANT = {
    "quality": [text("novel"), text("web", perplexity_ci=[0.0, 0.03], kl_p99=0.2)],
    "retained": [
        axis("accuracy", (0.004, -0.002, 0.011), (0.01, 0.005, 0.03)),
        axis("accuracy", (0.4, 0.3, 0.5)) | {"overall": False},  # one of its tasks
        axis("robustness", (0.002, -0.01, 0.02)),
        axis("language:de", (0.0, -0.1, 0.1)),
        axis("language:fr", (0.02, -0.01, 0.05)),
        axis("calibration", (0.01, -0.01, 0.02)),
    ],
    "drift": {"equal": 12, "prompts": 16},
}


@pytest.mark.parametrize(
    ("metric", "limit", "on_bound", "on_point", "where", "bound"),
    [
        ("perplexity", 0.01, False, True, "web", 0.03),
        ("perplexity", 0.04, True, True, "web", 0.03),
        ("kl_mean", 0.012, False, True, "novel", 0.015),
        ("kl_p99", 0.15, False, False, "web", 0.2),
        ("top1_agreement", 0.97, False, True, "novel", 0.96),
        ("acc", 0.01, False, True, "accuracy", 0.011),
        ("acc", 0.003, False, False, "accuracy", 0.011),
        ("flips", 0.02, False, True, "accuracy", 0.03),
        ("robustness", 0.02, True, True, "robustness", 0.02),
        ("languages", 0.06, False, True, "language:de", 0.1),
        ("ece", 0.015, False, True, "calibration", 0.02),
        ("drift", 0.75, True, True, "continuations", 0.75),
        ("drift", 0.8, False, False, "continuations", 0.75),
    ],
)
def test_decisions(
    metric: str, limit: float, on_bound: bool, on_point: bool, where: str, bound: float
) -> None:
    made = judge({metric: limit}, "bound", VARIANT)
    (row,) = made["limits"]
    assert made["passed"] is row["passed"] is on_bound
    assert (row["where"], row["decided"]) == (where, bound)
    assert judge({metric: limit}, "point", VARIANT)["passed"] is on_point


def test_every_limit_that_is_not_kept_is_named() -> None:
    made = judge({"kl_p99": 1.0, "drift": 0.9, "acc": 0.001}, "bound", VARIANT)
    assert not made["passed"]
    assert [row["metric"] for row in made["limits"] if not row["passed"]] == ["drift", "acc"]


def test_what_was_not_measured_does_not_pass() -> None:
    (row,) = judge({"safety": 0.5}, "point", VARIANT)["limits"]
    assert row["passed"] is False and row["value"] is None
    empty: dict[str, Any] = {"quality": [], "retained": [], "drift": None}
    for metric in ("perplexity", "drift", "flips", "ece"):
        assert not judge({metric: 1.0}, "point", empty)["passed"]


def test_limits_are_shares_or_percentages() -> None:
    gate = Gate.model_validate({"max_loss": "1%", "metrics": {"acc": 0.02, "flips": "2.5 %"}})
    assert gate.limits == {"perplexity": 0.01, "acc": 0.02, "flips": 0.025}
    assert gate.decide_on == "bound"
    assert parse_share("nonsense") is None and parse_share("-1%") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"metrics": {}},
        {"max_loss": "lots"},
        {"max_loss": 2},
        {"max_loss": "200%"},
        {"max_loss": 0.1, "metrics": {"perplexity": 0.1}},
        {"metrics": {"kl_mean": "1%"}},
        {"metrics": {"speed": 1}},
        {"max_loss": 0.1, "decide_on": "mood"},
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gate.model_validate(wrong)
