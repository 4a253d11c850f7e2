"""The command that serves an artifact on each engine that loads its format, as data.

A command is a list of words with ``{model}`` (the artifact's directory, or its repository),
``{target}`` (of a speculator: the model that it drafts for), ``{host}`` and ``{port}`` to be filled
in. Sources: vLLM 0.32 (``vllm/entrypoints/cli/serve.py``,
``model_executor/layers/quantization/__init__.py``: no bitsandbytes, no GGUF), SGLang
(``python/sglang/srt/server_args.py``), TGI (``launcher/src/main.rs``; it finds the quantization in
config.json), llama.cpp (``tools/server/README.md``), transformers 5.23 (``transformers serve``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.export.options import MEDUSA_TGI, SPECULATORS, WHOLE
from compressor.export.vllm import speculative_config

MODEL, TARGET, HOST, PORT = "{model}", "{target}", "{host}", "{port}"
_METHODS = {"medusa": "medusa", "speculators": "eagle3", "draft-model": "draft"}

_TGI_NOTE = (
    "TGI finds the model that the heads draft for by base_model_name_or_path in config.json, a "
    "path beside this directory: start it here, or write that model's directory or repository "
    "there."
)


@dataclass(frozen=True)
class Command:
    """How one engine serves an artifact.

    Attributes:
        engine: ``vllm``, ``sglang``, ``tgi``, ``transformers`` or ``llama.cpp``.
        words: the command, with places to fill in.
        note: what there is to know about it; empty where there is nothing.
    """

    engine: str
    words: tuple[str, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"words": list(self.words)}


def serving(
    fmt: str,
    *,
    file: str | None = None,
    tokens: int | None = None,
    lookup: Mapping[str, int] | None = None,
    refused: Mapping[str, str] | None = None,
) -> list[Command]:
    """Commands of every engine that loads the format, the most usual one first.

    Args:
        fmt: the format's name.
        file: of GGUF, the file to serve.
        tokens: drafted per step, of a speculator or of prompt lookup.
        lookup: ``prompt_lookup_min`` and ``prompt_lookup_max``, where prompt lookup is to be on.
        refused: engines that have no kernel for the scheme, and why: they are left out.
    """
    address = ("--host", HOST, "--port", PORT)
    found: list[Command] = []
    if fmt == "gguf":
        path = f"{MODEL}/{file or 'model.gguf'}"
        found = [Command("llama.cpp", ("llama-server", "--model", path, *address))]
    elif fmt == "bitsandbytes":
        found = [Command("transformers", ("transformers", "serve", MODEL, *address))]
    elif fmt in WHOLE:
        guess: tuple[str, ...] = ()
        if lookup is not None and tokens is not None:
            guess = ("--speculative-config", speculative_config("ngram", tokens, None, **lookup))
        found = [
            Command("vllm", ("vllm", "serve", MODEL, *address, *guess)),
            Command(
                "sglang",
                ("python", "-m", "sglang.launch_server", "--model-path", MODEL, *address),
            ),
            Command("tgi", _tgi()),
            Command("transformers", ("transformers", "serve", MODEL, *address)),
        ]  # fmt: skip
    elif fmt == MEDUSA_TGI:
        found = [Command("tgi", _tgi(), _TGI_NOTE)]
    elif fmt in SPECULATORS and tokens is not None:
        config = speculative_config(_METHODS[fmt], tokens, MODEL)
        found = [
            Command("vllm", ("vllm", "serve", TARGET, *address, "--speculative-config", config))
        ]
        if fmt != "medusa":
            algorithm = "EAGLE3" if fmt == "speculators" else "STANDALONE"
            found.append(
                Command(
                    "sglang",
                    ("python", "-m", "sglang.launch_server", "--model-path", TARGET, *address,
                     "--speculative-algorithm", algorithm,
                     "--speculative-draft-model-path", MODEL,
                     "--speculative-num-steps", str(tokens), "--speculative-eagle-topk", "1",
                     "--speculative-num-draft-tokens", str(tokens + 1)),
                )
            )  # fmt: skip
    return [command for command in found if command.engine not in (refused or {})]


def _tgi() -> tuple[str, ...]:
    return ("text-generation-launcher", "--model-id", MODEL, "--hostname", HOST, "--port", PORT)


def fill(
    words: Sequence[str], *, model: str, host: str, port: int | str, target: str | None = None
) -> list[str]:
    """The command with its places filled in."""
    values = {MODEL: model, HOST: host, PORT: str(port), TARGET: target or TARGET}
    made = []
    for word in words:
        for place, value in values.items():
            # In JSON a value is part of a string.
            word = word.replace(place, json.dumps(value)[1:-1] if word.startswith('{"') else value)
        made.append(word)
    return made
