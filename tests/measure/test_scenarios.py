from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.measure import ledger
from compressor.measure.engines.base import RequestSample
from compressor.measure.metrics import Interval
from compressor.measure.prices import PriceScenario, resolve_prices
from compressor.measure.scenarios import (
    Totals,
    break_even,
    scenario_table,
    sensitivity,
    split_input_output,
    utilisation_table,
)

RATE = Interval(100.0, 80.0, 125.0)


def scenario(**changed: Any) -> PriceScenario:
    values: dict[str, Any] = {
        "device": "x",
        "label": "x",
        "accelerator_usd_per_hour": 2.0,
        "host_usd_per_hour": 0.5,
        "energy_included": False,
        "watts": 700.0,
        "electricity_usd_per_kwh": 0.1,
        "pue": 1.2,
        "utilisation": 0.5,
        "storage_usd_per_gb_month": 7.3,
        "egress_usd_per_gb": 0.1,
        "egress_bytes_per_token": 1000.0,
    }
    return PriceScenario(**(values | changed))


def is_json(value: Any) -> bool:
    return json.loads(json.dumps(value.to_dict())) == value.to_dict()


def test_scenario_table_has_each_known_plan_and_names_the_others() -> None:
    table = scenario_table(RATE, artifact_bytes=0, overrides={"device": "t4", "utilisation": 0.5})
    assert [row.plan for row in table.rows] == ["on-demand", "reserved-1y", "reserved-3y", "spot"]
    assert table.not_known == ("purchase",)
    for row, price in zip(table.rows, (0.526, 0.331, 0.227, 0.1766), strict=True):
        assert row.total_usd_per_hour == price
        assert row.cost_usd_per_mtok_output.value == pytest.approx(price / 0.36 / 0.5)
        assert set(row.components_usd_per_hour) == {
            "accelerator",
            "host",
            "energy",
            "storage",
            "network",
        }
        assert row.as_of and row.source
    assert is_json(table)


def test_scenario_table_puts_the_recipes_own_price_first() -> None:
    table = scenario_table(RATE, artifact_bytes=0, overrides={"device": "t4", "usd_per_hour": 9.0})
    assert table.rows[0].plan == "own rate" and table.rows[0].total_usd_per_hour == 9.0
    assert [row.plan for row in table.rows[1:]] == [
        "on-demand",
        "reserved-1y",
        "reserved-3y",
        "spot",
    ]
    unlisted = scenario_table(
        RATE, artifact_bytes=0, overrides={"usd_per_hour": 9.0}, gpu_name="Some GPU 9000"
    )
    assert len(unlisted.rows) == 1 and len(unlisted.not_known) == 5


def test_scenario_table_of_a_bought_device_pays_for_energy() -> None:
    table = scenario_table(RATE, artifact_bytes=0, gpu_name="NVIDIA H100 80GB HBM3")
    bought = table.rows[-1]
    assert bought.plan == "purchase" and bought.price_kind == "market"
    assert bought.components_usd_per_hour["energy"] == pytest.approx(1.275 * 1.54 * 0.0895)


def test_sensitivity_by_hand() -> None:
    prices = scenario(
        host_usd_per_hour=0.0,
        energy_included=True,
        storage_usd_per_gb_month=0.0,
        egress_usd_per_gb=0.0,
    )
    result = sensitivity(prices, RATE, artifact_bytes=0)
    base = 2.0 / 0.36 / 0.5
    assert result.base_usd_per_mtok == pytest.approx(base)
    rows = {row.assumption: row for row in result.rows}
    assert set(rows) == {"throughput", "hourly price", "utilisation"}
    assert rows["hourly price"].settings == pytest.approx((1.6, 2.4))
    assert rows["hourly price"].swing_usd_per_mtok == pytest.approx(0.4 * base)
    assert rows["utilisation"].cost_low_usd_per_mtok == pytest.approx(base / 1.2)
    assert rows["utilisation"].cost_high_usd_per_mtok == pytest.approx(base / 0.8)
    assert rows["throughput"].cost_low_usd_per_mtok == pytest.approx(base * 100 / 125)
    assert [row.assumption for row in result.rows] == ["throughput", "utilisation", "hourly price"]
    assert "depends most on throughput (over its 95% interval)" in result.sentence
    assert result.not_moved["electricity"] == "energy is part of the rental"
    assert result.not_moved["life"] == "the device is rented"
    assert is_json(result)


