"""Prices: a dated table shipped with the package, overridable line by line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
)


@dataclass(frozen=True)
class PriceScenario:
    """Every price that enters the cost ledger, with units in the names.

    `utilisation` is the share of the paid hours in which the device serves (0 to 1]. `watts` is
    declared, not measured. With `energy_included` the rental covers energy and its line is 0.
    `assumptions` says in words what was taken from where.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"assumptions": list(self.assumptions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PriceScenario:
        """The inverse of `to_dict`."""
        return cls(**{**values, "assumptions": tuple(values.get("assumptions", ()))})


@cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files("compressor.measure").joinpath("prices.json").read_text())


def price_rows() -> dict[str, dict[str, Any]]:
    """The price table: row by device id (such as ``cpu``, ``h100``)."""
    return {row["id"]: row for row in _table()["rows"]}


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
    text = json.dumps(_table(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def device_id(
    gpu_name: str | None, rows: Mapping[str, Mapping[str, Any]] | None = None
) -> str | None:
    """The table's id for a GPU by its driver name; ``cpu`` for no GPU; None when not listed."""
    if not gpu_name:
        return "cpu"
    words = set(re.split(r"[^A-Z0-9]+", gpu_name.upper()))
    known = price_rows() if rows is None else rows
    hits = [row["id"] for row in known.values() if row.get("match") in words]
    return hits[0] if hits else None


def amortised_usd_per_hour(purchase_usd: float, residual_usd: float, life_hours: float) -> float:
    """Straight-line price of an hour of owned hardware: (purchase - residual) / life [USD/h]."""
    return (purchase_usd - residual_usd) / life_hours


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


def _known_device(
    device: str | None,
    gpu_name: str | None,
    has_rate: bool,
    rows: Mapping[str, Mapping[str, Any]],
) -> str:
    if device in (None, "auto"):
        found = device_id(gpu_name, rows)
        if found is None and not has_rate:
            raise RecipeError(
                f"no list price is known for {gpu_name}",
                where="measure.prices",
                fix="set measure.prices.usd_per_hour to what an hour of this device costs you",
            )
        return found or str(gpu_name)
    if device not in rows and not has_rate:
        raise RecipeError(
            f"no list price is known for device {device!r}",
            where="measure.prices.device",
            fix=f"name one of {', '.join(rows)}, or set measure.prices.usd_per_hour",
        )
    return str(device)


def resolve_prices(
    overrides: Mapping[str, Any] | None = None,
    *,
    gpu_name: str | None = None,
    cpu_count: int | None = None,
    table: Mapping[str, Any] | None = None,
) -> PriceScenario:
    """The price scenario of a run.

    Args:
        overrides: the recipe's ``measure.prices``; absent and None values take the table's.
        gpu_name: name of the GPU the models run on; None for the CPU.
        cpu_count: CPUs the run may use: the CPU row is scaled by it (general-purpose instances are
            priced per vCPU).
        table: price table instead of the shipped one, such as a `price_basis`'s.

    Raises RecipeError for a device without price, an unusable number, or a declared electricity
    price without watts.
    """
    given = dict(overrides or {})
    prices = _table() if table is None else table
    rows = {row["id"]: row for row in prices["rows"]}
    number = {key: _number(given, key) for key in _NUMBERS}
    rate, purchase = number["usd_per_hour"], number["purchase_usd"]
    own_rate = rate is not None or purchase is not None
    device = _known_device(given.get("device"), gpu_name, own_rate, rows)
    row = rows.get(device)
    assumptions: list[str] = []
    label, as_of, source = device, "", "set in the recipe"
    if purchase is not None and rate is None:
        if not number["life_hours"]:
            raise RecipeError(
                "a purchase price needs the hours over which it is written off",
                where="measure.prices.life_hours",
                fix="set life_hours, for example 26280 (three years)",
            )
        rate = amortised_usd_per_hour(purchase, number["residual_usd"] or 0.0, number["life_hours"])
        assumptions.append("The device is owned: (purchase - residual) / life hours.")
    elif rate is None and row is not None:
        rate = row["usd_per_instance_hour"] / row["devices"]
        label, as_of, source = row["label"], row["as_of"], row["source"]
        assumptions.append(
            f"The hourly rate is a public on-demand list price as of {as_of}; your own rate goes "
            "into measure.prices.usd_per_hour. Cost ratios do not depend on it."
        )
        if row["kind"] == "cpu" and cpu_count and cpu_count != row["vcpus"]:
            rate *= cpu_count / row["vcpus"]
            label = f"{cpu_count} vCPU at the price per vCPU of {row['instance']}"
            assumptions.append(f"The list price of {row['vcpus']} vCPU is scaled to {cpu_count}.")
        if row["devices"] > 1:
            assumptions.append(
                f"The price of one device is 1/{row['devices']} of {row['instance']}'s, its host "
                "included."
            )
    else:
        assumptions.append("The hourly rate is the recipe's own.")
    assert rate is not None
    watts = number["watts"]
    if watts is None and row is not None and row["tdp_watts"] is not None:
        watts = float(row["tdp_watts"])
    electricity = number["electricity_usd_per_kwh"]
    included = not (own_rate and electricity is not None)
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
        label=label,
        accelerator_usd_per_hour=rate,
        host_usd_per_hour=number["host_usd_per_hour"] or 0.0,
        energy_included=included,
        watts=watts,
        electricity_usd_per_kwh=electricity,
        pue=1.0 if number["pue"] is None else number["pue"],
        utilisation=utilisation,
        storage_usd_per_gb_month=number["storage_usd_per_gb_month"] or 0.0,
        egress_usd_per_gb=number["egress_usd_per_gb"] or 0.0,
        egress_bytes_per_token=number["egress_bytes_per_token"] or 0.0,
        currency=prices["currency"],
        source=source,
        as_of=as_of,
        assumptions=tuple(assumptions),
    )
