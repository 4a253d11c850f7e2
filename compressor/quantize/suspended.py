"""One forward pass that waits at every linear until that linear has been quantized.

Statistics of a linear's input should come from a block whose earlier linears are quantized already
("true sequential"), and the block's output is needed once all are. Taken in turn that is one pass
for each group of linears and one more. Here every batch runs in a coroutine of its own (greenlets:
the model's code knows nothing of it), stops where it meets a linear that is not quantized yet, and
goes on when it is: one pass for everything, at the price of holding what the batches keep alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn


def run_suspended(
    batches: Sequence[Callable[[], None]],
    groups: Mapping[str, Sequence[nn.Module]],
    observe: Callable[[str, torch.Tensor], None],
    solve: Callable[[str], None],
) -> None:
    """Run every batch to its end; every group is solved before any batch passes it.

    Args:
        batches: each runs the block once on its share of the samples.
        groups: linears that read the same input, by name, in the order they are to be solved.
        observe: takes the group's name and its input [..., in], once for each batch.
        solve: quantizes the linears of a group in place. Called once for each group: when all
            batches that meet it have been seen, or at the end for one that none met.
    """
    order = {name: position for position, name in enumerate(groups)}
    solved: set[str] = set()
    main = getcurrent()
    handles = []
    for name, modules in groups.items():

        def arrive(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if name not in solved:
                observe(name, args[0])
                main.switch(name)

        handles += [module.register_forward_pre_hook(arrive) for module in modules]
    tasks = [greenlet(batch) for batch in batches]
    try:
        waiting = {task: name for task in tasks if (name := task.switch()) is not None}
        while waiting:
            # Batches need not meet the same groups (experts), but meet them in the same order: the
            # first of those waited for is one that nobody will come to any more.
            first = min(waiting.values(), key=order.__getitem__)
            solve(first)
            solved.add(first)
            for task in [task for task, name in waiting.items() if name == first]:
                name = task.switch()
                if name is None:
                    del waiting[task]
                else:
                    waiting[task] = name
        for name in groups:
            if name not in solved:
                solve(name)
    finally:
        for task in tasks:
            if task:  # started and not at its end: something failed
                task.throw(GreenletExit)
        for handle in handles:
            handle.remove()
