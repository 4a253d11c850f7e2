"""The candidates of a search: every combination of what a recipe's `optimise.space` lists."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ValidationError

from compressor.quantize import registry

if TYPE_CHECKING:
    from compressor.optimise.options import Optimise
    from compressor.recipe import Recipe, Variant

POOL = 4096  # candidates that are looked at one by one; of larger spaces as many are drawn
_SERVING = ("serve", "speculate")
# Options of a quantizer that serving does not see: how codes are found, and not their form.
_FORM = ("scheme", "group_size", "symmetric", "activations")


@dataclass(frozen=True)
class Candidate:
    """A variant that may be tried.

    Attributes:
        name: what it is called in stages and in the report.
        choice: label of the entry taken from each list of the space.
        variant: as it would stand in a recipe.
        parsed: the same, validated.
    """

    name: str
    choice: dict[str, str]
    variant: dict[str, Any]
    parsed: Variant

    @property
    def identity(self) -> str:
        """Equal for variants that do the same."""
        return identity(self.parsed)

    @property
    def algorithm(self) -> str:
        """Its algorithms in short."""
        return "+".join(step.algorithm for step in self.parsed.quantize) or "none"

    @property
    def scheme(self) -> str:
        """Its scheme, or the schemes that its layers choose from."""
        if self.parsed.precision is not None:
            return "/".join(self.parsed.precision.schemes)
        return scheme_of(self.parsed)

    @cached_property
    def method(self) -> str:
        """Equal for variants whose codes are found in one way, of whichever layers and groups."""
        steps = [
            [step.algorithm, step.options.model_dump(mode="json", exclude={"group_size"})]
            for step in self.parsed.quantize
        ]
        return json.dumps([steps, self.scheme], sort_keys=True)

    @cached_property
    def arithmetic(self) -> str:
        """Equal for variants whose linears are computed by the same kernels, if not as many of
        them."""
        steps: list[Any] = []
        for step in self.parsed.quantize:
            kind = registry.get(step.algorithm).kind
            options = step.options.model_dump(mode="json")
            if kind == "weights" and isinstance(step.options, registry.SchemeOptions):
                ordered = options.get("desc_act") and not options.get("static_groups")
                steps = [{key: options[key] for key in _FORM} | {"g_idx": bool(ordered)}]
            elif kind in ("weights", "library"):
                steps = [step.algorithm, options]
        budget = self.parsed.precision
        return json.dumps([steps, budget.schemes if budget is not None else []], sort_keys=True)

    @cached_property
    def form(self) -> str:
        """Equal for variants whose weights have one form: what the engine multiplies with."""
        v = self.parsed
        rest = v.model_dump(mode="json", include={"precision", "ignore", "lm_head"})
        imported = v.imported.model_dump(mode="json") if v.imported else None
        return json.dumps([self.arithmetic, rest, imported], sort_keys=True)

    @property
    def speed_class(self) -> str:
        """Equal for variants that compute the same in serving, whatever their codes are."""
        own = self.parsed.model_dump(mode="json", include={*_SERVING, "kv_cache"})
        return json.dumps([self.form, own], sort_keys=True)


def identity(variant: Variant) -> str:
    """A variant as text, without where it comes from."""
    value = variant.model_dump(mode="json", exclude={"base"})
    value["quantize"] = [step.dump() for step in variant.quantize]
    return json.dumps(value, sort_keys=True)


def scheme_of(variant: Variant) -> str:
    """Name of the quantizer's scheme; empty where it has none."""
    if not variant.quantize or variant.library:
        return ""
    return str(getattr(variant.quantizer.options, "scheme", ""))


