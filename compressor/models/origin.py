"""What a model's source says of itself: its name on the Hub, its licence and the files of it.

Nothing is guessed from a model's name. A licence's identifier is the Hub's
(https://huggingface.co/docs/hub/repositories-licenses).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from compressor.models.source import PACKAGE_PREFIX, ResolvedSource

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]{40}/?$")
_HUB_URL = re.compile(r"^https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/\s]+/[^/\s?#]+)")
_GGUF_SOURCES = ("general.source.huggingface.repository", "general.source.repo_url",
                 "general.source.url", "general.repo_url")  # fmt: skip
# How licences begin whose whole text is known by that.
_TEXTS = (
    (re.compile(r"^\s*Apache License\s+Version 2\.0,", re.IGNORECASE), "apache-2.0"),
    (re.compile(r"^\s*(?:The )?MIT License\b", re.IGNORECASE), "mit"),
    (re.compile(r"^\s*LLAMA 2 COMMUNITY LICENSE", re.IGNORECASE), "llama2"),
    (re.compile(r"^\s*META LLAMA 3 COMMUNITY LICENSE", re.IGNORECASE), "llama3"),
    (re.compile(r"^\s*LLAMA 3\.1 COMMUNITY LICENSE", re.IGNORECASE), "llama3.1"),
    (re.compile(r"^\s*LLAMA 3\.2 COMMUNITY LICENSE", re.IGNORECASE), "llama3.2"),
    (re.compile(r"^\s*LLAMA 3\.3 COMMUNITY LICENSE", re.IGNORECASE), "llama3.3"),
    (re.compile(r"^\s*LLAMA 4 COMMUNITY LICENSE", re.IGNORECASE), "llama4"),
)
# As Python packages write them, in lower case.
_PACKAGE_IDS = {"apache-2.0": "apache-2.0", "apache 2.0": "apache-2.0", "mit": "mit",
                "apache license 2.0": "apache-2.0", "mit license": "mit"}  # fmt: skip
_READ = 400  # characters of a licence that are looked at for its name


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as far as its source says.

    Attributes:
        hub_id: ``org/name`` on the Hub; None where it is not known.
        licence: the Hub's identifier, such as ``apache-2.0``; ``other`` for one with a name of its
            own; None where nothing says which.
        licence_name, licence_link: of another licence.
        found_in: what said so: ``model card``, ``GGUF metadata``, ``package metadata`` or the name
            of a licence file.
        gate: fields of a gated model's card (``extra_gated_prompt`` ...), which readers agree to.
        languages: of the model card or the GGUF file.
        files: names of the licence files.
    """

    hub_id: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    found_in: str | None = None
    gate: dict[str, Any] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def licence_files(resolved: ResolvedSource) -> list[Path]:
    """Licences and notices that go with the model, one of each name."""
    found = {path.name: path for path in resolved.licences}
    directory = resolved.path if resolved.path.is_dir() else None
    if directory is not None:
        for pattern in LICENCE_FILES:
            found |= {path.name: path for path in directory.glob(pattern) if path.is_file()}
    return [found[name] for name in sorted(found)]


def read_origin(resolved: ResolvedSource) -> Origin:
    """What the source says, the model card first; no network is asked.

    Args:
        resolved: the source as it was found.
    """
    files = licence_files(resolved)
    gguf = _gguf_fields(resolved.path) if resolved.kind == "gguf" else {}
    card = _card(resolved.path / "README.md") if resolved.path.is_dir() else {}
    languages = card.get("language") or gguf.get("general.languages") or []
    named = _from_card(card) or _from_gguf(gguf) or _from_package(resolved) or _from_texts(files)
    return Origin(
        hub_id=_hub_id(resolved, gguf),
        gate={key: value for key, value in card.items() if key.startswith("extra_gated_")},
        languages=[str(one) for one in ([languages] if isinstance(languages, str) else languages)],
        files=[path.name for path in files],
        **named,
    )


def _hub_id(resolved: ResolvedSource, gguf: Mapping[str, Any]) -> str | None:
    if resolved.kind == "hub":
        return resolved.source
    if found := _SNAPSHOT.search(resolved.path.as_posix()):
        return f"{found[1]}/{found[2]}"
    for key in _GGUF_SOURCES:
        value = str(gguf.get(key) or "")
        if found := _HUB_URL.match(value):
            return found[1]
        if key.endswith("repository") and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            return value
    return None


def _card(path: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; empty where there is none that can be read."""
    try:
        found = _FRONT_MATTER.match(path.read_text(encoding="utf-8"))
        value = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    # Dates and the like would not go into JSON.
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _from_card(card: Mapping[str, Any]) -> dict[str, Any]:
    found = card.get("license")
    if isinstance(found, list):
        found = found[0] if found else None
    if not found or str(found).lower() == "unknown":
        return {}
    return {
        "licence": str(found),
        "licence_name": card.get("license_name"),
        "licence_link": card.get("license_link"),
        "found_in": "model card",
    }


def _from_gguf(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not (found := fields.get("general.license")):
        return {}
    return {
        "licence": str(found),
        "licence_name": fields.get("general.license.name"),
        "licence_link": fields.get("general.license.link"),
        "found_in": "GGUF metadata",
    }


def _gguf_fields(path: Path) -> dict[str, Any]:
    """The file's ``general.*`` fields."""
    from compressor.models.gguf_file import open_gguf

    return {
        name: field.contents()
        for name, field in open_gguf(path).fields.items()
        if name.startswith("general.")
    }


def _from_package(resolved: ResolvedSource) -> dict[str, Any]:
    if not resolved.source.startswith(PACKAGE_PREFIX):
        return {}
    name = resolved.source.removeprefix(PACKAGE_PREFIX).partition("/")[0]
    for distribution in metadata.packages_distributions().get(name, []):
        facts = metadata.metadata(distribution)
        for key in ("License-Expression", "License"):
            for stated in facts.get_all(key) or []:
                if found := _PACKAGE_IDS.get(stated.strip().lower()):
                    return {"licence": found, "found_in": "package metadata"}
    return {}


def _from_texts(files: list[Path]) -> dict[str, Any]:
    """By how a licence file begins; one that is not known has its first line for a name."""
    for path in files:
        if not path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")[:_READ]
        for pattern, name in _TEXTS:
            if pattern.search(" ".join(text.split())):
                return {"licence": name, "found_in": path.name}
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        if first:
            return {
                "licence": "other",
                "licence_name": first[:100],
                "licence_link": path.name,
                "found_in": path.name,
            }
    return {}
