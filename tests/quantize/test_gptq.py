"""GPTQ against an independent float64 reference, and its promises as properties.

The reference follows the OBQ formulation that GPTQ derives from (arXiv 2210.17323, equations 2 and
3): it inverts the Hessian of the columns still to come anew at every step, in float64, and shares
neither the Cholesky form nor the blocking with the implementation.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compressor.quantize import registry
from compressor.quantize.gptq import GPTQ, GPTQOptions, inverse_factor
from compressor.quantize.registry import SchemeOptions
from compressor.quantize.rtn import RTN

NEAR_TIE = 2e-3


def make(seed: int, rows: int, columns: int, dead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and Hessian of correlated inputs, ``dead`` of which are always zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * columns, columns)) @ rng.normal(size=(columns, columns))
    x[:, rng.permutation(columns)[:dead]] = 0
    hessian = 2 / len(x) * x.T @ x
    weight = torch.from_numpy(rng.normal(size=(rows, columns))).float()
    return weight, torch.from_numpy(hessian).float()


def qparams(x: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    steps = 2**bits - 1
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    scale = np.maximum(-low, high) * 2 / steps if symmetric else (high - low) / steps
    scale = np.where(scale == 0, 1, scale.astype(np.float32).astype(np.float64))
    zero = np.zeros_like(scale) if symmetric else np.round(-(2 ** (bits - 1)) - low / scale)
    return scale, np.clip(zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def reference(
    weight: torch.Tensor, hessian: torch.Tensor, o: GPTQOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Dequantized weight, and per row how close any rounding came to a tie."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    rows, columns = w.shape
    scheme = o.parsed().weights
    width = scheme.group_size or columns
    bits = scheme.num_bits
    live = np.diag(h) > 0
    mean = np.diag(h)[live].mean() if live.any() else 1.0
    h[~live, ~live] = mean
    h[np.diag_indices(columns)] += o.damp * mean
    order = np.arange(columns)
    if o.desc_act:
        order = np.argsort(-np.diag(hessian.numpy()), kind="stable")
    static = o.desc_act and o.static_groups
    grids = [qparams(w[:, g : g + width], bits, o.symmetric) for g in range(0, columns, width)]
    result, tie = np.zeros_like(w), np.full(rows, np.inf)
    for step, column in enumerate(order):
        if static:
            scale, zero = grids[column // width]
        elif width == columns:
            scale, zero = grids[0]
        elif step % width == 0:
            scale, zero = qparams(w[:, order[step : step + width]], bits, o.symmetric)
        exact = w[:, column] / scale
        tie = np.minimum(tie, np.abs(np.abs(exact - np.floor(exact)) - 0.5))
        code = np.clip(np.round(exact) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result[:, column] = (code - zero) * scale
        left = order[step:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        error = (w[:, column] - result[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
    return result, tie


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 8),
    groups=st.integers(1, 4),
    width=st.sampled_from([4, 8]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    per_channel=st.booleans(),
    desc_act=st.booleans(),
    static_groups=st.booleans(),
    dead=st.integers(0, 3),
    block_size=st.sampled_from([1, 3, 8, 128]),
)
def test_matches_the_float64_reference(
    seed: int, rows: int, groups: int, width: int, bits: int, symmetric: bool, per_channel: bool,
    desc_act: bool, static_groups: bool, dead: int, block_size: int,
) -> None:  # fmt: skip
    weight, hessian = make(seed, rows, groups * width, dead)
    options = GPTQOptions(
        scheme=f"W{bits}A16",
        group_size=-1 if per_channel else width,
        symmetric=symmetric,
        desc_act=desc_act,
        static_groups=static_groups,
        block_size=block_size,
        damp=0.05,
    )
    expected, tie = reference(weight, hessian, options)
    sure = tie > NEAR_TIE
    assume(sure.any())
    result = GPTQ(options).quantize(weight, hessian)
    result.tensor.validate()
    if result.fallback:  # the whole layer was worse than round-to-nearest: so is the reference
        assume(sure.all())
        h = hessian.double().numpy()
        e = expected - weight.double().numpy()
        scale = ((weight.double().numpy() @ h) * weight.double().numpy()).sum()
        assert (e @ h * e).sum() / scale > result.rtn_error * (1 - 1e-3)
        return
    got = result.tensor.dequantize().double().numpy()
    np.testing.assert_allclose(got[sure], expected[sure], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    columns=st.sampled_from([16, 32, 64]),
    desc_act=st.booleans(),
    static_groups=st.booleans(),
    observer=st.sampled_from(["minmax", "mse"]),
    dead=st.integers(0, 5),
)
def test_output_error_is_never_above_rtn(
    seed: int, bits: int, columns: int, desc_act: bool, static_groups: bool, observer: str,
    dead: int,
) -> None:  # fmt: skip
    weight, hessian = make(seed, 12, columns, dead)
    shared = {"scheme": f"W{bits}A16", "group_size": 16, "observer": observer}
    cls = registry.get("gptq")
    gptq = cls(cls.Options(**shared, desc_act=desc_act, static_groups=static_groups), torch.float32)
    rtn = registry.get("rtn")
    nearest = rtn(rtn.Options(**shared), torch.float32).quantize(weight, hessian)
    result = gptq.quantize(weight, hessian)
    assert result.error <= nearest.error * (1 + 1e-6)
    assert result.rtn_error == pytest.approx(nearest.error)
    difference = (result.tensor.dequantize() - weight).double()
    direct = float((difference @ hessian.double() * difference).sum())
    scale = float((weight.double() @ hessian.double() * weight.double()).sum())
    assert result.error == pytest.approx(direct / scale, rel=1e-3)


def test_clearly_better_than_rtn_on_correlated_inputs() -> None:
    weight, hessian = make(0, 64, 128)
    result = GPTQ(GPTQOptions(group_size=32)).quantize(weight, hessian)
    assert result.error < 0.6 * result.rtn_error and not result.fallback


@pytest.mark.parametrize("block_size", [1, 7, 32, 64, 1000])
def test_block_size_does_not_change_the_codes(block_size: int) -> None:
    weight, hessian = make(3, 16, 64)
    one = GPTQ(GPTQOptions(group_size=16, block_size=64)).quantize(weight, hessian)
    other = GPTQ(GPTQOptions(group_size=16, block_size=block_size)).quantize(weight, hessian)
    same = (one.tensor.codes == other.tensor.codes).float().mean()
    assert float(same) > 0.99
    assert other.error == pytest.approx(one.error, rel=0.05)


def test_activation_order_without_static_groups_stores_g_idx() -> None:
    weight, hessian = make(1, 8, 32)
    tensor = (
        GPTQ(GPTQOptions(group_size=8, desc_act=True, static_groups=False))
        .quantize(weight, hessian)
        .tensor
    )
    assert tensor.g_idx is not None and sorted(tensor.g_idx.tolist()) == sorted([0, 1, 2, 3] * 8)
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    assert tensor.g_idx[order].tolist() == [i // 8 for i in range(32)]
    static = GPTQ(GPTQOptions(group_size=8, desc_act=True)).quantize(weight, hessian)
    assert static.tensor.g_idx is None


def test_scales_are_what_will_be_stored() -> None:
    weight, hessian = make(5, 8, 32)
    tensor = GPTQ(GPTQOptions(group_size=8), torch.bfloat16).quantize(weight, hessian).tensor
    assert torch.equal(tensor.scale, tensor.scale.to(torch.bfloat16).float())


def test_damping_grows_where_the_factorisation_fails() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x * 1e8
    hessian[0, 1] = hessian[1, 0] = hessian[0, 0] * 1.5  # not positive semidefinite
    _, damp = inverse_factor(hessian, 1e-4)
    assert damp > 1e-4
    assert torch.isfinite(inverse_factor(hessian, 1e-4)[0]).all()


def test_codes_that_overflow_fall_back_to_rtn() -> None:
    """Error feedback can push a group past what its scale's dtype holds; no NaN may come out."""
    weight, hessian = make(4, 8, 64)
    weight *= 4.9e5 / weight.abs().max()
    result = GPTQ(GPTQOptions(group_size=8), torch.float16).quantize(weight, hessian)
    nearest = RTN(SchemeOptions(group_size=8), torch.float16).quantize(weight, hessian)
    result.tensor.validate()
    assert result.fallback and result.error == nearest.error
    assert torch.isfinite(result.tensor.dequantize()).all()


