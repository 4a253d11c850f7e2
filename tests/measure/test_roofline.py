"""Estimates against numbers worked out by hand, and what must hold for any of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError, RunError
from compressor.measure import roofline
from compressor.measure.devices import (
    Device,
    devices,
    find_device,
    measure_device,
    this_device,
)
from compressor.measure.prices import price_rows, resolve_prices
from compressor.measure.roofline import Efficiency, Setup, Speculation, parse_scheme
from compressor.models.dimensions import Dimensions, config_dimensions, read_dimensions
from tests import tiny
from tests.test_cli import ROOT, compress

A100 = devices()["a100-80gb"]
LINEARS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


@pytest.fixture(scope="module")
def llama() -> Dimensions:
    """Llama-2-7B."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        dtype="float16",
    )
    return config_dimensions(config, "Llama-2-7B")


@pytest.fixture(scope="module")
def mixtral() -> Dimensions:
    """Mixtral-8x7B."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return config_dimensions(config, "Mixtral-8x7B")


def test_llama_2_7b_dimensions(llama: Dimensions) -> None:
    assert llama.parameters == 6_738_415_616
    assert sum(linear.parameters for linear in llama.linears) == LINEARS
    assert llama.active_parameters == llama.parameters - 32000 * 4096
    assert not llama.tied and llama.dtype == "float16"


def test_llama_2_7b_in_fp16_on_an_a100_takes_6_6_ms_a_token(llama: Dimensions) -> None:
    setup = Setup(llama, dtype="float16")
    assert setup.weight_bytes == 2 * 6_738_415_616
    assert setup.weight_bytes / A100.bandwidth == pytest.approx(6.61e-3, rel=1e-3)
    # A step reads one row of the embedding and not the table (262 MB), and no cache yet.
    step = roofline.step(setup, A100, batch=1, context=0)
    assert step.seconds == pytest.approx((13_476_831_232 - 262_144_000 + 8192) / 2.039e12)
    assert step.bound == "memory"
    assert step.compute_s == pytest.approx(2 * (LINEARS + 32000 * 4096) / 312e12)


def test_cache_of_llama_2_7b_is_half_a_mebibyte_a_token(llama: Dimensions) -> None:
    assert Setup(llama, dtype="float16").kv_bytes(1) == 2 * 2 * 32 * 4096 == 524_288
    assert Setup(llama, dtype="float16", kv="fp8").kv_bytes(1000) == 262_144_000
    read = [
        roofline.step(Setup(llama, dtype="float16"), A100, batch=4, context=n).memory_s
        for n in (0, 1000)
    ]
    assert read[1] - read[0] == pytest.approx(4 * 524_288_000 / 2.039e12)


def test_int4_weights_count_their_scales(llama: Dimensions) -> None:
    scheme, _ = parse_scheme("W4A16", 128)
    setup = Setup(llama, scheme, "float16")
    plain = 2 * (32000 * 4096 * 2 + llama.rest)
    assert setup.weight_bytes == LINEARS / 2 + LINEARS / 128 * 2 + plain
    assert setup.compute == "float16"
    assert Setup(llama, parse_scheme("W8A8")[0]).compute == "int8"
    assert Setup(llama, parse_scheme("FP8")[0]).compute == "fp8"
    assert roofline.stored_bytes(10, 40, parse_scheme("W3A16", 40)[0], "float16") == 160 + 20
    assert parse_scheme("bf16") == (None, "bfloat16")


def test_most_sequences_on_an_a100(llama: Dimensions) -> None:
    setup = Setup(llama, dtype="float16")
    free = 0.9 * 80e9 - 13_476_831_232
    assert roofline.max_batch(setup, A100, context=2048) == int(free // (2048 * 524_288)) == 54
    left = 0.9 * 16e9 - 13_476_831_232
    assert roofline.max_batch(setup, devices()["t4"], context=8) == int(left // (8 * 524_288))
    small = dataclasses.replace(A100, memory_bytes=10e9)
    assert roofline.max_batch(setup, small, context=8) == 0


def test_prefill_of_llama_2_7b_is_bound_by_compute(llama: Dimensions) -> None:
    made = roofline.prefill(Setup(llama, dtype="float16"), A100, batch=1, length=2048)
    attention = 2 * (2 * 4096) * 32 * 2048 * 2048 / 2
    head = 2 * 32000 * 4096
    assert made.compute_s == pytest.approx((2 * LINEARS * 2048 + attention + head) / 312e12)
    assert made.bound == "compute"


def test_crossover_is_where_compute_takes_over(llama: Dimensions) -> None:
    setup = Setup(llama, dtype="float16")
    found = roofline.crossover_batch(setup, A100, context=0)
    # Without a cache: about peak / bandwidth (312e12 / 2.039e12 = 153) multiply-adds per number.
    assert found is not None and 150 < found < 157
    below, above = (roofline.step(setup, A100, batch=b, context=0) for b in (found - 1, found))
    assert (below.bound, above.bound) == ("memory", "compute")
    assert roofline.crossover_batch(setup, A100, context=4000) is None


def test_mixture_reads_the_experts_that_it_touches(mixtral: Dimensions) -> None:
    assert mixtral.parameters == 46_702_792_704
    assert mixtral.active_parameters == pytest.approx(12.88e9 - 0.131e9, rel=2e-3)
    assert mixtral.experts == 8 and roofline.experts_share(mixtral, 1) == 0.25
    assert roofline.experts_share(mixtral, 2) == pytest.approx(1 - 0.75**2)
    setup = Setup(mixtral)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert setup.blocks_bytes(True) == 2 * experts
    one, many = (roofline.step(setup, A100, batch=b, context=0).memory_s for b in (1, 1000))
    assert (many - one) * A100.bandwidth == pytest.approx(2 * experts * 0.75 + 999 * 8192)


def test_speculation_divides_by_the_acceptance_length(llama: Dimensions) -> None:
    setup = Setup(llama, dtype="float16")
    point = {"batch": 1, "input_length": 16, "output_length": 8}
    plain = roofline.estimate_point(setup, A100, **point)
    made = roofline.estimate_point(setup, A100, speculation=Speculation(2.5, 4, 0.05), **point)
    # Bound by memory: verifying five tokens reads four more rows of the embedding.
    rows = 4 * 8192 / A100.bandwidth * 1e3
    assert made["tpot_ms"] == pytest.approx((plain["tpot_ms"] * (1 + 4 * 0.05) + rows) / 2.5)
    assert roofline.expected_tokens(0.8, 4) == pytest.approx(3.3616)
    assert roofline.expected_tokens(1.0, 4) == 5
    for wrong in ((0.5, 4, 0), (6, 4, 0), (2, 0, 0), (2, 4, -1)):
        with pytest.raises(RecipeError):
            Speculation(*wrong)


def test_cost_is_the_ledgers(llama: Dimensions) -> None:
    prices = resolve_prices({"device": "h100", "usd_per_hour": 3.6})
    made = roofline.estimate(
        Setup(llama), devices()["h100"], batches=[1, 64], input_length=8, output_length=8,
        prices=prices, efficiency=Efficiency(0.5, 0.5),
    )  # fmt: skip
    for point in made["points"]:
        expected = 3.6 / (point["tok_s"] * 3600 / 1e6)
        assert point["cost_usd_per_mtok_output"] == pytest.approx(expected)
    assert made["estimate"] is True
    json.dumps(made)
    with pytest.raises(RecipeError, match="at least"):
        roofline.estimate(Setup(llama), A100, batches=[0], input_length=8, output_length=8)


@given(
    batch=st.integers(1, 512),
    context=st.integers(0, 8192),
    more=st.integers(1, 512),
    tokens=st.integers(1, 8),
)
def test_more_work_never_takes_less_time(batch: int, context: int, more: int, tokens: int) -> None:
    for dims in (DENSE, MIXTURE):
        for name in ("bf16", "W4A16", "W8A8"):
            setup = Setup(dims, parse_scheme(name)[0])
            made = roofline.step(setup, A100, batch=batch, context=context, tokens=tokens).seconds
            for wider in (
                {"batch": batch + more},
                {"context": context + more},
                {"tokens": tokens + more},
            ):
                larger = {"batch": batch, "context": context, "tokens": tokens} | wider
                assert roofline.step(setup, A100, **larger).seconds >= made


@given(batch=st.integers(1, 256), context=st.integers(1, 8192))
def test_better_devices_and_smaller_formats_are_never_slower(batch: int, context: int) -> None:
    point = {"batch": batch, "input_length": context, "output_length": 16}
    for dims in (DENSE, MIXTURE):
        setups = [Setup(dims, parse_scheme(name)[0]) for name in ("bf16", "W8A16", "W4A16")]
        rates = [roofline.estimate_point(setup, A100, **point)["tok_s"] for setup in setups]
        assert rates == sorted(rates)
        cache = roofline.estimate_point(Setup(dims, kv="fp8"), A100, **point)["tok_s"]
        assert cache >= rates[0]
        better = roofline.estimate_point(setups[0], devices()["h200"], **point)["tok_s"]
        assert better > rates[0]
        slower = roofline.estimate_point(setups[0], A100, efficiency=Efficiency(0.5, 0.5), **point)
        assert slower["tok_s"] == pytest.approx(rates[0] / 2)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt_neox", "opt", "qwen2_moe", "mixtral"])
def test_dimensions_of_a_directory_count_every_parameter(arch: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tiny.build(arch, tmp_path / arch)
    found = read_dimensions(str(path))
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert found.parameters == stored
    assert len(found.windows) == 2 and found.tied is (arch == "llama")
    for weights in path.glob("*.safetensors"):
        weights.unlink()
    assert read_dimensions(str(path)) == found  # the config is enough


def test_sliding_windows_bound_the_cache(tmp_path: Path) -> None:
    found = read_dimensions(str(tiny.build("gemma3", tmp_path / "m")))
    assert found.windows == (8, None)
    assert Setup(found).kv_bytes(100) == (8 + 100) * 2 * 2 * 16 * 2


def test_unreadable_models_and_devices_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="config"):
        read_dimensions(str(tmp_path))
    with pytest.raises(RecipeError, match="h100"):
        find_device("abacus")
    with pytest.raises(RecipeError, match="W4A16"):
        parse_scheme("W99")


def test_device_table_names_prices_and_sources_and_this_processor_can_be_measured() -> None:
    for device in devices().values():
        assert "https://" in device.source
        assert device.price == (device.id if device.id in price_rows() else None)
        assert device.peak["float16"] > 1e13 and device.bandwidth > 1e11
    here = measure_device(seconds=0.02, buffer_bytes=1 << 24, size=256)
    assert 1e8 < here.bandwidth < 1e13 and 1e8 < here.peak["float32"] < 1e15
    read, product = here.readings[:2]
    assert (read.what, read.amount, product.what, product.amount) == (
        "read", 1 << 24, "float32", 2 * 256**3,
    )  # fmt: skip
    assert here.bandwidth == read.amount / read.best_s and read.calls > 1
    assert here.peak["float32"] == product.amount / product.best_s
    assert A100.peak_of("fp8") == A100.peak["float16"]


def test_a_device_is_made_again_from_what_was_read_or_from_its_data_sheet() -> None:
    here = measure_device(seconds=0.0, buffer_bytes=1 << 20, size=32)
    assert Device.from_dict(json.loads(json.dumps(here.to_dict()))) == here == here.again()
    forged = dataclasses.replace(here, bandwidth=1.0, peak={"float32": 1.0})
    assert forged.again() == here
    assert dataclasses.replace(A100, bandwidth=1.0).again() == A100
    with pytest.raises(RecipeError, match="no readings"):
        dataclasses.replace(here, readings=()).again()
    done = subprocess.run(
        [sys.executable, "-m", "compressor.measure.devices", "abacus"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "h100" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(RecipeError, match="no GPU"):
        find_device("gpu")
    assert this_device().id == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reaches_much_of_its_data_sheet() -> None:
    found, sheet = find_device("gpu"), this_device()
    assert found.label == torch.cuda.get_device_name() and found.price == sheet.price
    if sheet.readings:
        return  # not in the table
    assert 0.5 < found.bandwidth / sheet.bandwidth < 1.05
    assert 0.4 < found.peak["bfloat16"] / sheet.peak["bfloat16"] < 1.05


def measured_row(concurrency: int, tpot: float, **facts: Any) -> dict[str, Any]:
    figures = {
        "concurrency": concurrency, "rate_per_s": None, "dtype": "bfloat16", "requests": 4,
        "error_rate": 0.0, "prompt_tokens": 4 * 32, "output_tokens": 4 * 16,
        "ttft_ms": {"p50": 5.0}, "tpot_ms": {"p50": tpot}, "throughput_tok_s": {"value": 100.0},
    }  # fmt: skip
    return figures | facts


def a_report(**performance: list[dict[str, Any]]) -> dict[str, Any]:
    plain = {"scheme": None, "group_size": None, "artifacts": [], "coverage": None,
             "quantization": None}  # fmt: skip
    variants = [{**plain, "name": n, "performance": rows} for n, rows in performance.items()]
    return {
        "baseline": "baseline", "workload": {"engine": "transformers"}, "variants": variants,
    }  # fmt: skip


def test_points_are_compared_with_the_efficiency_of_the_baseline() -> None:
    bounds = [
        roofline.estimate_point(Setup(DENSE), A100, batch=n, input_length=32, output_length=16)
        for n in (1, 4)
    ]
    one, four = (bound["tpot_ms"] for bound in bounds)
    made = roofline.compare(
        a_report(
            baseline=[
                measured_row(1, 2 * one), measured_row(4, 2 * four),
                measured_row(0, 1.0, rate_per_s=3.0), measured_row(8, 1.0, tpot_ms={"p50": None}),
            ],
            # A quarter of the requests failed: they have no tokens.
            other=[measured_row(1, 4 * one, error_rate=0.25, prompt_tokens=96, output_tokens=48)],
        ), A100, DENSE,
    )  # fmt: skip
    assert made is not None and made.efficiency.decode == pytest.approx(0.5)
    assert made.efficiency.prefill == pytest.approx(
        statistics.median(bound["ttft_ms"] / 5.0 for bound in bounds)
    )
    errors = [(r["variant"], r["concurrency"], r["tpot_ms_error"]) for r in made.rows]
    assert errors == [
        ("baseline", 1, pytest.approx(0)), ("baseline", 4, pytest.approx(0)),
        ("other", 1, pytest.approx(-0.5)),
    ]  # fmt: skip
    assert made.median_tpot_error == pytest.approx(0.5)
    alone = roofline.compare(a_report(baseline=[measured_row(1, one)]), A100, DENSE)
    assert alone is not None and alone.median_tpot_error is None
    opened = a_report(baseline=[measured_row(0, 1.0, rate_per_s=3.0)])
    assert roofline.compare(opened, A100, DENSE) is None


def a_variant(sizes: dict[str, int], fmt: str, **facts: Any) -> dict[str, Any]:
    artifact = {"format": fmt, "tensors": {"bytes_by_scheme": sizes}}
    empty = {"scheme": "W4A16", "group_size": 32, "coverage": None, "quantization": None}
    return {**empty, "artifacts": [artifact], **facts}


def test_a_variants_bytes_are_those_of_the_artifact_that_was_served() -> None:
    sizes = {"W4A16": 1000, "bfloat16": 500}
    setup = roofline.run_setup(DENSE, a_variant(sizes, "compressed-tensors"), "float32")
    assert (setup.linear_bytes, setup.dtype) == (1000, "float32")
    gguf = a_variant({"W4A16, Q4_0": 1100, "F16": 7, "BF16": 500, "F32": 9}, "gguf")
    gguf["artifacts"].insert(0, {"format": "compressed-tensors", "tensors": None})
    setup = roofline.run_setup(DENSE, gguf, "Q4_0", "llama.cpp")
    assert (setup.linear_bytes, setup.dtype) == (1100, DENSE.dtype)
    assert roofline.run_setup(DENSE, gguf, "F16", "llama.cpp").dtype == "float16"
    gguf["artifacts"][1]["tensors"]["bytes_by_scheme"]["Q8_0"] = 300  # embeddings, rounded
    setup = roofline.run_setup(DENSE, gguf, "Q4_0", "llama.cpp")
    assert (setup.linear_bytes, setup.output_bytes) == (1100, 300)
    # Linears that were left out count as they are stored.
    coverage = {"block_parameters": 100, "quantized_parameters": 80, "head_parameters": 20}
    left = a_variant(sizes, "compressed-tensors", coverage=coverage)
    assert roofline.run_setup(DENSE, left, "bfloat16").linear_bytes == 1000 + 40 * 2


def test_dimensions_survive_json() -> None:
    for dims in (DENSE, MIXTURE):
        assert Dimensions.from_dict(json.loads(json.dumps(dims.to_dict()))) == dims


def test_command_marks_everything_as_an_estimate(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    asked = ("estimate", "model", "--device", "h100", "--scheme", "W4A16", "--group-size", "32")
    done = compress(*asked, "--kv", "fp8", "--batch", "1,8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "estimate" in done.stdout and "upper bound" in done.stdout
    made = json.loads(compress(*asked, "--json", cwd=tmp_path).stdout)
    assert made["estimate"] is True and [p["batch"] for p in made["points"]] == [1, 8, 32]
    assert made["points"][0]["cost_usd_per_mtok_output"] > 0
    done = compress("estimate", "model", "--device", "h100", "--batch", "x", cwd=tmp_path)
    assert done.returncode == 2 and "--batch" in done.stderr


def test_importing_the_estimator_does_not_load_torch() -> None:
    code = "import sys, compressor.measure.roofline; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def _small(mixture: bool) -> Dimensions:
    from compressor.models.dimensions import Linear

    linears = (Linear(4096, 4096, 64), Linear(14336, 4096, 96, mixture))
    return Dimensions(
        "small", linears, 32000, 4096, True, 1000, (None, 512), 2048, 8192,
        experts=8 if mixture else 0, experts_per_token=2 if mixture else 0,
    )  # fmt: skip


DENSE, MIXTURE = _small(False), _small(True)
