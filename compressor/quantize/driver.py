"""Walk a model block by block and quantize its linears.

At any time one block's weights, the embeddings' output and the calibration activations are in
memory. Each block runs forward twice: once to collect the statistics of every linear's input, once
with its quantized weights to make the next block's input (GPTQ, arXiv 2210.17323, section 4); with
`true_sequential` once only, waiting at each linear until it is quantized (`suspended.py`).
Linears that share an input (q/k/v, gate/up) share one statistic. Algorithms that aim at the
original model's activations have those carried along, by one more forward. Weights are solved in
float32. The activations and the passes over them are in `stream.py`, the files in `codes.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM, LinearRef, by_input
from compressor.models.checkpoint import drop_unfinished
from compressor.models.kv_cache import CacheObserver, check_attention, no_cache
from compressor.numerics.memory import (
    WAITING_SHARE,
    free_bytes,
    refuse_out_of_memory,
    release_freed_pages,
    suppress_out_of_memory,
)
from compressor.numerics.scheme import ASYMMETRIC, DYNAMIC, ActivationScheme
from compressor.quantize.codes import (
    HEAD,
    LAYERS,
    REFINED,
    append_synced,
    block_file,
    drop_from,
    flatten,
    read_layers,
    save_synced,
)
from compressor.quantize.coverage import Coverage, is_ignored, undersampled
from compressor.quantize.devices import solving_devices, spread
from compressor.quantize.head import quantize_in_parts
from compressor.quantize.registry import (
    Algorithm,
    BlockRefinement,
    LayerRefinement,
    ModelRefinement,
    Transform,
    WeightResult,
)
from compressor.quantize.statistics import InputStatistics, fit_to_rounded_inputs
from compressor.quantize.stream import RESUME, Stream, divisor
from compressor.quantize.suspended import run_suspended
from compressor.quantize.transforms import apply_transforms, enough
from compressor.quantize.whole import STATE, refine_whole

_KEPT_STREAMS = 8  # activations of the block's width that a waiting batch keeps alive, at most


def quantize_model(
    model: CausalLM,
    algorithm: Algorithm,
    directory: Path,
    *,
    transforms: Sequence[Transform] = (),
    refinements: Sequence[LayerRefinement | BlockRefinement | ModelRefinement] = (),
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
    lowered: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Quantize every linear of every block into ``directory``; resume what is already there.

    Args:
        model: the opened model (weights are read block by block).
        algorithm: an instance from `compressor.quantize.registry`.
        directory: receives the files that `codes.py` names.
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
            where memory does not suffice.
        all_experts: while statistics are taken, run every token through every expert.
        dtype: what blocks run in; see `stream.calibration_dtype`.
        device: where blocks are run and solved.
        devices: where linears that read the same input are solved side by side; ``device`` and
            every other GPU when None.
        read_ahead: read the next block's weights while one is solved; when None, for a GPU only.
            From page cache a CPU reads a block in a hundredth of the time that solving it takes,
            and would hold it in memory meanwhile.
        advance: called with a note after each block, and after the output layer.
        lowered: called with each smaller batch that lack of memory forces.

    Returns:
        seconds, tokens, coverage (parameters quantized, linears skipped and why), resumed_at, the
        output layer's name where it was quantized, activations ("device", "memory" or "disk",
        where they were kept), batch_size (in the end), and of a refinement of the whole model what
        it found (refined).

    Raises:
        RunError: no linear is left to quantize, a layer's weights cannot take the scheme, there is
            no output layer that is a linear, the architecture's cache cannot be quantized, or a
            device has too little memory.
    """
    started = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    walk = _Walk(
        model, algorithm, exceptions or {}, transforms, refinements, directory, ignore,
        kv_cache, all_experts, dtype, device, head, devices or solving_devices(device),
        torch.device(device).type == "cuda" if read_ahead is None else read_ahead,
    )  # fmt: skip
    if kv_cache is not None:
        check_attention(model)
    coverage = Coverage(model, walk.head)
    stream, first = walk.stream, walk.resume_point()
    stream.tell = lowered
    if tokens is None and walk.uses_tokens:
        raise RunError("this algorithm needs calibration tokens", fix="add `calibration:`")
    if walk.follows_tokens:
        assert tokens is not None
        if first < walk.steps:
            others = [r.options.batch_size for r in walk.block_refinements]
            stream.start(tokens, batch_size, first, others)
    for _ in range(first):
        advance("already done")
    gc.collect()
    gc.freeze()  # what is there by now stays: looking through it after each block takes 0.3 s
    try:
        for index in range(first, walk.steps):
            advance(walk.block(index) if index < len(model.blocks) else walk.output_layer())
    finally:
        gc.unfreeze()
    covered = coverage.facts(read_layers(directory))
    if not covered["quantized_parameters"]:
        raise RunError(
            "no linear was quantized: every one is ignored or left out",
            fix="remove entries of `ignore`",
        )
    (directory / RESUME).unlink(missing_ok=True)
    refined = {}
    if walk.model_refinements:
        stream.release()
    for refinement in walk.model_refinements:
        assert tokens is not None
        with refuse_out_of_memory(
            "too little memory to refine the whole model",
            device,
            "remove the last step, shorten `calibration.length`, or use a larger device",
        ):
            refined["refined"] = refine_whole(
                model.checkpoint.directory,
                directory,
                refinement,
                tokens,
                head=walk.head is not None,
                dtype=dtype,
                device=device,
                advance=advance,
            )
    return refined | {
        "seconds": time.perf_counter() - started,
        "tokens": int(tokens.size) if tokens is not None and walk.uses_tokens else 0,
        "calibration_dtype": str(dtype).removeprefix("torch.") if walk.uses_tokens else None,
        "activations": stream.kept_on if walk.follows_tokens else None,
        "batch_size": stream.batch if walk.follows_tokens else None,
        "resumed_at_block": first,
        "scheme": algorithm.scheme.to_dict(),
        "head": walk.head.name if walk.head is not None else None,
        "coverage": covered,
    }


