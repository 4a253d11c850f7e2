"""Continuous batching in this process: the tokens of each request alone, in shared steps."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import RunError
from compressor.measure.engines.base import RequestSample
from compressor.measure.engines.continuous import ContinuousEngine
from compressor.models import ragged
from compressor.models.architecture import CausalLM
from compressor.models.attention import HANDLER, use_chunked_causal
from compressor.models.kv_cache import RoundedCache
from compressor.numerics import grid
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.scheme import KV_CACHE, Scheme
from tests import tiny
from tests.engines.serving import Calls, alone, clear_prompts, llama, serve, until

OUTPUT = 12
THREAD = "continuous-batching"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def no_thread_left() -> Any:
    yield
    assert not threads()


@pytest.fixture(scope="module")
def expected() -> tuple[list[list[int]], list[list[int]]]:
    return clear_prompts(llama, OUTPUT)


class Started:
    """``with Started(engine):`` starts and stops it."""

    def __init__(self, engine: ContinuousEngine) -> None:
        self.engine = engine

    def __enter__(self) -> ContinuousEngine:
        self.engine.start()
        return self.engine

    def __exit__(self, *exception: object) -> None:
        self.engine.stop()


def engine_of(loader: Any = llama, **settings: Any) -> Started:
    return Started(ContinuousEngine(loader, **({"cache_tokens": 2048} | settings)))


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_tokens_are_those_of_each_request_alone(expected: Any, concurrency: int) -> None:
    prompts, tokens = expected
    with engine_of() as engine:
        served = serve(engine, prompts, OUTPUT, concurrency=concurrency, every_s=0.004)
    assert [made for made, _ in served] == tokens
    assert len({token for made in tokens for token in made}) > 20  # no model of one token
    for (_, sample), prompt in zip(served, prompts, strict=True):
        assert not sample.error and sample.prompt_tokens == len(prompt)
        assert sample.output_tokens == OUTPUT == len(sample.token_times_s)
        assert sample.start_s < sample.first_token_s == sample.token_times_s[0]
        assert list(sample.token_times_s) == sorted(set(sample.token_times_s))
        assert RequestSample.from_dict(sample.to_dict()) == sample
    assert len({sample.request_id for _, sample in served}) == len(prompts)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 8, "max_requests": 4},  # prompts in several steps
        {"page_size": 16, "cache_tokens": 160},  # requests wait for room, or start anew
        {"attention": "sdpa"},
    ],
)
def test_settings_change_no_token(expected: Any, settings: dict[str, Any]) -> None:
    prompts, tokens = expected
    with engine_of(**settings) as engine:
        assert [made for made, _ in serve(engine, prompts, OUTPUT)] == tokens


@pytest.mark.parametrize("arch", ["mistral", "qwen3", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("batch_tokens", [512, 16])
def test_other_attention(tmp_path: Path, arch: str, batch_tokens: int) -> None:
    """Sliding windows of 8 tokens (mistral; every other layer of gemma3), norms, experts."""
    path = tiny.build(arch, tmp_path)
    model = CausalLM.open(path).load_full(torch.float32)
    prompts, tokens = clear_prompts(
        lambda _: model, 8, (5, 23, 40, 9), vocabulary=tiny.VOCABULARY, gap=1e-3
    )
    with engine_of(lambda _: model, max_batch_tokens=batch_tokens) as engine:
        assert engine.metadata()["attention"] == ragged.NAME
        assert [made for made, _ in serve(engine, prompts, 8)] == tokens


@pytest.mark.parametrize("kind", ["one product", "one for each"])
def test_steps_of_single_tokens(expected: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of 3 to 70 tokens, read for one product however much padding that takes, or not."""
    prompts, tokens = expected
    together: list[int] = []
    original = ragged.single_queries
    monkeypatch.setattr(ragged, "_MOST_PADDING", 100.0 if kind == "one product" else 0.0)
    monkeypatch.setattr(
        ragged, "single_queries", lambda *args: together.append(1) or original(*args)
    )
    with engine_of() as engine:
        assert [made for made, _ in serve(engine, prompts, OUTPUT)] == tokens
    assert len(together) >= 2 * 8 if kind == "one product" else not together  # of two layers


def test_steps_are_shared(expected: Any) -> None:
    prompts = expected[0][:4]
    with engine_of() as engine:
        calls = Calls(engine.model)
        serve(engine, prompts, 40)
        assert 40 <= calls.count <= 46  # not 160: all four arrive within a step or two
        assert calls.tokens.count(4) >= 34


