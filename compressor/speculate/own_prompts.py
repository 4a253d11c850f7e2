"""Prompts that the target writes itself: Xu et al., "Magpie" (arXiv 2406.08464).

Given its chat template up to where the user's words begin, a chat model goes on with what users
asked in the dialogues that it was trained on: prompts as diverse as those, without a data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.data.tokens import prompt_tokens
from compressor.errors import RecipeError
from compressor.speculate.corpus import corpus_batches, generate_corpus

OWN = "own"  # the source's name in a recipe
LENGTH = 96  # most tokens of a prompt that is kept; others rarely end at all
SURPLUS = 1.25  # prompts that are written for one that is kept: some do not end, or come twice
TEMPERATURE = 1.0
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class UserTurn:
    """How a user's words stand in a chat template.

    Attributes:
        before: token ids in front of them.
        end: the token behind them.
    """

    before: list[int]
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> UserTurn:
        """From a tokenizer's chat template.

        Raises:
            RecipeError: there is none, or nothing in it says where the user's words end.
        """
        text = ""
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": _MARK}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        before, mark, after = text.partition(_MARK)
        ids, ends = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in (before, after)
        )
        if not mark or not ids or not ends or ends[0] not in tokenizer.all_special_ids:
            raise RecipeError(
                "the model cannot write its own prompts: no chat template of its tokenizer has a "
                "special token behind the user's words",
                where="speculation.prompts",
                fix="give a file or data set of prompts",
            )
        return cls(ids, ends[0])


def own_prompts(
    model: Any,
    tokenizer: Any,
    *,
    count: int,
    batch_size: int,
    seed: int,
    directory: Path,
    advance: Callable[[str], None] = lambda note: None,
) -> list[list[int]]:
    """Prompts in the words of the model's users, drawn at temperature 1; resumes as corpora do.

    Args:
        model: a transformers causal LM, in evaluation mode.
        tokenizer: its own.
        count: prompts that are wanted.
        batch_size: written at once.
        seed: of what is drawn.
        directory: for what is drawn so far.
        advance: called with a note after each of `own_batches`.

    Returns:
        token ids as served, in the chat template and ready for an answer; all different, at most
        ``count``.

    Raises:
        RecipeError: see `UserTurn.of`.
    """
    turn = UserTurn.of(tokenizer)
    drawn = generate_corpus(
        model,
        [turn.before] * _written(count),
        output_length=LENGTH,
        batch_size=batch_size,
        temperature=TEMPERATURE,
        seed=seed,
        end_tokens=[turn.end],
        held_out=0,
        directory=directory,
        advance=advance,
    )
    texts: dict[str, None] = {}
    for row in drawn.rows("train"):
        said = drawn.row(row)[len(turn.before) :].tolist()
        if said[-1] == turn.end and (text := tokenizer.decode(said[:-1], skip_special_tokens=True)):
            texts[text.strip()] = None
    return [list(prompt_tokens(text, tokenizer)) for text in texts if text][:count]


def own_batches(count: int, batch_size: int) -> int:
    """Batches in which so many prompts are written."""
    return len(corpus_batches([[0]] * _written(count), batch_size))


def _written(count: int) -> int:
    return math.ceil(count * SURPLUS)
