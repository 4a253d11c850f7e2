"""In-process engine: a transformers causal LM, greedy, fixed output length, key-value cache."""

from __future__ import annotations

import gc
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import DynamicCache, StaticCache

from compressor.measure.engines.base import RequestSample
from compressor.measure.engines.static_decoder import StaticDecoder, StaticDecoders
from compressor.numerics.siblings import Siblings

Loader = Callable[[torch.dtype], nn.Module]
CacheKind = Literal["dynamic", "static"]

_PADDING = 0  # any token will do: it is masked
_CLOCK_DIGITS = 7  # 0.1 microseconds: finer than the clock's own jitter, short in the sample files


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared tensors counted once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def model_kernel(model: nn.Module) -> str:
    """Kernels of the low-bit linears by use, such as ``int4pack (210)``; ``dense`` if none. Linears
    that are one product count each by themselves."""
    products = {module.linear for module in model.modules() if isinstance(module, Siblings)}
    linears = (module for module in model.modules() if module not in products)
    names = [getattr(module, "kernel_name", None) for module in linears]
    counts = Counter(name for name in names if isinstance(name, str))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common()) or "dense"


def model_dtype(model: nn.Module) -> str:
    """Data type of the activations: that of the embeddings, such as ``bfloat16``."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return str(next(embeddings.parameters()).dtype).removeprefix("torch.")


def _read_in_one_piece(linear: nn.Module | None) -> None:
    """Have a linear read its input as one matrix. The last position of each sequence lies among the
    others, which torch makes a product for each sequence of, each with a copy of the weight: of the
    output layer the last and longest part of reading a batch of prompts."""
    if linear is not None:
        linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [batch, longest], int64, padded on the left."""
    length = max(map(len, prompts))
    return (
        torch.as_tensor([[_PADDING] * (length - len(p)) + list(p) for p in prompts]),
        torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
    )


