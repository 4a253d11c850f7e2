"""The server's child process, with a plain HTTP server in vLLM's place: no vLLM needed."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from compressor.errors import RunError
from compressor.measure.engines import process
from compressor.measure.engines.vllm import VllmServer

SERVER = """
import http.server, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if STUBBORN else signal.SIG_DFL)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("worker", worker.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"version": "0.0.1"}')
    def do_POST(self):
        print("out of memory", flush=True); os._exit(9)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def interpreter(path: Path, stubborn: bool = False) -> Path:
    """An executable that takes vLLM's command line and serves like `SERVER`."""
    body = textwrap.dedent(SERVER).replace("STUBBORN", str(stubborn))
    (path / "server.py").write_text(body)
    script = path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {path / "server.py"} "$@"\n')
    script.chmod(0o755)
    return script


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stubborn", [False, True])
def test_workers_end_with_the_server(
    tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 1.0)
    server = VllmServer(interpreter(tmp_path, stubborn), tmp_path, tmp_path / "log")
    with server:
        worker = int((tmp_path / "log").read_text().split()[1])
        assert server.process is not None and running(worker)
        pid = server.process.pid
    deadline = time.monotonic() + 5
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(worker) and not running(pid)


def test_a_death_while_answering_is_told_with_the_log(tmp_path: Path) -> None:
    server = VllmServer(interpreter(tmp_path), tmp_path, tmp_path / "log")
    with server, pytest.raises(RunError, match=r"did not answer[\s\S]*out of memory"):
        server.complete([1, 2], 4)


def test_a_server_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho loading\nexec sleep 300\n")
    script.chmod(0o755)
    server = VllmServer(script, tmp_path, tmp_path / "log", start_timeout=1)
    with pytest.raises(RunError, match=r"not healthy after 1 s[\s\S]*loading"):
        server.__enter__()
    assert server.process is None


def test_a_break_while_starting_ends_the_server(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho $$\nkill -INT {os.getpid()}\nexec sleep 300\n")
    script.chmod(0o755)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            VllmServer(script, tmp_path, tmp_path / "log").__enter__()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not running(int((tmp_path / "log").read_text()))


def test_what_it_runs_is_known_from_its_log(tmp_path: Path) -> None:
    server = VllmServer(
        interpreter(tmp_path), tmp_path, tmp_path / "log", ["--dtype", "bfloat16"],
        variables={"VLLM_CPU_KVCACHE_SPACE": "5"},
    )  # fmt: skip
    with server:
        plain = server.metadata()
        with open(server.log, "a") as log:
            log.write(LOG)
        facts = server.metadata()
    assert plain["dtype"] is None and plain["kernel"] == "dense"
    assert facts["engine"] == "vllm" and facts["engine_version"] == "0.0.1"
    assert facts["kernel"] == "CPUWNA16LinearKernel" and facts["dtype"] == "bfloat16"
    assert facts["quantization"] == "compressed-tensors" and facts["kv_cache_dtype"] == "auto"
    assert facts["kv_cache_tokens"] == "46,592" and facts["kv_cache_space_gib"] == "5"
    assert facts["prefix_caching"] == "False" and facts["flags"] == ["--dtype", "bfloat16"]
    assert "--no-enable-prefix-caching" in facts["command"] and facts["pid"] is not None


LOG = """
INFO Initializing a V1 LLM engine (v0.0.1) with config: model='m', dtype=torch.bfloat16, \
max_seq_len=1024, quantization=compressed-tensors, quantization_config=None, \
kv_cache_dtype=auto, enable_prefix_caching=False, enable_chunked_prefill=True
INFO Using CPUWNA16LinearKernel for mixed-precision linear
INFO CPU KV cache size: 46,592 tokens, 1 group
"""


def test_a_flag_about_the_prefix_cache_is_the_users(tmp_path: Path) -> None:
    server = VllmServer(Path("python"), tmp_path, tmp_path / "log", ["--enable-prefix-caching"])
    assert "--no-enable-prefix-caching" not in server.command
