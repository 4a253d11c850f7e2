"""GPTQ: round columns one by one, spreading each one's error over those still to come.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", arXiv 2210.17323. With H the Hessian of the layer's output error and U
the upper Cholesky factor of its inverse, column i is rounded, its error divided by U[i, i], and
that times U[i, i+1:] is taken from the columns to its right (algorithm 1). Columns right of the
current block of ``block_size`` get their updates in one matrix product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from compressor.numerics import grid
from compressor.numerics.quantized import CODE_DTYPE, QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize.columns import round_columns
from compressor.quantize.registry import SchemeOptions, WeightResult, register, relative_error
from compressor.quantize.rtn import RTN

_MAX_DAMP = 10.0


class GPTQOptions(SchemeOptions):
    """Options of GPTQ."""

    desc_act: bool = Field(
        False,
        description="Round columns in the order of falling activation energy. Better quality at "
        "low bits; without static_groups engines need a group index per column (g_idx), "
        "which is slower.",
    )
    static_groups: bool = Field(
        True,
        description="Fix every group's scale from the original weights before rounding, so that "
        "desc_act keeps groups contiguous and costs nothing when served. Only with desc_act.",
    )
    block_size: int = Field(128, ge=1, description="Columns between two lazy batch updates.")
    damp: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Share of the mean diagonal added to the Hessian; grown tenfold, layer by "
        "layer, where the Cholesky factorisation fails.",
    )
    fit_inputs: bool = Field(
        True,
        description="With int8 activations that are rounded per token: fit the weights to the "
        "rounded inputs that they will meet, by least squares, before they are rounded themselves. "
        "Only with true_sequential.",
    )
    true_sequential: bool = Field(
        True,
        description="Take the statistics of each group of linears in a block with those before it "
        "quantized already. Costs memory for the batches that wait, or, where that lacks, one more "
        "forward pass per group.",
    )

    @property
    def needs_calibration(self) -> bool:
        return True


@register("gptq")
class GPTQ:
    """GPTQ quantizer.

    Args:
        options: see `GPTQOptions`.
        scale_dtype: dtype that scales are stored in.
    """

    Options: ClassVar[type[GPTQOptions]] = GPTQOptions
    kind: ClassVar[str] = "weights"

    def __init__(self, options: GPTQOptions, scale_dtype: torch.dtype = torch.float32) -> None:
        self.options = options
        self.scale_dtype = scale_dtype

    @property
    def scheme(self) -> Scheme:
        return self.options.parsed()

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> WeightResult:
        """Quantize one linear: `quantize_all` for a weight by itself."""
        return self.quantize_all([weight], hessian)[0]

    def quantize_all(
        self, weights: Sequence[torch.Tensor], hessian: torch.Tensor | None
    ) -> list[WeightResult]:
        """Quantize linears that read the same input, in one pass over its columns.

        Rows do not see each other, so the result is that of each linear by itself.

        Args:
            weights: float32 [out, in] each.
            hessian: float32 [in, in], 2/n sum x x^T of their input.

        Returns:
            The codes of each, or round-to-nearest's where those give the lower output error.

        Raises:
            ValueError: no Hessian, non-finite values, or group_size does not divide ``in``.
        """
        if hessian is None:
            raise ValueError("GPTQ needs the Hessian of the layer's input")
        if not bool(torch.isfinite(hessian).all()):
            raise ValueError("the layer's input held NaN or infinite values during calibration")
        nearest = RTN(
            SchemeOptions(**self.options.model_dump(include=set(SchemeOptions.model_fields))),
            self.scale_dtype,
        ).quantize_all(weights, hessian)
        order = None
        if self.options.desc_act:
            order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
        factor, damp = inverse_factor(
            hessian if order is None else hessian[order][:, order], self.options.damp
        )
        stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        tensor, rounded = self._round(stacked, hessian, factor, order, [r.tensor for r in nearest])
        results = []
        start = 0
        for weight, rtn in zip(weights, nearest, strict=True):
            rows = slice(start, start + len(weight))
            start = rows.stop
            mine = tensor.rows(rows)
            error = relative_error(weight, mine.dequantize(), hessian)
            better = error <= rtn.error  # false too where an error is not a number
            results.append(
                WeightResult(
                    mine if better else rtn.tensor,
                    error if better else rtn.error,
                    rtn.error,
                    fallback=not better,
                    damp=damp,
                    rounded=rounded[rows] if better else weight,
                )
            )
        return results

    def _round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        factor: torch.Tensor,
        order: torch.Tensor | None,
        nearest: Sequence[QuantizedTensor],
    ) -> tuple[QuantizedTensor, torch.Tensor]:
        """The codes, and what each was rounded from [out, in].

        ``nearest`` holds the grids that round-to-nearest fitted, for those that stay fixed.
        """
        scheme = self.scheme.weights
        rows, columns = weight.shape
        groups = scheme.groups(columns)
        width = columns // groups
        # [in, out]: a column of the weight is a contiguous row. What was rounded stays in it.
        left = (weight if order is None else weight[:, order]).T.clone(
            memory_format=torch.contiguous_format
        )
        kept = CODE_DTYPE[scheme.type]  # float8 cannot be indexed: float32 until the end
        codes = torch.empty_like(left, dtype=kept if kept == torch.int8 else left.dtype)
        fixed = (order is not None and self.options.static_groups) or scheme.strategy != "group"
        scale = torch.empty(rows, groups, device=weight.device)
        zero = None if scheme.symmetric else torch.empty(rows, groups, device=weight.device)
        if fixed:
            torch.cat([one.scale for one in nearest], out=scale)
            if zero is not None:
                zero.copy_(torch.cat([z for one in nearest if (z := one.zero_point) is not None]))
        for start in range(0, columns, self.options.block_size):
            stop = min(start + self.options.block_size, columns)
            block = left[start:stop].clone()
            errors = torch.empty_like(block)
            local = factor[start:stop, start:stop]
            # From one edge to the next all columns have their grids.
            edges = range(start - start % width + width, stop, width) if not fixed else ()
            for first, last in itertools.pairwise((start, *edges, stop)):
                if not fixed and first % width == 0:
                    # The group's grid comes from its weights as they stand now, those beyond this
                    # block (which have not had this block's updates yet) brought up to date first.
                    ahead = left[first : first + width].clone()
                    done, inside = first - start, min(first + width, stop) - first
                    ahead[:inside] = block[done : done + inside]
                    if inside < width and done:
                        late = factor[start:first, stop : first + width]
                        ahead[inside:] -= late.T @ errors[:done]
                    members = torch.arange(first, first + width, device=weight.device)
                    members = members if order is None else order[members]
                    one, one_zero = self._fit(ahead.T.contiguous(), hessian[members][:, members])
                    scale[:, first // width] = one[:, 0]
                    if zero is not None and one_zero is not None:
                        zero[:, first // width] = one_zero[:, 0].float()
                group: int | torch.Tensor = first // width  # of all these columns
                if fixed and groups > 1:
                    assert order is not None
                    group = order[start:stop] // width  # of each
                steps = _by_column(scale, group, stop - start)
                offsets = None if zero is None else _by_column(zero, group, stop - start)
                round_columns(
                    block, local, steps, offsets, scheme, range(first - start, last - start),
                    codes[start:stop], errors,
                )  # fmt: skip
            left[start:stop] = block
            if stop < columns:
                left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        result, was = codes.T, left.T
        g_idx = None
        if order is not None:
            unsorted = torch.empty_like(order)
            unsorted[order] = torch.arange(columns, device=order.device)
            result, was = result[:, unsorted], was[:, unsorted]
            if not fixed:
                g_idx = (unsorted // width).to(torch.int32)
        result = result.contiguous().to(kept)
        zero_point = None if zero is None else zero.to(torch.int8)
        tensor = QuantizedTensor(result, scale, zero_point, g_idx, scheme)
        return tensor, was.contiguous()

    def _fit(
        self, weight: torch.Tensor, hessian: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The grid of one group [out, group_size]."""
        scheme = Scheme.parse(self.scheme.name, -1, self.options.symmetric)
        return grid.fit_grid(
            weight, scheme.weights, self.options.observer, self.scale_dtype, hessian
        )