class TransformersEngine:
    """Serves a batch of equally long prompts together: one prefill, then one step per token.

    Each token is chosen greedily and the end-of-sequence token is ignored, so that every variant
    does the same work. The clock is read after the token reached the host.

    Args:
        loader: returns the ready model in evaluation mode for a dtype of its activations.
        dtype: what the loader is asked for.
        cache: ``dynamic`` grows the key-value cache by one position a step; ``static``
            preallocates it, and on a GPU replays steps as CUDA graphs (`static_decoder`).
        batches: sizes that graphs are made for; larger ones run kernel by kernel.
        longest: positions that the graphs' caches have room for; grown where it is not enough.
    """

    name = "transformers"

    def __init__(
        self,
        loader: Loader,
        *,
        dtype: torch.dtype = torch.float32,
        cache: CacheKind = "dynamic",
        batches: Sequence[int] = (1,),
        longest: int = 0,
    ) -> None:
        self._loader, self._dtype = loader, dtype
        self._cache_kind = cache
        self._decoders = StaticDecoders(batches, longest, self._decoder)
        self._model: nn.Module | None = None
        self._served = 0
        self._last_logit_only: dict[str, Any] = {}
        self._takes_positions = False

    @property
    def model(self) -> nn.Module:
        """The loaded model; RuntimeError before `start`."""
        if self._model is None:
            raise RuntimeError("the engine was not started")
        return self._model

    def start(self) -> None:
        """Load the model, once."""
        if self._model is None:
            self._model = self._loader(self._dtype).eval()
            _read_in_one_piece(self._model.get_output_embeddings())  # type: ignore[operator]
            parameters = inspect.signature(self._model.forward).parameters
            self._last_logit_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
            self._takes_positions = "position_ids" in parameters
            if self._replays:
                self._decoders.prepare()

    def stop(self) -> None:
        """Drop the model and return its memory."""
        self._decoders.clear()
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def metadata(self) -> dict[str, Any]:
        """Facts about the started engine, for the report and the recomputation."""
        device = next(self.model.parameters()).device
        return {
            "engine": self.name,
            "engine_version": transformers.__version__,
            "torch_version": torch.__version__,
            "device": str(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "cache": self._cache_kind,
            "launch": self._decoders.launch,
            "decoding": "greedy, fixed length, end-of-sequence ignored",
            "kernel": model_kernel(self.model),
            "dtype": model_dtype(self.model),
            "model_bytes": model_bytes(self.model),
        }

    def _new_cache(self, length: int) -> DynamicCache | StaticCache:
        config = self.model.config
        if self._cache_kind == "static":
            return StaticCache(config=config, max_cache_len=length)  # type: ignore[arg-type]
        return DynamicCache(config=config)  # type: ignore[arg-type]

    def steps(
        self, prompts: Sequence[Sequence[int]], output_length: int
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Tokens [batch, 1] of each step on the host, and the time [s] when they were there.

        Prompts of different lengths are padded on the left, and the padding is masked; of equal
        length they need no mask. The cache is ready when this returns; what is computed, is
        computed as the steps are asked for. Raises ValueError when nothing is asked for.
        """
        if not prompts or not all(prompts):
            raise ValueError("a batch needs at least one prompt, and no empty ones")
        if output_length < 1:
            raise ValueError("output_length must be at least 1")
        length = max(map(len, prompts))
        longest = length + output_length
        decoder = self._decoders.fitting(len(prompts), longest) if self._replays else None
        if decoder is not None:
            return self._replayed(decoder, prompts, output_length)
        cache = self._new_cache(longest)
        ids, mask = _padded(prompts)
        even = all(len(prompt) == length for prompt in prompts)
        return self._steps(ids, None if even else mask, cache, output_length)

    @property
    def _replays(self) -> bool:
        device = next(self.model.parameters()).device
        return device.type == "cuda" and self._cache_kind == "static" and self._takes_positions

    def _decoder(self, batch: int, capacity: int) -> StaticDecoder:
        return StaticDecoder(self.model, batch, capacity, self._last_logit_only)

    def _replayed(
        self, decoder: StaticDecoder, prompts: Sequence[Sequence[int]], output_length: int
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """As `_steps`; places of the decoder that are left over repeat the last prompt."""
        batch = len(prompts)
        ids, mask = _padded([*prompts, *[prompts[-1]] * (decoder.batch - batch)])
        for number in range(output_length):
            found = decoder.step() if number else decoder.begin(ids, mask)
            on_host = found[:batch].cpu()  # waits for the device: the token is at the caller
            yield on_host, time.perf_counter()

    @torch.inference_mode()
    def _steps(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        cache: DynamicCache | StaticCache,
        output_length: int,
    ) -> Iterator[tuple[torch.Tensor, float]]:
        model, device = self.model, next(self.model.parameters()).device
        ids = ids.to(device)
        masked: dict[str, torch.Tensor] = {}
        if mask is not None:
            masked["attention_mask"] = mask.to(device)
            if self._takes_positions:
                positions = masked["attention_mask"].cumsum(-1) - 1
                masked["position_ids"] = positions.clamp_(min=0)
        for _ in range(output_length):
            out = model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                **masked,
                **self._last_logit_only,
            )
            ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            on_host = ids.cpu()  # waits for the device: the token is at the caller
            yield on_host, time.perf_counter()
            if masked:
                seen = masked["attention_mask"]
                masked["attention_mask"] = torch.cat([seen, seen.new_ones(len(seen), 1)], -1)
            if "position_ids" in masked:
                masked["position_ids"] = masked["position_ids"][:, -1:] + 1

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], output_length: int
    ) -> tuple[list[list[int]], float, list[float]]:
        """Tokens [batch][output_length], the start [s] and the time of each step [s].

        Raises ValueError when the prompts differ in length or nothing is asked for.
        """
        if not prompts or len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("a batch needs at least one prompt, all of the same length")
        steps = self.steps(prompts, output_length)
        start = time.perf_counter()
        tokens, times = zip(*steps, strict=True)
        return torch.cat(tokens, dim=1).tolist(), start, list(times)

    def generate(self, prompts: Sequence[Sequence[int]], output_length: int) -> list[RequestSample]:
        """One sample per prompt; all of a batch share their token times."""
        _, start, times = self.generate_tokens(prompts, output_length)
        token_times = tuple(round(moment, _CLOCK_DIGITS) for moment in times)
        first_id = self._served
        self._served += len(prompts)
        return [
            RequestSample(
                request_id=str(first_id + index),
                prompt_tokens=len(prompt),
                output_tokens=len(token_times),
                start_s=round(start, _CLOCK_DIGITS),
                first_token_s=token_times[0],
                token_times_s=token_times,
                concurrency=len(prompts),
            )
            for index, prompt in enumerate(prompts)
        ]
