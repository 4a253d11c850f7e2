"""Walk a model block by block and quantize its linears.

At any time one block's weights, the embeddings' output and the calibration activations are in
memory. Each block runs forward twice: once to collect the statistics of every linear's input, once
with its quantized weights to make the next block's input (GPTQ, arXiv 2210.17323, section 4); with
`true_sequential` once only, waiting at each linear until it is quantized (`suspended.py`).
Linears that share an input (q/k/v, gate/up) share one statistic. Algorithms that aim at the
original model's activations have those carried along, by one more forward. Blocks run in bfloat16
where the checkpoint is stored in it and the device multiplies it faster; weights are solved and
kept in float32.

Output, format-neutral and readable block by block:

    block-00000.safetensors   {linear}.codes int8 or float8_e4m3fn [out, in],
                              .scale float32 [out, groups],
                              .zero_point int8 [out, groups], .g_idx int32 [in] and
                              .input_scale float32 [1] where used;
                              {parameter}.replaced: unquantized tensors that a transform changed;
                              {attention}.k_scale, .v_scale float32 [1]: of a low-bit cache
    head.safetensors          the same of the output layer (lm_head), where it is quantized
    layers.jsonl              one line per linear: scheme, error, RTN's error, fallback
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.errors import RunError
from compressor.models.architecture import BlockInputs, CausalLM, LinearRef
from compressor.models.checkpoint import read_file
from compressor.models.experts import UnfusedExperts
from compressor.models.folding import Producer, find_producers
from compressor.models.kv_cache import KEY, VALUE, CacheObserver, check_attention, no_cache
from compressor.numerics.memory import WAITING_SHARE, free_bytes, keep_freed_pages
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import ASYMMETRIC, DYNAMIC, ActivationScheme, Scheme
from compressor.quantize.activations import allocate, fits_memory
from compressor.quantize.devices import solving_devices, spread
from compressor.quantize.head import quantize_in_parts
from compressor.quantize.registry import (
    Algorithm,
    BlockRefinement,
    LayerRefinement,
    Transform,
    WeightResult,
)
from compressor.quantize.statistics import InputStatistics, fit_to_rounded_inputs
from compressor.quantize.suspended import run_suspended

CHECKPOINT_SECONDS = float(os.environ.get("COMPRESSOR_CHECKPOINT_SECONDS", "20"))
LAYERS = "layers.jsonl"
HEAD = "head.safetensors"
_RESUME = "resume.safetensors"
_KEPT_STREAMS = 8  # activations of the block's width that a waiting batch keeps alive, at most
_TRANSFORM_TOKENS = 16384
FEW_TOKENS = 0.25  # inputs per column that a layer's statistics need to be used
FOLD_TOLERANCE = 1e-3  # relative change of a block's output that rounding alone explains


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a linear is left out: an entry is a whole name, or a regular expression that
    matches the whole name."""
    return any(name == pattern or re.fullmatch(pattern, name) for pattern in ignore)


