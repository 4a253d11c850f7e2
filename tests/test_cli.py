"""The command line: exit codes, messages without tracebacks, and what the commands print."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compressor import __version__, cli
from tests import projects, tiny

ROOT = Path(__file__).parent.parent


def compress(*arguments: str, cwd: Path, fresh: bool = False) -> subprocess.CompletedProcess:
    return projects.compress(cwd, *arguments, fresh=fresh, COLUMNS="150")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("project")
    tiny.build("llama", path / "model")
    texts = [{"name": "n", "source": "builtin:novel", "max_tokens": 256}]
    recipe = {
        "version": 1,
        "model": {"source": "model"},
        "variants": {"int4": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]}},
        "evaluate": {"texts": texts, "length": 64},
    }
    (path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return path


def test_help_is_fast_and_names_the_commands(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = compress("--help", cwd=tmp_path, fresh=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: others may be at work here
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    for command in ("run", "plan", "doctor", "init", "schema", "report"):
        assert command in done.stdout
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, compressor.cli; print('torch' in sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert modules.stdout.strip() == "False"
    assert compress("--version", cwd=tmp_path).stdout.strip() == f"compressor {__version__}"


def test_plan_shows_stages_and_runs_nothing(project: Path) -> None:
    done = compress("plan", "r.yaml", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert {"load", "texts", "quantize:int4", "evaluate:baseline", "evaluate:int4"} <= set(stages)
    assert "calibrate" not in stages
    assert not any(stage["cached"] for stage in stages.values())
    assert all(stage["seconds"] > 0 for stage in stages.values())
    shown = compress("plan", "r.yaml", cwd=project).stdout
    assert "quantize:int4" in shown and "in all (estimated)" in shown
    assert not (project / "runs").exists()


def test_run_then_plan_then_report(project: Path) -> None:
    done = compress("run", "r.yaml", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "int4" in done.stdout and "index.html" in done.stdout
    planned = json.loads(compress("plan", "r.yaml", "--json", cwd=project).stdout)
    assert all(stage["cached"] for stage in planned["stages"])
    (run,) = (project / "runs" / "r").iterdir()
    before = (run / "report" / "report.md").read_bytes()
    (run / "report" / "report.md").unlink()
    assert compress("report", str(run), cwd=project).returncode == 0
    assert (run / "report" / "report.md").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "missing.yaml"), 2, "no such recipe"),
        (("run", "bad.yaml"), 2, "bad.yaml:1"),
        (("run", "r.yaml", "--only", "int9"), 2, "no variant 'int9'"),
        (("run",), 2, "Missing argument"),
        (("fly",), 2, "No such command"),
        (("report", "nowhere"), 2, "no report can be read"),
        (("run", "gone.yaml"), 1, "there is no directory"),
        (("run", "hub.yaml"), 1, "Hub cannot be reached"),
        (("run", "package.yaml"), 1, "not installed"),
        (("run", "encoder.yaml"), 1, "not a causal"),
        (("init", "a/b", "-o", "r.yaml"), 2, "already there"),
    ],
)
def test_faults_have_a_message_and_an_exit_code(
    project: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    good = yaml.safe_load((project / "r.yaml").read_text())
    (project / "bad.yaml").write_text("modell: x\n")
    (project / "encoder").mkdir(exist_ok=True)
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (project / "encoder" / "config.json").write_text(json.dumps(config))
    (project / "encoder" / "model.safetensors").write_bytes(b"")
    sources = {
        "gone": "./gone",
        "hub": "org/name",
        "package": "package:nope/m.gguf",
        "encoder": "./encoder",
    }
    for name, source in sources.items():
        (project / f"{name}.yaml").write_text(yaml.safe_dump(good | {"model": {"source": source}}))
    done = compress(*arguments, cwd=project)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_message_keeps_file_and_line_whole(tmp_path: Path) -> None:
    deep = tmp_path / ("long-directory-name" * 6)
    deep.mkdir()
    (deep / "r.yaml").write_text("modell: x\n")
    done = subprocess.run(
        [sys.executable, "-m", "compressor", "plan", str(deep / "r.yaml")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "60"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"{deep}/r.yaml:1: unknown key 'modell'" in done.stderr


def test_an_unexpected_error_is_one_message_unless_the_traceback_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(cli, "_load", broken)
    monkeypatch.setattr(sys, "argv", ["compress", "plan", "r.yaml"])
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().err
    assert stop.value.code == 1
    assert "unexpected ZeroDivisionError: a fault of ours" in shown and cli.TRACEBACK in shown
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_interrupt_exits_with_130_and_says_how_to_go_on(project: Path) -> None:
    # The recipe is a pipe that nobody writes to: the process waits in it until the signal.
    pipe = project / "pipe.yaml"
    os.mkfifo(pipe)
    # A shell's background jobs are started with the signal ignored, and hand that on.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "compressor", "run", "pipe.yaml"],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    with open(pipe, "wb"):  # returns once the process has opened its end
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in shown and "Traceback" not in shown


def test_init_names_a_local_model_as_seen_from_the_recipe(project: Path) -> None:
    (project / "recipes").mkdir()
    done = compress("init", "model", "-o", "recipes/local.yaml", cwd=project)
    assert done.returncode == 0, done.stderr
    planned = compress("plan", "recipes/local.yaml", "--json", cwd=project)
    assert planned.returncode == 0, planned.stderr
    written = yaml.safe_load((project / "recipes" / "local.yaml").read_text())
    assert written["model"]["source"] == "../model"


def test_init_writes_a_recipe(tmp_path: Path) -> None:
    done = compress("init", "Qwen/Qwen3-0.6B", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "qwen3-0.6b.yaml").exists()


def test_doctor_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    done = compress("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    checks = {check["name"]: check for check in value["checks"]}
    assert checks["torch"]["found"].startswith("2.")
    assert value["environment"]["cores"] >= 1
    assert all(check["fix"] for check in checks.values() if check["found"] is None)
    assert "vLLM" in compress("doctor", cwd=tmp_path).stdout


def test_plan_and_run_say_beforehand_which_engines_have_no_kernel(project: Path) -> None:
    recipe = yaml.safe_load((project / "r.yaml").read_text())
    recipe["variants"] = {"int2": {"quantize": [{"rtn": {"scheme": "W2A16", "group_size": 32}}]}}
    recipe.pop("evaluate", None)
    (project / "two.yaml").write_text(yaml.safe_dump(recipe))
    done = compress("plan", "two.yaml", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    ahead = json.loads(done.stdout)["preflight"]
    assert ahead["free_memory_bytes"] > 0
    assert {kernel["level"] for kernel in ahead["kernels"]} == {"dequantized", "fails"}
    expected = "warning: int2 (W2A16, groups of 32): vllm"
    shown = compress("plan", "two.yaml", cwd=project)
    assert expected in shown.stderr and "will not load: no kernel for W2A16" in shown.stderr
    assert "kernels" in shown.stdout
    run = compress("run", "two.yaml", cwd=project)
    assert run.returncode == 0 and expected in run.stderr
    again = compress("run", "two.yaml", cwd=project)  # nothing is left to do, or to warn of
    assert again.returncode == 0 and expected not in again.stderr
    quiet = compress("run", "two.yaml", "--quiet", "--store", "other", cwd=project)
    assert quiet.returncode == 0 and quiet.stderr == ""


def test_an_interrupt_inside_a_finalizer_is_not_lost() -> None:
    program = """
import sys, time
from compressor import cli
sys.unraisablehook = cli._interrupt_again
class Ended:
    def __del__(self):
        raise KeyboardInterrupt
Ended()
try:
    time.sleep(20)
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("stopped\n", "")
