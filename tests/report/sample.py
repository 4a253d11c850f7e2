"""An invented report for tests of the layout. None of its figures was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.measure import points
from compressor.measure.engines.base import RequestSample
from compressor.measure.prices import price_basis, resolve_prices


def requests(variant: str, speed: float, *, rounds: int = 5, noise: float = 0.01) -> list[Any]:
    """Synthetic requests at concurrency 1 and 4 whose decode step takes 20 / `speed` ms."""
    rows, clock = [], 0.0
    for turn in range(rounds):
        for size in (1, 4):
            step = 0.02 / speed * (1 + noise * ((turn * 7 + len(variant)) % 5 - 2)) * size**0.35
            first = clock + step * 6
            times = tuple(first + step * index for index in range(32))
            for index in range(size):
                rows.append(
                    RequestSample(
                        f"{variant}/{size}/{turn}/{index}", 128, 32, clock, first, times, size,
                        turn, variant,
                    )
                )  # fmt: skip
            clock = times[-1] + 0.001
    return rows


def sample_measurement(speeds: dict[str, float], noise: float = 0.01) -> dict[str, Any]:
    """What `measure` would return for synthetic requests, figures computed by the real code."""
    prices = resolve_prices({}, cpu_count=2)
    samples = {name: requests(name, speed, noise=noise) for name, speed in speeds.items()}
    kernels = {
        "baseline": ("dense", "bfloat16"),
        "int8-gptq": ("int8_mm (210)", "float32"),
    }
    engines = {
        name: {
            "engine": "transformers",
            "kernel": kernels.get(name, ("int4pack (210)", "bfloat16"))[0],
            "dtype": kernels.get(name, ("int4pack (210)", "bfloat16"))[1],
            "threads": 2,
        }
        for name in speeds
    }
    record: dict[str, Any] = {
        "baseline": "baseline",
        "price_basis": price_basis(prices, gpu_name=None, cpu_count=2) | {"overrides": {}},
        "list_prices": {},
        "loads": [],
        "artifact_bytes": {},
        "workload": {
            "engine": "transformers",
            "prompts": "builtin:prompts",
            "input_length": 128,
            "output_length": 32,
            "concurrency": [1, 4],
            "rounds": 5,
            "seed": 0,
            "prompts_sha256": "ab" * 32,
            "goal": {"ttft_ms": None, "tpot_ms": None},
        },
        "prices": prices.to_dict(),
        "engines": engines,
        "samples": {
            name: {
                "path": f"samples/{name}.jsonl.gz",
                "sha256": "cd" * 32,
                "requests": 25,
            }
            for name in speeds
        },
        "probes": {
            "baseline": {
                "dtype": "bfloat16",
                "cache": "dynamic",
                "failed": {},
                "tokens_per_second": {
                    "bfloat16/dynamic": 41.0,
                    "float32/dynamic": 30.0,
                },
            }
        },
        "errors": {},
        "seconds": 301.2,
        "notes": ["Invented figures for a test of the layout."],
    }
    return record | points.figures(record, samples)


def _layers(error: float) -> list[dict[str, Any]]:
    return [
        {
            "name": f"model.layers.{index}.mlp.down_proj",
            "error": error * (1 + index / 10),
            "rtn_error": error * 2 * (1 + index / 10),
            "fallback": False,
        }
        for index in range(30)
    ]


def _quality(change: float, base: float, text: str) -> dict[str, Any]:
    width = abs(change) * 0.2 + 0.0005
    return {
        "text": text,
        "tokens": 16384,
        "perplexity": base * (1 + change),
        "perplexity_change": change,
        "perplexity_ci": [change - width, change + width] if change else None,
        "bits_per_byte": 1.0421,
        "kl_mean": abs(change) * 1.1,
        "kl_p99": abs(change) * 9,
        "top1_agreement": 1 - abs(change) * 2.5,
    }


def variant(name: str, **extra: Any) -> dict[str, Any]:
    """A variant that succeeded."""
    return {
        "name": name,
        "status": "ok",
        "size_bytes": 269_000_000,
        "quality": [],
    } | extra


def sample_inputs() -> dict[str, Any]:
    """Keyword arguments of `build_report`: a baseline, INT8, INT4 twice and a failed variant."""
    rows = []
    for name, algorithm, scheme, group, size, change in (
        ("baseline", None, None, None, 269_000_000, 0.0),
        ("int8-gptq", "gptq", "W8A8", None, 163_000_000, 0.0021),
        ("int4-gptq", "gptq", "W4A16", 64, 116_000_000, 0.0634),
        ("int4-rtn", "rtn", "W4A16", 64, 116_000_000, 0.1582),
    ):
        rows.append(
            variant(
                name,
                algorithm=algorithm,
                scheme=scheme,
                group_size=group,
                size_bytes=size,
                coverage={
                    "total_parameters": 134_515_008,
                    "quantized_parameters": 106_168_320,
                    "share": 0.789,
                    "skipped": [{"name": "lm_head", "reason": "output head, tied to embeddings"}],
                }
                if algorithm
                else None,
                quantization={
                    "seconds": 91.4,
                    "peak_rss_bytes": 2_310_000_000,
                    "layers": _layers(0.004 if scheme == "W4A16" else 0.0001),
                }
                if algorithm
                else None,
                quality=[
                    _quality(change, 18.91, "novel"),
                    _quality(change * 0.8, 27.3, "web"),
                ],
                artifacts=[
                    {
                        "format": "compressed-tensors",
                        "path": f"artifacts/{name}/compressed-tensors",
                        "size_bytes": size,
                        "sha256": "0f" * 32,
                        "files": [],
                    }
                ]
                if algorithm
                else [],
            )
        )
    rows.append({"name": "int4-odd", "status": "failed", "error": "group_size 100 does not divide "
                 "576", "algorithm": "gptq", "scheme": "W4A16", "group_size": 100})  # fmt: skip
    return {
        "recipe": {"name": "sample", "sha256": "12" * 32},
        "created": "2000-01-01T00:00:00Z",
        "compressor_version": "0.0.0",
        "command": "compress run sample.yaml",
        "environment": {"cpu": "Invented CPU", "cpu_count": 2, "memory_bytes": 24_000_000_000},
        "model": {
            "source": "invented/model-135M",
            "revision": "abc",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "size_bytes": 269_000_000,
        },
        "calibration": {"source": "builtin:calibration", "samples": 128, "length": 512, "seed": 0,
                        "tokens": 65536, "sha256": "34" * 32},
        "variants": rows,
        "measured": sample_measurement(
            {"baseline": 1.0, "int8-gptq": 1.46, "int4-gptq": 1.9, "int4-rtn": 1.88}
        ),
        "stages": [
            {"name": "load", "kind": "load", "variant": None, "key": "ab12" * 16, "seconds": 6.1,
             "cached": True, "peak_rss_bytes": 800_000_000},
            {"name": "quantize", "kind": "quantize", "variant": "int4-gptq", "key": "cd" * 32,
             "seconds": 91.4, "cached": False, "peak_rss_bytes": 2_310_000_000},
        ],
        "notes": [],
    }  # fmt: skip


def full_inputs() -> dict[str, Any]:
    """`sample_inputs` with raw samples and continuations, as a run has them."""
    inputs = sample_inputs()
    speeds = {"baseline": 1.0, "int8-gptq": 1.46, "int4-gptq": 1.9, "int4-rtn": 1.88}
    inputs["samples"] = {name: requests(name, speed) for name, speed in speeds.items()}
    inputs["variants"][1]["drift"] = {
        "prompts": 2,
        "output_length": 8,
        "equal": 1,
        "first_difference": [5, None],
        "median_first_difference": 6.5,
        "equal_after": [{"tokens": 8, "share": 0.5}],
        "examples": [
            {"prompt": "Where is the cat?", "baseline": "The cat is on the mat now.",
             "variant": "The cat is on the chair now.", "first_difference": 5},
            {"prompt": "Say yes.", "baseline": "Yes.", "variant": "Yes.", "first_difference": None},
        ],
    }  # fmt: skip
    return inputs


def write_sample(directory: Path) -> None:
    """Write the invented report, to look at."""
    from compressor.report.build import build_report
    from compressor.report.write import write_report

    write_report(build_report(**sample_inputs()), directory)
