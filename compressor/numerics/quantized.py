"""A weight held as codes in few bits, and scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compressor.numerics.scheme import WeightScheme

CODE_DTYPE = {"int": torch.int8, "float": torch.float8_e4m3fn}


@dataclass
class QuantizedTensor:
    """Weight [out, in] as ``(codes - zero_point) * scale``.

    Attributes:
        codes: [out, in]: int8 in [-2^(b-1), 2^(b-1) - 1], or float8_e4m3fn for scheme FP8.
        scale: float32 [out, groups].
        zero_point: int8 [out, groups] on the codes' own offset; None when symmetric.
        g_idx: int32 [in], the group of each column; None when groups are contiguous.
        scheme: the grid.
        input_scale: float32 [1], scale of the layer's 8-bit inputs; None when they get theirs
            while running, or are not quantized.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    g_idx: torch.Tensor | None
    scheme: WeightScheme
    input_scale: torch.Tensor | None = None

    def validate(self) -> None:
        """Raise ValueError when shapes, dtypes or codes contradict the scheme."""
        out, columns = self.codes.shape
        groups = self.scheme.groups(columns)
        dtype = CODE_DTYPE[self.scheme.type]
        if self.codes.dtype != dtype:
            raise ValueError(f"codes are {self.codes.dtype}, not {dtype}")
        if tuple(self.scale.shape) != (out, groups):
            raise ValueError(f"scale is {tuple(self.scale.shape)}, not {(out, groups)}")
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError("scales are not finite")
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError("a zero point is stored exactly when the grid is asymmetric")
        if self.zero_point is not None:
            if self.zero_point.dtype != torch.int8:
                raise ValueError(f"zero_point is {self.zero_point.dtype}, not int8")
            if self.zero_point.shape != self.scale.shape:
                raise ValueError(
                    f"zero_point is {tuple(self.zero_point.shape)}, not {(out, groups)}"
                )
        low, high = float(self.codes.float().min()), float(self.codes.float().max())
        if not (low >= self.scheme.minimum and high <= self.scheme.maximum):  # or not a number
            raise ValueError(
                f"codes reach from {low} to {high}, beyond {self.scheme.num_bits} bits"
            )
        if self.input_scale is not None:
            usable = bool(torch.isfinite(self.input_scale).all() and (self.input_scale > 0).all())
            if tuple(self.input_scale.shape) != (1,) or not usable:
                raise ValueError("input_scale is not one positive number")
        if self.g_idx is not None:
            if tuple(self.g_idx.shape) != (columns,):
                raise ValueError(f"g_idx is {tuple(self.g_idx.shape)}, not {(columns,)}")
            if int(self.g_idx.min()) < 0 or int(self.g_idx.max()) >= groups:
                raise ValueError("g_idx names a group that does not exist")

    def column_groups(self) -> torch.Tensor:
        """int64 [in]: the group of each column."""
        if self.g_idx is not None:
            return self.g_idx.long()
        columns, groups = self.codes.shape[1], self.scale.shape[1]
        return torch.arange(columns, device=self.codes.device) // (columns // groups)

    def rows(self, part: slice) -> QuantizedTensor:
        """Some of the output channels."""
        zero = None if self.zero_point is None else self.zero_point[part]
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero_point=zero)

    def to(self, device: str | torch.device) -> QuantizedTensor:
        """The same on a device."""
        names = ("codes", "scale", "zero_point", "g_idx", "input_scale")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v.to(device) for k, v in parts.items() if v is not None})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero_point, self.g_idx, dtype)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``(codes - zero_point) * scale`` with per-group scales spread over their columns."""
    rows, columns = codes.shape
    groups = scale.shape[1]
    if g_idx is not None:
        index = g_idx.long()
        shifted = codes.float()
        if zero_point is not None:
            shifted = shifted - zero_point.float()[:, index]
        return (shifted * scale[:, index]).to(dtype)
    shifted = codes.float().view(rows, groups, columns // groups)
    if zero_point is not None:
        shifted = shifted - zero_point.float().unsqueeze(-1)
    return (shifted * scale.unsqueeze(-1)).view(rows, columns).to(dtype)
