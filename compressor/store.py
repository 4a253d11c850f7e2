"""Content-addressed store of finished stages, with crash-safe publishing.

Layout under the store's root::

    objects/<key[:2]>/<key>/   a finished stage: its files and ``stage.json`` (the manifest)
    partial/<key>/             a stage under way; kept after a kill so that it can resume
    locks/<key>.lock           advisory lock (``flock``): freed by the kernel when its owner dies
    file-hashes.json           SHA-256 of source files by (path, size, mtime): planning is fast

A stage is published by one atomic rename after every file and the directory were synced to disk:
a directory under ``objects/`` is whole or it is not there. Stages that another machine finished
come from a shared store (`compressor.remote`), where one is named.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import RunError
from compressor.remote import MANIFEST

if TYPE_CHECKING:
    from compressor.remote import Remote

_CHUNK = 1 << 22


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def content_key(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def stage_key(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], code: str) -> str:
    """Content key of a stage.

    Args:
        kind: of the stage.
        config: its settings, plain values.
        inputs: keys of its inputs by their names. What a variant is called stays out of the key,
            so that equal work of two recipes is done once; the measurement alone is told whose
            artifact is whose.
        code: `plan.code_version` of the kind.
    """
    named = dict(inputs)
    if kind != "measure":
        short = {_role(name): key for name, key in inputs.items()}
        named = short if len(short) == len(named) else named
    return content_key({"kind": kind, "config": config, "in": named, "code": code})


def _role(name: str) -> str:
    """``quantize`` of ``quantize:int4``, ``export:gguf`` of ``export:int4:gguf``; the baseline's
    stages keep their names."""
    kind, *rest = name.split(":")
    return name if rest[:1] == ["baseline"] else ":".join([kind, *rest[1:]])


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def file_sha256s(paths: Sequence[Path]) -> list[str]:
    """`file_sha256` of several files, side by side."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_sha256, paths))


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_leftovers(directory: Path) -> None:
    """Remove what a `write_atomic` that was killed left anywhere below a directory, so that it is
    not taken for one of its files. Nobody else may be writing there."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()


@dataclass(frozen=True)
class StoredStage:
    """A finished stage: ``path`` holds its files, ``manifest`` what is known of it."""

    key: str
    path: Path
    manifest: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        """What the stage's function returned."""
        return self.manifest["result"]

    def verify(self) -> None:
        """Compare every file with the manifest; raise `RunError` naming the first that differs."""
        check_files(self.path, self.manifest["files"])


