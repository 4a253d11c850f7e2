"""The speculators format and draft directories: written, read again, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.errors import RunError
from compressor.export import draft, speculators, vllm
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import SINGLE
from compressor.speculate.draft import write_draft
from compressor.speculate.eagle3 import Eagle3
from compressor.speculate.eagle3_config import Eagle3Config
from tests import tiny
from tests.speculate import samples

CONFIG = replace(
    samples.CONFIG,
    rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
    norm_before_residual=False,
)
VERIFIER = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}


def head_of(**changes: Any) -> Eagle3:
    torch.manual_seed(0)
    config = Eagle3Config(**{**vars(CONFIG), **changes})
    return Eagle3(config, torch.arange(config.draft_vocab_size) * 2 + 1).eval()


def write(head: Eagle3, directory: Path, **changes: Any) -> Path:
    settings = {"tokens": 4, "verifier": VERIFIER, "provenance": {"made": "so"}, **changes}
    speculators.export(head, directory, **settings)
    return directory


@pytest.mark.parametrize(
    "changes",
    [{}, {"fc_norm": False, "norm_before_residual": True}, {"aux_layers": (0, 3)}],
)
def test_what_is_written_is_read_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    head = head_of(**changes)
    loaded = speculators.load(write(head, tmp_path))
    assert loaded.config == head.config
    for name, value in head.state_dict().items():
        rounded = value.bfloat16().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], rounded), name
    tokens, aux = torch.randint(50, (1, 6)), torch.randn(1, 6, head.fc.in_features)
    head.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        for one, other in zip(
            head.unroll(tokens, aux, 3), loaded.unroll(tokens, aux, 3), strict=True
        ):
            assert torch.equal(one, other)


def test_the_directory_is_as_vllm_reads_it(tmp_path: Path) -> None:
    head = head_of()
    write(head, tmp_path / "a")
    write(head, tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["SHA256SUMS", "compression.json", "config.json", "model.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "model_type" not in config  # vLLM takes the format from speculators_config then
    assert config["speculators_model_type"] == "eagle3"
    assert config["architectures"] == ["Eagle3Speculator"]
    assert config["draft_vocab_size"] == 20 and config["norm_before_residual"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4]
    layer = config["transformer_layer_config"]
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 1
    assert "num_aux_hidden_states" not in layer
    speculation = config["speculators_config"]
    assert speculation["verifier"] == VERIFIER
    assert speculation["proposal_methods"][0]["speculative_tokens"] == 4
    tensors = load_file(tmp_path / "a" / SINGLE)
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert (torch.arange(20) + tensors["d2t"]).tolist() == head.token_map.tolist()
    assert tensors["t2d"].nonzero().flatten().tolist() == head.token_map.tolist()
    assert tensors["lm_head.weight"].shape == (20, 32)
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (48, 64)


def test_with_the_whole_vocabulary_there_are_no_maps(tmp_path: Path) -> None:
    head = Eagle3(Eagle3Config(**{**vars(CONFIG), "draft_vocab_size": 50}))
    write(head, tmp_path)
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert not {"d2t", "t2d"} & set(file.keys())
    assert speculators.load(tmp_path).token_map.tolist() == list(range(50))


def test_other_depths_are_told_to_vllm(tmp_path: Path) -> None:
    write(head_of(aux_layers=(0, 3)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 2


def edit(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_older_heads_are_read(tmp_path: Path) -> None:
    """Without head_dim and rope_parameters, with the layer under its first name, and without
    embeddings."""
    head = head_of(head_dim=8)
    write(head, tmp_path)

    def change(config: dict[str, Any]) -> None:
        layer = config["transformer_layer_config"]
        del layer["head_dim"], layer["rope_parameters"], config["fc_norm"]
        layer["rope_theta"] = 20_000.0
        layer["rope_scaling"] = None

    edit(tmp_path, change)
    tensors = {
        name.replace("layers.0.", "midlayer."): value
        for name, value in load_file(tmp_path / SINGLE).items()
        if name != "embed_tokens.weight" and not name.startswith("fc_norm")
    }
    save_file(tensors, tmp_path / SINGLE)
    embeddings = torch.randn(50, 32)
    loaded = speculators.load(tmp_path, embeddings)
    assert loaded.config == Eagle3Config(**{**vars(CONFIG), "head_dim": 8, "fc_norm": False})
    assert torch.equal(loaded.embed_tokens.weight, embeddings)
    with pytest.raises(RunError, match=r"missing \['embed_tokens.weight'\]"):
        speculators.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(speculators_model_type="dflash"), "speculators_model_type is dflash"),
        (lambda c: c.update(norm_output=True), "norm_output is True"),
        (lambda c: c.update(target_hidden_size=64), "target_hidden_size is 64"),
        (lambda c: c.pop("transformer_layer_config"), "transformer_layer_config"),
        (lambda c: c.pop("eagle_aux_hidden_state_layer_ids"), "eagle_aux_hidden_state_layer_ids"),
        (lambda c: c["transformer_layer_config"].update(num_hidden_layers=2), "num_hidden_layers"),
        (lambda c: c["transformer_layer_config"].update(attention_bias=True), "attention_bias"),
        (lambda c: c["transformer_layer_config"].update(intermediate_size=40), "mlp.*config.json"),
        (lambda c: c.update(fc_norm=False), "unknown .*fc_norm"),
    ],
)
def test_heads_of_another_kind_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    write(head_of(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(RunError, match=message):
        speculators.load(tmp_path)


def test_a_head_must_draft_something(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="0 speculative tokens"):
        write(head_of(), tmp_path, tokens=0)


def test_engine_arguments_are_one_line_of_json() -> None:
    assert json.loads(vllm.speculative_config("eagle3", 3, Path("/a b"))) == {
        "method": "eagle3",
        "model": "/a b",
        "num_speculative_tokens": 3,
    }
    line = vllm.speculative_config("draft", 5, Path("/d"))
    assert json.loads(line)["method"] == "draft_model" and "\n" not in line


def test_a_draft_is_an_ordinary_directory_with_the_targets_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tiny.build("llama", tmp_path / "target", layers=3)
    write_draft(target, [0, 2], tmp_path / "work")
    for name in ("a", "b"):
        draft.export(tmp_path / "work", target, target, {"made": "so"}, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.num_hidden_layers == 2
    assert not CausalLM.open(tmp_path / "a").check_weights()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "a")("It is a truth").input_ids
    assert tokens == tiny.tokenizer()("It is a truth").input_ids