def test_sensitivity_of_owned_hardware_moves_price_residual_and_life() -> None:
    prices = resolve_prices({"device": "h100", "plan": "purchase"})
    result = sensitivity(prices, Interval(100.0, None, None), artifact_bytes=0)
    rows = {row.assumption: row for row in result.rows}
    assert "hourly price" not in rows and "follows from" in result.not_moved["hourly price"]
    assert "without an interval" in result.not_moved["throughput"]
    assert rows["residual value"].settings == (0.0, 6750.0)
    assert "of the purchase price" in rows["residual value"].how
    life = 33_750 / (26_280 * 0.8) - 33_750 / 26_280
    assert rows["life"].cost_high_usd_per_mtok - result.base_usd_per_mtok == pytest.approx(
        life / 0.36
    )
    assert rows["utilisation"].how.endswith("not above 1")
    assert rows["PUE"].settings == pytest.approx((1.232, 1.848))


@given(
    price=st.floats(0.01, 100),
    utilisation=st.floats(0.05, 1.0),
    spread=st.floats(0.01, 0.9),
    value=st.floats(1, 1e5),
    width=st.floats(1.0, 3.0),
)
def test_sensitivity_brackets_the_base(
    price: float, utilisation: float, spread: float, value: float, width: float
) -> None:
    prices = scenario(accelerator_usd_per_hour=price, utilisation=utilisation)
    rate = Interval(value, value / width, value * width)
    result = sensitivity(prices, rate, artifact_bytes=10**10, spread=spread)
    swings = [row.swing_usd_per_mtok for row in result.rows]
    assert swings == sorted(swings, reverse=True)
    for row in result.rows:
        assert row.cost_low_usd_per_mtok <= result.base_usd_per_mtok <= row.cost_high_usd_per_mtok
        assert row.settings[0] <= row.base <= row.settings[1]


def test_sensitivity_with_declared_ranges() -> None:
    result = sensitivity(
        scenario(), RATE, artifact_bytes=0, spreads={"utilisation": 0.5, "host": 0.0}
    )
    rows = {row.assumption: row for row in result.rows}
    assert rows["utilisation"].settings == (0.25, 0.75)
    assert result.not_moved["host"] == "its range is 0"
    for bad in ({"spread": 1.0}, {"spreads": {"weather": 0.1}}, {"spreads": {"host": -0.1}}):
        with pytest.raises(RecipeError):
            sensitivity(scenario(), RATE, artifact_bytes=0, **bad)  # type: ignore[arg-type]


def test_break_even_by_hand() -> None:
    result = break_even(
        run_seconds=7200,
        run_usd_per_hour=3.0,
        baseline_usd_per_mtok=1.0,
        variant_usd_per_mtok=0.4,
        tokens_per_second=100,
        utilisation=0.5,
    )
    assert result.run_cost_usd == 6.0
    assert result.tokens == pytest.approx(10e6)
    assert result.days == pytest.approx(10e6 / (50 * 86400))
    assert is_json(result)


@given(
    seconds=st.floats(1, 1e6),
    price=st.floats(0.01, 100),
    baseline=st.floats(0.01, 100),
    share=st.floats(0.01, 0.99),
)
def test_break_even_tokens_times_saving_is_the_run_cost(
    seconds: float, price: float, baseline: float, share: float
) -> None:
    result = break_even(
        run_seconds=seconds,
        run_usd_per_hour=price,
        baseline_usd_per_mtok=baseline,
        variant_usd_per_mtok=baseline * share,
        tokens_per_second=10,
    )
    assert result.tokens is not None
    assert result.tokens / 1e6 * result.saving_usd_per_mtok == pytest.approx(result.run_cost_usd)


def test_a_variant_that_is_not_cheaper_never_breaks_even() -> None:
    result = break_even(
        run_seconds=10,
        run_usd_per_hour=1,
        baseline_usd_per_mtok=1.0,
        variant_usd_per_mtok=1.0,
        tokens_per_second=10,
    )
    assert result.tokens is None and result.days is None and "not cheaper" in result.reason


