"""Training in one process, or in several that accelerate (or torchrun) started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Alone:
    """One process."""

    rank = 0

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """This process's samples of a step."""
        return rows

    def add(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        return values

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sum gradients over all processes, in place."""

    def agree(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give all processes the first one's values."""

    def first(self, value: Any) -> Any:
        """What the first process has; it must be JSON."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""


class Together(Alone):
    """One of several processes, started by ``accelerate launch`` or torchrun.

    Args:
        device: of everything that is shared.
    """

    def __init__(self, device: torch.device) -> None:
        from accelerate import PartialState

        self.state = PartialState(cpu=device.type == "cpu")
        self.device = device
        self.rank = self.state.process_index

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        return rows[self.rank :: self.state.num_processes]

    def add(self, values: list[float]) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            torch.distributed.all_reduce(parameter.grad)

    def agree(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            torch.distributed.broadcast(parameter.data, 0)

    def first(self, value: Any) -> Any:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)], device=self.device)
        torch.distributed.broadcast(length, 0)
        held = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            held.copy_(text)
        torch.distributed.broadcast(held, 0)
        return json.loads(bytes(held.cpu().tolist()))

    def wait(self) -> None:
        self.state.wait_for_everyone()


def processes(device: torch.device) -> Alone:
    """What this process was started as."""
    return Alone() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else Together(device)
