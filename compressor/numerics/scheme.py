"""What is stored in how many bits, on which grid."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

DEFAULT_GROUP_SIZE = 128
FP8_MAX = 448  # largest float8_e4m3fn (OCP 8-bit floating point specification, table 2)

NumberType = Literal["int", "float"]
ActivationKind = Literal["dynamic", "dynamic-asymmetric", "static"]


@dataclass(frozen=True)
class WeightScheme:
    """Grid of a weight [out, in].

    Attributes:
        num_bits: 2 to 8.
        symmetric: zero is code 0 and no zero point is stored.
        strategy: one scale per tensor, per output channel, or per group of input columns.
        group_size: columns per group, for strategy ``group``.
        type: codes are integers, or floating-point numbers of 8 bits (float8_e4m3fn).
    """

    num_bits: int
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    type: NumberType = "int"

    @property
    def minimum(self) -> int:
        return -FP8_MAX if self.type == "float" else -(1 << (self.num_bits - 1))

    @property
    def maximum(self) -> int:
        return FP8_MAX if self.type == "float" else (1 << (self.num_bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Number of scales per output row.

        Raises:
            ValueError: group_size does not divide the number of columns.
        """
        if self.strategy != "group":
            return 1
        assert self.group_size is not None
        if in_features % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide the {in_features} input features"
            )
        return in_features // self.group_size


@dataclass(frozen=True)
class ActivationScheme:
    """Grid of a linear's input: one scale per token (row), or one for the tensor."""

    num_bits: int = 8
    symmetric: bool = True
    strategy: Literal["token", "tensor"] = "token"
    dynamic: bool = True
    type: NumberType = "int"

    @property
    def maximum(self) -> float:
        """Code of the largest magnitude that a scale spans."""
        return float(FP8_MAX if self.type == "float" else (1 << (self.num_bits - 1)) - 1)


DYNAMIC = ActivationScheme()
ASYMMETRIC = ActivationScheme(symmetric=False)
STATIC = ActivationScheme(strategy="tensor", dynamic=False)
FP8 = ActivationScheme(type="float")
FP8_STATIC = ActivationScheme(strategy="tensor", dynamic=False, type="float")
_INT8_ACTIVATIONS = {"dynamic": DYNAMIC, "dynamic-asymmetric": ASYMMETRIC, "static": STATIC}
# Of cached keys and values: one static scale for the keys of a layer and one for its values.
KV_CACHE = {"int8": STATIC, "fp8": FP8_STATIC}


@dataclass(frozen=True)
class Scheme:
    """Weights and input activations of a linear; ``name`` in the usual form, such as W4A16."""

    name: str
    weights: WeightScheme
    input_activations: ActivationScheme | None = None

    @property
    def static_activations(self) -> bool:
        """Whether inputs have one scale, from calibration."""
        return self.input_activations is not None and not self.input_activations.dynamic

    @classmethod
    def parse(
        cls,
        name: str,
        group_size: int | None = None,
        symmetric: bool = True,
        activations: ActivationKind = "dynamic",
    ) -> Scheme:
        """From a name W{2..8}A{16,8}, or FP8 (weights and activations float8_e4m3fn).

        Args:
            name: such as ``W8A8``, ``W4A16`` or ``FP8``.
            group_size: input columns per scale; -1 for one scale per output channel; None for
                the default (channel for 8-bit weights, groups of 128 below).
            symmetric: of the weights' grid.
            activations: of 8 bits: one scale per token, found while serving; that with a zero
                point per token too, so that the range of a token's values is used on both sides;
                or one scale for the whole input, from calibration.

        Raises:
            ValueError: the name is not of that form, the group size is not positive, 16-bit
                activations are to be rounded, or FP8 is to have groups or zero points.
        """
        if name == "FP8":
            if group_size not in (None, -1) or not symmetric or "asymmetric" in activations:
                raise ValueError(
                    "scheme FP8 has one scale per output channel and no zero points: leave out "
                    "group_size and symmetric, and asymmetric activations"
                )
            weights = WeightScheme(8, type="float")
            return cls(name, weights, FP8_STATIC if activations == "static" else FP8)
        match = re.fullmatch(r"W([2-8])A(16|8)", name)
        if not match:
            raise ValueError(
                f"unknown scheme {name!r}: write W{{2..8}}A{{16,8}}, such as W4A16, or FP8"
            )
        bits, activation_bits = int(match[1]), int(match[2])
        if group_size is None and bits < 8:
            group_size = DEFAULT_GROUP_SIZE
        if group_size is not None and group_size != -1 and group_size < 1:
            raise ValueError(f"group_size is {group_size}: it must be positive, or -1 for channels")
        if activations != "dynamic" and activation_bits == 16:
            raise ValueError(f"scheme {name} leaves activations as they are: they have no scale")
        grouped = group_size not in (None, -1)
        return cls(
            name,
            WeightScheme(
                bits,
                symmetric,
                "group" if grouped else "channel",
                group_size if grouped else None,
            ),
            _INT8_ACTIVATIONS[activations] if activation_bits == 8 else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Scheme:
        activations = value["input_activations"]
        return cls(
            value["name"],
            WeightScheme(**value["weights"]),
            ActivationScheme(**activations) if activations else None,
        )
