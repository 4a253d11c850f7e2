"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.export.artifact import PROVENANCE, SUMS
from tests import tiny
from tests.faults.runs import new_zygote, stored
from tests.projects import RECIPE, artifacts, write
from tests.zygote import Zygote

# Every kind of stage that needs no server.
WHOLE: dict[str, Any] = {
    **RECIPE,
    "variants": {
        "int8": {
            "quantize": ["rotation", "smoothquant", {"gptq": {"scheme": "W8A8"}}],
            "speculate": {"medusa": {"heads": 2, "epochs": 1, "batch_size": 4}},
        },
        "mixed": {
            "quantize": [{"gptq": {"scheme": "W4A16", "group_size": 32}}],
            "precision": {"schemes": ["W4A16", "W8A16"], "mean_bits": 5, "samples": 2},
        },
    },
    "speculation": {
        "samples": 8, "held_out": 2, "output_length": 6, "test_samples": 2, "sweep": [1],
    },
    "evaluate": {
        **RECIPE["evaluate"],
        "drift": {"samples": 2, "output_length": 4},
        "tasks": ["builtin:social_iqa"],
        "tasks_limit": 2,
    },
    "export": ["compressed-tensors", "gguf"],
}  # fmt: skip
SMALL: dict[str, Any] = {
    **RECIPE,
    "variants": {"int4": RECIPE["variants"]["int4"]},
    "evaluate": {**RECIPE["evaluate"], "drift": None},
}


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = new_zygote()
    yield made
    made.close()


def project(directory: Path, recipe: dict[str, Any]) -> Path:
    """A directory with a tiny model and a recipe."""
    tiny.build("llama", directory / "model")
    write(directory, recipe)
    return directory


class Undisturbed:
    """What a recipe leaves behind when nothing happens."""

    def __init__(self, zygote: Zygote, directory: Path, recipe: dict[str, Any]) -> None:
        self.recipe = recipe
        project(directory, recipe)
        code, printed = zygote.run(directory)
        assert code == 0, printed
        self.stored, self.artifacts = stored(directory), self._artifacts(directory)

    def _artifacts(self, directory: Path) -> dict[str, str]:
        """Hashes by file, but for those that tell how long speculation took."""
        found = artifacts(directory)
        if "speculation" not in self.recipe:
            return found
        timed = (PROVENANCE, SUMS)
        return {name: found[name] for name in found if Path(name).name not in timed}

    def same(self, directory: Path) -> None:
        """Raise where a directory that met faults holds anything else."""
        assert stored(directory) == self.stored
        assert self._artifacts(directory) == self.artifacts
        assert not list((directory / ".compressor" / "partial").iterdir())


@pytest.fixture(scope="session")
def small(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(zygote, tmp_path_factory.mktemp("undisturbed"), SMALL)
