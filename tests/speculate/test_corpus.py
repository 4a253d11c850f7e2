"""Corpora: answers are the target's own, whatever they were batched with, and survive a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compressor.errors import RecipeError, RunError
from compressor.models.architecture import CausalLM
from compressor.speculate.corpus import (
    Corpus,
    _Draw,
    corpus_batches,
    dialogue_corpus,
    generate_corpus,
)
from tests import tiny

PROMPTS = [
    [int(t) for t in np.random.default_rng(i).integers(3, 300, length)]
    for i, length in enumerate((5, 11, 3, 7, 7, 2, 19))
]


def model_of(arch: str, directory: Path) -> Any:
    return CausalLM.open(tiny.build(arch, directory)).load_full(torch.float32)


def generate(model: Any, directory: Path, **changes: Any) -> Corpus:
    settings: dict[str, Any] = {
        "output_length": 12,
        "batch_size": 3,
        "temperature": 0.0,
        "seed": 0,
        "end_tokens": (),
        "held_out": 2,
        **changes,
    }
    return generate_corpus(model, PROMPTS, directory=directory, **settings)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], length: int, ends: tuple[int, ...]) -> list[int]:
    """Token by token, without a cache."""
    said: list[int] = []
    while len(said) < length and not (said and said[-1] in ends):
        logits = model(torch.tensor([prompt + said]), use_cache=False).logits[0, -1]
        said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "gpt_neox", "opt", "bloom"])
def test_answers_are_the_targets_greedy_ones(tmp_path: Path, arch: str) -> None:
    model = model_of(arch, tmp_path / "model")
    free = [greedy(model, prompt, 12, ()) for prompt in PROMPTS]
    ends = (free[0][4], free[3][7])  # tokens that the model does say
    corpus = generate(model, tmp_path / "corpus", end_tokens=ends)
    for row, prompt in enumerate(PROMPTS):
        assert corpus.row(row).tolist() == prompt + greedy(model, prompt, 12, ends)
        assert corpus.starts[row] == len(prompt)
    assert (corpus.lengths - corpus.starts).min() <= 5
    assert list(corpus.rows("train")) == [0, 1, 2, 3, 4]
    assert list(corpus.rows("held_out")) == [5, 6]


def test_drawn_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = model_of("qwen3", tmp_path / "model")
    made = {
        size: generate(model, tmp_path / str(size), batch_size=size, temperature=0.8, seed=3)
        for size in (1, 2, 7)
    }
    assert made[1].sha256() == made[2].sha256() == made[7].sha256()
    other = generate(model, tmp_path / "other", temperature=0.8, seed=4)
    assert other.sha256() != made[1].sha256()


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    count = 4000
    drawn = _Draw(0.7, 0, range(count))(logits.expand(count, -1), range(count))
    expected = torch.softmax(logits.double() / 0.7, -1).numpy() * count
    assert stats.chisquare(np.bincount(drawn, minlength=4), expected).pvalue > 1e-3


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(500, -1)
    assert set(_Draw(1.0, 0, range(500))(logits, range(500))) == {1, 3}


def test_what_a_kill_left_is_gone_on_with(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    undisturbed = generate(model, tmp_path / "whole")

    def cut(note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tmp_path / "cut", advance=cut)
    with open(tmp_path / "cut" / "answers.jsonl", "a", encoding="utf-8") as file:
        file.write("[[1, 2")  # a line that a kill cut short
    notes: list[str] = []
    assert generate(model, tmp_path / "cut", advance=notes.append).sha256() == undisturbed.sha256()
    assert len(notes) == 3
    assert notes.count("already done") == 1
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "cut")) == names
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again: list[str] = []
    generate(model, tmp_path / "cut", advance=again.append)
    assert again == ["already done"] * 3


def test_answers_under_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")

    def cut(note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tmp_path / "cut", temperature=1.0, advance=cut)
    whole = generate(model, tmp_path / "whole")
    assert generate(model, tmp_path / "cut").sha256() == whole.sha256()


def test_prompts_that_cannot_be_answered_are_named(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")

    def ask(prompts: list[list[int]], **changes: Any) -> None:
        settings: dict[str, Any] = {"output_length": 4, "held_out": 0, **changes}
        generate_corpus(
            model,
            prompts,
            batch_size=1,
            temperature=0,
            seed=0,
            end_tokens=(),
            directory=tmp_path / "corpus",
            **settings,
        )

    with pytest.raises(RunError, match=r"prompt 1: a prompt is empty"):
        ask([[1], []])
    with pytest.raises(RunError, match=r"prompt 0: 1021 tokens and an answer of 4 do not fit"):
        ask([[5] * 1021])
    with pytest.raises(RunError, match=r"1 of 1 prompts are to be held out"):
        ask([[5]], held_out=1)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 9))
def test_batches_hold_every_prompt_once(lengths: list[int], size: int) -> None:
    batches = corpus_batches([[0] * length for length in lengths], size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1])
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths)


TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=8)


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6), st.data())
def test_samples_come_back(samples: list[tuple[list[int], list[int]]], data: Any) -> None:
    corpus = Corpus.from_samples(samples, data.draw(st.integers(0, len(samples))))
    for row, (prompt, answer) in enumerate(samples):
        assert corpus.row(row).tolist() == prompt + answer
        assert corpus.row(row)[corpus.starts[row] :].tolist() == answer
    assert sum(len(corpus.rows(part)) for part in ("train", "held_out")) == len(samples)
    said = [t for row in corpus.rows("train") for t in samples[row][1]]
    assert corpus.answer_tokens("train") == len(said)
    kept = corpus.frequent_tokens(3, 100)
    counts = np.bincount(said, minlength=100)
    assert len(kept) == 3
    assert list(kept) == sorted(set(kept))
    assert counts[kept].min() >= np.delete(counts, kept).max()


def test_a_corpus_comes_back_from_disk_or_is_refused(tmp_path: Path) -> None:
    corpus = Corpus.from_samples([([1, 2], [3]), ([4], [5, 6, 7])], 1)
    corpus.save(tmp_path)
    again = Corpus.load(tmp_path)
    assert again.held_out == 1
    assert again.sha256() == corpus.sha256()
    assert again.tokens.dtype == np.int32
    changed = corpus.tokens.copy()
    changed[0, 0] = 9
    np.save(tmp_path / "tokens.npy", changed)
    with pytest.raises(RunError, match="not what was written"):
        Corpus.load(tmp_path)
    (tmp_path / "tokens.npy").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        Corpus.load(tmp_path)


def test_lengths_that_make_no_sense_are_refused() -> None:
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match="start"):
        Corpus(tokens, np.array([3], np.int32), np.array([3], np.int32), 0)
    with pytest.raises(ValueError, match="held out"):
        Corpus(tokens, np.array([3], np.int32), np.array([1], np.int32), 2)


CHATS = [
    [
        {"role": "user", "content": "a single man"},
        {"role": "assistant", "content": "in possession"},
        {"role": "user", "content": "of a good fortune"},
        {"role": "assistant", "content": "must be"},
    ],
    [{"role": "user", "content": "nobody answers"}],
    [{"role": "user", "content": "in want"}, {"role": "assistant", "content": "of a wife"}],
]


def test_every_answer_of_a_dialogue_is_a_sample_in_its_context() -> None:
    tokenizer = tiny.tokenizer()
    corpus = dialogue_corpus(CHATS, tokenizer, length=200, held_out=1)
    texts = [tokenizer.decode(corpus.row(row)) for row in range(len(corpus.tokens))]
    first = "<s>user: a single man</s>"
    second = f"{first}<s>assistant: in possession</s><s>user: of a good fortune</s>"
    # The tiny template has no generation prompt, so that the role is part of the answer.
    assert texts == [
        f"{first}<s>assistant: in possession</s>",
        f"{second}<s>assistant: must be</s>",
        "<s>user: in want</s><s>assistant: of a wife</s>",
    ]
    assert tokenizer.decode(corpus.row(1)[: corpus.starts[1]]) == second
    assert corpus.held_out == 1
    assert all(corpus.row(row)[-1] == tokenizer.eos_token_id for row in range(3))


def test_dialogues_are_cut_and_late_answers_left_out() -> None:
    whole = dialogue_corpus(CHATS, tiny.tokenizer(), length=200, held_out=0)
    length = int(whole.starts[1]) + 1
    corpus = dialogue_corpus(CHATS, tiny.tokenizer(), length=length, held_out=0)
    assert corpus.lengths.max() == length
    assert corpus.row(1).tolist() == whole.row(1)[:length].tolist()
    assert len(dialogue_corpus(CHATS, tiny.tokenizer(), length=length - 1, held_out=0).tokens) == 2


def test_dialogues_need_a_template_and_answers() -> None:
    with pytest.raises(RecipeError, match="0 conversations hold an answer"):
        dialogue_corpus(CHATS[1:2], tiny.tokenizer(), length=99, held_out=0)
    with pytest.raises(RecipeError, match="no chat template"):
        dialogue_corpus(CHATS, object(), length=99, held_out=0)
