"""In-process engine that batches continuously: transformers' own scheduler and paged cache.

Requests join the running batch at the next step and leave it when they end; prompts are prefilled
beside tokens of other requests. The scheduler, the paged cache and the step are the library's
(``generation/continuous_batching``, transformers 5.23). What is set, and why:

- The cache holds a declared number of tokens. The library would take 60 % of a CPU machine's memory
  for it, and dimension its index tensors (and, with ``sdpa``, a dense mask) by that.
- Prefix sharing is off: repeated prompts would be served from the cache and flatter the engine.
- Attention on a CPU is `models/ragged.py`, since the library's ``sdpa`` path has every query go
  over every other request's keys too, and does not round cached keys and values. The library takes
  only names that it knows, hence the override of `switch_to_cb_friendly_attn`.
- Tokens are stamped in the thread that makes them (`inflight.py`), by an `OutputRouter` of ours.
- No CUDA graphs and no asynchronous batching unless the library turns them on itself (flash
  attention on CUDA); both need CUDA.
- A hard stop of the library drops requests that came in during its last step without an answer;
  here whatever is open when its thread ends, for whatever reason, is answered with an error.

The library seeds torch's global generator when the cache is made; decoding is greedy.
"""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from contextlib import ExitStack
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from compressor.errors import RunError
from compressor.measure.engines.inflight import InProcessClient, Ticket, message
from compressor.measure.engines.threads import release_workers
from compressor.measure.engines.transformers import (
    Loader,
    model_bytes,
    model_dtype,
    model_kernel,
)
from compressor.models import ragged
from compressor.models.end_tokens import end_tokens

Attention = Literal["auto", "ragged_causal", "sdpa", "flash_attention_2", "flash_attention_3"]

_STOP_SECONDS = 60.0
_STOPPED = "the engine was stopped before the request ended"
_DIED = "the engine's thread ended before the request did"


class _Router(OutputRouter):
    """Notes every token in its ticket, with the time, in the thread that made it."""

    def __init__(self) -> None:
        super().__init__()
        self._tickets: dict[str, Ticket] = {}
        self._closed = ""

    @property
    def closed(self) -> bool:
        """Whether no more tickets are taken."""
        return bool(self._closed)

    def open(self, ticket: Ticket) -> bool:
        """Expect outputs for a ticket; False, with the ticket ended, when there will be none."""
        with self._lock:
            if not self._closed:
                self._tickets[ticket.request_id] = ticket
                return True
        ticket.end(self._closed)
        return False

    def forget(self, request_id: str) -> None:
        """Drop what still comes for a request."""
        with self._lock:
            self._tickets.pop(request_id, None)

    def close(self, error: str) -> None:
        """End every open ticket with an error, and those to come with the first such error."""
        with self._lock:
            self._closed = self._closed or error
            left = list(self._tickets.values())
            self._tickets.clear()
        for ticket in left:
            ticket.end(error)

    def deliver(self, output: GenerationOutput) -> None:
        """Called by the library for single outputs, mostly failures."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Called by the library once a step, with all new tokens."""
        now = time.perf_counter()
        ended: list[tuple[Ticket, str]] = []
        with self._lock:
            for output in outputs:
                ticket = self._tickets.get(output.request_id)
                if ticket is None:
                    continue
                for token in output.generated_tokens[len(ticket.tokens) :]:
                    ticket.add(token, now)
                if output.is_finished():
                    del self._tickets[output.request_id]
                    failed = output.status == RequestStatus.FAILED
                    ended.append((ticket, (output.error or "the request failed") * failed))
            idle = not self._tickets
        if idle:  # other engines may be served meanwhile
            release_workers()
        for ticket, error in ended:
            ticket.end(error)


