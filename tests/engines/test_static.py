"""Static batching in this process, behind the client of continuous batching."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from compressor.measure.engines.static import StaticEngine
from tests.engines.serving import Calls, clear_prompts, llama, serve, until

OUTPUT = 12
THREAD = "static-batching"


@pytest.fixture(autouse=True)
def no_thread_left() -> Any:
    yield
    assert THREAD not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="module")
def expected() -> tuple[list[list[int]], list[list[int]]]:
    return clear_prompts(llama, OUTPUT)


@pytest.fixture
def engine() -> Any:
    made = StaticEngine(llama, wait_s=0.05, max_batch=4)
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_tokens_are_those_of_each_request_alone(expected: Any, cache: Any) -> None:
    prompts, tokens = expected
    engine = StaticEngine(llama, cache=cache, max_batch=3, wait_s=0.02)
    engine.start()
    served = serve(engine, prompts, OUTPUT, every_s=0.004)
    engine.stop()
    assert [made for made, _ in served] == tokens
    for (_, sample), prompt in zip(served, prompts, strict=True):
        assert not sample.error and sample.prompt_tokens == len(prompt)
        assert sample.output_tokens == OUTPUT == len(sample.token_times_s)
        assert sample.start_s < sample.first_token_s == sample.token_times_s[0]


def test_a_batch_runs_to_its_end_before_the_next(engine: StaticEngine, expected: Any) -> None:
    prompts, tokens = expected
    calls = Calls(engine.model)
    served = serve(engine, prompts[:6], [OUTPUT, 30, OUTPUT, 5, OUTPUT, OUTPUT])
    assert calls.count == 30 + OUTPUT  # a batch of four, to its longest, and one of two
    assert calls.tokens[0] == 4 * 30 and calls.tokens[30] == 2 * 12  # padded to the longest prompt
    first, second = [sample for _, sample in served[:4]], [sample for _, sample in served[4:]]
    assert max(sample.end_s for sample in first) < min(sample.first_token_s for sample in second)
    assert first[3].end_s < first[1].end_s  # a short one has its tokens early
    assert served[3][0] == tokens[3][:5] and served[4][0] == tokens[4]


def test_a_late_request_waits(engine: StaticEngine, expected: Any) -> None:
    Calls(engine.model, before=lambda _: time.sleep(0.005))
    (_, first), (made, late) = serve(engine, expected[0][:2], [40, OUTPUT], every_s=0.08)
    assert late.start_s < first.end_s < late.first_token_s and made == expected[1][1]


def test_equal_lengths_are_not_masked(engine: StaticEngine) -> None:
    seen: list[set[str]] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    serve(engine, [[5, 6, 7], [8, 9, 10]], 3)
    assert len(seen) == 3 and not any("attention_mask" in names for names in seen)


def test_the_end_of_sequence_counts_only_when_asked(expected: Any) -> None:
    prompts, tokens = expected

    def load(dtype: torch.dtype) -> Any:
        model: Any = llama(dtype)
        model.generation_config.eos_token_id = tokens[0][4]
        return model

    engine = StaticEngine(load)
    engine.start()
    assert serve(engine, prompts[:1], OUTPUT)[0][0] == tokens[0]
    made, sample = serve(engine, prompts[:1], OUTPUT, ignore_eos=False)[0]
    engine.stop()
    assert made == tokens[0][: tokens[0].index(tokens[0][4]) + 1] and not sample.error


def test_a_failing_batch_is_answered(engine: StaticEngine, expected: Any) -> None:
    prompts = expected[0]
    Calls(engine.model, fail_at=4)
    for made, sample in serve(engine, prompts[:3], OUTPUT):
        assert sample.error == "RuntimeError: no memory left for this" and len(made) == 3
    assert engine.healthy()  # the next batch is tried
    assert not serve(engine, prompts[:1], OUTPUT)[0][0]
    assert serve(engine, [[]], 3)[0][1].error


def test_stop_in_flight(engine: StaticEngine, expected: Any) -> None:
    calls = Calls(engine.model)
    stopper = threading.Thread(target=lambda: until(lambda: calls.count > 3) and engine.stop())
    stopper.start()
    served = serve(engine, expected[0][:6], 10_000)
    stopper.join()
    assert all("stopped" in sample.error for _, sample in served)
    assert sum(sample.output_tokens > 0 for _, sample in served) == 4
    assert not engine.healthy()


def test_a_withdrawn_request_ends_its_batch(engine: StaticEngine, expected: Any) -> None:
    prompts, tokens = expected

    async def run() -> list[int]:
        client = engine.client()
        unwanted = asyncio.create_task(client.request(prompts[0], 100_000))
        await asyncio.sleep(0.2)
        unwanted.cancel()
        return (await client.serve(prompts[1], OUTPUT))[0]

    assert asyncio.run(asyncio.wait_for(run(), 60)) == tokens[1]


def test_metadata(engine: StaticEngine) -> None:
    facts = engine.metadata()
    assert facts["engine"] == "transformers-static" and facts["max_batch"] == 4
    assert facts["kernel"] == "dense" and facts["cache"] == "dynamic" and facts["wait_s"] == 0.05
