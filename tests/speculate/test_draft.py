"""Draft models made by leaving out blocks: which go, and that what is left is the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.models.head import last_hidden
from compressor.speculate.corpus import Corpus
from compressor.speculate.draft import (
    block_influence,
    check_tokenizer,
    choose_blocks,
    divergence_order,
    without,
    write_draft,
)
from tests import tiny
from tests.speculate.samples import load

CORPUS = Corpus.from_samples(
    [([5, 9, 100 + i], list(range(20 + i, 30 + 2 * i))) for i in range(4)], held_out=1
)
IDS = torch.arange(7, 7 * 24, 7)[None] % tiny.VOCABULARY


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_a_draft_computes_what_the_target_does_without_the_blocks_left_out(
    tmp_path: Path, arch: str
) -> None:
    blocks = {"n_layer": 5} if arch == "bloom" else {}
    tiny.build(arch, tmp_path / "target", layers=5, **blocks)
    keep = [0, 2, 3]
    write_draft(tmp_path / "target", keep, tmp_path / "draft")
    target, draft = load(tmp_path / "target"), load(tmp_path / "draft")
    assert draft.config.get_text_config().num_hidden_layers == 3
    with torch.inference_mode():
        with without(target, [1, 4]):
            expected = last_hidden(target, IDS)
        whole = last_hidden(target, IDS)
        torch.testing.assert_close(last_hidden(draft, IDS), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole, expected, atol=1e-2)
    opened = CausalLM.open(tmp_path / "draft")
    assert not opened.check_weights()


def test_experts_stay_in_the_blocks_that_had_them(tmp_path: Path) -> None:
    tiny.build("qwen2_moe", tmp_path / "target", layers=5, mlp_only_layers=[2, 4])
    write_draft(tmp_path / "target", [1, 2, 4], tmp_path / "draft")
    kinds = [type(block.mlp).__name__ for block in CausalLM.open(tmp_path / "draft").blocks]
    assert kinds[0] != kinds[1] == kinds[2]
    target, draft = load(tmp_path / "target"), load(tmp_path / "draft")
    with torch.inference_mode(), without(target, [0, 3]):
        torch.testing.assert_close(
            last_hidden(draft, IDS), last_hidden(target, IDS), rtol=1e-4, atol=1e-4
        )


def test_equal_drafts_are_equal_bytes_and_trained_tensors_take_their_place(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "target", layers=3)
    name = "model.layers.1.mlp.up_proj.weight"
    new = torch.full((tiny.INTERMEDIATE, tiny.HIDDEN), 0.5, dtype=torch.float64)
    for directory, trained in (("a", None), ("b", None), ("c", {name: new})):
        write_draft(source, [0, 2], tmp_path / directory, trained)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "model.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    one, other = (Checkpoint(tmp_path / directory) for directory in "ac")
    assert one.names == other.names
    for key in one.names:
        expected = new.float() if key == name else one.tensor(key)
        assert torch.equal(other.tensor(key), expected) and other.dtype(key) == one.dtype(key)


def idle(model: Any, block: int) -> None:
    """Let a block add nothing to what it is given."""
    layer = model.model.layers[block]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()


def test_influence_is_one_minus_the_cosine_of_a_blocks_input_and_output(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "target", layers=3)
    model = CausalLM.open(source).load_full(torch.float32)
    idle(model, 1)
    found = block_influence(model, CORPUS, [0, 2])
    before = []
    with torch.no_grad():
        for row in (0, 2):
            ids = torch.from_numpy(CORPUS.row(row).astype("int64"))[None]
            before.append(torch.stack(model(ids, output_hidden_states=True).hidden_states[:3]))
    states = torch.cat(before, 2)
    for block in (0, 1):
        cosine = functional.cosine_similarity(states[block], states[block + 1], dim=-1)
        assert found[block] == pytest.approx(float(1 - cosine.mean()), abs=1e-5)
    assert found[1] == pytest.approx(0, abs=1e-6) and min(found[0], found[2]) > 0.01


def test_blocks_that_do_nothing_go_first(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "target", layers=5)
    model = CausalLM.open(source).load_full(torch.float32)
    for block in (1, 3):
        idle(model, block)
    kept, facts = choose_blocks(model, CORPUS, 3)
    assert kept == [0, 2, 4] and len(facts["influence"]) == 5
    kept, facts = choose_blocks(model, CORPUS, 2, "divergence", samples=2)
    order = facts["dropped"]
    assert {block for block, _ in order[:2]} == {1, 3} and order[2][0] not in kept
    assert order[1][1] == pytest.approx(0, abs=1e-6)
    assert order[2][1] > 1e-3


def test_divergence_is_what_leaving_a_block_out_costs(tmp_path: Path) -> None:
    model = load(tiny.build("gemma2", tmp_path / "target", layers=3))
    ((block, cost),) = divergence_order(model, CORPUS, [0, 1], 1)
    costs = []
    with torch.no_grad():
        for gone in range(3):
            total, count = 0.0, 0
            for row in (0, 1):
                ids = torch.from_numpy(CORPUS.row(row).astype("int64"))[None]
                at = slice(int(CORPUS.starts[row]) - 1, -1)
                p = functional.log_softmax(model(ids, use_cache=False).logits[0, at].double(), -1)
                with without(model, [gone]):
                    out = model(ids, use_cache=False).logits[0, at].double()
                q = functional.log_softmax(out, -1)
                total += float((p.exp() * (p - q)).sum())
                count += len(p)
            costs.append(total / count)
    assert cost == pytest.approx(min(costs), rel=1e-4) and costs[block] == min(costs)


def test_the_target_is_whole_again_afterwards(tmp_path: Path) -> None:
    model = load(tiny.build("llama", tmp_path / "target", layers=3))
    with torch.inference_mode():
        before = last_hidden(model, IDS)
        with pytest.raises(ZeroDivisionError), without(model, [0, 1]):
            raise ZeroDivisionError
        assert torch.equal(last_hidden(model, IDS), before)


def test_impossible_drafts_are_refused(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "target", layers=3)
    model = load(source)
    for keep in (0, 3):
        with pytest.raises(RunError, match="keep 1 to 2 blocks"):
            choose_blocks(model, CORPUS, keep)
    all_held_out = Corpus(CORPUS.tokens, CORPUS.lengths, CORPUS.starts, held_out=4)
    with pytest.raises(RunError, match="no sample"):
        choose_blocks(model, all_held_out, 2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(RunError, match="not quantized"):
        write_draft(source, [0], tmp_path / "draft")


def test_blocks_whose_number_is_part_of_what_they_compute_are_refused(tmp_path: Path) -> None:
    source = tiny.build("gemma3", tmp_path / "target", layers=4)
    write_draft(source, [0, 1, 3], tmp_path / "draft")
    types = json.loads((tmp_path / "draft" / "config.json").read_text())["layer_types"]
    assert types == ["sliding_attention", "full_attention", "full_attention"]
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=2, vocab_size=64, scale_attn_by_inverse_layer_idx=True
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RunError, match="differ by their number"):
        write_draft(tmp_path / "gpt2", [0, 2], tmp_path / "other")


def test_tokenizers_must_be_the_same(tmp_path: Path) -> None:
    target = tiny.build("llama", tmp_path / "target")
    draft = tiny.build("llama", tmp_path / "draft", layers=1, seed=1)
    check_tokenizer(target, draft)
    path = draft / "tokenizer.json"
    original = path.read_text(encoding="utf-8")
    tokenizer = json.loads(original)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[30:32]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(RunError, match="2 tokens differ from the target's: 30 is"):
        check_tokenizer(target, draft)
    path.write_text(original, encoding="utf-8")
    wider = tiny.build("llama", tmp_path / "wider", vocab_size=tiny.VOCABULARY + 64)
    with pytest.raises(RunError, match="vocab_size 448, the target's 384"):
        check_tokenizer(target, wider)
    shutil.rmtree(draft)
    draft.mkdir()
    with pytest.raises(RunError, match="cannot be read"):
        check_tokenizer(target, draft)
