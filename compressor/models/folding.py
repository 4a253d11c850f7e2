"""Which layer makes the input of which linears, so that a scale per channel can move between them.

Dividing an input's channels by s and multiplying the columns of the linears that read it by s
changes nothing, when the division can go into what made the input: the weight of a norm, or the
output rows of a linear whose result is only multiplied elementwise (up_proj before down_proj in a
gated feed-forward).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compressor.models.architecture import BlockInputs, CausalLM, LinearRef


def weight_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies by it: Gemma's multiply by 1 + weight."""
    return 1.0 if "Gemma" in type(norm).__name__ else 0.0


class Producer:
    """A layer and the linears that read its output.

    Attributes:
        input_group: of the consumers.
        consumers: every linear that reads the output.
        parameters: names in the model of what `apply` changes.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        consumers: list[LinearRef],
        dtype: torch.dtype,
    ) -> None:
        self.module: Any = module
        self.consumers = consumers
        self.input_group = consumers[0].input_group
        self.dtype = dtype
        self._biased = getattr(module, "bias", None) is not None
        self.parameters = {f"{path}.weight"} | ({f"{path}.bias"} if self._biased else set())
        self.parameters |= {f"{ref.path}.weight" for ref in consumers}
        self._saved: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    @property
    def _is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)

    def apply(self, scale: torch.Tensor) -> torch.Tensor:
        """Divide the output's channels by ``scale`` [in] and multiply the consumers' columns.

        A norm's weight is rounded to the dtype it is stored in, and the consumers get exactly what
        was divided by after that rounding.

        Returns:
            The scale that was really applied, [in].
        """
        changed = [self.module.weight, *(ref.module.weight for ref in self.consumers)]
        if self._biased:
            changed.append(self.module.bias)
        self._saved.append([(p, p.detach().clone()) for p in changed])
        weight = self.module.weight.data
        if self._is_linear:
            weight.div_(scale.unsqueeze(1))
        else:
            offset = weight_offset(self.module)
            before = weight + offset
            rounded = (before / scale - offset).to(self.dtype).to(weight.dtype)
            after = rounded + offset
            safe = (after != 0) & (before != 0)
            scale = torch.where(safe, before / torch.where(safe, after, 1.0), 1.0)
            weight.copy_(torch.where(safe, rounded, weight))
        if self._biased:
            self.module.bias.data.div_(scale)
        for ref in self.consumers:
            ref.module.weight.data.mul_(scale)
        return scale

    def undo(self) -> None:
        """Put everything back as it was before the last `apply`."""
        for parameter, value in self._saved.pop():
            parameter.data.copy_(value)


@torch.no_grad()
def find_producers(
    model: CausalLM,
    index: int,
    hidden: torch.Tensor,
    inputs: BlockInputs,
    targets: list[LinearRef],
) -> tuple[list[Producer], torch.Tensor]:
    """Producers of a loaded block and its output, found by running it once and seeing
    which tensors are passed on.

    Args:
        hidden: [batch, length, hidden], an input of the block.
        targets: linears that will be quantized; an input is left alone when another reads it too.
    """
    prefix = model.block_names[index]
    made: dict[int, tuple[str, nn.Module]] = {}
    read: dict[int, list[str]] = {}
    alive: list[torch.Tensor] = []  # so that no identity is used twice while looking
    handles = []
    for path, module in model.blocks[index].named_modules():
        full = f"{prefix}.{path}"
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):

            def note_read(_: nn.Module, args: tuple, name: str = full) -> None:
                alive.append(args[0])
                read.setdefault(id(args[0]), []).append(name)

            handles.append(module.register_forward_pre_hook(note_read))
        elif isinstance(weight, nn.Parameter) and weight.ndim == 1:

            def note_made(m: nn.Module, _: tuple, out: torch.Tensor, name: str = full) -> None:
                alive.append(out)
                made[id(out)] = (name, m)

            handles.append(module.register_forward_hook(note_made))
    try:
        out = model.run_block(index, hidden, inputs)
    finally:
        for handle in handles:
            handle.remove()
    by_path = {ref.path: ref for ref in targets}
    found = []
    for key, (path, module) in made.items():
        readers = read.get(key, [])
        if readers and all(name in by_path for name in readers):
            dtype = model.checkpoint.dtype(model.disk_name(f"{path}.weight"))
            found.append(Producer(path, module, [by_path[name] for name in readers], dtype))
    for ref in targets:
        parent, _, leaf = ref.path.rpartition(".")
        before = by_path.get(f"{parent}.up_proj")
        if leaf == "down_proj" and before is not None:
            found.append(Producer(before.path, before.module, [ref], torch.float32))
    return found, out
