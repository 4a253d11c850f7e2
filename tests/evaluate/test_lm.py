"""Log-likelihoods and generated answers against lm-eval's own model class on tiny random models."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import RunError
from compressor.evaluate.lm import LoadedLM
from compressor.evaluate.packed import Layout, Scorer, Tree, packed_hidden
from compressor.models.attention import HANDLER
from tests import tiny

# GQA with tied embeddings; sliding windows of 8, alone and in turns; untied with biases; learned
# positions; experts; and two that are run over padded sequences: alibi, and capped scores.
PACKED = ("llama", "mistral", "qwen2", "gemma3", "gpt_neox", "opt", "mixtral")
PADDED = ("bloom", "gemma2")
WORDS = tiny.TEXT.split(" ")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.build(name, root / name) for name in (*PACKED, *PADDED)}


def load(directory: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def questions(count: int = 9, seed: int = 0) -> list[Instance]:
    """Contexts of 1 to 40 words, each with 2 to 4 choices: short ones, one that begins another, two
    that are the same, and letters of one token."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        start = chance.randrange(len(WORDS) - 10)
        context = " ".join(WORDS[start : start + chance.randint(1, 40)])
        end = chance.randrange(len(WORDS) - 8)
        long = " " + " ".join(WORDS[end : end + chance.randint(2, 7)])
        choices = [long, long[: len(long) // 2], " of"]
        if number % 3 == 1:
            choices = [" a", " b", " c", " d"]
        if number % 3 == 2:
            choices = [long, long]
        found += [
            Instance("loglikelihood", {}, (context, choice), i) for i, choice in enumerate(choices)
        ]
    return found


def check(
    own: list[tuple[float, bool]], expected: list[tuple[float, bool]], relative: float = 1e-4
) -> None:
    assert [a[0] for a in own] == pytest.approx([b[0] for b in expected], rel=relative)
    assert [a[1] for a in own] == [b[1] for b in expected]


@pytest.mark.parametrize("arch", (*PACKED, *PADDED))
def test_log_likelihoods_are_those_of_lm_eval(directories: dict[str, Path], arch: str) -> None:
    model, tokenizer = load(directories[arch])
    reference, lm = HFLM(model, tokenizer=tokenizer, batch_size=4), LoadedLM(model, tokenizer)
    assert lm.scorer.packs == (arch in PACKED)
    requests = questions()
    check(lm.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True))
    texts = [Instance("loglikelihood_rolling", {}, (t,), 0) for t in (tiny.TEXT, "It is", "a")]
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        reference.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4
    )


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_what_a_request_gets_does_not_depend_on_the_others(
    directories: dict[str, Path], arch: str
) -> None:
    model, tokenizer = load(directories[arch])
    requests = questions(12, seed=3)
    together = LoadedLM(model, tokenizer).loglikelihood(requests)
    order = list(range(len(requests)))
    random.Random(1).shuffle(order)
    for size in (1, 64, 100_000):
        again = LoadedLM(model, tokenizer, batch_tokens=size).loglikelihood(
            [requests[i] for i in order]
        )
        check([again[order.index(i)] for i in range(len(requests))], together, 1e-5)


def test_a_context_is_computed_once_and_nothing_is_padded(directories: dict[str, Path]) -> None:
    model, _ = load(directories["llama"])
    scorer = Scorer(model, 4096)
    context = list(range(10, 50))
    requests = [
        (context, [60, 61, 62]),
        (context, [60, 61, 63]),  # reads the same two tokens
        (context, [64]),  # reads none
        (context, [65, 66]),
        ([70, 71], [72, 73]),
    ]
    found = scorer.score(requests)
    assert scorer.tokens == 42 + 42 + 40 + 41 + 3
    assert scorer.computed == 40 + 2 + 1 + 3
    with torch.no_grad():
        for (context, continuation), (likelihood, _) in zip(requests, found, strict=True):
            ids = torch.tensor([[*context, *continuation]])
            log_p = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
            expected = log_p.gather(1, torch.tensor(continuation)[:, None]).sum()
            assert likelihood == pytest.approx(float(expected), rel=1e-5)


def test_long_requests_lose_tokens_from_the_start_like_lm_eval(tmp_path: Path) -> None:
    model, tokenizer = load(tiny.build("qwen2", tmp_path, max_position_embeddings=24))
    reference, lm = HFLM(model, tokenizer=tokenizer, batch_size=1), LoadedLM(model, tokenizer)
    assert lm.max_length == reference.max_length == 24
    requests = questions(8, seed=5)
    assert max(len(tokenizer.encode(r.args[0])) for r in requests) > 24
    check(lm.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True))
    texts = [Instance("loglikelihood_rolling", {}, (tiny.TEXT,), 0)]
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        reference.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4
    )


