"""Walks that are cut short between two blocks."""

from __future__ import annotations

from collections.abc import Callable


class Cut(Exception):
    """Ends a walk in a test."""


def cut_after(start: str = "") -> Callable[[str], None]:
    """An ``advance`` that raises `Cut` at the first note that starts so."""

    def cut(note: str) -> None:
        if note.startswith(start):
            raise Cut

    return cut
