"""Whole runs of variants that speculate, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import RecipeError
from compressor.recipe import load_recipe
from compressor.verify import verify
from tests.projects import RECIPE, completed, write

SMALL = {"epochs": 1, "batch_size": 4}
METHODS = {
    "medusa": {"medusa": {"heads": 2, **SMALL}},
    "eagle3": {"eagle3": {"depth": 2, "draft_vocabulary": 128, "aux_layers": [0, 1], **SMALL}},
    "draft": {"draft": {"blocks": 1, "depth": 2, **SMALL}},
    "ngram": "ngram",
}


def recipe(**variants: Any) -> dict[str, Any]:
    return {
        **{key: RECIPE[key] for key in ("version", "model", "export")},
        "speculation": {
            "samples": 12,
            "held_out": 4,
            "input_length": 160,
            "output_length": 12,
            "test_samples": 4,
            "sweep": [1, 2],
        },
        "variants": {"int4": RECIPE["variants"]["int4-rtn"], **variants},
    }


def test_every_method_is_trained_tried_and_exported(project: Path) -> None:
    variants = {name: {"from": "int4", "speculate": how} for name, how in METHODS.items()}
    made = completed(project, recipe(**variants))
    (run,) = (project / "runs" / "recipe").iterdir()
    found = {v["name"]: v for v in made["variants"]}
    sizes = {v["size_bytes"] for name, v in found.items() if name in METHODS or name == "int4"}
    assert len(sizes) == 1  # of the model alone: the same artifact for all
    for name in METHODS:
        speculation = found[name]["speculation"]
        assert speculation["method"] == name
        for result in speculation["results"].values():
            assert result["sequences"] == 4
            assert all(tie < 1e-3 for tie in result["ties"])
            assert 1 <= result["tokens_per_step"] <= 1 + speculation["depth"]
        formats = {a["format"] for a in found[name]["artifacts"]}
        extra = {"medusa": "medusa", "eagle3": "speculators", "draft": "draft-model"}.get(name)
        assert formats == {"compressed-tensors"} | ({extra} if extra else set())
        rows = (run / "acceptance" / f"{name}.jsonl").read_text().splitlines()
        assert len(rows) == 4 * (1 + len(speculation["results"]))
        sizes_at_once = {row["batch_size"] for row in speculation["times"]}
        assert sizes_at_once == {1, 2}
    assert set(found["medusa"]["speculation"]["results"]) == {"chain", "tree"}
    assert found["medusa"]["speculation"]["losses"]
    assert found["int4"]["speculation"] is None
    assert [failure.sentence for failure in verify(run).failures] == []
    rows = json.loads((run / "stages.json").read_text())
    next(row for row in rows if row["kind"] == "accept")["result"]["results"]["chain"]["steps"] += 1
    (run / "stages.json").write_text(json.dumps(rows))
    assert any("results.chain.steps" in failure.key for failure in verify(run).failures)


def test_heads_of_the_baseline_on_a_quantized_target(project: Path) -> None:
    how = {**METHODS["medusa"], "trained_on": "baseline"}
    made = completed(project, recipe(heads={"from": "int4", "speculate": how}))
    (heads,) = [v for v in made["variants"] if v["name"] == "heads"]
    assert heads["speculation"]["trained_on_baseline"]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"from": "b", "speculate": "ngram"}}, "'b' is no variant"),
        ({"a": {"from": "a"}}, "starts from itself"),
        ({"a": {"from": "int4", "speculate": {"ngram": {}, "medusa": {}}}}, "give one of medusa"),
        ({"a": {"from": "int4", "speculate": {"ngram": {"shortest": 5}}}}, "shortest must not"),
        ({"a": {"from": "int4", "speculate": {"medusa": {"head": 4}}}}, "did you mean 'heads'"),
    ],
)
def test_what_cannot_be_is_told_with_its_line(
    project: Path, variants: dict[str, Any], message: str
) -> None:
    path = write(project, recipe(**variants))
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    line = int(str(error.value.where).rsplit(":", 1)[1])
    assert path.read_text().splitlines()[line - 1].strip()


def test_a_variant_takes_what_it_does_not_give_from_another(project: Path) -> None:
    path = write(project, recipe(a={"from": "int4", "speculate": "ngram"}, b={"from": "a"}))
    found = load_recipe(path)
    assert json.dumps(found.variants["b"].model_dump(exclude={"base"}), default=str) == json.dumps(
        found.variants["a"].model_dump(exclude={"base"}), default=str
    )
