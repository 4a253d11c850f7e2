"""How much of a model is quantized, and which of its linears are left out and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from compressor.models.architecture import CausalLM, LinearRef

FEW_TOKENS = 0.25  # inputs per column that a layer's statistics need to be used


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a linear is left out: an entry is a whole name, or a regular expression that
    matches the whole name."""
    return any(name == pattern or re.fullmatch(pattern, name) for pattern in ignore)


def undersampled(tokens: int | None, in_features: int) -> bool:
    """Whether there were too few inputs to say anything of most of their directions."""
    return tokens is not None and tokens < FEW_TOKENS * in_features


class Coverage:
    """What a walk has to go through. Made before it, which may take a shared weight apart."""

    def __init__(self, model: CausalLM, head: LinearRef | None) -> None:
        """
        Args:
            model: the opened model.
            head: the output layer, where it is to be quantized.
        """
        self.model = model
        self.head = head
        self.skipped = [
            {"name": name, "reason": reason}
            for index in range(len(model.blocks))
            for name, reason in model.skipped(index)
        ] + [{"name": name, "reason": reason} for name, reason in model.outside_linears()]
        self.total = model.num_parameters
        if head is not None:
            self.skipped = [entry for entry in self.skipped if entry["name"] != head.name]
            if model.head_is_tied:
                self.total += head.module.weight.numel()  # no longer shared with the embeddings

    def facts(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Parameters quantized, and linears skipped with the reason.

        Args:
            records: of every linear (`codes.read_layers`).
        """
        skipped = list(self.skipped)
        quantized = in_head = 0
        for record in records:
            if record.get("reason"):
                skipped.append({"name": record["name"], "reason": record["reason"]})
            else:
                quantized += record["parameters"]
                if self.head is not None and record["name"] == self.head.name:
                    in_head = record["parameters"]
        return {
            "total_parameters": self.total,
            "quantized_parameters": quantized,
            "head_parameters": in_head,
            "block_parameters": self.model.block_parameters,
            "share": quantized / self.total,
            "skipped": [{**one, "parameters": self.model.numel(one["name"])} for one in skipped],
        }
