"""Walk a model block by block and quantize its linears.

At any time one block's weights, the embeddings' output and the calibration activations are in
memory. Each block runs forward twice: once to collect the statistics of every linear's input, once
with its quantized weights to make the next block's input (GPTQ, arXiv 2210.17323, section 4).
Linears that share an input (q/k/v, gate/up) share one statistic.

Output, format-neutral and readable block by block:

    block-00000.safetensors   {linear}.codes int8 [out, in], .scale float32 [out, groups],
                              .zero_point int8 [out, groups] and .g_idx int32 [in] where used;
                              {parameter}.replaced: unquantized tensors that a transform changed
    layers.jsonl              one line per linear: scheme, error, RTN's error, fallback
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.errors import RunError
from compressor.models.architecture import BlockInputs, CausalLM, LinearRef
from compressor.models.folding import Producer, find_producers
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize.registry import WeightResult
from compressor.quantize.statistics import InputStatistics

CHECKPOINT_SECONDS = float(os.environ.get("COMPRESSOR_CHECKPOINT_SECONDS", "20"))
LAYERS = "layers.jsonl"
_RESUME = "resume.safetensors"
FOLD_TOLERANCE = 1e-3  # relative change of a block's output that rounding alone explains


class WeightAlgorithm(Protocol):
    """What the driver needs of an algorithm that turns one weight into integers."""

    needs_hessian: bool

    @property
    def scheme(self) -> Scheme: ...

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> WeightResult: ...


class Transform(Protocol):
    """What the driver needs of an algorithm that moves scale between layers beforehand."""

    def scales(
        self,
        weights: Sequence[torch.Tensor],
        absmax: torch.Tensor,
        rows: torch.Tensor,
        scheme: Scheme,
    ) -> torch.Tensor: ...


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a linear is left out: an entry is a whole name, or a regular expression that
    matches the whole name."""
    return any(name == pattern or re.fullmatch(pattern, name) for pattern in ignore)


