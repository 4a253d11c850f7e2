"""Uploads to the Hugging Face Hub, or to whatever speaks its API at ``HF_ENDPOINT``.

Each upload is one commit, so that a repository never shows half an artifact. Large files are sent
before it, one after the other (``preupload_lfs_files``), and the storage keeps each that arrived:
where an upload is cut off, the next one is told which are there and sends the others. (Through Xet
what is kept are chunks of files.) ``upload_large_folder`` of earlier versions of the library did
that with many commits and a cache of its own; huggingface_hub 2 no longer has it.

The token is the library's to find, in the environment or the store of ``hf auth login``. It is
written nowhere, and taken out of every message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import __version__
from compressor.errors import CompressorError, RunError, first_line
from compressor.export.artifact import SUMS
from compressor.progress import Progress
from compressor.publish.push import MAIN, Push, PushFile, Upload, check_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ONE_BY_ONE = 1 << 20  # files from this size on are sent alone [bytes]
_OURS = ("compression.json", "report/report.json")
_HIDDEN = "***"


def push(plan: Push, progress: Progress, *, force: bool = False) -> list[str]:
    """Send everything; what an earlier call has sent is not sent again.

    Args:
        plan: of `plan_push`.
        progress: where to report.
        force: add to repositories that hold something else.

    Returns:
        the address of each commit.

    Raises:
        RunError: there is no token, the Hub refuses it or cannot be reached, a name is taken, or a
            file was altered.
    """
    from huggingface_hub import HfApi

    token = _token()
    hashes = check_files(plan.uploads, token)
    api = HfApi(token=token, library_name="compressor", library_version=__version__)
    made = []
    for repo in dict.fromkeys(upload.repo for upload in plan.uploads):
        with _explained(repo, token):
            _prepare(api, repo, plan, force)
    for upload in plan.uploads:
        with _explained(upload.repo, token):
            if upload.branch != MAIN:
                api.create_branch(upload.repo, branch=upload.branch, exist_ok=True)
            made.append(_send(api, upload, hashes, progress))
    return made


def _token() -> str:
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise RunError(
            "the Hub is switched off", where="HF_HUB_OFFLINE", fix="unset that variable to push"
        )
    try:
        token = get_token()
    except Exception as error:  # of a login by OIDC, which failed
        raise RunError(
            f"the token cannot be had ({type(error).__name__})", fix="log in with `hf auth login`"
        ) from None
    if token is None:
        raise RunError(
            "there is no access token of the Hub",
            fix="set HF_TOKEN, or log in with `hf auth login`; it must be one that may write",
        )
    return token


def _prepare(api: HfApi, repo: str, plan: Push, force: bool) -> None:
    """Make the repository, or see that the one of that name is ours and as private as wanted."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=plan.private)
        info = None
    if info is not None:
        names = [one.rfilename for one in info.siblings or [] if one.rfilename != ".gitattributes"]
        ours = any(name.endswith(_OURS) for name in names)
        if names and not ours and not force:
            raise RunError(
                f"the name is taken by a repository with other files ({names[0]})",
                where=repo,
                fix="give another name, or --force to add to it",
            )
        if plan.private and not info.private:
            raise RunError(
                "the repository is there already, and public",
                where=repo,
                fix="make it private on the Hub, or push with --public",
            )
    if plan.gated and not plan.private:
        # As its base model: whoever wants it has to agree to the terms that the card carries.
        api.update_repo_settings(repo, gated="manual")


def _send(api: HfApi, upload: Upload, hashes: dict[str, str], progress: Progress) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = []
    large: list[tuple[PushFile, Any]] = []
    for file in upload.files:
        source = str(file.source) if isinstance(file.source, Path) else file.source
        one = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=source)
        if isinstance(source, str):
            one.upload_info.sha256 = bytes.fromhex(hashes[source])  # or it would hash it again
        operations.append(one)
        if file.size_bytes >= _ONE_BY_ONE:
            large.append((file, one))
    revision = None if upload.branch == MAIN else upload.branch
    with progress.task(f"push {upload.label} to {upload.repo}", len(large) + 1) as task:
        for file, one in large:
            task.update(note=f"{file.path}, {file.size_bytes / 1e6:,.0f} MB")
            api.preupload_lfs_files(
                upload.repo, additions=[one], revision=revision, free_memory=False
            )
            task.advance()
        task.update(note="commit")
        stale = _left_over(api, upload, revision)
        operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
        commit = api.create_commit(
            upload.repo,
            operations,
            commit_message=f"{upload.label}, by compressor {__version__}",
            revision=revision,
        )
        task.advance()
    return str(commit.commit_url)


def _left_over(api: HfApi, upload: Upload, revision: str | None) -> list[str]:
    """Files that an earlier push put there, by its SHA256SUMS, and that this one does not have."""
    there = set(api.list_repo_files(upload.repo, revision=revision))
    new = {file.path for file in upload.files}
    found: list[str] = []
    for root in upload.roots:
        if f"{root}{SUMS}" not in there:
            continue
        url = api.hf_hub_download(upload.repo, f"{root}{SUMS}", revision=revision)
        for line in Path(url).read_text(encoding="utf-8").splitlines():
            path = root + line.partition("  ")[2]
            if path in there and path not in new:
                found.append(path)
    return found


@contextmanager
def _explained(repo: str, token: str) -> Iterator[None]:
    """What goes wrong at the Hub, as one message without the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except CompressorError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        causes = _causes(error)
        answered = next((one for one in causes if isinstance(one, HfHubHTTPError)), None)
        lost = next((one for one in causes if isinstance(one, HTTPError | OSError)), error)
        if answered is not None:
            made = _answer(answered, repo, token)
        else:
            made = RunError(
                f"the upload broke off: {_clean(first_line(lost), token)}",
                where=repo,
                fix="run the same command again: what has arrived is not sent again",
            )
        raise made from None  # a chain of causes may show what was sent


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _answer(error: Any, repo: str, token: str) -> RunError:
    """A refusal of the Hub in words."""
    status = error.response.status_code if error.response is not None else None
    said = _clean(getattr(error, "server_message", None) or first_line(error), token)
    if status == 401:
        return RunError(
            "the Hub does not know this access token",
            where=repo,
            fix="make one that may write at https://huggingface.co/settings/tokens, then set "
            "HF_TOKEN or log in with `hf auth login`",
        )
    if status == 403:
        return RunError(
            f"this access token may not write there: {said}",
            where=repo,
            fix="take a token with write access to that account or organisation, or another name",
        )
    if status == 409:
        return RunError(
            f"the name is taken: {said}", where=repo, fix="give another name with --repo"
        )
    return RunError(
        f"the Hub answered {status}: {said}",
        where=repo,
        fix="run the same command again: what has arrived is not sent again",
    )


def _clean(text: str, token: str) -> str:
    """Without the token, nor what an address may hold before its host or behind its path."""
    text = text.replace(token, _HIDDEN)
    text = re.sub(r"(https?://)[^/\s@]*@", rf"\1{_HIDDEN}@", text)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?" + _HIDDEN, text)


def describe(uploads: Sequence[Upload]) -> list[str]:
    """Every file and its size, one line each, with the sums."""
    lines = []
    for upload in uploads:
        at = "" if upload.branch == MAIN else f"@{upload.branch}"
        for file in upload.files:
            lines.append(f"{file.size_bytes:>15,}  {upload.repo}{at}/{file.path}")
        lines.append(f"{upload.size_bytes:>15,}  {upload.repo}{at}: {len(upload.files)} files")
    return lines