class CandidateSpace:
    """The lists of a space with a label for each entry.

    Args:
        recipe: with an `optimise:` section.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.optimise is not None
        self.options: Optimise = recipe.optimise
        self._type = recipe.variant_type()
        self._given = {identity(variant): name for name, variant in recipe.variants.items()}
        space = self.options.space
        precisions = [*space.schemes, *(_plain(one) for one in space.precision)]
        self.lists: dict[str, dict[str, Any]] = {
            "algorithms": _labelled([[_step(step) for step in each] for each in space.algorithms]),
            "precision": _labelled(precisions),
            "group_size": _labelled(space.group_sizes),
            "ignore": _labelled(space.ignore),
            **{
                key: _labelled([_plain(one) for one in getattr(space, key)])
                for key in ("lm_head", "kv_cache", "speculate", "serve")
            },
        }

    @property
    def size(self) -> int:
        """Combinations, those that mean the same counted apart."""
        return math.prod(len(labels) for labels in self.lists.values())

    @property
    def open(self) -> dict[str, list[str]]:
        """Labels by list, of those lists that leave a choice."""
        return {key: list(labels) for key, labels in self.lists.items() if len(labels) > 1}

    def at(self, choice: Mapping[str, str]) -> Candidate | None:
        """The candidate of a choice (lists with one entry may be left out); None where its parts
        do not go together."""
        labels = {key: choice.get(key) or next(iter(own)) for key, own in self.lists.items()}
        taken = {key: self.lists[key][label] for key, label in labels.items()}
        value = self._variant(taken)
        try:
            parsed = self._type.model_validate(value)
        except ValidationError:
            return None
        shown = {key: label for key, label in labels.items() if len(self.lists[key]) > 1}
        # One that the recipe has too keeps its name, so that it is not judged twice.
        name = self._given.get(identity(parsed)) or "c-" + self._digest(parsed)
        return Candidate(name, shown, value, parsed)

    @staticmethod
    def _digest(variant: Variant) -> str:
        from compressor.store import content_key

        return content_key(identity(variant))[:8]

    @staticmethod
    def _variant(taken: Mapping[str, Any]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        steps = [dict(step) for step in taken["algorithms"]]
        if steps:
            value["quantize"] = steps
        for step in steps:
            ((name, options),) = step.items()
            if not issubclass(registry.get(name).Options, registry.SchemeOptions):
                continue
            precision, own = taken["precision"], dict(options)
            if "scheme" in own:  # which goes with its other options
                precision = own["scheme"]
            elif isinstance(precision, str):
                own["scheme"] = precision
            else:
                value["precision"] = precision
            eight = isinstance(precision, str) and precision in _WHOLE
            own.setdefault("group_size", None if eight else taken["group_size"])
            step[name] = own
        for key in ("ignore", "lm_head", "kv_cache", "speculate", "serve"):
            if taken[key] not in (None, []):
                value[key] = taken[key]
        return value

    @cached_property
    def pool(self) -> list[Candidate]:
        """The candidates, each once; a seeded part of them where there are more than `POOL`."""
        found: dict[str, Candidate] = {}
        for choice in self._choices():
            candidate = self.at(choice)
            if candidate is not None and not candidate.parsed.is_null:
                found.setdefault(candidate.identity, candidate)
        return list(found.values())

    def _choices(self) -> Iterator[dict[str, str]]:
        lists = self.open
        if self.size <= POOL:
            for labels in itertools.product(*lists.values()):
                yield dict(zip(lists, labels, strict=True))
            return
        draw = np.random.default_rng(self.options.seed)
        for _ in range(POOL):
            yield {key: own[int(draw.integers(len(own)))] for key, own in lists.items()}


# Schemes with one scale per output channel, which group sizes say nothing of.
_WHOLE = ("W8A8", "W8A16", "FP8")


def _step(step: Any) -> dict[str, Any]:
    """A step with the options that the recipe gives it."""
    return {step.algorithm: step.options.model_dump(mode="json", exclude_unset=True)}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return value


def _labelled(entries: Sequence[Any]) -> dict[str, Any]:
    """Entries by a short label; equal ones once."""
    found: dict[str, Any] = {}
    for entry in entries:
        found.setdefault(_label(entry), entry)
    return found


def _label(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, list):
        return "+".join(_label(one) for one in value)
    if isinstance(value, dict):
        if len(value) == 1:
            ((key, inner),) = value.items()
            return key if inner in ({}, None) else f"{key}({_label(inner)})"
        return ", ".join(f"{key} {_label(inner)}" for key, inner in value.items())
    return str(value)
