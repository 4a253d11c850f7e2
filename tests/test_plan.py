"""Stages and their inputs; of what parts estimates are made, and that more work never counts as
less."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compressor.estimates import ModelFacts, Speed, role_of
from compressor.plan import make_plan
from compressor.quantize import registry
from compressor.recipe import load_recipe
from compressor.store import Store
from tests import tiny

FACTS = ModelFacts("LlamaForCausalLM", 134_515_008, 576, 1536, 30, 49152)
TOKENS, LENGTH = 16 * 512, 512


class Fixed(Speed):
    """A machine of known speed, so that estimates can be compared."""

    def product(self, dtype: str) -> float:  # type: ignore[override]
        return {"float32": 2e11, "bfloat16": 4e11}[dtype]


def steps(*names: str, **options: Any) -> tuple[list[Any], list[str]]:
    made = [registry.get(name).Options(**(options if i else {})) for i, name in enumerate(names)]
    if len(names) == 1:
        made = [registry.get(names[0]).Options(**options)]
    return made, [role_of(name) for name in names]


def seconds(
    *names: str,
    tokens: int = TOKENS,
    dtype: str = "bfloat16",
    one_pass: bool = True,
    **options: Any,
) -> dict[str, float]:
    made, roles = steps(*names, **options)
    return Fixed(FACTS).quantize_seconds(tokens, LENGTH, made, roles, dtype, one_pass)


def memory(*names: str, tokens: int = TOKENS, **options: Any) -> dict[str, int]:
    made, roles = steps(*names, **options)
    return Fixed(FACTS).quantize_memory(tokens, LENGTH, made, roles, 8, "bfloat16")


def test_rounding_to_nearest_has_no_pass_over_tokens() -> None:
    assert set(seconds("rtn", tokens=0)) == {"start", "save"}
    parts = memory("rtn", tokens=0)
    assert not parts["waiting"] and not parts["activations"] and not parts["statistics"]


def test_one_sequential_pass_is_half_of_two() -> None:
    one, two = seconds("gptq"), seconds("gptq", true_sequential=False)
    assert two["forward"] == pytest.approx(2 * one["forward"])
    assert two["statistics"] == one["statistics"] and two["solve"] == one["solve"]
    assert memory("gptq")["waiting"] > 0 == memory("gptq", true_sequential=False)["waiting"]


def test_without_memory_to_wait_in_there_is_a_pass_for_each_group() -> None:
    waits, turns = seconds("gptq"), seconds("gptq", one_pass=False)
    assert turns["forward"] == pytest.approx(5 * waits["forward"])  # q/k/v, o, gate/up, down, next
    assert turns["statistics"] == pytest.approx(4 * waits["statistics"])


def test_waiting_batches_count_only_where_memory_holds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = memory("gptq")["waiting"]
    # As driver._suspended_fits reckons: eight activations of the hidden width, two of the widest.
    assert held == TOKENS * (8 * 576 + 2 * 1536) * 2
    monkeypatch.setattr("compressor.numerics.memory.free_bytes", lambda: int(held / 0.4) - 10)
    assert memory("gptq")["waiting"] == 0
    made, roles = steps("gptq")
    estimate = Fixed(FACTS).quantize(TOKENS, LENGTH, made, roles, dtype="bfloat16")
    assert estimate.least_memory == estimate.memory_bytes
    monkeypatch.setattr("compressor.numerics.memory.free_bytes", lambda: 10 * held)
    roomy = Fixed(FACTS).quantize(TOKENS, LENGTH, made, roles, dtype="bfloat16")
    assert roomy.memory_bytes == roomy.least_memory + held
    assert roomy.seconds < estimate.seconds


def test_bfloat16_halves_passes_but_not_solving() -> None:
    half, full = seconds("gptq"), seconds("gptq", dtype="float32")
    assert full["forward"] == pytest.approx(2 * half["forward"])
    assert full["statistics"] == pytest.approx(2 * half["statistics"])
    assert full["solve"] == half["solve"]


def test_a_transform_costs_a_pass_of_its_own_and_its_search() -> None:
    plain, awq = seconds("gptq"), seconds("awq", "gptq")
    assert awq["forward"] == pytest.approx(2 * plain["forward"])
    assert awq["solve"] > plain["solve"]
    assert memory("awq", "gptq")["batch"] == 2 * memory("gptq")["batch"]  # in float32


def test_a_block_refinement_follows_the_original_too() -> None:
    plain, refined = seconds("gptq"), seconds("gptq", "signround")
    assert refined["forward"] == pytest.approx(3 * plain["forward"])
    assert memory("gptq", "signround")["activations"] == 2 * memory("gptq")["activations"]


def test_a_gguf_export_holds_one_tensor() -> None:
    speed = Fixed(FACTS)
    plain = speed.export("gguf", quantized=False)
    linears = speed.export("gguf", quantized=True)
    assert plain.memory_bytes == linears.memory_bytes == speed.BASE_MEMORY + 4 * 49152 * 576
    head = speed.export("gguf", quantized=True, head=True)
    assert head.least_memory == head.memory_bytes == speed.BASE_MEMORY + 40 * 49152 * 576
    other = speed.export("compressed-tensors", quantized=True)
    assert linears.disk_bytes == 2 * other.disk_bytes  # the tensors, and the file


@pytest.mark.parametrize(
    ("engine", "served"), [("transformers", "compressed-tensors"), ("llama.cpp", "gguf")]
)
def test_what_is_measured_is_what_the_engine_serves(
    tmp_path: Path, engine: str, served: str
) -> None:
    tiny.build("llama", tmp_path / "model")
    recipe = {
        "version": 1,
        "model": {"source": "model"},
        "variants": {"int8": {"quantize": [{"rtn": {"scheme": "W8A16"}}]}},
        "measure": {"engine": engine},
        "export": ["compressed-tensors", "gguf"],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))
    (stage,) = [stage for stage in plan.stages if stage.kind == "measure"]
    assert stage.inputs == ("load", f"export:baseline:{served}", f"export:int8:{served}")


def test_an_artifact_that_variants_share_is_proven_once(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    int8 = {"quantize": [{"rtn": {"scheme": "W8A16"}}]}
    recipe = {
        "version": 1,
        "model": {"source": "model"},
        "variants": {
            "int8": int8,
            "int8-ngram": {"from": "int8", "speculate": "ngram"},
            "int4": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]},
        },
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))
    keys = {stage.variant: stage.key for stage in plan.stages if stage.kind == "verify"}
    assert keys["int8"] == keys["int8-ngram"] != keys["int4"]


def test_speculators_of_one_target_learn_from_one_corpus(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    recipe = {
        "version": 1,
        "model": {"source": "model"},
        "variants": {
            "heads": {"speculate": {"medusa": {}}},
            "draft": {"speculate": {"draft": {"blocks": 1}}},
            "eagle": {"speculate": {"eagle3": {}}},
        },
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), Store(tmp_path / "store"))

    def keys(kind: str) -> dict[str | None, str]:
        return {stage.variant: stage.key for stage in plan.stages if stage.kind == kind}

    assert len(set(keys("corpus").values())) == 1
    states = keys("features")
    assert states["heads"] == states["draft"] != states["eagle"]
    assert len(set(keys("speculate").values())) == 3


@given(
    tokens=st.integers(1, 1 << 20),
    more=st.integers(1, 1 << 20),
    field=st.sampled_from(["parameters", "hidden", "intermediate", "layers"]),
    names=st.sampled_from([("rtn",), ("gptq",), ("awq", "gptq"), ("gptq", "signround")]),
)
def test_more_never_takes_less(tokens: int, more: int, field: str, names: tuple[str, ...]) -> None:
    made, roles = steps(*names)

    def parts(facts: ModelFacts, tokens: int) -> dict[str, float]:
        speed = Fixed(facts)
        found: dict[str, float] = dict(
            speed.quantize_memory(tokens, 512, made, roles, 8, "float32")
        )
        found.pop("waiting")  # which memory may not hold
        found.pop("embeddings")  # what they take beyond the blocks
        found |= speed.quantize_seconds(tokens, 512, made, roles, "float32", True)
        return found

    few = parts(FACTS, tokens)
    assert all(value >= 0 for value in few.values())
    for larger in (
        parts(FACTS, tokens + more),
        parts(dataclasses.replace(FACTS, **{field: getattr(FACTS, field) + more}), tokens),
    ):
        if field in ("hidden", "layers"):  # blocks of the same model shrink when those grow
            for key in ("block", "save", "forward", "solve"):
                larger.pop(key, None)
        assert all(larger[key] >= few[key] for key in larger)
