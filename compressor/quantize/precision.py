"""Mixed precision: a scheme for every linear, from measured sensitivities and a budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.numerics.scheme import Scheme
from compressor.quantize.allocate import Choice, allocate
from compressor.quantize.coverage import is_ignored
from compressor.quantize.sensitivity import Sensitivity

_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


@dataclass(frozen=True)
class Allocation:
    """Which linear gets which scheme.

    Attributes:
        schemes: scheme name of each linear.
        predicted_loss: sum of the predicted increases of the mean loss, nats per token.
        mean_bits: bits of the codes per quantized weight; scales come on top, as in "W4".
        stored_bits: the same with scales and zero points.
    """

    schemes: dict[str, str]
    predicted_loss: float
    mean_bits: float
    stored_bits: float


def allocate_precision(
    sensitivities: Sequence[Sensitivity],
    *,
    mean_bits: float | None = None,
    most_bytes: float | None = None,
    most_loss: float | None = None,
    ignore: Sequence[str] = (),
) -> Allocation:
    """The least predicted loss within a budget, or the fewest bytes within a predicted loss.

    Linears that engines fuse (q/k/v, gate/up, all experts of a layer) get the same scheme.

    Args:
        sensitivities: of every linear.
        mean_bits: budget of the codes' bits per weight.
        most_bytes: budget of the quantized linears' bytes, scales included.
        most_loss: limit of the predicted loss, nats per token. Exactly one of the three is given.
        ignore: linears that stay as they are, as in a recipe.

    Raises:
        RunError: no allocation keeps the budget.
    """
    groups: dict[str, list[Sensitivity]] = {}
    for one in sensitivities:
        if not is_ignored(one.name, ignore):
            expert = _EXPERT.fullmatch(one.name)
            groups.setdefault(expert[1] if expert else one.group, []).append(one)
    members = list(groups.values())
    parameters = sum(one.parameters for group in members for one in group)
    tables = []
    for group in members:
        names = [n for n in group[0].loss if all(n in one.loss for one in group)]
        tables.append(
            [
                Choice(
                    name,
                    sum(
                        one.parameters * (code_bits(name) if mean_bits else one.bits[name] / 8)
                        for one in group
                    ),
                    sum(one.loss[name] for one in group),
                )
                for name in names
            ]
        )
    budget = mean_bits * parameters if mean_bits else most_bytes
    taken = allocate(tables, most_bytes=budget, most_loss=most_loss)
    schemes = {
        one.name: table[i].scheme
        for group, table, i in zip(members, tables, taken, strict=True)
        for one in group
    }
    chosen = [(one, schemes[one.name]) for group in members for one in group]
    return Allocation(
        schemes,
        sum(table[i].loss for table, i in zip(tables, taken, strict=True)),
        sum(one.parameters * code_bits(name) for one, name in chosen) / parameters,
        sum(one.parameters * one.bits[name] for one, name in chosen) / parameters,
    )


def code_bits(scheme: str) -> int:
    """Bits of a weight's code in a scheme of that name."""
    return Scheme.parse(scheme).weights.num_bits
