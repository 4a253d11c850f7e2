"""Recipes: what is read, and one clear error with file and line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.quantize import registry
from compressor.recipe import load_recipe, recipe_model, recipe_schema
from compressor.reference import render
from compressor.starter import default_file, starter

ROOT = Path(__file__).parent.parent
GOOD = """\
version: 1
model: {source: org/name}
calibration: {source: "builtin:calibration"}
variants:
  int4:
    quantize:
      - gptq: {scheme: W4A16, group_size: 64}
"""


WATERFALL = "measure:\n  waterfall:\n"

# Fragments that reach the corners of YAML: tags, anchors, merges, dates, bases, documents.
PIECES = (
    "output: ", "x: ", "? ", ": ", "- ", "variants: ", "model: ", "baseline", "~", "null",
    "!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!foo ",
    "!!python/name:os.system ", "&a ", "*a ", "<<: ", "= ", "2001-99-99", "0x_", "0b_", "1:99",
    "1" * 5000, "'", '"', '"\\ud800"', "{", "}", "[", "]", ",", "|", ">-", "#", "%YAML 9.9",
    "---", "...", "\n", "\n  ", "\t", "\0",
)  # fmt: skip


def load(tmp_path: Path, text: str | bytes) -> object:
    path = tmp_path / "my-recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path)


def test_defaults_are_filled_in_and_locked(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    lock = recipe.lock()  # type: ignore[attr-defined]
    assert lock["name"] == "my-recipe"
    assert lock["calibration"]["samples"] == 128
    (step,) = lock["variants"]["int4"]["quantize"]
    assert step["gptq"]["group_size"] == 64 and step["gptq"]["damp"] == 0.01
    again = load(tmp_path, yaml.safe_dump(lock))
    assert again.lock() == lock  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("head", "scheme", "group_size"),
    [
        ("{}", "W8A16", None),
        ("{scheme: W4A16}", "W4A16", 64),  # the quantizer's
        ("{scheme: W4A16, group_size: 32}", "W4A16", 32),
        ("{scheme: W4A16, group_size: -1}", "W4A16", -1),
        ("{scheme: W8A8}", "W8A8", None),
    ],
)
def test_the_output_layer_has_a_scheme_of_its_own(
    tmp_path: Path, head: str, scheme: str, group_size: int | None
) -> None:
    text = GOOD.replace("group_size: 64", "group_size: 64, symmetric: false, desc_act: true")
    recipe = load(tmp_path, text + f"    lm_head: {head}\n")
    variant = recipe.variants["int4"]  # type: ignore[attr-defined]
    (options,) = variant.lm_head.step(variant.quantizer).values()
    assert options["scheme"] == scheme and options["group_size"] == group_size
    assert options["symmetric"] and options["desc_act"]
    registry.get("gptq").Options(**options)
    again = load(tmp_path, yaml.safe_dump(recipe.lock()))  # type: ignore[attr-defined]
    assert again.lock() == recipe.lock()  # type: ignore[attr-defined]
    plain = load(tmp_path, text).variants["int4"]  # type: ignore[attr-defined]
    assert plain.lm_head is None


def test_a_variant_may_be_served_otherwise_and_not_quantized(tmp_path: Path) -> None:
    text = GOOD + "  v: {serve: {flags: [-a, b]}}\n  w: {quantize: [], serve: {dtype: float32}}\n"
    recipe = load(tmp_path, text + "measure: {engine: vllm}\n")
    variants = recipe.variants  # type: ignore[attr-defined]
    assert variants["v"].serve.given == {"flags": ["-a", "b"]}
    assert not variants["v"].quantize and not variants["w"].quantize
    assert variants["v"].library is None and variants["int4"].serve is None
    again = load(tmp_path, yaml.safe_dump(recipe.lock()))  # type: ignore[attr-defined]
    assert again.lock() == recipe.lock()  # type: ignore[attr-defined]


def test_an_algorithm_may_be_named_alone(tmp_path: Path) -> None:
    text = "version: 1\nmodel: {source: a/b}\nvariants: {v: {quantize: [rtn]}}\n"
    (step,) = load(tmp_path, text).variants["v"].quantize  # type: ignore[attr-defined]
    assert step.dump()["rtn"]["scheme"] == "W4A16"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (GOOD.replace("calibration:", "calibraton:"), 3, "did you mean 'calibration'"),
        (GOOD.replace("group_size", "groupsize"), 7, "did you mean 'group_size'"),
        (GOOD.replace("gptq", "gptqq"), 7, "did you mean 'gptq'"),
        (GOOD.replace("64", "many"), 7, "valid integer"),
        (GOOD.replace("W4A16", "W4"), 7, "unknown scheme 'W4'"),
        (GOOD.replace("int4:", "../int4:"), 5, "match pattern"),
        (GOOD.replace("int4:", "baseline:"), 5, "always there"),
        (GOOD.replace("version: 1", "version: 2"), 1, "version"),
        (GOOD.replace("model: {source: org/name}", "model: {}"), 2, "model.source is missing"),
        (GOOD.replace("model: {source: org/name}\n", ""), 1, "model is missing"),
        (GOOD.replace('calibration: {source: "builtin:calibration"}\n', ""), 4, "`calibration:`"),
        (GOOD + "version: 1\n", 8, "there twice"),
        (GOOD + "\tx: 1\n", 8, "not valid YAML"),
        (GOOD + "evaluate: &a {texts: []}\nmeasure: *a\n", 8, "aliases"),
        (GOOD + "output: !!python/object/apply:os.system [ls]\n", 8, "not a plain value"),
        (GOOD + "output: !!int ''\n", 8, "cannot be read as int"),
        (GOOD + "output: !!bool maybe\n", 8, "cannot be read as bool"),
        (GOOD + "output: !!timestamp x\n", 8, "not a plain value: !!timestamp"),
        (GOOD + 'output: "\\ud800"\n', 8, "cannot be read as str"),
        (GOOD + 'output: "a\\0b"\n', 8, "cannot be read as str"),
        (GOOD + "output: \0\n", 8, "control character U+0000"),
        (GOOD + "<<: {output: x}\n", 8, "key '<<' is not text"),
        (GOOD + "on: x\n", 8, "key 'on' is not text"),
        (GOOD + "? [a]\n: b\n", 8, "a key must be plain text"),
        (GOOD + "path: x\n", 8, "unknown key 'path'"),
        (GOOD + "---\na: 1\n", 8, "another document"),
        (GOOD + "output: 8\n", 8, "output: input should be text"),
        (GOOD + "measure: [1]\n", 8, "measure: input should be a mapping"),
        (GOOD + "measure: {prices: {watts: .inf}}\n", 8, "finite number"),
        (GOOD.replace("int4:", "8:"), 5, "key '8' is not text"),
        (GOOD.replace("int4:", "..:"), 5, "match pattern"),
        (GOOD.replace("int4:", "a/b:"), 5, "match pattern"),
        (GOOD.replace("int4:", "/etc:"), 5, "match pattern"),
        (GOOD.replace("- gptq", "- rtn: {}\n      - gptq"), 6, "exactly one step"),
        (
            GOOD.replace("- gptq", "- coordinate_descent\n      - gptq"),
            6,
            "steps come in this order",
        ),
        (
            GOOD + "      - distillation\n      - coordinate_descent\n",
            6,
            "distillation looks at the whole quantized model: it comes last",
        ),
        (
            GOOD + "      - distillation\n    kv_cache: fp8\n",
            5,
            "`kv_cache:` does not go with distillation",
        ),
        (
            GOOD.replace("W4A16, group_size: 64", "FP8") + "      - coordinate_descent\n",
            8,
            "quantize.1.coordinate_descent: it works on an integer grid, which scheme FP8 is not: "
            "remove this step",
        ),
        (
            GOOD.replace("W4A16, group_size: 64", "FP8") + "      - signround: {iterations: 2}\n",
            8,
            "choose a scheme of integers",
        ),
        (GOOD.replace("W4A16", "FP8"), 7, "leave out group_size"),
        (
            GOOD + "    precision: {schemes: [W4A16, FP8], mean_bits: 5}\n",
            8,
            "one scale per output channel",
        ),
        (
            GOOD.replace(", group_size: 64", "")
            + "      - signround\n    precision: {schemes: [W4A16, FP8], mean_bits: 5}\n",
            8,
            "which scheme FP8 is not",
        ),
        (GOOD + "    kv_cache: fp4\n", 8, "'fp8' or 'int8'"),
        (
            "version: 1\nmodel: {source: a/b}\nvariants:\n  v: {quantize: [rtn], kv_cache: fp8}\n",
            4,
            "the scales of kv_cache need a `calibration:`",
        ),
        (GOOD + "evaluate: {texts: [{name: a/b, source: x}]}\n", 8, "match pattern"),
        (GOOD + "    lm_head: {scheme: W3A16}\n", 8, "'W8A16', 'W4A16' or 'W8A8'"),
        (GOOD + "    lm_head: {group_size: 0}\n", 8, "must be positive"),
        (GOOD + "    lm_head: {scheme: W8A8, group_size: 64}\n", 8, "remove group_size"),
        (GOOD + "    lm_head: {symmetric: false}\n", 8, "unknown key 'symmetric'"),
        (GOOD + "    lm_head: {}\n    ignore: [lm_.*]\n", 5, "what `ignore` leaves as it is"),
        (GOOD + "measure: {workload: {concurrency: [0]}}\n", 8, "greater than or equal to 1"),
        (GOOD + "  v: {}\n", 8, "give `quantize:`"),
        (GOOD + "  v: {serve: {}}\nmeasure: {}\n", 8, "give at least one of batching"),
        (GOOD + "  v: {serve: {batching: none}}\nmeasure: {}\n", 8, "'continuous' or 'static'"),
        (GOOD + "  v: {serve: {batching: static}}\n", 8, "add a `measure:` section"),
        (
            GOOD + "  v: {serve: {batching: static}, kv_cache: fp8}\nmeasure: {}\n",
            8,
            "`kv_cache:` needs `quantize:`",
        ),
        (
            GOOD + "  v:\n    serve:\n      dtype: auto\n      flags: [x]\nmeasure: {}\n",
            11,
            "engine transformers has no such setting; it has batching and dtype",
        ),
        (GOOD + "    serve: {batching: static}\nmeasure: {engine: vllm}\n", 8, "it has dtype and"),
        (GOOD + WATERFALL + "    - {variant: int3, technique: x}\n", 10, "'int3' is not measured"),
        (GOOD + WATERFALL + "    - {variant: int4}\n", 9, "nothing beside the starting point"),
        (
            GOOD + WATERFALL + "    - {variant: baseline}\n    - {variant: int4}\n",
            11,
            "say what it adds",
        ),
        (
            GOOD + WATERFALL + "    - {variant: baseline, technique: x}\n",
            10,
            "is the starting point",
        ),
        (
            GOOD + WATERFALL + 2 * "    - {variant: int4, technique: int4}\n",
            11,
            "int4 is a step already",
        ),
        (GOOD + WATERFALL + "    - {variant: int4, technic: int4}\n", 10, "mean 'technique'"),
        (
            GOOD + "measure: {workload: {output_length_range: [9, 8]}}\n",
            8,
            "the lowest length comes first",
        ),
        (GOOD + "measure: {workload: {output_length_range: [8]}}\n", 8, "at least 2 items"),
        (
            GOOD + "measure: {workload: {split: true, concurrency: [], rate_per_s: [1]}}\n",
            8,
            "it needs points of a closed loop",
        ),
        (
            GOOD + "measure:\n  engine: endpoint\n  endpoints: {baseline: {url: x, model: m}}\n"
            "  workload: {split: true}\n",
            11,
            "list prices are of input and output tokens already",
        ),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)
    assert f"my-recipe.yaml:{line}:" in str(caught.value)
    assert caught.value.fix and caught.value.exit_code == 2


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, GOOD.replace("source: org", "sorce: org").replace("64", "x"))
    message = str(caught.value)
    assert "'sorce'" in message and "valid integer" in message and "my-recipe.yaml:7" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "yaml:1: the file is empty"),
        (b"# only a comment\n", "empty"),
        (b"- a\n- b\n", "mapping"),
        (b"just text", "mapping"),
        (b"version: 1\n\xff\xfe", r"yaml:2: the file is not UTF-8 \(byte 11\)"),
        (b"x" * 2_000_000, "too large"),
        (b"[" * 500, "YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, content)


@pytest.mark.timeout(60)
def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 200)
    )
    with pytest.raises(RecipeError, match="aliases"):
        load(tmp_path, bomb)


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(RecipeError, match="too large"):
        load_recipe(Path("/dev/zero"))


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my recipe.yaml", "my-recipe"),
        ("..x.yaml", "x"),
        ("é.yaml", "recipe"),
        ("a" * 90, "a" * 64),
    ],
)
def test_a_name_is_made_from_any_file_name(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_text(GOOD)
    recipe = load_recipe(tmp_path / file)
    assert recipe.name == name
    assert recipe.path == tmp_path / file and recipe.base_dir == tmp_path
    assert recipe.output_dir == tmp_path / "runs" and recipe.store_dir == tmp_path / ".compressor"
    assert recipe.model_copy(update={"output": "/elsewhere"}).path == recipe.path


def test_options_of_a_third_party_algorithm_are_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ternary:
        """Three levels."""

        class Options(registry.AlgorithmOptions):
            threshold: float = 0.5

            @property
            def needs_calibration(self) -> bool:
                return False

        kind = "weights"

    monkeypatch.setitem(registry._REGISTRY, "ternary", Ternary)
    recipe_model.cache_clear()
    try:
        text = "version: 1\nmodel: {source: a/b}\nvariants:\n  v:\n    quantize: [ternary: {%s}]\n"
        (step,) = load(tmp_path, text % "threshold: 1").variants["v"].quantize  # type: ignore[attr-defined]
        assert step.dump() == {"ternary": {"threshold": 1.0}} and not step.needs_calibration
        with pytest.raises(RecipeError, match=r"yaml:5: .*did you mean 'threshold'"):
            load(tmp_path, text % "treshold: 1")
    finally:
        recipe_model.cache_clear()


def test_own_prompts_have_no_given_answers(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"yaml:\d+: .*needs a file or data set of dialogues"):
        load(tmp_path, GOOD + "speculation: {prompts: own, answers: given}\n")


def test_missing_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"did you mean .*quickstart\.yaml"):
        load_recipe(tmp_path / "quikstart.yaml")


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.binary(max_size=200),
        st.lists(st.sampled_from(PIECES), max_size=12).map(lambda parts: GOOD + "".join(parts)),
        st.tuples(st.integers(0, len(GOOD)), st.text(max_size=8)).map(
            lambda cut: GOOD[: cut[0]] + cut[1] + GOOD[cut[0] :]
        ),
    )
)
def test_nothing_but_a_recipe_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        load_recipe(path)
    except RecipeError as error:
        assert str(error)


def test_published_schema_and_reference_are_current() -> None:
    schema = recipe_schema()
    assert json.loads((ROOT / "schema" / "recipe.schema.json").read_text()) == schema
    assert (ROOT / "docs" / "recipe.md").read_text() == render(schema)


def test_every_key_is_documented() -> None:
    def check(name: str, section: dict) -> None:
        for key, value in section.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key} has no description"

    schema = recipe_schema()
    check("Recipe", schema)
    for name, section in schema["$defs"].items():
        check(name, section)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_committed_recipes_are_valid(path: Path) -> None:
    load_recipe(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), recipe_schema())


@pytest.mark.parametrize(
    "source",
    ["Qwen/Qwen3-0.6B", "./a dir/m.gguf", "package:x/y.gguf", 'a"b: c', "123", "no", "1e3"],
)
def test_starter_recipe_is_valid(tmp_path: Path, source: str) -> None:
    path = tmp_path / default_file(source)
    path.write_text(starter(source, path.name))
    assert load_recipe(path).model.source == source


@pytest.mark.parametrize(
    ("change", "more", "match"),
    [
        ("", "    kv_cache: int8\n", "no scales of cached keys"),
        (", desc_act: true, static_groups: false", "", "set static_groups beside"),
        ("", "measure: {}\n", "serves the compressed-tensors artifacts"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_the_run(
    tmp_path: Path, change: str, more: str, match: str
) -> None:
    good = GOOD.replace("group_size: 64", "group_size: 64, desc_act: true")
    assert load(tmp_path, good + "export: [gguf]\n").export == ["gguf"]  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="add gguf to `export:`"):
        load(tmp_path, GOOD + "gguf: {embeddings: Q8_0}\n")
    with pytest.raises(RecipeError, match=match):
        load(tmp_path, GOOD.replace("group_size: 64", f"group_size: 64{change}") + more
             + "export: [gguf]\n")  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "change", "more", "match"),
    [
        ("gptq", "", "    kv_cache: fp8\n", "no scales of cached keys"),
        ("gptq", "scheme: W8A8", "", "holds no W8A8: use W2A16 or W4A16 or W8A16"),
        ("awq", "scheme: W8A16", "", "holds no W8A16"),
        ("awq", "", "    lm_head: {}\n", "holds no such output layer"),
        ("awq", "", "    precision: {mean_bits: 5}\n", "one scheme for all layers"),
        ("awq", "desc_act: true, static_groups: false", "", "set static_groups beside"),
        ("safetensors", "", "gptq: {}\n", "add gptq to `export:`"),
        ("onnx", "", "", "optimum-onnx"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_run(
    tmp_path: Path, fmt: str, change: str, more: str, match: str
) -> None:
    key = change.partition(":")[0]
    options = "scheme: W4A16, group_size: 64"
    if key == "scheme":
        options = change
    elif change:
        options += f", {change}"
    text = GOOD.replace("scheme: W4A16, group_size: 64", options) + more
    with pytest.raises(RecipeError, match=match):
        load(tmp_path, f"{text}export: [{fmt}]\n")


def test_what_is_imported_is_not_quantized_again(tmp_path: Path) -> None:
    own = "      - gptq: {scheme: W4A16, group_size: 64}\n"
    given = "    import: {source: theirs}\n"
    made = load(tmp_path, GOOD.replace("    quantize:\n" + own, given))
    assert made.variants["int4"].imported.source == "theirs"  # type: ignore[attr-defined]
    lock = made.lock()  # type: ignore[attr-defined]
    assert lock["variants"]["int4"]["import"] == {"source": "theirs", "revision": None}
    assert load(tmp_path, yaml.safe_dump(lock)).lock() == lock  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="`quantize:` or `import:`"):
        load(tmp_path, GOOD + given)
