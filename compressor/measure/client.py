"""A streaming client of OpenAI-compatible completions that takes the time of every token.

What a time means: the clock is read once after each read from the socket, and every token of the
events in it gets that time. Tokens that a server sends together (speculative decoding, a slow
reader) share one time; nothing is spread out to look smoother than it was.

How tokens are counted, best first (`HttpClient.counting` says how often each was used):

1. ``ids``: the event holds token ids (vLLM's ``return_token_ids``).
2. ``timings``: the event holds the running count (llama.cpp's ``timings_per_token``).
3. ``usage``: as many events with text as ``usage`` says tokens: one each.
4. ``usage, shared out``: ``usage`` says another number; each event gets one and the rest in
   proportion to the length of its text (`share_out`). The sum is right, single times are a guess.
5. ``events``: no usage either: one token an event with text.

What would flatter a server is not asked for: llama.cpp is told not to reuse a prompt that it has
seen (``cache_prompt``), vLLM is started without its prefix cache; a hosted provider's cache cannot
be turned off, so prompts for it should not repeat.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from compressor.measure.engines.base import RequestSample

ERROR_CHARACTERS = 200
CLOCK_DIGITS = 7  # 0.1 microseconds: finer than the clock's own jitter, short in the sample files
_EVENT_BYTES = 1 << 24  # longer than any event of a sane server
_KEEP_ALIVE_SECONDS = 2.0  # less than a server's own (uvicorn, httplib: 5 s), so it never wins
_READ_BYTES = 1 << 18
_SECRET = re.compile(r"auth|key|token|secret", re.IGNORECASE)


class StreamFault(Exception):
    """The server's answer is not a whole stream of tokens; the message says why."""