def check_files(directory: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Compare files of a finished stage with what was recorded when they were written.

    Args:
        directory: of the stage.
        entries: of its manifest: ``path``, ``size_bytes``, ``sha256``.

    Raises:
        RunError: naming the first file that differs.
    """
    paths = [directory / entry["path"] for entry in entries]
    there = [path for path in paths if path.is_file()]
    found = dict(zip(there, file_sha256s(there), strict=True))
    for entry, path in zip(entries, paths, strict=True):
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != entry["size_bytes"]:
            problem = f"has {path.stat().st_size} bytes, {entry['size_bytes']} were written"
        elif found[path] != entry["sha256"]:
            problem = "does not have the SHA-256 that was recorded when it was written"
        else:
            continue
        raise RunError(
            f"stored file {problem}",
            where=str(path),
            fix=f"delete {directory} and run again: that stage alone is made anew",
        )


class Store:
    """The stages finished so far, by content key.

    Args:
        root: directory of the store; made when it does not exist.
        shared: address of more of them, that other machines use too; see `remote.Remote`.

    Raises:
        RunError: the directory cannot be made or written.
        RecipeError: the address cannot be used.
    """

    def __init__(self, root: Path, shared: str | None = None) -> None:
        self.root = root
        self.remote: Remote | None = None
        if shared is not None:
            from compressor.remote import Remote

            self.remote = Remote(shared)
        try:
            for name in ("objects", "partial", "locks"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot write the store: {error.strerror}",
                where=str(root),
                fix="give another directory with --store",
            ) from error

    def path(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether a stage of that key is finished, here or in the shared store."""
        if (self.path(key) / MANIFEST).exists():
            return True
        return self.remote is not None and self.remote.manifest(key) is not None

    def get(self, key: str) -> StoredStage | None:
        """The finished stage of that key, fetched from the shared store if need be, or None.

        Raises:
            RunError: its manifest is damaged, or what was fetched is not what was written.
        """
        return self._local(key) or self._fetched(key)

    def _fetched(self, key: str) -> StoredStage | None:
        manifest = self.remote.manifest(key) if self.remote is not None else None
        if self.remote is None or manifest is None:
            return None
        # Of this process alone: who fetches the same besides loses the race for the name.
        working = self.root / "partial" / f"{key}.fetched.{os.getpid()}"
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        self.remote.pull(key, manifest, working)
        check_files(working, manifest["files"])
        return self._place(key, working, manifest)

    def share(self, stored: StoredStage) -> None:
        """Put a finished stage into the shared store, where there is one that lacks it."""
        if self.remote is not None:
            self.remote.push(stored.key, stored.path, stored.manifest)

    def _local(self, key: str) -> StoredStage | None:
        path = self.path(key)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(
                "stored manifest is not JSON",
                where=str(path / MANIFEST),
                fix=f"delete {path} and run again",
            ) from error
        return StoredStage(key, path, manifest)

    @contextmanager
    def working(self, key: str) -> Iterator[Path]:
        """Directory to build stage ``key`` in, under its lock; it survives a kill for resuming."""
        with self.lock(key):
            path = self.root / "partial" / key
            path.mkdir(exist_ok=True)
            remove_leftovers(path)
            yield path
            with suppress(OSError):  # published, or made by another process meanwhile
                path.rmdir()

    @contextmanager
    def lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """The lock of a stage, whether or not there is one; yields whether it is held.

        Args:
            key: of the stage.
            wait: for another process that is making the stage; else that one keeps it.
        """
        path = self.root / "locks" / f"{key}.lock"
        while True:
            with open(path, "a", encoding="utf-8") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except OSError as error:
                    if wait or error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                    yield False
                    return
                try:  # the file may have been removed, and made anew, while we waited
                    current = os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
                except FileNotFoundError:
                    current = False
                if current:
                    yield True
                    return

    def publish(self, key: str, working: Path, manifest: Mapping[str, Any]) -> StoredStage:
        """Sync ``working`` to disk with its manifest and rename it into place."""
        paths = sorted(p for p in working.rglob("*") if p.is_file() and p.name != MANIFEST)
        files = [
            {
                "path": path.relative_to(working).as_posix(),
                "size_bytes": path.stat().st_size,
                "sha256": digest,
            }
            for path, digest in zip(paths, file_sha256s(paths), strict=True)
        ]
        whole = {**manifest, "key": key, "files": files, "finished": time.time()}
        return self._place(key, working, whole)

    def _place(self, key: str, working: Path, manifest: dict[str, Any]) -> StoredStage:
        """Write the manifest, sync everything, and rename into place; the stage that is there."""
        (working / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in working.rglob("*"):
            _sync(path)
        _sync(working)
        final = self.path(key)
        final.parent.mkdir(exist_ok=True)
        try:
            os.rename(working, final)
        except OSError:
            if (sooner := self._local(key)) is None:  # another process's
                raise
            shutil.rmtree(working, ignore_errors=True)
            return sooner
        _sync(final.parent)
        return StoredStage(key, final, manifest)

    def discard_partial(self, key: str) -> None:
        """Forget what an unfinished stage has written."""
        shutil.rmtree(self.root / "partial" / key, ignore_errors=True)

    def source_sha256(self, path: Path) -> str:
        """SHA-256 of a source file, remembered while its size and modification time stay."""
        index = self.root / "file-hashes.json"
        try:
            known = json.loads(index.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            known = {}
        facts = path.stat()
        name = str(path.resolve())
        entry = known.get(name)
        if entry and entry[:2] == [facts.st_size, facts.st_mtime_ns]:
            return entry[2]
        digest = file_sha256(path)
        known[name] = [facts.st_size, facts.st_mtime_ns, digest]
        write_atomic(index, json.dumps(known))
        return digest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
