"""The calibration set on its way through the blocks: its activations, and the batches in which
blocks are run on them.

Blocks run in bfloat16 where the checkpoint is stored in it and the device multiplies it faster;
their weights are kept in float32. Now and then the activations are saved, for a killed run to go on
from (``resume.safetensors``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from compressor.errors import RunError
from compressor.models.architecture import BlockInputs, CausalLM, LinearRef, by_input
from compressor.models.checkpoint import read_file
from compressor.models.experts import UnfusedExperts
from compressor.numerics.memory import suppress_out_of_memory
from compressor.numerics.quantized import QuantizedTensor
from compressor.quantize.activations import Place, allocate, kept_on
from compressor.quantize.codes import save_synced
from compressor.quantize.statistics import InputStatistics

CHECKPOINT_SECONDS = float(os.environ.get("COMPRESSOR_CHECKPOINT_SECONDS", "20"))
RESUME = "resume.safetensors"


class _AllSeen(Exception):
    """Ends a forward pass when every linear has been given its input."""


class Stream:
    """Activations in front of the block that is being quantized, and that block's weights."""

    def __init__(
        self,
        model: CausalLM,
        directory: Path,
        follows_original: bool,
        all_experts: bool,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.model = model
        self.directory = directory
        self.follows_original = follows_original
        self.all_experts = all_experts
        self.dtype = dtype
        self.device = device
        self.masters: dict[int, torch.Tensor] = {}  # float32 weights of the block, by parameter
        # [samples, length, hidden]: what the quantized blocks so far make of the calibration
        # tokens, and what the original ones do (only followed where something asks for it).
        self.hidden: torch.Tensor | None = None
        self.original: torch.Tensor | None = None
        self.kept_on: Place = "memory"
        self.ids = torch.empty(0)  # int64 [samples, length]
        self.inputs: dict[int, BlockInputs] = {}  # by number of samples in a batch
        self.batch = 1
        self.lowered = False  # the batch, after memory did not suffice
        self.tell: Callable[[int], None] = lambda size: None  # called with each smaller batch
        self.saved = time.monotonic()

    def release(self) -> None:
        """Let go of the activations after the last block."""
        self.hidden = self.original = None
        self.inputs = {}

    def start(
        self, tokens: np.ndarray, batch_size: int, first: int, others: Sequence[int] = ()
    ) -> None:
        """Embed the calibration tokens, or read back the activations of block ``first``.
        ``others``: sizes of batches that blocks are run on besides."""
        samples = len(tokens)
        self.batch = divisor(samples, batch_size)
        if first and (saved_batch := int(self._metadata().get("batch", self.batch))) < self.batch:
            self.batch, self.lowered = divisor(samples, saved_batch), True
        sizes = {divisor(samples, size) for size in others}
        ids = self.ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        with torch.no_grad():
            # Masks and rotary tables depend on the batch's shape alone: kept from the first batch.
            self.inputs = {
                size: cast(self.model.embed(ids[:size]), self.dtype)
                for size in {self.batch, *sizes}
            }
            head = self.inputs[self.batch].hidden
            size = samples * head[0].numel() * head.itemsize
            size *= 1 + self.follows_original
            self.kept_on = kept_on(size, self.device)
            room = functools.partial(
                allocate,
                directory=self.directory if self.kept_on == "disk" else None,
                device=self.device if self.kept_on == "device" else "cpu",
            )
            if first:
                read = functools.partial(room, device="cpu")
                saved = read_file(self.directory / RESUME, read)
                if self.kept_on == "device":
                    saved = {name: tensor.to(self.device) for name, tensor in saved.items()}
                self.hidden, self.original = saved["hidden"], saved.get("original")
            else:
                self.hidden = room((samples, *head.shape[1:]), head.dtype)
                for part in self.parts():
                    self.hidden[part] = self.model.embed(ids[part]).hidden.to(self.dtype)
                if self.follows_original:
                    self.original = room(self.hidden.shape, head.dtype).copy_(self.hidden)
        self.model.unload_outside()

    def saved_block(self) -> int:
        """The block whose input was saved last; 0 for none."""
        return int(self._metadata().get("block", 0))

    def _metadata(self) -> dict[str, str]:
        """What was saved with the activations: the block, and the batch that memory had room for;
        empty when none were."""
        path = self.directory / RESUME
        if not path.exists():
            return {}
        with safe_open(path, "pt") as file:
            return dict(file.metadata())

    def checkpoint(self, index: int) -> None:
        """Now and then, save what the next block needs."""
        if self.hidden is None or time.monotonic() - self.saved <= CHECKPOINT_SECONDS:
            return
        tensors = {"hidden": self.hidden}
        if self.original is not None:
            tensors["original"] = self.original
        metadata = {"block": str(index + 1), "batch": str(self.batch)}
        save_synced(tensors, self.directory / RESUME, metadata)
        self.saved = time.monotonic()

    def parts(self, samples: int | None = None) -> list[slice]:
        assert self.hidden is not None
        return self.split([slice(0, samples or len(self.hidden))])

    def split(self, parts: Sequence[slice]) -> list[slice]:
        """The same samples in batches of the present size."""
        starts = [start for part in parts for start in range(part.start, part.stop, self.batch)]
        return [slice(start, start + self.batch) for start in starts]

    @torch.no_grad()
    def lower_batch(self) -> None:
        """After memory did not suffice: go on with at most half as many samples a batch.

        Samples do not see each other, so the results are the same but for the order of sums.
        """
        if self.batch == 1:
            raise RunError(
                f"{self.device} has too little memory to run one calibration sample",
                fix="lower `calibration.length`",
            )
        self.batch = divisor(self.batch, self.batch // 2)
        self.lowered = True
        self.tell(self.batch)
        torch.cuda.empty_cache()
        if self.batch not in self.inputs:
            self.inputs[self.batch] = cast(self.model.embed(self.ids[: self.batch]), self.dtype)
            self.model.unload_outside()

    @contextlib.contextmanager
    def working(self, index: int) -> Iterator[None]:
        """The block's weights in the dtype that it runs in; afterwards in float32 as before, where
        they were not quantized meanwhile."""
        if self.dtype == torch.float32 or self.masters:
            yield
            return
        parameters = [p for p in self.model.blocks[index].parameters() if p.is_floating_point()]
        self.masters = {id(p): p.data for p in parameters}
        for parameter in parameters:
            parameter.data = parameter.data.to(self.dtype)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.data = self.masters[id(parameter)]
            self.masters = {}

    def weight(self, ref: LinearRef) -> torch.Tensor:
        """A linear's weight, float32 [out, in]."""
        weight = ref.module.weight
        return self.masters.get(id(weight), weight.detach()).to(torch.float32)

    @torch.no_grad()
    def place(self, ref: LinearRef, tensor: QuantizedTensor) -> None:
        """Give the linear the weight that its codes stand for."""
        weight = ref.module.weight
        value = tensor.dequantize().to(weight.device)
        if id(weight) in self.masters:
            self.masters[id(weight)] = value
        weight.data.copy_(value)

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output, inside `working`."""
        return self.model.run_block(index, hidden.to(self.device), self.inputs[len(hidden)])

    def collect(
        self,
        index: int,
        targets: list[LinearRef],
        make: Callable[[list[LinearRef]], InputStatistics],
        *,
        samples: int | None = None,
        parts: Sequence[slice] | None = None,
    ) -> dict[str, InputStatistics]:
        """Run the block over the calibration set, its first ``samples`` or some parts of it; one
        statistic for each distinct input."""
        while True:
            parts = self.parts(samples) if parts is None else self.split(parts)
            with suppress_out_of_memory():
                return self._observe(index, targets, make, parts)
            self.lower_batch()

    @torch.no_grad()
    def _observe(
        self,
        index: int,
        targets: list[LinearRef],
        make: Callable[[list[LinearRef]], InputStatistics],
        parts: Sequence[slice],
    ) -> dict[str, InputStatistics]:
        assert self.hidden is not None
        found: dict[str, InputStatistics] = {}
        fired: set[str] = set()
        handles = []
        for group, refs in by_input(targets).items():
            found[group] = make(refs)

            def hook(_: torch.nn.Module, args: tuple, group: str = group) -> None:
                fired.add(group)
                found[group].update(args[0])
                if len(fired) == len(found):
                    raise _AllSeen  # what the block does with its last inputs is not needed

            handles.append(refs[0].module.register_forward_pre_hook(hook))
        try:
            with self.working(index), self.every_expert(index):
                for part in parts:
                    fired.clear()
                    with contextlib.suppress(_AllSeen):
                        self.run(index, self.hidden[part])
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextlib.contextmanager
    def every_expert(self, index: int) -> Iterator[None]:
        """Where asked for, every token goes through every expert."""
        experts = [m for m in self.model.blocks[index].modules() if isinstance(m, UnfusedExperts)]
        for module in experts:
            module.every_token = self.all_experts
        try:
            yield
        finally:
            for module in experts:
                module.every_token = False

    @torch.no_grad()
    def forward(
        self, index: int, activations: torch.Tensor | None, parts: Sequence[slice] | None = None
    ) -> None:
        """Replace activations [samples, length, hidden], or some, by what the block makes of
        them."""
        assert activations is not None
        with self.working(index):
            left = self.parts() if parts is None else self.split(parts)
            while left:
                with suppress_out_of_memory():
                    activations[left[0]] = self.run(index, activations[left[0]])
                    left.pop(0)
                    continue
                self.lower_batch()
                left = self.split(left)


def divisor(samples: int, most: int) -> int:
    """The largest divisor of ``samples`` that is at most ``most``."""
    return max(d for d in range(1, min(most, samples) + 1) if samples % d == 0)


def cast(value: Any, dtype: torch.dtype, made: dict[int, torch.Tensor] | None = None) -> Any:
    """Tensors of floating point, in nested arguments of a block, in another dtype. One that all
    blocks share (a mask) stays one: ``made`` holds those converted so far, by identity."""
    made = {} if made is None else made
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        if id(value) not in made:
            made[id(value)] = value.to(dtype)
        return made[id(value)]
    if isinstance(value, BlockInputs):
        return BlockInputs(cast(value.hidden, dtype, made), cast(value.calls, dtype, made))
    if isinstance(value, dict):
        return {key: cast(item, dtype, made) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype, made) for item in value)
    return value


def calibration_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """bfloat16 where a model is stored in it and the device multiplies it faster than float32."""
    if stored != torch.bfloat16:
        return torch.float32
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
