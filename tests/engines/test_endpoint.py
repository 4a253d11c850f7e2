"""An address as an engine, against a real local server that asks for a key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from compressor.errors import RunError
from compressor.measure.engines.endpoint import Endpoint
from compressor.measure.load import LoadResult, closed_loop, run_load

KEY = "sk-very-secret"


@contextmanager
def provider() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base address, bodies that were sent): wants the key, streams three words, tells usage."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits 40 ms behind its headers

        def send(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def refused(self) -> bool:
            given = self.headers.get("Authorization", "")
            if given != f"Bearer {KEY}":
                self.send(401, f"no such key: {given}".encode())
            return given != f"Bearer {KEY}"

        def do_GET(self) -> None:
            if self.path == "/moved/models":
                self.send(302, b"", Location="/v1/models")
            elif not self.refused():
                self.send(200 if self.path == "/v1/models" else 404, b"{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append({"path": self.path, **body})
            if self.refused():
                return
            words = ("one", " two", " three")
            if self.path.endswith("/chat/completions"):
                events = [{"choices": [{"delta": {"content": word}}]} for word in words]
            else:
                events = [{"choices": [{"text": word}]} for word in words]
            events.append({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 3}})
            lines = [json.dumps(event) for event in events] + ["[DONE]"]
            self.send(200, "".join(f"data: {line}\n\n" for line in lines).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def endpoint(url: str, **options: Any) -> Endpoint:
    options = {"key_variable": "TEST_KEY", "decode": lambda ids: f"text of {list(ids)}", **options}
    return Endpoint(url, "their-model", **options)


def load(engine: Endpoint) -> LoadResult:
    return run_load(
        engine.client,
        lambda client: closed_loop(client, [[1, 2]], concurrency=2, requests=4, output_lengths=8),
    )


def test_completions_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with provider() as (url, bodies):
        engine = endpoint(url)
        engine.start()
        assert engine.healthy()
        result = load(engine)
        engine.stop()
    assert [(row.error, row.output_tokens, row.prompt_tokens) for row in result.samples] == [
        ("", 3, 11)
    ] * 4
    assert bodies[0]["path"] == "/v1/completions" and bodies[0]["prompt"] == "text of [1, 2]"
    assert bodies[0]["model"] == "their-model" and "ignore_eos" not in bodies[0]
    assert bodies[0]["stream_options"] == {"include_usage": True}


def test_chat_and_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with provider() as (url, bodies):
        engine = endpoint(
            f"{url}/v1/",
            chat=True,
            fields={"temperature": None, "seed": 1},
            length_field="max_completion_tokens",
        )
        result = load(engine)
    assert not any(row.error for row in result.samples)
    assert bodies[0]["path"] == "/v1/chat/completions"
    assert bodies[0]["messages"] == [{"role": "user", "content": "text of [1, 2]"}]
    assert "temperature" not in bodies[0] and bodies[0]["seed"] == 1
    assert bodies[0]["max_completion_tokens"] == 8
    assert "max_tokens" not in bodies[0]


def test_the_key_appears_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-wrong-one")
    with provider() as (url, _):
        engine = endpoint(url)
        assert not engine.healthy()
        with pytest.raises(RunError, match="HTTP 401") as caught:
            engine.start()
        result = load(engine)
        told = [str(caught.value), json.dumps(engine.metadata()), repr(engine), str(vars(engine))]
    told += [json.dumps(row.to_dict()) for row in result.samples]
    assert all(row.error.startswith("HTTP 401: no such key") for row in result.samples)
    assert not any("sk-wrong-one" in text for text in told)
    assert engine.metadata()["key_variable"] == "TEST_KEY"


def test_a_key_that_is_not_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(RunError, match=r"TEST_KEY is not set[\s\S]*export TEST_KEY"):
        endpoint("https://example.com").start()


def test_the_key_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with provider() as (url, _), pytest.raises(RunError, match="HTTP 302"):
        endpoint(f"{url}/moved").start()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with provider() as (url, _):
        pass
    assert not endpoint(url).healthy()
    with pytest.raises(RunError, match="does not answer GET /models"):
        endpoint(url, key_variable=None).start()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.com", "not an address"),
        ("example.com/v1", "not an address"),
        ("https://me:pass-word@example.com/v1", "more than host"),
        ("https://example.com/v1?key=pass-word", "more than host"),
    ],
)
def test_addresses_that_are_none_or_hold_secrets(url: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        endpoint(url)
    assert "pass-word" not in str(caught.value)


def test_bases_are_those_of_openais_clients() -> None:
    assert endpoint("https://example.com").url == "https://example.com/v1"
    assert endpoint("https://example.com/api/v1/").url == "https://example.com/api/v1"
