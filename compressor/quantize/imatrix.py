"""How much each input column of each linear matters: its mean square over the calibration set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from compressor.models.architecture import CausalLM, LinearRef, by_input
from compressor.quantize.stream import Stream


class SquaredInputs:
    """Sums of squares of an input's columns.

    Args:
        in_features: width of the input.

    Attributes:
        sums: float64 [in].
        tokens: rows that were added.
    """

    def __init__(self, in_features: int) -> None:
        self.sums = torch.zeros(in_features, dtype=torch.float64)
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Add inputs [..., in_features]."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.sums += flat.square().sum(0, dtype=torch.float64).cpu()
        self.tokens += len(flat)


def squared_inputs(
    model: CausalLM,
    tokens: np.ndarray,
    directory: Path,
    *,
    batch_size: int = 8,
    all_experts: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, SquaredInputs]:
    """Statistics of every linear of every block, by its name in the checkpoint.

    Args:
        model: the opened model; blocks are read one by one.
        tokens: int32 [samples, length].
        directory: for activations that memory does not hold.
        batch_size, all_experts, dtype, device: of the walk, as of `driver.quantize_model`.
        advance: called with a note after each block.
    """
    stream = Stream(model, directory, False, all_experts, dtype, device)
    stream.start(tokens, batch_size, 0)
    found: dict[str, SquaredInputs] = {}

    def make(refs: list[LinearRef]) -> SquaredInputs:
        return SquaredInputs(refs[0].module.in_features)

    for index in range(len(model.blocks)):
        model.load_block(index, device, torch.float32)
        targets = model.linears(index)
        made = stream.collect(index, targets, make)  # type: ignore[arg-type]
        for group, refs in by_input(targets).items():
            found |= {ref.name: made[group] for ref in refs}  # type: ignore[misc]
        if index + 1 < len(model.blocks):
            stream.forward(index, stream.hidden)
        model.unload_block(index)
        advance(f"block {index}")
    stream.release()
    return found
