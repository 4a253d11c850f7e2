"""Texts and token windows."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compressor.data.sources import load_texts
from compressor.data.tokens import evaluation_windows, pack_tokens, tokenise, tokens_sha256
from compressor.errors import RecipeError, RunError
from tests import tiny


@pytest.mark.parametrize("name", ["calibration", "novel", "web", "questions", "prompts"])
def test_built_in_texts(name: str) -> None:
    field = "prompt" if name == "prompts" else "text"
    assert sum(map(len, load_texts(f"builtin:{name}", field=field, base_dir=Path()))) > 9_000


def test_held_out_texts_share_no_passage_with_calibration() -> None:
    def passages(name: str) -> set[str]:
        words = " ".join(load_texts(f"builtin:{name}", base_dir=Path())).split()
        return {" ".join(words[i : i + 12]) for i in range(len(words) - 12)}

    calibration = passages("calibration")
    assert not calibration & passages("novel") and not calibration & passages("web")


def test_local_files_of_every_kind(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "a.json").write_text(json.dumps([{"body": "x"}, {"body": "y"}]))
    Dataset.from_dict({"text": ["p", "q"]}).to_parquet(str(tmp_path / "a.parquet"))
    assert load_texts("a.txt", base_dir=tmp_path) == ["one text"]
    assert load_texts("a.jsonl", base_dir=tmp_path) == ["one", "two"]
    assert load_texts("a.json", field="body", base_dir=tmp_path) == ["x", "y"]
    assert load_texts("a.parquet", base_dir=tmp_path) == ["p", "q"]


def test_text_as_the_web_has_it(tmp_path: Path) -> None:
    """Line separators inside JSON strings, a byte order mark, rows without a text."""
    lines = '\ufeff{"text": "a\u2028b\x85c"}\r\n{"text": null}\n{"text": "d"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "a.txt").write_bytes("\ufeffhello".encode())
    assert load_texts("a.jsonl", base_dir=tmp_path) == ["a\u2028b\x85c", "d"]
    assert load_texts("a.txt", base_dir=tmp_path) == ["hello"]


def test_no_more_is_tokenised_than_is_evaluated() -> None:
    tokenizer = tiny.tokenizer()
    texts = load_texts("builtin:web", base_dir=Path())
    assert np.array_equal(tokenise(texts, tokenizer, 5000), tokenise(texts, tokenizer)[:5000])

    def endless() -> Iterator[str]:
        while True:
            yield texts[0]

    assert evaluation_windows(endless(), tokenizer, 64, 8192)[0].shape == (128, 64)


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = copy.copy(tiny.tokenizer())  # the others use it too
    row = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert load_texts("c.jsonl", base_dir=tmp_path, tokenizer=tokenizer) == ["<user>hi"]
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        load_texts("c.jsonl", base_dir=tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "x.txt", "empty"),
        (b"  \n ", "x.txt", "empty"),
        (b"\xff\xfe\x00", "x.txt", "not UTF-8"),
        (b'{"text": "a"}\nnot json\n', "x.jsonl", r"x\.jsonl:2"),
        (b"[1, 2", "x.json", "not JSON"),
        (b'{"other": "a"}\n', "x.jsonl", "they have other"),
        (b"[1]", "x.json", "neither a text nor an object"),
        (b"nope", "x.parquet", "not Parquet"),
        (b'{"text": null}\n', "x.jsonl", "empty"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        load_texts(name, base_dir=tmp_path)


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_texts("nowhere.txt", base_dir=tmp_path)
    with pytest.raises(RecipeError, match="builtin:novel"):
        load_texts("builtin:nove", base_dir=tmp_path)
    with pytest.raises(RunError, match="neither a file nor a data set"):
        load_texts("org/data", base_dir=tmp_path)


def test_calibration_windows_are_a_seeded_choice_without_overlap() -> None:
    tokenizer = tiny.tokenizer()
    texts = load_texts("builtin:novel", base_dir=Path())
    a, b = (pack_tokens(texts, tokenizer, 10, 16, seed) for seed in (0, 1))
    assert a.shape == (10, 16) and a.dtype == np.int32
    assert np.array_equal(a, pack_tokens(texts, tokenizer, 10, 16, 0))
    assert tokens_sha256(a) != tokens_sha256(b)
    tokens = tokenise(texts, tokenizer)
    starts = {
        next(i for i in range(0, len(tokens), 16) if np.array_equal(tokens[i : i + 16], row))
        for row in a
    }
    assert len(starts) == 10


def test_too_short_a_text_says_how_much_is_needed() -> None:
    with pytest.raises(RecipeError, match="10 samples of 16 tokens need 160"):
        pack_tokens(["short"], tiny.tokenizer(), 10, 16, 0)
    with pytest.raises(RecipeError, match="one window takes 64"):
        evaluation_windows(["short"], tiny.tokenizer(), 64, 1000)


def test_evaluation_windows_are_the_text_in_order() -> None:
    tokenizer = tiny.tokenizer()
    texts = load_texts("builtin:novel", base_dir=Path())
    windows, n_bytes = evaluation_windows(texts, tokenizer, 32, 200)
    assert windows.shape == (6, 32)
    assert np.array_equal(windows.ravel(), tokenise(texts, tokenizer)[:192])
    assert 0 < n_bytes <= len(texts[0].encode())
