"""The page in a real browser: what it loads, shows, sorts and computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.measure import metrics
from compressor.report.build import build_report
from compressor.report.plots import plotted_text
from compressor.report.read import read_report
from compressor.report.verdict import comparable
from compressor.report.write import write_report
from tests.report.browser import Watched, started
from tests.report.sample import full_inputs, requests

REPORTS = Path(__file__).parents[2] / "reports"
PAGES = ("sample", "vllm", "waterfall", "comparison")
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as found:
        yield found


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports by name: an invented one with everything, and real ones of this project as they are
    committed."""
    root = tmp_path_factory.mktemp("pages")
    write_report(build_report(**full_inputs()), root / "sample")
    for name in ("vllm", "waterfall", "comparison"):
        (root / name).symlink_to(REPORTS / name)
    return root


@pytest.fixture
def show(browser: Any, pages: Path) -> Iterator[Any]:
    shown: list[Watched] = []

    def opened(name: str, **options: Any) -> Watched:
        shown.append(Watched(browser, pages / name / "index.html", **(options or DESKTOP)))
        return shown[-1]

    yield opened
    for one in shown:
        one.context.close()


def report_of(pages: Path, name: str) -> dict[str, Any]:
    return read_report(pages / name / "report.json")


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_asked_for_and_nothing_complains(show: Any, pages: Path, name: str) -> None:
    one = show(name)
    one.page.wait_for_load_state("networkidle")
    assert one.complaints == []
    assert one.requests == [one.url]
    assert (pages / name / "index.html").stat().st_size < 6e6
    one.page.evaluate("fetch('https://example.org/').catch(() => null)")  # the policy forbids it
    assert any("Content Security Policy" in text for text in one.complaints)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sample", DESKTOP),
        ("sample", DESKTOP | {"color_scheme": "dark"}),
        ("vllm", PHONE),
        ("comparison", PHONE),
    ],
)
def test_axe_finds_nothing_serious(show: Any, name: str, options: dict[str, Any]) -> None:
    assert show(name, **options).axe() == []


@pytest.mark.parametrize("name", ["waterfall", "comparison"])
def test_a_phone_scrolls_down_only(show: Any, name: str) -> None:
    page = show(name, **PHONE).page
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= screen == 390


# Panels of one row share the vertical axis: only the first has its labels.
_AXES = """id => {
  const mark = document.getElementById(id);
  const use = mark.querySelector('use');
  let axes = mark.parentElement;
  while (!/-axes_\\d+$/.test(axes.id)) axes = axes.parentElement;
  const ticks = (panel, kind) => [...panel.querySelectorAll('g')]
    .filter(one => one.id.includes(`-${kind}tick_`))
    .map(one => ({
      at: one.querySelector('path').getAttribute('d').match(/-?[\\d.]+/g).map(Number),
      text: one.querySelector('text')?.textContent,
    }));
  const own = ticks(axes, 'y');
  const labelled = own[0].text ? own : [...mark.closest('svg').querySelectorAll('g')]
    .filter(one => /-axes_\\d+$/.test(one.id))
    .map(panel => ticks(panel, 'y'))
    .find(found => found.length && found[0].text && Math.abs(found[0].at[1] - own[0].at[1]) < 0.01);
  return {at: [Number(use.getAttribute('x')), Number(use.getAttribute('y'))],
          x: ticks(axes, 'x').map(one => [one.at[0], one.text]),
          y: labelled.map(one => [one.at[1], one.text]),
          title: mark.querySelector('title').textContent};
}"""


def read_off(page: Any, mark: str) -> tuple[float, float, str]:
    """A mark's place by the labels of its axes, as a reader finds it, and its words."""
    found = page.evaluate(_AXES, mark)
    values = []
    for place, key in enumerate("xy"):
        at, said = zip(*found[key], strict=True)
        numbers = [float(text.rstrip("%").replace("\u2212", "-")) for text in said]
        slope, start = np.polyfit(at, numbers, 1)
        values.append(slope * found["at"][place] + start)
    return values[0], values[1], found["title"]


@pytest.mark.parametrize("name", ["sample", "vllm", "waterfall"])
def test_plotted_points_are_the_report_s(show: Any, pages: Path, name: str) -> None:
    page, report = show(name).page, report_of(pages, name)
    text, checked = plotted_text(report), 0
    for index, variant in enumerate(report["variants"]):
        quality = next((row for row in variant["quality"] if row["text"] == text), None)
        for row in comparable(variant):
            if quality and row["cost_usd_per_mtok_output"]:
                mark = f"quality_cost-point-{index}-{row['concurrency']}"
                x, y, words = read_off(page, mark)
                cost = row["cost_usd_per_mtok_output"]["value"]
                assert x == pytest.approx(cost, rel=2e-3)
                assert y == pytest.approx(100 * quality["perplexity_change"], rel=5e-3, abs=2e-2)
                assert words.startswith(f"{variant['name']}: ")
                checked += 1
            for key in ("ttft", "tpot"):
                mark = f"latency-{key}-{index}-{row['concurrency']}"
                x, y, _ = read_off(page, mark)
                assert x == pytest.approx(row["throughput_tok_s"]["value"], rel=2e-3, abs=0.05)
                assert y == pytest.approx(row[f"{key}_ms"]["p50"], rel=1e-2, abs=1)
    assert checked == sum(
        len(comparable(v)) for v in report["variants"] if v["status"] == "ok" and v["quality"]
    )


