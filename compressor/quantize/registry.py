"""Algorithms by name, from this package and from others (entry points).

A third party adds an algorithm by naming its class under the entry point group
``compressor.algorithms``; nothing here has to change.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.numerics.scheme import ActivationKind, Scheme

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compressor.models.architecture import CausalLM
    from compressor.numerics.quantized import QuantizedTensor
    from compressor.quantize.statistics import InputStatistics

ENTRY_POINT_GROUP = "compressor.algorithms"
_BUILT_IN = (
    "rotation",
    "smoothquant",
    "awq",
    "rtn",
    "gptq",
    "coordinate_descent",
    "signround",
    "distillation",
    "bitsandbytes",
    "llama_cpp",
)
KINDS = (
    "rotation",
    "transform",
    "weights",
    "refinement",
    "library",
)  # in the order in which a recipe names them
_REGISTRY: dict[str, Any] = {}


class AlgorithmOptions(BaseModel):
    """What the options of every algorithm are made from."""

    model_config = ConfigDict(extra="forbid")

    @property
    def needs_calibration(self) -> bool:
        """Whether an algorithm with these options looks at the layers' inputs."""
        return True

    def work(self, parameters: int, width: int, length: int) -> float:
        """Floating-point operations on one block that the options add to a plain walk, roughly.

        Args:
            parameters: of the block's linears.
            width: inputs of its widest linear.
            length: tokens per calibration sample.
        """
        return 0.0


class SchemeOptions(AlgorithmOptions):
    """Options that every weight quantizer has."""

    scheme: str = Field(
        "W4A16",
        description="Bits of weights and activations: W{2..8}A{16,8}, such as W4A16; or FP8, "
        "8-bit floating point (float8_e4m3fn) for both.",
    )
    group_size: int | None = Field(
        None,
        description="Input columns that share a scale; -1 for one scale per output channel. "
        "Default: one per channel for 8-bit weights, 128 below.",
    )
    symmetric: bool = Field(
        True, description="Symmetric grid (no zero point). Engines are fastest with it."
    )
    observer: Literal["minmax", "mse", "output"] = Field(
        "minmax",
        description="How a group's range is chosen: minmax spans every weight, mse searches the "
        "range with the least error of the weights, output that with the least error of the "
        "layer's output (needs calibration).",
    )

    activations: ActivationKind = Field(
        "dynamic",
        description="Scales of 8-bit activations: one per token, found while serving (dynamic); "
        "with a zero point per token too, which halves the error where a token's largest value "
        "stands alone on one side (dynamic-asymmetric, W8A8 only); or one per layer from "
        "calibration (static: cheaper to serve, less exact).",
    )

    @property
    def needs_calibration(self) -> bool:
        return self.observer == "output" or self.activations == "static"

    @model_validator(mode="after")
    def _check_scheme(self) -> SchemeOptions:
        self.parsed()
        return self

    def parsed(self) -> Scheme:
        """The scheme that these options describe."""
        return Scheme.parse(self.scheme, self.group_size, self.symmetric, self.activations)


@dataclass
class WeightResult:
    """One quantized weight.

    Attributes:
        tensor: codes and scales.
        error: relative output error tr(E H E^T) / tr(W H W^T), E = quantized - W; with the
            identity for H when there are no statistics.
        rtn_error: the same for round-to-nearest.
        fallback: the algorithm did worse than round-to-nearest, whose result this is.
        damp: share of the Hessian's mean diagonal that was added to it; None without Hessian.
        rounded: float32 [out, in], what each code was rounded from: the weight, with the errors of
            other columns spread into it where the algorithm does that.
    """

    tensor: QuantizedTensor
    error: float
    rtn_error: float
    fallback: bool = False
    damp: float | None = None
    rounded: torch.Tensor | None = None

    def to(self, device: str) -> WeightResult:
        """The same on a device."""
        rounded = None if self.rounded is None else self.rounded.to(device)
        return replace(self, tensor=self.tensor.to(device), rounded=rounded)


class Transform(Protocol):
    """Moves scale between a layer and the one before it (``kind`` is "transform")."""

    Options: ClassVar[type[AlgorithmOptions]]
    kind: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    def scales(
        self, weights: Sequence[torch.Tensor], statistics: InputStatistics, scheme: Scheme
    ) -> torch.Tensor:
        """Divisors of the input's channels, float32 [in].

        Args:
            weights: float32 [out, in] of every linear that reads the input.
            statistics: of the input.
            scheme: how weights and activations will be rounded.
        """
        ...


