from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compressor.data.tokens import tokens_sha256
from compressor.errors import RecipeError
from compressor.measure.workload import (
    build_workload,
    output_lengths,
    prompts_sha256,
    tokenizer_encode,
)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def build(texts: list[str], **changes: Any) -> Any:
    return build_workload(
        texts, encode, **({"input_length": 12, "count": 3, "seed": 0, "source": "here"} | changes)
    )


def test_every_prompt_has_the_length_and_starts_where_a_text_starts() -> None:
    texts = ["alpha text", "beta text that is long enough", "gamma"]
    load = build(texts)
    assert [len(row) for row in load.tokens] == [12] * 3 and load.input_length == 12
    starts = {chr(row[0]) for row in load.tokens}
    assert starts == {"a", "b", "g"}


def test_seed_decides_order_and_hash() -> None:
    texts = [f"{index} is a number" for index in range(20)]
    digest = [build(texts, seed=seed).describe()["prompts_sha256"] for seed in (0, 0, 1)]
    assert digest[0] == digest[1] != digest[2]


def test_more_prompts_than_texts_goes_round() -> None:
    load = build(["abc", "defg"], count=5)
    assert len(load.tokens) == 5 and load.tokens[0] == load.tokens[2] == load.tokens[4]


def test_without_a_length_prompts_are_whole() -> None:
    load = build(["abc", "defg"], input_length=None, count=3)
    assert sorted(map(len, load.tokens)) in ([3, 3, 4], [3, 4, 4])
    assert load.input_length is None and load.longest == 4
    facts = load.describe()
    assert facts["input_tokens"]["least"] == 3 and facts["prompts_sha256"] == prompts_sha256(
        load.tokens
    )
    assert prompts_sha256([[1, 2], [3]]) != prompts_sha256([[1], [2, 3]])


def test_chat_template_wraps_each_prompt(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="no chat template"):
        tokenizer_encode(tokenizer, chat_template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}the {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} dog{% endif %}"
    )
    plain = tokenizer_encode(tokenizer)
    assert tokenizer_encode(tokenizer, chat_template=True)("fox") == plain("the fox dog")


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


def test_answer_lengths_are_seeded_spread_and_inclusive() -> None:
    lengths = output_lengths((2, 5), 400, seed=3)
    assert set(lengths) == {2, 3, 4, 5} and abs(np.mean(lengths) - 3.5) < 0.2
    assert output_lengths((2, 5), 100, seed=3) == lengths[:100]  # more prompts change none
    assert output_lengths((2, 5), 400, seed=4) != lengths
    assert output_lengths((7, 7), 3, seed=0) == [7, 7, 7]
