from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import RecipeError, RunError
from compressor.measure import points
from compressor.measure.points import recompute
from compressor.measure.runner import MeasureSettings, measure
from compressor.measure.samples import read_samples, write_samples

FAST = MeasureSettings(input_length=10, output_length=6, requests=4, rounds=3, dtype="float32")


@pytest.fixture
def measured(loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path) -> dict[str, Any]:
    return measure(loaders, tokenizer, prompts, FAST, tmp_path, artifact_bytes={"small": 1000})


def test_every_point_of_every_variant_is_reported(measured: dict[str, Any]) -> None:
    assert list(measured["performance"]) == ["baseline", "small"]
    for rows in measured["performance"].values():
        assert [row["concurrency"] for row in rows] == [1, 4]
        assert [row["requests"] for row in rows] == [6, 12]
        for row in rows:
            assert row["output_tokens"] == 6 * row["requests"]
            assert row["throughput_tok_s"]["low"] < row["throughput_tok_s"]["value"]
            assert row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0
    base = measured["performance"]["baseline"][0]
    assert base["cost_ratio"] == {"value": 1.0, "low": None, "high": None}


def test_cost_ratio_and_costs_agree(measured: dict[str, Any]) -> None:
    for base, row in zip(*measured["performance"].values(), strict=True):
        costs = [point["cost_usd_per_mtok_output"]["value"] for point in (base, row)]
        assert row["cost_ratio"]["value"] == pytest.approx(costs[0] / costs[1])


def test_figures_follow_exactly_from_the_files(measured: dict[str, Any], tmp_path: Path) -> None:
    record = json.loads((tmp_path / "ledger.json").read_text())
    assert record == json.loads(json.dumps(measured))
    assert recompute(tmp_path) == record["performance"]


