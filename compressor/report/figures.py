"""Figures as text: one place for units, digits and signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MISSING = "–"
_MINUS = "−"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated, never in exponent form above 1e-6."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    magnitude = f"{abs(value):.{digits - 1}e}"
    exponent = int(magnitude.split("e")[1])
    decimals = max(0, digits - 1 - exponent)
    text = magnitude if exponent < -6 else f"{float(magnitude):,.{decimals}f}"
    return f"{_MINUS}{text}" if value < 0 else text


def count(value: int | None) -> str:
    """A whole number, thousands separated."""
    return MISSING if value is None else f"{value:,}"


def percent(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A share as a percentage with `digits` decimals."""
    if value is None:
        return MISSING
    text = f"{abs(value) * 100:.{digits}f}%"
    if not text.strip("0.%"):
        return text
    return (_MINUS if value < 0 else "+" if signed else "") + text


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return MISSING
    if value < 100:
        return f"{number(value, 2 if value < 10 else 3)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def currency(report: Mapping[str, Any]) -> str:
    """What money is counted in."""
    return (report["prices"] or {}).get("currency") or "USD"


def load(row: Mapping[str, Any]) -> str:
    """The point of a performance row: so many requests at the same time, or arriving a second."""
    rate = row.get("rate_per_s")
    return f"concurrency {row['concurrency']}" if rate is None else f"{number(rate)} requests/s"


def between(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """``low to high``, or empty when there is no interval."""
    if not interval or interval.get("low") is None or interval.get("high") is None:
        return ""
    return f"{number(interval['low'], digits)} to {number(interval['high'], digits)}"


def ratio(interval: Mapping[str, Any] | None) -> str:
    """A ratio with a multiplication sign."""
    return f"{number(interval['value'])}×" if interval else MISSING


def change_interval(bounds: tuple[float, float] | list[float] | None) -> str:
    """``low to high`` of a relative change, in percent, or empty."""
    if bounds is None:
        return ""
    return f"{percent(bounds[0], signed=True)} to {percent(bounds[1], signed=True)}"