class _Manager(ContinuousBatchingManager):
    """The library's manager with our router, whose thread leaves no request unanswered."""

    output_router: _Router

    def __init__(self, *args: Any, threads: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output_router = _Router()
        self._threads = threads

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing: the engine has set the attention."""

    def start(self) -> None:
        """Like the library's, but its thread does not keep a dying interpreter alive."""
        self.background_thread_status.clear()
        thread = threading.Thread(
            target=self._run_generation_loop, name="continuous-batching", daemon=True
        )
        self._generation_thread = thread  # type: ignore[assignment]
        thread.start()

    def _run_generation_loop(self) -> None:
        if self.model.device.type == "cpu":
            torch.set_num_threads(self._threads)  # OpenMP keeps the number by thread
        try:
            with torch.inference_mode():  # as `TransformersEngine` does; the library: no_grad
                super()._run_generation_loop()
        finally:
            self.output_router.close(_DIED)  # no effect where there was a better reason

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        self.output_router.close(message(error))
        super()._handle_critical_error(error, batch_processor)


class ContinuousEngine:
    """Serves requests as they come, batched continuously.

    Args:
        loader: returns the ready model in evaluation mode for a dtype of its activations.
        dtype: what the loader is asked for.
        cache_tokens: room for keys and values [tokens], over all requests. Requests that do not fit
            wait; when running ones outgrow it, the library starts the youngest anew.
        page_size: of the cache [tokens].
        max_batch_tokens: most tokens in one step; longer prompts are prefilled in several.
        max_requests: most requests in one step.
        attention: ``auto`` is ``ragged_causal`` on a CPU and wherever cached keys and values are
            rounded, else ``sdpa``.
    """

    name = "transformers-continuous"

    def __init__(
        self,
        loader: Loader,
        *,
        dtype: torch.dtype = torch.float32,
        cache_tokens: int = 16384,
        page_size: int = 64,
        max_batch_tokens: int = 2048,
        max_requests: int = 256,
        attention: Attention = "auto",
    ) -> None:
        if min(cache_tokens, max_batch_tokens, max_requests) < 1:
            raise ValueError("cache_tokens, max_batch_tokens and max_requests must be at least 1")
        self._loader, self._dtype = loader, dtype
        self._attention: str = attention
        self._limits: dict[str, Any] = {
            "page_size": page_size,
            "num_blocks": math.ceil(cache_tokens / page_size),
            "max_batch_tokens": max_batch_tokens,
            "max_requests_per_batch": min(max_requests, max_batch_tokens),
        }
        self._model: Any = None
        self._manager: _Manager | None = None
        self._undo = ExitStack()
        self._numbers = itertools.count()

    @property
    def model(self) -> nn.Module:
        """The loaded model; RuntimeError before `start`."""
        if self._model is None:
            raise RuntimeError("the engine was not started")
        return self._model

    def start(self) -> None:
        """Load the model, make the cache and start the thread, once.

        Raises:
            RunError: the architecture's attention cannot be batched, or the cache does not fit.
        """
        if self._manager is not None:
            return
        try:
            self._model = self._loader(self._dtype).eval()
            self._undo.enter_context(ragged.attention(self._model, self._choose_attention()))
            manager = _Manager(
                model=self._model,
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(
                    **self._limits, allow_block_sharing=False, seed=0
                ),
                threads=torch.get_num_threads(),
            )
            manager.warmup()  # makes the cache here, where an error is seen
        except (RuntimeError, ValueError, TypeError, MemoryError, LookupError) as error:
            self.stop()
            raise RunError(
                f"continuous batching cannot start: {message(error)}",
                where=type(error).__name__,
                fix="lower cache_tokens or max_batch_tokens if memory is short; else use the "
                "static engine",
            ) from error
        except BaseException:
            self.stop()
            raise
        release_workers()
        manager.start()
        self._manager = manager

    def _choose_attention(self) -> str:
        """The attention's name; RunError for a model that it would compute wrongly."""
        model, name = self._model, self._attention
        if not ragged.can_switch(model):
            raise RunError(
                "continuous batching needs attention through transformers' `sdpa` interface",
                where=type(model).__name__,
                fix="use the static engine for this architecture",
            )
        rounds = ragged.has_handlers(model)
        if name == "auto":
            name = ragged.NAME if rounds or model.device.type == "cpu" else "sdpa"
        if rounds and name != ragged.NAME:
            raise RunError(
                f"attention {name} does not round cached keys and values as this model asks",
                where=type(model).__name__,
                fix=f"use attention {ragged.NAME}",
            )
        return name

    def healthy(self) -> bool:
        """Whether its thread runs and takes requests."""
        manager = self._manager
        return manager is not None and manager.is_running() and not manager.output_router.closed

    def client(self) -> InProcessClient:
        """A client for the running event loop; RuntimeError before `start`."""
        _ = self.model
        return InProcessClient(self, self.name, self._numbers)

    def submit(self, ticket: Ticket) -> None:
        """Hand a request to the manager; what it cannot serve ends with an error at once."""
        manager = self._manager
        if manager is None:
            ticket.end("the engine is not running")
            return
        room = self._limits["num_blocks"] * self._limits["page_size"]
        if len(ticket.prompt) + ticket.limit > room:  # alone it would stop the manager
            ticket.end(f"longer than the cache: prompt and output exceed {room} tokens")
            return
        if not manager.output_router.open(ticket):
            return
        taken = manager.add_request(
            ticket.prompt,
            request_id=ticket.request_id,
            max_new_tokens=ticket.limit,
            streaming=True,
            eos_token_id=sorted(ticket.ends) or -1,
        )
        if taken is None:
            manager.output_router.forget(ticket.request_id)
            ticket.end("the engine takes no more requests")

    def withdraw(self, ticket: Ticket) -> None:
        """Take a request out of the batch; its place is free at the next step."""
        if self._manager is not None:
            self._manager.output_router.forget(ticket.request_id)
            self._manager.cancel_request(ticket.request_id)

    def end_tokens(self) -> frozenset[int]:
        """The model's end-of-sequence tokens."""
        return end_tokens(self.model)

    def metadata(self) -> dict[str, Any]:
        """Facts about the started engine, for the report and the recomputation."""
        if self._manager is None:
            raise RuntimeError("the engine was not started")
        device = next(self.model.parameters()).device
        settings = self._manager.continuous_batching_config
        return {
            "engine": self.name,
            "engine_version": transformers.__version__,
            "torch_version": torch.__version__,
            "device": str(device),
            "threads": self._manager._threads if device.type == "cpu" else None,
            "attention": self.model.config._attn_implementation,  # type: ignore[union-attr]
            "cache": "paged",
            "cache_page_tokens": settings.page_size,
            "cache_blocks": settings.num_blocks,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_requests": settings.max_requests_per_batch,
            "prefix_sharing": settings.allow_block_sharing,
            "scheduler": settings.scheduler_type,
            "cuda_graphs": any(settings.cuda_graph_booleans),
            "asynchronous": bool(settings.use_async_batching),
            "batching": "continuous",
            "decoding": "greedy",
            "kernel": model_kernel(self.model),
            "dtype": model_dtype(self.model),
            "model_bytes": model_bytes(self.model),
        }

    def stop(self) -> None:
        """Answer what is open, end the thread after its present step, drop model and cache."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.output_router.close(_STOPPED)  # first: in our words, with the tokens so far
            manager.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)
            manager.destroy()
        del manager
        self._undo.close()
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
