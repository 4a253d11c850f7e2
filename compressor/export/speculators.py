"""The speculators format of EAGLE-3 heads, which vLLM and SGLang load.

Format: https://github.com/vllm-project/speculators. A directory with ``config.json`` and
``model.safetensors``; vLLM 0.32 reads it in transformers_utils/configs/speculators/ and
model_executor/models/llama_eagle3.py. Tensors, in the dtype that the target is served in:

- ``fc.weight`` [hidden, layers * hidden], and ``fc_norm.{i}.weight`` [hidden] with ``fc_norm``;
- ``layers.0.*``: a Llama layer whose q, k and v read [embedding; hidden], with ``hidden_norm``;
- ``norm.weight``, ``lm_head.weight`` [draft vocabulary, hidden], ``embed_tokens.weight``;
- ``d2t`` int64 [draft vocabulary]: what is added to a draft token's number for the target's;
  ``t2d`` bool [vocabulary]: whether the head knows a token. Both only with a reduced vocabulary:
  vLLM makes room for them where ``draft_vocab_size`` differs from the target's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.export.artifact import write_json, write_sums
from compressor.models.checkpoint import SINGLE, Checkpoint, save_whole
from compressor.speculate.eagle3 import Eagle3
from compressor.speculate.eagle3_config import Eagle3Config

NAME = "speculators"

_VERSION = "0.2.0"  # of the format that is written
_LAYER = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
)  # fmt: skip


def export(
    head: Eagle3,
    directory: Path,
    *,
    tokens: int,
    verifier: Mapping[str, Any],
    provenance: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        head: trained.
        directory: made if need be.
        tokens: drafted per step where the engine is not told otherwise.
        verifier: ``name_or_path`` and ``architectures`` of the target that it was trained for.
        provenance: written as ``compression.json``; must hold no times.
        dtype: of the weights.

    Raises:
        RunError: fewer than one token per step.
    """
    if tokens < 1:
        raise RunError(
            f"{tokens} speculative tokens", where="EAGLE-3 export", fix="draft at least one token"
        )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in head.state_dict().items():
        if name in ("d2t", "t2d"):
            if head.config.draft_vocab_size != head.config.vocab_size:
                tensors[name] = value.cpu().contiguous()
        else:
            tensors[name] = value.to(dtype).cpu().contiguous()
    save_whole(tensors, directory / SINGLE, {"format": "pt"})
    write_json(directory / "config.json", _config(head.config, tokens, verifier, dtype))
    write_json(directory / "compression.json", provenance)
    write_sums(directory)


def _config(
    config: Eagle3Config, tokens: int, verifier: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    layer = {**config.layer_config(), "dtype": str(dtype).removeprefix("torch.")}
    if len(config.aux_layers) != 3:  # what vLLM takes for granted
        layer["num_aux_hidden_states"] = len(config.aux_layers)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _VERSION,
        "dtype": layer["dtype"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": config.fc_norm,
        "norm_output": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": str(verifier["name_or_path"]),
                "architectures": list(verifier["architectures"]),
            },
        },
    }


def load(
    directory: Path, embeddings: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Eagle3:
    """A head in this format, ours or another's, in evaluation mode.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``.
        embeddings: [vocabulary, hidden], the target's, for a head that comes without its own.
        dtype: of the weights in memory.

    Raises:
        RunError: it is no EAGLE-3 head of this format, of a variant that is not known here, or its
            tensors do not fit its config.
    """
    config, tokens_known = _read_config(directory)
    checkpoint = Checkpoint(directory)
    names = {_own_name(name): name for name in checkpoint.names}
    token_map = None
    if "d2t" in names:
        offsets = checkpoint.tensor(names["d2t"], torch.int64)
        token_map = offsets + torch.arange(len(offsets))
    elif tokens_known < config.vocab_size:
        raise _unfit(directory, "a reduced draft vocabulary and no tensor d2t")
    head = Eagle3(config, token_map)
    own = head.state_dict()
    missing = []
    with torch.no_grad():
        for name, value in own.items():
            if name in ("d2t", "t2d"):
                continue
            source = names.get(name)
            if source is not None:
                found = checkpoint.tensor(source, torch.float32)
            elif name == "embed_tokens.weight" and embeddings is not None:
                found = embeddings.float().cpu()
            else:
                missing.append(name)
                continue
            if found.shape != value.shape:
                raise _unfit(
                    directory,
                    f"{name} is {tuple(found.shape)}, and config.json says {tuple(value.shape)}",
                )
            value.copy_(found)
    surplus = sorted(set(names) - set(own))
    if missing or surplus:
        raise _unfit(directory, f"missing {missing or 'nothing'}, unknown {surplus or 'nothing'}")
    return head.to(dtype).eval()


def _own_name(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


def _unfit(directory: Path, what: str) -> RunError:
    return RunError(
        f"not an EAGLE-3 head that can be loaded: {what}",
        where=str(directory),
        fix="give a head in the speculators format (one Llama layer, RMS norms, no biases)",
    )


def _read_config(directory: Path) -> tuple[Eagle3Config, int]:
    """The head's sizes, and how many tokens it knows."""
    try:
        made = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind, layer = made["speculators_model_type"], made["transformer_layer_config"]
        if kind != "eagle3":
            raise _unfit(directory, f"its speculators_model_type is {kind}")
        for name, only in (
            ("norm_before_fc", False),
            ("norm_output", False),
            ("target_hidden_size", layer["hidden_size"]),
        ):
            if (made.get(name) or only) != only:
                raise _unfit(directory, f"{name} is {made[name]}")
        for name, only in (
            ("model_type", "llama"), ("num_hidden_layers", 1), ("hidden_act", "silu"),
            ("attention_bias", False), ("mlp_bias", False),
        ):  # fmt: skip
            if layer.get(name, only) != only:
                raise _unfit(directory, f"the layer's {name} is {layer[name]}")
        heads = layer["num_attention_heads"]
        layer.setdefault("num_key_value_heads", heads)
        layer.setdefault("head_dim", layer["hidden_size"] // heads)
        if layer["head_dim"] is None:
            layer["head_dim"] = layer["hidden_size"] // heads
        layer["rope_parameters"] = _rope(layer)
        known = made.get("draft_vocab_size") or layer["vocab_size"]
        layers = made.get("eagle_aux_hidden_state_layer_ids")
        if not layers:
            raise _unfit(directory, "it does not name eagle_aux_hidden_state_layer_ids")
        return (
            Eagle3Config(
                **{name: layer[name] for name in _LAYER},
                draft_vocab_size=known,
                aux_layers=tuple(layers),
                norm_before_residual=bool(made.get("norm_before_residual", True)),
                fc_norm=bool(made.get("fc_norm", False)),
            ),
            known,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(directory, f"config.json: {type(error).__name__} {error}") from error


def _rope(layer: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it; before, it was ``rope_theta`` and ``rope_scaling``."""
    found = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", float(layer.get("rope_theta") or 10_000.0))
    return found
