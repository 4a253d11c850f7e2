"""What a run's artifacts become on the Hugging Face Hub: which files go where, and which may not.

Layouts: ``repos`` gives each artifact a repository, ``folders`` a folder of one, ``branches`` a
branch of one. The report goes along: into each repository, or once beside the artifacts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from compressor.errors import RecipeError, RunError
from compressor.export.artifact import SUMS
from compressor.publish.artifacts import Artifact, read_artifacts
from compressor.publish.card import licence_texts, metadata, restrictions
from compressor.publish.complete import CARD
from compressor.publish.options import Layout, check_repo_id
from compressor.report.markdown import escape
from compressor.store import file_sha256s

MAIN = "main"
REPORT = "report"
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_TEXTS = (".json", ".md", ".yaml", ".txt", ".html", ".jinja", ".svg", "")
_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class PushFile:
    """A file and where it goes. ``sha256`` is what SHA256SUMS says, None where it is not there;
    ``source`` is the file, or its content."""

    path: str
    source: Path | bytes
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Upload:
    """What becomes one commit.

    Attributes:
        repo: ``org/name``.
        branch: that it goes to.
        label: what it holds, in short.
        files: in the order of their paths.
        roots: directories in the repository whose ``SHA256SUMS`` says what an earlier push left
            there; empty text is the repository itself.
    """

    repo: str
    branch: str
    label: str
    files: tuple[PushFile, ...]
    roots: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Push:
    """Everything that a push does.

    Attributes:
        uploads: in the order in which they are done.
        private: whether new repositories are private.
        gated: whether the base model is gated, so that a public repository must be too.
        refused: why an artifact stays out, by its label; without force nothing of these is there.
        warnings: what whoever publishes must know.
    """

    uploads: tuple[Upload, ...]
    private: bool
    gated: bool
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def plan_push(
    run_dir: Path,
    repo: str,
    *,
    layout: Layout = "repos",
    private: bool = True,
    variants: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    force: bool = False,
) -> Push:
    """Find out what goes where; nothing is sent and no network is asked.

    Args:
        run_dir: a finished run.
        repo: ``org/name``, in which ``{variant}`` and ``{format}`` may stand.
        layout: see the module.
        private: whether new repositories are private.
        variants: which ones; None for all but the baseline.
        formats: which ones; None for all.
        force: take artifacts that are refused too.

    Raises:
        RecipeError: a name that does not fit, or a variant or format that is not there.
        RunError: it is no run, or its directories are not complete; or a setting that looks like a
            secret would become public.
    """
    try:
        check_repo_id(repo)
    except ValueError as error:
        raise RecipeError(f"{repo!r} is no name of a repository", where="--repo",
                          fix=str(error)) from error  # fmt: skip
    found = _chosen(read_artifacts(run_dir), run_dir, variants, formats)
    labels = _labels(found)
    refused = {labels[i]: why for i, one in enumerate(found) if (why := one.refusals())}
    kept = [i for i in range(len(found)) if force or labels[i] not in refused]
    chosen, names = [found[i] for i in kept], [labels[i] for i in kept]
    first = found[0]
    _check_variables(first.lock)
    warnings = restrictions(first.origin, licence_texts(first))
    warnings += [f"{label}: {'; '.join(why)}" for label, why in refused.items() if force]
    uploads = _uploads(run_dir, repo, layout, chosen, names, single=len(found) == 1)
    return Push(
        tuple(uploads),
        private,
        bool(first.origin.get("gate")),
        {} if force else refused,
        tuple(warnings),
    )


def _chosen(
    found: Sequence[Artifact],
    run_dir: Path,
    variants: Sequence[str] | None,
    formats: Sequence[str] | None,
) -> list[Artifact]:
    """Those that are asked for: of the baseline only by name."""
    for wanted, known, what in (
        (variants, [one.variant for one in found], "variant"),
        (formats, [one.format for one in found], "format"),
    ):
        for name in wanted or ():
            if name not in known:
                raise RecipeError(
                    f"the run has no artifact of the {what} {name!r}",
                    where=str(run_dir),
                    fix=f"choose from {', '.join(dict.fromkeys(known))}",
                )
    kept = [
        one
        for one in found
        if (one.variant in variants if variants else not one.is_baseline)
        and (not formats or one.format in formats)
    ]
    if not kept:
        raise RecipeError(
            "there is nothing to push", where=str(run_dir), fix="name a variant with --only"
        )
    return kept


def _labels(found: Sequence[Artifact]) -> list[str]:
    """The variant's name, with the format where it has several."""
    names = [one.variant for one in found]
    return [
        one.variant if names.count(one.variant) == 1 else f"{one.variant}-{one.format}"
        for one in found
    ]


def _uploads(
    run_dir: Path,
    repo: str,
    layout: Layout,
    artifacts: Sequence[Artifact],
    labels: Sequence[str],
    *,
    single: bool,
) -> list[Upload]:
    if not artifacts:
        return []
    placed = "{variant}" in repo or "{format}" in repo
    if layout != "repos" and placed:
        raise RecipeError(
            f"the layout {layout} is of one repository",
            where=repo,
            fix="give org/name without {variant} and {format}, or take the layout repos",
        )
    report = _report_files(run_dir)
    pairs = list(zip(artifacts, labels, strict=True))
    if layout == "folders":
        found = [file for one, label in pairs for file in _artifact_files(one, f"{label}/")]
        found += [*report, _index(pairs, layout)]
        roots = tuple(f"{label}/" for label in labels)
        return [Upload(repo, MAIN, ", ".join(labels), _sorted(found), roots)]
    if layout == "branches":
        if MAIN in labels:
            raise RecipeError(
                "a variant is called main, as the branch of the report is",
                where=repo,
                fix="take another layout",
            )
        made = [Upload(repo, name, name, _artifact_files(one), ("",)) for one, name in pairs]
        return [*made, Upload(repo, MAIN, REPORT, _sorted([*report, _index(pairs, layout)]))]
    made = []
    for one, label in pairs:
        name = repo.replace("{variant}", one.variant).replace("{format}", one.format)
        if not placed and not single:
            name = f"{repo}-{label}"
        try:
            check_repo_id(name)
        except ValueError as error:
            raise RecipeError("no name of a repository", where=name, fix=str(error)) from error
        files = _sorted([*_artifact_files(one), *report])
        made.append(Upload(name, MAIN, label, files, ("",)))
    if len({upload.repo for upload in made}) < len(made):
        raise RecipeError(
            "several artifacts would go to one repository",
            where=repo,
            fix="put both {variant} and {format} into the name, or choose with --only and --format",
        )
    return made


