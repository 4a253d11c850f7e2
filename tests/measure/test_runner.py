from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import RecipeError, RunError
from compressor.measure import fleet, points
from compressor.measure.engines.base import RequestSample
from compressor.measure.points import recompute
from compressor.measure.prices import resolve_prices
from compressor.measure.runner import measure as measure_candidates
from compressor.measure.samples import read_samples, write_samples
from compressor.measure.settings import MeasureSettings, Point
from compressor.measure.workload import build_workload, tokenizer_encode

FAST = MeasureSettings(
    input_length=10, output_length=6, requests=4, rounds=3, dtype="float32", batching="static"
)


def measure(
    loaders: Any,
    tokenizer: Any,
    prompts: Any,
    settings: MeasureSettings,
    out_dir: Path,
    *args: Any,
    **options: Any,
) -> dict[str, Any]:
    """In-process variants under a load of `prompts`."""
    workload = build_workload(
        prompts,
        tokenizer_encode(tokenizer),
        input_length=settings.input_length,
        count=max(len(prompts), *settings.concurrency, 1),
        seed=settings.seed,
        source=settings.prompts,
    )
    variants = {
        name: fleet.in_process(loader, settings, workload.longest)
        for name, loader in loaders.items()
    }
    return measure_candidates(variants, workload, settings, out_dir, *args, **options)


