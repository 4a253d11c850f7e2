"""Estimates of speed, memory and cost from a roofline; nothing here is measured.

A step takes the longer of the time to move its bytes and the time to do its operations (Williams,
Waterman, Patterson, "Roofline", CACM 52(4), 2009). Bytes and operations of a decoder are counted as
in Pope et al., arXiv:2211.05102, and kipply, "Transformer Inference Arithmetic", 2022. With
efficiency 1 the result is a bound: no real engine is faster. ``docs/estimate.md`` has the formulas.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.errors import RecipeError
from compressor.measure.devices import FLOATS, Device
from compressor.measure.ledger import cost_usd_per_mtok
from compressor.measure.prices import PriceScenario
from compressor.models.dimensions import Dimensions
from compressor.numerics.scheme import Scheme

BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0}
SCALE_BYTES = 2.0  # scales have the checkpoint's dtype
MEMORY_SHARE = 0.9  # of the device's memory that an engine takes (vLLM's default)
_MOST = 1 << 24
# How engines call plain number types, and exporters the bytes that are in them.
_PLAIN = {name: name for name in FLOATS} | {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


@dataclass(frozen=True)
class Setup:
    """How a model is stored and computed.

    Attributes:
        dims: the model.
        scheme: of the blocks' linears; None leaves them in `dtype`.
        dtype: of activations, embedding, output layer and everything else that is not quantized.
        kv: number type of cached keys and values; None for `dtype`.
        linear_bytes: bytes of all the blocks' linears where they are known; else from `scheme`.
        head_bytes: of the output layer where it is known.
    """

    dims: Dimensions
    scheme: Scheme | None = None
    dtype: str = "bfloat16"
    kv: str | None = None
    linear_bytes: float | None = None
    head_bytes: float | None = None

    @property
    def compute(self) -> str:
        """Number type that the blocks' linears multiply."""
        if self.scheme is None or self.scheme.input_activations is None:
            return self.dtype
        return "fp8" if self.scheme.input_activations.type == "float" else "int8"

    def blocks_bytes(self, expert: bool) -> float:
        """Bytes of the blocks' linears, of the experts or of all others."""
        own = sum(
            stored_bytes(linear.out_features, linear.in_features, self.scheme, self.dtype)
            * linear.count
            for linear in self.dims.linears
            if linear.expert is expert
        )
        if self.linear_bytes is None:
            return own
        every = sum(linear.parameters for linear in self.dims.linears)
        part = sum(linear.parameters for linear in self.dims.linears if linear.expert is expert)
        return self.linear_bytes * part / every

    @property
    def output_bytes(self) -> float:
        """Bytes of the output layer's matrix, which every step reads."""
        if self.head_bytes is not None:
            return self.head_bytes
        return self.dims.embedding * BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights in memory."""
        table = 0.0 if self.dims.tied else self.dims.embedding * BYTES[self.dtype]
        rest = self.dims.rest * BYTES[self.dtype]
        return self.blocks_bytes(False) + self.blocks_bytes(True) + self.output_bytes + table + rest

    def kv_bytes(self, context: float) -> float:
        """Bytes that one sequence of `context` tokens keeps."""
        tokens = sum(min(context, window or context) for window in self.dims.windows)
        return tokens * self.dims.kv_values * BYTES[self.kv or self.dtype]


@dataclass(frozen=True)
class Efficiency:
    """Share of the bound that is reached, at decoding and at prefill: 1 is the bound itself."""

    decode: float = 1.0
    prefill: float = 1.0


@dataclass(frozen=True)
class Speculation:
    """Drafted tokens, verified in one step (Leviathan et al., arXiv:2211.17192).

    Attributes:
        acceptance_length: tokens that a step of the model yields on average, its own included.
        draft_tokens: drafted before each step.
        draft_cost: time to draft one token / time of a step of the model without speculation.
    """

    acceptance_length: float
    draft_tokens: int = 4
    draft_cost: float = 0.0

    def __post_init__(self) -> None:
        """RecipeError for what cannot be."""
        if self.draft_tokens < 1 or self.draft_cost < 0:
            raise RecipeError(
                "speculation drafts at least one token, at a cost of 0 or more",
                where="--draft-tokens, --draft-cost",
                fix="for example --draft-tokens 4 --draft-cost 0.05",
            )
        if not 1 <= self.acceptance_length <= self.draft_tokens + 1:
            raise RecipeError(
                f"an acceptance length of {self.acceptance_length:g} is impossible with "
                f"{self.draft_tokens} drafted tokens",
                where="--acceptance-length",
                fix=f"it lies between 1 and {self.draft_tokens + 1}",
            )


@dataclass(frozen=True)
class Step:
    """Time of one pass over the model, each part on its own [s]."""

    memory_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        """``memory`` or ``compute``."""
        return "memory" if self.memory_s >= self.compute_s else "compute"


def stored_bytes(out_features: int, in_features: int, scheme: Scheme | None, dtype: str) -> float:
    """Bytes of one linear: codes, scales and zero points, or plain numbers.

    Codes are packed into words of 32 bits, whole ones: 3 bits take 3.2.
    """
    size = out_features * in_features
    if scheme is None:
        return size * BYTES[dtype]
    weights = scheme.weights
    bits = 32 / (32 // weights.num_bits)
    group = weights.group_size if weights.strategy == "group" else None
    scales = out_features * (in_features / group if group else 1)
    points = 0.0 if weights.symmetric else scales * bits / 8
    return size * bits / 8 + scales * SCALE_BYTES + points


def expected_tokens(acceptance_rate: float, draft_tokens: int) -> float:
    """Tokens per step when each draft is accepted with that probability (2211.17192, eq. 1)."""
    if acceptance_rate >= 1:
        return draft_tokens + 1.0
    return (1 - acceptance_rate ** (draft_tokens + 1)) / (1 - acceptance_rate)


def experts_share(dims: Dimensions, tokens: float) -> float:
    """Expected share of the experts that a step with `tokens` tokens touches.

    Each token chooses k of E independently and evenly: 1 - (1 - k/E)^tokens. Real routers are less
    even and touch fewer.
    """
    if not dims.experts:
        return 1.0
    return 1 - (1 - min(1.0, dims.experts_per_token / dims.experts)) ** tokens


def step(setup: Setup, device: Device, *, batch: float, context: float, tokens: float = 1) -> Step:
    """One decoding step.

    Args:
        batch: sequences.
        context: tokens that each has in its cache.
        tokens: new tokens of each: 1, or one more than were drafted.
    """
    dims, new = setup.dims, batch * tokens
    moved = (
        setup.blocks_bytes(False)
        + setup.blocks_bytes(True) * experts_share(dims, new)
        + setup.output_bytes
        + dims.rest * BYTES[setup.dtype]
        + new * dims.hidden * BYTES[setup.dtype]  # rows of the embedding
        + batch * setup.kv_bytes(context)
    )
    return Step(
        moved / device.bandwidth,
        _seconds(setup, device, new, new * _attended(dims, context), new),
    )


def prefill(setup: Setup, device: Device, *, batch: float, length: int) -> Step:
    """All prompts of a batch at once: their operations, and each weight read once."""
    dims, tokens = setup.dims, batch * length
    pairs = sum(
        length * length / 2
        if window is None or window >= length
        else window * length - window * window / 2
        for window in dims.windows
    )
    moved = (
        setup.blocks_bytes(False)
        + setup.blocks_bytes(True) * experts_share(dims, tokens)
        + setup.output_bytes
        + dims.rest * BYTES[setup.dtype]
        + tokens * dims.hidden * BYTES[setup.dtype]
        + batch * setup.kv_bytes(length)
    )
    return Step(moved / device.bandwidth, _seconds(setup, device, tokens, batch * pairs, batch))


def _attended(dims: Dimensions, context: float) -> float:
    """Pairs of a new token and a kept one, over all layers."""
    return sum(min(context, window or context) for window in dims.windows)


def _seconds(setup: Setup, device: Device, tokens: float, pairs: float, outputs: float) -> float:
    """Time of the operations at the device's peaks [s]; two operations a multiply-add.

    Args:
        tokens: that go through the blocks.
        pairs: of tokens in attention, over all layers.
        outputs: tokens that logits are made for.
    """
    dims = setup.dims
    share = dims.experts_per_token / dims.experts if dims.experts else 1.0
    linear = sum(one.parameters * (share if one.expert else 1.0) for one in dims.linears)
    floats = dims.attention_width * pairs + dims.embedding * outputs
    quantized = 2 * linear * tokens / device.peak_of(setup.compute, setup.dtype)
    return quantized + 2 * floats / device.peak_of(setup.dtype)


def crossover_batch(setup: Setup, device: Device, *, context: float) -> int | None:
    """Smallest batch at which a decoding step is bound by compute; None when the cache's traffic
    keeps it bound by memory at any batch."""

    def computes(batch: int) -> bool:
        return step(setup, device, batch=batch, context=context).bound == "compute"

    if not computes(_MOST):
        return None
    low, high = 0, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if computes(middle) else (middle, high)
    return high


def max_batch(
    setup: Setup, device: Device, *, context: int, memory_share: float = MEMORY_SHARE
) -> int | None:
    """Most sequences of `context` tokens whose cache fits beside the weights; 0 when the weights
    alone do not fit, None when sequences keep nothing."""
    free = device.memory_bytes * memory_share - setup.weight_bytes
    each = setup.kv_bytes(context)
    if free < 0:
        return 0
    return int(free // each) if each else None


def estimate_point(
    setup: Setup,
    device: Device,
    *,
    batch: int,
    input_length: int,
    output_length: int,
    efficiency: Efficiency | None = None,
    speculation: Speculation | None = None,
    prices: PriceScenario | None = None,
) -> dict[str, Any]:
    """One batch whose requests start together, as `compress run` measures them.

    Returns ``batch``, ``ttft_ms``, ``tpot_ms``, ``tok_s`` (output tokens per second, prefill
    included), ``decode_tok_s``, ``bound`` of decoding, its ``memory_ms`` and ``compute_ms`` per
    step, ``cost_usd_per_mtok_output`` (None without prices), ``fits``.
    """
    reached = efficiency or Efficiency()
    context = input_length + output_length / 2  # on average over the output
    one = step(setup, device, batch=batch, context=context)
    made, seconds = one, one.seconds
    if speculation is not None:
        made = step(
            setup, device, batch=batch, context=context, tokens=speculation.draft_tokens + 1
        )
        drafting = speculation.draft_tokens * speculation.draft_cost * one.seconds
        seconds = (made.seconds + drafting) / speculation.acceptance_length
    first = prefill(setup, device, batch=batch, length=input_length).seconds / reached.prefill
    each = seconds / reached.decode
    rate = batch * output_length / (first + each * (output_length - 1))
    cost = None
    if prices is not None:
        cost = cost_usd_per_mtok(
            prices, tokens_per_second=rate, artifact_bytes=round(setup.weight_bytes)
        )
    most = max_batch(setup, device, context=input_length + output_length)
    return {
        "batch": batch,
        "ttft_ms": first * 1e3,
        "tpot_ms": each * 1e3,
        "tok_s": rate,
        "decode_tok_s": batch / each,
        "bound": made.bound,
        "memory_ms": made.memory_s * 1e3,
        "compute_ms": made.compute_s * 1e3,
        "cost_usd_per_mtok_output": cost,
        "fits": most is None or batch <= most,
    }


def estimate(
    setup: Setup,
    device: Device,
    *,
    batches: Sequence[int],
    input_length: int,
    output_length: int,
    efficiency: Efficiency | None = None,
    speculation: Speculation | None = None,
    prices: PriceScenario | None = None,
) -> dict[str, Any]:
    """Everything that is known beforehand of a model on a device, JSON-ready.

    Raises RecipeError for lengths or batches that are not positive.
    """
    if min(*batches, input_length, output_length - 1) < 1:
        raise RecipeError(
            "batches and input must be at least 1, output at least 2",
            where="--batch, --input, --output",
            fix="for example --batch 1,8 --input 512 --output 128",
        )
    dims, whole = setup.dims, input_length + output_length
    reached = efficiency or Efficiency()
    return {
        "estimate": True,
        "model": dims.name,
        "parameters": dims.parameters,
        "active_parameters": dims.active_parameters,
        "scheme": setup.scheme.name if setup.scheme else setup.dtype,
        "dtype": setup.dtype,
        "kv_cache": setup.kv or setup.dtype,
        "device": device.to_dict(),
        "weight_bytes": setup.weight_bytes,
        "kv_bytes_per_sequence": setup.kv_bytes(whole),
        "input_length": input_length,
        "output_length": output_length,
        "efficiency": asdict(reached),
        "speculation": asdict(speculation) if speculation else None,
        "crossover_batch": crossover_batch(setup, device, context=input_length + output_length / 2),
        "max_batch": max_batch(setup, device, context=whole),
        "memory_share": MEMORY_SHARE,
        "prices": prices.to_dict() if prices else None,
        "points": [
            estimate_point(
                setup,
                device,
                batch=batch,
                input_length=input_length,
                output_length=output_length,
                efficiency=reached,
                speculation=speculation,
                prices=prices,
            )
            for batch in batches
        ],
    }


def parse_scheme(name: str, group_size: int | None = None) -> tuple[Scheme | None, str | None]:
    """(scheme, dtype) of ``W4A16``, ``FP8``, or a plain ``fp16``, ``bf16``, ``fp32``."""
    plain = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"} | {f: f for f in FLOATS}
    if name.lower() in plain:
        return None, plain[name.lower()]
    try:
        return Scheme.parse(name.upper(), group_size), None
    except ValueError as error:
        raise RecipeError(
            str(error), where="--scheme", fix="for example W4A16, W8A8, FP8, or bf16"
        ) from error


@dataclass(frozen=True)
class Comparison:
    """A run's measured points against their estimates.

    Attributes:
        rows: one per variant and concurrency: ``predicted_*`` with the calibrated efficiency,
            ``bound_*`` with efficiency 1, ``measured_*``, and ``*_error``:
            predicted / measured - 1.
        efficiency: from the baseline's points: median of bound / measured.
        median_tpot_error: size of the error of TPOT, over the points that the efficiency was not
            taken from; None where there are none.
    """

    device: Device
    efficiency: Efficiency
    rows: tuple[dict[str, Any], ...]
    median_tpot_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "estimate": True,
            "device": self.device.to_dict(),
            "efficiency": asdict(self.efficiency),
            "rows": list(self.rows),
            "median_tpot_error": self.median_tpot_error,
        }


def compare(report: Mapping[str, Any], device: Device, dims: Dimensions) -> Comparison | None:
    """Predict every measured point of a report and say how far off the predictions are.

    The efficiency is calibrated on the baseline alone, so that the other variants' errors say what
    an estimate made before compressing would have been worth. Points of an open loop are left out,
    since nobody fixed how many requests were in flight.

    Args:
        report: content of ``report.json``.
        device: the one that it was measured on.
        dims: of its model.

    Returns None where the baseline has no point that can be compared.
    """
    engine = report["workload"]["engine"] if report["workload"] else ""
    found = [
        (variant["name"], run_setup(dims, variant, row["dtype"], engine), row)
        for variant in report["variants"]
        for row in variant["performance"]
        if row.get("rate_per_s") is None and row["tpot_ms"]["p50"] and row["ttft_ms"]["p50"]
    ]
    bounds = [_predict(setup, device, row) for _, setup, row in found]
    own = [
        (bound, row)
        for bound, (name, _, row) in zip(bounds, found, strict=True)
        if name == report["baseline"]
    ]
    if not own:
        return None
    efficiency = Efficiency(
        decode=statistics.median(b["tpot_ms"] / r["tpot_ms"]["p50"] for b, r in own),
        prefill=statistics.median(b["ttft_ms"] / r["ttft_ms"]["p50"] for b, r in own),
    )
    rows = []
    for bound, (name, setup, row) in zip(bounds, found, strict=True):
        made = _predict(setup, device, row, efficiency)
        line: dict[str, Any] = {
            "variant": name,
            "concurrency": row["concurrency"],
            "bound": bound["bound"],
        }
        measured = {
            "ttft_ms": row["ttft_ms"]["p50"],
            "tpot_ms": row["tpot_ms"]["p50"],
            "tok_s": row["throughput_tok_s"]["value"],
        }
        for key, value in measured.items():
            line |= {
                f"bound_{key}": bound[key],
                f"predicted_{key}": made[key],
                f"measured_{key}": value,
                f"{key}_error": made[key] / value - 1,
            }
        rows.append(line)
    others = [abs(row["tpot_ms_error"]) for row in rows if row["variant"] != report["baseline"]]
    error = statistics.median(others) if others else None
    return Comparison(device, efficiency, tuple(rows), error)


def _predict(
    setup: Setup, device: Device, row: Mapping[str, Any], efficiency: Efficiency | None = None
) -> dict[str, Any]:
    """`estimate_point` at a measured point, for the mean lengths of the requests answered there."""
    answered = row["requests"] * (1 - (row["error_rate"] or 0))
    return estimate_point(
        setup,
        device,
        batch=row["concurrency"],
        input_length=max(1, round(row["prompt_tokens"] / answered)),
        output_length=max(2, round(row["output_tokens"] / answered)),
        efficiency=efficiency,
    )


def run_setup(dims: Dimensions, variant: Mapping[str, Any], dtype: str, engine: str = "") -> Setup:
    """How a run's variant is stored: the quantized linears' bytes as its artifact has them.

    Args:
        dims: of the model.
        variant: of the report.
        dtype: that it was measured in, and what is not quantized counts in; where that is no plain
            type (``Q4_0``, or unknown) it is the checkpoint's.
        engine: that it was measured in.
    """
    plain = _PLAIN.get(dtype) or _PLAIN.get(dims.dtype, "bfloat16")
    scheme = None
    for name in (variant["scheme"] or "").split(" ")[0].split("/"):
        try:
            scheme = Scheme.parse(name, variant["group_size"])
            break
        except ValueError:
            continue  # a library's own, such as NF4
    served = [a for a in variant["artifacts"] if (a["format"] == "gguf") == (engine == "llama.cpp")]
    sizes = ((served[0]["tensors"] or {}) if served else {}).get("bytes_by_scheme", {})
    # Rounded embeddings of a GGUF file have ggml's type alone; linears have their scheme as well.
    table = float(sizes.get("Q8_0", 0))
    head = table if table and dims.tied else None
    total = float(sum(size for name, size in sizes.items() if name not in _PLAIN)) - table
    if not total:
        return Setup(dims, scheme, plain, head_bytes=head)
    coverage = variant["coverage"] or {}
    inside = coverage.get("quantized_parameters", 0) - coverage.get("head_parameters", 0)
    left = max(0, (coverage.get("block_parameters") or inside) - inside)
    blocks = total
    layers = (variant["quantization"] or {}).get("layers", [])
    if any(layer["name"] == "lm_head" for layer in layers):
        # The artifact's sizes do not tell the output layer apart: share by parameters.
        parameters = sum(linear.parameters for linear in dims.linears) - left
        blocks = total * parameters / (parameters + dims.embedding)
        head = total - blocks
    return Setup(dims, scheme, plain, linear_bytes=blocks + left * BYTES[plain], head_bytes=head)
