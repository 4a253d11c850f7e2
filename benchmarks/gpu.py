"""A GPU's ceilings, our kernels against them, and a model with the shapes of an 8B one.

    python benchmarks/gpu.py --output reports/gpu
        [--only device kernels products decode train quantize] [--layers 32] [--model DIRECTORY]

``kernels`` is GPTQ's column loop as a kernel and as tensor operations. ``products`` are the low-bit
products of few rows, on weights that no cache holds, by our kernels and, where it is installed, by
gemlite's. ``decode`` is the embedded engine on a model with random weights rounded to nearest, by
scheme and batch. ``train`` are Medusa heads of its width, on made-up states in place of the
target's. ``quantize`` writes such a model and quantizes it to W4A16 by GPTQ on 128 x 2048 tokens,
within ``--gigabytes`` of the device's memory.
What these take does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import random_llama
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.measure.engines.transformers import TransformersEngine, model_bytes
from compressor.models.architecture import CausalLM
from compressor.models.head import Head
from compressor.numerics import grid, siblings
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize.columns import round_columns_loop
from compressor.quantize.columns_triton import round_columns_triton
from compressor.quantize.driver import quantize_model
from compressor.quantize.gptq import GPTQ, GPTQOptions, inverse_factor
from compressor.speculate.corpus import Corpus
from compressor.speculate.medusa import train_medusa
from compressor.speculate.options import MedusaOptions

PARTS = ("device", "kernels", "products", "decode", "train", "quantize")
SAMPLES, LENGTH, TOKENS = 128, 2048, 49152
SCHEMES = (("bfloat16", None), ("W8A8", -1), ("W8A16", -1), ("W4A16", 128))
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
ROWS = (1, 4, 16, 64, 128)
BATCHES = (1, 4, 16, 64, 128)
ONE_INPUT = (  # linears of a block that read one input
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
PROMPT, OUTPUT = 128, 64  # tokens
HEADS, DRAFT, ANSWERS = 4, 32768, 256  # Medusa heads, tokens that they know, samples of LENGTH / 4
BEYOND_CACHES = 256 << 20  # bytes of weights that a product goes through


def seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of one call [s], by CUDA events, after a warm-up."""
    from triton.testing import do_bench

    return do_bench(work, warmup=50, rep=20 * repeats, return_mode="median") / 1e3


