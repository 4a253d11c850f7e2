"""The report as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.report import coverage, decision, overview, quality, tables
from compressor.report.table import Table


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no table breaks."""
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    return escape(first) + "".join(f" ({escape(part)})" for part in rest)


def table_markdown(table: Table) -> str:
    """A pipe table with its note, figures to the right."""
    count = len(table.headers)
    align = ["---" if index < table.text_columns else "---:" for index in range(count)]
    lines = [
        "| " + " | ".join(escape(header) for header in table.headers) + " |",
        "| " + " | ".join(align) + " |",
    ]
    for index, row in enumerate(table.rows):
        cells = [_cell(cell).replace("\r", " ") for cell in row]
        if index == table.marked:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + (f"\n\n{escape(table.note)}" if table.note else "")


def render_markdown(
    report: Mapping[str, Any], pictures: Sequence[tuple[str, str, str]] = ()
) -> str:
    """The whole page; of each picture its file, what it shows, and its caption."""
    verdict = report["verdict"]
    title = escape(report["title"].replace("\n", " "))
    parts = [f"# {title}", f"**{escape(verdict['sentence'])}**"]
    if verdict["details"]:
        parts.append("\n".join(f"- {escape(' '.join(d.split()))}" for d in verdict["details"]))
    if warnings := [*coverage.warnings(report), *quality.gate_lines(report)]:
        parts.append("\n".join(f"- **Warning:** {escape(line)}" for line in warnings))
    for question, lines in decision.answers(report):
        parts.append(f"**{question}.** {escape(' '.join(' '.join(lines).split()))}")
    parts.append(table_markdown(overview.table(report)))
    for file, shows, caption in pictures:
        parts += [f"![{shows}]({file})", f"*{escape(caption)}*"]
    for table in tables.body(report):
        parts += [f"## {escape(table.title)}", table_markdown(table)]
    assumptions = (report["prices"] or {}).get("assumptions") or []
    if notes := [*report["notes"], *assumptions]:
        listed = "\n".join(f"- {escape(' '.join(note.split()))}" for note in notes)
        parts += ["## Notes and assumptions", listed]
    parts.append("## Provenance")
    for table in tables.provenance(report):
        parts += [f"### {escape(table.title)}", table_markdown(table)]
    return "\n\n".join(parts) + "\n"
