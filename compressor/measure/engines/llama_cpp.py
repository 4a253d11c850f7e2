"""llama.cpp's own server, ``llama-server``, as a child process that serves a GGUF file.

Its interface: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import RunError
from compressor.measure.client import HttpClient
from compressor.measure.engines.process import HOST, ServerProcess

VARIABLE = "COMPRESSOR_LLAMA_SERVER"
BINARY = "llama-server"
BUILT = ".llama-cpp/bin/llama-server"
SERVED_NAME = "model"
_HELP_SECONDS = 60.0
_SPARE_TOKENS = 2  # a slot stops one token before it is full
# Flags that not every version has, with what they are for.
_OPTIONAL = {
    "--cache-ram": ["--cache-ram", "0"],  # else it keeps prompts of the past in memory
    "--no-webui": ["--no-webui"],
}
_FILE_TYPE = re.compile(r"file type\s*=\s*([^(\n]*[^(\s])")
_SYSTEM = re.compile(r"system_info: (.+)")


def llama_server(binary: str | Path | None = None) -> Path:
    """The server's binary: the one given, else $COMPRESSOR_LLAMA_SERVER, else what
    ``scripts/setup_llama_cpp.sh`` built below the working directory, else on the PATH.

    RunError when there is none, or when what was named is not there.
    """
    named = str(binary) if binary is not None else os.environ.get(VARIABLE) or None
    found = shutil.which(named or BUILT) or shutil.which(named or BINARY)
    if found is None:
        raise RunError(
            f"llama.cpp's server was not found: {named or BINARY + ' is not on the PATH'}",
            fix=f"bash scripts/setup_llama_cpp.sh, or put {BINARY} on the PATH, or set {VARIABLE} "
            "to its path",
        )
    return Path(found).absolute()


def gguf_file_type(path: Path) -> str | None:
    """What a GGUF file says its weights mostly are, such as ``Q4_0``; None when it does not."""
    from gguf import LlamaFileType

    from compressor.models.gguf_file import open_gguf

    try:
        field = open_gguf(path).get_field("general.file_type")
        name = LlamaFileType(field.contents()).name if field else None
    except (RunError, ValueError):  # not read here, or of a type that is newer than the library
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_") if name else None


class LlamaCppServer(ServerProcess):
    """``with LlamaCppServer(...) as server:`` serves a GGUF file on a free loopback port.

    Prompts that were seen before are computed again (``cache_prompt`` false in each request), since
    workloads come back to their prompts.

    Args:
        model: the GGUF file.
        log: file that receives the server's output.
        context_length: longest prompt with its answer [tokens]; every slot has room for one.
        parallel: slots: requests that are served at the same time; more wait.
        threads: of the computation; None leaves the choice to llama.cpp.
        binary: see `llama_server`.
        flags: further flags of ``llama-server``.
        start_timeout: seconds to wait for health.
        variables: further variables of its environment.
        stall_s, total_s: limits of a request of `client` [s].

    Raises:
        RunError: there is no binary, or no such file; or, by `start`, the server died or did not
            become healthy, with the tail of its log.
    """

    name = "llama.cpp"
    title = "llama-server"

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        context_length: int,
        parallel: int = 1,
        threads: int | None = None,
        binary: str | Path | None = None,
        flags: Sequence[str] = (),
        start_timeout: float = 600.0,
        variables: Mapping[str, str] | None = None,
        stall_s: float = 60.0,
        total_s: float = 600.0,
    ) -> None:
        super().__init__(
            model, log, flags, start_timeout, variables, stall_s=stall_s, total_s=total_s
        )
        if context_length < 1 or parallel < 1:
            raise ValueError("context_length and parallel must be at least 1")
        self.binary = llama_server(binary)
        if not self.model.is_file():
            raise RunError(
                "no such file", where=str(model), fix="name a .gguf file, which llama.cpp serves"
            )
        self.context_length, self.parallel, self.threads = context_length, parallel, threads
        self._optional: list[str] = []

    @property
    def command(self) -> list[str]:
        """The whole command line. ``--ctx-size`` is shared by the slots."""
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return [
            str(self.binary), "--model", str(self.model), "--alias", SERVED_NAME,
            "--host", HOST, "--port", str(self.port),
            "--parallel", str(self.parallel),
            "--ctx-size", str(self.parallel * (self.context_length + _SPARE_TOKENS)),
            *threads, *self._optional, *self.flags,
        ]  # fmt: skip

    def start(self) -> None:
        """As in `ServerProcess`; asks the binary first which flags it has."""
        if self.process is None:
            known = self._ask_binary("--help")
            self._optional = [
                part
                for flag, parts in _OPTIONAL.items()
                if flag in known and flag not in self.flags
                for part in parts
            ]
        super().start()

    def _ask_binary(self, flag: str) -> str:
        """What it prints for a flag after which it ends."""
        try:
            done = subprocess.run(
                [str(self.binary), flag],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_HELP_SECONDS,
                check=False,
                env=os.environ | self.variables,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunError(
                f"llama-server cannot be run: {error}",
                where=str(self.binary),
                fix="check that it is a build for this machine",
            ) from error
        return done.stdout.decode("utf-8", "replace")

    def client(self) -> HttpClient:
        """A client that sends token ids; each event tells how many tokens there are so far.

        A connection serves one request: the server promises to keep it, but closes it after a
        streamed answer (0.5.0), and the next request would be lost on it.
        """
        return HttpClient(
            f"{self.url}/v1/completions",
            model=SERVED_NAME,
            fields={"cache_prompt": False, "timings_per_token": True},
            keep_alive=False,
            stall_s=self.stall_s,
            total_s=self.total_s,
        )

    def metadata(self) -> dict[str, Any]:
        """Facts about the started server; what it does not tell is None."""
        log = self.log.read_text(encoding="utf-8", errors="replace")
        told, system = _FILE_TYPE.search(log), _SYSTEM.search(log)
        file_type = told[1] if told else gguf_file_type(self.model)
        properties = self.get("/props")
        settings = properties.get("default_generation_settings") or {}
        return {
            **super().metadata(),
            "engine_version": properties.get("build_info") or self._version(),
            "binary": str(self.binary),
            "dtype": file_type,
            "kernel": f"ggml {file_type}" if file_type else "ggml",
            "system": system[1].strip() if system else None,
            "slots": properties.get("total_slots"),
            "slot_context_tokens": settings.get("n_ctx"),
            "threads": self.threads,
            "prefix_caching": "False",
            "decoding": "greedy",
        }

    def _version(self) -> str | None:
        found = re.search(r"version: (.+)", self._ask_binary("--version"))
        return found[1].strip() if found else None
