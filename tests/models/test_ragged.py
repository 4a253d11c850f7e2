"""Attention over packed requests against a dense masked product of each by itself."""

from __future__ import annotations

import pytest
import torch

from compressor.models import ragged

HEADS, SHARED, WIDTH = 6, 2, 16


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """[heads, rows, width] over [shared heads, columns, width], in float64."""
    rows, columns = query.shape[1], key.shape[1]
    key, value = (x.double().repeat_interleave(HEADS // SHARED, 0) for x in (key, value))
    place = torch.arange(columns - rows, columns)[:, None]
    seen = torch.arange(columns) <= place
    if window is not None:
        seen &= torch.arange(columns) > place - window
    scores = (query.double() @ key.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ value


def packed(queries: list[int], keys: list[int]) -> tuple[torch.Tensor, ...]:
    """Random tensors strided as transformers' are: heads inside of tokens."""
    torch.manual_seed(0)
    return (
        torch.randn(1, sum(queries), HEADS, WIDTH).transpose(1, 2),
        torch.randn(1, sum(keys), SHARED, WIDTH).transpose(1, 2),
        torch.randn(1, sum(keys), SHARED, WIDTH).transpose(1, 2),
    )


def ends(lengths: list[int]) -> list[int]:
    return [sum(lengths[:count]) for count in range(len(lengths) + 1)]


@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [
        ([1, 1, 1], [4, 9, 1], None),
        ([7, 1, 140], [7, 9, 140], None),  # prompts beside single tokens
        ([5, 3], [12, 3], None),  # the rest of a prompt
        ([5, 0, 3], [12, 0, 3], None),  # padding
        ([6, 20, 5, 1], [6, 20, 12, 8], 8),  # sliding windows
    ],
)
def test_each_request_attends_to_itself(
    queries: list[int], keys: list[int], window: int | None
) -> None:
    query, key, value = packed(queries, keys)
    rows, columns = ends(queries), ends(keys)
    got = ragged.ragged_causal_attention(query, key, value, rows, columns, 0.3, window)
    for index in range(len(queries)):
        mine, theirs = slice(*rows[index : index + 2]), slice(*columns[index : index + 2])
        own = query[0, :, mine], key[0, :, theirs], value[0, :, theirs]
        expected = dense(*own, 0.3, window).transpose(0, 1)
        torch.testing.assert_close(got[0, mine].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [9, 4, 7]])
def test_single_queries_are_one_product(lengths: list[int]) -> None:
    longest = max(lengths)
    query, key, value = packed([1] * 3, [longest] * 3)
    got = ragged.single_queries(query, key, value, lengths, 0.3)
    for index, length in enumerate(lengths):
        theirs = slice(index * longest, index * longest + length)
        own = query[0, :, index : index + 1], key[0, :, theirs], value[0, :, theirs]
        expected = dense(*own, 0.3, None).transpose(0, 1)[0]
        torch.testing.assert_close(got[0, index].double(), expected, atol=1e-5, rtol=1e-5)


def test_outside_continuous_batching_it_is_refused() -> None:
    query, key, value = packed([3], [3])
    with pytest.raises(ValueError, match="continuous batching only"):
        ragged._forward(torch.nn.Module(), query, key, value, None)
    with pytest.raises(ValueError, match="softcap"):
        ragged._forward(torch.nn.Module(), query, key, value, None, cache=1, softcap=30.0)