def _sorted(files: Sequence[PushFile]) -> tuple[PushFile, ...]:
    return tuple(sorted(files, key=lambda file: file.path))


def _artifact_files(artifact: Artifact, prefix: str = "") -> tuple[PushFile, ...]:
    """Every file that its SHA256SUMS lists, and that list; RunError when others lie there."""
    directory = artifact.directory
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
        there = {path.name: path for path in directory.iterdir() if path.name != SUMS}
    except OSError as error:
        raise _incomplete(directory, str(error.strerror)) from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if CARD not in there:
        raise _incomplete(directory, f"there is no {CARD}")
    if sums.keys() != there.keys():
        odd = sorted(sums.keys() ^ there.keys())[0]
        raise _incomplete(directory, f"{odd} is not both there and listed in {SUMS}")
    found = [
        PushFile(f"{prefix}{name}", path, path.stat().st_size, sums[name])
        for name, path in there.items()
    ]
    own = directory / SUMS
    return _sorted([*found, PushFile(f"{prefix}{SUMS}", own, own.stat().st_size)])


def _incomplete(where: Path, what: str) -> RunError:
    return RunError(
        f"the artifact is not as the run left it: {what}",
        where=str(where),
        fix="`compress run` with the same recipe lays it out again, without other work",
    )


def _report_files(run_dir: Path) -> list[PushFile]:
    return [
        PushFile(f"{REPORT}/{path.name}", path, path.stat().st_size)
        for path in sorted((run_dir / REPORT).iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]


def _index(pairs: Sequence[tuple[Artifact, str]], layout: Layout) -> PushFile:
    """The first page of a repository with several artifacts."""
    first = pairs[0][0]
    base = metadata(first)
    head = ModelCardData(
        base_model=base.base_model,
        language=base.language,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        pipeline_tag=base.pipeline_tag,
        tags=["compressor", *dict.fromkeys(one.format for one, _ in pairs)],
        base_model_relation="quantized" if first.base_model else None,
        **first.origin.get("gate", {}),
    ).to_yaml(line_break="\n")
    lines = []
    for one, label in pairs:
        place = f"[{escape(label)}]({label}/)"
        if layout == "branches":
            place = f'[{escape(label)}](../../tree/{label}) (`revision="{label}"`)'
        lines.append(f"- {place}: variant {escape(one.variant)}, format {one.format}")
    name = escape(first.report["title"].replace("\n", " "))
    where = "branch" if layout == "branches" else "folder"
    text = (
        f"---\n{head}\n---\n\n# {name}\n\n**{escape(first.report['verdict']['sentence'])}**\n\n"
        f"Each {where} is a whole model with a card of its own:\n\n" + "\n".join(lines) + "\n\n"
        f"The whole report: [{REPORT}/report.md]({REPORT}/report.md).\n"
    )
    data = text.encode()
    return PushFile(CARD, data, len(data))


def _check_variables(lock: Mapping[str, Any]) -> None:
    """Variables of a server stand in the record: none may look like a secret."""
    measure = lock.get("measure") or {}
    given = {"measure": measure.get("variables") or {}}
    for name, variant in lock["variants"].items():
        given[f"variants.{name}.serve"] = (variant.get("serve") or {}).get("variables") or {}
    for place, variables in given.items():
        for key, value in variables.items():
            if value and _SECRET_NAME.search(key):
                raise RunError(
                    f"the variable {key} looks like a secret, and would be published",
                    where=f"{place}.variables",
                    fix="remove it from the recipe (set it in the shell) and run again",
                )


def check_files(uploads: Sequence[Upload], token: str | None) -> dict[str, str]:
    """SHA-256 (hex) by path of every file, after two checks.

    Args:
        uploads: what is about to be sent.
        token: must stand in no file.

    Raises:
        RunError: a file is not the one that SHA256SUMS lists, or holds what looks like a token.
    """
    files = [file for upload in uploads for file in upload.files if isinstance(file.source, Path)]
    sources = {Path(file.source): file.sha256 for file in files if isinstance(file.source, Path)}
    hashes = dict(zip(sources, file_sha256s(list(sources)), strict=True))
    for path, expected in sources.items():
        if expected is not None and hashes[path] != expected:
            raise RunError(
                f"the file is not the one that {SUMS} lists",
                where=str(path),
                fix="`compress verify` says what else was altered; run the recipe again",
            )
        if path.suffix in _TEXTS and path.stat().st_size <= _TEXT_BYTES:
            data = path.read_bytes()
            if (token and token.encode() in data) or _SECRET.search(data):
                raise RunError(
                    "the file holds what looks like an access token",
                    where=str(path),
                    fix="remove it where it came from, the recipe or the model, and run again; "
                    "then revoke that token",
                )
    return {str(path): digest for path, digest in hashes.items()}
