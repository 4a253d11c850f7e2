"""What a measured rate costs under other prices, and what the answer hangs on. Pure functions.

Every figure is `ledger.cost_usd_per_mtok` under a changed price scenario: money is in the
scenario's `currency`, also where a name says usd. All results have `to_dict`, JSON-ready.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from compressor.errors import RecipeError
from compressor.measure import ledger
from compressor.measure.engines.base import RequestSample
from compressor.measure.metrics import Interval, window_seconds
from compressor.measure.prices import (
    PLANS,
    PriceScenario,
    amortised_usd_per_hour,
    plan_rows,
    resolve_prices,
)

FORMULA = (
    "cost per output token [USD/Mtok] = (accelerator + host + energy + storage + network) [USD/h] "
    "/ (goodput [tok/s] x 3600 / 1e6) / utilisation"
)
SPREAD = 0.2
UTILISATIONS = (0.1, 0.3, 0.5, 0.7, 1.0)
_OWN_PRICE = ("usd_per_hour", "purchase_usd")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _Result:
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return _plain(asdict(self))  # type: ignore[call-overload]


# Plans


@dataclass(frozen=True)
class PlanCost(_Result):
    """What the measured rate costs under one plan."""

    plan: str
    label: str
    price_kind: str
    as_of: str
    source: str
    currency: str
    components_usd_per_hour: dict[str, float]
    total_usd_per_hour: float
    cost_usd_per_mtok_output: Interval
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class ScenarioTable(_Result):
    """One row per plan that has a price; `not_known` names the plans of the table that have none.

    The first row is the recipe's own price, where it gives one.
    """

    device: str
    rows: tuple[PlanCost, ...]
    not_known: tuple[str, ...]
    formula: str = FORMULA


def scenario_table(
    rate: Interval,
    *,
    artifact_bytes: int,
    overrides: Mapping[str, Any] | None = None,
    gpu_name: str | None = None,
    cpu_count: int | None = None,
) -> ScenarioTable:
    """The cost of a measured rate [tok/s] under each plan known for the device.

    `overrides`, `gpu_name` and `cpu_count` are those of `resolve_prices`. The recipe's own price
    stands in a row of its own; everything else that it sets (utilisation, electricity, PUE,
    storage, ...) holds for every plan. Raises RecipeError as `resolve_prices` does.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}

    def resolve(values: Mapping[str, Any]) -> PriceScenario:
        return resolve_prices(values, gpu_name=gpu_name, cpu_count=cpu_count)

    chosen = resolve(given)
    scenarios = [chosen] if any(key in given for key in _OWN_PRICE) else []
    shared = {key: value for key, value in given.items() if key not in _OWN_PRICE}
    known = plan_rows(chosen.device)
    for plan in PLANS:
        if plan in known:
            scenarios.append(resolve({**shared, "device": chosen.device, "plan": plan}))
    rows = []
    for prices in scenarios:
        lines = ledger.components_usd_per_hour(
            prices, tokens_per_second=rate.value, artifact_bytes=artifact_bytes
        )
        rows.append(
            PlanCost(
                plan=prices.plan,
                label=prices.label,
                price_kind=prices.price_kind,
                as_of=prices.as_of,
                source=prices.source,
                currency=prices.currency,
                components_usd_per_hour=lines,
                total_usd_per_hour=sum(lines.values()),
                cost_usd_per_mtok_output=ledger.cost_interval(
                    prices, rate, artifact_bytes=artifact_bytes
                ),
                assumptions=prices.assumptions,
            )
        )
    missing = tuple(plan for plan in PLANS if plan not in known)
    return ScenarioTable(chosen.device, tuple(rows), missing)


# Sensitivity


@dataclass(frozen=True)
class Moved(_Result):
    """One assumption moved alone: its two settings, and the cost from the lower to the higher."""

    assumption: str
    unit: str
    base: float
    settings: tuple[float, float]
    cost_low_usd_per_mtok: float
    cost_high_usd_per_mtok: float
    swing_usd_per_mtok: float
    how: str


@dataclass(frozen=True)
class Sensitivity(_Result):
    """A tornado: rows by falling swing; `not_moved` says why an assumption is not among them."""

    base_usd_per_mtok: float
    currency: str
    rows: tuple[Moved, ...]
    not_moved: dict[str, str]
    sentence: str
    formula: str = FORMULA


def _owned(prices: PriceScenario, **changed: float) -> PriceScenario:
    new = replace(prices, **changed)  # type: ignore[arg-type]
    assert new.purchase_usd is not None and new.life_hours is not None
    rate = amortised_usd_per_hour(new.purchase_usd, new.residual_usd or 0.0, new.life_hours)
    return replace(new, accelerator_usd_per_hour=rate)