def device() -> dict[str, Any]:
    """What the device can do at best."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    single = a.float()
    source = torch.empty(4 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "name": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "copy_bytes_per_s": 2 * source.numel() / seconds(lambda: target.copy_(source)),
        "bfloat16_flops": 2 * 8192**3 / seconds(lambda: a @ b),
        "float32_flops": 2 * 8192**3 / seconds(lambda: single @ single),
    }


def kernels() -> list[dict[str, Any]]:
    """The kernel against the loop: time of one block of columns, and against float64 what the
    weights it makes lose."""
    rows = []
    for name, symmetric, out in (
        ("W4A16", True, 4096),
        ("W4A16", False, 4096),
        ("W4A16", True, 28672),
    ):
        scheme = Scheme.parse(name, -1, symmetric).weights
        torch.manual_seed(0)
        width = 128
        x = torch.randn(2048, width, device="cuda") @ torch.randn(width, width, device="cuda")
        hessian = 2 / len(x) * x.T @ x
        factor, _ = inverse_factor(hessian, 0.01)
        block = torch.randn(width, out, device="cuda")
        scale = (block.abs().amax(0) / 7.5).expand(width, out)
        zero = None if symmetric else torch.zeros(1, out, device="cuda").expand(width, out)
        found: dict[str, Any] = {
            "scheme": name,
            "symmetric": symmetric,
            "out": out,
            "columns": width,
        }
        codes_of = {}
        for label, function, on, dtype in (
            ("kernel", round_columns_triton, "cuda", torch.float32),
            ("loop", round_columns_loop, "cuda", torch.float32),
            ("reference", round_columns_loop, "cpu", torch.float64),
        ):
            inputs = [t if t is None else t.to(on, dtype) for t in (block, factor, scale, zero)]
            codes = torch.empty(width, out, dtype=torch.int8, device=on)
            errors = torch.empty(width, out, dtype=dtype, device=on)

            work = functools.partial(_round, function, inputs, scheme, codes, errors)
            work()
            codes_of[label] = codes.cpu()
            lost = (codes.double() - (0 if zero is None else zero.to(on).double())) * scale.to(
                on
            ) - block.to(on)
            exact = hessian.double().to(on)
            found[f"{label}_output_error"] = float(
                ((exact @ lost.double()) * lost).sum()
                / ((exact @ block.to(on).double()) * block.to(on)).sum()
            )
            if on == "cuda":
                found[f"{label}_s"] = seconds(work)
        for label in ("kernel", "loop"):
            same = codes_of[label] == codes_of["reference"]
            found[f"{label}_same_codes"] = float(same.float().mean())
        rows.append(found)
    return rows


def _round(function: Any, inputs: Any, scheme: Any, codes: Any, errors: Any) -> None:
    block, factor, scale, zero = inputs
    columns = range(len(block))
    function(block.clone(), factor, scale, zero, scheme, columns, codes, errors)


def products(done: Callable[[Any], None]) -> list[dict[str, Any]]:
    """Low-bit products against float64 and against reading their weights: every one goes through
    copies of its weight that no cache holds, launched as one graph. ``done`` is called after each
    kernel with the rows so far."""
    rows: list[dict[str, Any]] = []
    for out, columns in SHAPES:
        weight = torch.randn(out, columns, device="cuda") * 0.02
        for name, group in SCHEMES:
            for kernel, linear, exact in _linears(weight, name, group):
                facts = {"scheme": name, "out": out, "columns": columns, "kernel": kernel}
                rows += [facts | found for found in _products(linear, exact)]
                done(rows)
                torch.cuda.empty_cache()
    return rows


def _products(linear: nn.Module, exact: torch.Tensor) -> Iterator[dict[str, Any]]:
    """By rows: error and time of one linear, whose exact weight is given."""
    size = model_bytes(linear)
    copies = [linear, *(copy.deepcopy(linear) for _ in range(BEYOND_CACHES // size))]
    for count in ROWS:
        x = torch.randn(count, exact.shape[1], device="cuda").to(torch.bfloat16)
        expected = x.double() @ exact.double().T
        got = linear(x).double()
        taken = _in_a_graph(functools.partial(_all, copies, x)) / len(copies)
        yield {
            "rows": count,
            "error": float((got - expected).norm() / expected.norm()),
            "seconds": taken,
            "bytes_per_s": size / taken,
        }


def _all(linears: list[nn.Module], x: torch.Tensor) -> None:
    for one in linears:
        one(x)


def _linears(
    weight: torch.Tensor, name: str, group: int | None
) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """(kernel, linear, the weight it stands for): a weight in a scheme by our kernel, and by
    gemlite's where that is installed."""
    if group is None:
        dense = nn.Linear(weight.shape[1], len(weight), bias=False, device=weight.device)
        dense.weight.data = weight.to(torch.bfloat16)
        yield "dense", dense, dense.weight.data
        return
    scheme = Scheme.parse(name, group)
    tensor = _rounded(weight, scheme)
    exact, linear = tensor.dequantize(), _quantized(tensor, scheme)
    yield linear.kernel_name, linear, exact
    if find_spec("gemlite"):
        yield "gemlite", _gemlite(tensor, name), exact


def _rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    scale, zero = grid.fit_grid(weight.float(), scheme.weights, scale_dtype=torch.bfloat16)
    return grid.quantize(weight.float(), scale, zero, scheme.weights, None)


def _quantized(tensor: QuantizedTensor, scheme: Scheme) -> QuantizedLinear:
    return QuantizedLinear.from_tensor(tensor, scheme, None, kernel="auto", dtype=torch.bfloat16)


def _gemlite(tensor: QuantizedTensor, name: str) -> nn.Module:
    """The same product by gemlite (https://github.com/mobiusml/gemlite), which keeps weights
    packed in Triton kernels too and tunes itself at the first products of a shape."""
    from gemlite import helper

    how: dict[str, Any] = {"device": str(tensor.codes.device), "dtype": torch.bfloat16}
    if name == "W4A16":
        codes = (tensor.codes.to(torch.int16) + 8).to(torch.uint8)
        zeros = torch.full_like(tensor.scale, 8)
        return helper.A16W4_HQQ_INT(**how).from_weights(codes, tensor.scale, zeros)
    maker = {"W8A8": helper.A8W8_int8_dynamic, "W8A16": helper.A16W8_INT8}[name]
    return maker(**how).from_weights(tensor.codes, scales=tensor.scale)