@given(
    a=st.floats(1e-6, 1e-2),
    b=st.floats(1e-5, 1e-1),
    requests=st.integers(1, 50),
)
def test_split_recovers_exact_mixes(a: float, b: float, requests: int) -> None:
    totals = [
        Totals(i * requests, o * requests, (a * i + b * o) * requests, requests)
        for i, o in ((2048, 2), (32, 256), (512, 128))
    ]
    split = split_input_output(totals, scenario(), artifact_bytes=10**9, mix=(512, 128))
    assert split.seconds_per_input_token == pytest.approx(a, rel=1e-6)
    assert split.seconds_per_output_token == pytest.approx(b, rel=1e-6)
    assert split.residual_share < 1e-9 and split.worst_residual_share < 1e-6
    rate = 128 / (a * 512 + b * 128)
    whole = ledger.cost_usd_per_mtok(scenario(), tokens_per_second=rate, artifact_bytes=10**9)
    assert split.blended_usd_per_mtok_output == pytest.approx(whole)
    assert split.blended_usd_per_mtok_all == pytest.approx(whole * 128 / 640)


def test_split_by_hand_from_requests() -> None:
    def request(start: float, prompt: int, times: list[float], error: str = "") -> RequestSample:
        first = times[0] if times else start + 1
        return RequestSample("x", prompt, len(times), start, first, tuple(times), error=error)

    prefill = [request(1.1 * n, 1000, [1.1 * (n + 1)]) for n in range(10)]
    # Two at the same time share their seconds; one that failed has no tokens.
    decode = [
        request(0, 1, [0.1 * n for n in range(1, 51)]), request(0, 1, [5.0] * 50),
        request(9, 1, [], "broken"),
    ]  # fmt: skip
    totals = [Totals.of(prefill), Totals.of(decode)]
    assert totals[0] == Totals(10_000, 10, pytest.approx(11.0), 10)
    assert totals[1] == Totals(2, 100, pytest.approx(6.0), 2)
    totals[1] = Totals(0, 100, 10.0, 1)
    prices = scenario(
        accelerator_usd_per_hour=3.6, host_usd_per_hour=0, watts=0, egress_usd_per_gb=0
    )
    split = split_input_output(totals, prices, artifact_bytes=0, mix=(100, 10))
    assert split.seconds_per_input_token == pytest.approx(0.001)
    assert split.seconds_per_output_token == pytest.approx(0.1)
    assert split.input_usd_per_mtok == pytest.approx(2.0)  # 3.6/3600 x 0.001 x 1e6 / 0.5
    assert split.output_usd_per_mtok == pytest.approx(200.0)
    assert split.blended_usd_per_mtok_output == pytest.approx(220.0)
    assert is_json(split)


def test_split_never_prices_a_token_below_zero_and_reports_the_misfit() -> None:
    totals = [Totals(1000, 10, 1.0), Totals(10, 10, 1.5)]
    split = split_input_output(totals, scenario(), artifact_bytes=0, mix=(1, 1))
    assert split.seconds_per_input_token == 0.0 and split.residual_share > 0.1


@pytest.mark.parametrize(
    ("totals", "mix"),
    [
        ([Totals(100, 10, 1.0)], (1, 1)),
        ([], (1, 1)),
        ([Totals(100, 10, 1.0), Totals(200, 20, 2.0)], (1, 1)),
        ([Totals(100, 10, 1.0), Totals(10, 10, 0.5)], (1, 0)),
    ],
)
def test_split_refuses_what_it_cannot_tell(totals: list[Totals], mix: tuple[float, float]) -> None:
    with pytest.raises(RecipeError):
        split_input_output(totals, scenario(), artifact_bytes=0, mix=mix)


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5, unique=True))
def test_cost_falls_with_utilisation(shares: list[float]) -> None:
    rows = utilisation_table(scenario(), RATE, artifact_bytes=0, shares=sorted(shares))
    costs = [row.cost_usd_per_mtok_output.value for row in rows]
    assert costs == sorted(costs, reverse=True)


def test_utilisation_table_by_hand() -> None:
    rows = utilisation_table(scenario(), RATE, artifact_bytes=0)
    assert [row.utilisation for row in rows] == [0.1, 0.3, 0.5, 0.7, 1.0]
    assert rows[0].cost_usd_per_mtok_output.value == pytest.approx(
        10 * rows[-1].cost_usd_per_mtok_output.value
    )
    assert all(map(is_json, rows))
    with pytest.raises(RecipeError):
        utilisation_table(scenario(), RATE, artifact_bytes=0, shares=(0.0,))
