"""A table of text, as every output form takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A titled table; `text_columns` leading columns are words, the others figures.

    A cell may hold a second line after a newline: the confidence interval of the first. `marked`
    is the index of a row to stress.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    note: str = ""
    marked: int | None = None