def quantize_model(
    model: CausalLM,
    algorithm: WeightAlgorithm,
    directory: Path,
    *,
    transforms: Sequence[Transform] = (),
    tokens: np.ndarray | None = None,
    ignore: Sequence[str] = (),
    batch_size: int = 8,
    device: str = "cpu",
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Quantize every linear of every block into ``directory``; resume what is already there.

    Args:
        model: the opened model (weights are read block by block).
        algorithm: an instance from `compressor.quantize.registry`.
        directory: receives the files named in this module's docstring.
        transforms: applied to each block before the algorithm; at most one so far.
        tokens: int32 [samples, length], needed when the algorithm or a transform has statistics.
        ignore: names or regular expressions of linears to leave as they are.
        batch_size: samples per forward; lowered to a divisor of the number of samples.
        device: where blocks are run and solved.
        advance: called with a note after each block.

    Returns:
        seconds, tokens, coverage (parameters quantized, linears skipped and why), resumed_at.

    Raises:
        RunError: no linear is left to quantize, or a layer's weights cannot take the scheme.
    """
    started = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    skipped = [
        {"name": name, "reason": reason}
        for index in range(len(model.blocks))
        for name, reason in model.skipped(index)
    ] + [{"name": name, "reason": reason} for name, reason in model.outside_linears()]
    walk = _Walk(model, algorithm, transforms, directory, ignore, device)
    first = walk.resume_point()
    if walk.needs_statistics:
        if tokens is None:
            raise RunError("this algorithm needs calibration tokens", fix="add `calibration:`")
        walk.start(tokens, batch_size, first)
    quantized = 0
    for _ in range(first):
        advance("already done")
    for index in range(first, len(model.blocks)):
        advance(walk.block(index))
    for record in read_layers(directory):
        if record.get("reason"):
            skipped.append({"name": record["name"], "reason": record["reason"]})
        else:
            quantized += record["parameters"]
    if not quantized:
        raise RunError(
            "no linear was quantized: every one is ignored or left out",
            fix="remove entries of `ignore`",
        )
    (directory / _RESUME).unlink(missing_ok=True)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": int(tokens.size) if tokens is not None and walk.needs_statistics else 0,
        "resumed_at_block": first,
        "scheme": algorithm.scheme.to_dict(),
        "coverage": {
            "total_parameters": model.num_parameters,
            "quantized_parameters": quantized,
            "share": quantized / model.num_parameters,
            "skipped": skipped,
        },
    }


class _Walk:
    """State of one pass over the blocks: the activations, and how far the files on disk reach."""

    def __init__(
        self,
        model: CausalLM,
        algorithm: WeightAlgorithm,
        transforms: Sequence[Transform],
        directory: Path,
        ignore: Sequence[str],
        device: str,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.transforms = transforms
        self.needs_statistics = algorithm.needs_hessian or bool(transforms)
        self.directory = directory
        self.ignore = ignore
        self.device = device
        self.hidden: torch.Tensor | None = None
        self.inputs: BlockInputs | None = None
        self.batch = 1
        self.saved = time.monotonic()

    def resume_point(self) -> int:
        """First block that has still to be done, after dropping whatever lies beyond it."""
        done = 0
        while _block_file(self.directory, done).exists():
            done += 1
        if self.needs_statistics:
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
        return done

    def start(self, tokens: np.ndarray, batch_size: int, first: int) -> None:
        """Embed the calibration tokens, or read back the activations of block ``first``."""
        samples = len(tokens)
        self.batch = max(d for d in range(1, min(batch_size, samples) + 1) if samples % d == 0)
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            head = self.model.embed(ids[: self.batch].to(self.device))
            # Masks and rotary tables depend on the batch's shape alone: kept from the first batch.
            self.inputs = head
            if first:
                self.hidden = load_file(self.directory / _RESUME)["hidden"].clone()
                return
            self.hidden = torch.empty(samples, *head.hidden.shape[1:], dtype=head.hidden.dtype)
            self.hidden[: self.batch] = head.hidden.cpu()
            for start in range(self.batch, samples, self.batch):
                part = slice(start, start + self.batch)
                self.hidden[part] = self.model.embed(ids[part].to(self.device)).hidden.cpu()

    def block(self, index: int) -> str:
        """Quantize one block; returns a note on it for the progress line."""
        model, last = self.model, index == len(self.model.blocks) - 1
        model.load_block(index, self.device, torch.float32)
        targets = [r for r in model.linears(index) if not is_ignored(r.name, self.ignore)]
        left = [r for r in model.linears(index) if is_ignored(r.name, self.ignore)]
        statistics = self._collect(index, targets) if self.needs_statistics else {}
        tensors: dict[str, torch.Tensor] = {}
        records: list[dict[str, Any]] = [
            {"block": index, "name": r.name, "reason": "ignored by the recipe"} for r in left
        ]
        names = {ref.name for ref in targets}
        scaled, smoothing = self._transform(index, targets, statistics)
        for parameter in sorted(scaled):
            key = model.disk_name(parameter)
            if key.removesuffix(".weight") not in names:
                value = model.model.get_parameter(parameter).detach()
                tensors[f"{key}.replaced"] = value.to(model.checkpoint.dtype(key)).cpu()
        for ref in targets:
            seen = statistics.get(ref.input_group)
            result = self._solve(ref, seen, smoothing.get(ref.input_group))
            tensors |= _flatten(ref.name, result.tensor)
            records.append(
                {
                    "block": index,
                    "name": ref.name,
                    "scheme": self.algorithm.scheme.name,
                    "parameters": ref.module.weight.numel(),
                    "tokens": seen.tokens if seen else None,
                    "error": result.error,
                    "rtn_error": result.rtn_error,
                    "fallback": result.fallback,
                    "damp": result.damp,
                }
            )
            with torch.no_grad():
                ref.module.weight.copy_(result.tensor.dequantize().to(ref.module.weight.device))
        if self.needs_statistics and not last:
            self._forward(index, keep=True)
        model.unload_block(index)
        _append_synced(self.directory / LAYERS, [json.dumps(r) for r in records])
        _save_synced(tensors, _block_file(self.directory, index), {})
        if self.hidden is not None and time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            meta = {"block": str(index + 1)}
            _save_synced({"hidden": self.hidden}, self.directory / _RESUME, meta)
            self.saved = time.monotonic()
        gc.collect()
        errors = [r["error"] for r in records if "error" in r]
        worst = max(errors, default=0.0)
        return f"block {index}: worst relative error {worst:.2e}"

    def _collect(self, index: int, targets: list[LinearRef]) -> dict[str, InputStatistics]:
        """Run the block over the calibration set; one Hessian for each distinct input."""
        found: dict[str, InputStatistics] = {}
        handles = []
        for ref in targets:
            if ref.input_group in found:
                continue
            accumulator = InputStatistics(ref.module.in_features, self.device)
            found[ref.input_group] = accumulator

            def hook(
                module: torch.nn.Module, args: tuple, into: InputStatistics = accumulator
            ) -> None:
                into.update(args[0])

            handles.append(ref.module.register_forward_pre_hook(hook))
        self._forward(index, keep=False)
        for handle in handles:
            handle.remove()
        return found

    def _transform(
        self, index: int, targets: list[LinearRef], statistics: dict[str, InputStatistics]
    ) -> tuple[set[str], dict[str, torch.Tensor]]:
        """Apply the transforms; returns the parameters that were changed, and the divisors of each
        input group (by which its Hessian, taken before, is divided on both sides).

        The block's output on one batch must stay the same, else everything is taken back."""
        changed: set[str] = set()
        divisors: dict[str, torch.Tensor] = {}
        if not self.transforms:
            return changed, divisors
        assert self.hidden is not None and self.inputs is not None
        sample = self.hidden[: self.batch].to(self.device)
        producers, before = find_producers(self.model, index, sample, self.inputs, targets)
        applied: list[Producer] = []
        for producer in producers:
            seen = statistics.get(producer.input_group)
            if seen is None or not seen.tokens:
                continue
            weights = [ref.module.weight.detach() for ref in producer.consumers]
            for transform in self.transforms:
                scale = transform.scales(weights, seen.absmax, seen.rows, self.algorithm.scheme)
                if bool((scale != 1).any()):
                    divisors[producer.input_group] = producer.apply(scale)
                    changed |= producer.parameters
                    applied.append(producer)
        with torch.no_grad():
            after = self.model.run_block(index, sample, self.inputs)
        if float((after - before).norm() / before.norm()) > FOLD_TOLERANCE:
            for producer in reversed(applied):
                producer.undo()
            return set(), {}
        return changed, divisors

    def _forward(self, index: int, *, keep: bool) -> None:
        assert self.hidden is not None and self.inputs is not None
        with torch.no_grad():
            for start in range(0, len(self.hidden), self.batch):
                part = slice(start, start + self.batch)
                out = self.model.run_block(index, self.hidden[part].to(self.device), self.inputs)
                if keep:
                    self.hidden[part] = out.cpu()

    def _solve(
        self, ref: LinearRef, seen: InputStatistics | None, divisor: torch.Tensor | None
    ) -> WeightResult:
        weight = ref.module.weight.detach().to(torch.float32)
        hessian = None
        if self.algorithm.needs_hessian:
            # An expert that no token reached has no statistics: round to nearest (identity H).
            reached = seen is not None and seen.tokens > 0
            if reached and seen is not None:
                hessian = seen.hessian.result()
                if divisor is not None:
                    hessian /= divisor.unsqueeze(0) * divisor.unsqueeze(1)
            else:
                hessian = torch.eye(weight.shape[1], device=weight.device)
        try:
            return self.algorithm.quantize(weight, hessian)
        except ValueError as error:
            raise RunError(
                str(error),
                where=ref.name,
                fix="choose another group_size, or name the layer under `ignore`",
            ) from error


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


def iterate_quantized(directory: Path, scheme: Scheme) -> Iterator[tuple[str, QuantizedTensor]]:
    """(linear name, quantized tensor) of a quantized directory, one block in memory at a time."""
    for path in sorted(directory.glob("block-*.safetensors")):
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
                        scheme=scheme.weights,
                    ),
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


def _flatten(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    parts = {
        "codes": tensor.codes,
        "scale": tensor.scale,
        "zero_point": tensor.zero_point,
        "g_idx": tensor.g_idx,
    }
    return {f"{name}.{k}": v.cpu().contiguous() for k, v in parts.items() if v is not None}


def _block_file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.safetensors"


def _save_synced(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
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
