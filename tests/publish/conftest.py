"""One run of a tiny model with a licence, and a Hub to push it to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.projects import RECIPE, compress, write
from tests.publish.hub_server import Hub

TOKEN = "hf_" + "Q7secretOfTheTestSuite" + "0" * 12
READ_ONLY = "hf_" + "readsOnlyAndNothingElse" + "1" * 11
LICENCE = "ACME RESEARCH LICENSE\n\nYou may use this for non-commercial purposes only.\n"
CARD = """---
license: other
license_name: acme-research
license_link: https://acme.example/licence
language: [en, de]
extra_gated_prompt: You agree to be kind.
---
# Acme
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory; tests copy it."""
    project = tmp_path_factory.mktemp("publish")
    # As the Hub's cache lays out a snapshot: that is where the id comes from.
    model = project / "models--acme--tiny" / "snapshots" / ("a" * 40)
    tiny.build("llama", model)
    (model / "LICENSE").write_text(LICENCE)
    (model / "NOTICE.txt").write_text("Made by Acme.\n")
    (model / "README.md").write_text(CARD)
    recipe: dict[str, Any] = {
        **RECIPE,
        "model": {"source": model.relative_to(project).as_posix()},
        "variants": {name: RECIPE["variants"][name] for name in ("int8", "int4")},
        "export": ["compressed-tensors", "gguf"],
    }
    write(project, recipe)
    done = compress(project, "run", "recipe.yaml", "--quiet")
    assert done.returncode == 0, done.stderr
    (run,) = (project / "runs" / "recipe").iterdir()
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, in which every artifact counts as verified."""
    copied = Path(shutil.copytree(made, tmp_path / "run"))
    verify_all(copied, True)
    return copied


def verify_all(run: Path, verified: bool | None, why: str = "") -> None:
    """Write into the record what a consumer is supposed to have said of every artifact; nothing
    where ``why`` is ``absent``."""
    stages = json.loads((run / "stages.json").read_text())
    kept = [stage for stage in stages if stage["kind"] != "verify"]
    made = [
        {
            "name": stage["name"].replace("export:", "verify:"),
            "kind": "verify",
            "variant": stage["variant"],
            "files": [],
            "result": {"consumer": "a test", "version": None, "verified": verified, "why": why},
        }
        for stage in kept
        if stage["kind"] == "export" and why != "absent"
    ]
    (run / "stages.json").write_text(json.dumps([*kept, *made]))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(
        {TOKEN: ["alice", "acme"], READ_ONLY: ["alice", "acme"]},
        chunk=100_000,
        readers=(READ_ONLY,),
    ) as server:
        yield server
        assert not server.unknown


def environment(hub: Hub, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
    """Variables of a process that knows no Hub but this one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # it speaks LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return kept | own | ({"HF_TOKEN": token} if token else {}) | more


def push(
    run: Path, hub: Hub, *arguments: str, token: str | None = TOKEN, **more: str
) -> subprocess.CompletedProcess[str]:
    """`compress push`; neither output nor any file below its home may show the token."""
    home = run.parent / "home"
    done = subprocess.run(
        [sys.executable, "-m", "compressor", "push", str(run), *arguments],
        env=environment(hub, home, token, **more),
        cwd=run.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr or "COMPRESSOR_TRACEBACK" in more
    assert_hidden(token, done.stdout, done.stderr, run.parent)
    return done


def assert_hidden(token: str | None, stdout: str, stderr: str, *directories: Path) -> None:
    """The token stands nowhere."""
    if token is None:
        return
    assert token not in stdout and token not in stderr
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and path.suffix not in (".safetensors", ".gguf"):
                assert token.encode() not in path.read_bytes(), path