def _in_a_graph(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median time [s] of some work that is launched as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
    return seconds(graph.replay, repeats)


def decode(
    layers: int, bandwidth: float, done: Callable[[Any], None], device: str = "cuda"
) -> list[dict[str, Any]]:
    """Steps of the embedded engine by scheme, cache and batch.

    Args:
        layers: of the model.
        bandwidth: of the device's memory [bytes/s].
        done: called after each row with those so far.
        device: of the model.
    """
    rows: list[dict[str, Any]] = []
    for name, group in SCHEMES:
        model = _random_model(layers, name, group, device)
        read = model_bytes(model) - model_bytes(model.get_input_embeddings())
        for cache in ("dynamic", "static"):
            engine = TransformersEngine(
                lambda _, model=model: model,
                dtype=torch.bfloat16,
                cache=cache,  # type: ignore[arg-type]
                batches=BATCHES,
                longest=PROMPT + OUTPUT,
            )
            engine.start()
            for batch in BATCHES:
                prompts = np.random.default_rng(0).integers(3, TOKENS, (batch, PROMPT)).tolist()
                engine.generate_tokens(prompts, 4)  # graphs, and what libraries choose
                started = time.perf_counter()
                _, _, times = engine.generate_tokens(prompts, OUTPUT)
                step = float(np.median(np.diff(times)))
                keys = 2 * layers * model.config.num_key_value_heads * model.config.head_dim * 2
                moved = read + batch * (PROMPT + OUTPUT / 2) * keys
                rows.append(
                    {
                        "scheme": name,
                        "cache": cache,
                        "batch": batch,
                        "launch": engine.metadata()["launch"],
                        "kernel": engine.metadata()["kernel"],
                        "first_token_s": times[0] - started,
                        "step_s": step,
                        "tokens_per_s": batch / step,
                        "roofline_share": moved / bandwidth / step,
                    }
                )
                done(rows)
            engine.stop()
        del model
        torch.cuda.empty_cache()
    return rows


def _random_model(layers: int, name: str, group: int | None, device: str) -> Any:
    """A model of random weights in bfloat16, its blocks' linears in a scheme."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(_config(layers)).eval()
    finally:
        torch.set_default_dtype(before)
    for block in model.model.layers:
        for parent, names in ONE_INPUT:
            module = block.get_submodule(parent)
            linears = [getattr(module, one) for one in names]
            if group is None:
                made = siblings.dense(linears)
            else:
                scheme = Scheme.parse(name, group)
                made = siblings.quantized(
                    [(_rounded(linear.weight.data, scheme), scheme, None) for linear in linears],
                    dtype=torch.bfloat16,
                )
            for one, linear in zip(names, made, strict=True):
                setattr(module, one, linear)
    return model


class _States:
    """What `Features` reads from disk, made up."""

    def __init__(self, corpus: Corpus, size: int) -> None:
        self.size = size
        self._values = torch.randn(*corpus.tokens.shape, size).to(torch.bfloat16)

    def hidden(self, row: int) -> torch.Tensor:
        """bfloat16 [length, hidden]."""
        return self._values[row]


def train(peak: float, device: str = "cuda") -> dict[str, Any]:
    """Medusa heads in bfloat16: tokens a second, and their products' share of the peak.

    Args:
        peak: of bfloat16 products [operations/s].
        device: of the heads.
    """
    config = _config(1)
    width, length = config.hidden_size, LENGTH // 4
    tokens = np.random.default_rng(0).integers(3, TOKENS, (ANSWERS, length)).astype(np.int32)
    held_out = ANSWERS // 16
    corpus = Corpus(
        tokens, np.full(ANSWERS, length, np.int32), np.full(ANSWERS, 1, np.int32), held_out
    )
    output = nn.Linear(width, config.vocab_size, bias=False, device=device, dtype=torch.bfloat16)
    options = MedusaOptions(
        heads=HEADS, draft_vocabulary=DRAFT, epochs=1, batch_size=8, dtype="bfloat16"
    )
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        train_medusa(
            Head(output, config),
            corpus,
            _States(corpus, width),  # type: ignore[arg-type]
            options,
            Path(scratch),
            advance=lambda _: marks.append(time.perf_counter()),
        )
    step = float(np.median(np.diff(marks)))
    places = options.batch_size * (length - 2)
    # Forwards once, and twice as much backwards, of a head's block and output layer.
    operations = 3 * 2 * HEADS * (width * width + width * DRAFT)
    return {
        "heads": HEADS,
        "draft_vocabulary": DRAFT,
        "hidden": width,
        "tokens_per_step": places,
        "step_s": step,
        "tokens_per_s": places / step,
        "share_of_peak": places * operations / step / peak,
    }


def _config(layers: int) -> LlamaConfig:
    """The shapes of Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, head_dim=128,
        max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def build(directory: Path, layers: int) -> int:
    """Write a model with the shapes of Llama-3.1-8B; returns its bytes."""
    return random_llama.write(directory, _config(layers), "cuda", TOKENS)


def quantize(model: Path, gigabytes: float) -> dict[str, Any]:
    """GPTQ on the whole model, within some gigabytes of the device."""
    output = model.with_name("quantized")
    shutil.rmtree(output, ignore_errors=True)
    tokens = np.random.default_rng(0).integers(0, TOKENS, (SAMPLES, LENGTH)).astype(np.int32)
    options = {"scheme": "W4A16", "group_size": 128, "observer": "output", "desc_act": True}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    marks = [time.perf_counter()]

    def advance(note: str) -> None:
        marks.append(time.perf_counter())
        print(f"{marks[-1] - marks[-2]:6.2f} s  {note}", flush=True)

    try:
        facts = quantize_model(
            CausalLM.open(model), GPTQ(GPTQOptions(**options), torch.bfloat16), output,
            tokens=tokens, batch_size=8, dtype=torch.bfloat16, device="cuda", advance=advance,
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    steps = np.diff(marks)
    free, whole = torch.cuda.mem_get_info()
    return {
        "options": options,
        "calibration_tokens": SAMPLES * LENGTH,
        "seconds": facts["seconds"],
        "first_block_s": float(steps[0]),
        "median_block_s": float(np.median(steps)),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "limit_bytes": int(gigabytes * 1e9),
        "device_used_bytes": whole - free,
        "activations": facts["activations"],
        "batch_size": facts["batch_size"],
        "parameters": facts["coverage"]["quantized_parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(PARTS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--model", type=Path, help="keep the 8B model here, or take it from here")
    args = parser.parse_args()
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/gpu.py --only {' '.join(args.only)} --layers {args.layers}",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "model"
        for name in args.only:

            def keep(rows: Any, name: str = name) -> None:
                facts[name] = rows
                (args.output / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")

            started = time.perf_counter()
            try:
                if name == "quantize":
                    if not (model / "model.safetensors.index.json").exists():
                        facts["model_bytes"] = build(model, args.layers)
                        facts["build_s"] = time.perf_counter() - started
                    facts[name] = quantize(model, args.gigabytes)
                elif name in ("decode", "train"):
                    best = facts.get("device") or device()
                    if name == "train":
                        facts[name] = train(best["bfloat16_flops"])
                    else:
                        facts[name] = decode(args.layers, best["copy_bytes_per_s"], keep)
                elif name == "products":
                    facts[name] = products(keep)
                else:
                    facts[name] = {"device": device, "kernels": kernels}[name]()
            except Exception:
                facts.setdefault("failed", {})[name] = traceback.format_exc()
                print(facts["failed"][name], flush=True)
            facts.setdefault("seconds", {})[name] = time.perf_counter() - started
            keep(facts.get(name))
    print("\n".join(table(facts)))


def table(facts: dict[str, Any]) -> list[str]:
    """What was found, in lines to read."""
    lines, reach = [], float("nan")
    if "copy_bytes_per_s" in (facts.get("device") or {}):
        one = facts["device"]
        reach = one["copy_bytes_per_s"]
        lines.append(
            f"{one['name']}: {reach / 1e12:.2f} TB/s, bfloat16 {one['bfloat16_flops'] / 1e12:.0f} "
            "TFLOP/s"
        )
    for row in facts.get("kernels") or []:
        lines.append(
            f"column loop {row['columns']} x {row['out']}: {row['kernel_s'] * 1e3:.3f} ms, tensor "
            f"operations {row['loop_s'] * 1e3:.1f} ms, same codes {row['kernel_same_codes']:.2%}"
        )
    for row in facts.get("products") or []:
        lines.append(
            f"{row['scheme']:>8} {row['out']} x {row['columns']}, {row['rows']:>3} rows, "
            f"{row['kernel']}: {row['seconds'] * 1e6:.1f} us, {row['bytes_per_s'] / reach:.0%} of "
            f"the bandwidth, error {row['error']:.1e}"
        )
    for row in facts.get("decode") or []:
        lines.append(
            f"{row['scheme']:>8} batch {row['batch']:>3}, {row['cache']} cache, "
            f"{row['launch'] or 'single kernels'}: {row['tokens_per_s']:.0f} tok/s, "
            f"{row['roofline_share']:.0%} of the roofline"
        )
    if "tokens_per_s" in (one := facts.get("train") or {}):
        lines.append(
            f"Medusa training: {one['tokens_per_s']:.0f} tok/s, {one['share_of_peak']:.0%} of the "
            "bfloat16 peak"
        )
    if "peak_allocated_bytes" in (one := facts.get("quantize") or {}):
        lines.append(
            f"GPTQ W4A16: {one['seconds']:.1f} s, {one['peak_allocated_bytes'] / 1e9:.1f} GB of "
            f"{one['limit_bytes'] / 1e9:.0f} GB"
        )
    return [*lines, *(f"{name} failed: see gpu.json" for name in facts.get("failed", ()))]


if __name__ == "__main__":
    main()
