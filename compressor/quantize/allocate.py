"""Which layer gets which scheme: the least predicted loss within a budget of bytes.

Each group of linears (those that engines fuse must agree) takes one of its choices; the sum of
bytes has a limit and the sum of predicted losses is minimised. That is a multiple-choice knapsack,
solved to optimality by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressor.errors import RunError

_GAP = 1e-6  # relative distance to the optimum that the solver may stop at


@dataclass(frozen=True)
class Choice:
    """One scheme for one group.

    Attributes:
        scheme: its name.
        size: bytes of the group's weights, scales included.
        loss: predicted increase of the model's loss, in nats per token.
    """

    scheme: str
    size: float
    loss: float


def allocate(
    groups: Sequence[Sequence[Choice]],
    *,
    most_bytes: float | None = None,
    most_loss: float | None = None,
) -> list[int]:
    """The index of the choice of each group.

    Args:
        groups: the choices of each group.
        most_bytes: limit of the summed size; the summed loss is then minimised.
        most_loss: limit of the summed loss; the summed size is then minimised. Exactly one of the
            two is given.

    Raises:
        RunError: no allocation keeps the limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if (most_bytes is None) == (most_loss is None):
        raise ValueError("give either most_bytes or most_loss")
    sizes = np.array([choice.size for group in groups for choice in group])
    losses = np.array([choice.loss for group in groups for choice in group])
    owner = np.concatenate([np.full(len(group), i) for i, group in enumerate(groups)])
    limited, limit, what = (
        (sizes, most_bytes, "bytes") if most_bytes is not None else (losses, most_loss, "loss")
    )
    minimised = losses if most_bytes is not None else sizes
    starts = np.concatenate([[0], np.cumsum([len(group) for group in groups])[:-1]])
    least = sum(limited[s : s + len(g)].min() for s, g in zip(starts, groups, strict=True))
    assert limit is not None
    if least > limit:
        raise RunError(
            f"no allocation keeps within {limit:.4g} of {what}: the least possible is {least:.4g}",
            fix="raise the budget, or allow schemes with "
            + ("fewer bits" if most_bytes is not None else "more bits"),
        )
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    scale = max(float(minimised.max()), 1e-30)
    found = milp(
        minimised / scale,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(limited[None] / max(limit, 1e-30), ub=1.0),
        ],
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise RunError(f"the allocation could not be solved ({found.message})")
    return [int(found.x[s : s + len(g)].argmax()) for s, g in zip(starts, groups, strict=True)]