def quantize_model(
    model: CausalLM,
    algorithm: Algorithm,
    directory: Path,
    *,
    transforms: Sequence[Transform] = (),
    refinements: Sequence[LayerRefinement | BlockRefinement] = (),
    exceptions: Mapping[str, Algorithm] | None = None,
    head: Algorithm | None = None,
    tokens: np.ndarray | None = None,
    ignore: Sequence[str] = (),
    kv_cache: ActivationScheme | None = None,
    batch_size: int = 8,
    all_experts: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    devices: Sequence[str] | None = None,
    read_ahead: bool | None = None,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Quantize every linear of every block into ``directory``; resume what is already there.

    Args:
        model: the opened model (weights are read block by block).
        algorithm: an instance from `compressor.quantize.registry`.
        directory: receives the files named in this module's docstring.
        transforms: applied to each block before the algorithm, in this order.
        refinements: applied to what the algorithm made of the block, in this order.
        exceptions: algorithms of linears that another than ``algorithm`` quantizes, by name.
        head: what quantizes the output layer after the last block, with the refinements that work
            layer by layer; None leaves it as it is. Its input's scale, if any, is dynamic.
        tokens: int32 [samples, length], needed when the algorithm or a transform has statistics,
            and for ``kv_cache``.
        ignore: names or regular expressions of linears to leave as they are.
        kv_cache: static scheme of cached keys and values, whose scales are found from what the
            quantized blocks' attention is given.
        batch_size: samples per forward; lowered to a divisor of the number of samples, and further
            where a device runs out of memory.
        all_experts: while statistics are taken, run every token through every expert.
        dtype: what blocks run in; see `calibration_dtype`.
        device: where blocks are run and solved.
        devices: where linears that read the same input are solved side by side; ``device`` and
            every other GPU when None.
        read_ahead: read the next block's weights while one is solved; when None, for a GPU only.
            From page cache a CPU reads a block in a hundredth of the time that solving it takes,
            and would hold it in memory meanwhile.
        advance: called with a note after each block, and after the output layer.

    Returns:
        seconds, tokens, coverage (parameters quantized, linears skipped and why), resumed_at, the
        output layer's name where it was quantized, activations ("memory" or "disk", where they
        were kept) and batch_size (in the end).

    Raises:
        RunError: no linear is left to quantize, a layer's weights cannot take the scheme, there is
            no output layer that is a linear, the architecture's cache cannot be quantized, or a
            device has too little memory.
    """
    started = time.perf_counter()
    keep_freed_pages()
    directory.mkdir(parents=True, exist_ok=True)
    skipped = [
        {"name": name, "reason": reason}
        for index in range(len(model.blocks))
        for name, reason in model.skipped(index)
    ] + [{"name": name, "reason": reason} for name, reason in model.outside_linears()]
    walk = _Walk(
        model, algorithm, exceptions or {}, transforms, refinements, directory, ignore,
        kv_cache, all_experts, dtype, device, head, devices or solving_devices(device),
        torch.device(device).type == "cuda" if read_ahead is None else read_ahead,
    )  # fmt: skip
    if kv_cache is not None:
        check_attention(model)
    total = model.num_parameters
    if walk.head is not None:
        skipped = [entry for entry in skipped if entry["name"] != walk.head.name]
        if model.head_is_tied:
            total += walk.head.module.weight.numel()  # no longer shared with the embeddings
    first = walk.resume_point()
    if walk.follows_tokens:
        if tokens is None:
            raise RunError("this algorithm needs calibration tokens", fix="add `calibration:`")
        if first < walk.steps:
            walk.start(tokens, batch_size, first)
    quantized = in_head = 0
    for _ in range(first):
        advance("already done")
    for index in range(first, walk.steps):
        advance(walk.block(index) if index < len(model.blocks) else walk.output_layer())
    for record in read_layers(directory):
        if record.get("reason"):
            skipped.append({"name": record["name"], "reason": record["reason"]})
        else:
            quantized += record["parameters"]
            if walk.head is not None and record["name"] == walk.head.name:
                in_head = record["parameters"]
    if not quantized:
        raise RunError(
            "no linear was quantized: every one is ignored or left out",
            fix="remove entries of `ignore`",
        )
    (directory / _RESUME).unlink(missing_ok=True)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": int(tokens.size) if tokens is not None and walk.follows_tokens else 0,
        "calibration_dtype": str(dtype).removeprefix("torch.") if walk.follows_tokens else None,
        "activations": ("disk" if walk.on_disk else "memory") if walk.follows_tokens else None,
        "batch_size": walk.batch if walk.follows_tokens else None,
        "resumed_at_block": first,
        "scheme": algorithm.scheme.to_dict(),
        "head": walk.head.name if walk.head is not None else None,
        "coverage": {
            "total_parameters": total,
            "quantized_parameters": quantized,
            "head_parameters": in_head,
            "block_parameters": model.block_parameters,
            "share": quantized / total,
            "skipped": [{**one, "parameters": model.numel(one["name"])} for one in skipped],
        },
    }


class _AllSeen(Exception):
    """Ends a forward pass when every linear has been given its input."""


class _Walk:
    """State of one pass over the blocks: the activations, and how far the files on disk reach."""

    def __init__(
        self,
        model: CausalLM,
        algorithm: Algorithm,
        exceptions: Mapping[str, Algorithm],
        transforms: Sequence[Transform],
        refinements: Sequence[LayerRefinement | BlockRefinement],
        directory: Path,
        ignore: Sequence[str],
        kv_cache: ActivationScheme | None,
        all_experts: bool,
        dtype: torch.dtype,
        device: str,
        head_algorithm: Algorithm | None,
        devices: Sequence[str],
        read_ahead: bool,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.head_algorithm = head_algorithm
        self.head = _head(model, head_algorithm) if head_algorithm is not None else None
        self.steps = len(model.blocks) + (self.head is not None)
        self.exceptions = exceptions
        self.transforms = transforms
        self.layer_refinements: list[Any] = [r for r in refinements if r.level == "layer"]
        self.block_refinements: list[Any] = [r for r in refinements if r.level == "block"]
        self.needs_statistics = bool(
            algorithm.options.needs_calibration or transforms or refinements
        )
        self.follows_tokens = self.needs_statistics or kv_cache is not None
        self.follows_original = bool(self.block_refinements)
        self.kv_cache = kv_cache
        self.directory = directory
        self.ignore = ignore
        self.all_experts = all_experts
        self.dtype = dtype
        self.device = device
        self.devices = list(devices)
        self.read_ahead = read_ahead
        self.channels = bool(transforms) or any(
            one.scheme.static_activations for one in (algorithm, *(exceptions or {}).values())
        )
        self.masters: dict[int, torch.Tensor] = {}  # float32 weights of the block, by parameter
        # [samples, length, hidden]: what the quantized blocks so far make of the calibration
        # tokens, and what the original ones do (only followed where something asks for it).
        self.hidden: torch.Tensor | None = None
        self.original: torch.Tensor | None = None
        self.on_disk = False  # both, for lack of memory
        self.ids = torch.empty(0)  # int64 [samples, length]
        self.inputs: dict[int, BlockInputs] = {}  # by number of samples in a batch
        self.batch = 1
        self.lowered = False  # the batch, after a device ran out of memory
        self.one_pass = True  # whether batches may wait for each other (`suspended.py`)
        self.saved = time.monotonic()

    def resume_point(self) -> int:
        """First block that has still to be done, after dropping whatever lies beyond it; the output
        layer counts as one more block."""
        done = 0
        while self._file(done).exists():
            done += 1
        if self.follows_tokens and done < self.steps:
            # Blocks can only follow from activations: go back to the last ones that were saved.
            path = self.directory / _RESUME
            saved = 0
            if path.exists():
                with safe_open(path, "pt") as file:
                    saved = int(file.metadata()["block"])
            done = min(done, saved)
        records = [r for r in read_layers(self.directory) if r["block"] < done]
        _write_synced(self.directory / LAYERS, [json.dumps(r) for r in records])
        for path in self.directory.glob("block-*.safetensors"):
            if int(path.stem.removeprefix("block-")) >= done:
                path.unlink()
        if done < self.steps:
            (self.directory / HEAD).unlink(missing_ok=True)
        return done

    def _file(self, step: int) -> Path:
        """Where a block's codes go, or after the last one the output layer's."""
        if self.head is not None and step == len(self.model.blocks):
            return self.directory / HEAD
        return _block_file(self.directory, step)

    def start(self, tokens: np.ndarray, batch_size: int, first: int) -> None:
        """Embed the calibration tokens, or read back the activations of block ``first``."""
        samples = len(tokens)
        self.batch = _divisor(samples, batch_size)
        sizes = {_divisor(samples, r.options.batch_size) for r in self.block_refinements}
        ids = self.ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        with torch.no_grad():
            # Masks and rotary tables depend on the batch's shape alone: kept from the first batch.
            self.inputs = {
                size: _cast(self.model.embed(ids[:size]), self.dtype)
                for size in {self.batch, *sizes}
            }
            head = self.inputs[self.batch].hidden
            size = samples * head[0].numel() * head.itemsize
            self.on_disk = not fits_memory(2 * size if self.follows_original else size)
            room = functools.partial(allocate, directory=self.directory if self.on_disk else None)
            if first:
                saved = read_file(self.directory / _RESUME, room)
                self.hidden, self.original = saved["hidden"], saved.get("original")
            else:
                self.hidden = room((samples, *head.shape[1:]), head.dtype)
                for part in self._parts():
                    self.hidden[part] = self.model.embed(ids[part]).hidden.to(self.dtype).cpu()
                if self.follows_original:
                    self.original = room(self.hidden.shape, head.dtype).copy_(self.hidden)
        self.model.unload_outside()

    def block(self, index: int) -> str:
        """Quantize one block; returns a note on it for the progress line."""
        model, last = self.model, index == self.steps - 1
        model.load_block(index, self.device, torch.float32)
        if self.read_ahead and index + 1 < len(model.blocks):
            model.read_ahead(index + 1, self.device)
        targets = [r for r in model.linears(index) if not is_ignored(r.name, self.ignore)]
        left = [r for r in model.linears(index) if is_ignored(r.name, self.ignore)]
        sequential = self.needs_statistics and self._is_sequential(targets)
        statistics: dict[str, InputStatistics] = {}
        if sequential and self.transforms:
            statistics = self._collect(index, targets, samples=self._enough())
        elif self.needs_statistics and not sequential:
            statistics = self._collect(index, targets)
        if self.original is not None:
            self._forward(index, self.original)
        replaced = self._transform(index, targets, statistics)
        results: dict[str, WeightResult] = {}
        seen: dict[str, int | None] = {}

        def solve(
            refs: list[LinearRef],
            found: InputStatistics | None,
            devices: Sequence[str] = self.devices,
        ) -> None:
            results.update(self._solve(refs, found, devices))
            seen.update({ref.name: found.tokens if found else None for ref in refs})

        ready = False  # whether self.hidden is the next block's input already
        cache = CacheObserver()
        if sequential and self._suspended_fits(targets):
            ready = not self.block_refinements
            self._solve_suspended(index, targets, solve, cache)
        elif len(self.devices) > 1 and not sequential:
            # The statistics of all are there already: whole groups (experts) go side by side.
            groups = list(_by_input(targets).items())

            def some(numbers: list[int], device: str) -> list[None]:
                for group, refs in (groups[number] for number in numbers):
                    solve(refs, statistics.pop(group, None), [device])
                return [None] * len(numbers)

            modules = [[ref.module for ref in refs] for _, refs in groups]
            work = [sum(m.out_features * m.in_features**2 for m in ms) for ms in modules]
            spread(work, self.devices, some)
        else:
            for group, refs in _by_input(targets).items():
                if sequential:
                    statistics = self._collect(index, refs, last=True)
                solve(refs, statistics.pop(group, None))
        loss = self._refine_block(index, targets, results)
        if not ready and (self.kv_cache is not None or (self.needs_statistics and not last)):
            with self._watching(cache, index):
                self._forward(index, self.hidden)
        records: list[dict[str, Any]] = [
            {"block": index, "name": r.name, "reason": "ignored by the recipe"} for r in left
        ]
        for ref in targets:
            result = results[ref.name]
            records.append(
                {
                    "block": index,
                    "name": ref.name,
                    "scheme": self._algorithm(ref).scheme.to_dict(),
                    "parameters": ref.module.weight.numel(),
                    "tokens": seen[ref.name],
                    "undersampled": _undersampled(seen[ref.name], ref.module.in_features),
                    "error": result.error,
                    "rtn_error": result.rtn_error,
                    "fallback": result.fallback,
                    "damp": result.damp,
                    **loss,
                }
            )
        tensors = {f"{key}.replaced": value for key, value in replaced.items()}
        if self.kv_cache is not None:
            scales = cache.scales(self.kv_cache)
            if not scales:
                raise no_cache(model, "does not give its keys and values to attention")
            tensors |= scales
        for name, result in results.items():
            tensors |= _flatten(name, result.tensor)
        model.unload_block(index)
        _append_synced(self.directory / LAYERS, [json.dumps(r) for r in records])
        _save_synced(tensors, _block_file(self.directory, index), {})
        self._checkpoint(index)
        gc.collect()
        note = _note(index, [r for r in records if "error" in r])
        if self.lowered or not self.one_pass:
            note += f", out of memory: batches of {self.batch}"
            note += "" if self.one_pass else ", one pass per group"
        return f"{note}, activations on disk" if self.on_disk else note

    @contextlib.contextmanager
    def _watching(self, cache: CacheObserver, index: int, wanted: bool = True) -> Iterator[None]:
        """Where a cache is to be quantized, look at the keys and values of the finished block."""
        if self.kv_cache is None or not wanted:
            yield
            return
        with cache.watch(self.model, index):
            yield

    @torch.no_grad()
    def output_layer(self) -> str:
        """Quantize the output layer on the statistics of what the quantized blocks and the final
        norm give it; returns a note for the progress line."""
        assert self.head is not None and self.head_algorithm is not None
        ref, width = self.head, self.head.module.in_features
        algorithm = self.head_algorithm
        hessian: torch.Tensor | None = None
        drift: torch.Tensor | None = None
        seen: int | None = None
        if self.needs_statistics:
            assert self.hidden is not None
            statistics = InputStatistics(width, self.device, False, _fitted_inputs(algorithm))
            for part in self._parts():
                hidden = self.hidden[part].to(self.device)
                statistics.update(self.model.head_input(hidden, self.ids[part]))
            seen = statistics.tokens
            if _undersampled(seen, width):
                hessian = torch.eye(width, device=self.device)
            else:
                hessian, drift = statistics.hessian, statistics.drift
            self.model.unload_outside()

        def prepare(weight: torch.Tensor) -> torch.Tensor:
            if hessian is None or drift is None:
                return weight
            return fit_to_rounded_inputs([weight], hessian, drift, algorithm.options.damp)[0]

        try:
            result = quantize_in_parts(
                self.model.checkpoint.tensor(self.model.head_key()),
                hessian,
                algorithm,
                self.layer_refinements,
                self.device,
                prepare,
            )
        except ValueError as error:
            raise RunError(
                str(error), where=ref.name, fix="remove `lm_head:` from the variant"
            ) from error
        record = {
            "block": len(self.model.blocks),
            "name": ref.name,
            "scheme": algorithm.scheme.to_dict(),
            "parameters": ref.module.weight.numel(),
            "tokens": seen,
            "undersampled": _undersampled(seen, width),
            "error": result.error,
            "rtn_error": result.rtn_error,
            "fallback": result.fallback,
            "damp": result.damp,
        }
        _append_synced(self.directory / LAYERS, [json.dumps(record)])
        _save_synced(_flatten(ref.name, result.tensor), self.directory / HEAD, {})
        return f"{ref.name}: relative error {result.error:.2e}"

    def _checkpoint(self, index: int) -> None:
        """Now and then, save what the next block needs."""
        if self.hidden is None or time.monotonic() - self.saved <= CHECKPOINT_SECONDS:
            return
        tensors = {"hidden": self.hidden}
        if self.original is not None:
            tensors["original"] = self.original
        _save_synced(tensors, self.directory / _RESUME, {"block": str(index + 1)})
        self.saved = time.monotonic()

    def _parts(self, samples: int | None = None) -> list[slice]:
        assert self.hidden is not None
        return self._split([slice(0, samples or len(self.hidden))])

    def _split(self, parts: Sequence[slice]) -> list[slice]:
        """The same samples in batches of the present size."""
        starts = [start for part in parts for start in range(part.start, part.stop, self.batch)]
        return [slice(start, start + self.batch) for start in starts]

    @torch.no_grad()
    def _lower_batch(self) -> None:
        """After a device ran out of memory: go on with at most half as many samples a batch.

        Samples do not see each other, so the results are the same but for the order of sums.
        """
        if self.batch == 1:
            raise RunError(
                f"{self.device} has too little memory to run one calibration sample",
                fix="lower `calibration.length`",
            )
        self.batch = _divisor(self.batch, self.batch // 2)
        self.lowered = True
        torch.cuda.empty_cache()
        if self.batch not in self.inputs:
            self.inputs[self.batch] = _cast(self.model.embed(self.ids[: self.batch]), self.dtype)
            self.model.unload_outside()

    def _enough(self) -> int | None:
        """Samples that transforms look at where the quantizer takes statistics of its own: they
        choose one number a channel. All (None) for experts, of which each sees a few tokens."""
        assert self.hidden is not None
        modules = (module for block in self.model.blocks for module in block.modules())
        if any(isinstance(module, UnfusedExperts) for module in modules):
            return None
        samples = -(-_TRANSFORM_TOKENS // self.hidden.shape[1])
        return min(len(self.hidden), -(-samples // self.batch) * self.batch)

    def _is_sequential(self, targets: list[LinearRef]) -> bool:
        return any(
            getattr(self._algorithm(ref).options, "true_sequential", False) for ref in targets
        )

    def _suspended_fits(self, targets: list[LinearRef]) -> bool:
        """Whether memory holds what every batch keeps alive while it waits. The result is the same
        either way, only the time is not."""
        assert self.hidden is not None
        widest = max(ref.module.in_features for ref in targets)
        per_token = (_KEPT_STREAMS * self.hidden.shape[-1] + 2 * widest) * self.dtype.itemsize
        needed = self.hidden[..., 0].numel() * per_token
        return self.one_pass and needed < WAITING_SHARE * free_bytes(self.device)

    @contextlib.contextmanager
    def _working(self, index: int) -> Iterator[None]:
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

    def _weight(self, ref: LinearRef) -> torch.Tensor:
        """A linear's weight, float32 [out, in]."""
        weight = ref.module.weight
        return self.masters.get(id(weight), weight.detach()).to(torch.float32)

    @torch.no_grad()
    def _place(self, ref: LinearRef, tensor: QuantizedTensor) -> None:
        """Give the linear the weight that its codes stand for."""
        weight = ref.module.weight
        value = tensor.dequantize().to(weight.device)
        if id(weight) in self.masters:
            self.masters[id(weight)] = value
        weight.data.copy_(value)

    def _run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output, inside `_working`."""
        return self.model.run_block(index, hidden.to(self.device), self.inputs[len(hidden)])

    def _collect(
        self,
        index: int,
        targets: list[LinearRef],
        *,
        last: bool = False,
        samples: int | None = None,
        parts: Sequence[slice] | None = None,
    ) -> dict[str, InputStatistics]:
        """Run the block over the calibration set, its first ``samples`` or some parts of it; one
        statistic for each distinct input."""
        while True:
            parts = self._parts(samples) if parts is None else self._split(parts)
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                return self._observe(index, targets, parts, last)
            self._lower_batch()

    @torch.no_grad()
    def _observe(
        self, index: int, targets: list[LinearRef], parts: Sequence[slice], last: bool
    ) -> dict[str, InputStatistics]:
        assert self.hidden is not None
        found: dict[str, InputStatistics] = {}
        fired: set[str] = set()
        handles = []
        for group, refs in _by_input(targets).items():
            found[group] = self._statistics(refs, last)

            def hook(_: torch.nn.Module, args: tuple, group: str = group) -> None:
                fired.add(group)
                found[group].update(args[0])
                if len(fired) == len(found):
                    raise _AllSeen  # what the block does with its last inputs is not needed

            handles.append(refs[0].module.register_forward_pre_hook(hook))
        try:
            with self._working(index), self._every_expert(index):
                for part in parts:
                    fired.clear()
                    with contextlib.suppress(_AllSeen):
                        self._run(index, self.hidden[part])
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def _solve_suspended(
        self,
        index: int,
        targets: list[LinearRef],
        solve: Callable[[list[LinearRef], InputStatistics | None], None],
        cache: CacheObserver,
    ) -> None:
        """Take statistics, solve, and run the block in one pass. The activations become the
        block's output, unless refinements still need its input."""
        assert self.hidden is not None
        hidden = self.hidden
        groups = _by_input(targets)
        found = {group: self._statistics(refs, last=True) for group, refs in groups.items()}
        left = dict(enumerate(self._parts()))  # by number, those that have not come to the end
        watching = functools.partial(self._watching, cache, index, not self.block_refinements)

        def run(number: int) -> None:
            out = self._run(index, hidden[left[number]])
            if not self.block_refinements:
                hidden[left[number]] = out.cpu()
            del left[number]

        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            with watching(), self._working(index), self._every_expert(index):
                run_suspended(
                    [functools.partial(run, number) for number in left],
                    {group: [ref.module for ref in refs] for group, refs in groups.items()},
                    lambda group, x: found[group].update(x),
                    lambda group: solve(groups[group], found.pop(group)),
                )
            return
        # Out of memory, perhaps for the batches that waited: none does from here on. What is not
        # quantized yet gets its statistics by a pass of its own, from those still to meet it.
        self.one_pass = False
        parts = list(left.values())
        for group in list(found):
            again = self._collect(index, groups[group], last=True, parts=parts)
            solve(groups[group], again[group])
        if not self.block_refinements:
            with watching():
                self._forward(index, hidden, parts)

    def _statistics(self, refs: list[LinearRef], last: bool = False) -> InputStatistics:
        """Of the input of linears; ``last`` where no transform will change it any more."""
        schemes = {_fitted_inputs(self._algorithm(ref)) for ref in refs} if last else set()
        rounded = schemes.pop() if len(schemes) == 1 else None
        width = refs[0].module.in_features
        return InputStatistics(width, self.device, self.channels, rounded)

    @contextlib.contextmanager
    def _every_expert(self, index: int) -> Iterator[None]:
        """Where asked for, every token goes through every expert."""
        experts = [m for m in self.model.blocks[index].modules() if isinstance(m, UnfusedExperts)]
        for module in experts:
            module.every_token = self.all_experts
        try:
            yield
        finally:
            for module in experts:
                module.every_token = False

    def _transform(
        self, index: int, targets: list[LinearRef], statistics: dict[str, InputStatistics]
    ) -> dict[str, torch.Tensor]:
        """Apply the transforms; returns the unquantized tensors that were changed, by their name
        in the checkpoint. The statistics are brought to what the changed inputs would give.

        The block's output on one batch must stay the same, else everything is taken back."""
        if not self.transforms:
            return {}
        assert self.hidden is not None
        sample = self.hidden[: self.batch].to(self.device, torch.float32)
        inputs = _cast(self.inputs[self.batch], torch.float32)
        producers, before = find_producers(self.model, index, sample, inputs, targets)
        applied: list[tuple[Producer, torch.Tensor]] = []
        for producer in producers:
            seen = statistics.get(producer.input_group)
            width = producer.consumers[0].module.in_features
            if seen is None or _undersampled(seen.tokens, width):
                continue
            for transform in self.transforms:
                weights = [ref.module.weight.detach() for ref in producer.consumers]
                scheme = self._algorithm(producer.consumers[0]).scheme
                scale = transform.scales(weights, seen, scheme)
                if bool((scale != 1).any()):
                    scale = producer.apply(scale)
                    seen.divide(scale)
                    applied.append((producer, scale))
        with torch.no_grad():
            after = self.model.run_block(index, sample, inputs)
        if float((after - before).norm() / before.norm()) > FOLD_TOLERANCE:
            for producer, scale in reversed(applied):
                producer.undo()
                statistics[producer.input_group].divide(1 / scale)
            return {}
        names = {ref.name for ref in targets}
        changed = {}
        for parameter in sorted({p for producer, _ in applied for p in producer.parameters}):
            key = self.model.disk_name(parameter)
            if key.removesuffix(".weight") not in names:
                value = self.model.model.get_parameter(parameter).detach()
                changed[key] = value.to(self.model.checkpoint.dtype(key)).cpu()
        return changed

    def _algorithm(self, ref: LinearRef) -> Algorithm:
        return self.exceptions.get(ref.name, self.algorithm)

    def _solve(
        self, refs: list[LinearRef], seen: InputStatistics | None, devices: Sequence[str]
    ) -> dict[str, WeightResult]:
        """Quantize linears that read the same input, and put the result in place."""
        width = refs[0].module.in_features
        hessian = drift = None
        if self.needs_statistics:
            # Of an expert that hardly any token reached too little is known: with the identity for
            # H every algorithm does what round-to-nearest does.
            if seen is not None and not _undersampled(seen.tokens, width):
                hessian, drift = seen.take_hessian(), seen.drift
            else:
                hessian = torch.eye(width, device=self.device)
        parts: dict[int, list[LinearRef]] = {}
        for ref in refs:
            parts.setdefault(id(self._algorithm(ref)), []).append(ref)
        results = {}
        for part in parts.values():
            algorithm = self._algorithm(part[0])
            weights = [self._weight(ref) for ref in part]
            if drift is not None:
                assert hessian is not None
                weights = fit_to_rounded_inputs(weights, hessian, drift, algorithm.options.damp)
            try:
                found = self._quantize(algorithm, weights, hessian, devices)
            except torch.cuda.OutOfMemoryError as error:
                raise RunError(
                    f"too little memory on {', '.join(devices)} to quantize these linears",
                    where=", ".join(ref.name for ref in part),
                    fix="lower `calibration.batch_size`, or use a larger device",
                ) from error
            except ValueError as error:
                raise RunError(
                    str(error),
                    where=", ".join(ref.name for ref in part),
                    fix="choose another group_size, or name the layer under `ignore`",
                ) from error
            for ref, result in zip(part, found, strict=True):
                activations = algorithm.scheme.input_activations
                if activations is not None and not activations.dynamic:
                    largest = seen.absmax.amax() if seen else torch.zeros(())
                    scale = largest.clamp_min(1e-8).view(1).float() / activations.maximum
                    result.tensor.input_scale = scale
                if not self.block_refinements:
                    result.rounded = None  # large, and read by nothing from here on
                self._place(ref, result.tensor)
                results[ref.name] = result
        return results

    def _quantize(
        self,
        algorithm: Algorithm,
        weights: list[torch.Tensor],
        hessian: torch.Tensor | None,
        devices: Sequence[str],
    ) -> list[WeightResult]:
        """Codes of linears with the same input, shared out over the devices and brought back."""

        def some(numbers: list[int], device: str) -> list[WeightResult]:
            mine = [weights[number].to(device) for number in numbers]
            own = None if hessian is None else hessian.to(device)
            found = algorithm.quantize_all(mine, own)
            for refinement in self.layer_refinements:
                found = [
                    refinement.refine(weight, result, own)
                    for weight, result in zip(mine, found, strict=True)
                ]
            return [result.to(self.device) for result in found]

        return spread([len(weight) for weight in weights], devices, some)

    def _refine_block(
        self, index: int, targets: list[LinearRef], results: dict[str, WeightResult]
    ) -> dict[str, Any]:
        """Run the refinements that look at the whole block.

        Returns:
            its output error, relative to the output, before and after them.
        """
        if not self.block_refinements or not targets:
            return {}
        assert self.hidden is not None and self.original is not None
        losses = []
        for refinement in self.block_refinements:
            layers = [(ref.module, results[ref.name]) for ref in targets]
            size = _divisor(len(self.hidden), refinement.options.batch_size)
            forward = functools.partial(self._run, index)
            with self._working(index):
                tensors, *loss = refinement.refine(
                    layers, forward, self.hidden, self.original, size, index
                )
                for ref, tensor in zip(targets, tensors, strict=True):
                    self._place(ref, tensor)
                    results[ref.name] = dataclasses.replace(results[ref.name], tensor=tensor)
            losses += loss
        total = sum(float(sample.float().square().sum()) for sample in self.original)
        scale = total / self.original.numel()
        return {"block_error_before": losses[0] / scale, "block_error": losses[-1] / scale}

    @torch.no_grad()
    def _forward(
        self, index: int, activations: torch.Tensor | None, parts: Sequence[slice] | None = None
    ) -> None:
        """Replace activations [samples, length, hidden], or some, by what the block makes of
        them."""
        assert activations is not None
        with self._working(index):
            left = self._parts() if parts is None else self._split(parts)
            while left:
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    activations[left[0]] = self._run(index, activations[left[0]]).cpu()
                    left.pop(0)
                    continue
                self._lower_batch()
                left = self._split(left)


