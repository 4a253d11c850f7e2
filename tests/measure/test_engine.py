from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.measure.engines.base import RequestSample
from compressor.measure.engines.transformers import TransformersEngine, model_bytes


@pytest.fixture
def prompt_tokens() -> list[list[int]]:
    return torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_tokens_are_those_of_generate(loaders: Any, prompt_tokens: Any, cache: Any) -> None:
    engine = TransformersEngine(loaders["baseline"], cache=cache)
    engine.start()
    tokens, start, times = engine.generate_tokens(prompt_tokens, 7)
    ids = torch.tensor(prompt_tokens)
    expected = engine.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, eos_token_id=-1
    )[:, 9:]
    assert tokens == expected.tolist()
    assert len(times) == 7 and start < times[0] and times == sorted(times)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (3, 9, 1)])
def test_the_output_layer_reads_last_positions_as_one_matrix(
    loaders: Any, lengths: tuple[int, ...]
) -> None:
    engine = TransformersEngine(loaders["baseline"])
    engine.start()
    layouts = []
    head: Any = engine.model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_pre_hook(
        lambda _, inputs: layouts.append((inputs[0].shape[:2], inputs[0].is_contiguous()))
    )
    list(engine.steps([[7] * length for length in lengths], 2))
    assert layouts == [((3, 1), True)] * 2


def test_samples_hold_one_clock(loaders: Any, prompt_tokens: Any) -> None:
    engine = TransformersEngine(loaders["baseline"])
    engine.start()
    rows = engine.generate(prompt_tokens, 4) + engine.generate(prompt_tokens, 4)
    assert len({row.request_id for row in rows}) == 6
    assert all(row.output_tokens == 4 == len(row.token_times_s) for row in rows)
    assert rows[0].end_s <= rows[3].start_s
    assert rows[0].start_s < rows[0].first_token_s == rows[0].token_times_s[0]
    assert RequestSample.from_dict(rows[0].to_dict()) == rows[0]


def test_metadata_states_what_ran(loaders: Any) -> None:
    engine = TransformersEngine(loaders["baseline"], dtype=torch.bfloat16)
    engine.start()
    facts = engine.metadata()
    assert facts["engine"] == "transformers" and facts["dtype"] == "bfloat16"
    assert facts["kernel"] == "dense" and facts["threads"] == torch.get_num_threads()
    assert facts["model_bytes"] == model_bytes(engine.model) > 0
    engine.model.model.layers[0].mlp.up_proj.kernel_name = "int8_mm"  # type: ignore[union-attr, index]
    assert engine.metadata()["kernel"] == "int8_mm (1)"


def test_stopped_engine_has_no_model(loaders: Any) -> None:
    engine = TransformersEngine(loaders["small"])
    with pytest.raises(RuntimeError, match="not started"):
        _ = engine.model
    engine.start()
    engine.stop()
    with pytest.raises(RuntimeError, match="not started"):
        engine.generate([[1]], 1)


@pytest.mark.parametrize("batch", [[], [[1, 2], [1]]])
def test_uneven_batches_are_refused(loaders: Any, batch: Any) -> None:
    engine = TransformersEngine(loaders["small"])
    engine.start()
    with pytest.raises(ValueError, match="same length"):
        engine.generate(batch, 2)


def test_no_output_is_refused(loaders: Any) -> None:
    engine = TransformersEngine(loaders["small"])
    engine.start()
    with pytest.raises(ValueError, match="at least 1"):
        engine.generate([[1]], 0)
