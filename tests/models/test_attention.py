from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.models.attention import chunked_causal_attention, masked_attention


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.sampled_from([2, 127, 128, 129, 300]),
)
def test_equals_torchs_own(batch: int, shared: int, group: int, length: int) -> None:
    torch.manual_seed(length)
    query = torch.randn(batch, shared * group, length, 16)
    key, value = torch.randn(2, batch, shared, length, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    found = chunked_causal_attention(query, key, value, 0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_stays_near(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 200, 32)
    exact = chunked_causal_attention(query, key, value, 0.2)
    rough = chunked_causal_attention(query.to(dtype), key.to(dtype), value.to(dtype), 0.2)
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.02


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    new=st.integers(1, 9),
    before=st.integers(0, 40),
    same=st.booleans(),
)
def test_under_a_mask_equals_torchs_own(
    batch: int, shared: int, group: int, new: int, before: int, same: bool
) -> None:
    torch.manual_seed(before)
    query = torch.randn(batch, shared * group, new, 16)
    key, value = torch.randn(2, batch, shared, before + new, 16)
    seen = torch.rand(1 if same else batch, 1, new, before + new) < 0.5
    seen[..., before:] |= torch.eye(new, dtype=torch.bool)  # each sees itself at least
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    found = masked_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