class _Walk:
    """One pass over the blocks: what is done with each, and how far the files on disk reach."""

    def __init__(
        self,
        model: CausalLM,
        algorithm: Algorithm,
        exceptions: Mapping[str, Algorithm],
        transforms: Sequence[Transform],
        refinements: Sequence[LayerRefinement | BlockRefinement | ModelRefinement],
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
        self.model_refinements: list[Any] = [r for r in refinements if r.level == "model"]
        self.needs_statistics = bool(
            algorithm.options.needs_calibration
            or transforms
            or self.layer_refinements
            or self.block_refinements
        )
        self.follows_tokens = self.needs_statistics or kv_cache is not None
        self.uses_tokens = self.follows_tokens or bool(self.model_refinements)
        self.kv_cache = kv_cache
        self.directory = directory
        self.ignore = ignore
        self.dtype = dtype
        self.device = device
        self.devices = list(devices)
        self.read_ahead = read_ahead
        self.channels = bool(transforms) or any(
            one.scheme.static_activations for one in (algorithm, *(exceptions or {}).values())
        )
        self.stream = Stream(
            model, directory, bool(self.block_refinements), all_experts, dtype, device
        )
        self.one_pass = True  # whether batches may wait for each other (`suspended.py`)

    def resume_point(self) -> int:
        """First block that has still to be done, after dropping whatever lies beyond it; the output
        layer counts as one more block."""
        drop_unfinished(self.directory)
        done = 0
        while self._file(done).exists():
            done += 1
        if self.follows_tokens and done < self.steps:
            # Blocks can only follow from activations: go back to the last ones that were saved.
            done = min(done, self.stream.saved_block())
        drop_from(self.directory, done)
        if done < self.steps:
            for name in (HEAD, REFINED, STATE):
                (self.directory / name).unlink(missing_ok=True)
        return done

    def _file(self, step: int) -> Path:
        """Where a block's codes go, or after the last one the output layer's."""
        if self.head is not None and step == len(self.model.blocks):
            return self.directory / HEAD
        return block_file(self.directory, step)

    def block(self, index: int) -> str:
        """Quantize one block; returns a note on it for the progress line."""
        model, stream, last = self.model, self.stream, index == self.steps - 1
        model.load_block(index, self.device, torch.float32)
        if self.read_ahead and index + 1 < len(model.blocks):
            model.read_ahead(index + 1, self.device)
        targets = [r for r in model.linears(index) if not is_ignored(r.name, self.ignore)]
        left = [r for r in model.linears(index) if is_ignored(r.name, self.ignore)]
        sequential = self.needs_statistics and self._is_sequential(targets)
        statistics: dict[str, InputStatistics] = {}
        if sequential and self.transforms:
            statistics = stream.collect(index, targets, self._statistics, samples=enough(stream))
        elif self.needs_statistics and not sequential:
            statistics = stream.collect(index, targets, self._statistics)
        if stream.original is not None:
            stream.forward(index, stream.original)
        replaced = apply_transforms(
            self.transforms, stream, index, targets, statistics, self._algorithm
        )
        results: dict[str, WeightResult] = {}
        seen: dict[str, int | None] = {}

        def solve(
            refs: list[LinearRef],
            found: InputStatistics | None,
            devices: Sequence[str] = self.devices,
        ) -> None:
            results.update(self._solve(refs, found, devices))
            seen.update({ref.name: found.tokens if found else None for ref in refs})

        ready = False  # whether stream.hidden is the next block's input already
        cache = CacheObserver()
        if sequential and self._suspended_fits(targets):
            ready = not self.block_refinements
            self._solve_suspended(index, targets, solve, cache)
        elif len(self.devices) > 1 and not sequential:
            # The statistics of all are there already: whole groups (experts) go side by side.
            groups = list(by_input(targets).items())

            def some(numbers: list[int], device: str) -> list[None]:
                for group, refs in (groups[number] for number in numbers):
                    solve(refs, statistics.pop(group, None), [device])
                return [None] * len(numbers)

            modules = [[ref.module for ref in refs] for _, refs in groups]
            work = [sum(m.out_features * m.in_features**2 for m in ms) for ms in modules]
            spread(work, self.devices, some)
        else:
            for group, refs in by_input(targets).items():
                if sequential:
                    statistics = stream.collect(
                        index, refs, functools.partial(self._statistics, last=True)
                    )
                solve(refs, statistics.pop(group, None))
        loss = self._refine_block(index, targets, results)
        if not ready and (self.kv_cache is not None or (self.needs_statistics and not last)):
            with self._watching(cache, index):
                stream.forward(index, stream.hidden)
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
                    "undersampled": undersampled(seen[ref.name], ref.module.in_features),
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
            tensors |= flatten(name, result.tensor)
        model.unload_block(index)
        append_synced(self.directory / LAYERS, [json.dumps(r) for r in records])
        save_synced(tensors, block_file(self.directory, index), {})
        stream.checkpoint(index)
        gc.collect()
        release_freed_pages()
        note = _note(index, [r for r in records if "error" in r])
        if stream.lowered or not self.one_pass:
            note += f", out of memory: batches of {stream.batch}"
            note += "" if self.one_pass else ", one pass per group"
        return f"{note}, activations on disk" if stream.kept_on == "disk" else note

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
            assert self.stream.hidden is not None
            statistics = InputStatistics(width, self.device, False, _fitted_inputs(algorithm))
            for part in self.stream.parts():
                hidden = self.stream.hidden[part].to(self.device)
                statistics.update(self.model.head_input(hidden, self.stream.ids[part]))
            seen = statistics.tokens
            if undersampled(seen, width):
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
            "undersampled": undersampled(seen, width),
            "error": result.error,
            "rtn_error": result.rtn_error,
            "fallback": result.fallback,
            "damp": result.damp,
        }
        append_synced(self.directory / LAYERS, [json.dumps(record)])
        save_synced(flatten(ref.name, result.tensor), self.directory / HEAD, {})
        return f"{ref.name}: relative error {result.error:.2e}"

    def _is_sequential(self, targets: list[LinearRef]) -> bool:
        return any(
            getattr(self._algorithm(ref).options, "true_sequential", False) for ref in targets
        )

    def _suspended_fits(self, targets: list[LinearRef]) -> bool:
        """Whether memory holds what every batch keeps alive while it waits. The result is the same
        either way, only the time is not."""
        hidden = self.stream.hidden
        assert hidden is not None
        widest = max(ref.module.in_features for ref in targets)
        per_token = (_KEPT_STREAMS * hidden.shape[-1] + 2 * widest) * self.dtype.itemsize
        needed = hidden[..., 0].numel() * per_token
        return self.one_pass and needed < WAITING_SHARE * free_bytes(self.device)

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
        stream, hidden = self.stream, self.stream.hidden
        assert hidden is not None
        groups = by_input(targets)
        found = {group: self._statistics(refs, last=True) for group, refs in groups.items()}
        left = dict(enumerate(stream.parts()))  # by number, those that have not come to the end
        watching = functools.partial(self._watching, cache, index, not self.block_refinements)

        def run(number: int) -> None:
            out = stream.run(index, hidden[left[number]])
            if not self.block_refinements:
                hidden[left[number]] = out
            del left[number]

        with suppress_out_of_memory():
            with watching(), stream.working(index), stream.every_expert(index):
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
            again = stream.collect(
                index, groups[group], functools.partial(self._statistics, last=True), parts=parts
            )
            solve(groups[group], again[group])
        if not self.block_refinements:
            with watching():
                stream.forward(index, hidden, parts)

    def _statistics(self, refs: list[LinearRef], last: bool = False) -> InputStatistics:
        """Of the input of linears; ``last`` where no transform will change it any more."""
        schemes = {_fitted_inputs(self._algorithm(ref)) for ref in refs} if last else set()
        rounded = schemes.pop() if len(schemes) == 1 else None
        width = refs[0].module.in_features
        return InputStatistics(width, self.device, self.channels, rounded)

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
            if seen is not None and not undersampled(seen.tokens, width):
                hessian, drift = seen.take_hessian(), seen.drift
                if not bool(torch.isfinite(torch.diagonal(hessian)).all()):
                    raise RunError(
                        "the squares of what these linears read are not finite",
                        where=", ".join(ref.name for ref in refs),
                        fix="blocks before them overflow: set `calibration.dtype: float32`, or "
                        "download the checkpoint again",
                    )
            else:
                hessian = torch.eye(width, device=self.device)
        parts: dict[int, list[LinearRef]] = {}
        for ref in refs:
            parts.setdefault(id(self._algorithm(ref)), []).append(ref)
        results = {}
        for part in parts.values():
            algorithm = self._algorithm(part[0])
            weights = [self.stream.weight(ref) for ref in part]
            if drift is not None:
                assert hessian is not None
                weights = fit_to_rounded_inputs(weights, hessian, drift, algorithm.options.damp)
            names = ", ".join(ref.name for ref in part)
            try:
                with refuse_out_of_memory(
                    f"too little memory on {', '.join(devices)} to quantize these linears",
                    names,
                    "lower `calibration.batch_size`, or use a larger device",
                ):
                    found = self._quantize(algorithm, weights, hessian, devices)
            except ValueError as error:
                raise RunError(
                    str(error),
                    where=names,
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
                self.stream.place(ref, result.tensor)
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
        stream = self.stream
        assert stream.hidden is not None and stream.original is not None
        losses = []
        for refinement in self.block_refinements:
            layers = [(ref.module, results[ref.name]) for ref in targets]
            size = divisor(len(stream.hidden), refinement.options.batch_size)
            forward = functools.partial(stream.run, index)
            with stream.working(index):
                tensors, *loss = refinement.refine(
                    layers, forward, stream.hidden, stream.original, size, index
                )
                for ref, tensor in zip(targets, tensors, strict=True):
                    stream.place(ref, tensor)
                    results[ref.name] = dataclasses.replace(results[ref.name], tensor=tensor)
            losses += loss
        total = sum(float(sample.float().square().sum()) for sample in stream.original)
        scale = total / stream.original.numel()
        return {"block_error_before": losses[0] / scale, "block_error": losses[-1] / scale}


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
