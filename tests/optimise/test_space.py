"""The candidates of a space, and what a recipe may say of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import RecipeError
from compressor.optimise.space import CandidateSpace
from compressor.recipe import derive, load_recipe, variant_values

BASE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "a/b"},
    "calibration": {"source": "builtin:calibration"},
    "optimise": {
        "minimise": "size",
        "subject_to": {"max_loss": "1%"},
        "space": {"algorithms": [["rtn"]], "schemes": ["W4A16"]},
    },
    "evaluate": {"texts": [{"name": "novel", "source": "builtin:novel"}]},
}


def recipe(directory: Path, **changes: Any) -> Any:
    """`BASE` with changes at dotted places (``__`` for the dot)."""
    value = json.loads(json.dumps(BASE))
    for place, new in changes.items():
        inner, (*parents, last) = value, place.split("__")
        for parent in parents:
            inner = inner[parent]
        if new is None:
            inner.pop(last)
        else:
            inner[last] = new
    path = directory / "r.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return load_recipe(path)


def space(directory: Path, **lists: Any) -> CandidateSpace:
    return CandidateSpace(recipe(directory, optimise__space=lists))


def test_every_combination_that_means_something_is_there_once(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        algorithms=[["rtn"], ["smoothquant", "gptq"]],
        schemes=["W8A8", "W4A16"],
        group_sizes=[32, 64],
        kv_cache=[None, "fp8"],
    )
    assert found.size == 16
    assert len(found.pool) == 12  # W8A8 has no groups
    made = {(c.algorithm, c.scheme, c.choice["kv_cache"]) for c in found.pool}
    assert len(made) == 8
    grouped = next(c for c in found.pool if c.scheme == "W4A16" and c.choice["group_size"] == "64")
    assert grouped.parsed.quantizer.options.group_size == 64
    assert len({c.name for c in found.pool}) == 12


def test_names_and_order_are_those_of_the_recipe_each_time(tmp_path: Path) -> None:
    lists = {"algorithms": [["gptq"], ["rtn"]], "schemes": ["W4A16", "W8A16"]}
    first, again = space(tmp_path, **lists), space(tmp_path, **lists)
    assert [c.name for c in first.pool] == [c.name for c in again.pool]


def test_a_candidate_that_the_recipe_has_too_keeps_its_name(tmp_path: Path) -> None:
    mine = {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 64}}]}
    made = recipe(
        tmp_path,
        variants={"mine": mine},
        optimise__space={
            "algorithms": [["rtn"]], "schemes": ["W4A16", "W8A16"], "group_sizes": [64]
        },
    )  # fmt: skip
    names = {c.scheme: c.name for c in CandidateSpace(made).pool}
    assert names["W4A16"] == "mine" and names["W8A16"].startswith("c-")


def test_a_large_space_is_sampled_with_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.optimise.space.POOL", 20)
    lists = {
        "algorithms": [["rtn"], ["gptq"], ["awq", "gptq"]],
        "schemes": ["W4A16", "W3A16", "W2A16"],
        "group_sizes": [32, 64, 128],
    }
    pools = []
    for seed in (0, 0, 1):
        made = recipe(tmp_path, optimise__seed=seed, optimise__space=lists)
        pools.append([c.name for c in CandidateSpace(made).pool])
    assert pools[0] == pools[1] != pools[2] and 5 < len(pools[0]) <= 20


def test_what_does_not_go_together_is_left_out(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        algorithms=[["gptq"], ["gptq", "distillation"], ["bitsandbytes"]],
        schemes=["W4A16"],
        kv_cache=[None, "fp8"],
        precision=[{"mean_bits": 5, "schemes": ["W4A16", "W8A16"]}],
    )
    made = {(c.algorithm, c.parsed.kv_cache, c.parsed.precision is not None) for c in found.pool}
    assert ("gptq", "fp8", True) in made and ("gptq+distillation", None, False) in made
    assert not any("distillation" in name and cache for name, cache, _ in made)
    assert [one for one in made if one[0] == "bitsandbytes"] == [("bitsandbytes", None, False)]


def test_a_scheme_of_a_step_stays(tmp_path: Path) -> None:
    own = {"scheme": "W8A8", "activations": "dynamic-asymmetric"}
    found = space(tmp_path, algorithms=[["rtn"], [{"gptq": own}]], schemes=["W8A16", "W4A16"])
    made = [(c.algorithm, c.scheme) for c in found.pool]
    assert made == [("rtn", "W8A16"), ("rtn", "W4A16"), ("gptq", "W8A8")]


def test_codes_do_not_change_the_class_of_speed_and_serving_does(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        algorithms=[
            ["rtn"],
            ["awq", {"gptq": {"damp": 0.05}}],
            [{"gptq": {"desc_act": True, "static_groups": False}}],
        ],
        schemes=["W4A16", "W8A16"],
        lm_head=[None, {"scheme": "W8A16"}],
    )
    assert len(found.pool) == 12
    by = {(c.algorithm, c.scheme, c.choice["lm_head"]): c for c in found.pool}
    one = by["rtn", "W4A16", "none"]
    assert one.speed_class == by["awq+gptq", "W4A16", "none"].speed_class
    assert one.form == by["awq+gptq", "W4A16", "none"].form
    assert one.form != by["gptq", "W4A16", "none"].form  # it has an index of groups
    assert one.form != by["rtn", "W8A16", "none"].form
    assert one.speed_class != by["rtn", "W4A16", "scheme(W8A16)"].speed_class


def test_the_untouched_model_may_be_served_otherwise(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        measure={"engine": "vllm"},
        optimise__minimise="cost",
        optimise__space={
            "algorithms": [[], ["rtn"]],
            "schemes": ["W4A16"],
            "serve": [None, {"flags": ["--max-num-seqs", "64"]}],
            "speculate": [None, {"ngram": {"depth": 3}}],
        },
    )
    pool = CandidateSpace(made).pool
    bare = [c for c in pool if not c.parsed.quantize]
    assert len(pool) == 7 and len(bare) == 3  # that which changes nothing is the baseline


def test_a_derived_recipe_is_an_ordinary_one(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        variants={
            "a": {"quantize": ["rtn"], "ignore": ["x"]},
            "b": {"from": "a", "quantize": [{"rtn": {"scheme": "W8A16"}}]},
        },
    )
    values = variant_values(made)
    assert values["b"] == {"ignore": ["x"], "quantize": [{"rtn": {"scheme": "W8A16"}}]}
    plain = derive(made, variants={"b": values["b"]}, evaluate=None)
    assert plain.optimise is None and plain.evaluate is None and list(plain.variants) == ["b"]
    assert plain.variants["b"].ignore == ["x"] and plain.path == made.path
    with pytest.raises(RecipeError, match="quantize"):
        derive(made, variants={"c": {"quantize": ["smoothquant"]}})


@pytest.mark.parametrize(
    ("changes", "line", "words"),
    [
        ({"optimise__space__algorithms": [["rnt"]]}, "rnt", "did you mean 'rtn'"),
        ({"optimise__space__schemes": ["W9A16"]}, "W9A16", "W9A16"),
        (
            {"optimise__space__algorithms": [["gptq", "smoothquant"]]},
            "- gptq",
            "steps come in this order",
        ),
        ({"optimise__minimise": "cost"}, "minimise: cost", "`measure:`"),
        ({"optimise__subject_to": {"metrics": {"acc": 0.01}}}, "acc:", "evaluate.tasks"),
        ({"optimise__subject_to": {}}, "subject_to", "max_loss"),
        ({"evaluate": None}, "subject_to", "`evaluate:`"),
        (
            {
                "optimise__minimise": "cost",
                "optimise__concurrency": 9,
                "measure": {"engine": "transformers"},
            },
            "concurrency: 9",
            "[1, 4]",
        ),
        ({"optimise__subject_to": {"max_loss": 0.01, "goal_met": 0.9}}, "goal_met", "slo"),
        ({"calibration": None, "optimise__space__algorithms": [["gptq"]]}, "- gptq", "calibration"),
    ],
)
def test_errors_name_file_and_line(
    tmp_path: Path, changes: dict[str, Any], line: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, **changes)
    text = str(caught.value)
    lines = (tmp_path / "r.yaml").read_text().splitlines()
    numbers = [number for number, content in enumerate(lines, 1) if line in content]
    assert words in text
    assert any(f"r.yaml:{number}:" in text for number in numbers), (text, numbers)
