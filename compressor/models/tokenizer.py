"""A checkpoint's tokenizer, and whether it is its model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.errors import RunError, first_line

_FIX = "put the tokenizer's files of this very model beside its weights"


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory, as transformers reads it.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the libraries behind it raise what they like
        raise RunError(
            f"the tokenizer cannot be read ({first_line(error)})", where=str(directory), fix=_FIX
        ) from error


def check_fits(tokenizer: Any, rows: int, directory: Path) -> None:
    """See that every token of the vocabulary has a row of the embedding.

    Tokens that were added to it may lie behind the last one, as those of images do in checkpoints
    of text models: no text makes them.

    Args:
        tokenizer: from `load_tokenizer`.
        rows: of the model's embedding.
        directory: of the checkpoint.

    Raises:
        RunError: it knows tokens that the model has no embedding of.
    """
    added = tokenizer.added_tokens_decoder
    most = max((n for n in tokenizer.get_vocab().values() if n not in added), default=0)
    if most >= rows:
        raise RunError(
            f"the tokenizer makes token ids up to {most}, the model's embedding has {rows} rows: "
            "they are of different models",
            where=str(directory),
            fix=_FIX,
        )
