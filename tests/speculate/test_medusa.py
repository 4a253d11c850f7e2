"""Medusa heads: what they start as, what they learn, what they are counted for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.head import Head, split
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.scheme import Scheme
from compressor.quantize import registry
from compressor.speculate.corpus import Corpus, generate_corpus
from compressor.speculate.features import Features, write_features
from compressor.speculate.losses import KINDS
from compressor.speculate.medusa import (
    Batch,
    MedusaHeads,
    MedusaOptions,
    held_out_accuracy,
    make_token_map,
    output_weight,
    places,
    train_medusa,
)
from compressor.speculate.training import BEST, FACTS, STATE
from tests import tiny

PROMPTS = [
    [int(t) for t in np.random.default_rng(i).integers(3, 300, 2 + i % 5)] for i in range(14)
]


def make(arch: str, directory: Path) -> tuple[Any, Corpus, Features]:
    """A tiny target, its own answers, and its states. The answers held out are those trained on: a
    random model says nothing that could be learned from others."""
    model = CausalLM.open(tiny.build(arch, directory / "model")).load_full(torch.float32)
    corpus = generate_corpus(
        model,
        PROMPTS * 2,
        output_length=24,
        batch_size=28,
        temperature=0,
        seed=0,
        end_tokens=(),
        held_out=14,
        directory=directory / "corpus",
    )
    return model, corpus, write_features(model, corpus, directory / "features")


def options(**changes: Any) -> MedusaOptions:
    settings = {"heads": 3, "epochs": 3, "learning_rate": 3e-3, "patience": 0, **changes}
    return MedusaOptions(**settings)


@pytest.mark.parametrize("output", ["own", "shared", "original"])
@pytest.mark.parametrize("reduced", [None, 50])
def test_heads_start_as_the_target(tmp_path: Path, output: str, reduced: int | None) -> None:
    model, corpus, _ = make("llama", tmp_path)
    chosen = options(output=output, draft_vocabulary=reduced, layers=2)
    token_map = make_token_map(corpus, chosen, tiny.VOCABULARY)
    head = split(model)
    heads = MedusaHeads.start(head, tiny.HIDDEN, chosen, token_map)
    hidden = torch.randn(2, 5, tiny.HIDDEN)
    expected = head(hidden)
    if token_map is not None:
        expected = expected[..., token_map]
    made = heads(hidden)
    assert len(made) == 3
    for logits in made:
        torch.testing.assert_close(logits, expected)
    places_of = torch.arange(made[0].shape[-1])
    known = places_of if token_map is None else token_map
    assert torch.equal(heads.to_vocabulary(places_of), known)
    again = MedusaHeads.from_state(heads.shape(), heads.state_dict())
    torch.testing.assert_close(again(hidden)[2], made[2])


def test_a_head_is_residual_blocks_and_an_output_layer() -> None:
    heads = MedusaHeads(8, 11, 2, layers=2, scale=0.5)
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    x = hidden = torch.randn(4, 8)
    for j in range(2):
        w, b = (heads.state_dict()[f"blocks.1.layers.{j}.{kind}"] for kind in ("weight", "bias"))
        x = x + functional.silu(x @ w.T + b)
    expected = 0.5 * x @ heads.state_dict()["lm_heads.1.weight"].T
    torch.testing.assert_close(heads(hidden)[1], expected)


def by_hand(
    heads: MedusaHeads, head: Head, corpus: Corpus, features: Features, rows: list[int], kind: str
) -> torch.Tensor:
    """The loss as its definition reads, one prediction after the other."""
    total = torch.zeros(())
    for row in rows:
        tokens, hidden = corpus.row(row), features.hidden(row).float()
        for t in range(int(corpus.starts[row]) - 1, len(tokens)):
            for i, logits in enumerate(heads(hidden[t])):
                if t + 2 + i >= len(tokens):
                    continue
                q = torch.softmax(logits, -1)
                p = torch.softmax(head(hidden[t + 1 + i].unsqueeze(0))[0], -1)
                overlap = torch.minimum(p, q).sum()
                loss = {
                    "cross_entropy": -q[tokens[t + 2 + i]].log(),
                    "kl": (p * (p.log() - q.log())).sum(),
                    "total_variation": 1 - overlap,
                    "lk": -overlap.log(),
                }[kind]
                total = total + 0.8**i * loss
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_every_head_on_its_token(tmp_path: Path, kind: str) -> None:
    model, corpus, features = make("qwen3", tmp_path)
    head = split(model)
    chosen = options(loss=kind, output="own")
    heads = MedusaHeads.start(head, tiny.HIDDEN, chosen, None)
    for parameter in heads.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    rows = [0, 3]
    expected = by_hand(heads, head, corpus, features, rows, kind)
    expected.backward()
    wanted = [p.grad.clone() for p in heads.parameters() if p.grad is not None]
    heads.zero_grad()
    batch = Batch(corpus, rows, lambda r: features.hidden(r).float(), torch.device("cpu"))
    loss = batch.loss(heads, batch.target(chosen.loss, head, None), chosen, 1.0)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for got, one in zip(heads.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, one, rtol=1e-3, atol=1e-3)


def accuracy_by_hand(
    heads: MedusaHeads, corpus: Corpus, features: Features
) -> tuple[list[list[float]], float, float]:
    """Top-k shares, mean run and tokens per step, decoding token by token."""
    count = len(heads.blocks)
    hits: list[list[list[bool]]] = [[[] for _ in range(5)] for _ in range(count)]
    runs, steps, said = [], 0, 0
    for row in corpus.rows("held_out"):
        tokens, start = corpus.row(row), int(corpus.starts[row])
        run = {}
        for t in range(start - 1, len(tokens) - 1):
            logits = heads(features.hidden(row)[t].float())
            ahead = [t + 2 + i for i in range(count) if t + 2 + i < len(tokens)]
            best = [heads.to_vocabulary(one.topk(5).indices).tolist() for one in logits]
            for i, place in enumerate(ahead):
                for k in range(5):
                    hits[i][k].append(int(tokens[place]) in best[i][: k + 1])
            run[t] = 0
            while run[t] < len(ahead) and best[run[t]][0] == tokens[ahead[run[t]]]:
                run[t] += 1
        runs += run.values()
        t = start - 1  # the state of the prompt's last token: the target says the next one itself
        while t < len(tokens) - 1:
            steps, said, t = steps + 1, said + run[t] + 1, t + run[t] + 1
    shares = [[float(np.mean(one)) for one in head] for head in hits]
    return shares, 1 + float(np.mean(runs)), said / steps


@pytest.mark.parametrize("reduced", [None, 40])
def test_accuracy_and_lengths_are_those_of_decoding_by_hand(
    tmp_path: Path, reduced: int | None
) -> None:
    model, corpus, features = make("llama", tmp_path)
    heads, facts = train_medusa(
        split(model), corpus, features, options(draft_vocabulary=reduced), tmp_path / "heads"
    )
    found = held_out_accuracy(heads, corpus, lambda row: features.hidden(row).float())
    shares, expected, per_step = accuracy_by_hand(heads, corpus, features)
    assert np.allclose(found["top"], shares)
    assert found["expected_length"] == pytest.approx(expected)
    assert found["tokens_per_step"] == pytest.approx(per_step)
    assert found["score"] == found["expected_length"]
    best = next(e for e in facts["evaluations"] if e["step"] == facts["best_step"])
    assert best["top"] == found["top"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["own", "shared", "original"])
def test_heads_learn_what_the_target_says(tmp_path: Path, kind: str, output: str) -> None:
    model, corpus, features = make("qwen3", tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads, facts = train_medusa(
        split(model),
        corpus,
        features,
        options(loss=kind, output=output, epochs=25),
        tmp_path / "heads",
    )
    losses = [step["loss"] for step in facts["steps"]]
    epoch = len(losses) // 25
    share, gain = (0.97, 0.0) if output == "original" else (0.9, 0.1)  # it can learn less
    assert np.mean(losses[-epoch:]) < share * np.mean(losses[:epoch])
    found = held_out_accuracy(heads, corpus, lambda r: features.hidden(r).float())
    assert found["expected_length"] > facts["evaluations"][0]["expected_length"] + gain
    same = torch.equal(heads.output_weight(0), model.lm_head.weight)
    assert same == (output == "original")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def quantized(directory: Path) -> Any:
    """The tiny Llama with 4-bit weights, its output layer too."""
    opened = CausalLM.open(directory)
    rtn = registry.get("rtn")
    quantizer = rtn(rtn.Options(scheme="W4A16", group_size=16), torch.float32)
    opened.untie_head()
    head = opened.head()
    assert head is not None
    refs = [ref for block in range(2) for ref in opened.linears(block)]
    whole = CausalLM.open(directory).load_full(torch.float32)
    for ref in [*refs, head]:
        weight = whole.get_submodule(ref.path).weight.data
        made = quantizer.quantize_all([weight], None)[0].tensor
        module = QuantizedLinear.from_tensor(made, Scheme.parse("W4A16", 16), None)
        opened.replace_linear(ref, module)
    return opened.load_full(torch.float32)


def test_heads_of_a_quantized_target_start_from_its_quantized_output_layer(
    tmp_path: Path,
) -> None:
    model = quantized(tiny.build("llama", tmp_path / "model"))
    head = split(model)
    assert not list(head.lm_head.parameters())
    heads = MedusaHeads.start(head, tiny.HIDDEN, options(), None)
    hidden = torch.randn(4, tiny.HIDDEN)
    torch.testing.assert_close(heads(hidden)[0], head(hidden), rtol=1e-3, atol=1e-3)
    assert len(output_weight(head.lm_head, tiny.HIDDEN)) == tiny.VOCABULARY


_CHILD = """
import sys, time
from pathlib import Path
import torch
from compressor.models.architecture import CausalLM
from compressor.models.head import split
from compressor.speculate import training
from compressor.speculate.corpus import Corpus
from compressor.speculate.features import Features
from compressor.speculate.medusa import train_medusa
from tests.speculate.test_medusa import options
training.CHECKPOINT_SECONDS, training._WRITING_SHARE = 0.0, float("inf")
torch.set_num_threads(1)
root, pause = Path(sys.argv[1]), float(sys.argv[3])
train_medusa(
    split(CausalLM.open(root / "model").load_full(torch.float32)),
    Corpus.load(root / "corpus"),
    Features.open(root / "features"),
    options(loss="lk", draft_vocabulary=64),
    root / sys.argv[2],
    advance=lambda note: time.sleep(pause),
)
"""


def test_training_that_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    make("llama", tmp_path)
    whole = [sys.executable, "-c", _CHILD, str(tmp_path), "whole", "0"]
    killed = [sys.executable, "-c", _CHILD, str(tmp_path), "killed", "0.1"]
    process = subprocess.Popen(killed)
    while not (tmp_path / "killed" / STATE).exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / FACTS).exists()
    for command in (whole, [*killed[:-1], "0"]):
        subprocess.run(command, check=True)
    files = [(tmp_path / name / BEST).read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_in_bfloat16_products_are_rounded_and_what_is_trained_is_not(tmp_path: Path) -> None:
    model, corpus, features = make("llama", tmp_path)
    heads, facts = train_medusa(
        split(model), corpus, features, options(dtype="bfloat16"), tmp_path / "low"
    )
    _, exact = train_medusa(split(model), corpus, features, options(), tmp_path / "high")
    assert all(p.dtype == torch.float32 for p in heads.parameters())
    low, high = ([step["loss"] for step in one["steps"]] for one in (facts, exact))
    assert low != high
    assert low == pytest.approx(high, rel=0.05)


def test_samples_too_short_to_teach_anything_are_left_out(tmp_path: Path) -> None:
    model, _, _ = make("llama", tmp_path)
    short = Corpus.from_samples([([5, 6], [7]), ([5], [6, 7, 8]), ([5], [6, 7])], 1)
    features = write_features(model, short, tmp_path / "short")
    assert [places(short, row) for row in range(3)] == [0, 2, 1]
    _, facts = train_medusa(
        split(model), short, features, options(epochs=1, batch_size=1), tmp_path / "heads"
    )
    assert len(facts["steps"]) == 1


def test_without_samples_held_out_it_is_refused(tmp_path: Path) -> None:
    model, _, _ = make("llama", tmp_path)
    none = Corpus.from_samples([([5], [6, 7, 8])], 0)
    features = write_features(model, none, tmp_path / "none")
    with pytest.raises(RunError, match="no sample is held out"):
        train_medusa(split(model), none, features, options(), tmp_path / "heads")
