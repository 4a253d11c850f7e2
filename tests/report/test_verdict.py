from __future__ import annotations

from typing import Any

import pytest

from compressor.optimise.record import ProxyErrors, SearchRecord
from compressor.report.build import build_report

PERFORMANCE = {
    "engine": "transformers",
    "kernel": "dense",
    "dtype": "float32",
    "requests": 8,
    "ttft_ms": {"p50": 1.0, "p90": 1.0, "p99": 1.0},
    "tpot_ms": {"p50": 1.0, "p90": 1.0, "p99": 1.0},
    "components_usd_per_hour": {"accelerator": 0.1},
}


def point(concurrency: int, cost: float, ratio: tuple[Any, Any, Any]) -> dict[str, Any]:
    value, low, high = ratio
    return PERFORMANCE | {
        "concurrency": concurrency,
        "throughput_tok_s": {"value": 100 / cost, "low": None, "high": None},
        "cost_usd_per_mtok_output": {"value": cost, "low": None, "high": None},
        "cost_ratio": {"value": value, "low": low, "high": high},
    }


def candidate(
    name: str,
    ratio: tuple[Any, Any, Any] | None,
    change: float | None,
    ci: tuple[float, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    quality = [] if change is None else [
        {"text": "novel", "perplexity": 10 * (1 + change), "perplexity_change": change,
         "perplexity_ci": ci}
    ]  # fmt: skip
    rows = [] if ratio is None else [point(4, 1 / ratio[0], ratio), point(1, 3.0, (9.0, 8.0, 9.9))]
    return {"name": name, "status": "ok", "quality": quality, "performance": rows} | extra


def verdict(*candidates: dict[str, Any], measured: bool = True, **sections: Any) -> dict[str, Any]:
    rows = [point(1, 3.0, (1.0, None, None)), point(4, 1.0, (1.0, None, None))]
    baseline = {
        "name": "baseline",
        "status": "ok",
        "quality": [{"text": "novel", "perplexity": 10.0, "perplexity_change": 0.0}],
        "performance": rows if measured else [],
    }
    report = build_report(
        recipe={"name": "r"},
        created="2000-01-01T00:00:00Z",
        compressor_version="0",
        command="x",
        environment={},
        model={"source": "m"},
        variants=[baseline, *candidates],
        **sections,
    )
    return report["verdict"]


def search(chosen: str | None, limit: float) -> dict[str, Any]:
    return SearchRecord(
        minimise="cost", unit="USD per million output tokens", concurrency=4,
        limits={"perplexity": limit}, decide_on="bound", seed=0, candidates=2, excluded={},
        untried=0, stopped="nothing else can win", seconds=1.0, chosen=chosen,
        sentence="Deploy what it chose.", baseline_objective=1.0, trials=[], frontier=[],
        finalists=[], errors=ProxyErrors(**dict.fromkeys(ProxyErrors.model_fields)),
    ).model_dump()  # fmt: skip


def test_certain_gain_within_the_limit() -> None:
    found = verdict(candidate("a", (1.5, 1.4, 1.6), 0.002, (0.001, 0.003)))
    assert found["outcome"] == "gain" and found["best_variant"] == "a"
    assert "costs 33% less" in found["sentence"] and "1.40 to 1.60" in found["sentence"]
    assert found["concurrency"] == 4  # where the baseline is cheapest, not where the gain is 9


@pytest.mark.parametrize("ratio", [(1.2, 0.95, 1.5), (1.0, 0.9, 1.1), (1.3, 1.0, 1.6)])
def test_interval_that_includes_no_gain_is_never_a_gain(ratio: tuple[float, float, float]) -> None:
    found = verdict(candidate("a", ratio, 0.0))
    assert found["outcome"] == "no-gain" and found["best_variant"] is None
    text = " ".join([found["sentence"], *found["details"]])
    assert "costs" not in text.replace("cost ratio", "") and "which includes 1" in text
    assert "No variant is shown" in found["sentence"]


def test_missing_interval_claims_nothing() -> None:
    found = verdict(candidate("a", (5.0, None, None), 0.0))
    assert found["outcome"] == "no-gain"
    assert "no difference in cost is claimed" in found["details"][0]


def test_dearer_variant_is_said_to_be_dearer() -> None:
    found = verdict(candidate("a", (0.5, 0.45, 0.55), 0.0))
    assert found["outcome"] == "no-gain"
    assert "costs 100% more" in found["details"][0]


def test_gain_that_loses_quality_is_a_trade_off() -> None:
    found = verdict(candidate("a", (2.0, 1.9, 2.1), 0.06, (0.05, 0.07)))
    assert found["outcome"] == "trade-off" and found["best_variant"] is None
    assert "+6.0%" in found["sentence"] and "certainly above the limit of 1%" in found["sentence"]


def test_upper_end_of_the_loss_counts() -> None:
    found = verdict(candidate("a", (2.0, 1.9, 2.1), 0.005, (-0.005, 0.02)))
    assert found["outcome"] == "trade-off"
    assert "not certain" in found["sentence"]


def test_worst_text_counts() -> None:
    row = candidate("a", (2.0, 1.9, 2.1), 0.001)
    row["quality"].append({"text": "web", "perplexity": 11.0, "perplexity_change": 0.1})
    found = verdict(row)
    assert found["outcome"] == "trade-off" and "on web" in found["sentence"]


def test_best_is_the_largest_certain_gain_of_those_that_keep_quality() -> None:
    found = verdict(
        candidate("shaky", (2.0, 1.1, 3.0), 0.0),
        candidate("sure", (1.5, 1.4, 1.6), 0.0),
        candidate("lossy", (3.0, 2.9, 3.1), 0.5),
    )
    assert found["best_variant"] == "sure"
    assert len(found["details"]) == 3


@pytest.mark.parametrize("measured", [True, False])
def test_what_a_search_chose_is_the_best(measured: bool) -> None:
    surest = candidate("surest", (1.5, 1.4, 1.6) if measured else None, 0.001)
    cheapest = candidate("cheapest", (1.6, 1.3, 1.9) if measured else None, 0.015)
    found = verdict(surest, cheapest, measured=measured, optimise=search("cheapest", 0.02))
    assert found["best_variant"] == "cheapest" and found["quality_limit"] == 0.02
    assert found["outcome"] == ("gain" if measured else "unmeasured")
    assert found["sentence"].startswith("With cheapest ")
    assert found["sentence"].endswith("what the search chose within its limits.")
    found = verdict(surest, measured=measured, optimise=search(None, 0.0001))
    assert found["best_variant"] is None and found["sentence"] == "Deploy what it chose."
    assert found["outcome"] == ("no-gain" if measured else "unmeasured")
    # A record that was altered names what is not there.
    found = verdict(surest, measured=measured, optimise=search("nobody", 0.02))
    assert found["outcome"] == ("gain" if measured else "unmeasured")


def test_cheaper_without_quality_figures_is_not_called_equal() -> None:
    found = verdict(candidate("a", (2.0, 1.9, 2.1), None))
    assert found["outcome"] == "trade-off" and "quality was not measured" in found["sentence"]


def test_quality_only() -> None:
    found = verdict(candidate("a", None, 0.001), candidate("b", None, 0.5), measured=False)
    assert found["outcome"] == "unmeasured"
    assert found["sentence"] == "Cost was not measured. Perplexity stays within 1% for a."
    assert "surely" in verdict(candidate("b", None, 0.5), measured=False)["sentence"]
    assert "Neither" in verdict(candidate("b", None, None), measured=False)["sentence"]


def test_failures_are_told() -> None:
    dead = candidate("a", None, None, status="failed", error="no memory")
    found = verdict(dead)
    assert found["outcome"] == "failed" and "no memory" in found["details"][0]
