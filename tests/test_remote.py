"""Stages that machines share through a file system of fsspec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from compressor import remote
from compressor.errors import RecipeError, RunError
from compressor.store import Store
from tests.projects import RECIPE, artifacts, completed, compress, report, write


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/shared" if request.param == "file" else f"memory://{tmp_path.name}"


def made(store: Store, number: int = 1) -> str:
    """A finished and shared stage."""
    key = f"{number:064x}"
    with store.working(key) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_bytes(b"abc" * 1000)
        (directory / "empty").touch()
        stored = store.publish(key, directory, {"kind": "x", "result": {"a": 1}})
    store.share(stored)
    return key


def test_another_machine_gets_the_same_files(url: str, tmp_path: Path) -> None:
    one, two = (Store(tmp_path / name, url) for name in ("one", "two"))
    key = f"{1:064x}"
    assert not two.has(key) and two.get(key) is None
    assert made(one) == key
    assert two.has(key)
    found = two.get(key)
    assert found is not None and found.path.is_relative_to(two.root)
    found.verify()
    assert found.manifest == one.get(key).manifest  # type: ignore[union-attr]
    assert found.result == {"a": 1}
    assert not list(two.root.glob("partial/*"))
    assert Store(tmp_path / "two").get(key) is not None  # it stays, without the shared store


def test_what_has_no_manifest_yet_does_not_count(url: str, tmp_path: Path) -> None:
    one = Store(tmp_path / "one", url)
    key = made(one)
    fs, root = fsspec.core.url_to_fs(url)
    manifest = f"{root}/objects/{key[:2]}/{key}/stage.json"
    whole = fs.cat_file(manifest)
    for half in (whole[:20], b"", b"[]"):
        fs.pipe_file(manifest, half)
        assert not Store(tmp_path / "two", url).has(key)
    fs.rm(manifest)
    assert not Store(tmp_path / "two", url).has(key)
    one.share(one.get(key))  # type: ignore[arg-type]
    assert Store(tmp_path / "two", url).has(key)


def test_a_byte_that_changed_there_is_found(url: str, tmp_path: Path) -> None:
    key = made(Store(tmp_path / "one", url))
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/objects/{key[:2]}/{key}/sub/file"
    fs.pipe_file(path, b"abd" + fs.cat_file(path)[3:])
    two = Store(tmp_path / "two", url)
    with pytest.raises(RunError, match="SHA-256"):
        two.get(key)
    assert not list(two.root.glob("objects/*/*"))


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "a/../../b"])
def test_names_from_there_stay_inside(url: str, tmp_path: Path, name: str) -> None:
    key = made(Store(tmp_path / "one", url))
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/objects/{key[:2]}/{key}/stage.json"
    manifest = json.loads(fs.cat_file(path))
    manifest["files"][0]["path"] = name
    fs.pipe_file(path, json.dumps(manifest).encode())
    with pytest.raises(RunError, match="names the file"):
        Store(tmp_path / "two", url).get(key)


def test_a_file_system_that_fails_is_asked_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.0)
    store = Store(tmp_path / "one", "memory://failing")
    calls: list[str] = []

    def fails(path: str) -> bytes:
        calls.append(path)
        if len(calls) < left:
            raise ConnectionError("reset by peer")
        raise FileNotFoundError(path)

    assert store.remote is not None
    monkeypatch.setattr(store.remote.fs, "cat_file", fails)
    left = 3
    assert not store.has("0" * 64) and len(calls) == 3
    left = 10
    with pytest.raises(RunError, match=r"shared store failed: reset by peer"):
        store.has("0" * 64)


@pytest.mark.parametrize(
    ("url", "message"),
    [("nothing://x", "no shared store"), ("ftp://user:secret@host/x", "holds a password")],
)
def test_addresses_that_cannot_be_used(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        Store(tmp_path, url)
    assert "secret" not in str(raised.value)


def test_a_run_elsewhere_makes_nothing_anew(project: Path) -> None:
    recipe: dict[str, Any] = {**RECIPE, "shared_store": f"file://{project}/shared"}
    completed(project, recipe)
    first = artifacts(project)
    (run,) = (project / "runs" / "recipe").iterdir()
    run.rename(project / "first")
    write(project, recipe)
    done = compress(project, "run", "recipe.yaml", "--store", "elsewhere")
    assert done.returncode == 0, done.stderr
    assert all(stage["cached"] for stage in report(project)["stages"])
    assert artifacts(project) == first