def _fitted_inputs(algorithm: Algorithm) -> ActivationScheme | None:
    """How inputs are rounded that weights are fitted to before they are rounded themselves."""
    options = algorithm.options
    wanted = getattr(options, "fit_inputs", False) and getattr(options, "true_sequential", False)
    scheme = algorithm.scheme.input_activations
    return scheme if wanted and scheme in (DYNAMIC, ASYMMETRIC) else None


def _head(model: CausalLM, algorithm: Algorithm) -> LinearRef:
    """The output layer, once it is sure that the scheme fits it: not after hours of walking."""
    ref = model.head()
    if ref is None:
        raise RunError(
            "this architecture has no output layer that is a linear",
            where=type(model.model).__name__,
            fix="remove `lm_head:` from the variant",
        )
    try:
        algorithm.scheme.weights.groups(ref.module.in_features)
    except ValueError as error:
        raise RunError(
            str(error), where=ref.name, fix="choose another group_size under `lm_head:`"
        ) from error
    return ref


def _note(index: int, records: list[dict[str, Any]]) -> str:
    """The block's worst layer, and how it compares with round-to-nearest on the same grid."""
    worst = max(records, key=lambda record: record["error"], default=None)
    if worst is None:
        return f"block {index}: nothing to quantize"
    note = f"block {index}: worst error {worst['error']:.1e}"
    fallbacks = sum(record["fallback"] for record in records)
    if worst["rtn_error"]:
        note += f" ({worst['error'] / worst['rtn_error']:.2f} x RTN)"
    return note + (f", {fallbacks} fell back" if fallbacks else "")