def test_a_late_request_joins_the_running_batch(expected: Any) -> None:
    prompts, tokens = expected
    with engine_of() as engine:
        Calls(engine.model, before=lambda _: time.sleep(0.004))
        (_, long), (made, late) = serve(engine, prompts[:2], [60, OUTPUT], every_s=0.03)
    assert made == tokens[1]
    assert long.token_times_s[0] < late.start_s and late.end_s < long.end_s
    assert set(late.token_times_s) < set(long.token_times_s)  # every one of its steps was shared


def test_a_cancelled_request_leaves_the_batch(expected: Any) -> None:
    prompts, tokens = expected

    async def run(engine: ContinuousEngine) -> list[int]:
        client = engine.client()
        unwanted = asyncio.create_task(client.request(prompts[0], 1000))
        await asyncio.sleep(0.05)
        unwanted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unwanted
        return (await client.serve(prompts[1], OUTPUT))[0]

    with engine_of() as engine:
        calls = Calls(engine.model)
        assert asyncio.run(run(engine)) == tokens[1]
        assert calls.count < 500 and calls.tokens[-1] == 1
        assert engine.healthy()


def test_stop_in_flight_answers_and_leaves_no_thread(expected: Any) -> None:
    engine = ContinuousEngine(llama, cache_tokens=4096)
    engine.start()
    calls = Calls(engine.model)
    stopper = threading.Thread(target=lambda: until(lambda: calls.count > 5) and engine.stop())
    stopper.start()
    served = serve(engine, expected[0][:3], 1000)
    stopper.join()
    assert not threads() and not engine.healthy()
    for tokens, sample in served:
        assert "stopped" in sample.error and 0 < sample.output_tokens == len(tokens) < 1000
    engine.stop()  # again: nothing
    with pytest.raises(RuntimeError, match="not started"):
        engine.client()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no memory left"), "no memory left"),
        (MemoryError(), "MemoryError"),
        (SystemExit(3), "ended"),  # what the library does not catch
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_model_ends_all_with_an_error(
    expected: Any, error: BaseException, message: str
) -> None:
    prompts, tokens = expected
    with engine_of() as engine:
        assert engine.healthy()
        Calls(engine.model, fail_at=6, error=error)
        served = serve(engine, prompts[:3], OUTPUT)
        assert not engine.healthy()
        for (made, sample), whole in zip(served, tokens, strict=False):
            assert message in sample.error
            assert made == whole[: len(made)] and sample.output_tokens == len(made) < OUTPUT
            assert sample.first_token_s >= sample.start_s
        assert max(sample.output_tokens for _, sample in served) >= 4
        ((made, sample),) = serve(engine, prompts[:1], OUTPUT)  # at once, not for ever
        assert sample.error and not made and sample.token_times_s == ()


def test_requests_that_cannot_be_served_are_samples(expected: Any) -> None:
    prompts, tokens = expected
    with engine_of(cache_tokens=128) as engine:
        bad = serve(engine, [[], prompts[0], prompts[0]], [4, 0, 124])
        assert [made for made, _ in bad] == [[], [], []]
        reasons = ("at least one", "at least one", "exceed 128")
        for reason, (_, sample) in zip(reasons, bad, strict=True):
            assert reason in sample.error
        assert serve(engine, prompts[:1], OUTPUT)[0][0] == tokens[0]


def test_the_end_of_sequence_counts_only_when_asked(expected: Any) -> None:
    prompts, tokens = expected
    last = tokens[0].index(tokens[0][4]) + 1  # its first occurrence

    def load(dtype: torch.dtype) -> nn.Module:
        model: Any = llama(dtype)
        model.generation_config.eos_token_id = [tokens[0][4], 63]
        return model

    with engine_of(load) as engine:
        assert serve(engine, prompts[:1], OUTPUT)[0][0] == tokens[0]
        ((made, sample),) = serve(engine, prompts[:1], OUTPUT, ignore_eos=False)
        assert made == tokens[0][:last] and sample.output_tokens == last and not sample.error


