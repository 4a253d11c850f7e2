"""What is remembered of a linear's input: its second moments (the Hessian of the output error),
the size of each channel, and some rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressor.numerics.kernels import rounded as round_inputs
from compressor.numerics.scheme import ActivationScheme

_LEAF = 256
_LEAF_GPU = 2048  # below, a product is too small to fill one
_ROWS_PER_UPDATE = 64
_MAX_ROWS = 1024


class InputStatistics:
    """Everything that algorithms ask about one input, from a single pass.

    Args:
        in_features: width of the input.
        device: where the statistics are held (float32).
        channels: also keep each channel's size and some rows, not the second moments alone.
        rounded: take the second moments of the inputs rounded by this scheme, token by token, as
            they will be when served, and ``drift``, what the rounding takes away.
    """

    def __init__(
        self,
        in_features: int,
        device: str | torch.device = "cpu",
        channels: bool = True,
        rounded: ActivationScheme | None = None,
    ) -> None:
        self.accumulator = HessianAccumulator(in_features, device)
        self._channels = channels
        self._rounded = rounded
        self._drift: torch.Tensor | None = None  # from the first input on
        self.absmax = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._abssum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._divisor: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    @property
    def tokens(self) -> int:
        return self.accumulator.tokens

    @property
    def absmean(self) -> torch.Tensor:
        """Mean magnitude of each channel, float32 [in]."""
        return self._divided(self._abssum / max(self.tokens, 1))

    @property
    def rows(self) -> torch.Tensor:
        """Some of the inputs, float32 [n, in], n at most 1024, spread evenly over each batch."""
        return self._divided(torch.cat(self._rows)[:_MAX_ROWS])

    @property
    def hessian(self) -> torch.Tensor:
        """2/n sum x x^T, float32 [in, in]."""
        return self._rescaled(self.accumulator.result())

    def take_hessian(self) -> torch.Tensor:
        """`hessian`, in the memory of the sums: they are gone, and nothing can be added."""
        return self._rescaled(self.accumulator.take())

    def _rescaled(self, whole: torch.Tensor) -> torch.Tensor:
        if self._divisor is not None:
            whole /= self._divisor.unsqueeze(0) * self._divisor.unsqueeze(1)
        return whole

    @property
    def drift(self) -> torch.Tensor | None:
        """2/n sum (x - q) q^T of inputs x and what they are rounded to, q; float32 [in, in].
        None where they are not rounded, or there were none."""
        return None if self._drift is None else self._drift * (2.0 / max(self.tokens, 1))

    def update(self, x: torch.Tensor) -> None:
        """Add inputs [..., in_features]."""
        flat = x.detach().reshape(-1, x.shape[-1]).to(self.absmax.device)
        if not len(flat):
            return
        if self._rounded is None:
            self.accumulator.update(flat)
        else:
            if self._drift is None:
                width = flat.shape[1]
                self._drift = torch.zeros(width, width, device=self.absmax.device)
            exact = flat.float()
            near = round_inputs(exact, self._rounded)
            lost = (exact - near).to(flat.dtype)
            near = near.to(flat.dtype)
            self.accumulator.update(near)
            _add(self._drift, lost, near)
        if not self._channels:
            return
        flat = flat.float()
        size = flat.abs()
        self.absmax = torch.maximum(self.absmax, size.amax(0))
        self._abssum += size.sum(0)
        if len(self._rows) * _ROWS_PER_UPDATE < _MAX_ROWS:
            self._rows.append(
                flat[:: max(len(flat) // _ROWS_PER_UPDATE, 1)][:_ROWS_PER_UPDATE].clone()
            )

    def divide(self, scale: torch.Tensor) -> None:
        """From now on describe the input divided by ``scale`` [in], channel by channel."""
        self.absmax = self.absmax / scale
        self._divisor = scale.clone() if self._divisor is None else self._divisor * scale

    def _divided(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._divisor is None else x / self._divisor


def fit_to_rounded_inputs(
    weights: Sequence[torch.Tensor], hessian: torch.Tensor, drift: torch.Tensor, damp: float
) -> list[torch.Tensor]:
    """The weights that make of rounded inputs q what the given ones make of exact inputs x, as
    nearly as a linear map can: W + W D (H + damp)^-1, with H of q and D = 2/n sum (x - q) q^T.

    Channels that rounding wipes out are made up for by those that they go with. (Qronos, arXiv
    2505.11695, and GPTAQ, arXiv 2504.02692, correct the inputs' errors likewise.)

    Args:
        weights: float32 [out, in] of every linear that reads the input.
        hessian: float32 [in, in], of the rounded inputs.
        drift: float32 [in, in].
        damp: share of the mean diagonal added to the Hessian.
    """
    damped = hessian.clone()
    diagonal = torch.diagonal(damped)
    diagonal += damp * diagonal.mean().clamp_min(1e-20)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return list(weights)
    correction = torch.cholesky_solve(drift.T.contiguous(), lower).T  # D H^-1
    return [weight + weight @ correction for weight in weights]


class HessianAccumulator:
    """Sums x x^T over tokens; only the upper triangle is computed.

    Inputs in bfloat16 are multiplied as such, and each update's products rounded to it: an error of
    0.2 % an entry, independent from one update to the next, below what the choice of tokens makes.

    Args:
        in_features: width of the input.
        device: where the sum is held (float32), from the first input on.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        self.tokens = 0
        self._width = in_features
        self._device = device
        self._sum: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        """Add inputs [..., in_features] of any float dtype."""
        flat = x.detach().reshape(-1, x.shape[-1]).to(self._device)
        if flat.dtype != torch.bfloat16:
            flat = flat.float()
        if len(flat):
            self.tokens += len(flat)
            self._sum = self._held()
            _add_upper(self._sum, flat)

    def result(self) -> torch.Tensor:
        """H = 2/n sum x x^T, float32 [in, in]; zeros when no token was seen."""
        return _mirror(self._held().clone()).mul_(2.0 / max(self.tokens, 1))

    def take(self) -> torch.Tensor:
        """`result`, in the memory of the sum, which ends here."""
        whole, self._sum = self._held(), None
        return _mirror(whole).mul_(2.0 / max(self.tokens, 1))

    def _held(self) -> torch.Tensor:
        if self._sum is not None:
            return self._sum
        return torch.zeros(self._width, self._width, dtype=torch.float32, device=self._device)


def _mirror(x: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of x [n, n] onto the lower one, in place, with little memory."""
    for start in range(0, len(x), _LEAF):
        stop = min(start + _LEAF, len(x))
        corner = torch.triu(x[start:stop, start:stop])
        x[start:stop, start:stop] = corner + torch.triu(corner, 1).T
        x[stop:, start:stop] = x[start:stop, stop:].T
    return x


def _add_upper(into: torch.Tensor, x: torch.Tensor) -> None:
    """into += x^T x on the upper triangle's blocks: halves on the diagonal recurse, the half
    beside them is one product, and the half below is never computed (a rank-n BLAS SYRK)."""
    width = x.shape[1]
    if width <= (_LEAF_GPU if x.is_cuda else _LEAF):
        _add(into, x, x)
        return
    half = width // 2
    left, right = x[:, :half], x[:, half:]
    _add_upper(into[:half, :half], left)
    _add_upper(into[half:, half:], right)
    _add(into[:half, half:], left, right)


def _add(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == into.dtype:
        into.addmm_(left.T, right)
    else:
        into.add_(left.T @ right)