def _undersampled(tokens: int | None, in_features: int) -> bool:
    """Whether there were too few inputs to say anything of most of their directions."""
    return tokens is not None and tokens < FEW_TOKENS * in_features


def _divisor(samples: int, most: int) -> int:
    """The largest divisor of ``samples`` that is at most ``most``."""
    return max(d for d in range(1, min(most, samples) + 1) if samples % d == 0)


def _by_input(refs: Sequence[LinearRef]) -> dict[str, list[LinearRef]]:
    """Linears grouped by what they read, in model order."""
    groups: dict[str, list[LinearRef]] = {}
    for ref in refs:
        groups.setdefault(ref.input_group, []).append(ref)
    return groups


def _cast(value: Any, dtype: torch.dtype, made: dict[int, torch.Tensor] | None = None) -> Any:
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
        return BlockInputs(_cast(value.hidden, dtype, made), _cast(value.calls, dtype, made))
    if isinstance(value, dict):
        return {key: _cast(item, dtype, made) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype, made) for item in value)
    return value


def calibration_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """bfloat16 where a model is stored in it and the device multiplies it faster than float32."""
    if stored != torch.bfloat16:
        return torch.float32
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def read_layers(directory: Path) -> list[dict[str, Any]]:
    """The per-linear records of a quantized directory, in model order."""
    path = directory / LAYERS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # a line cut short by a kill: its block has no file either
    return records


