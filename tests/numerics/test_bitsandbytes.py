"""bitsandbytes' formats against the definitions in their papers, computed with numpy."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.numerics import bitsandbytes as formats
from compressor.numerics import grid
from compressor.numerics.scheme import Scheme

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def weight(out: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference_nf4(value: torch.Tensor, blocksize: int) -> np.ndarray:
    """Nearest level times the block's largest magnitude, float64 of the weight's shape."""
    flat = value.double().numpy().ravel()
    result = np.empty_like(flat)
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize]
        absmax = np.abs(block).max()
        levels = NF4 * absmax
        nearest = np.abs(block[:, None] - levels).argmin(axis=1)
        result[start : start + blocksize] = levels[nearest]
    return result.reshape(value.shape)


@settings(deadline=None, max_examples=30)
@given(
    out=st.integers(1, 9),
    width=st.integers(1, 40).map(lambda n: 2 * n),
    blocksize=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)
def test_nf4_is_the_nearest_of_the_papers_levels(
    out: int, width: int, blocksize: int, dtype: torch.dtype, seed: int
) -> None:
    value = weight(out, width, seed, dtype)
    made = formats.quantize_4bit(value, "nf4", blocksize, False)
    got = formats.dequantize(made)
    assert got.dtype == torch.float32 and got.shape == value.shape
    # Compared by distance: of two levels as near as each other, either will do.
    exact, best = value.double().numpy(), reference_nf4(value, blocksize)
    slack = 1e-5 * np.abs(exact).max()
    assert (np.abs(got.numpy() - exact) <= np.abs(best - exact) + slack).all()


def test_a_block_is_off_by_at_most_half_its_widest_gap() -> None:
    value = weight(64, 256)
    error = (formats.dequantize(formats.quantize_4bit(value, "nf4", 64, False)) - value).abs()
    absmax = value.view(-1, 64).abs().amax(1, keepdim=True)
    assert bool((error.view(-1, 64) <= np.diff(NF4).max() / 2 * absmax * (1 + 1e-5)).all())


def test_levels_of_a_normal_distribution_suit_normal_weights() -> None:
    """NF4 loses less than FP4, and both less than 3 bits in the same groups."""
    value = weight(256, 256)

    def loss(approximation: torch.Tensor) -> float:
        return float((approximation - value).square().mean())

    nf4 = loss(formats.dequantize(formats.quantize_4bit(value, "nf4", 64, False)))
    fp4 = loss(formats.dequantize(formats.quantize_4bit(value, "fp4", 64, False)))
    scheme = Scheme.parse("W3A16", group_size=64).weights
    scale, zero = grid.fit_grid(value, scheme, "minmax", torch.float32, None)
    three = loss(grid.quantize(value, scale, zero, scheme).dequantize())
    assert nf4 < fp4 < three


def test_double_quantization_moves_scales_by_at_most_their_8_bit_step() -> None:
    value = weight(64, 256)
    plain = formats.quantize_4bit(value, "nf4", 64, False)
    double = formats.quantize_4bit(value, "nf4", 64, True)
    assert torch.equal(plain["weight"], double["weight"])
    assert double["weight.absmax"].dtype == torch.uint8
    absmax = plain["weight.absmax"]
    spread = float((absmax - absmax.mean()).abs().max())
    change = (formats.dequantize(plain) - formats.dequantize(double)).abs().amax()
    assert 0 < float(change) <= 0.02 * spread  # 8-bit dynamic map: steps of under 2%


def test_int8_rounds_to_the_nearest_of_each_rows_levels() -> None:
    value = weight(16, 48)
    value[3] = 0
    made = formats.quantize_int8(value)
    half = value.half().double().numpy()
    absmax = np.abs(half).max(axis=1)
    np.testing.assert_allclose(made["SCB"].numpy(), absmax, rtol=1e-6)
    step = absmax[:, None] / 127
    error = np.abs(formats.dequantize(made).numpy() - half)
    # The library scales in float16, whose rounding comes on top.
    assert (error <= step / 2 + np.abs(half) * 2**-10 + 1e-12).all()
    assert not formats.dequantize(made)[3].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_linear_rounds_tokens_and_keeps_outlier_columns(bias: bool, threshold: float) -> None:
    made = formats.quantize_int8(weight(24, 32))
    x = weight(5, 32, seed=1)
    x[2, 7] = 40.0
    offset = weight(1, 24, seed=2)[0] if bias else None
    got = formats.linear(made, offset, threshold)(x)
    dense = formats.dequantize(made).double()
    half = x.half().double()
    apart = (half.abs() >= threshold).any(0) if threshold else torch.zeros(32, dtype=torch.bool)
    # Outliers count neither for a token's scale nor in its rounded part.
    rest = torch.where(half.abs() >= threshold, 0.0, half) if threshold else half
    scale = rest.abs().amax(1, keepdim=True) / 127
    rounded = (rest / scale).round() * scale
    expected = rounded.masked_fill(apart, 0) @ dense.T + x.double()[:, apart] @ dense[:, apart].T
    if offset is not None:
        expected = expected + offset
    # Scaling in float16 puts a value near a tie on the other side: one step of one input, rarely.
    assert float((got - expected).norm() / expected.norm()) < 5e-3


def test_an_outlier_kept_apart_spares_the_rest_of_its_token() -> None:
    value = weight(24, 32)
    made = formats.quantize_int8(value)
    x = weight(5, 32, seed=1)
    x[2, 7] = 40.0
    exact = (x.double() @ formats.dequantize(made).double().T)[2]
    losses = [float((formats.linear(made, None, t)(x)[2] - exact).norm()) for t in (0.0, 6.0)]
    assert losses[1] < losses[0] / 4


def test_values_that_are_not_finite_are_refused() -> None:
    bad = weight(4, 64)
    bad[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        formats.quantize_4bit(bad, "nf4", 64, False)
    bad[0, 0] = 1e5  # beyond float16
    with pytest.raises(ValueError, match="float16"):
        formats.quantize_int8(bad)


def test_missing_and_old_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "version", lambda name: "0.45.5")
    with pytest.raises(RunError, match=r"0\.45\.5 is too old, 0\.50 is needed"):
        formats.check_installed()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(formats, "version", missing)
    with pytest.raises(RunError, match=r"pip install 'compressor\[bitsandbytes\]'"):
        formats.library()


def test_what_is_asked_of_pip_is_what_is_asked_here() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (wanted,) = project["project"]["optional-dependencies"]["bitsandbytes"]
    assert f">={'.'.join(map(str, formats.MINIMUM))}," in wanted
