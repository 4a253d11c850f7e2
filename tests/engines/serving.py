"""Tiny models and clear-cut prompts for the engines of this process, and clients that arrive."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.measure.engines.base import RequestSample
from compressor.measure.engines.transformers import Loader, TransformersEngine

VOCABULARY = 64
LENGTHS = (5, 17, 9, 30, 3, 12, 70, 41)
Served = tuple[list[int], RequestSample]

gc.freeze()  # engines collect garbage when they stop: not over all that is imported


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same random weights at every call, large enough for varied tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def alone(loader: Loader, prompts: Sequence[Sequence[int]], output_length: int) -> list[list[int]]:
    """Tokens of each prompt served by itself in float32."""
    engine = TransformersEngine(loader)
    engine.start()
    return [engine.generate_tokens([prompt], output_length)[0][0] for prompt in prompts]


def clear_prompts(
    loader: Loader,
    output_length: int,
    lengths: Sequence[int] = LENGTHS,
    *,
    vocabulary: int = VOCABULARY,
    gap: float = 1e-2,
) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of these lengths and their greedy tokens, none of which is a near tie.

    The best token is ahead of the next by `gap` at least at every step, so that another order of
    summation cannot choose otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    model = loader(torch.float32)
    prompts, tokens = [], []
    for length in lengths:
        while True:
            prompt = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
            (out,) = alone(lambda _: model, [prompt], output_length)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + out])).logits[0, length - 1 : -1]
            best = logits.topk(2).values
            if float((best[:, 0] - best[:, 1]).min()) > gap:
                break
        prompts.append(prompt)
        tokens.append(out)
    return prompts, tokens


def serve(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    lengths: int | Sequence[int],
    *,
    concurrency: int = 100,
    every_s: float = 0.0,
    ignore_eos: bool = True,
) -> list[Served]:
    """Serve prompts, `concurrency` at the same time at most, one more `every_s` seconds."""
    wanted = [lengths] * len(prompts) if isinstance(lengths, int) else list(lengths)

    async def run() -> list[Served]:
        client, places = engine.client(), asyncio.Semaphore(concurrency)

        async def one(index: int) -> Served:
            await asyncio.sleep(index * every_s)
            async with places:
                return await client.serve(prompts[index], wanted[index], ignore_eos=ignore_eos)

        served = await asyncio.gather(*[one(index) for index in range(len(prompts))])
        await client.close()
        return list(served)

    return asyncio.run(asyncio.wait_for(run(), 60))


class Calls:
    """Counts a model's forward passes; from the `fail_at`-th on they raise `error`.

    `before` is called first, with the number of the pass from 1: to slow down, or to wait.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fail_at: int | None = None,
        error: BaseException | None = None,
        before: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.count = 0
        self.tokens: list[int] = []
        self._fail_at, self._error, self._before = fail_at, error, before
        model.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.count += 1
        self.tokens.append(kwargs["input_ids"].numel())
        self._before(self.count)
        if self._fail_at is not None and self.count >= self._fail_at:
            raise self._error or RuntimeError("no memory left for this")


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until something is true; whether it became so."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
