"""Whether a tokenizer is its model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import RunError
from compressor.models.tokenizer import check_fits, load_tokenizer
from tests import tiny


def test_every_token_needs_a_row_but_added_ones(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.build("llama", tmp_path))
    most = max(tokenizer.get_vocab().values())
    check_fits(tokenizer, most + 1, tmp_path)
    with pytest.raises(RunError, match=f"ids up to {most}, .* {most} rows"):
        check_fits(tokenizer, most, tmp_path)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert max(tokenizer.get_vocab().values()) == most + 1
    check_fits(tokenizer, most + 1, tmp_path)


def test_a_directory_without_one_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)