def test_tokens_that_join_over_the_boundary_are_cut_as_lm_eval_cuts_them(
    directories: dict[str, Path],
) -> None:
    model, tokenizer = load(directories["llama"])
    # With its logits_cache, lm-eval 0.4.13 takes the wrong positions where one text is cut in two
    # places: it groups by the whole, and reads a shorter continuation from the longest's start.
    reference = HFLM(model, tokenizer=tokenizer, batch_size=1, logits_cache=False)
    lm = LoadedLM(model, tokenizer)
    pairs = []
    joined = 0
    for word in WORDS:  # every way to cut a word in two, and a context that ends in spaces
        for cut in range(1, len(word)):
            pair = (f"It is {word[:cut]}", word[cut:] + " man")
            whole = tokenizer.encode("".join(pair))
            context = tokenizer.encode(pair[0])
            joined += whole[: len(context)] != context
            if len(whole) > len(context):  # else nothing is left for the continuation: see below
                pairs.append(pair)
    pairs += [("It is a  ", "truth"), ("", "truth of it"), ("It is", " a")]
    assert joined > 10
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    check(lm.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True))


def test_a_continuation_without_a_token_of_its_own_is_one_clear_error(
    directories: dict[str, Path],
) -> None:
    model, tokenizer = load(directories["llama"])
    pair = next(
        (word[:cut], word[cut:])
        for word in WORDS
        for cut in range(1, len(word))
        if len(tokenizer.encode(word)) <= len(tokenizer.encode(word[:cut]))
    )
    with pytest.raises(RunError, match="0 tokens"):
        LoadedLM(model, tokenizer).loglikelihood([Instance("loglikelihood", {}, pair, 0)])


def test_cached_keys_and_values_are_rounded_as_in_the_plain_pass(
    directories: dict[str, Path],
) -> None:
    """A handler of the attention (an 8-bit cache) sees each token's keys and values once."""
    from compressor.models.attention import use_chunked_causal

    model, tokenizer = load(directories["llama"])
    use_chunked_causal(model)
    plain = LoadedLM(model, tokenizer).loglikelihood(questions())
    for layer in model.model.layers:
        setattr(layer.self_attn, HANDLER, lambda k, v: ((k * 4).round() / 4, (v * 4).round() / 4))
    lm, reference = LoadedLM(model, tokenizer), HFLM(model, tokenizer=tokenizer, batch_size=1)
    assert lm.scorer.packs
    own = lm.loglikelihood(questions())
    check(own, reference.loglikelihood(questions(), disable_tqdm=True))
    assert [a[0] for a in own] != pytest.approx([b[0] for b in plain], rel=1e-3)


def test_every_token_sees_its_own_path_only(directories: dict[str, Path]) -> None:
    model, _ = load(directories["mistral"])
    chance = random.Random(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(5, 380) for _ in range(count))

    trees = [
        Tree(some(1), (some(3),)),
        Tree(some(20), (some(2), some(9), some(1))),
        Tree(some(11)),
        Tree(some(4), (some(12), some(12))),
    ]
    layout = Layout.of(trees, torch.device("cpu"))
    packed = packed_hidden(model, layout)
    for tree, start in zip(trees, layout.starts, strict=True):
        for number in range(len(tree.branches)) if tree.branches else (None,):
            tail = () if number is None else tree.branches[number]
            with torch.no_grad():
                alone = model.model(torch.tensor([[*tree.trunk, *tail]])).last_hidden_state[0]
            rows = [start + row for row in tree.rows(number)]
            torch.testing.assert_close(packed[rows], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_generated_answers_are_those_of_lm_eval(directories: dict[str, Path], arch: str) -> None:
    model, tokenizer = load(directories[arch])
    settings = [
        {"until": [" the"], "max_gen_toks": 12},
        {"until": ["\n", "an"], "max_gen_toks": 7, "do_sample": False},
    ]
    requests = [
        Instance("generate_until", {}, (" ".join(WORDS[start : start + count]), dict(kwargs)), 0)
        for (start, count), kwargs in zip(
            itertools.product((0, 17, 40), (1, 4, 25)), itertools.cycle(settings), strict=False
        )
    ]
    expected = HFLM(model, tokenizer=tokenizer, batch_size=1).generate_until(
        requests, disable_tqdm=True
    )
    assert any(expected)
    done: list[int] = []
    lm = LoadedLM(model, tokenizer, batch_tokens=64, advance=done.append)
    assert lm.generate_until(requests) == expected
    assert sum(done) == len(requests)


def test_batches_are_halved_where_memory_lacks(directories: dict[str, Path]) -> None:
    model, tokenizer = load(directories["llama"])
    asked = questions(12)
    writing = [
        Instance("generate_until", {}, (" ".join(WORDS[n : n + 9]), {"max_gen_toks": 4}), 0)
        for n in range(0, 40, 5)
    ]
    plain = LoadedLM(model, tokenizer)
    expected = plain.loglikelihood(asked), plain.generate_until(writing)
    most = 100  # tokens that fit

    def check_room(module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = model.model.register_forward_pre_hook(check_room, with_kwargs=True)
    try:
        for number, kind in enumerate(("loglikelihood", "generate_until")):
            told: list[int] = []
            lm = LoadedLM(model, tokenizer, batch_tokens=4096, lowered=told.append)
            found = getattr(lm, kind)((asked, writing)[number])
            assert told and told == sorted(told, reverse=True)
            if kind == "loglikelihood":
                check(found, expected[0], 1e-5)
            else:
                assert found == expected[1]
        most = 10
        with pytest.raises(RunError, match="batch of one"):
            LoadedLM(model, tokenizer).loglikelihood(asked)
    finally:
        handle.remove()
