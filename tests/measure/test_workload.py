from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compressor.errors import RecipeError
from compressor.measure.workload import build_workload, tokenizer_encode, tokens_sha256


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def build(texts: list[str], **changes: Any) -> Any:
    return build_workload(
        texts, encode, **({"input_length": 12, "count": 3, "seed": 0, "source": "here"} | changes)
    )


def test_every_prompt_has_the_length_and_starts_where_a_text_starts() -> None:
    texts = ["alpha text", "beta text that is long enough", "gamma"]
    load = build(texts)
    assert load.tokens.shape == (3, 12) and load.tokens.dtype == np.int32
    starts = {chr(row[0]) for row in load.tokens}
    assert starts == {"a", "b", "g"}


def test_seed_decides_order_and_hash() -> None:
    texts = [f"{index} is a number" for index in range(20)]
    assert build(texts).sha256 == build(texts).sha256
    assert build(texts).sha256 != build(texts, seed=1).sha256


def test_more_prompts_than_texts_goes_round() -> None:
    load = build(["abc", "defg"], count=5)
    assert load.tokens.shape == (5, 12)
    assert load.tokens[0].tolist() == load.tokens[2].tolist()
    assert load.batch(4, 2) == [load.tokens[4].tolist(), load.tokens[0].tolist()]


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_no_text_is_the_recipes_fault(texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="no text"):
        build(texts)


def test_hash_tells_shapes_apart_and_ignores_byte_order() -> None:
    tokens = np.arange(6, dtype=np.int32)
    assert tokens_sha256(tokens.reshape(2, 3)) != tokens_sha256(tokens.reshape(3, 2))
    assert tokens_sha256(tokens.astype(">i4")) == tokens_sha256(tokens)


def test_tokenizer_adds_no_special_tokens(tokenizer: Any) -> None:
    assert tokenizer_encode(tokenizer)("the fox") == [1, 4]
