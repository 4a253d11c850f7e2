from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.measure import ledger
from compressor.measure.metrics import Interval
from compressor.measure.prices import (
    PLANS,
    PriceScenario,
    amortised_usd_per_hour,
    device_id,
    owned_defaults,
    plan_rows,
    price_rows,
    resolve_prices,
    with_watts,
)


def test_every_row_is_dated_sourced_and_priced() -> None:
    for row in price_rows().values():
        assert re.fullmatch(r"20\d\d-\d\d", row["as_of"])
        assert row["source"] and row["label"] and row["usd_per_instance_hour"] > 0
        assert row["devices"] >= 1 and row["vcpus"] >= 1


def test_default_is_the_cpu_row_with_energy_included_and_said_so() -> None:
    prices = resolve_prices(cpu_count=2)
    assert prices.device == "cpu"
    assert prices.accelerator_usd_per_hour == price_rows()["cpu"]["usd_per_instance_hour"]
    assert prices.energy_included and prices.source and prices.as_of
    assert any("Energy is part" in line for line in prices.assumptions)


def test_cpu_price_scales_with_cpus_and_says_so() -> None:
    assert resolve_prices(cpu_count=8).accelerator_usd_per_hour == pytest.approx(
        4 * resolve_prices(cpu_count=2).accelerator_usd_per_hour
    )
    assert any("scaled to 8" in line for line in resolve_prices(cpu_count=8).assumptions)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA H200 MIG 1g.18gb", None),  # a slice does not cost what the whole does
        ("AMD Instinct MI300X", "mi300x"),
        (None, "cpu"),
    ],
)
def test_device_is_found_by_whole_words(name: str | None, expected: str | None) -> None:
    assert device_id(name) == expected


def test_one_device_of_a_shared_instance() -> None:
    row = price_rows()["h100"]
    prices = resolve_prices(gpu_name="NVIDIA H100 80GB HBM3")
    assert prices.accelerator_usd_per_hour == pytest.approx(row["usd_per_instance_hour"] / 8)


def test_own_rate_with_electricity_charges_energy() -> None:
    prices = resolve_prices(
        {"usd_per_hour": 1.0, "watts": 500, "electricity_usd_per_kwh": 0.2, "pue": 1.5}
    )
    lines = ledger.components_usd_per_hour(prices, tokens_per_second=10, artifact_bytes=0)
    assert lines == {
        "accelerator": 1.0,
        "host": 0.0,
        "energy": pytest.approx(0.15),
        "storage": 0.0,
        "network": 0.0,
    }


def test_list_price_never_charges_energy_twice() -> None:
    prices = resolve_prices({"watts": 500, "electricity_usd_per_kwh": 0.2}, cpu_count=2)
    lines = ledger.components_usd_per_hour(prices, tokens_per_second=10, artifact_bytes=0)
    assert lines["energy"] == 0


