"""GGUF artifacts of a real run on the real model, served and measured by a real llama-server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compressor.data.sources import load_texts
from compressor.errors import RunError
from compressor.export.compressed_tensors import load_model
from compressor.measure.engines.llama_cpp import LlamaCppServer, gguf_file_type, llama_server
from tests.engines.runs import compress, run_recipe

PROMPTS, TOKENS = 12, 16
VARIANTS = ("baseline", "int8", "int4", "zero-points")
# Share of next tokens that must be ours behind the same tokens. Seen (0.5.0, AVX512): 192, 189, 185
# and 188 of 192.
LEAST = {"baseline": 0.99, "int8": 0.95, "int4": 0.92, "zero-points": 0.92}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return llama_server()
    except RunError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as it is, as INT8, and as INT4 on both kinds of grid, measured in llama.cpp."""
    int4 = {"scheme": "W4A16", "group_size": 64}
    workload = {"input_length": 32, "output_length": 8, "concurrency": [1, 2], "requests": 4}
    return run_recipe(
        tmp_path_factory.mktemp("smollm2"),
        "smollm2",
        variants={
            "int8": {"quantize": [{"rtn": {"scheme": "W8A16"}}]},
            "int4": {"quantize": [{"rtn": int4}]},
            "zero-points": {"quantize": [{"rtn": {**int4, "symmetric": False}}]},
        },
        measure={
            "engine": "llama.cpp",
            "program": str(binary),
            "workload": {**workload, "rounds": 2},
        },
        export=["compressed-tensors", "gguf"],
    )


@torch.no_grad()
def reference(directory: Path, prompts: list[list[int]], stop: int) -> list[list[int]]:
    """Greedy continuations by the dequantized model, up to the stop token."""
    model = load_model(directory, kernel="reference")
    found = []
    for prompt in prompts:
        step, cache, tokens = torch.tensor([prompt]), None, []
        while len(tokens) < TOKENS:
            out = model(step, past_key_values=cache, use_cache=True)
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            if int(step) == stop:
                break
            tokens.append(int(step))
        found.append(tokens)
    return found


def complete(server: LlamaCppServer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens behind a prompt, with the stop token where it comes."""
    body = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "return_tokens": True}
    return server.post("/completion", body)["tokens"]


def following(prompts: list[list[int]], tokens: list[list[int]]) -> Iterator[tuple[list[int], int]]:
    """(everything before a token, the token), for every token that follows the prompts."""
    for prompt, answer in zip(prompts, tokens, strict=True):
        for index, token in enumerate(answer):
            yield [*prompt, *answer[:index]], token


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("variant", VARIANTS)
def test_next_tokens_agree_with_our_own_model(
    binary: Path, run: Path, tmp_path: Path, variant: str
) -> None:
    """llama.cpp rounds activations to 8 bits where weights are quantized, so near ties may flip;
    the file's weights themselves are compared exactly in tests/export/test_gguf.py."""
    directory = run / "artifacts" / variant / "compressed-tensors"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = load_texts("builtin:prompts", field="prompt", base_dir=Path())[:PROMPTS]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    ours = reference(directory, prompts, tokenizer.eos_token_id)
    model = run / "artifacts" / variant / "gguf" / "model.gguf"
    with LlamaCppServer(model, tmp_path / "log", context_length=1024, binary=binary) as server:
        theirs = [complete(server, prompt, TOKENS) for prompt in prompts]
        same = [complete(server, known, 1) == [token] for known, token in following(prompts, ours)]
        text = "In 1984 it rained for 40 days; nobody knew why.\n\n  Café!"
        spelt = server.post("/tokenize", {"content": text})["tokens"]
        applied = server.post("/apply-template", {"messages": chats[0]})["prompt"]
    assert spelt == tokenizer.encode(text)
    assert tokenizer.encode(applied) == prompts[0]
    first = sum(a[:1] == b[:1] for a, b in zip(theirs, ours, strict=True))
    whole = sum(a[: len(b)] == b for a, b in zip(theirs, ours, strict=True))
    print(f"{variant}: {sum(same)} of {len(same)} next tokens, {first} first, {whole} answers")
    assert sum(same) >= LEAST[variant] * len(same) and first >= PROMPTS - 1


@pytest.mark.timeout(1500)
def test_a_run_measures_it_and_can_be_verified(run: Path) -> None:
    report = json.loads((run / "report" / "report.json").read_text())
    assert [variant["name"] for variant in report["variants"]] == list(VARIANTS)
    for variant in report["variants"]:
        points = variant["performance"]
        assert [point["concurrency"] for point in points] == [1, 2]
        assert all(point["engine"].startswith("llama.cpp") for point in points)
        assert all(point["error_rate"] == 0 for point in points)
        sizes = {artifact["format"]: artifact["size_bytes"] for artifact in variant["artifacts"]}
        assert variant["size_bytes"] == sizes["gguf"] != sizes["compressed-tensors"]
    types = [gguf_file_type(run / "artifacts" / name / "gguf" / "model.gguf") for name in VARIANTS]
    assert types == ["BF16", "Q8_0", "Q4_0", "Q4_1"]
    compress("verify", str(run), cwd=run)
