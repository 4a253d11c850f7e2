"""A server's child process, with small Python servers in the engine's place."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import RunError
from compressor.measure.engines import process
from compressor.measure.engines.process import ServerProcess, free_port

SERVER = """
import http.server, json, os, sys, time
if MODE == "dies":
    print("no such model", flush=True); sys.exit(3)
if MODE == "chatters":
    for line in ("0 errors", "(worker) ValueError: not divisible", *range(60), "see above"):
        print(line, flush=True)
    sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ill = MODE == "ill" and self.path == "/health"
        self.send_response(503 if ill else 200); self.end_headers()
        if self.path == "/environment":
            self.wfile.write(json.dumps(dict(os.environ)).encode())
        elif self.path == "/garbage":
            self.wfile.write(b"<html>")
    def do_POST(self):
        self.send_response(400); self.end_headers(); self.wfile.write(b"bad prompt")
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Small(ServerProcess):
    name, title = "small", "Small"

    def __init__(self, path: Path, mode: str = "", **options: Any) -> None:
        super().__init__(path / "model", path / "logs" / "log", **options)
        self.program = f"MODE = {mode!r}\n{SERVER}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.program, str(self.port)]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_it_starts_answers_and_stops(tmp_path: Path) -> None:
    server = Small(tmp_path, variables={"API_KEY": "secret", "LEVEL": "2"})
    assert not server.healthy()
    with server:
        assert server.healthy() and server.process is not None
        server.start()  # does nothing
        pid = server.process.pid
        facts = server.metadata()
        assert facts["pid"] == pid and facts["port"] == server.port
        assert facts["command"] == server.command and facts["engine"] == "small"
        assert facts["environment"] == {"API_KEY": "***", "LEVEL": "2"}
        assert server.get("/environment")["LEVEL"] == "2"
        with pytest.raises(RunError, match="answered 400: bad prompt"):
            server.post("/v1/completions", {})
        with pytest.raises(RunError, match="answered no JSON"):
            server.get("/garbage")
    assert gone(pid) and not server.healthy() and server.process is None
    server.stop()  # does nothing
    assert server.log.read_text().startswith("serving")


def test_our_python_path_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    with Small(tmp_path) as server:
        assert "PYTHONPATH" not in server.get("/environment")
    with Small(tmp_path, variables={"PYTHONPATH": "/theirs"}) as server:
        assert server.get("/environment")["PYTHONPATH"] == "/theirs"


def test_it_can_be_started_again(tmp_path: Path) -> None:
    server = Small(tmp_path)
    for _ in range(2):
        with server:
            assert server.healthy()


def test_a_death_at_the_start_is_told_with_the_log(tmp_path: Path) -> None:
    server = Small(tmp_path, "dies")
    with pytest.raises(RunError, match=r"Small ended with code 3[\s\S]*no such model"):
        server.start()
    assert server.process is None


def test_the_first_error_of_a_long_log_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError) as found:
        Small(tmp_path, "chatters").start()
    assert found.value.what == "Small ended with code 1: ValueError: not divisible"
    assert str(found.value).endswith("see above")


def test_a_server_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    server = Small(tmp_path, "ill", start_timeout=1)
    with pytest.raises(RunError, match=r"Small was not healthy after 1 s"):
        server.start()
    assert server.process is None


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    server = Small(tmp_path)
    server.__class__ = type("Absent", (Small,), {"command": ["/no/such/program"]})
    with pytest.raises(RunError, match=r"/no/such/program: Small cannot be started"):
        server.start()


def test_a_server_that_was_killed_is_not_healthy(tmp_path: Path) -> None:
    with Small(tmp_path) as server:
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        assert not server.healthy()
        with pytest.raises(RunError, match="did not answer /environment"):
            server.get("/environment")


def test_a_start_from_another_thread(tmp_path: Path) -> None:
    server, found = Small(tmp_path), []
    thread = threading.Thread(target=lambda: found.append(server.__enter__().healthy()))
    thread.start()
    thread.join()
    server.stop()
    assert found == [True]


def test_a_free_port_can_be_had() -> None:
    assert 1024 < free_port() < 65536 and process.HOST == "127.0.0.1"
