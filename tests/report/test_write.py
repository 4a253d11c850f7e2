from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compressor.errors import RunError
from compressor.report import figures
from compressor.report.build import build_report
from compressor.report.curves import latency_plot
from compressor.report.html import render_html
from compressor.report.markdown import escape, render_markdown
from compressor.report.plots import quality_cost_plot
from compressor.report.read import read_report
from compressor.report.terminal import closing, closing_table
from compressor.report.write import write_report

PLOTS = ("quality_cost", "latency", "errors")
FILES = {"index.html", "report.md", "report.json"} | {
    f"{name}.{kind}" for name in PLOTS for kind in ("svg", "png")
}
EVIL = "<script>alert(1)</script>\"'&|`*_$x$ {{7*7}} [bold]"


class Page(HTMLParser):
    """Collects tags and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img", "input", "hr", "path", "use", "rect"):
            self.open.append(tag)
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def everywhere(inputs: dict[str, Any], text: str) -> dict[str, Any]:
    """The inputs with `text` in every place that a user or a model can fill."""
    inputs["title"] = text
    inputs["command"] = inputs["model"]["source"] = inputs["recipe"]["name"] = text
    inputs["environment"] = {text: text}
    inputs["notes"] = [text]
    inputs["calibration"]["source"] = text
    for variant in inputs["variants"][1:]:
        variant["algorithm"] = text
    inputs["variants"][-1]["error"] = text
    inputs["variants"][1]["coverage"]["skipped"] = [{"name": text, "reason": text}]
    inputs["variants"][1]["quantization"]["layers"][-1]["name"] = text
    inputs["variants"][1]["artifacts"][0]["path"] = text
    for variant in inputs["variants"]:
        for row in variant.get("quality", []):
            row["text"] = text
    performance = inputs["measured"]["performance"]
    performance[text] = performance.pop("int8-gptq")
    inputs["variants"][1]["name"] = text
    for row in performance[text]:
        row["kernel"] = text
    return inputs


def test_all_files_are_written_and_twice_the_same(report: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(report, tmp_path / "a")
    write_report(report, tmp_path / "b")
    assert {path.name for path in paths} == FILES
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_report(tmp_path / "a" / "report.json") == report


def test_page_is_whole_and_asks_for_nothing(report: dict[str, Any]) -> None:
    plots = {"quality_cost": quality_cost_plot(report), "latency": latency_plot(report)}
    assert None not in plots.values()
    text = render_html(report, plots)
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("script") == 2  # the panel's figures, and our own
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert text.count("<h1>") == 1 and "svg" in page.tags
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "viewport"):
        assert rule in text


def test_hostile_text_is_shown_and_not_run(inputs: dict[str, Any]) -> None:
    report = build_report(**everywhere(inputs, EVIL))
    plot = quality_cost_plot(report)
    assert plot is not None
    text = render_html(report, {"quality_cost": plot})
    assert (
        "<script>alert" not in text
        and text.count("<script") == 2
        and "alert(1)" in text
        and "{{7*7}}" in text
    )
    assert Page(text).open == []
    assert "<script" not in plot.svg
    page = render_markdown(report, [("quality_cost.svg", "Quality against cost", plot.caption)])
    assert "<script" not in page
    for line in page.splitlines():
        if line.startswith("| ") and "alert" in line:
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) >= 4 and cells[0] == cells[-1] == ""
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing(report))
    assert "[bold]" in console.export_text()


def test_markdown_tables_are_even(report: dict[str, Any]) -> None:
    width = None
    for line in render_markdown(report).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("|"):
            assert width in (None, cells)
            width = cells
        else:
            width = None


def test_every_figure_of_the_summary_is_in_every_form(report: dict[str, Any]) -> None:
    plot = quality_cost_plot(report)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing_table(report))
    assert plot is not None
    page = render_html(report, {"quality_cost": plot})
    forms = [page, render_markdown(report), console.export_text()]
    point = report["variants"][1]["performance"][1]
    wanted = [
        figures.number(point["cost_usd_per_mtok_output"]["value"]),
        figures.ratio(point["cost_ratio"]),
        figures.between(point["cost_ratio"]),
        "+0.21%",
        "163 MB",
    ]
    for form in forms:
        for text in wanted:
            assert text in form


def test_plot_has_units_a_panel_a_point_and_a_caption(report: dict[str, Any]) -> None:
    plot = quality_cost_plot(report)
    assert plot is not None and plot.png.startswith(b"\x89PNG")
    for words in ("USD per million output tokens", "[%]", "concurrency 1", "concurrency 4"):
        assert words in plot.svg
    assert "95% confidence" in plot.caption and "novel" in plot.caption
    assert "int8-gptq" in plot.svg and "int4-odd" not in plot.svg


def test_plot_without_cost_uses_the_size(inputs: dict[str, Any]) -> None:
    plot = quality_cost_plot(build_report(**{**inputs, "measured": None}))
    assert plot is not None and "size on disk [MB]" in plot.svg and "USD" not in plot.caption


def test_no_quality_no_plot_and_an_old_one_goes(inputs: dict[str, Any], tmp_path: Path) -> None:
    write_report(build_report(**inputs), tmp_path)
    for variant in inputs["variants"]:
        variant["quality"] = []
    paths = write_report(build_report(**inputs), tmp_path)
    assert not any(path.name.startswith("quality_cost") for path in paths)
    assert not (tmp_path / "quality_cost.svg").exists()
    assert "quality_cost.svg" not in (tmp_path / "report.md").read_text()


def test_many_variants_still_plot(inputs: dict[str, Any], sample: Any) -> None:
    names = [f"variant-{index}" for index in range(12)]
    base = inputs["variants"][0]
    inputs["variants"] = [base] + [
        sample.variant(name, quality=[sample._quality(0.001 * index, 18.9, "novel")])
        for index, name in enumerate(names)
    ]
    inputs["measured"] = sample.sample_measurement(dict.fromkeys(["baseline", *names], 1.1))
    plot = quality_cost_plot(build_report(**inputs))
    assert plot is not None and all(name in plot.svg for name in names)


def test_bad_or_missing_reports_are_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(RunError, match="schema"):
        read_report(tmp_path / "report.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


def test_unwritable_directory_is_named(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(report, tmp_path / "file" / "report")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (None, figures.MISSING), (0.0999999, "0.100"), (1234567, "1,230,000"),
     (9.999, "10.0"), (-2.5, "\u22122.50"), (3e-9, "3.00e-09"), (123.4, "123")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "text", "bounds"),
    [(27.924, 27.07, 28.80, "27.9", "27.1 to 28.8"), (1.1013, 1.009, 1.206, "1.10", "1.01 to 1.21"),
     (295.2, 250.0, 341.0, "300", "250 to 340"), (1.38623, 1.3861, 1.3863, "1.386",
     "1.386 to 1.386"), (12345.0, 9000.0, 15000.0, "12,000", "9,000 to 15,000"),
     (0.0912, 0.086, 0.0951, "0.091", "0.086 to 0.095"), (5.0, None, None, "5.00", "")],
)  # fmt: skip
def test_digits_are_those_that_an_interval_supports(
    value: float, low: float | None, high: float | None, text: str, bounds: str
) -> None:
    interval = {"value": value, "low": low, "high": high}
    assert figures.measured(interval) == text and figures.between(interval) == bounds


def test_changes_have_the_digits_of_their_interval() -> None:
    assert figures.change(0.16634, (0.151, 0.182)) == "+16.6%"
    assert figures.change_interval((0.151, 0.182)) == "+15.1% to +18.2%"
    assert figures.change(0.0037, (0.002, 0.0055)) == "+0.37%"
    assert figures.change(1.452, (1.2, 1.7)) == "+145%"


def test_percent_size_and_time() -> None:
    assert figures.percent(0.0634, signed=True) == "+6.34%"
    assert figures.percent(-0.00001, signed=True) == "0.00%"
    assert figures.size(269_000_000) == "269 MB" and figures.size(12) == "12 B"
    assert figures.seconds(4.25) == "4.2 s" and figures.seconds(3725) == "1 h 02 min"
    assert figures.seconds(125) == "2 min 05 s"


def test_markdown_escape() -> None:
    assert escape("a|b*c<d>&") == r"a\|b\*c&lt;d&gt;&amp;"
