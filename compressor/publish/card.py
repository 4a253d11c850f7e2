"""The model card of an artifact: front matter as the Hub reads it, and the text.

Metadata: https://huggingface.co/docs/hub/model-cards. Nothing is invented: what the source does not
tell (its id on the Hub, its licence) is left out of the metadata, and the text says so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from compressor import __version__
from compressor.export.serving import Command, fill
from compressor.publish.artifacts import Artifact
from compressor.record import MEDUSA_2
from compressor.report import coverage, tables
from compressor.report.markdown import escape, table_markdown

PLACE = "MODEL"  # stands in the card for a directory or a repository
PORTS = {"llama.cpp": 8080}
DEFAULT_PORT = 8000
# What may be done with the base model is less than anything: by licence, and in words.
_NON_COMMERCIAL = re.compile(r"(?:^|-)nc(?:-|$)|non-?commercial|research-?only", re.IGNORECASE)
_IN_WORDS = re.compile(r"\bnon-?\s?commercial\b|\bresearch (?:purposes )?only\b", re.IGNORECASE)
_NO_DERIVATIVES = re.compile(r"(?:^|-)nd(?:-|$)", re.IGNORECASE)
_TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tgi": "TGI",
    "transformers": "transformers",
    "llama.cpp": "llama.cpp",
}


def restrictions(origin: Mapping[str, Any], texts: Mapping[str, str]) -> list[str]:
    """What the base model's licence asks of whoever publishes this, one sentence each.

    Args:
        origin: `models.origin.Origin` as plain data.
        texts: the licence files, by name.
    """
    stated = " ".join(str(origin.get(key) or "") for key in ("licence", "licence_name"))
    found = []
    if not stated.strip():
        found.append("no licence of the base model was found: find out what it allows")
    in_words = [name for name, text in texts.items() if _IN_WORDS.search(text)]
    if any(_NON_COMMERCIAL.search(word) for word in stated.split()):
        found.append(f"the base model's licence ({stated.strip()}) forbids commercial use")
    elif in_words and (origin.get("licence") or "other") not in ("apache-2.0", "mit"):
        found.append(f"the base model's licence speaks of non-commercial use: read {in_words[0]}")
    if any(_NO_DERIVATIVES.search(word) for word in stated.split()):
        found.append(
            f"the base model's licence ({stated.strip()}) forbids to share derivatives, which a "
            "compressed model is"
        )
    if origin.get("gate"):
        found.append("the base model is gated: its users agree to terms, which go with this one")
    return found


def licence_texts(artifact: Artifact) -> dict[str, str]:
    """The base model's licence files in the run, by name."""
    directory = artifact.licences
    return {
        name: (directory / name).read_text(encoding="utf-8", errors="replace")
        for name in artifact.origin.get("files", [])
        if (directory / name).is_file()
    }


def title(artifact: Artifact) -> str:
    """The model's name for people."""
    source = artifact.base_model or artifact.report["model"]["source"]
    name = PurePosixPath(source).name.removesuffix(".gguf")
    return f"{name} {artifact.variant} ({artifact.format})"


def metadata(artifact: Artifact) -> ModelCardData:
    """The front matter."""
    facts, origin = artifact.facts, artifact.origin
    # W4A16/W8A16 with fp8 cache; FP8; NF4; LLM.int8()
    schemes = [word.lower() for word in re.findall(r"[A-Z][\w.]+", facts["scheme"] or "")]
    steps = facts["algorithm"].split("+") if facts["algorithm"] else []
    tags = [artifact.format, *schemes, *steps]
    if artifact.speculates:
        tags = [artifact.format, "speculative-decoding"]
    quantized = _relation(artifact) == "quantized"
    results = [] if artifact.speculates else _results(artifact)
    return ModelCardData(
        base_model=artifact.base_model,
        language=list(origin.get("languages", [])) or None,
        library_name="gguf" if artifact.format == "gguf" else "transformers",
        license=origin.get("licence"),
        license_name=origin.get("licence_name"),
        license_link=origin.get("licence_link"),
        pipeline_tag="text-generation",
        tags=["compressor", *(["quantized"] if quantized else []), *tags],
        model_name=title(artifact) if results else None,
        eval_results=results or None,
        base_model_relation=_relation(artifact) if artifact.base_model else None,
        **origin.get("gate", {}),
    )