class Algorithm(Protocol):
    """Turns a weight into integers (``kind`` is "weights").

    An option ``true_sequential`` asks for statistics that are taken anew after each group of
    linears.
    """

    Options: ClassVar[type[AlgorithmOptions]]
    kind: ClassVar[str]

    def __init__(self, options: Any, scale_dtype: torch.dtype) -> None: ...

    @property
    def options(self) -> Any: ...

    @property
    def scheme(self) -> Scheme: ...

    def quantize_all(
        self, weights: Sequence[torch.Tensor], hessian: torch.Tensor | None
    ) -> list[WeightResult]:
        """Quantize linears [out, in] that read the same input, whose Hessian is [in, in]."""
        ...


class Library(Protocol):
    """Quantizes a whole checkpoint by a library of its own, into a ``format`` of its own (``kind``
    is "library"). It stands alone in a variant, or after a rotation."""

    Options: ClassVar[type[AlgorithmOptions]]
    kind: ClassVar[str]
    format: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    @classmethod
    def version(cls) -> str:
        """The library's version, found without loading it; RunError when it is not there."""
        ...

    def quantize_checkpoint(
        self,
        model: CausalLM,
        directory: Path,
        *,
        ignore: Sequence[str],
        advance: Callable[[str], None],
    ) -> dict[str, Any]:
        """Fill ``directory``; returns ``format``, ``scheme``, ``coverage`` and what the exporter of
        that format needs."""
        ...


class LayerRefinement(Protocol):
    """Improves a quantized weight by itself (``kind`` is "refinement", ``level`` "layer").

    A refinement that also takes codes of scheme FP8 has ``takes_floats = True``.
    """

    Options: ClassVar[type[AlgorithmOptions]]
    kind: ClassVar[str]
    level: ClassVar[str]

    def __init__(self, options: Any, scale_dtype: torch.dtype) -> None: ...

    def refine(
        self, weight: torch.Tensor, result: WeightResult, hessian: torch.Tensor
    ) -> WeightResult: ...


class BlockRefinement(Protocol):
    """Improves all quantized weights of a block together (``kind`` is "refinement", ``level``
    "block")."""

    Options: ClassVar[type[AlgorithmOptions]]
    kind: ClassVar[str]
    level: ClassVar[str]

    def __init__(self, options: Any, scale_dtype: torch.dtype) -> None: ...

    @property
    def options(self) -> Any: ...

    def refine(
        self,
        layers: Sequence[tuple[nn.Linear, WeightResult]],
        forward: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        size: int,
        seed: int,
    ) -> tuple[list[QuantizedTensor], float, float]: ...


_Class = TypeVar("_Class", bound=type)


class ModelRefinement(Protocol):
    """Improves the whole quantized model at once, after all else (``kind`` is "refinement",
    ``level`` "model"). See `distillation.Distillation.refine`."""

    Options: ClassVar[type[AlgorithmOptions]]
    kind: ClassVar[str]
    level: ClassVar[str]

    def __init__(self, options: Any, scale_dtype: torch.dtype) -> None: ...

    @property
    def options(self) -> Any: ...  # with ``steps``, and ``norms`` where those are trained

    @property
    def scale_dtype(self) -> torch.dtype: ...

    def rows(self, samples: int) -> list[int]: ...

    def refine(self, *args: Any, **kwargs: Any) -> dict[str, Any]: ...


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator that makes an algorithm known under ``name``."""

    def add(cls: _Class) -> _Class:
        _REGISTRY[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"compressor.quantize.{name}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        _REGISTRY.setdefault(point.name, point.load())


def names() -> list[str]:
    """Names of all algorithms."""
    _discover()
    return sorted(_REGISTRY)


def get(name: str) -> Any:
    """The class of that name, an `Algorithm` or a transform; KeyError when there is none."""
    _discover()
    return _REGISTRY[name]


def relative_error(
    weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor | None
) -> float:
    """tr(E H E^T) / tr(W H W^T) for E = approximation - weight; H defaults to the identity."""
    difference = approximation - weight
    if hessian is None:
        error, scale = difference.square().sum(), weight.square().sum()
    else:
        error = ((difference @ hessian) * difference).sum()
        scale = ((weight @ hessian) * weight).sum()
    return float(error.clamp_min(0.0) / scale.clamp_min(1e-30))
