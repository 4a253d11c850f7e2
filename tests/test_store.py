"""The store: atomic publishing, locks, and finding what was altered."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from compressor.errors import RunError
from compressor.store import Store, canonical_json, content_key, write_atomic


def publish(store: Store, key: str, text: str = "data") -> Path:
    with store.working(key) as directory:
        (directory / "sub").mkdir(exist_ok=True)
        (directory / "sub" / "file.txt").write_text(text)
        return store.publish(key, directory, {"result": {"answer": 42}, "kind": "x"}).path


def test_keys_do_not_depend_on_the_order_of_settings() -> None:
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'


def test_published_stage_is_found_with_its_result_and_hashes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get("k1") is None
    publish(store, "k1")
    found = store.get("k1")
    assert found is not None and found.result == {"answer": 42}
    assert [f["path"] for f in found.manifest["files"]] == ["sub/file.txt"]
    found.verify()
    assert not (tmp_path / "partial" / "k1").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    file = publish(store, "k1") / "sub" / "file.txt"
    if damage == "flip":
        file.write_text("dat4")
    elif damage == "cut":
        file.write_text("da")
    else:
        file.unlink()
    found = store.get("k1")
    assert found is not None
    with pytest.raises(RunError, match=r"file\.txt"):
        found.verify()


def test_what_a_kill_left_behind_is_not_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.working("k1") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / ".file.txt.4711.tmp").write_text("hal")
    publish(store, "k1")
    found = store.get("k1")
    assert found is not None
    assert [f["path"] for f in found.manifest["files"]] == ["sub/file.txt"]


def test_partial_work_is_not_a_finished_stage_and_survives(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.working("k1") as directory:
        (directory / "half").write_text("x")
    assert store.get("k1") is None
    with store.working("k1") as directory:
        assert (directory / "half").read_text() == "x"
    store.discard_partial("k1")
    assert not (tmp_path / "partial" / "k1").exists()


def _hold(root: str, started: str) -> None:
    with Store(Path(root)).working("k1"):
        Path(started).touch()
        time.sleep(60)


def test_lock_is_held_against_others_and_freed_when_its_owner_is_killed(tmp_path: Path) -> None:
    started = tmp_path / "started"
    context = multiprocessing.get_context("spawn")
    owner = context.Process(target=_hold, args=(str(tmp_path / "s"), str(started)))
    owner.start()
    while not started.exists():
        time.sleep(0.02)
    store = Store(tmp_path / "s")
    waiting = context.Process(target=_make, args=(str(tmp_path / "s"),))
    waiting.start()
    time.sleep(1.0)
    assert store.get("k1") is None  # the second waits for the first
    assert owner.pid is not None
    os.kill(owner.pid, 9)
    waiting.join(30)
    assert store.get("k1") is not None
    owner.join()


def _make(root: str) -> None:
    publish(Store(Path(root)), "k1")


def test_source_hash_follows_an_edit(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    source = tmp_path / "text"
    source.write_text("one")
    first = store.source_sha256(source)
    assert store.source_sha256(source) == first
    source.write_text("other")
    assert store.source_sha256(source) != first


def test_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the store"):
        Store(tmp_path / "file" / "store")


def test_write_atomic_replaces_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.json", "one")
    write_atomic(tmp_path / "a" / "b.json", "two")
    assert (tmp_path / "a" / "b.json").read_text() == "two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]