@dataclass(frozen=True)
class _Lever:
    name: str
    unit: str
    base: float
    change: Callable[[PriceScenario, float], PriceScenario]
    floor: float = 0.0
    ceiling: float = math.inf
    idle: str = ""  # why moving it would change nothing
    reach: float | None = None  # what the spread is a share of, where that is not the base


def _levers(prices: PriceScenario) -> list[_Lever]:
    free = "0 in this scenario"
    energy = "energy is part of the rental" if prices.energy_included else ""
    rented = "the device is rented"

    def key(name: str) -> Callable[[PriceScenario, float], PriceScenario]:
        return lambda scenario, value: replace(scenario, **{name: value})  # type: ignore[arg-type]

    def owned(name: str) -> Callable[[PriceScenario, float], PriceScenario]:
        return lambda scenario, value: _owned(scenario, **{name: value})

    price, residual = prices.purchase_usd or 0.0, prices.residual_usd or 0.0
    is_owned = prices.purchase_usd is not None
    return [
        _Lever(
            "hourly price",
            f"{prices.currency}/h",
            prices.accelerator_usd_per_hour,
            key("accelerator_usd_per_hour"),
            idle="it follows from purchase price, residual value and life" if is_owned else "",
        ),
        _Lever(
            "purchase price",
            prices.currency,
            price,
            owned("purchase_usd"),
            floor=residual,
            idle="" if is_owned else rented,
        ),
        _Lever(
            "residual value",
            prices.currency,
            residual,
            owned("residual_usd"),
            ceiling=price,
            idle="" if is_owned else rented,
            reach=price,
        ),
        _Lever(
            "life",
            "h",
            prices.life_hours or 0.0,
            owned("life_hours"),
            idle="" if is_owned else rented,
        ),
        _Lever("utilisation", "share", prices.utilisation, key("utilisation"), ceiling=1.0),
        _Lever(
            "electricity",
            f"{prices.currency}/kWh",
            prices.electricity_usd_per_kwh or 0.0,
            key("electricity_usd_per_kwh"),
            idle=energy,
        ),
        _Lever("PUE", "ratio", prices.pue, key("pue"), floor=1.0, idle=energy),
        _Lever("power", "W", prices.watts or 0.0, key("watts"), idle=energy),
        _Lever("host", f"{prices.currency}/h", prices.host_usd_per_hour, key("host_usd_per_hour")),
        _Lever(
            "storage",
            f"{prices.currency}/GB-month",
            prices.storage_usd_per_gb_month,
            key("storage_usd_per_gb_month"),
        ),
        _Lever(
            "egress",
            f"{prices.currency}/GB",
            prices.egress_usd_per_gb,
            key("egress_usd_per_gb"),
            idle="" if prices.egress_bytes_per_token else free,
        ),
    ]


def sensitivity(
    prices: PriceScenario,
    rate: Interval,
    *,
    artifact_bytes: int,
    spread: float = SPREAD,
    spreads: Mapping[str, float] | None = None,
) -> Sensitivity:
    """Each assumption moved alone, the others held.

    Args:
        prices, rate, artifact_bytes: the base; the rate [tok/s] moves over its own interval.
        spread: how far every other assumption moves, as a share of itself (0 to below 1); the
            residual value moves by that share of the purchase price.
        spreads: another share for some assumptions, by their names in the rows.

    Utilisation stays at or below 1, PUE at or above 1. Raises RecipeError for a spread outside
    [0, 1) or a name that is not an assumption.
    """
    levers = _levers(prices)
    own = dict(spreads or {})
    for name, share in {"spread": spread, **own}.items():
        if name != "spread" and name not in {lever.name for lever in levers}:
            raise RecipeError(
                f"{name!r} is not an assumption",
                where="sensitivity.spreads",
                fix=f"use {', '.join(lever.name for lever in levers)}",
            )
        if not 0 <= share < 1:
            raise RecipeError(
                f"a range of {share} is not a share of 0 to below 1",
                where=f"sensitivity.{name}",
                fix="for example 0.2 for 20% up and down",
            )

    def cost(scenario: PriceScenario, tokens_per_second: float = rate.value) -> float:
        return ledger.cost_usd_per_mtok(
            scenario, tokens_per_second=tokens_per_second, artifact_bytes=artifact_bytes
        )

    base = cost(prices)
    rows: list[Moved] = []
    not_moved: dict[str, str] = {}

    def add(
        name: str, unit: str, at: float, ends: Sequence[float], costs: Sequence[float], how: str
    ) -> None:
        low, high = min(base, *costs), max(base, *costs)
        settings = (float(ends[0]), float(ends[1]))
        rows.append(Moved(name, unit, at, settings, low, high, high - low, how))

    if rate.low is None or rate.high is None:
        not_moved["throughput"] = "it was measured without an interval"
    else:
        ends = (rate.low, rate.high)
        how = "over its 95% interval"
        add("throughput", "tok/s", rate.value, ends, [cost(prices, end) for end in ends], how)
    for lever in levers:
        share = own.get(lever.name, spread)
        reach = share * (lever.base if lever.reach is None else lever.reach)
        if lever.idle or reach == 0:
            not_moved[lever.name] = lever.idle or (
                "its range is 0" if share == 0 else "0 in this scenario"
            )
            continue
        low = max(lever.floor, lever.base - reach)
        high = min(lever.ceiling, lever.base + reach)
        how = f"{share:.0%} down and up"
        if lever.reach is not None:
            how = f"{share:.0%} of the purchase price down and up"
        if low > lever.base - reach:
            how += f", not below {low:g}"
        if high < lever.base + reach:
            how += f", not above {high:g}"
        costs = [cost(lever.change(prices, value)) for value in (low, high)]
        add(lever.name, lever.unit, lever.base, (low, high), costs, how)
    rows.sort(key=lambda row: -row.swing_usd_per_mtok)
    return Sensitivity(base, prices.currency, tuple(rows), not_moved, _most(rows, base, prices))


