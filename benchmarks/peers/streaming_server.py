"""A server that does nothing but send prebuilt events, for `benchmarks/load_generator.py`.

    python benchmarks/peers/streaming_server.py PORT TOKENS STEP_MS

Every POST is answered by TOKENS events of the size of vLLM's, a write for each; every GET like
vLLM's of its version.
All answers that are under way get their next event every STEP_MS, as from an engine with continuous
batching; with 0 as fast as they can be written.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


def prebuilt(tokens: int) -> list[bytes]:
    """The parts of one answer as a server sends them: head, an event per token, the end."""

    def chunk(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data)

    def event(body: dict[str, Any]) -> bytes:
        whole = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "model"}
        return chunk(b"data: " + json.dumps({**whole, **body}).encode() + b"\n\n")

    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
    token = event({"choices": [{**choice, "stop_reason": None, "token_ids": [1234]}]})
    total = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}
    end = event({"choices": [], "usage": total}) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    return [head + token, *[token] * (tokens - 1), end]


class Streaming(asyncio.Protocol):
    """Answers a POST with the parts, each in a turn of the event loop of its own."""

    def __init__(self, parts: list[bytes], waiting: list[Streaming] | None) -> None:
        self._parts, self._received = parts, b""
        self._waiting = waiting  # those that write at the next step; None without steps
        self._index = 0
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self._received = b""
            self._transport.write(b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{"version": ""}')
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) >= length:
            self._received = b""
            self._index = 0
            self._go_on()

    def _go_on(self) -> None:
        if self._waiting is None:
            self._loop.call_soon(self.send)
        else:
            self._waiting.append(self)

    def send(self) -> None:
        """Write the next part."""
        if self._transport.is_closing():
            return
        self._transport.write(self._parts[self._index])
        self._index += 1
        if self._index < len(self._parts):
            self._go_on()


async def serve(port: int, tokens: int, step_s: float) -> None:
    """Serve until killed."""
    parts, loop = prebuilt(tokens), asyncio.get_running_loop()
    waiting: list[Streaming] | None = [] if step_s else None
    await loop.create_server(lambda: Streaming(parts, waiting), "127.0.0.1", port)
    due = loop.time()
    while True:
        due = max(due + (step_s or 3600.0), loop.time())
        await asyncio.sleep(due - loop.time())
        if waiting:
            now, waiting[:] = list(waiting), []
            for stream in now:
                stream.send()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1e3))
