"""A disk that is full, read-only, or not what was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed, project
from tests.faults.runs import NOBODY, let_nobody_read, small_disk, stored
from tests.projects import artifacts
from tests.zygote import Zygote

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB; skipped where none may be mounted."""
    with small_disk(tmp_path / "disk", 700) as mounted:
        if not mounted:
            pytest.skip("no file system can be mounted here")
        yield tmp_path / "disk"


def test_a_full_disk_is_one_error_and_the_run_goes_on_elsewhere(
    zygote: Zygote, small: Undisturbed, tmp_path: Path, tiny_disk: Path
) -> None:
    directory = project(tmp_path / "here", small.recipe)
    store = tiny_disk / "store"
    code, printed = zygote.run(directory, "run", "recipe.yaml", "--store", str(store), "--force")
    assert code == 1 and "Traceback" not in printed and "unexpected" not in printed
    assert "No space left" in printed or "disk" in printed
    assert "fix:" in printed
    shutil.copytree(store, directory / ".compressor")  # the disk grew
    stored(directory)
    code, printed = zygote.run(directory)
    assert code == 0, printed
    small.same(directory)


def test_a_store_that_cannot_be_written_is_one_error(
    zygote: Zygote, small: Undisturbed, tmp_path: Path
) -> None:
    if os.getuid():
        pytest.skip("only root can become somebody who may not write")
    directory = project(tmp_path, small.recipe)
    let_nobody_read(directory)
    code, printed = zygote.run(directory, uid=NOBODY)
    assert code == 1 and "cannot write the store" in printed and "--store" in printed
    assert "Traceback" not in printed
    code, printed = zygote.run(directory)
    assert code == 0, printed
    small.same(directory)


def flip(path: Path, place: int) -> None:
    """Change one bit of a file, behind the back of who has it linked."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(data)


def test_a_flipped_bit_is_found_before_the_stage_is_used(
    zygote: Zygote, small: Undisturbed, tmp_path: Path
) -> None:
    directory = project(tmp_path, small.recipe)
    assert zygote.run(directory)[0] == 0
    store = directory / ".compressor" / "objects"
    recipe = (directory / "recipe.yaml").read_text()
    regrouped = recipe.replace("group_size: 32", "group_size: 16")
    shortened = recipe.replace("max_tokens: 512", "max_tokens: 448")
    # A file of the first run, and a recipe some of whose stages are made anew and read it.
    changes = {
        "tokens.npy": regrouped, "novel.npy": regrouped, "block-00000.safetensors": shortened,
    }  # fmt: skip
    files = {name: path for path in store.rglob("*") if (name := path.name) in changes}
    assert files.keys() == changes.keys()
    for name, path in files.items():
        changed = changes[name]
        whole = path.read_bytes()
        flip(path, 7919)
        (directory / "recipe.yaml").write_text(changed)
        code, printed = zygote.run(directory)
        assert code == 1 and "Traceback" not in printed
        assert str(path) in printed and "SHA-256" in printed and "made anew" in printed
        path.write_bytes(whole)
    assert zygote.run(directory)[0] == 0


def test_a_changed_artifact_is_not_laid_out_again(
    zygote: Zygote, small: Undisturbed, tmp_path: Path
) -> None:
    """Artifacts are links into the store: whoever changes one changes both."""
    directory = project(tmp_path, small.recipe)
    assert zygote.run(directory)[0] == 0
    (run,) = (directory / "runs" / "recipe").iterdir()
    weights = run / "artifacts" / "int4" / "compressed-tensors" / "model.safetensors"
    flip(weights, 5000)
    code, printed = zygote.run(directory)
    assert code == 1 and "SHA-256" in printed and "model.safetensors" in printed
    assert "made anew" in printed


def test_a_shard_that_went_away_is_named(
    zygote: Zygote, small: Undisturbed, tmp_path: Path
) -> None:
    directory = project(tmp_path, small.recipe)
    assert zygote.run(directory, after=1.0)[0]
    weights = directory / "model" / "model.safetensors"
    weights.rename(tmp_path / "gone")
    code, printed = zygote.run(directory)
    assert code in (1, 2) and "Traceback" not in printed and "unexpected" not in printed
    assert "safetensors" in printed and "fix:" in printed
    (tmp_path / "gone").rename(weights)
    code, printed = zygote.run(directory)
    assert code == 0, printed
    assert artifacts(directory) == small.artifacts