def test_compared_points_are_the_comparison_s(show: Any, pages: Path) -> None:
    page = show("comparison").page
    content = json.loads((pages / "comparison" / "comparison.json").read_text())
    marks = page.locator("[id^='frontier-compared-']").evaluate_all("all => all.map(one => one.id)")
    assert len(marks) == len(content["variants"])
    for index, variant in enumerate(content["variants"]):
        _, y, words = read_off(page, f"frontier-compared-{index}")
        assert y == pytest.approx(variant["quality"]["value"], abs=2e-3)
        assert variant["name"] in words


def column(page: Any, table: str, header: str) -> list[str]:
    """First lines of a column's cells, in the order shown."""
    return page.evaluate(
        """([id, header]) => {
          const table = document.querySelector(`[aria-labelledby="${id}"] table`);
          const heads = [...table.tHead.rows[0].cells];
          const at = heads.findIndex(cell => cell.textContent.startsWith(header));
          return [...table.tBodies[0].rows].map(row => row.cells[at].firstChild.textContent);
        }""",
        [table, header],
    )


def test_columns_sort_by_their_figures(show: Any, pages: Path) -> None:
    page, report = show("sample").page, report_of(pages, "sample")
    point = report["verdict"]["concurrency"]
    costs = {
        variant["name"]: row["cost_usd_per_mtok_output"]["value"]
        for variant in report["variants"]
        for row in comparable(variant)
        if row["concurrency"] == point
    }
    rising = sorted(costs, key=lambda name: costs[name])
    failed = [v["name"] for v in report["variants"] if v["status"] != "ok"]
    head = page.locator("[aria-labelledby='summary'] thead th", has_text="Cost [")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "summary", "Variant") == rising + failed
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "summary", "Variant") == rising[::-1] + failed  # no figure: last
    sizes = page.locator("[aria-labelledby='summary'] thead th", has_text="Size")
    sizes.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    expected = sorted(v["size_bytes"] for v in report["variants"] if v["status"] == "ok")
    shown = [text for text in column(page, "summary", "Size") if text.endswith("MB")]
    assert [float(text.split()[0]) for text in shown] == [round(s / 1e6) for s in expected]
    page.locator("[aria-labelledby='summary'] thead th", has_text="Variant").get_by_role(
        "button"
    ).click()
    assert column(page, "summary", "Variant") == sorted(costs.keys() | set(failed))


def panel(page: Any) -> dict[str, dict[str, Any]]:
    """The what-if table: cells and the unrounded cost by variant."""
    rows = page.evaluate(
        """() => [...document.querySelector('#whatif-table').tBodies[0].rows].map(row =>
          [row.cells[0].textContent, [...row.cells].map(cell => cell.innerText),
           row.cells[4].dataset.value])"""
    )
    return {
        name: {"cells": cells, "cost": None if value == "null" else float(value)}
        for name, cells, value in rows
    }


def set_field(page: Any, name: str, value: object) -> None:
    page.locator(f"#whatif-form [name={name}]").fill(str(value))


@pytest.mark.parametrize("name", ["sample", "vllm", "waterfall"])
def test_what_if_begins_with_the_report_s_costs(show: Any, pages: Path, name: str) -> None:
    page, report = show(name).page, report_of(pages, name)
    select, seen = page.locator("#whatif-form [name=point]"), 0
    for label in select.locator("option").all_inner_texts():
        select.select_option(label=label)
        found = panel(page)
        for variant in report["variants"]:
            for row in variant["performance"]:
                if label == f"concurrency {row['concurrency']}":
                    expected = row["cost_usd_per_mtok_output"]["value"]
                    assert found[variant["name"]]["cost"] == pytest.approx(expected, rel=1e-9)
                    seen += 1
    assert seen == sum(len(v["performance"]) for v in report["variants"])


