"""Finished stages that machines share: any file system that fsspec knows (s3://, gs://, file://).

The layout is that of `compressor.store`'s ``objects``. A stage's manifest is written after its
files, and is what makes it count; each file is compared with its SHA-256 when it comes back. Who
may use the file system is the business of its library (environment, profile, instance role).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from compressor.errors import RecipeError, RunError, first_line

MANIFEST = "stage.json"
_ATTEMPTS = 3
_WAIT_S = 1.0  # before the second attempt, twice as long before the third
T = TypeVar("T")


class Remote:
    """Stages by content key, elsewhere.

    Args:
        url: of a directory or prefix.

    Raises:
        RecipeError: no library serves such addresses, or the address holds a password.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        if urlsplit(url).password:
            raise RecipeError(
                "the address of the shared store holds a password",
                where="shared_store",
                fix="leave it out: the file system's library takes it from the environment",
            )
        self.url = url
        try:
            self.fs, self.root = url_to_fs(url)
        except Exception as error:  # of whatever library serves such addresses
            raise RecipeError(
                f"no shared store can be had there: {first_line(error)}",
                where=f"shared_store: {url}",
                fix="s3:// needs `pip install s3fs`, gs:// `pip install gcsfs`",
            ) from error

    def manifest(self, key: str) -> dict[str, Any] | None:
        """What is known of a finished stage; None where there is none.

        Raises:
            RunError: the file system cannot be read.
        """

        def read() -> bytes | None:
            try:
                return self.fs.cat_file(self._path(key, MANIFEST))
            except FileNotFoundError:
                return None

        data = self._tried(read)
        try:
            found = json.loads(data) if data else None
        except ValueError:  # being written, where that is not done at once
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def pull(self, key: str, manifest: dict[str, Any], directory: Path) -> None:
        """Fetch a stage's files; the manifest is left to the caller, for when they are whole.

        Raises:
            RunError: the file system cannot be read, or the manifest names files elsewhere.
        """
        for entry in manifest["files"]:
            inside = PurePosixPath(entry["path"])
            if inside.is_absolute() or ".." in inside.parts:
                raise RunError(
                    f"a stage in the shared store names the file {entry['path']!r}",
                    where=self._path(key, MANIFEST),
                    fix="remove that stage: it was not written by compressor",
                )
            target = directory / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self._path(key, entry["path"])
            self._tried(partial(self.fs.get_file, source, str(target)))

    def push(self, key: str, directory: Path, manifest: dict[str, Any]) -> None:
        """Write a finished stage, unless it is there.

        Raises:
            RunError: the file system cannot be written.
        """
        if self.manifest(key) is not None:
            return
        for entry in manifest["files"]:
            target = self._path(key, entry["path"])
            self._tried(partial(self.fs.makedirs, target.rpartition("/")[0], exist_ok=True))
            self._tried(partial(self.fs.put_file, str(directory / entry["path"]), target))
        data = (directory / MANIFEST).read_bytes()
        self._tried(
            partial(self.fs.makedirs, self._path(key), exist_ok=True)
        )  # it may have no files
        self._tried(partial(self.fs.pipe_file, self._path(key, MANIFEST), data))

    def _path(self, key: str, *names: str) -> str:
        return "/".join((self.root.rstrip("/"), "objects", key[:2], key, *names))

    def _tried(self, act: Callable[[], T]) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return act()
            except Exception as error:  # of whatever library serves such addresses
                if attempt == _ATTEMPTS:
                    raise RunError(
                        f"the shared store failed: {first_line(error)}",
                        where=self.url,
                        fix="see that it can be reached and written; what is finished is kept, and "
                        "shared by the next run",
                    ) from error
                time.sleep(_WAIT_S * attempt)
        raise AssertionError
