"""A real streaming server that misbehaves as told, for the tests of the client and the load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from compressor.measure.client import HttpClient

DONE = b"data: [DONE]\n\n"


def event(count: int = 1, **extra: Any) -> bytes:
    """An event with `count` token ids."""
    choice = {"index": 0, "text": "x" * count, "token_ids": list(range(count))}
    return b"data: " + json.dumps({"choices": [choice], **extra}).encode() + b"\n\n"


def text_event(text: str, **choice: Any) -> bytes:
    """An event of a server that sends no ids."""
    return b"data: " + json.dumps({"choices": [{"text": text, **choice}]}).encode() + b"\n\n"


def usage(completion: int, prompt: int = 3) -> bytes:
    """The last event before ``[DONE]``."""
    numbers = {"prompt_tokens": prompt, "completion_tokens": completion}
    return b"data: " + json.dumps({"choices": [], "usage": numbers}).encode() + b"\n\n"


class Answer:
    """One answer that is being sent."""

    def __init__(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self._writer, self.body = writer, body

    async def head(self, status: str = "200 OK") -> None:
        """Status line and headers of a chunked answer."""
        self._writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await self._writer.drain()

    async def send(self, data: bytes) -> None:
        """One chunk."""
        self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self._writer.drain()

    async def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        """The last chunk."""
        await self.raw(b"0\r\n\r\n")

    def die(self) -> None:
        """Break the connection off with a reset."""
        self._writer.transport.abort()


Script = Callable[[Answer], Awaitable[None]]


async def good(answer: Answer) -> None:
    """As many tokens as were asked for, one an event."""
    await answer.head()
    for _ in range(answer.body["max_tokens"]):
        await answer.send(event())
    await answer.send(usage(answer.body["max_tokens"], len(answer.body["prompt"])))
    await answer.send(DONE)
    await answer.end()


@dataclass
class Server:
    """A running server: its address, the bodies and headers it was sent, and its load."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    active: int = 0
    most_active: int = 0

    def client(self, **options: Any) -> HttpClient:
        return HttpClient(f"{self.url}/v1/completions", model="m", **options)


@asynccontextmanager
async def serving(script: Script = good) -> AsyncIterator[Server]:
    """A server on a free port, in this event loop, that answers every POST by `script`."""
    server = Server("")

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                server.heads.append(head)
                fields = dict(
                    line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line
                )
                body = json.loads(await reader.readexactly(int(fields["content-length"])))
                server.bodies.append(body)
                server.active += 1
                server.most_active = max(server.most_active, server.active)
                try:
                    await script(Answer(writer, body))
                finally:
                    server.active -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()[:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
