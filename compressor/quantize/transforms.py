"""Apply transforms to a block: scale moves between its layers, and its output stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compressor.models.architecture import LinearRef
from compressor.models.experts import UnfusedExperts
from compressor.models.folding import Producer, find_producers
from compressor.quantize.coverage import undersampled
from compressor.quantize.registry import Algorithm, Transform
from compressor.quantize.statistics import InputStatistics
from compressor.quantize.stream import Stream, cast

_TRANSFORM_TOKENS = 16384
FOLD_TOLERANCE = 1e-3  # relative change of a block's output that rounding alone explains


def enough(stream: Stream) -> int | None:
    """Samples that transforms look at where the quantizer takes statistics of its own: they
    choose one number a channel. All (None) for experts, of which each sees a few tokens."""
    assert stream.hidden is not None
    modules = (module for block in stream.model.blocks for module in block.modules())
    if any(isinstance(module, UnfusedExperts) for module in modules):
        return None
    samples = -(-_TRANSFORM_TOKENS // stream.hidden.shape[1])
    return min(len(stream.hidden), -(-samples // stream.batch) * stream.batch)


def apply_transforms(
    transforms: Sequence[Transform],
    stream: Stream,
    index: int,
    targets: list[LinearRef],
    statistics: dict[str, InputStatistics],
    algorithm: Callable[[LinearRef], Algorithm],
) -> dict[str, torch.Tensor]:
    """Apply the transforms; returns the unquantized tensors that were changed, by their name
    in the checkpoint. The statistics are brought to what the changed inputs would give.

    The block's output on one batch must stay the same, else everything is taken back."""
    if not transforms:
        return {}
    assert stream.hidden is not None
    model = stream.model
    sample = stream.hidden[: stream.batch].to(stream.device, torch.float32)
    inputs = cast(stream.inputs[stream.batch], torch.float32)
    producers, before = find_producers(model, index, sample, inputs, targets)
    applied: list[tuple[Producer, torch.Tensor]] = []
    for producer in producers:
        seen = statistics.get(producer.input_group)
        width = producer.consumers[0].module.in_features
        if seen is None or undersampled(seen.tokens, width):
            continue
        for transform in transforms:
            weights = [ref.module.weight.detach() for ref in producer.consumers]
            scheme = algorithm(producer.consumers[0]).scheme
            scale = transform.scales(weights, seen, scheme)
            if bool((scale != 1).any()):
                scale = producer.apply(scale)
                seen.divide(scale)
                applied.append((producer, scale))
    with torch.no_grad():
        after = model.run_block(index, sample, inputs)
    if float((after - before).norm() / before.norm()) > FOLD_TOLERANCE:
        for producer, scale in reversed(applied):
            producer.undo()
            statistics[producer.input_group].divide(1 / scale)
        return {}
    names = {ref.name for ref in targets}
    changed = {}
    for parameter in sorted({p for producer, _ in applied for p in producer.parameters}):
        key = model.disk_name(parameter)
        if key.removesuffix(".weight") not in names:
            value = model.model.get_parameter(parameter).detach()
            changed[key] = value.to(model.checkpoint.dtype(key)).cpu()
    return changed