def _relation(artifact: Artifact) -> str | None:
    """What the Hub calls it beside its base model; None where it is that, or a speculator."""
    if artifact.speculates:
        return None
    if artifact.facts["algorithm"] == MEDUSA_2:
        return "finetune"
    return "quantized" if artifact.facts["coverage"] is not None else None


def _results(artifact: Artifact) -> list[EvalResult]:
    found = []
    named = {
        "perplexity": "Perplexity",
        "kl_mean": "KL divergence from the base model (mean, nats per token)",
        "top1_agreement": "Top-1 agreement with the base model",
    }
    texts = (artifact.lock.get("evaluate") or {}).get("texts") or []
    sources = {text["name"]: text["source"] for text in texts}
    for row in artifact.facts["quality"]:
        for key, name in named.items():
            if row.get(key) is not None and not (artifact.is_baseline and key != "perplexity"):
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=sources.get(row["text"], row["text"]),
                        dataset_name=row["text"],
                        metric_type=key,
                        metric_value=row[key],
                        metric_name=name,
                    )
                )
    return found


def render(artifact: Artifact) -> str:
    """The whole ``README.md``; equal runs give equal text."""
    head = metadata(artifact).to_yaml(line_break="\n")
    parts = [f"# {escape(title(artifact))}", _summary(artifact), *_figures(artifact)]
    parts += ["## How it was made", *_made(artifact), "## How to serve it", *_served(artifact)]
    parts += ["## What to know", _list(caveats(artifact))]
    parts += ["## Licence", _licence(artifact), "## Files", _files(artifact)]
    return f"---\n{head}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(' '.join(line.split()))}" for line in lines)


def verification_words(artifact: Artifact) -> str:
    """Whether a real consumer has loaded it, in a sentence."""
    told = artifact.verification
    if told["verified"] is True:
        consumer = " ".join(str(told[key]) for key in ("consumer", "version") if told.get(key))
        words = [f"Verified in {consumer}"]
        if told.get("greedy_agreement") is not None:
            words.append(f"greedy tokens agree to {told['greedy_agreement']:.1%}")
        if told.get("max_logit_difference") is not None:
            words.append(f"largest difference of a logit {told['max_logit_difference']:.3g}")
        return ", ".join(words) + "."
    why = f" ({told['why']})" if told.get("why") else ""
    if told["verified"] is False:
        return f"NOT as it should be: {told['consumer']} computes something else{why}."
    return f"Unverified: no consumer has loaded it in the run that made it{why}."


def _summary(artifact: Artifact) -> str:
    base = artifact.base_model
    link = f"[{base}](https://huggingface.co/{base})" if base else f"`{_source(artifact)}`"
    if artifact.speculates:
        what = f"A speculator ({artifact.format}) for {link}, variant {escape(artifact.variant)}."
    elif artifact.is_baseline:
        what = f"{link} as it is, in the format {artifact.format}."
    else:
        what = f"{link}, compressed: {escape(tables.method(artifact.facts))}."
    start = f"{artifact.variant}:"
    told = [line for line in artifact.report["verdict"]["details"] if line.startswith(start)]
    lines = [what, *(f"**{escape(' '.join(line.split()))}**" for line in told)]
    return "\n\n".join([*lines, escape(verification_words(artifact))])


def _source(artifact: Artifact) -> str:
    """The source without this machine's directories."""
    source = str(artifact.report["model"]["source"])
    return source if source.startswith("package:") else PurePosixPath(source).name


def own_report(artifact: Artifact) -> dict[str, Any]:
    """The report as far as it is about the baseline and this variant."""
    names = (artifact.report["baseline"], artifact.variant)
    kept = [one for one in artifact.report["variants"] if one["name"] in names]
    return {**artifact.report, "variants": kept}


def _figures(artifact: Artifact) -> list[str]:
    report = own_report(artifact)
    found = [tables.summary(report), tables.quality(report), tables.performance(report)]
    made = [
        f"### {escape(table.title)}\n\n{table_markdown(table)}" for table in found if table.rows
    ]
    return ["## Quality and cost", *made]


