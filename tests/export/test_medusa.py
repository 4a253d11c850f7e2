"""Medusa heads on disk: read back, and as the engines' own code would read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from compressor.errors import RunError
from compressor.export.artifact import SUMS
from compressor.export.medusa import (
    TGI_FILE,
    export_tgi,
    export_vllm,
    load_medusa,
)
from compressor.export.vllm import serving_flags, speculative_config
from compressor.speculate.medusa import MedusaHeads
from compressor.store import file_sha256

HIDDEN, VOCABULARY, HEADS = 8, 20, 3
TOKEN_MAP = torch.tensor([0, 3, 4, 9, 15, 19])
X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))


def made(**changes: Any) -> MedusaHeads:
    """Random heads whose values bfloat16 holds."""
    heads = MedusaHeads(HIDDEN, VOCABULARY, HEADS, **changes)
    random = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, generator=random)
        parameter.data.copy_(parameter.data.bfloat16())
    return heads


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def vllm_logits(directory: Path, x: torch.Tensor) -> list[torch.Tensor]:
    """What vLLM 0.32 makes of the directory, after vllm/model_executor/models/medusa.py: which
    tensors its config asks for, and in which shapes; -inf for tokens outside the map."""
    config = json.loads((directory / "config.json").read_text())
    # MedusaConfig.from_pretrained
    for key in list(config):
        if "num" in key and "heads" in key:
            config["num_heads"] = config.pop(key)
        elif "num" in key and "layers" in key:
            config["num_hidden_layers"] = config.pop(key)
    files = tensors(directory / "model.safetensors")
    token_map = files.pop("token_map", None)
    truncated, vocabulary = config["truncated_vocab_size"], config["vocab_size"]
    assert truncated == vocabulary or token_map is not None
    wanted = {
        f"blocks.{i}.layers.{j}.{kind}": shape
        for i in range(config["num_heads"])
        for j in range(config["num_hidden_layers"])
        for kind, shape in {
            "weight": (config["hidden_size"], config["hidden_size"]),
            "bias": (config["hidden_size"],),
        }.items()
    }
    if config["original_lm_head"]:
        wanted["lm_heads.0.weight"] = (truncated, config["hidden_size"])
    else:
        for i in range(config["num_heads"]):
            wanted[f"lm_heads.{i}.weight"] = (vocabulary, config["hidden_size"])
    assert {name: tuple(value.shape) for name, value in files.items()} == wanted
    logits = []
    for i in range(config["num_heads"]):
        y = x
        for j in range(config["num_hidden_layers"]):
            layer = f"blocks.{i}.layers.{j}"
            linear = functional.linear(
                y, files[f"{layer}.weight"].float(), files[f"{layer}.bias"].float()
            )
            y = y + functional.silu(linear)
        own = 0 if config["original_lm_head"] else i
        one = y @ files[f"lm_heads.{own}.weight"].float().T * config.get("logit_scale", 1.0)
        if token_map is not None:
            full = torch.full((*one.shape[:-1], vocabulary), -torch.inf)
            full[..., token_map] = one
            one = full
        logits.append(one)
    return logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2, "scale": 0.25},
        {"output": "shared"},
        {"output": "original", "layers": 2},
        {"output": "shared", "token_map": TOKEN_MAP},
        {"output": "original", "token_map": TOKEN_MAP},
    ],
    ids=str,
)
def test_vllm_drafts_what_the_heads_say(tmp_path: Path, changes: dict[str, Any]) -> None:
    heads = made(**changes)
    export_vllm(heads.state_dict(), heads.shape(), {"made": "by a test"}, tmp_path / "out")
    for got, expected in zip(vllm_logits(tmp_path / "out", X), heads(X), strict=True):
        known = slice(None) if heads.token_map is None else heads.token_map
        torch.testing.assert_close(got[:, known], expected)
        assert torch.equal(got.argmax(-1), heads.to_vocabulary(expected.argmax(-1)))
    state, shape = load_medusa(tmp_path / "out")
    again = MedusaHeads.from_state(shape, state)
    assert again.scale == heads.scale
    for got, expected in zip(again(X), heads(X), strict=True):
        torch.testing.assert_close(got, expected)


def test_one_head_of_a_reduced_vocabulary_needs_no_sharing(tmp_path: Path) -> None:
    heads = MedusaHeads(HIDDEN, VOCABULARY, 1, token_map=TOKEN_MAP)
    export_vllm(heads.state_dict(), heads.shape(), {}, tmp_path, dtype=torch.float32)
    torch.testing.assert_close(vllm_logits(tmp_path, X)[0][:, TOKEN_MAP], heads(X)[0])


def test_what_vllm_cannot_load_is_refused(tmp_path: Path) -> None:
    heads = made(token_map=TOKEN_MAP)
    with pytest.raises(RunError, match="only where all heads share one output layer"):
        export_vllm(heads.state_dict(), heads.shape(), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tgi_logits(directory: Path, x: torch.Tensor, base: torch.Tensor) -> list[torch.Tensor]:
    """What TGI 3 makes of the directory, after its layers/medusa.py: version 1 where every head has
    an output layer, else version 2 with the target's own."""
    config = json.loads((directory / "config.json").read_text())
    assert "architectures" not in config
    files = tensors(directory / TGI_FILE)
    layers = config["medusa_num_layers"]
    first = f"0.{layers}.weight" in files
    assert first or layers == 1
    logits = []
    for i in range(config["medusa_num_heads"]):
        y = x
        for j in range(layers):
            weight, bias = (files.pop(f"{i}.{j}.linear.{k}").float() for k in ("weight", "bias"))
            y = y + functional.silu(functional.linear(y, weight, bias))
        own = files.pop(f"{i}.{layers}.weight").float() if first else base
        logits.append(y @ own.T)
    assert not files
    return logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2},
        {"output": "shared"},
        {"output": "original"},
        {"output": "original", "layers": 2},
    ],
    ids=str,
)
def test_tgi_drafts_what_the_heads_say(tmp_path: Path, changes: dict[str, Any]) -> None:
    heads = made(**changes)
    export_tgi(heads.state_dict(), heads.shape(), {}, tmp_path, base_model="org/target")
    base = heads.state_dict()["lm_heads.0.weight"]
    for got, expected in zip(tgi_logits(tmp_path, X, base), heads(X), strict=True):
        torch.testing.assert_close(got, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model_name_or_path"] == "org/target"


def test_tgi_takes_the_targets_whole_output_layer_and_no_reduced_one(tmp_path: Path) -> None:
    heads = made(output="original", token_map=TOKEN_MAP)
    export_tgi(heads.state_dict(), heads.shape(), {}, tmp_path / "out", base_model="x")
    base = torch.randn(VOCABULARY, HIDDEN)
    base[TOKEN_MAP] = heads.state_dict()["lm_heads.0.weight"]
    for got, expected in zip(tgi_logits(tmp_path / "out", X, base), heads(X), strict=True):
        torch.testing.assert_close(got[:, TOKEN_MAP], expected)
    trained = made(output="shared", token_map=TOKEN_MAP)
    with pytest.raises(RunError, match="TGI knows no reduced vocabulary"):
        export_tgi(trained.state_dict(), trained.shape(), {}, tmp_path / "no", base_model="x")


def test_directories_are_complete_and_equal(tmp_path: Path) -> None:
    heads = made()
    for name in ("one", "other"):
        export_vllm(heads.state_dict(), heads.shape(), {"seed": 1}, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [SUMS, "compression.json", "config.json", "model.safetensors"]
    for name in files:
        assert file_sha256(tmp_path / "one" / name) == file_sha256(tmp_path / "other" / name)
    for line in (tmp_path / "one" / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert file_sha256(tmp_path / "one" / name) == digest


def test_the_option_for_vllm_is_one_json_argument(tmp_path: Path) -> None:
    assert json.loads(speculative_config("medusa", 4, tmp_path)) == {
        "method": "medusa",
        "model": str(tmp_path),
        "num_speculative_tokens": 4,
    }


def test_a_reduced_vocabulary_is_served_without_the_count_of_weights(tmp_path: Path) -> None:
    whole, reduced = made(), made(output="shared", token_map=TOKEN_MAP)
    for name, heads in (("whole", whole), ("reduced", reduced)):
        export_vllm(heads.state_dict(), heads.shape(), {}, tmp_path / name)
    assert serving_flags("medusa", 3, tmp_path / "whole")[::2] == ("--speculative-config",)
    name, value = serving_flags("medusa", 3, tmp_path / "reduced")[2:]
    assert name == "--model-loader-extra-config"
    assert json.loads(value) == {"enable_weights_track": False}


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a directory of Medusa heads"):
        load_medusa(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="not a directory of Medusa heads"):
        load_medusa(tmp_path)
