"""Round to nearest: each weight to the closest point of its grid. Needs no calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from compressor.numerics import grid
from compressor.numerics.scheme import Scheme
from compressor.quantize.registry import SchemeOptions, WeightResult, register, relative_error


@register("rtn")
class RTN:
    """Round-to-nearest quantizer.

    Args:
        options: scheme, group_size, symmetric, observer.
        scale_dtype: dtype that scales are stored in.
    """

    Options: ClassVar[type[SchemeOptions]] = SchemeOptions
    kind: ClassVar[str] = "weights"

    def __init__(self, options: SchemeOptions, scale_dtype: torch.dtype = torch.float32) -> None:
        self.options = options
        self.scale_dtype = scale_dtype

    @property
    def scheme(self) -> Scheme:
        return self.options.parsed()

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor | None = None) -> WeightResult:
        """Quantize float32 [out, in]; ValueError when group_size does not divide ``in`` or the
        weight, or a scale in its storage dtype, is not finite."""
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("the weight holds NaN or infinite values")
        scheme = self.scheme.weights
        observer = self.options.observer
        scale, zero = grid.fit_grid(weight, scheme, observer, self.scale_dtype, hessian)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"the weight is too large for scales stored in {self.scale_dtype}")
        tensor = grid.quantize(weight, scale, zero, scheme)
        error = relative_error(weight, tensor.dequantize(), hessian)
        return WeightResult(tensor, error, error, rounded=weight)

    def quantize_all(
        self, weights: Sequence[torch.Tensor], hessian: torch.Tensor | None = None
    ) -> list[WeightResult]:
        """`quantize` of each of several linears that read the same input."""
        return [self.quantize(weight, hessian) for weight in weights]