def test_what_if_follows_the_formula(show: Any, pages: Path) -> None:
    page, report = show("sample").page, report_of(pages, "sample")
    point = report["verdict"]["concurrency"]
    rows = {
        v["name"]: row for v in report["variants"] for row in v["performance"]
        if row["concurrency"] == point
    }  # fmt: skip
    for name, value in (("price", 2.5), ("utilisation", 40), ("watts", 350), ("pue", 1.3),
                        ("electricity", 0.2)):  # fmt: skip
        set_field(page, name, value)
    hourly = 2.5 + 350 * 1.3 / 1000 * 0.2
    found = panel(page)
    for name, row in rows.items():
        expected = hourly / (row["goodput_tok_s"]["value"] * 3600 / 1e6) / 0.4
        assert found[name]["cost"] == pytest.approx(expected, rel=1e-9)
    best = min(rows, key=lambda name: found[name]["cost"])
    assert f"Cheapest: {best} at " in page.locator("#whatif-answer").inner_text()
    # Longer answers: seconds per output token by the rates, which the page calls an estimate.
    page.get_by_role("button", name="As measured").click()
    set_field(page, "input", 1000)
    set_field(page, "output", 8)
    longer = panel(page)
    for name, row in rows.items():
        a, b = 1 / row["prefill_tok_s"], 1 / row["decode_tok_s"]
        mix = ((a * 1000 + b * 8) / 8) / ((a * 128 + b * 32) / 32)
        expected = row["cost_usd_per_mtok_output"]["value"] * mix
        assert longer[name]["cost"] == pytest.approx(expected, rel=1e-9)


def test_what_if_counts_the_recorded_requests_within_limits(show: Any, pages: Path) -> None:
    page, report = show("sample").page, report_of(pages, "sample")
    point = report["verdict"]["concurrency"]
    speeds = {"baseline": 1.0, "int8-gptq": 1.46, "int4-gptq": 1.9, "int4-rtn": 1.88}
    own = {name: [r for r in requests(name, speed) if r.concurrency == point]
           for name, speed in speeds.items()}  # fmt: skip
    limit = float(np.median([metrics.tpot_ms(r) for r in own["baseline"]]))
    set_field(page, "tpot", limit)
    found, goal = panel(page), metrics.Goal(tpot_ms=limit)
    hourly = sum(report["variants"][0]["performance"][0]["components_usd_per_hour"].values())
    for name, samples in own.items():
        good = metrics.throughput_interval(samples, seed=0, goal=goal)
        expected = hourly / (good.value * 3600 / 1e6)
        assert found[name]["cost"] == pytest.approx(expected, rel=1e-6)
        share = sum(map(goal.met, samples)) / len(samples)
        assert found[name]["cells"][1] == f"{100 * share:.1f}%"
    assert 0 < float(found["baseline"]["cells"][1].rstrip("%")) < 100
    set_field(page, "tpot", 0.001)
    assert panel(page)["baseline"]["cost"] is None
    assert "No recorded request" in page.locator("#whatif-answer").inner_text()
    set_field(page, "price", "")
    assert "A value is missing" in page.locator("#whatif-answer").inner_text()


def test_intervals_of_the_panel_are_those_of_the_measurement(show: Any, pages: Path) -> None:
    """The page's t interval over rounds is what the bootstrap of the measurement tends to."""
    page, report = show("sample").page, report_of(pages, "sample")
    set_field(page, "tpot", 1e9)  # a limit that all meet: computed in the page
    found = panel(page)
    for variant in report["variants"]:
        for row in variant["performance"]:
            if row["concurrency"] == report["verdict"]["concurrency"]:
                low, high = found[variant["name"]]["cells"][4].split("\n")[1].split(" to ")
                cost = row["cost_usd_per_mtok_output"]
                width = cost["high"] - cost["low"]
                assert float(high) - float(low) == pytest.approx(width, rel=0.15)


def test_the_page_is_whole_without_scripts(show: Any) -> None:
    page = show("sample", **DESKTOP, java_script_enabled=False).page
    assert page.locator("#whatif").is_hidden()
    assert page.locator("svg[role=img]").count() >= 3
    assert page.get_by_text("How sure that is").is_visible()
    assert page.locator("thead button").count() == 0


def test_keys_reach_everything(show: Any) -> None:
    page = show("sample").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "BUTTON", "DIV"} <= reached


def test_the_first_difference_is_marked(show: Any) -> None:
    marks = show("sample").page.locator(".pairs mark").all_inner_texts()
    assert marks == ["mat", "chair"]


def test_dark_and_print_have_their_colours(show: Any) -> None:
    page = show("waterfall", **DESKTOP, color_scheme="dark").page
    look = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    assert page.evaluate(look) == "rgb(20, 23, 27)" and page.evaluate(ink) == "rgb(230, 232, 235)"
    page.emulate_media(media="print")
    assert page.evaluate(look) == "rgb(255, 255, 255)" and page.evaluate(ink) == "rgb(0, 0, 0)"
    assert page.locator("#whatif").is_hidden() and page.locator("nav").is_hidden()
    assert len(page.pdf()) > 50_000