def test_altered_sample_changes_the_figures(measured: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / measured["samples"]["small"]["path"]
    rows = read_samples(path)
    assert write_samples(path, rows) == measured["samples"]["small"]["sha256"]
    write_samples(path, rows[1:])
    assert recompute(tmp_path) != measured["performance"]


def test_variants_take_turns_and_get_the_same_prompts(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        row
        for files in measured["samples"].values()
        for row in read_samples(tmp_path / files["path"])
    ]
    turns: list[tuple[int, int, str]] = []
    for row in sorted(rows, key=lambda row: row.start_s):
        if not turns or turns[-1] != (row.round, row.concurrency, row.variant):
            turns.append((row.round, row.concurrency, row.variant))
    expected = [(r, c, v) for r in range(3) for c in (1, 4) for v in ("baseline", "small")]
    assert turns == expected
    ids = {name: {r.request_id.split("/", 1)[1] for r in rows if r.variant == name}
           for name in ("baseline", "small")}  # fmt: skip
    assert ids["baseline"] == ids["small"]


def test_reloading_measures_the_same_points(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    loads: list[str] = []

    def counted(name: str) -> Any:
        def load(dtype: torch.dtype) -> Any:
            loads.append(name)
            return loaders[name](dtype)

        return load

    settings = MeasureSettings(
        input_length=10, output_length=6, requests=4, rounds=3, dtype="float32", keep_loaded=False
    )
    result = measure({n: counted(n) for n in loaders}, tokenizer, prompts, settings, tmp_path)
    assert [row["requests"] for row in result["performance"]["small"]] == [6, 12]
    assert result["workload"]["interleaved"] == "every round"
    assert any("reloaded every round" in note for note in result["notes"])
    assert loads.count("baseline") == 4 and loads.count("small") <= 4
    assert recompute(tmp_path) == result["performance"]


def test_auto_dtype_takes_the_fastest_of_each_variant(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    settings = MeasureSettings(input_length=10, output_length=4, requests=2, rounds=2)
    result = measure(loaders, tokenizer, prompts, settings, tmp_path)
    cache = result["probes"]["baseline"]["cache"]
    for name, probe in result["probes"].items():
        rates = probe["tokens_per_second"]
        assert max(rates, key=rates.get) == f"{probe['dtype']}/{probe['cache']}"
        assert probe["cache"] == cache
        assert len(rates) == (4 if name == "baseline" else 2)
        assert result["engines"][name]["dtype"] == probe["dtype"]


def test_variant_that_runs_in_one_dtype_only_is_measured_in_it(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    def picky(dtype: torch.dtype) -> Any:
        if dtype is torch.float32:
            raise ValueError("no float32 kernel")
        return loaders["small"](dtype)

    settings = MeasureSettings(input_length=10, output_length=4, requests=2, rounds=2)
    variants = {"baseline": loaders["baseline"], "picky": picky}
    result = measure(variants, tokenizer, prompts, settings, tmp_path)
    assert result["probes"]["picky"]["dtype"] == "bfloat16"
    assert result["probes"]["picky"]["failed"] == {"float32": "no float32 kernel"}


def test_failing_variant_leaves_the_others(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    def broken(dtype: torch.dtype) -> Any:
        raise RunError("its weights are gone")

    result = measure({**loaders, "broken": broken}, tokenizer, prompts, FAST, tmp_path)
    assert result["errors"] == {"broken": "its weights are gone"}
    assert set(result["performance"]) == {"baseline", "small"}


def test_failing_baseline_is_the_runs_fault(tokenizer: Any, prompts: Any, tmp_path: Path) -> None:
    def broken(dtype: torch.dtype) -> Any:
        raise ValueError("no such layer")

    with pytest.raises(RunError, match="baseline cannot be measured: no such layer"):
        measure({"baseline": broken}, tokenizer, prompts, FAST, tmp_path)
    assert not list(tmp_path.iterdir())


def test_progress_reaches_its_total(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    totals: dict[str, list[int]] = {}

    class Counter:
        @contextmanager
        def task(self, description: str, total: int) -> Any:
            totals[description] = [total, 0]

            class Task:
                def advance(self, n: int) -> None:
                    totals[description][1] += n

            yield Task()

    measure(loaders, tokenizer, prompts, FAST, tmp_path, Counter())
    assert totals == {"prepare measurement": [2, 2], "measure": [12, 12]}


def test_goal_that_nobody_meets_gives_no_cost(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    settings = MeasureSettings(
        input_length=10, output_length=4, requests=1, rounds=2, concurrency=(1,), ttft_ms=1e-6,
        dtype="float32",
    )  # fmt: skip
    result = measure(loaders, tokenizer, prompts, settings, tmp_path)
    row = result["performance"]["small"][0]
    assert row["goal_met_share"] == 0 and row["throughput_tok_s"]["value"] > 0
    assert row["cost_usd_per_mtok_output"] is None and row["cost_ratio"] is None
    assert recompute(tmp_path) == result["performance"]


def test_settings_from_the_recipe_section() -> None:
    config = {
        "engine": "transformers",
        "dtype": "bfloat16",
        "workload": {
            "prompts": "builtin:prompts",
            "input_length": 32,
            "output_length": 16,
            "concurrency": [4, 1, 4],
            "requests": 9,
            "rounds": 2,
            "seed": 7,
            "slo": {"ttft_ms": 500, "tpot_ms": None},
        },
        "prices": {"usd_per_hour": 1.5},
        "something_else": 1,
    }
    settings = MeasureSettings.from_config(config)
    assert settings.concurrency == (1, 4) and settings.ttft_ms == 500 and settings.tpot_ms is None
    assert settings.prices == {"usd_per_hour": 1.5} and settings.seed == 7
    assert settings.served(4) == 16 and settings.served(1) == 10
    assert MeasureSettings.from_config({}) == MeasureSettings()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"concurrency": ()},
        {"concurrency": (0,)},
        {"output_length": 1},
        {"engine": "warp"},
        {"dtype": "int3"},
    ],
)
def test_impossible_loads_are_the_recipes_fault(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        MeasureSettings(**wrong)


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(RunError, match=r"x\.jsonl\.gz"):
        read_samples(path)
    with pytest.raises(RunError):
        read_samples(tmp_path / "missing.jsonl.gz")


def test_variant_names_are_no_paths(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    variants = {"baseline": loaders["small"], "../../x": loaders["small"]}
    measure(variants, tokenizer, prompts, FAST, tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert recompute(tmp_path / "a" / "b")["../../x"]


def test_ledger_name_is_that_of_the_run_directory() -> None:
    assert points.LEDGER == "ledger.json"