@pytest.fixture(scope="module")
def measured_once(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("measured")
    options = {"artifact_bytes": {"small": 1000}}
    return measure(loaders, tokenizer, prompts, FAST, path, **options), path


@pytest.fixture
def measured(measured_once: tuple[dict[str, Any], Path], tmp_path: Path) -> dict[str, Any]:
    """A measurement whose files lie in the test's own directory."""
    record, path = measured_once
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(record)


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
    assert recompute(tmp_path) == {key: record[key] for key in ("performance", "economics")}


def test_altered_sample_changes_the_figures(measured: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / measured["samples"]["small"]["path"]
    rows = read_samples(path)
    assert write_samples(path, rows) == measured["samples"]["small"]["sha256"]
    write_samples(path, rows[1:])
    assert recompute(tmp_path)["performance"] != measured["performance"]


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
        input_length=10,
        output_length=6,
        requests=4,
        rounds=3,
        dtype="float32",
        keep_loaded=False,
        batching="static",
    )
    result = measure({n: counted(n) for n in loaders}, tokenizer, prompts, settings, tmp_path)
    assert [row["requests"] for row in result["performance"]["small"]] == [6, 12]
    assert result["workload"]["interleaved"] == "every round"
    assert any("started anew every round" in note for note in result["notes"])
    # Each kind of cache is tried once.
    assert loads.count("baseline") <= 6 and loads.count("small") <= 4
    assert recompute(tmp_path)["performance"] == result["performance"]


def test_auto_dtype_takes_the_fastest_of_each_variant(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    settings = MeasureSettings(
        input_length=10, output_length=4, requests=2, rounds=2, batching="static"
    )
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

    settings = MeasureSettings(
        input_length=10, output_length=4, requests=2, rounds=2, batching="static"
    )
    variants = {"baseline": loaders["baseline"], "picky": picky}
    result = measure(variants, tokenizer, prompts, settings, tmp_path)
    assert result["probes"]["picky"]["dtype"] == "bfloat16"
    failed = result["probes"]["picky"]["failed"]
    assert failed == {f"float32/{result['probes']['baseline']['cache']}": "no float32 kernel"}


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


def test_continuous_batching_is_the_default(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    settings = MeasureSettings(
        input_length=10, output_length=6, requests=4, rounds=2, dtype="float32"
    )
    result = measure(loaders, tokenizer, prompts, settings, tmp_path)
    assert {engine["batching"] for engine in result["engines"].values()} == {"continuous"}
    for rows in result["performance"].values():
        assert [row["output_tokens"] for row in rows] == [6 * row["requests"] for row in rows]
        assert all(row["error_rate"] == 0 for row in rows)
    assert recompute(tmp_path) == json.loads(
        json.dumps({key: result[key] for key in ("performance", "economics")})
    )


def test_parts_of_the_load_split_the_cost_and_change_no_other_figure(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    settings = MeasureSettings(
        input_length=40, output_length=6, requests=4, rounds=2, dtype="float32",
        concurrency=(2,), rate_per_s=(100.0,), split=True, prices={"usd_per_hour": 3.6},
    )  # fmt: skip
    result = measure(loaders, tokenizer, prompts, settings, tmp_path)
    assert list(result["workload"]["requests"]) == ["c2", "c2-prefill", "c2-decode", "q100"]
    for name, rows in result["performance"].items():
        assert [(row["concurrency"], row["rate_per_s"]) for row in rows] == [(2, None), (0, 100.0)]
        samples = read_samples(tmp_path / result["samples"][name]["path"])
        mixes = {
            part: {(one.prompt_tokens, one.output_tokens) for one in samples if one.part == part}
            for part in ("", "prefill", "decode")
        }
        assert mixes == {"": {(40, 6)}, "prefill": {(40, 1)}, "decode": {(16, 6)}}
        (split,) = result["split"][name]  # the open loop has no parts
        assert split["groups"]["load"]["seconds"] == rows[0]["window_seconds"]
        assert (split["mix_input_tokens"], split["mix_output_tokens"]) == (40, 6)
        # A million seconds of a device at 3.6 an hour cost a thousand.
        assert split["output_usd_per_mtok"]["value"] == pytest.approx(
            1000 * split["seconds_per_output_token"]
        )
        assert split["output_usd_per_mtok"]["value"] > 0 and split["points"] == 3
    assert recompute(tmp_path) == json.loads(
        json.dumps({key: result[key] for key in ("performance", "economics", "split")})
    )
    plain = points.figures(
        result, {name: [one for one in read_samples(tmp_path / row["path"]) if not one.part]
                 for name, row in result["samples"].items()},
    )  # fmt: skip
    assert plain == {key: result[key] for key in ("performance", "economics")}


def test_a_part_whose_requests_failed_gives_no_split() -> None:
    load = [RequestSample("a", 40, 2, 0.0, 1.0, (1.0, 2.0))]
    alone = [RequestSample("b", 40, 0, 3.0, 4.0, (), part="prefill", error="broken")]
    row = {"concurrency": 1, "rate_per_s": None, "energy": None}
    prices = resolve_prices({"usd_per_hour": 3.6})
    asked = {"prices": prices, "artifact_bytes": 0, "seed": 0}
    assert points.split_costs([*load, *alone], [row], **asked) == []
    alone = [RequestSample("b", 40, 1, 3.0, 4.5, (4.5,), part="prefill")]
    (found,) = points.split_costs([*load, *alone], [row], **asked)
    assert found["seconds_per_output_token"] == pytest.approx(0.5)
    assert found["input_usd_per_mtok"]["low"] is None  # one round


def test_open_loop_has_a_row_for_each_rate(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    settings = MeasureSettings(
        input_length=10, output_length=4, requests=8, rounds=2, dtype="float32",
        concurrency=(2,), rate_per_s=(200.0, 50.0), seed=3,
    )  # fmt: skip
    result = measure(loaders, tokenizer, prompts, settings, tmp_path)
    for name, rows in result["performance"].items():
        assert [(row["concurrency"], row["rate_per_s"]) for row in rows] == [
            (2, None), (0, 50.0), (0, 200.0)
        ]  # fmt: skip
        samples = read_samples(tmp_path / result["samples"][name]["path"])
        opened = [one for one in samples if one.rate_per_s]
        assert all(one.scheduled_s <= one.start_s + 1e-6 for one in opened)  # type: ignore[operator]
        due = {(one.rate_per_s, one.request_id.split("/", 2)[2]): one.scheduled_s for one in opened}
        assert len(due) == 16
    assert result["workload"]["requests"] == {"c2": 8, "q50": 8, "q200": 8}
    assert result["economics"]["small"]["scenarios"]["rows"]


def test_variant_whose_engine_dies_is_taken_out(
    loaders: Any, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    """It serves warm-up and some requests, then its model raises for good."""

    def dying(dtype: torch.dtype) -> Any:
        model, calls = loaders["small"](dtype), [0]
        forward = model.forward

        def count(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > 30:
                raise RuntimeError("the device fell off")
            return forward(*args, **options)

        model.forward = count
        return model

    settings = MeasureSettings(
        input_length=10, output_length=6, requests=8, rounds=4, dtype="float32"
    )
    result = measure({**loaders, "dying": dying}, tokenizer, prompts, settings, tmp_path)
    assert set(result["performance"]) == {"baseline", "small"}
    assert "fell off" in result["errors"]["dying"]
    assert not any(load["variant"] == "dying" for load in result["loads"])


def test_list_prices_are_what_an_address_costs(tmp_path: Path, measured: dict[str, Any]) -> None:
    record = json.loads((tmp_path / "ledger.json").read_text())
    record["list_prices"] = {
        "baseline": {"usd_per_mtok_input": 1.0, "usd_per_mtok_output": 4.0},
        "small": {"usd_per_mtok_input": 0.5, "usd_per_mtok_output": None},
    }
    (tmp_path / "ledger.json").write_text(json.dumps(record))
    found = recompute(tmp_path)
    # 10 prompt tokens and 6 output tokens a request.
    base, small = (found["performance"][name][0] for name in ("baseline", "small"))
    assert base["cost_usd_per_mtok_output"]["value"] == pytest.approx(4 + 10 / 6)
    assert small["cost_usd_per_mtok_output"]["value"] == pytest.approx(0.5 * 10 / 6)
    assert small["cost_ratio"]["value"] == pytest.approx((4 + 10 / 6) / (5 / 6))
    assert found["economics"] == {}


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
    assert recompute(tmp_path)["performance"] == result["performance"]


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
    assert settings.served(Point(4)) == 16 and settings.served(Point(1)) == 10
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
    assert recompute(tmp_path / "a" / "b")["performance"]["../../x"]


def test_ledger_name_is_that_of_the_run_directory() -> None:
    assert points.LEDGER == "ledger.json"
