"""Prices: a dated table shipped with the package, overridable line by line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from compressor.errors import RecipeError

_NUMBERS = (
    "usd_per_hour",
    "host_usd_per_hour",
    "purchase_usd",
    "residual_usd",
    "life_hours",
    "watts",
    "electricity_usd_per_kwh",
    "pue",
    "utilisation",
    "storage_usd_per_gb_month",
    "egress_usd_per_gb",
    "egress_bytes_per_token",
    "grid_gco2e_per_kwh",
)
_USED: ContextVar[dict[str, Any] | None] = ContextVar("price_table", default=None)
PLANS = ("on-demand", "reserved-1y", "reserved-3y", "spot", "purchase")


@dataclass(frozen=True)
class PriceScenario:
    """Every price that enters the cost ledger, with units in the names.

    Money is in `currency`, also where a name says usd. `utilisation` is the share of the paid hours
    in which the device serves (0 to 1]. `watts` is declared, unless `assumptions` says measured.
    With `energy_included` the rental covers energy and its line is 0. `assumptions` says in words
    what was taken from where.

    `plan` is one of `PLANS` or ``own rate``; `price_kind` is ``list``, ``market`` or ``recipe``.
    `purchase_usd`, `residual_usd` and `life_hours` are there for owned hardware, whose
    `accelerator_usd_per_hour` follows from them. `per_usd` is the exchange rate by which prices of
    the table were converted, None for USD.
    """

    device: str
    label: str
    accelerator_usd_per_hour: float
    host_usd_per_hour: float = 0.0
    energy_included: bool = True
    watts: float | None = None
    electricity_usd_per_kwh: float | None = None
    pue: float = 1.0
    utilisation: float = 1.0
    storage_usd_per_gb_month: float = 0.0
    egress_usd_per_gb: float = 0.0
    egress_bytes_per_token: float = 0.0
    currency: str = "USD"
    source: str = ""
    as_of: str = ""
    assumptions: tuple[str, ...] = ()
    plan: str = ""
    price_kind: str = ""
    purchase_usd: float | None = None
    residual_usd: float | None = None
    life_hours: float | None = None
    grid_gco2e_per_kwh: float | None = None
    per_usd: float | None = None
    per_usd_as_of: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"assumptions": list(self.assumptions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PriceScenario:
        """The inverse of `to_dict`."""
        return cls(**{**values, "assumptions": tuple(values.get("assumptions", ()))})


@cache
def _shipped_table() -> dict[str, Any]:
    return json.loads(resources.files("compressor.measure").joinpath("prices.json").read_text())


def _table() -> dict[str, Any]:
    return _USED.get() or _shipped_table()


@contextmanager
def price_table(table: Mapping[str, Any] | None) -> Iterator[None]:
    """Within it prices come from another table than the shipped one, such as a `price_basis`'s."""
    token = _USED.set(dict(table) if table else None)
    try:
        yield
    finally:
        _USED.reset(token)


def price_basis(
    scenario: PriceScenario, *, gpu_name: str | None, cpu_count: int | None
) -> dict[str, Any]:
    """What `resolve_prices` made a scenario from beside the overrides, for whoever checks it:
    ``gpu_name``, ``cpu_count``, ``table`` with the row that was used, ``table_sha256`` of the whole
    table (canonical JSON).
    """
    row = price_rows().get(scenario.device)
    return {
        "gpu_name": gpu_name,
        "cpu_count": cpu_count,
        "table": _table() | {"rows": [row] if row else []},
        "table_sha256": table_sha256(),
    }


