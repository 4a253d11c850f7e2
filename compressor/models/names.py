"""From a model's parameter names to the keys of its checkpoint.

transformers 5 renames and fuses tensors while it loads them. The same rules, run over the keys on
disk, say under which key every parameter lies, so that what is written again has the names that
engines know (Mixtral: ``mlp.experts.0.gate_proj`` is ``block_sparse_moe.experts.0.w1`` on disk).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

_QUANTIZED = (".weight_packed", ".weight_scale")


def disk_keys(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Map parameter names to keys on disk.

    Fused experts are named one by one, as `experts.UnfusedExperts` names them
    (``experts.3.up_proj.weight``). A quantized linear, which has ``weight_packed`` or
    ``weight_scale`` on disk, is listed under its ``.weight``.

    Args:
        model: transformers model as it was built, experts still fused.
        keys: of the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for key in sorted(_plain(keys)):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if pattern is not None:
            names = _expert_names(name, key, pattern, converters)
            found.update(dict.fromkeys(names, key))
        else:
            found[name] = key
    _share_tied(model, found)
    return found


def _plain(keys: Iterable[str]) -> set[str]:
    """The keys, with ``X.weight`` for every quantized linear X."""
    plain = set(keys)
    for suffix in _QUANTIZED:
        plain |= {k.removesuffix(suffix) + ".weight" for k in plain if k.endswith(suffix)}
    return plain


def _expert_names(name: str, key: str, pattern: str, converters: list[Any]) -> list[str]:
    """Name of one expert's linear, if the rule only stacks experts and joins gate and up."""
    path, _, leaf = name.rpartition(".")
    rule = next(c for c in converters if pattern in c.source_patterns)
    operations = [(type(op).__name__, op.dim) for op in rule.operations if hasattr(op, "dim")]
    if len(operations) != len(rule.operations) or operations[:1] != [("MergeModulelist", 0)]:
        return []
    number = re.search(r"\.(\d+)\.", key[key.rfind("experts") :]) if "experts" in key else None
    if number is None:
        return []
    if leaf == "gate_up_proj" and operations[1:] == [("Concatenate", 1)]:
        linear = ("gate_proj", "up_proj")[rule.source_patterns.index(pattern)]
    elif leaf == "down_proj" and len(operations) == 1:
        linear = leaf
    else:
        return []
    return [f"{path}.{number[1]}.{linear}.weight"]


def _share_tied(model: nn.Module, found: dict[str, str]) -> None:
    """Let a tied parameter that is stored only under its twin's name be found there."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if target in found and source not in found:
            found[source] = found[target]
