"""Cost per token: every component in USD per hour, then per million tokens.

cost [USD/Mtok] = (accelerator + host + energy + storage + network) [USD/h]
                  / (goodput [tok/s] x 3600 / 1e6) / utilisation
"""

from __future__ import annotations

from compressor.measure.metrics import Interval
from compressor.measure.prices import PriceScenario

HOURS_PER_MONTH = 730.0


def components_usd_per_hour(
    prices: PriceScenario, *, tokens_per_second: float, artifact_bytes: int
) -> dict[str, float]:
    """The five lines of the ledger [USD/h].

    Energy = W x PUE / 1000 x USD/kWh (0 where the rental includes it); storage = artifact GB x
    USD/GB-month / 730; network = egress bytes per token x tok/s x 3600 / 1e9 x USD/GB. GB is 1e9
    bytes.
    """
    energy = 0.0
    if not prices.energy_included:
        watts, electricity = prices.watts or 0.0, prices.electricity_usd_per_kwh or 0.0
        energy = watts * prices.pue / 1000.0 * electricity
    egress_gb = prices.egress_bytes_per_token * tokens_per_second * 3600.0 / 1e9
    return {
        "accelerator": prices.accelerator_usd_per_hour,
        "host": prices.host_usd_per_hour,
        "energy": energy,
        "storage": artifact_bytes / 1e9 * prices.storage_usd_per_gb_month / HOURS_PER_MONTH,
        "network": egress_gb * prices.egress_usd_per_gb,
    }


def cost_usd_per_mtok(
    prices: PriceScenario, *, tokens_per_second: float, artifact_bytes: int
) -> float:
    """USD per million tokens at a rate [tok/s] > 0; ZeroDivisionError at 0."""
    lines = components_usd_per_hour(
        prices, tokens_per_second=tokens_per_second, artifact_bytes=artifact_bytes
    )
    return sum(lines.values()) / (tokens_per_second * 3600.0 / 1e6) / prices.utilisation


def list_cost_usd_per_mtok(
    *,
    prompt_tokens: int,
    output_tokens: int,
    usd_per_mtok_input: float | None,
    usd_per_mtok_output: float | None,
) -> float:
    """USD per million output tokens of a provider who is paid by the token, the input that came
    with them included; a price that is None counts as 0."""
    paid = prompt_tokens * (usd_per_mtok_input or 0) + output_tokens * (usd_per_mtok_output or 0)
    return paid / output_tokens


def cost_interval(prices: PriceScenario, rate: Interval, *, artifact_bytes: int) -> Interval:
    """Cost [USD/Mtok] from a rate's interval [tok/s]: the fast end is the cheap end."""

    def cost(tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None:
            return None
        return cost_usd_per_mtok(
            prices, tokens_per_second=tokens_per_second, artifact_bytes=artifact_bytes
        )

    value = cost(rate.value)
    assert value is not None
    return Interval(value, cost(rate.high), cost(rate.low))


def cost_ratio(
    prices: PriceScenario,
    *,
    baseline_rate: float,
    candidate_rate: float,
    speedup: Interval,
    baseline_bytes: int,
    candidate_bytes: int,
) -> Interval:
    """Baseline cost / candidate cost: above 1 the candidate is cheaper.

    It is the paired speed-up times the ratio of the hourly prices of the two (which differ only in
    storage and network).
    """
    baseline, candidate = (
        sum(components_usd_per_hour(prices, tokens_per_second=rate, artifact_bytes=size).values())
        for rate, size in (
            (baseline_rate, baseline_bytes),
            (candidate_rate, candidate_bytes),
        )
    )
    return speedup.scaled(baseline / candidate) if baseline and candidate else speedup
