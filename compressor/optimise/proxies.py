"""What is known of a candidate before any of its stages runs: a roofline, and the layers' losses.

The objective comes from a roofline of this machine (`measure.roofline`), where schemes without a
kernel count as the full precision that they are dequantized to. The loss comes from one measurement
of every linear's sensitivity to every scheme (`quantize.sensitivity`): the sum over the linears is
what rounding to nearest would cost. Both are calibrated on what trials show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor import support
from compressor.errors import RunError
from compressor.measure import roofline
from compressor.measure.devices import Device
from compressor.measure.prices import resolve_prices
from compressor.models.dimensions import Dimensions
from compressor.models.shapes import LinearShape
from compressor.numerics.scheme import Scheme
from compressor.optimise.space import Candidate
from compressor.quantize import registry
from compressor.quantize.coverage import is_ignored
from compressor.quantize.precision import allocate_precision
from compressor.quantize.sensitivity import Sensitivity
from compressor.support import Target

if TYPE_CHECKING:
    from compressor.recipe import Measure

_ACCEPTED = 0.6  # share of guessed tokens that is taken to be accepted, where none was tried
_FLOAT_BITS = 5  # FP8 loses about as much as so many bits of integers: 3 of mantissa, and a sign


@dataclass(frozen=True)
class Load:
    """The point of the load that the objective is of."""

    concurrency: int
    input_length: int
    output_length: int

    @classmethod
    def of(cls, measure: Measure | None, concurrency: int | None) -> Load:
        """That of a recipe; one request of 128 + 64 tokens where nothing is measured."""
        if measure is None:
            return cls(concurrency or 1, 128, 64)
        load = measure.workload
        bounds = load.output_length_range or [load.output_length]
        point = concurrency or max(load.concurrency, default=1)
        return cls(point, load.input_length or 128, max(2, round(sum(bounds) / len(bounds))))


@dataclass(frozen=True)
class Estimate:
    """Of one candidate.

    Attributes:
        objective: in its unit, by the roofline alone; not yet calibrated.
        memory_bytes: weights and cache under the load.
        weight_bytes: of all weights.
        fails: why the engine would not load it; empty where it would.
    """

    objective: float
    memory_bytes: float
    weight_bytes: float
    fails: str = ""


class Proxies:
    """Estimates of objective and loss.

    Args:
        dims: of the model.
        device: that it is served on.
        target: engine that serves; None where nothing is measured.
        shapes: of the blocks' linears.
        load: the point that counts.
        minimise: the objective.
        prices: of the recipe.
        cpus: that the machine has; prices of a processor are by core.
        sensitivities: of every linear; none where there is no calibration text.
    """

    def __init__(
        self,
        dims: Dimensions,
        device: Device,
        target: Target | None,
        shapes: Sequence[LinearShape],
        load: Load,
        minimise: str,
        prices: Mapping[str, Any],
        cpus: int | None,
        sensitivities: Sequence[Sensitivity],
    ) -> None:
        self.dims, self.device, self.target, self.shapes = dims, device, target, shapes
        self.load, self.minimise, self.sensitivities = load, minimise, sensitivities
        given = {key: value for key, value in prices.items() if value is not None}
        self.prices = None
        if minimise == "cost":
            self.prices = resolve_prices(
                given | ({} if given.get("device") else {"device": device.price or device.id}),
                cpu_count=cpus if device.price == "cpu" else None,
            )
        self._parameters = sum(linear.parameters for linear in dims.linears)

    def baseline(self) -> Estimate:
        """Of the untouched model."""
        return self._point(roofline.Setup(self.dims, None, self._dtype), None)

    def estimate(self, candidate: Candidate) -> Estimate:
        """Of a candidate."""
        v = candidate.parsed
        setup = roofline.Setup(self.dims, None, self._dtype, v.kv_cache)
        fails = ""
        if v.quantize and not v.library:
            options: Any = v.quantizer.options
            if isinstance(options, registry.SchemeOptions):
                linear_bytes, scheme, fails = self._linears(candidate)
                setup = replace(setup, linear_bytes=linear_bytes, scheme=scheme)
        elif v.library is not None:  # whose kernels are not known: 4 or 8 bits a weight
            bits = 8 if "8" in str(v.quantize[-1].options) else 4
            setup = replace(setup, linear_bytes=self._parameters * bits / 8)
        if v.lm_head is not None:
            head = Scheme.parse(v.lm_head.scheme, v.lm_head.group_size)
            size = roofline.stored_bytes(self.dims.vocabulary, self.dims.hidden, head, self._dtype)
            setup = replace(setup, head_bytes=size)
        found = self._point(setup, v.speculate.depth if v.speculate is not None else None)
        if v.lm_head is not None and self.dims.tied:  # the embeddings are kept besides
            table = self.dims.embedding * roofline.BYTES[self._dtype]
            found = replace(
                found,
                weight_bytes=found.weight_bytes + table,
                memory_bytes=found.memory_bytes + table,
                objective=found.objective + (table if self.minimise == "size" else 0.0),
            )
        return replace(found, fails=fails)

    @property
    def _dtype(self) -> str:
        known = self.dims.dtype in ("float32", "float16", "bfloat16")
        return self.dims.dtype if known else "bfloat16"

    def _linears(self, candidate: Candidate) -> tuple[float, Scheme | None, str]:
        """(bytes that are read of the linears, the scheme that is computed in, why it fails)."""
        v = candidate.parsed
        options: Any = v.quantizer.options
        names = v.precision.schemes if v.precision is not None else [options.scheme]
        each: dict[str, tuple[float, Scheme | None]] = {}
        for name in names:
            scheme = options.model_copy(update={"scheme": name}).parsed()
            g_idx = getattr(options, "desc_act", False) and not getattr(
                options, "static_groups", True
            )
            found = None
            if self.target is not None and self.minimise != "size":
                found = support.check(self.target, scheme, self.shapes, g_idx=g_idx)
                if found.level == "fails":
                    return 0.0, None, found.reason or "the engine has no kernel"
            native = found is None or found.level == "native"
            read = sum(
                roofline.stored_bytes(
                    one.out_features, one.in_features, scheme if native else None, self._dtype
                )
                * one.count
                for one in self.dims.linears
            )
            each[name] = (read / self._parameters, scheme if native else None)
        shares = self._shares(candidate, names)
        kept = shares.pop("", 0.0) * roofline.BYTES[self._dtype]
        read = kept + sum(each[name][0] * share for name, share in shares.items())
        main = max(shares, key=lambda name: shares[name], default=names[0])
        return read * self._parameters, each[main][1], ""

    def _shares(self, candidate: Candidate, names: Sequence[str]) -> dict[str, float]:
        """Share of the linears' weights by scheme; of those left as they are under ``""``."""
        v = candidate.parsed
        if not self.sensitivities:
            return {name: 1 / len(names) for name in names}
        taken = self._schemes(candidate)
        sizes: dict[str, float] = {}
        for one in self.sensitivities:
            name = "" if is_ignored(one.name, v.ignore) else taken.get(one.name, names[0])
            sizes[name] = sizes.get(name, 0.0) + one.parameters
        whole = sum(sizes.values())
        return {name: size / whole for name, size in sizes.items()}

    def _schemes(self, candidate: Candidate) -> dict[str, str]:
        """Scheme by linear."""
        v = candidate.parsed
        budget = v.precision
        if budget is None:
            return {one.name: candidate.scheme for one in self.sensitivities}
        known = [
            replace(one, loss={name: one.loss[name] for name in budget.schemes if name in one.loss})
            for one in self.sensitivities
        ]
        try:
            return allocate_precision(
                known,
                mean_bits=budget.mean_bits,
                most_bytes=budget.size_gb and budget.size_gb * 1e9,
                most_loss=budget.max_loss,
                ignore=v.ignore,
            ).schemes
        except (RunError, ValueError):
            return {}

    def _point(self, setup: roofline.Setup, depth: int | None) -> Estimate:
        load = self.load
        context = load.input_length + load.output_length
        speculation = None
        if depth is not None:
            speculation = roofline.Speculation(1 + _ACCEPTED * depth, depth)
        made = roofline.estimate_point(
            setup,
            self.device,
            batch=load.concurrency,
            input_length=load.input_length,
            output_length=load.output_length,
            speculation=speculation,
            prices=self.prices,
        )
        objective = {
            "cost": made["cost_usd_per_mtok_output"],
            "latency": made["ttft_ms"] + made["tpot_ms"] * (load.output_length - 1),
            "size": setup.weight_bytes,
            "energy": 1 / made["tok_s"],
        }[self.minimise]
        memory = setup.weight_bytes + load.concurrency * setup.kv_bytes(context)
        return Estimate(float(objective or 0.0), memory, setup.weight_bytes)

    def loss(self, candidate: Candidate) -> float:
        """Rise of the mean loss [nats per token], as rounding to nearest would cause it; without
        sensitivities a figure that falls with the bits as rounding errors do."""
        v = candidate.parsed
        if not v.quantize:
            return 0.0
        if not self.sensitivities or v.library or not candidate.scheme:
            return self._by_bits(candidate)
        taken, total = self._schemes(candidate), 0.0
        for one in self.sensitivities:
            if is_ignored(one.name, v.ignore):
                continue
            scheme = taken.get(one.name, candidate.scheme)
            if scheme not in one.loss:
                return self._by_bits(candidate)
            total += one.loss[scheme]
        return total

    @staticmethod
    def _by_bits(candidate: Candidate) -> float:
        """Errors of a rounding fall by four, as squares, with every bit."""
        v = candidate.parsed
        bits = 4.0
        if v.precision is not None and v.precision.mean_bits:
            bits = v.precision.mean_bits
        elif candidate.scheme:
            weights = Scheme.parse(candidate.scheme.split("/")[0]).weights
            bits = _FLOAT_BITS if weights.type == "float" else weights.num_bits
        elif "8" in str(v.quantize[-1].options if v.quantize else ""):
            bits = 8.0
        return 64 * math.pow(4.0, -bits)