def iterate_quantized(directory: Path) -> Iterator[tuple[str, QuantizedTensor, Scheme]]:
    """(linear name, tensor, scheme) of a quantized directory, one block in memory at a time."""
    schemes = {
        layer["name"]: Scheme.from_dict(layer["scheme"])
        for layer in read_layers(directory)
        if "scheme" in layer
    }
    head = [path for path in (directory / HEAD,) if path.exists()]
    for path in sorted(directory.glob("block-*.safetensors")) + head:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in sorted(k for k in keys if k.endswith(".codes")):
                name = key.removesuffix(".codes")

                def part(what: str, name: str = name, keys: set[str] = keys) -> Any:
                    full = f"{name}.{what}"
                    return file.get_tensor(full).clone() if full in keys else None

                yield (
                    name,
                    QuantizedTensor(
                        codes=part("codes"),
                        scale=part("scale"),
                        zero_point=part("zero_point"),
                        g_idx=part("g_idx"),
                        input_scale=part("input_scale"),
                        scheme=schemes[name].weights,
                    ),
                    schemes[name],
                )


def replaced_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Unquantized tensors that a transform changed (norm weights), by name in the checkpoint."""
    found = {}
    for path in sorted(directory.glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(".replaced"):
                    found[key.removesuffix(".replaced")] = file.get_tensor(key).clone()
    return found


def kv_scales(directory: Path) -> dict[str, torch.Tensor]:
    """Scales of cached keys and values, float32 [1], by name in the checkpoint; may be empty."""
    found = {}
    for path in sorted(directory.glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.endswith((KEY, VALUE)):
                    found[key] = file.get_tensor(key).clone()
    return found


def _flatten(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    parts = {
        "codes": tensor.codes,
        "scale": tensor.scale,
        "zero_point": tensor.zero_point,
        # Linears quantized together share theirs, and safetensors refuses to save one memory twice.
        "g_idx": None if tensor.g_idx is None else tensor.g_idx.clone(),
        "input_scale": tensor.input_scale,
    }
    return {f"{name}.{k}": v.cpu().contiguous() for k, v in parts.items() if v is not None}


def _block_file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.safetensors"


def _save_synced(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    # Neither tensors nor metadata, and an empty mapping: safetensors writes what it cannot read.
    save_file(tensors, temporary, metadata=metadata or None)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _append_synced(path: Path, lines: list[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _write_synced(path: Path, lines: list[str]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
