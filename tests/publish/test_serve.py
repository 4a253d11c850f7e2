"""`compress serve`: the command of each format and engine, and running it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from compressor.errors import RecipeError, RunError
from compressor.export.serving import fill, serving
from compressor.measure.engines.llama_cpp import llama_server
from compressor.measure.engines.process import free_port
from compressor.serve import serve_command
from tests.projects import ENVIRONMENT


def serve(directory: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compressor", "serve", str(directory), *arguments],
        env=ENVIRONMENT | more,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("fmt", "engines"),
    [
        ("compressed-tensors", ["vllm", "sglang", "tgi", "transformers"]),
        ("gptq", ["vllm", "sglang", "tgi", "transformers"]),
        ("awq", ["vllm", "sglang", "tgi", "transformers"]),
        ("gguf", ["llama.cpp"]),
        ("bitsandbytes", ["transformers"]),
        ("medusa", ["vllm"]),
        ("medusa-tgi", ["tgi"]),
        ("speculators", ["vllm", "sglang"]),
        ("draft-model", ["vllm", "sglang"]),
        ("something", []),
    ],
)
def test_engines_of_each_format(fmt: str, engines: list[str]) -> None:
    found = serving(fmt, tokens=4)
    assert [command.engine for command in found] == engines
    for command in found:
        words = fill(command.words, model="/m o/d'el", host="::1", port=7, target='/t"x')
        assert not any(re.search(r"\{(model|target|host|port)\}", word) for word in words)
        assert any(word.endswith("7") for word in words)
        if "--speculative-config" in words:
            config = json.loads(words[words.index("--speculative-config") + 1])
            assert config["model"] == "/m o/d'el" and config["num_speculative_tokens"] == 4
            assert '/t"x' in words
    assert [c.engine for c in serving(fmt, tokens=4, refused={"vllm": "no"})] == [
        engine for engine in engines if engine != "vllm"
    ]


def test_prompt_lookup_stands_in_the_command() -> None:
    first = serving("compressed-tensors", tokens=3, lookup={"prompt_lookup_max": 4})[0]
    config = json.loads(first.words[first.words.index("--speculative-config") + 1])
    assert config == {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


def test_dry_run_prints_the_command_of_the_file(made: Path) -> None:
    directory = made / "artifacts" / "int4" / "compressed-tensors"
    done = serve(directory, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == [
        "vllm", "serve", str(directory), "--host", "127.0.0.1", "--port", "8000",
    ]  # fmt: skip
    done = serve(
        directory, "--dry-run", "--engine", "sglang", "--port", "9", "--host", "0.0.0.0",
        "--", "--tp", "2",
    )  # fmt: skip
    words = shlex.split(done.stdout)
    assert words[-2:] == ["--tp", "2"] and "0.0.0.0" in words and "9" in words
    listed = json.loads((directory / "serving.json").read_text())["engines"]
    assert [one["engine"] for one in listed] == ["vllm", "sglang", "tgi", "transformers"]


def test_the_engine_takes_the_process_over(made: Path, tmp_path: Path) -> None:
    """A program in llama-server's place shows what it was called with, and its exit code counts."""
    program = tmp_path / "llama-server"
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\nexit 7\n')
    program.chmod(0o755)
    directory = made / "artifacts" / "int4" / "gguf"
    done = serve(
        directory, "--port", "8123", "--", "--threads", "2", COMPRESSOR_LLAMA_SERVER=str(program)
    )
    assert done.returncode == 7
    shown, *words = done.stdout.splitlines()
    assert words == [
        "<--model>", f"<{directory}/model.gguf>", "<--host>", "<127.0.0.1>", "<--port>", "<8123>",
        "<--threads>", "<2>",
    ]  # fmt: skip
    assert shlex.split(shown)[0] == str(program)


def test_missing_engines_are_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("COMPRESSOR_VLLM_PYTHON", "COMPRESSOR_LLAMA_SERVER"):
        monkeypatch.delenv(name, raising=False)
    directory = made / "artifacts" / "int4"
    with pytest.raises(RunError, match="setup_llama_cpp"):
        serve_command(directory / "gguf")
    with pytest.raises(RunError, match="vLLM is not installed"):
        serve_command(directory / "compressed-tensors", "vllm")
    with pytest.raises(RunError, match="TGI is not installed"):
        serve_command(directory / "compressed-tensors", "tgi")


def test_bad_directories_and_engines_are_one_message(made: Path, tmp_path: Path) -> None:
    directory = made / "artifacts" / "int4" / "gguf"
    with pytest.raises(RecipeError, match=r"choose from llama\.cpp"):
        serve_command(directory, "vllm", installed=False)
    with pytest.raises(RecipeError, match=r"give one of these: .*int4/gguf"):
        serve_command(made)
    with pytest.raises(RecipeError, match="give the directory of an artifact"):
        serve_command(tmp_path)
    for text in ("[]", "{", '{"engines": [{"engine": "sh", "words": ["rm"], "port": 1}]}'):
        (tmp_path / "serving.json").write_text(text)
        with pytest.raises(RecipeError, match="cannot be read"):
            serve_command(tmp_path)
    engines = [{**command.to_dict(), "port": 8000} for command in serving("speculators", tokens=2)]
    facts = {"format": "speculators", "target": "../gone", "engines": engines}
    (tmp_path / "serving.json").write_text(json.dumps(facts))
    with pytest.raises(RecipeError, match="--target"):
        serve_command(tmp_path, "vllm", installed=False)
    target = made / "artifacts" / "int4" / "compressed-tensors"
    words = serve_command(tmp_path, "vllm", target=target, installed=False).words
    assert words[:3] == ("vllm", "serve", str(target))


@pytest.mark.slow
def test_llama_cpp_answers(made: Path) -> None:
    """The real engine, started by the command, answers on the port."""
    try:
        llama_server()
    except RunError as error:
        pytest.skip(str(error))
    directory, port = made / "artifacts" / "int4" / "gguf", free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "compressor", "serve", str(directory), "--port", str(port),
            "--", "--ctx-size", "256", "--threads", "1",
        ],
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as got:
                    assert got.status == 200
                break
            except OSError:
                time.sleep(0.2)
        body = json.dumps({"prompt": "It is a truth", "n_predict": 4}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", data=body)
        with urllib.request.urlopen(request, timeout=30) as got:
            assert json.load(got)["tokens_predicted"] > 0
    finally:
        process.terminate()
        process.wait(30)
