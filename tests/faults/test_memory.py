"""Less memory than a batch takes: smaller batches, said so, and the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.faults.conftest import SMALL
from tests.projects import report, write
from tests.zygote import Zygote

WIDE = 4096  # what an MLP holds of a whole batch between its linears takes 268 MB, three times over
RECIPE: dict[str, Any] = {
    **SMALL,
    "variants": {"int4": {**SMALL["variants"]["int4"], "ignore": [r".*\.down_proj"]}},  # 4096 wide
    "calibration": {**SMALL["calibration"], "samples": 128, "length": 128, "batch_size": 128},
    "evaluate": {
        **SMALL["evaluate"],
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 128 * 128}],
        "length": 128,
        "batch_size": 128,
    },
}


def test_batches_are_halved(zygote: Zygote, tmp_path: Path) -> None:
    found = []
    for name, job in (("roomy", {}), ("narrow", {"memory": 850})):
        directory = tmp_path / name
        tiny.build("llama", directory / "model", intermediate_size=WIDE)
        write(directory, RECIPE)
        code, printed = zygote.run(directory, "run", "recipe.yaml", "--force", **job)
        assert code == 0, printed
        for work in ("quantize int4", "evaluate baseline", "evaluate int4"):
            said = f"{work}: out of memory, batches of " in printed
            assert said == (name == "narrow"), printed
        found.append(report(directory))
    roomy, narrow = (
        {row["name"]: row["quality"][0]["perplexity"] for row in made["variants"]} for made in found
    )
    assert narrow["baseline"] == pytest.approx(roomy["baseline"], rel=1e-6)
    assert narrow["int4"] == pytest.approx(roomy["int4"], rel=1e-3)  # sums in another order
