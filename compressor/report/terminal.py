"""The closing table of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compressor.report import coverage, quality, tables


def closing_table(report: Mapping[str, Any]) -> Table:
    """The summary as a rich table; names are shown as they are, never as markup."""
    summary = tables.summary(report)
    table = Table(header_style="bold", pad_edge=False)
    for index, header in enumerate(summary.headers):
        right = index >= summary.text_columns
        table.add_column(Text(header), justify="right" if right else "left", no_wrap=index == 0)
    failed = {v["name"] for v in report["variants"] if v["status"] != "ok"}
    for index, row in enumerate(summary.rows):
        style = "red" if row[0] in failed else "bold green" if index == summary.marked else ""
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def _kept(report: Mapping[str, Any]) -> list[str]:
    """What the tasks showed of every variant."""
    return [
        f"{variant['name']}: {words}"
        for variant in report["variants"]
        if (words := quality.summary_words(variant))
    ]


def closing(report: Mapping[str, Any]) -> RenderableType:
    """The table, under it what a reader must be told, and the verdict sentence."""
    return Group(
        closing_table(report),
        *(Text(f"warning: {line}", style="bold red") for line in coverage.warnings(report)),
        *(Text(line, style="yellow") for line in coverage.fallbacks(report)),
        *(Text(line, style="bold red") for line in quality.gate_lines(report)),
        *(Text(line) for line in _kept(report)),
        Text(report["verdict"]["sentence"], style="bold"),
    )
