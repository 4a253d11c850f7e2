from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.models import attention
from compressor.models.architecture import CausalLM
from compressor.models.attention import (
    chunked_causal_attention,
    masked_attention,
    single_token_attention,
)
from tests import tiny


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


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 40),
    bfloat16=st.booleans(),
)
def test_of_single_tokens_equals_torchs_own(
    batch: int, shared: int, group: int, length: int, bfloat16: bool
) -> None:
    torch.manual_seed(length)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    query = torch.randn(batch, 1, shared * group, 16).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, shared, length, 16).to(dtype)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.3, enable_gqa=True
    )
    found = single_token_attention(query, key, value, 0.3)
    assert found.dtype == dtype
    tolerance = 2e-2 if bfloat16 else 1e-5
    torch.testing.assert_close(
        found.double(), exact.transpose(1, 2), rtol=tolerance, atol=tolerance
    )


def test_a_step_takes_the_heads_that_share_keys_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalLM.open(tiny.build("llama", tmp_path)).load_full(torch.float32)
    rows = []

    def noted(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        rows.append(query.shape[2])
        return single_token_attention(query, *arguments)

    monkeypatch.setattr(attention, "single_token_attention", noted)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        cache = model(input_ids=ids[:, :-1]).past_key_values
        assert not rows
        got = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert rows == [1] * model.config.num_hidden_layers
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
