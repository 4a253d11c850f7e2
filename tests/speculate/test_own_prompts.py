"""Prompts that the target writes itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from compressor.errors import RecipeError
from compressor.models.architecture import CausalLM
from compressor.speculate.own_prompts import UserTurn, own_batches, own_prompts
from tests import tiny


def test_a_users_turn_is_what_the_template_makes_of_it() -> None:
    turn = UserTurn.of(tiny.tokenizer())
    assert tiny.tokenizer().decode(turn.before) == "<s>user: "
    assert turn.end == tiny.tokenizer().eos_token_id


def test_prompts_are_as_served_and_none_comes_twice(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    model = CausalLM.open(tiny.build("llama", tmp_path / "model")).load_full(torch.float32)
    notes: list[str] = []
    made = [
        own_prompts(
            model,
            tokenizer,
            count=40,
            batch_size=size,
            seed=1,
            directory=tmp_path / str(size),
            advance=notes.append,
        )
        for size in (16, 50)
    ]
    assert made[0] == made[1] and len(notes) == own_batches(40, 16) + own_batches(40, 50) == 5
    # About 1 in 4 ends within 96 tokens of which each may be any of 300.
    assert 5 <= len(made[0]) < 40
    assert len(set(map(tuple, made[0]))) == len(made[0])
    turn = UserTurn.of(tokenizer)
    for prompt in made[0]:
        assert prompt[: len(turn.before) - 1] == turn.before[:-1]  # the last may join with a word
        assert prompt.count(turn.end) == 1 and prompt[-1] == turn.end


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_a_model_without_turns_is_refused(template: str | None) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match="its own prompts"):
        UserTurn.of(tokenizer)