def table_sha256() -> str:
    """SHA-256 (hex) of the shipped table as JSON with sorted keys and no spaces."""
    text = json.dumps(_shipped_table(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def price_rows() -> dict[str, dict[str, Any]]:
    """The price table: row by device id (such as ``cpu``, ``h100``)."""
    return {row["id"]: row for row in _table()["rows"]}


def plan_rows(device: str) -> dict[str, dict[str, Any]]:
    """What the table knows of a device, by plan; empty for a device that is not listed.

    A rental has ``usd_per_instance_hour``, the plan ``purchase`` has ``purchase_usd`` per device
    [USD] and ``watts``; each has ``price_kind`` (``list`` or ``market``), ``as_of`` and ``source``.
    """
    row = price_rows().get(device)
    if row is None:
        return {}
    keys = ("usd_per_instance_hour", "as_of", "source")
    on_demand = {key: row[key] for key in keys} | {"price_kind": row.get("price_kind", "list")}
    return {"on-demand": on_demand, **row["plans"]}


def owned_defaults() -> dict[str, dict[str, Any]]:
    """What the plan ``purchase`` assumes unless the recipe says: value, as_of and source by key."""
    return _table()["owned"]


def device_id(gpu_name: str | None) -> str | None:
    """The table's id for a GPU by its driver name; ``cpu`` for no GPU; None when not listed, as a
    slice of one is not."""
    if not gpu_name:
        return "cpu"
    if is_slice(gpu_name):
        return None
    words = set(re.split(r"[^A-Z0-9]+", gpu_name.upper()))
    # Rows that ask for more words come first in the table.
    asked = {id_: row["match"].split() for id_, row in price_rows().items() if "match" in row}
    hits = [id_ for id_, needed in asked.items() if words.issuperset(needed)]
    return hits[0] if hits else None


def is_slice(gpu_name: str) -> bool:
    """Whether a driver's name is that of a MIG slice, such as ``NVIDIA H200 MIG 1g.18gb``."""
    return "MIG" in re.split(r"[^A-Z0-9]+", gpu_name.upper())


def amortised_usd_per_hour(purchase_usd: float, residual_usd: float, life_hours: float) -> float:
    """Straight-line price of an hour of owned hardware: (purchase - residual) / life [USD/h]."""
    return (purchase_usd - residual_usd) / life_hours


def with_watts(prices: PriceScenario, watts: float, method: str) -> PriceScenario:
    """The scenario with a mean power [W] that was measured by `method` instead of the declared."""
    note = f"Power is measured ({method}): {watts:.4g} W on average."
    return replace(prices, watts=watts, assumptions=(*prices.assumptions, note))


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise RecipeError(
            f"{value!r} is not a price: a number of 0 or more is needed",
            where=f"measure.prices.{key}",
            fix="give a plain number in the unit that the key names",
        )
    return float(value)


def _known_device(device: str | None, gpu_name: str | None, has_rate: bool) -> str:
    if device in (None, "auto"):
        found = device_id(gpu_name)
        if found is None and not has_rate:
            raise RecipeError(
                f"no list price is known for {gpu_name}",
                where="measure.prices",
                fix="set measure.prices.usd_per_hour to what an hour of this device costs you",
            )
        return found or str(gpu_name)
    if device not in price_rows() and not has_rate:
        raise RecipeError(
            f"no list price is known for device {device!r}",
            where="measure.prices.device",
            fix=f"name one of {', '.join(price_rows())}, or set measure.prices.usd_per_hour",
        )
    return str(device)


@dataclass(frozen=True)
class _Currency:
    """The scenario's currency, and what one US dollar of the table is in it (None: not given)."""

    name: str
    per_usd: float | None
    as_of: str

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Currency:
        name = given.get("currency") or "USD"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Z]{3}", name):
            raise RecipeError(
                f"{name!r} is not a currency",
                where="measure.prices.currency",
                fix="give three capital letters, for example EUR",
            )
        rate = _number(given, "per_usd")
        if rate == 0 or (name == "USD" and rate not in (None, 1.0)):
            raise RecipeError(
                f"{rate:g} {name} per USD is no exchange rate",
                where="measure.prices.per_usd",
                fix="give what one US dollar is in the recipe's currency, for example "
                "currency: EUR with per_usd: 0.92",
            )
        as_of = str(given.get("per_usd_as_of") or "")
        return cls(name, 1.0 if name == "USD" else rate, as_of)

    def of_table(self, usd: float) -> float:
        """A price of the table in this currency."""
        if self.per_usd is None:
            raise RecipeError(
                f"the table's prices are in USD, and {self.name} per USD is not given",
                where="measure.prices.per_usd",
                fix="set per_usd to what one US dollar is in the recipe's currency, and "
                "per_usd_as_of to the day of that rate",
            )
        return usd * self.per_usd

    def notes(self) -> list[str]:
        if self.name == "USD":
            return []
        note = f"All money is in {self.name}, under keys that say usd too."
        if self.per_usd is not None:
            day = f"of {self.as_of}" if self.as_of else "that the recipe does not date"
            note += (
                f" Prices of the table are converted at {self.per_usd:g} {self.name}/USD, {day}."
            )
        return [note]


@dataclass
class _Rate:
    """An hourly price and where it comes from, while a scenario is put together."""

    per_hour: float
    label: str
    as_of: str
    source: str
    plan: str
    kind: str
    notes: list[str]
    watts: float | None = None
    purchase: float | None = None
    residual: float | None = None
    life_hours: float | None = None


def _plan(given: Mapping[str, Any], number: Mapping[str, float | None]) -> str | None:
    plan = given.get("plan")
    if plan is None:
        return None
    if plan not in PLANS:
        raise RecipeError(
            f"{plan!r} is not a plan",
            where="measure.prices.plan",
            fix=f"use one of {', '.join(PLANS)}",
        )
    clash = "usd_per_hour" if plan == "purchase" else "purchase_usd"
    if number[clash] is not None:
        raise RecipeError(
            f"plan {plan} and {clash} are two prices for one device",
            where=f"measure.prices.{clash}",
            fix="remove one of the two",
        )
    return str(plan)


def _entry(device: str, plan: str) -> dict[str, Any]:
    known = plan_rows(device)
    if plan not in known:
        price = "purchase_usd" if plan == "purchase" else "usd_per_hour"
        raise RecipeError(
            f"what {device} costs under the plan {plan} is not known",
            where="measure.prices.plan",
            fix=f"use one of {', '.join(known)}, or set measure.prices.{price}"
            if known
            else f"set measure.prices.{price}",
        )
    return known[plan]


def _dated(entry: Mapping[str, Any]) -> str:
    if entry["price_kind"] == "market":
        return f"a typical market figure as of {entry['as_of']}"
    return f"a public list price as of {entry['as_of']}"


def _purchased(
    device: str, number: Mapping[str, float | None], plan: str | None, currency: _Currency
) -> _Rate:
    """Owned hardware: (purchase - residual) / life; the recipe's numbers before the table's."""
    price, residual, life = (number[key] for key in ("purchase_usd", "residual_usd", "life_hours"))
    if plan is None and not life:
        raise RecipeError(
            "a purchase price needs the hours over which it is written off",
            where="measure.prices.life_hours",
            fix="set life_hours, for example 26280 (three years)",
        )
    note = "The device is owned: (purchase - residual) / life hours."
    label, as_of, source, kind, watts = device, "", "set in the recipe", "recipe", None
    if price is None:
        entry = _entry(device, "purchase")
        price = currency.of_table(entry["purchase_usd"])
        label = f"{price_rows()[device]['label'].split(' (')[0]}, bought"
        as_of, source, kind = entry["as_of"], entry["source"], entry["price_kind"]
        watts = float(entry["watts"])
        note += f" Its price is {_dated(entry)}."
    notes = [note]
    if life is None:
        life = float(owned_defaults()["life_hours"]["value"])
        notes.append(f"Life: {life:g} h ({owned_defaults()['life_hours']['source']}).")
    if residual is None:
        residual = 0.0
        if plan is not None:
            notes.append(f"Residual value: 0 ({owned_defaults()['residual_usd']['source']}).")
    if life == 0 or residual > price:
        key = "life_hours" if life == 0 else "residual_usd"
        raise RecipeError(
            "the hours of life are 0" if life == 0 else "the residual is above the purchase price",
            where=f"measure.prices.{key}",
            fix="give what is left of the price at the end, and the hours until then",
        )
    rate = amortised_usd_per_hour(price, residual, life)
    return _Rate(rate, label, as_of, source, "purchase", kind, notes, watts, price, residual, life)


def _rented(device: str, plan: str, cpu_count: int | None, currency: _Currency) -> _Rate:
    """A price of the table under a rental plan."""
    entry, row = _entry(device, plan), price_rows()[device]
    rate = currency.of_table(entry["usd_per_instance_hour"]) / row["devices"]
    label = row["label"] if plan == "on-demand" else f"{row['label']}, {plan}"
    if plan == "on-demand" and entry["price_kind"] == "list":
        what = f"a public on-demand list price as of {entry['as_of']}"
    else:
        what = f"{_dated(entry)} for the plan {plan}"
    notes = [
        f"The hourly rate is {what}; your own rate goes "
        "into measure.prices.usd_per_hour. Cost ratios do not depend on it."
    ]
    if plan.startswith("reserved"):
        notes.append("A reserved device is paid in every hour of its term, used or not.")
    elif plan == "spot":
        notes.append("A spot device can be taken away; the work lost then is not priced.")
    if row["kind"] == "cpu" and cpu_count and cpu_count != row["vcpus"]:
        rate *= cpu_count / row["vcpus"]
        label = f"{cpu_count} vCPU at the price per vCPU of {row['instance']}"
        notes.append(f"The list price of {row['vcpus']} vCPU is scaled to {cpu_count}.")
    if row["devices"] > 1:
        notes.append(
            f"The price of one device is 1/{row['devices']} of {row['instance']}'s, its host "
            "included."
        )
    return _Rate(rate, label, entry["as_of"], entry["source"], plan, entry["price_kind"], notes)


def resolve_prices(
    overrides: Mapping[str, Any] | None = None,
    *,
    gpu_name: str | None = None,
    cpu_count: int | None = None,
) -> PriceScenario:
    """The price scenario of a run.

    Args:
        overrides: the recipe's ``measure.prices``; absent and None values take the table's.
        gpu_name: name of the GPU the models run on; None for the CPU.
        cpu_count: CPUs the run may use: the CPU row is scaled by it (general-purpose instances are
            priced per vCPU).

    Without ``plan`` the price is the recipe's own, or else the table's on-demand price. With
    ``currency`` the recipe's numbers are in it and the table's are converted by ``per_usd``.

    Raises RecipeError for a device or plan without price, an unusable number, two prices for one
    device, a currency without exchange rate where the table is needed, or a declared electricity
    price without watts.
    """
    given = dict(overrides or {})
    number = {key: _number(given, key) for key in _NUMBERS}
    currency, plan = _Currency.of(given), _plan(given, number)
    own_rate = number["usd_per_hour"] is not None or number["purchase_usd"] is not None
    device = _known_device(given.get("device"), gpu_name, own_rate)
    if number["usd_per_hour"] is not None:
        notes = ["The hourly rate is the recipe's own."]
        own, rate = plan or "own rate", number["usd_per_hour"]
        found = _Rate(rate, device, "", "set in the recipe", own, "recipe", notes)
    elif plan == "purchase" or number["purchase_usd"] is not None:
        found = _purchased(device, number, plan, currency)
    else:
        found = _rented(device, plan or "on-demand", cpu_count, currency)
    assumptions = [*found.notes, *currency.notes()]

    watts, row = number["watts"], price_rows().get(device)
    if watts is None:
        watts = found.watts
    if watts is None and row is not None and row["tdp_watts"] is not None:
        watts = float(row["tdp_watts"])
    electricity, pue = number["electricity_usd_per_kwh"], number["pue"]
    if plan == "purchase":
        if electricity is None:
            default = owned_defaults()["electricity_usd_per_kwh"]
            electricity = currency.of_table(default["value"])
            assumptions.append(
                f"Electricity: {electricity:.4g} {currency.name}/kWh ({default['source']}, "
                f"{default['as_of']})."
            )
        if pue is None:
            default = owned_defaults()["pue"]
            pue = float(default["value"])
            assumptions.append(f"PUE: {pue:g} ({default['source']}).")
    included = not (own_rate or plan == "purchase") or electricity is None
    if not included:
        if watts is None:
            raise RecipeError(
                "an electricity price was given, but not how much power the device draws",
                where="measure.prices.watts",
                fix="set watts to the mean power draw of the device under load",
            )
        assumptions.append("Energy is charged: declared watts x PUE x electricity price.")
    elif electricity is not None:
        assumptions.append(
            "Energy is part of the rental's list price, so the recipe's electricity price is not "
            "charged again."
        )
    else:
        assumptions.append("Energy is part of the hourly rate and is not charged again.")
    utilisation = 1.0 if number["utilisation"] is None else number["utilisation"]
    if not 0 < utilisation <= 1:
        raise RecipeError(
            f"utilisation is {utilisation}, it must be above 0 and at most 1",
            where="measure.prices.utilisation",
            fix="give the share of paid hours in which the device serves, for example 0.6",
        )
    if utilisation == 1:
        assumptions.append("The device serves in every paid hour (utilisation 1).")
    return PriceScenario(
        device=device,
        label=found.label,
        accelerator_usd_per_hour=found.per_hour,
        host_usd_per_hour=number["host_usd_per_hour"] or 0.0,
        energy_included=included,
        watts=watts,
        electricity_usd_per_kwh=electricity,
        pue=1.0 if pue is None else pue,
        utilisation=utilisation,
        storage_usd_per_gb_month=number["storage_usd_per_gb_month"] or 0.0,
        egress_usd_per_gb=number["egress_usd_per_gb"] or 0.0,
        egress_bytes_per_token=number["egress_bytes_per_token"] or 0.0,
        currency=currency.name,
        source=found.source,
        as_of=found.as_of,
        assumptions=tuple(assumptions),
        plan=found.plan,
        price_kind=found.kind,
        purchase_usd=found.purchase,
        residual_usd=found.residual,
        life_hours=found.life_hours,
        grid_gco2e_per_kwh=number["grid_gco2e_per_kwh"],
        per_usd=None if currency.name == "USD" else currency.per_usd,
        per_usd_as_of=currency.as_of,
    )