def test_owned_hardware_is_written_off() -> None:
    assert amortised_usd_per_hour(30_000, 3_720, 26_280) == pytest.approx(1.0)
    prices = resolve_prices({"purchase_usd": 30_000, "residual_usd": 3_720, "life_hours": 26_280})
    assert prices.accelerator_usd_per_hour == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"usd_per_hour": -1}, "usd_per_hour"),
        ({"usd_per_hour": "cheap"}, "usd_per_hour"),
        ({"utilisation": 0}, "utilisation"),
        ({"utilisation": 1.5}, "utilisation"),
        ({"device": "abacus"}, "device"),
        ({"usd_per_hour": 1, "electricity_usd_per_kwh": 0.2, "device": "cpu"}, "watts"),
        ({"purchase_usd": 10}, "life_hours"),
        ({"pue": float("nan")}, "pue"),
    ],
)
def test_bad_prices_name_the_key(overrides: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_prices(overrides)
    assert caught.value.where and where in caught.value.where


def test_unknown_gpu_needs_a_rate_and_takes_one() -> None:
    with pytest.raises(RecipeError, match="no list price"):
        resolve_prices(gpu_name="Some GPU 9000")
    prices = resolve_prices({"usd_per_hour": 2.5}, gpu_name="Some GPU 9000")
    assert prices.accelerator_usd_per_hour == 2.5


def test_scenario_survives_json() -> None:
    prices = resolve_prices(cpu_count=2)
    assert PriceScenario.from_dict(prices.to_dict()) == prices


def full_scenario() -> PriceScenario:
    return PriceScenario(
        device="x",
        label="x",
        accelerator_usd_per_hour=2.0,
        host_usd_per_hour=0.5,
        energy_included=False,
        watts=700,
        electricity_usd_per_kwh=0.1,
        pue=1.2,
        utilisation=0.5,
        storage_usd_per_gb_month=7.3,
        egress_usd_per_gb=0.1,
        egress_bytes_per_token=1000,
    )


def test_ledger_is_the_formula_of_the_design() -> None:
    lines = ledger.components_usd_per_hour(
        full_scenario(), tokens_per_second=100, artifact_bytes=10_000_000_000
    )
    assert lines["energy"] == pytest.approx(700 * 1.2 / 1000 * 0.1)
    assert lines["storage"] == pytest.approx(10 * 7.3 / 730)
    assert lines["network"] == pytest.approx(1000 * 100 * 3600 / 1e9 * 0.1)
    cost = ledger.cost_usd_per_mtok(
        full_scenario(), tokens_per_second=100, artifact_bytes=10_000_000_000
    )
    assert cost == pytest.approx(sum(lines.values()) / (100 * 3600 / 1e6) / 0.5)


def test_fast_end_of_the_rate_is_the_cheap_end_of_the_cost() -> None:
    cost = ledger.cost_interval(full_scenario(), Interval(100, 80, 125), artifact_bytes=0)
    assert cost.low is not None and cost.high is not None
    assert cost.low < cost.value < cost.high
    alone = ledger.cost_interval(full_scenario(), Interval(100, None, None), artifact_bytes=0)
    assert alone.low is None and alone.high is None


def test_cost_ratio_is_baseline_over_candidate_cost() -> None:
    scenario = full_scenario()
    ratio = ledger.cost_ratio(
        scenario,
        baseline_rate=100,
        candidate_rate=200,
        speedup=Interval(2.0, 1.9, 2.1),
        baseline_bytes=8_000_000_000,
        candidate_bytes=2_000_000_000,
    )
    expected = ledger.cost_usd_per_mtok(
        scenario, tokens_per_second=100, artifact_bytes=8_000_000_000
    ) / ledger.cost_usd_per_mtok(scenario, tokens_per_second=200, artifact_bytes=2_000_000_000)
    assert ratio.value == pytest.approx(expected)
    assert ratio.low is not None and ratio.high is not None
    assert ratio.low < ratio.value < ratio.high
    free = dataclasses.replace(
        scenario,
        accelerator_usd_per_hour=0,
        host_usd_per_hour=0,
        watts=0,
        storage_usd_per_gb_month=0,
        egress_usd_per_gb=0,
    )
    same = ledger.cost_ratio(
        free,
        baseline_rate=1,
        candidate_rate=2,
        speedup=Interval(2.0, None, None),
        baseline_bytes=1,
        candidate_bytes=1,
    )
    assert same.value == 2.0


def test_every_plan_is_dated_sourced_and_says_what_kind_of_price_it_is() -> None:
    for device in price_rows():
        for plan, entry in plan_rows(device).items():
            assert plan in PLANS and entry["price_kind"] in ("list", "market")
            assert re.fullmatch(r"20\d\d-\d\d", entry["as_of"]) and entry["source"]
            price = entry["purchase_usd" if plan == "purchase" else "usd_per_instance_hour"]
            assert price > 0
    for entry in owned_defaults().values():
        assert entry["source"] and entry["as_of"]


def test_commitment_lowers_the_price() -> None:
    for device in price_rows():
        known = {plan: row.get("usd_per_instance_hour") for plan, row in plan_rows(device).items()}
        longer = [known[p] for p in ("on-demand", "reserved-1y", "reserved-3y") if p in known]
        assert longer == sorted(longer, reverse=True)


def test_rental_plans_take_their_own_price() -> None:
    prices = resolve_prices({"device": "h100", "plan": "reserved-3y"})
    assert prices.accelerator_usd_per_hour == pytest.approx(23.77728 / 8)
    assert prices.plan == "reserved-3y" and prices.price_kind == "list"
    assert prices.energy_included and prices.as_of == "2026-09"
    spot = resolve_prices({"device": "t4", "plan": "spot"})
    assert spot.accelerator_usd_per_hour == 0.1766 and spot.price_kind == "market"
    assert any("typical market figure" in line for line in spot.assumptions)


def test_plan_purchase_pays_for_energy_with_declared_defaults() -> None:
    prices = resolve_prices({"device": "h100", "plan": "purchase"})
    assert prices.accelerator_usd_per_hour == pytest.approx(33_750 / 26_280)
    lines = ledger.components_usd_per_hour(prices, tokens_per_second=1, artifact_bytes=0)
    assert lines["energy"] == pytest.approx(1.275 * 1.54 * 0.0895)
    assert any("EIA" in line for line in prices.assumptions)
    own = resolve_prices(
        {
            "device": "h100",
            "plan": "purchase",
            "purchase_usd": 20_000,
            "residual_usd": 2_000,
            "life_hours": 36_000,
            "watts": 500,
            "pue": 1.2,
            "electricity_usd_per_kwh": 0.1,
            "grid_gco2e_per_kwh": 300,
        }
    )
    assert own.accelerator_usd_per_hour == 0.5 and own.grid_gco2e_per_kwh == 300
    lines = ledger.components_usd_per_hour(own, tokens_per_second=1, artifact_bytes=0)
    assert lines["energy"] == pytest.approx(0.06)


@given(rate=st.floats(0.01, 200.0))
def test_conversion_is_linear(rate: float) -> None:
    wanted = {"device": "h100", "plan": "purchase", "host_usd_per_hour": 0.25}
    dollars = resolve_prices(wanted)
    other = resolve_prices({**wanted, "currency": "EUR", "per_usd": rate})
    assert other.accelerator_usd_per_hour == pytest.approx(dollars.accelerator_usd_per_hour * rate)
    assert other.electricity_usd_per_kwh == pytest.approx(0.0895 * rate)
    assert other.host_usd_per_hour == 0.25, "the recipe's own numbers are in its currency already"
    assert other.currency == "EUR" and other.per_usd == rate


def test_currency_is_named_and_its_rate_dated() -> None:
    prices = resolve_prices(
        {"currency": "EUR", "per_usd": 0.92, "per_usd_as_of": "2026-11-20"}, cpu_count=2
    )
    assert prices.accelerator_usd_per_hour == pytest.approx(0.096 * 0.92)
    assert any("0.92 EUR/USD, of 2026-11-20" in line for line in prices.assumptions)
    undated = resolve_prices({"currency": "EUR", "per_usd": 0.92}, cpu_count=2)
    assert any("does not date" in line for line in undated.assumptions)
    own = resolve_prices({"currency": "EUR", "usd_per_hour": 3.0}, cpu_count=2)
    assert own.accelerator_usd_per_hour == 3.0 and own.per_usd is None


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"plan": "lease"}, "plan"),
        ({"device": "h200", "plan": "spot"}, "plan"),
        ({"device": "cpu", "plan": "purchase"}, "plan"),
        ({"plan": "purchase", "usd_per_hour": 1}, "usd_per_hour"),
        ({"plan": "spot", "purchase_usd": 1}, "purchase_usd"),
        ({"device": "h100", "plan": "purchase", "residual_usd": 1e6}, "residual_usd"),
        ({"device": "h100", "plan": "purchase", "life_hours": 0}, "life_hours"),
        ({"currency": "euro"}, "currency"),
        ({"currency": "EUR"}, "per_usd"),
        ({"currency": "USD", "per_usd": 0.9}, "per_usd"),
        ({"currency": "EUR", "per_usd": 0}, "per_usd"),
    ],
)
def test_bad_plans_and_currencies_name_the_key(overrides: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_prices(overrides)
    assert caught.value.where and where in caught.value.where and caught.value.fix


def test_measured_power_replaces_the_declared() -> None:
    prices = with_watts(full_scenario(), 400.0, "nvml")
    lines = ledger.components_usd_per_hour(prices, tokens_per_second=1, artifact_bytes=0)
    assert lines["energy"] == pytest.approx(0.4 * 1.2 * 0.1)
    assert "nvml" in prices.assumptions[-1]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "reports").glob("*/report.json")), ids=str
)
def test_committed_reports_recompute(path: Path) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["prices"] is None:
        pytest.skip("no cost was measured")
    prices = PriceScenario.from_dict(report["prices"])
    assert prices.to_dict() | report["prices"] == prices.to_dict()
    for variant in report["variants"]:
        for row in variant["performance"]:
            rate = Interval(**row["goodput_tok_s"])
            size = variant["size_bytes"]
            cost = ledger.cost_interval(prices, rate, artifact_bytes=size).to_dict()
            assert cost == row["cost_usd_per_mtok_output"]
            lines = ledger.components_usd_per_hour(
                prices, tokens_per_second=rate.value, artifact_bytes=size
            )
            assert lines == row["components_usd_per_hour"]
    fresh = resolve_prices(cpu_count=2).to_dict()
    for key, value in report["prices"].items():
        assert fresh[key] == value, "the default scenario is what it was"