def test_no_statistics_at_all_still_gives_codes() -> None:
    weight, _ = make(2, 4, 16)
    result = GPTQ(GPTQOptions(group_size=8)).quantize(weight, torch.zeros(16, 16))
    result.tensor.validate()


@pytest.mark.parametrize(
    ("weight", "hessian", "words"),
    [
        (torch.ones(4, 12), torch.eye(12), "group_size 8 does not divide the 12"),
        (torch.ones(4, 16), torch.full((16, 16), torch.nan), "during calibration"),
        (torch.full((4, 16), torch.inf), torch.eye(16), "NaN or infinite"),
        (torch.ones(4, 16), None, "needs the Hessian"),
    ],
)
def test_bad_input_is_refused(
    weight: torch.Tensor, hessian: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        GPTQ(GPTQOptions(group_size=8)).quantize(weight, hessian)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000), desc_act=st.booleans(), observer=st.sampled_from(["minmax", "mse"])
)
def test_float8_never_does_worse_than_rounding(seed: int, desc_act: bool, observer: str) -> None:
    weight, hessian = make(seed, 8, 48)
    options = {"scheme": "FP8", "observer": observer}
    result = GPTQ(GPTQOptions(desc_act=desc_act, **options)).quantize(weight, hessian)
    result.tensor.validate()
    nearest = RTN(SchemeOptions(**options)).quantize(weight, hessian)
    assert result.error <= nearest.error == result.rtn_error
    assert torch.equal(result.tensor.scale, nearest.tensor.scale)


def test_float8_gains_from_correlated_inputs() -> None:
    weight, hessian = make(0, 32, 64)
    result = GPTQ(GPTQOptions(scheme="FP8")).quantize(weight, hessian)
    assert not result.fallback and result.error < 0.6 * result.rtn_error
