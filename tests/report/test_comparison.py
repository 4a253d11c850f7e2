"""Several runs in one report, and which runs there are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from compressor.cli import app
from compressor.errors import RecipeError
from compressor.report.build import build_report
from compressor.report.comparison import compare_reports, comparison_schema, write_comparison
from compressor.report.model import report_schema
from compressor.report.plots import frontier
from compressor.report.runs import find_runs
from compressor.report.write import write_report
from tests.report.sample import sample_inputs

PACKAGE = Path(__file__).parents[2] / "compressor" / "report"
INVOKE = CliRunner().invoke


def run(directory: Path, change: Any = lambda inputs: None, **figures: Any) -> Path:
    """A run of the invented report."""
    inputs = sample_inputs() | figures
    change(inputs)
    write_report(build_report(**inputs), directory / "report")
    return directory


def cheaper(inputs: dict[str, Any]) -> None:
    for rows in inputs["measured"]["performance"].values():
        for row in rows:
            for end in ("value", "low", "high"):
                row["cost_usd_per_mtok_output"][end] /= 2


def test_frontier_is_what_nothing_beats() -> None:
    assert frontier([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 1)]) == [0, 1, 4]
    assert frontier([(1, 1), (1, 1)]) == [0]
    assert frontier([]) == []


def test_one_frontier_over_runs(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    second = run(tmp_path / "b", cheaper, created="2000-02-01T00:00:00Z")
    content = compare_reports([first, second])
    assert content["measure"] == "bits_per_byte" and content["text"] == "novel"
    jsonschema.validate(content, comparison_schema())
    rows = content["variants"]
    assert len(rows) == 8  # the failed ones are left out
    best = [(v["run"], v["name"]) for v in rows if v["frontier"]]
    assert best and all(index == 1 for index, _ in best)  # the same, at half the cost
    named = {(v["run"], v["name"]): v for v in rows}
    int8 = named[0, "int8-gptq"]
    low, high = 0.0021 - 0.0021 * 0.2 - 0.0005, 0.0021 + 0.0021 * 0.2 + 0.0005
    per_log = 1.0421 / math.log(18.91 * 1.0021)
    assert int8["quality"]["low"] == pytest.approx(1.0421 + per_log * math.log((1 + low) / 1.0021))
    assert int8["quality"]["high"] == pytest.approx(
        1.0421 + per_log * math.log((1 + high) / 1.0021)
    )
    names = {path.name for path in write_comparison(content, tmp_path / "out")}
    assert names == {"index.html", "report.md", "comparison.json", "frontier.svg", "frontier.png",
                     "history.svg", "history.png"}  # fmt: skip
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == content
    assert "sample, 2000-02-01 00:00" in (tmp_path / "out" / "report.md").read_text()


def test_runs_without_a_common_measure_have_no_frontier(tmp_path: Path) -> None:
    def other(inputs: dict[str, Any]) -> None:
        inputs["model"]["source"] = "another"
        inputs["recipe"]["name"] = "other"
        for variant in inputs["variants"]:
            variant["quality"] = []

    content = compare_reports([run(tmp_path / "a"), run(tmp_path / "b", other)])
    assert content["measure"] is None and "no frontier" in content["sentence"]
    assert not any(v["frontier"] for v in content["variants"])
    assert {path.name for path in write_comparison(content, tmp_path / "out")} == {
        "index.html", "report.md", "comparison.json"
    }  # fmt: skip


def test_currencies_are_not_mixed(tmp_path: Path) -> None:
    def euros(inputs: dict[str, Any]) -> None:
        inputs["measured"]["prices"]["currency"] = "EUR"

    with pytest.raises(RecipeError, match="EUR and USD"):
        compare_reports([run(tmp_path / "a"), run(tmp_path / "b", euros)])


def test_published_schemas_are_the_models() -> None:
    for name, made in (("report", report_schema()), ("comparison", comparison_schema())):
        assert json.loads((PACKAGE / f"{name}.schema.json").read_text()) == made


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [
        run(tmp_path / "runs" / "sample" / name, created=f"2000-0{month}-01T00:00:00Z")
        for name, month in (("one", 2), ("two", 1), ("three", 3))
    ]
    found = find_runs(tmp_path / "runs")
    assert [one.path.name for one in found] == ["two", "one", "three"]
    assert find_runs(tmp_path / "runs" / "sample") == found

    result = INVOKE(app, ["compare", *map(str, runs)])
    assert result.exit_code == 0 and "both the cheapest and the best" in result.output
    assert (tmp_path / "comparison" / "index.html").is_file()
    result = INVOKE(app, ["compare", *map(str, runs[:2]), "-o", "pair"])
    assert result.exit_code == 0 and "compared, 0 worse" in result.output
    assert (tmp_path / "pair" / "report.md").is_file()
    assert isinstance(INVOKE(app, ["compare", str(runs[0])]).exception, RecipeError)

    result = INVOKE(app, ["history", "runs", "-o", "past"])
    assert result.exit_code == 0 and result.output.index("two") < result.output.index("three")
    assert (tmp_path / "past" / "history.png").is_file()
    shown = json.loads(INVOKE(app, ["history", "runs", "--json"]).output)
    assert [one["created"][:7] for one in shown["runs"]] == ["2000-01", "2000-02", "2000-03"]

    result = INVOKE(app, ["open", "--print"])
    assert Path(result.output.strip()) == Path("runs/sample/three/report/index.html")
    result = INVOKE(app, ["open", str(runs[1]), "--print"])
    assert Path(result.output.strip()) == runs[1] / "report" / "index.html"
    assert isinstance(INVOKE(app, ["open", str(tmp_path / "pair")]).exception, RecipeError)