def _by_column(grid: torch.Tensor, group: int | torch.Tensor, columns: int) -> torch.Tensor:
    """Scales or zero points [out, groups] as `round_columns` wants them, [columns, out].

    Args:
        group: of all columns, or int64 [columns] of each.
    """
    if isinstance(group, int):
        return grid[:, group].contiguous().expand(columns, -1)
    return grid.T[group]


def inverse_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of H^-1 (H^-1 = U^T U), and the damping that it took.

    Inputs that were always zero get a unit diagonal: their column is rounded by itself.

    Raises:
        ValueError: H cannot be made positive definite.
    """
    diagonal = torch.diagonal(hessian).clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.tensor(1.0)
    diagonal[dead] = mean
    while damp <= _MAX_DAMP:
        # Rows and columns turned round, the lower factor of H is an upper one R with H = R R^T,
        # and U = R^-1: no inverse of H is formed, whose rounding would decide at low damping.
        turned = hessian.flip(0, 1)
        torch.diagonal(turned).copy_((diagonal + damp * mean).flip(0))
        factor, failed = torch.linalg.cholesky_ex(turned)
        del turned
        if not int(failed):
            factor = factor.flip(0, 1)
            # In column order, which the solver works in: it needs no copy then.
            upper = torch.eye(len(factor), dtype=factor.dtype, device=factor.device).T
            torch.linalg.solve_triangular(factor, upper, upper=True, out=upper)
            del factor
            if bool(torch.isfinite(upper).all()):
                return upper, damp
        damp *= 10
    raise ValueError("the Hessian cannot be factorised even with heavy damping")
