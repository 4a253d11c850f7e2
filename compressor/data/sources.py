"""Texts by name: built in, in a local file, or a data set on the Hub."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError, RunError

BUILTIN_PREFIX = "builtin:"
_BUILTIN = {
    "calibration": "calibration.jsonl",
    "novel": "novel.txt",
    "web": "web.jsonl",
    "questions": "questions.jsonl",
    "prompts": "prompts.jsonl",
    "instructions": "instructions.jsonl",
}
_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")


def load_texts(
    source: str,
    *,
    split: str | None = None,
    field: str = "text",
    base_dir: Path,
    tokenizer: Any = None,
) -> list[str]:
    """The documents of a source.

    Args:
        source: ``builtin:NAME``; a .txt (one document), .jsonl, .json or .parquet file relative to
            ``base_dir``; or the id of a data set on the Hub.
        split: of a Hub data set; ``train`` when not given.
        field: column that holds the text. A list of chat messages there (or under ``messages``) is
            rendered by the tokenizer's chat template.
        base_dir: directory of the recipe.
        tokenizer: renders chat messages.

    Raises:
        RecipeError: the source does not exist, is empty, or has no such field.
        RunError: the Hub cannot be reached.
    """
    rows = _rows(source, split, base_dir)
    texts = [text for row in rows if (text := _text(row, field, source, tokenizer)).strip()]
    if not texts:
        raise RecipeError(
            "the text is empty", where=source, fix="give a source with some text in it"
        )
    return texts


def load_messages(
    source: str, *, split: str | None = None, field: str = "messages", base_dir: Path
) -> list[list[dict[str, str]]]:
    """The dialogues of a source, as chat messages with ``role`` and ``content``.

    Args:
        source: as for `load_texts`.
        split: likewise.
        field: column that holds the list of messages; ``messages`` where a row has no such field.
        base_dir: likewise.

    Raises:
        RecipeError: as `load_texts`, or a row holds no messages.
    """
    found = []
    for number, row in enumerate(_rows(source, split, base_dir), 1):
        value: Any = row.get(field, row.get("messages")) if isinstance(row, dict) else None
        good = isinstance(value, list) and all(
            isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value
        )
        if not good:
            raise RecipeError(
                f"row {number} holds no chat messages in the field {field!r}",
                where=source,
                fix="give lists of {role, content}, or have the answers generated (answers: own)",
            )
        found.append(value)
    return found


def _rows(source: str, split: str | None, base_dir: Path) -> list[Any]:
    if source.startswith(BUILTIN_PREFIX):
        name = source.removeprefix(BUILTIN_PREFIX)
        if name not in _BUILTIN:
            raise RecipeError(
                f"there is no built-in text {name!r}",
                where=source,
                fix=f"choose from {', '.join(BUILTIN_PREFIX + n for n in _BUILTIN)}",
            )
        path = Path(str(files("compressor.data") / "builtin" / _BUILTIN[name]))
        return _read(path)
    elif (base_dir / source).is_file():
        return _read(base_dir / source)
    elif source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        raise RecipeError(
            "there is no such file",
            where=str(base_dir / source),
            fix="correct the path; it is relative to the recipe",
        )
    else:
        return _hub(source, split or "train")


def _read(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the file is not UTF-8 (byte {error.start})",
            where=str(path),
            fix="convert it to UTF-8",
        ) from error
    if path.suffix == ".jsonl":
        rows = []
        # Not splitlines(): JSON strings may hold U+2028, U+0085 and their like as they are.
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise RecipeError(
                    "the line is not JSON", where=f"{path}:{number}", fix="mend it"
                ) from error
        return rows
    if path.suffix == ".json":
        try:
            value = json.loads(content)
        except ValueError as error:
            raise RecipeError("the file is not JSON", where=str(path), fix="mend it") from error
        return value if isinstance(value, list) else [value]
    return [content]


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return file.read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(
            "the file is not Parquet", where=str(path), fix="write it again or give another"
        ) from error


def _hub(source: str, split: str) -> list[Any]:
    from datasets import load_dataset

    try:
        return list(load_dataset(source, split=split))
    except Exception as error:  # the library raises a dozen unrelated types here
        raise RunError(
            f"neither a file nor a data set that can be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})",
            where=source,
            fix="check the id, the split and the network, or give a local file",
        ) from error


def _text(row: Any, field: str, source: str, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise RecipeError(
            "a row is neither a text nor an object", where=source, fix="use JSON objects"
        )
    value = row.get(field, row.get("messages"))
    if value is None and field in row:
        return ""  # a row without a text is skipped like an empty one
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise RecipeError(
                "the rows are chats, but the model has no chat template",
                where=source,
                fix="choose a source with plain text",
            )
        return tokenizer.apply_chat_template(value, tokenize=False)
    raise RecipeError(
        f"the rows have no text in the field {field!r}; they have {', '.join(sorted(row))}",
        where=source,
        fix="set `field` to the one that holds the text",
    )
