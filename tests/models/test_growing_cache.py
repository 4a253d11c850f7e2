"""The cache that is appended to in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from compressor.models.architecture import CausalLM
from compressor.models.growing_cache import growing_cache
from tests import tiny


@torch.inference_mode()
def test_logits_are_those_of_the_library_cache_while_rows_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.models.growing_cache._STEP", 16)
    directory = tiny.build("llama", tmp_path)
    model = CausalLM.open(directory).load_full(torch.float32)
    generator = torch.Generator().manual_seed(0)
    caches = [DynamicCache(config=model.config), growing_cache(model.config)]
    rows = 5
    for step in range(150):  # past several enlargements
        length = 7 if step == 0 else 1
        ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
        own, theirs = (
            model(input_ids=ids, past_key_values=cache, use_cache=True).logits for cache in caches
        )
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
        if step % 40 == 39:
            kept = torch.tensor([row for row in range(rows) if row != 1])
            rows -= 1
            for cache in caches:
                cache.batch_select_indices(kept)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 156