def quantized(scheme: Scheme) -> Any:
    """A loader of the model with every linear of its blocks in few bits."""

    def load(dtype: torch.dtype) -> nn.Module:
        model: Any = llama(torch.float32)
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        scale, zero = grid.fit_grid(
                            linear.weight.data, scheme.weights, scale_dtype=torch.bfloat16
                        )
                        codes = grid.quantize(linear.weight.data, scale, zero, scheme.weights, None)
                        low = QuantizedLinear.from_tensor(
                            codes, scheme, None, kernel="auto", dtype=dtype
                        )
                        setattr(part, name, low)
        return model.to(dtype)

    return load


@pytest.mark.parametrize(
    ("name", "group_size", "dtype", "kernel"),
    [
        ("W8A8", None, torch.float32, "int8-int_mm (14)"),
        ("W8A8", None, torch.bfloat16, "int8-int_mm (14)"),
        ("W4A16", 32, torch.bfloat16, "int4-int4pack_mm (14)"),
        ("W4A16", 32, torch.float32, "dequantized-float32 (14)"),
    ],
)
def test_low_bit_linears(
    name: str, group_size: int | None, dtype: torch.dtype, kernel: str
) -> None:
    loader = quantized(Scheme.parse(name, group_size, True))
    prompts, tokens = clear_prompts(loader, 6, (5, 17, 9, 50), gap=0.1)
    with engine_of(loader, dtype=dtype) as engine:
        facts = engine.metadata()
        served = serve(engine, prompts, 6)
    assert facts["kernel"] == kernel
    assert facts["dtype"] == str(dtype).removeprefix("torch.")
    assert not any(sample.error for _, sample in served)
    if dtype == torch.float32:
        assert [made for made, _ in served] == tokens
    else:  # bfloat16 may choose otherwise now and then
        assert sum(made[0] == whole[0] for (made, _), whole in zip(served, tokens, strict=True)) > 2


def rounding(dtype: torch.dtype) -> nn.Module:
    """The model with cached keys and values in coarse steps."""
    model: Any = llama(dtype)
    use_chunked_causal(model)
    for block in model.model.layers:
        coarse = RoundedCache(torch.tensor([0.05]), torch.tensor([0.05]), KV_CACHE["int8"])
        setattr(block.self_attn, HANDLER, coarse)
    return model


def test_cached_keys_and_values_are_rounded() -> None:
    prompts, tokens = clear_prompts(rounding, OUTPUT, (5, 17, 9, 30))
    assert tokens != alone(llama, prompts, OUTPUT)
    with engine_of(rounding) as engine:
        assert [made for made, _ in serve(engine, prompts, OUTPUT)] == tokens
    with pytest.raises(RunError, match="does not round"):
        ContinuousEngine(rounding, attention="sdpa").start()


@pytest.mark.parametrize("arch", ["bloom", "gemma2"])
def test_attention_that_it_would_compute_wrongly_is_refused(tmp_path: Path, arch: str) -> None:
    path = tiny.build(arch, tmp_path)
    with pytest.raises(RunError, match="sdpa"):
        ContinuousEngine(lambda _: CausalLM.open(path).load_full(torch.float32)).start()


def test_a_cache_that_does_not_fit_is_told() -> None:
    with pytest.raises(RunError, match="available memory"):
        ContinuousEngine(llama, cache_tokens=1 << 50).start()


def test_metadata_and_what_is_left_after_it() -> None:
    model: Any = llama()
    with engine_of(lambda _: model, cache_tokens=1000, page_size=64) as engine:
        facts = engine.metadata()
        assert engine.model is model
        used: list[int] = []  # in the engine's own thread
        Calls(model, before=lambda _: used.append(torch.get_num_threads()))
        serve(engine, [[5, 6, 7]], 2)
        assert used == [torch.get_num_threads()] * 2
    assert facts["engine"] == "transformers-continuous" and facts["attention"] == ragged.NAME
    assert (facts["cache_blocks"], facts["cache_page_tokens"]) == (16, 64)
    assert facts["prefix_sharing"] is False and facts["batching"] == "continuous"
    assert facts["max_batch_tokens"] == 2048 and facts["cuda_graphs"] is False
    assert facts["kernel"] == "dense" and facts["threads"] == torch.get_num_threads()
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_equal_prompts_are_computed_each_time(expected: Any) -> None:
    prompt = expected[0][6]  # 70 tokens: more than a page
    with engine_of(page_size=16) as engine:
        calls = Calls(engine.model)
        assert len({tuple(serve(engine, [prompt], 3)[0][0]) for _ in range(3)}) == 1
        assert calls.tokens == [70, 1, 1] * 3
