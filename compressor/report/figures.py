"""Figures as text: one place for units, digits and signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def _place(interval: Mapping[str, Any]) -> int | None:
    """Decimals that a 95% interval supports; None without one.

    The last digit shown is the first of half the interval's width, one more where that is below 3:
    as the Particle Data Group rounds. Two to four significant digits of the value are kept.
    """
    low, high, value = (interval.get(key) for key in ("low", "high", "value"))
    if low is None or high is None or not high > low or not value:
        return None
    half = (high - low) / 2
    exponent = math.floor(math.log10(half))
    place = exponent - (half / 10**exponent < 3)
    first = -math.floor(math.log10(abs(value)))
    return min(max(-place, first + 1), first + 3)


def _to_place(value: float, place: int) -> str:
    text = f"{abs(round(value, place)):,.{max(0, place)}f}"
    return f"{_MINUS}{text}" if value < 0 and text.strip("0.,") else text


def measured(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A figure with the digits that its interval supports; `digits` significant ones without."""
    if not interval:
        return MISSING
    place = _place(interval)
    if place is None or place > 6:
        return number(interval["value"], digits)
    return _to_place(interval["value"], place)


def between(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """``low to high`` in the digits that the interval supports, or empty when there is none."""
    if not interval or interval.get("low") is None or interval.get("high") is None:
        return ""
    place = _place(interval)
    if place is None or place > 6:
        return f"{number(interval['low'], digits)} to {number(interval['high'], digits)}"
    return f"{_to_place(interval['low'], place)} to {_to_place(interval['high'], place)}"


def ratio(interval: Mapping[str, Any] | None) -> str:
    """A ratio with a multiplication sign."""
    return f"{measured(interval)}×" if interval else MISSING


def _change_digits(bounds: Sequence[float] | None) -> int:
    """Decimals of a percentage that an interval of a relative change supports, 0 to 2."""
    if bounds is None or not bounds[1] > bounds[0]:
        return 2
    half = 50 * (bounds[1] - bounds[0])
    exponent = math.floor(math.log10(half))
    return min(2, max(0, (half / 10**exponent < 3) - exponent))


def change(value: float | None, bounds: Sequence[float] | None = None) -> str:
    """A relative change in percent, signed, with the digits that its interval supports."""
    return percent(value, _change_digits(bounds), signed=True)


def change_interval(bounds: Sequence[float] | None) -> str:
    """``low to high`` of a relative change, in percent, or empty."""
    if bounds is None:
        return ""
    return f"{change(bounds[0], bounds)} to {change(bounds[1], bounds)}"


def listed(names: Sequence[str]) -> str:
    """Names with commas, and before the last one `and`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