def _made(artifact: Artifact) -> list[str]:
    variant = artifact.lock["variants"].get(artifact.variant)
    parts = [f"By compressor {__version__}, from this part of the recipe:"]
    shown: dict[str, Any] = {}
    if variant is not None:
        shown[artifact.variant] = _given(variant)
    if artifact.lock.get("calibration"):
        shown["calibration"] = _given(artifact.lock["calibration"])
    if not shown:
        return ["The weights are the base model's."]
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()
    return [*parts, f"```yaml\n{text}\n```"]


def _given(value: Any) -> Any:
    """Without what is not set."""
    if isinstance(value, dict):
        return {k: _given(v) for k, v in value.items() if v is not None and v != [] and v != {}}
    if isinstance(value, list):
        return [_given(one) for one in value]
    return value


def shown_command(command: Command, target: str | None = None) -> str:
    """The command as it stands in the card, as one line of a shell."""
    port = PORTS.get(command.engine, DEFAULT_PORT)
    words = fill(command.words, model=PLACE, host="127.0.0.1", port=port, target=target or "TARGET")
    return shlex.join(words)


def _served(artifact: Artifact) -> list[str]:
    commands = artifact.commands()
    if not commands:
        return ["No engine that is known here loads this format with this scheme."]
    parts = [
        f"`{PLACE}` is this directory, or the id of this repository"
        + (" (of llama.cpp: a local directory)." if artifact.format == "gguf" else ".")
        + (
            " `TARGET` is the model that it drafts for: the variant "
            f"{escape(artifact.variant)} in the format {PurePosixPath(artifact.target).name}."
            if artifact.target
            else ""
        )
    ]
    for command in commands:
        note = f" {escape(command.note)}" if command.note else ""
        text = shown_command(command)
        parts.append(f"{_TITLES[command.engine]}:{note}\n\n```sh\n{text}\n```")
    parts.append("`compress serve DIRECTORY` runs the first of these whose engine is installed.")
    return parts


def caveats(artifact: Artifact) -> list[str]:
    """What would mislead who is not told of it."""
    facts, found = artifact.facts, []
    if artifact.verification["verified"] is not True:
        found.append(verification_words(artifact))
    found += [f"{note}." for note in artifact.stage["result"].get("notes", [])]
    found += [f"{line}." for line in coverage.warnings(own_report(artifact))]
    skipped = (facts["coverage"] or {}).get("skipped") or []
    if skipped and not artifact.speculates:
        names = coverage.named([row["name"] for row in skipped])
        found.append(f"Linears left in full precision: {names}.")
    if not facts["quality"]:
        found.append("Its quality was not measured.")
    if facts["performance"]:
        device = artifact.report["environment"].get("device")
        found.append(f"Speed and cost are of one machine ({device}) and one load.")
    if artifact.base_model is None:
        found.append(
            "The base model's id on the Hub is not known, so the metadata does not name it."
        )
    found += [
        f"{line[0].upper()}{line[1:]}."
        for line in restrictions(artifact.origin, licence_texts(artifact))
    ]
    return found


def _licence(artifact: Artifact) -> str:
    origin = artifact.origin
    name = origin.get("licence")
    if name is None:
        files = origin.get("files") or []
        more = (
            f" Its source comes with {', '.join(files)}, whose name is not known." if files else ""
        )
        return f"No licence of the base model was found in its source; none is claimed here.{more}"
    own = f" ({origin['licence_name']})" if origin.get("licence_name") else ""
    files = origin.get("files") or []
    texts = "; no licence file came with the base model"
    if files:
        texts = f"; beside this file, from the base model: {', '.join(files)}"
    return escape(f"That of the base model: {name}{own}, by its {origin['found_in']}{texts}.")


def _files(artifact: Artifact) -> str:
    return (
        "`compression.json` holds the resolved recipe, the hashes of everything that went in, and "
        "all figures; `serving.json` the commands above; `SHA256SUMS` the hash of every file "
        "(`sha256sum -c SHA256SUMS`)."
    )
