"""What a reader must be told of what was not quantized, dropped or added: in lines of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.report import figures

LEAST_SHARE = 0.9  # of the decoder blocks' parameters, below which a variant gets a warning
_FUSED = "fused experts"  # how the reason of `models.architecture.FUSED_EXPERTS` begins
_NAMED = 4


def named(names: Sequence[str], most: int = _NAMED) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def block_share(variant: Mapping[str, Any]) -> float | None:
    """Share of the decoder blocks' parameters that was quantized; None where it is not known."""
    coverage = variant["coverage"]
    if not coverage or not coverage["block_parameters"]:
        return None
    inside = coverage["quantized_parameters"] - coverage.get("head_parameters", 0)
    return min(1.0, inside / coverage["block_parameters"])


def warnings(report: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing about a variant that would mislead who is not told of it."""
    lines = []
    for variant in report["variants"]:
        name, coverage = variant["name"], variant["coverage"]
        for artifact in variant["artifacts"]:
            missing = (artifact["tensors"] or {}).get("missing", [])
            if missing:
                lines.append(
                    f"{name}: {_tensors(missing)} of the source missing from the "
                    f"{artifact['format']} artifact: {named(missing)}"
                )
        if not coverage:
            continue
        fused = [row for row in coverage["skipped"] if row["reason"].startswith(_FUSED)]
        if fused:
            size = sum(row["parameters"] or 0 for row in fused)
            share = f", {figures.percent(size / coverage['total_parameters'], 1)} of the model"
            lines.append(
                f"{name}: {_tensors(fused)} of fused experts left in full precision"
                f"{share if size else ''}: {named([row['name'] for row in fused])}"
            )
        share_of_blocks = block_share(variant)
        if share_of_blocks is not None and share_of_blocks < LEAST_SHARE:
            lines.append(
                f"{name}: only {figures.percent(share_of_blocks, 1)} of the decoder blocks' "
                "parameters were quantized; what was left, and why, is in the table of layers left "
                "in full precision"
            )
    return lines


def fallbacks(report: Mapping[str, Any]) -> list[str]:
    """One sentence for each variant with layers that went back to plain rounding, or with a
    refinement that gained nothing."""
    lines = []
    for variant in report["variants"]:
        layers = (variant["quantization"] or {}).get("layers", [])
        for what, key in (
            ("fell back to rounding to nearest, which did better there", "fallback"),
            ("saw too few tokens and were rounded to nearest", "undersampled"),
        ):
            found = [row["name"] for row in layers if row[key]]
            if found:
                count = "1 layer" if len(found) == 1 else f"{len(found)} layers"
                lines.append(f"{variant['name']}: {count} {what}: {named(found, 8)}")
        refined = (variant["quantization"] or {}).get("refined")
        if refined and not refined["kept"]:
            lines.append(
                f"{variant['name']}: distillation did not bring the model nearer to the original "
                "on samples that were held out, and was taken back"
            )
    return lines


def _tensors(found: Sequence[Any]) -> str:
    return "1 tensor" if len(found) == 1 else f"{len(found)} tensors"