def _most(rows: Sequence[Moved], base: float, prices: PriceScenario) -> str:
    if not rows or rows[0].swing_usd_per_mtok == 0:
        return "No assumption that was moved changes the cost."
    first, unit = rows[0], f"{prices.currency} per million output tokens"
    return (
        f"The cost depends most on {first.assumption} ({first.how}): from "
        f"{first.cost_low_usd_per_mtok:.4g} to {first.cost_high_usd_per_mtok:.4g} {unit}, "
        f"{base:.4g} as measured and declared."
    )


# Break-even


@dataclass(frozen=True)
class BreakEven(_Result):
    """After how many output tokens the compression has paid for itself; None with a `reason`."""

    run_cost_usd: float
    saving_usd_per_mtok: float
    tokens: float | None
    days: float | None
    reason: str
    currency: str
    formula: str = (
        "tokens = run seconds / 3600 x hourly price / (baseline cost - variant cost) x 1e6; "
        "days = tokens / (tok/s x utilisation x 86400)"
    )


def break_even(
    *,
    run_seconds: float,
    run_usd_per_hour: float,
    baseline_usd_per_mtok: float,
    variant_usd_per_mtok: float,
    tokens_per_second: float,
    utilisation: float = 1.0,
    currency: str = "USD",
) -> BreakEven:
    """When the compression run has paid for itself.

    Args:
        run_seconds: measured time of the stages that made the variant [s].
        run_usd_per_hour: price of the machine that they ran on.
        baseline_usd_per_mtok, variant_usd_per_mtok: cost of output tokens.
        tokens_per_second, utilisation: how fast the variant's tokens are made.
    """
    run_cost = run_seconds / 3600.0 * run_usd_per_hour
    saving = baseline_usd_per_mtok - variant_usd_per_mtok
    if saving <= 0:
        reason = "The variant is not cheaper than the baseline, so nothing pays for the run."
        return BreakEven(run_cost, saving, None, None, reason, currency)
    tokens = run_cost / saving * 1e6
    days = tokens / (tokens_per_second * utilisation * 86400.0)
    return BreakEven(run_cost, saving, tokens, days, "", currency)


# Input and output


@dataclass(frozen=True)
class Totals:
    """Tokens and device time of a group of requests with one mix.

    `seconds` is the device's, not the requests' latency: the window in which at least one of them
    was in flight, which requests served together share.
    """

    input_tokens: float
    output_tokens: float
    seconds: float
    requests: int = 1

    @classmethod
    def of(cls, samples: Sequence[RequestSample]) -> Totals:
        """From requests; those that failed have no tokens, but their time counts."""
        answered = [sample for sample in samples if not sample.error]
        return cls(
            sum(sample.prompt_tokens for sample in answered),
            sum(sample.output_tokens for sample in answered),
            window_seconds(samples),
            len(answered),
        )