class SseLines:
    """Splits bytes into the payloads of ``data:`` lines, as they come.

    Every line is one payload, which is what OpenAI-compatible servers send; comments (pings) and
    other fields are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads that `data` completes; StreamFault when a line does not end."""
        if self._rest:
            data = self._rest + data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _EVENT_BYTES:
            raise StreamFault(f"garbage in the stream: a line of more than {_EVENT_BYTES} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def share_out(total: int, lengths: Sequence[int]) -> list[int]:
    """How many of `total` tokens each event brought, when only the sum is known.

    One for each event and the rest in proportion to the lengths of their texts, by running sums, so
    that the result always adds up to `total`. With fewer tokens than events the longest texts, and
    the earliest of equal ones, have one each.
    """
    count = len(lengths)
    if total <= count:
        longest = sorted(range(count), key=lambda index: (-lengths[index], index))[:total]
        chosen = set(longest)
        return [int(index in chosen) for index in range(count)]
    weights = lengths if sum(lengths) else [1] * count
    shares, seen, given, surplus = [], 0, 0, total - count
    for weight in weights:
        seen += weight
        upto = surplus * seen // sum(weights)
        shares.append(1 + upto - given)
        given = upto
    return shares


class _Tally:
    """Token times of one stream, from its events in order."""

    __slots__ = ("_lengths", "_order", "_times", "completion", "done", "how", "prompt", "times")

    def __init__(self) -> None:
        self.times: list[float] = []  # of tokens that were counted exactly
        self._times: list[float] = []  # of events whose tokens are not known yet,
        self._lengths: list[int] = []  # and how long their texts are
        self.prompt: int | None = None
        self.completion: int | None = None
        self.done = False
        self.how = ""

    @property
    def progress(self) -> int:
        """Grows with every token."""
        return len(self.times) + len(self._times)

    def add(self, payload: bytes, now: float) -> None:
        """Take one event that was read at `now` [s]; StreamFault when it is no such event."""
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            self._add(json.loads(payload), now)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            shown = payload[:ERROR_CHARACTERS].decode("utf-8", "replace")
            raise StreamFault(f"garbage in the stream: {shown}") from error

    def _add(self, event: dict[str, Any], now: float) -> None:
        if fault := event.get("error"):
            message = fault.get("message", fault) if isinstance(fault, dict) else fault
            raise StreamFault(f"error in the stream: {str(message)[:ERROR_CHARACTERS]}")
        if usage := event.get("usage"):
            self.completion = usage.get("completion_tokens", self.completion)
            self.prompt = usage.get("prompt_tokens", self.prompt)
        choices = event.get("choices")
        if not choices:
            return
        choice = choices[0]
        if (ids := choice.get("token_ids")) is not None:
            self.how = "ids"
            self.times += [now] * len(ids)
            return
        if (timings := event.get("timings")) is not None:
            self.how = "timings"
            self.times += [now] * (int(timings["predicted_n"]) - len(self.times))
            return
        text = choice.get("text")
        if text is None:
            delta = choice.get("delta") or {}
            parts = (delta.get(key) for key in ("content", "reasoning_content", "reasoning"))
            text = "".join(part for part in parts if part)
            if not text:
                return  # the event that names the role, or the last one
        if text or not choice.get("finish_reason"):  # a token may have no text (half a character)
            self._times.append(now)
            self._lengths.append(len(text))

    def finish(self) -> list[float]:
        """The time of every token [s]; sets `how`."""
        if self.times or self.how:
            return self.times
        if self.completion is None:
            self.how = "events"
            return self._times
        events = len(self._times)
        self.how = "usage" if self.completion == events else "usage, shared out"
        if self.completion and not events:
            raise StreamFault(f"usage says {self.completion} tokens, but none was streamed")
        shares = share_out(self.completion, self._lengths)
        pairs = zip(self._times, shares, strict=True)
        return [moment for moment, share in pairs for _ in range(share)]


class HttpClient:
    """A `Client` over HTTP. To be made and closed in the event loop that uses it.

    Args:
        url: whole address of the completions, such as ``http://127.0.0.1:8000/v1/completions``.
        model: the model's name there.
        fields: further fields of every request; None takes a field out of the request.
        headers: further headers; those whose names speak of a key, token, secret or authorization
            never get into samples or errors.
        decode: makes text of token ids, for a server that takes no ids; None sends ids.
        chat: the address is that of chat completions; needs `decode`.
        knows_ignore_eos: whether the server can be told to go on to the full length. Where it
            cannot, a shorter answer is no fault.
        length_field: name of the field with the most tokens to make.
        stall_s: longest wait for the next token once there was one [s].
        total_s: longest duration of a request, the wait for the first token included [s].
        trust_env: use the proxy that the environment names.
        keep_alive: use a connection for more than one request.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        chat: bool = False,
        knows_ignore_eos: bool = True,
        length_field: str = "max_tokens",
        stall_s: float = 60.0,
        total_s: float = 600.0,
        trust_env: bool = False,
        keep_alive: bool = True,
    ) -> None:
        if chat and decode is None:
            raise ValueError("chat completions take text: give `decode`")
        self.url = url
        self.stall_s, self.total_s = stall_s, total_s
        self.counting: Counter[str] = Counter()
        self._base = {
            "model": model,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(fields or {}),
        }
        self._decode, self._chat, self._knows_ignore_eos = decode, chat, knows_ignore_eos
        values = [v for name, v in (headers or {}).items() if _SECRET.search(name)]
        whole_first = [*values, *(v.removeprefix("Bearer ") for v in values)]
        self._secrets = [value.strip() for value in whole_first if value.strip()]
        self._length_field = length_field
        self._sent = 0
        kept: dict[str, Any] = (
            {"keepalive_timeout": _KEEP_ALIVE_SECONDS} if keep_alive else {"force_close": True}
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, **kept),
            headers={"Accept-Encoding": "identity", **(headers or {})},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
            read_bufsize=_READ_BYTES,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=trust_env,
        )

    def _body(self, prompt: Sequence[int], output_length: int, ignore_eos: bool) -> bytes:
        body = {**self._base, self._length_field: output_length}
        content: Any = [int(token) for token in prompt] if self._decode is None else None
        if self._decode is not None:
            content = self._decode(prompt)
        if self._chat:
            body["messages"] = [{"role": "user", "content": content}]
        else:
            body["prompt"] = content
        if self._knows_ignore_eos:
            body["ignore_eos"] = ignore_eos
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    async def request(
        self, prompt: Sequence[int], output_length: int, *, ignore_eos: bool = True
    ) -> RequestSample:
        """Serve one prompt greedily, streaming; a failure is a sample with `error`, never raised.

        ``start_s`` is read when the request's bytes are ready and its connection is asked for. Of
        a failed request the tokens before the fault are kept.

        Args:
            prompt: token ids.
            output_length: the most tokens to make; exactly as many with `ignore_eos`.
            ignore_eos: go on past the end-of-sequence token.
        """
        number = self._sent
        self._sent += 1
        body = self._body(prompt, output_length, ignore_eos)
        tally = _Tally()
        error = ""
        start = time.perf_counter()
        try:
            await self._stream(body, tally)
        except StreamFault as fault:
            error = str(fault)
        except aiohttp.ClientPayloadError as fault:
            error = f"truncated stream: {_told(fault)}"
        except aiohttp.ClientConnectorError as fault:
            error = f"connection failed: {_told(fault)}"
        except (aiohttp.ClientError, OSError) as fault:
            error = f"connection lost: {_told(fault)}"
        except ValueError as fault:  # what the HTTP parser does not understand
            error = f"garbage in the answer: {_told(fault)}"
        end = time.perf_counter()
        try:
            times = tally.finish()
        except StreamFault as fault:
            times, error = [], error or str(fault)
        if not error:
            error = self._incomplete(len(times), output_length, ignore_eos)
        if not error:
            self.counting[tally.how] += 1
        token_times = tuple(round(moment, CLOCK_DIGITS) for moment in times)
        return RequestSample(
            request_id=str(number),
            prompt_tokens=len(prompt) if tally.prompt is None else tally.prompt,
            output_tokens=len(token_times),
            start_s=round(start, CLOCK_DIGITS),
            first_token_s=token_times[0] if token_times else round(end, CLOCK_DIGITS),
            token_times_s=token_times,
            error=self._clean(error),
        )

    async def _stream(self, body: bytes, tally: _Tally) -> None:
        """Send the request and read its answer into `tally`, within the limits of time."""
        last = asyncio.get_running_loop().time() + self.total_s
        limit = asyncio.timeout_at(last)
        try:
            async with limit:
                await self._read(body, tally, limit, last)
        except TimeoutError as error:
            if not limit.expired():  # one of the network
                raise
            whole = limit.when() == last
            what = (
                f"not done after {self.total_s:g} s"
                if whole
                else f"no token for {self.stall_s:g} s"
            )
            raise StreamFault(f"timeout: {what}") from error

    async def _read(self, body: bytes, tally: _Tally, limit: asyncio.Timeout, last: float) -> None:
        clock, loop_time, lines = time.perf_counter, asyncio.get_running_loop().time, SseLines()
        async with self._session.post(
            self.url,
            data=body,
            headers={"Content-Type": "application/json"},
            allow_redirects=False,  # a key is not carried elsewhere
        ) as answer:
            if answer.status != 200:
                text = (await answer.content.read(4 * ERROR_CHARACTERS)).decode("utf-8", "replace")
                raise StreamFault(f"HTTP {answer.status}: {text.strip()[:ERROR_CHARACTERS]}")
            async for data in answer.content.iter_any():
                now, before = clock(), tally.progress
                for payload in lines.feed(data):
                    tally.add(payload, now)
                if tally.progress > before:
                    limit.reschedule(min(last, loop_time() + self.stall_s))
            now = clock()
            for payload in lines.feed(b"\n"):  # a last line without its end
                tally.add(payload, now)
        if not tally.done:
            raise StreamFault("truncated stream: it ended without [DONE]")

    def _incomplete(self, got: int, asked: int, ignore_eos: bool) -> str:
        if got > asked:
            return f"{got} tokens, {asked} were asked for"
        if ignore_eos and self._knows_ignore_eos and got < asked:
            return f"truncated stream: {got} of {asked} tokens"
        return ""

    def _clean(self, error: str) -> str:
        for secret in self._secrets:
            error = error.replace(secret, "***")
        return error

    async def close(self) -> None:
        """Free connections."""
        await self._session.close()


def _told(error: Exception) -> str:
    """One line about an exception, which may have no text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__} {text}".strip()[:ERROR_CHARACTERS]
