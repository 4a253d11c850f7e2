"""Run the command by which an engine serves an artifact, as its ``serving.json`` has it.

The engine takes this process's place: its output and its end are this command's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from compressor.errors import RecipeError, RunError
from compressor.export.options import MEDUSA_TGI
from compressor.export.serving import TARGET, fill

SERVING = "serving.json"


@dataclass(frozen=True)
class ServeCommand:
    """A command that is ready to run.

    Attributes:
        engine: its name.
        words: the command.
        directory: to start it in, where it reads paths that start there.
    """

    engine: str
    words: tuple[str, ...]
    directory: Path | None = None


def serve_command(
    directory: Path,
    engine: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    target: Path | None = None,
    extra: Sequence[str] = (),
    installed: bool = True,
) -> ServeCommand:
    """The command for one engine.

    Args:
        directory: an artifact of a run, or a copy of one.
        engine: its name; the first that is installed where None.
        host, port: to listen on; the engine's usual port where None.
        target: of a speculator, the model that it drafts for; the artifact beside it where None.
        extra: further arguments of the engine.
        installed: look for the engine's program, and name it in full.

    Raises:
        RecipeError: no artifact, no such engine for its format, or a speculator without its target.
        RunError: the engine is not installed.
    """
    facts = _facts(directory)
    known = {one["engine"]: one for one in facts["engines"]}
    if engine is not None and engine not in known:
        raise RecipeError(
            f"{engine} is not known to load the format {facts['format']} as it is here",
            where=str(directory),
            fix=f"choose from {', '.join(known)}" if known else "export another format or scheme",
        )
    if not known:
        raise RecipeError(
            f"no engine is known to load this artifact ({facts['format']})",
            where=str(directory),
            fix="export another format or scheme",
        )
    problems, words, chosen = [], None, engine
    for name in [engine] if engine else known:
        own = known[name]["words"]
        if not installed:
            chosen, words = name, own
            break
        try:
            chosen, words = name, [*_PROGRAMS[name](), *own[1:]]  # the program in full
            break
        except RunError as error:
            problems.append(error)
    if words is None or chosen is None:
        if len(problems) == 1:
            raise problems[0]
        raise RunError(
            "none of the engines that load it is installed: "
            + "; ".join(problem.what for problem in problems),
            where=str(directory),
            fix="; or ".join(problem.fix or "" for problem in problems),
        )
    other = None
    if any(TARGET in word for word in words):
        other = _target(directory, facts, target)
    filled = fill(
        words,
        model=str(directory.resolve()),
        host=host,
        port=port or known[chosen]["port"],
        target=other,
    )
    inside = directory.resolve() if facts["format"] == MEDUSA_TGI else None
    return ServeCommand(chosen, (*filled, *extra), inside)


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / SERVING
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        for one in facts["engines"]:
            if one["engine"] not in _PROGRAMS or not all(isinstance(w, str) for w in one["words"]):
                raise ValueError(f"engine {one['engine']!r} is not known")
            int(one["port"])
        str(facts["format"])
    except FileNotFoundError:
        below = sorted(p.parent for p in directory.glob(f"*/{SERVING}"))
        below += sorted(p.parent for p in directory.glob(f"artifacts/*/*/{SERVING}"))
        fix = "give the directory of an artifact of a run"
        if below:
            fix = f"give one of these: {', '.join(str(p) for p in below)}"
        raise RecipeError(f"there is no {SERVING}", where=str(directory), fix=fix) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"cannot be read ({error})",
            where=str(path),
            fix="`compress run` with the same recipe writes it again",
        ) from error
    return facts


def _target(directory: Path, facts: dict[str, Any], target: Path | None) -> str:
    found = target or (directory / facts["target"] if facts.get("target") else None)
    if found is None or not (found / "config.json").is_file():
        raise RecipeError(
            "the model that it drafts for is not there",
            where=str(found or directory),
            fix="give its directory with --target",
        )
    return str(found.resolve())


def shown(command: ServeCommand) -> str:
    """As one line of a shell."""
    there = f"cd {shlex.quote(str(command.directory))} && " if command.directory else ""
    return there + shlex.join(command.words)


def run(command: ServeCommand) -> NoReturn:
    """Become the engine.

    Raises:
        RunError: the program cannot be run.
    """
    environment = dict(os.environ)
    if not command.words[0].startswith(str(Path(sys.executable).parent)):
        environment.pop("PYTHONPATH", None)  # ours; another environment breaks on it
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if command.directory is not None:
            os.chdir(command.directory)
        os.execvpe(command.words[0], list(command.words), environment)
    except OSError as error:
        raise RunError(
            f"{command.engine} cannot be started: {error.strerror}",
            where=command.words[0],
            fix="check that the program is one for this machine",
        ) from error


def _vllm() -> list[str]:
    from compressor.doctor import vllm_python

    python = vllm_python()
    beside = python.absolute().parent / "vllm" if python else None
    found = str(beside) if beside and beside.is_file() else shutil.which("vllm")
    if found is None:
        raise RunError(
            "vLLM is not installed",
            fix="bash scripts/setup_vllm_cpu.sh, or `pip install vllm` in an environment of its "
            "own whose python COMPRESSOR_VLLM_PYTHON names",
        )
    return [found]


def _llama_cpp() -> list[str]:
    from compressor.measure.engines.llama_cpp import llama_server

    return [str(llama_server())]


def _transformers() -> list[str]:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    program = Path(sys.executable).parent / "transformers"
    if missing or not program.is_file():
        lacks = ", ".join(missing) or "its command is missing"
        raise RunError(
            f"transformers cannot serve here ({lacks})",
            fix="pip install 'transformers[serving]'",
        )
    return [str(program)]


def _sglang() -> list[str]:
    if importlib.util.find_spec("sglang") is None:
        raise RunError("SGLang is not installed", fix="pip install sglang")
    return [sys.executable]


def _tgi() -> list[str]:
    found = shutil.which("text-generation-launcher")
    if found is None:
        raise RunError(
            "TGI is not installed",
            fix="run the command that --dry-run prints in TGI's container",
        )
    return [found]


_PROGRAMS: dict[str, Callable[[], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tgi": _tgi,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
}
