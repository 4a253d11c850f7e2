"""llama.cpp's server, with a script in its place that has its command line and its answers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import gguf
import pytest

from compressor.errors import RunError
from compressor.measure.engines.llama_cpp import LlamaCppServer, gguf_file_type, llama_server
from compressor.measure.load import closed_loop, run_load

SERVER = """
import http.server, json, sys
if "--help" in sys.argv:
    print("--parallel N   slots\\n--cache-ram N  memory"); sys.exit()
if "--version" in sys.argv:
    print("version: 77 (abc)", file=sys.stderr); sys.exit()
value = lambda name: sys.argv[sys.argv.index(name) + 1]
print("print_info: file type   = Q4_K - Medium (guessed)", flush=True)
print("system_info: n_threads = 2 | AVX2 = 1", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, data):
        self.send_response(200); self.send_header("Content-Length", str(len(data)))
        self.end_headers(); self.wfile.write(data)
    def do_GET(self):
        slots = int(value("--parallel"))
        settings = {"n_ctx": int(value("--ctx-size")) // slots}
        facts = {"total_slots": slots, "default_generation_settings": settings}
        self.answer(json.dumps(facts).encode() if self.path == "/props" else b"{}")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["cache_prompt"] is False and body["timings_per_token"] and body["ignore_eos"]
        assert body["prompt"] == [5, 6] and body["temperature"] == 0
        assert self.path == "/v1/completions"
        events = [{"choices": [{"text": "x", "finish_reason": None}], "timings": {"predicted_n": n}}
                  for n in range(1, body["max_tokens"] + 1)]
        events.append({"choices": [{"text": "", "finish_reason": "length"}],
                       "timings": {"predicted_n": body["max_tokens"]},
                       "usage": {"prompt_tokens": 2, "completion_tokens": body["max_tokens"]}})
        lines = [json.dumps(event) for event in events] + ["[DONE]"]
        self.answer("".join(f"data: {line}\\n\\n" for line in lines).encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    (tmp_path / "server.py").write_text(SERVER)
    script = tmp_path / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "server.py"} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def test_the_binary_is_found(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESSOR_LLAMA_SERVER", raising=False)
    monkeypatch.chdir(binary.parent)  # where nothing was built
    assert llama_server(binary) == binary
    monkeypatch.setenv("PATH", str(binary.parent) + os.pathsep + os.environ["PATH"])
    assert llama_server() == binary
    monkeypatch.setenv("COMPRESSOR_LLAMA_SERVER", "/no/such")
    with pytest.raises(RunError, match="not found: /no/such"):
        llama_server()


def test_a_missing_binary_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPRESSOR_LLAMA_SERVER", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match=r"not on the PATH[\s\S]*set COMPRESSOR_LLAMA_SERVER"):
        llama_server()


def test_a_missing_model_is_named(binary: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.gguf: no such file"):
        LlamaCppServer(tmp_path / "absent.gguf", tmp_path / "log", context_length=8, binary=binary)


def test_it_serves_and_says_what_it_is(binary: Path, model: Path, tmp_path: Path) -> None:
    server = LlamaCppServer(
        model,
        tmp_path / "log",
        context_length=128,
        parallel=3,
        threads=2,
        binary=binary,
        flags=["--flash-attn", "on"],
    )
    with server:
        facts = json.loads(json.dumps(server.metadata()))
        result = run_load(
            server.client,
            lambda client: closed_loop(
                client, [[5, 6]], concurrency=3, requests=6, output_lengths=4
            ),
        )
    command = " ".join(facts["command"])
    assert "--parallel 3 --ctx-size 390 --threads 2 --cache-ram 0 --flash-attn on" in command
    assert "--host 127.0.0.1" in command and "webui" not in command
    assert facts["engine"] == "llama.cpp" and facts["engine_version"] == "77 (abc)"
    assert facts["dtype"] == "Q4_K - Medium" and facts["kernel"] == "ggml Q4_K - Medium"
    assert facts["slots"] == 3 and facts["slot_context_tokens"] == 130
    assert facts["system"] == "n_threads = 2 | AVX2 = 1"
    assert [row.error for row in result.samples] == [""] * 6
    assert {row.output_tokens for row in result.samples} == {4}


def test_a_binary_that_cannot_be_run_is_named(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    server = LlamaCppServer(model, tmp_path / "log", context_length=8, binary=broken)
    with pytest.raises(RunError, match="cannot be run"):
        server.start()


def test_the_file_says_what_its_weights_are(tmp_path: Path, model: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert gguf_file_type(tmp_path / "tiny.gguf") == "Q8_0"
    assert gguf_file_type(model) is None
