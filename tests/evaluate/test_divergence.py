"""Perplexity and divergence against transformers' own loss and a plain full-logit computation."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)

from compressor.errors import RunError
from compressor.evaluate.divergence import (
    Scores,
    by_position,
    score_baseline,
    score_variant,
    summarise,
)
from compressor.models.head import Head, split

SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "opt": OPTConfig(
        vocab_size=131,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        do_layer_norm_before=True,
    ),
}


@pytest.fixture(params=sorted(CONFIGS))
def models(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    baseline = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for parameter in baseline.parameters():
            parameter.mul_(3.0)
    variant = copy.deepcopy(baseline)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return baseline, variant


def windows(n: int = 5, length: int = 17) -> np.ndarray:
    return np.random.default_rng(1).integers(4, 131, (n, length)).astype(np.int32)


def test_scores_agree_with_full_logits(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    baseline, variant = models
    ids = windows()
    base, hidden = score_baseline(baseline, ids, 2)
    ours = score_variant(variant, ids, 2, hidden, Head(split(baseline).lm_head, baseline.config))
    with torch.no_grad():
        batch = torch.from_numpy(ids.astype(np.int64))
        log_p = baseline(batch).logits[:, :-1].double().log_softmax(-1)
        log_q = variant(batch).logits[:, :-1].double().log_softmax(-1)
        loss = baseline(batch, labels=batch).loss
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll = -log_q.gather(2, batch[:, 1:, None])[..., 0]
    assert base.nll.mean() == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(ours.nll, nll.numpy(), atol=2e-4)
    np.testing.assert_allclose(ours.kl, kl.numpy(), atol=2e-4)
    np.testing.assert_array_equal(ours.top1, log_q.argmax(-1).numpy())
    assert ours.kl is not None and ours.kl.mean() > 1e-3


def test_the_baseline_against_itself_has_no_divergence(
    models: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    baseline, _ = models
    ids = windows()
    base, hidden = score_baseline(baseline, ids, 4)
    again = score_variant(baseline, ids, 4, hidden, split(baseline))
    result = summarise(again, base, n_bytes=300)
    assert result["perplexity_change"] == 0.0
    assert result["top1_agreement"] == 1.0
    assert result["kl_mean"] == 0.0 and result["kl_ci"] == [0.0, 0.0]
    assert result["perplexity_ci"] == [0.0, 0.0] and result["change_p"] == 1.0
    assert result["top1_ci"] == [1.0, 1.0] and result["visible_change"] == 0.0


def test_batch_size_does_not_change_the_scores(
    models: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    one, _ = score_baseline(models[0], windows(), 1)
    many, _ = score_baseline(models[0], windows(), 5)
    np.testing.assert_allclose(one.nll, many.nll, atol=1e-4)


def test_summary_figures_from_known_scores() -> None:
    base = Scores(np.full((4, 10), math.log(8), np.float32), np.zeros((4, 10), np.int32))
    top1 = np.zeros((4, 10), np.int32)
    top1[0, :4] = 1
    worse = Scores(np.full((4, 10), math.log(10), np.float32), top1, np.ones((4, 10), np.float32))
    result = summarise(worse, base, n_bytes=160)
    assert result["perplexity"] == pytest.approx(10, rel=1e-6)
    assert result["perplexity_change"] == pytest.approx(0.25, rel=1e-5)
    assert result["perplexity_ci"] == pytest.approx([0.25, 0.25], rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(0.9)
    assert result["bits_per_byte"] == pytest.approx(40 * math.log2(10) / 160, rel=1e-6)
    assert result["kl_mean"] == 1.0


def test_interval_covers_the_change_and_narrows_with_more_windows() -> None:
    rng = np.random.default_rng(0)

    def interval(n: int) -> tuple[float, float]:
        nll = rng.normal(2, 0.5, (n, 8)).astype(np.float32)
        other = nll + rng.normal(0.05, 0.2, (n, 8)).astype(np.float32)
        zeros = np.zeros((n, 8), np.int32)
        low, high = summarise(Scores(other, zeros), Scores(nll, zeros), 100)["perplexity_ci"]
        return low, high

    few, many = interval(10), interval(1000)
    assert many[0] < math.expm1(0.05) < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 3


def test_intervals_of_kl_and_agreement_hold_their_figures() -> None:
    rng = np.random.default_rng(0)
    nll = rng.normal(2, 0.5, (40, 8)).astype(np.float32)
    base = Scores(nll, np.zeros((40, 8), np.int32))
    top1 = (rng.random((40, 8)) < 0.1).astype(np.int32)
    kl = rng.exponential(0.1, (40, 8)).astype(np.float32)
    made = summarise(Scores(nll + 0.1, top1, kl), base, 100)
    for key in ("kl_mean", "top1_agreement"):
        low, high = made[{"kl_mean": "kl_ci", "top1_agreement": "top1_ci"}[key]]
        assert low < made[key] < high < low + 0.1
    assert made["change_p"] < 0.01 and made["windows"] == 40
    one = summarise(Scores(nll[:1], top1[:1], kl[:1]), Scores(nll[:1], top1[:1]), 100)
    assert one["change_p"] is None and one["visible_change"] is None


def test_perplexity_by_position_is_that_of_each_part() -> None:
    nll = np.tile(np.arange(10, dtype=np.float32) / 10, (6, 1))
    base = Scores(nll, np.zeros((6, 10), np.int32))
    worse = nll.copy()
    worse[:, 7:] += 0.5  # long context alone is lost
    own = Scores(worse, base.top1, np.abs(worse - nll))
    rows = by_position(own, base, 3)
    assert [(row["first"], row["last"]) for row in rows] == [(1, 3), (4, 7), (8, 10)]
    assert [row["perplexity_change"] for row in rows] == pytest.approx([0, 0, math.expm1(0.5)])
    assert rows[2]["perplexity"] == pytest.approx(math.exp(0.8 + 0.5))
    assert rows[2]["kl_mean"] == pytest.approx(0.5) and rows[0]["kl_mean"] == 0.0
    assert rows[2]["perplexity_ci"] == pytest.approx([math.expm1(0.5)] * 2)
    logs = [math.log(row["perplexity"]) * (row["last"] - row["first"] + 1) for row in rows]
    assert sum(logs) / 10 == pytest.approx(float(worse.mean()))
    assert len(by_position(base, base, 32)) == 10


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    scores = Scores(
        np.ones((2, 3), np.float32), np.ones((2, 3), np.int32), np.zeros((2, 3), np.float32)
    )
    scores.save(tmp_path / "s.safetensors")
    back = Scores.load(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(back.nll, scores.nll)
    np.testing.assert_array_equal(back.kl, scores.kl)


def test_unknown_logit_transform_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["granite"]).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    # The modelling code reads its scaling from an attribute: change it behind the config's back.
    model.config = copy.deepcopy(model.config)
    model.lm_head.register_forward_hook(lambda m, a, out: out[..., :] * 2 if out.ndim == 3 else out)
    with pytest.raises(RunError, match="logits cannot be recomputed"):
        split(model)