@dataclass(frozen=True)
class SplitCost(_Result):
    """Cost of input and output tokens apart, and of a mix of both.

    `residual_share` is the length of what the fit leaves / the length of the measured seconds:
    near 0 the two rates explain all points; `worst_residual_share` is that of the worst point.
    """

    seconds_per_input_token: float
    seconds_per_output_token: float
    residual_seconds: float
    residual_share: float
    worst_residual_share: float
    points: int
    input_usd_per_mtok: float
    output_usd_per_mtok: float
    mix_input_tokens: float
    mix_output_tokens: float
    blended_usd_per_mtok_output: float
    blended_usd_per_mtok_all: float
    currency: str
    formula: str = (
        "seconds = a x input tokens + b x output tokens per request, by non-negative least "
        "squares; input [USD/Mtok] = hourly price / 3600 x a x 1e6 / utilisation, output the same "
        "with b and with the network, which counts output tokens"
    )


def split_input_output(
    totals: Sequence[Totals],
    prices: PriceScenario,
    *,
    artifact_bytes: int,
    mix: tuple[float, float],
) -> SplitCost:
    """Cost of input and output tokens apart, from points with different mixes of the two.

    Args:
        totals: at least two groups of requests whose input/output ratios differ, for example one
            output token each (prefill) and one short prompt each (decode), at one concurrency.
        prices, artifact_bytes: as in the ledger.
        mix: input and output tokens of a request of the declared load.

    Raises RecipeError where the points do not tell the two apart, or the mix has no output.
    """
    where = "measure.workload"
    table = np.array(
        [[t.input_tokens / t.requests, t.output_tokens / t.requests] for t in totals], dtype=float
    ).reshape(-1, 2)
    seconds = np.array([t.seconds / t.requests for t in totals], dtype=float)
    scaled = table / np.maximum(np.abs(table).max(axis=0, initial=0.0), 1e-300)
    if len(totals) < 2 or np.linalg.matrix_rank(scaled, tol=1e-6) < 2:
        raise RecipeError(
            "all points have the same mix of input and output tokens, so their costs cannot be "
            "told apart",
            where=where,
            fix="measure a second point, for example long prompts with one or two output tokens",
        )
    if mix[1] <= 0 or mix[0] < 0:
        raise RecipeError(
            f"a request of {mix[0]} input and {mix[1]} output tokens has no price per output token",
            where=where,
            fix="give a mix with output tokens",
        )
    (per_input, per_output), residual = nnls(table, seconds)
    left = np.abs(table @ np.array([per_input, per_output]) - seconds)
    hourly = ledger.components_usd_per_hour(
        prices, tokens_per_second=0.0, artifact_bytes=artifact_bytes
    )  # at rate 0 the network, which goes with output tokens, is 0
    per_second = sum(hourly.values()) / 3600.0 * 1e6 / prices.utilisation
    network = prices.egress_bytes_per_token / 1e9 * prices.egress_usd_per_gb * 1e6
    input_cost = per_second * per_input
    output_cost = per_second * per_output + network / prices.utilisation
    total = mix[0] * input_cost + mix[1] * output_cost
    return SplitCost(
        seconds_per_input_token=float(per_input),
        seconds_per_output_token=float(per_output),
        residual_seconds=float(residual),
        residual_share=float(residual / np.linalg.norm(seconds)),
        worst_residual_share=float((left / seconds).max()),
        points=len(totals),
        input_usd_per_mtok=float(input_cost),
        output_usd_per_mtok=float(output_cost),
        mix_input_tokens=float(mix[0]),
        mix_output_tokens=float(mix[1]),
        blended_usd_per_mtok_output=float(total / mix[1]),
        blended_usd_per_mtok_all=float(total / sum(mix)),
        currency=prices.currency,
    )


# Utilisation


@dataclass(frozen=True)
class UtilisationCost(_Result):
    """The cost if the device served in this share of the paid hours."""

    utilisation: float
    cost_usd_per_mtok_output: Interval


def utilisation_table(
    prices: PriceScenario,
    rate: Interval,
    *,
    artifact_bytes: int,
    shares: Sequence[float] = UTILISATIONS,
) -> tuple[UtilisationCost, ...]:
    """The cost of a measured rate [tok/s] at several utilisations (0 to 1], all else as it is.

    The whole hour is charged, its energy too, however much of it is used.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise RecipeError(
                f"utilisation is {share}, it must be above 0 and at most 1",
                where="measure.prices.utilisation",
                fix="give shares such as 0.5",
            )
    return tuple(
        UtilisationCost(
            share,
            ledger.cost_interval(
                replace(prices, utilisation=share), rate, artifact_bytes=artifact_bytes
            ),
        )
        for share in shares
    )
