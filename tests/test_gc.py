"""Freeing what no run refers to, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import RunError
from compressor.gc import collect
from compressor.store import Store
from tests.projects import RECIPE, completed, compress


def made(store: Store, number: int, size: int = 1000) -> str:
    """A finished stage."""
    key = f"{number:064x}"
    with store.working(key) as directory:
        (directory / "file").write_bytes(bytes(size))
        store.publish(key, directory, {"kind": "x"})
    return key


def begun(store: Store, number: int) -> str:
    key = f"{number:064x}"
    with store.working(key) as directory:
        (directory / "half").write_bytes(bytes(10))
    return key


def run(directory: Path, *keys: str, file: str = "log.jsonl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"event": "done", "key": key}) for key in keys]
    (directory / file).write_text("\n".join(rows) + "\n")
    return directory


def test_what_runs_and_searches_name_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    keys = [made(store, n) for n in range(6)]
    halves = [begun(store, n) for n in (10, 11)]
    run(tmp_path / "runs" / "a" / "1", keys[0], halves[0])
    run(tmp_path / "runs" / "b" / "2", keys[1], file="stages.json")
    run(tmp_path / "runs" / "b" / "3", keys[2], file="optimise.json")
    run(store.root / "optimise", keys[3], file="search.jsonl")
    linked = tmp_path / "runs" / "artifact"
    os.link(store.path(keys[4]) / "file", linked)

    def files() -> set[Path]:
        return {p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock"}

    before = files()
    told = collect(store, [tmp_path / "runs"], dry_run=True)
    assert files() == before
    freed = collect(store, [tmp_path / "runs"])
    assert freed == told
    assert (freed.stages, freed.unfinished, freed.kept) == (2, 1, 4)
    manifests = 2 * 200
    assert 1000 + 10 < freed.bytes < 1000 + 10 + 2 * manifests  # not the file that is linked
    for key in keys[:4]:
        stage = store.get(key)
        assert stage is not None
        stage.verify()
    assert all(store.get(key) is None for key in keys[4:])
    assert linked.stat().st_size == 1000
    assert [p.name for p in store.root.glob("partial/*")] == [halves[0]]
    assert {p.stem for p in store.root.glob("locks/*")} == {*keys[:4], halves[0]}
    assert collect(store, [tmp_path / "runs"]).stages == 0


def test_a_stage_that_is_being_made_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "runs").mkdir()
    with store.working(f"{1:064x}") as directory:
        (directory / "half").touch()
        assert collect(store, [tmp_path / "runs"]).unfinished == 0
        assert (directory / "half").exists()
    assert collect(store, [tmp_path / "runs"]).unfinished == 1


def test_a_lock_file_that_went_away_is_made_anew(tmp_path: Path) -> None:
    """Whoever holds the lock of a file that was removed since does not take it for the lock."""
    store, key = Store(tmp_path / "store"), f"{1:064x}"
    with store.lock(key):
        (store.root / "locks" / f"{key}.lock").unlink()
        with store.lock(key, wait=False) as held:
            assert held
            with store.lock(key, wait=False) as again:
                assert not again


def test_nothing_is_freed_where_a_run_cannot_be_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made(store, 1)
    (run(tmp_path / "runs" / "a") / "stages.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="cannot be read"):
        collect(store, [tmp_path / "runs"])
    with pytest.raises(RunError, match="no such directory"):
        collect(store, [tmp_path / "elsewhere"])
    assert store.get(f"{1:064x}") is not None


def test_after_a_run_is_deleted_the_other_one_needs_nothing_anew(project: Path) -> None:
    def recipe(scheme: str) -> dict[str, Any]:
        quantize = [{"rtn": {"scheme": scheme, "group_size": 32}}]
        return {**RECIPE, "variants": {"one": {"quantize": quantize}}}

    completed(project, recipe("W8A16"))
    (first,) = (project / "runs" / "recipe").iterdir()
    completed(project, recipe("W4A16"))
    shutil.rmtree(first)
    shown = compress(project, "gc", "--dry-run")
    assert shown.returncode == 0 and "would be freed" in shown.stdout
    done = compress(project, "gc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 4  # quantize, export, verify, evaluate of the first
    again = compress(project, "plan", "recipe.yaml", "--json")
    stages = json.loads(again.stdout)["stages"]
    assert all(stage["cached"] for stage in stages)
    lost = compress(project, "gc", "--store", "nowhere")
    assert lost.returncode == 1 and "there is no store" in lost.stderr
