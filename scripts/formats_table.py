"""Every format in every consumer: does it load, does it agree, how fast is it, how large.

    .venv/bin/python scripts/formats_table.py --model smollm2=DIR --output reports/formats

For each model (those given, and a tiny random one of each architecture family): grids are made by
round-to-nearest, written in every format that holds them, and each artifact is tried in every
consumer of its format that is on this machine, as `compress run` does it. Writes formats.json and
README.md. Models that are in formats.json already are kept, unless they are named again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from compressor.data.sources import load_texts
from compressor.data.tokens import prompt_tokens
from compressor.doctor import cpu_name, gptqmodel_python, vllm_python
from compressor.errors import CompressorError
from compressor.export import awq, bitsandbytes, compressed_tensors, dense, gguf, gptq, verify
from compressor.export.readers import READERS, available
from compressor.models.architecture import CausalLM
from compressor.numerics.linear import QuantizedLinear
from compressor.quantize import registry
from compressor.quantize.bitsandbytes import iterate_tensors
from compressor.quantize.codes import iterate_quantized, replace_linears
from compressor.quantize.driver import quantize_model
from compressor.stages import quantized_model
from compressor.store import StoredStage

ENGINES = ("transformers", "gptqmodel", "vllm", "llama.cpp")
# Grid, and the formats that hold it; the group size is the largest of these that fits the model.
GRIDS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("W8A8", {"scheme": "W8A8"}, ("compressed-tensors",)),
    ("W8A16", {"scheme": "W8A16"}, ("compressed-tensors", "gptq", "gguf")),
    (
        "W4A16",
        {"scheme": "W4A16", "group_size": True},
        ("compressed-tensors", "gptq", "awq", "gguf", "safetensors"),
    ),
    (
        "W4A16 asymmetric",
        {"scheme": "W4A16", "group_size": True, "symmetric": False},
        ("compressed-tensors", "gptq", "awq", "gguf"),
    ),
    ("FP8", {"scheme": "FP8"}, ("compressed-tensors",)),
)
_LEFT_OUT = "was left out (--engines)"
GROUP_SIZES = (64, 32, 16)


def group_size(model: CausalLM) -> int:
    widths = {ref.module.in_features for i in range(len(model.blocks)) for ref in model.linears(i)}
    return next(size for size in GROUP_SIZES if not any(width % size for width in widths))


def write(fmt: str, source: Path, codes: Path, ignore: list[str], target: Path) -> None:
    """One artifact; plain weights in float32, so that they are compared exactly."""
    quantized = iterate_quantized(codes)
    if fmt == "gguf":
        gguf.export(source, quantized, {}, target)
    elif fmt == "safetensors":
        dense.export(source, quantized, {}, target, dtype="float32")
    else:
        module = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}[fmt]
        module.export(source, quantized, ignore, {}, target)


@torch.no_grad()
def generation_speed(model: Any, prompt: list[int], count: int) -> float:
    """Tokens per second behind a prompt in this process, one sequence."""
    out = model(torch.tensor([prompt]), use_cache=True)
    started = time.perf_counter()
    for _ in range(count):
        step = out.logits[:, -1:].argmax(-1)
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
    return count / (time.perf_counter() - started)


def speed(consumer: str, fmt: str, directory: Path, prompt: list[int], count: int) -> float | None:
    """Tokens per second of one sequence; None where it cannot be told."""
    if consumer == "transformers":
        from transformers import AutoModelForCausalLM, GgufConfig

        own: dict[str, Any] = {}
        if fmt == "gguf":
            own = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **own)
        return generation_speed(model.eval(), prompt, count)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        if consumer == "llama.cpp":
            from compressor.measure.engines.llama_cpp import LlamaCppServer

            (file,) = directory.glob("*.gguf")
            with LlamaCppServer(file, log, context_length=len(prompt) + count + 8) as server:
                body = {
                    "prompt": prompt,
                    "n_predict": count,
                    "temperature": 0.0,
                    "ignore_eos": True,
                }
                told = server.post("/completion", body)
            return float(told["timings"]["predicted_per_second"])
        if consumer == "vllm":
            from compressor.measure.engines.vllm import VllmServer

            python = vllm_python()
            assert python is not None
            flags = ["--max-model-len", str(len(prompt) + count + 8)]
            with VllmServer(python, directory, log, flags) as server:
                server.complete(prompt, 2)
                started = time.perf_counter()
                server.complete(prompt, count)
                return count / (time.perf_counter() - started)
        import subprocess  # GPTQModel

        (Path(scratch) / "s.json").write_text(json.dumps([prompt]))
        program = Path(verify.__file__).parent / "consumers" / "gptqmodel_logits.py"
        command = [str(gptqmodel_python()), str(program), str(directory.resolve()), "s.json", "o"]
        done = subprocess.run(
            [*command, str(count)],
            cwd=scratch, check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            return None
        return float(json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"])


def try_all(
    fmt: str, directory: Path, reference: verify.Reference, args: argparse.Namespace, rounded: bool
) -> list[dict[str, Any]]:
    """One row for each consumer of a format."""
    rows = []
    size = sum(path.stat().st_size for path in directory.iterdir())
    for consumer in READERS[fmt]:
        here, missing = available(fmt, [consumer] if consumer in args.engines else [])
        reasons = [why for why in missing.split("; ") if "verify.engines" not in why]
        why = reasons[0] if reasons else f"{consumer} {_LEFT_OUT}"
        found = verify.verify_artifact(directory, fmt, reference, here, why, rounded=rounded)
        row = found.to_dict() | {"consumer": consumer, "size_bytes": size, "tokens_per_s": None}
        if "why" in row:
            row["why"] = row["why"].replace(f"{directory.parent}/", "")
        if found.verified and args.speed:
            row["tokens_per_s"] = speed(
                consumer, fmt, directory, reference.sequences[0], args.speed
            )
        rows.append(row)
    return rows


def model_rows(source: Path, scratch: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = load_texts("builtin:prompts", field="prompt", base_dir=Path())[: args.prompts]
    prompts = [prompt_tokens(text, tokenizer)[:64] for text in texts]
    rows: list[dict[str, Any]] = []
    size = group_size(CausalLM.open(source))
    for name, options, formats in GRIDS:
        wanted = options | ({"group_size": size} if "group_size" in options else {})
        codes, cls = scratch / "codes", registry.get("rtn")
        model = CausalLM.open(source)
        facts = quantize_model(model, cls(cls.Options(**wanted), model.config.dtype), codes)
        ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
        model = CausalLM.open(source)
        replace_linears(model, codes, QuantizedLinear.from_tensor, untie_head=False)
        reference = verify.make_reference(model.load_full(torch.float32), prompts, args.tokens)
        for fmt in formats:
            target = scratch / "artifact"
            base = {"grid": name, "format": fmt}
            try:
                write(fmt, source, codes, ignore, target)
                tried = try_all(fmt, target, reference, args, "A8" in name or name == "FP8")
                rows += [base | row for row in tried]
            except CompressorError as error:
                rows.append(
                    base | {"consumer": "", "loads": False, "why": f"not written: {error.what}"}
                )
            shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(codes)
    rows += _bitsandbytes(source, scratch, prompts, args)
    return rows


def _bitsandbytes(
    source: Path, scratch: Path, prompts: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    base = {"grid": "NF4", "format": "bitsandbytes"}
    cls = registry.get("bitsandbytes")
    codes, target = scratch / "codes", scratch / "artifact"
    try:
        facts = cls(cls.Options()).quantize_checkpoint(CausalLM.open(source), codes)
        stage = StoredStage("", codes, {"result": facts})
        made = verify.make_reference(quantized_model(source, stage, "cpu"), prompts, args.tokens)
        bitsandbytes.export(source, iterate_tensors(codes), facts["settings"], {}, target)
        return [base | row for row in try_all("bitsandbytes", target, made, args, True)]
    except CompressorError as error:
        return [base | {"consumer": "", "loads": False, "why": f"not written: {error.what}"}]
    finally:
        shutil.rmtree(codes, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Formats in what loads them",
        "",
        "Made by `scripts/formats_table.py`; the figures are in formats.json. Grids by "
        "round-to-nearest. Agreement: share of the greedy tokens of the dequantized model in "
        "float32 that the consumer chooses too, behind the same tokens. Difference: the largest of "
        "a logit, or (llama.cpp, vLLM) of a chosen token's log-probability. Tokens per second: one "
        "sequence (of tiny models they say nothing). Sizes are those of whole directories. "
        "docs/formats.md says why some do not load.",
        "",
    ]
    for name, model in found["models"].items():
        lines += [
            f"## {name}",
            "",
            f"{model['architecture']}, {model['machine']}, {model['date']}",
            "",
            "| grid | format | consumer | loads | agreement | difference | tokens/s | size | |",
            "|---|---|---|---|---:|---:|---:|---:|---|",
        ]
        left_out = [row for row in model["rows"] if _LEFT_OUT in row.get("why", "")]
        for row in model["rows"]:
            if row in left_out:
                continue
            told = f"{row['consumer']} {row.get('version') or ''}".strip()
            match row.get("verified"), row["loads"]:
                case None, _:
                    loads, state = "", "not verified"
                case False, False:
                    loads, state = "no", "**does not load**"
                case good, _:
                    loads, state = "yes", "verified" if good else "**differs**"
            why = shorten(row.get("why", "").replace("|", "\\|"), 240, placeholder=" ...")
            agreement, apart = row.get("greedy_agreement"), row.get("max_logit_difference")
            fast, size = row.get("tokens_per_s"), row.get("size_bytes")
            lines.append(
                f"| {row['grid']} | {row['format']} | {told or '-'} "
                f"| {loads} "
                f"| {'' if agreement is None else f'{agreement:.1%}'} "
                f"| {'' if apart is None else f'{apart:.2g}'} "
                f"| {'' if fast is None else f'{fast:.1f}'} "
                f"| {'' if size is None else f'{size / 1e6:.1f} MB'} "
                f"| {state}{': ' if why else ''}{why} |"
            )
        if left_out:
            consumers = sorted({row["consumer"] for row in left_out})
            lines += ["", f"Not tried here: {', '.join(consumers)}."]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    from tests import tiny

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument(
        "--arch", nargs="*", default=list(tiny.ARCHITECTURES), help="tiny models to make"
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--speed", type=int, default=64, help="tokens timed; 0 for none")
    parser.add_argument("--output", type=Path, default=Path("reports/formats"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "formats.json"
    found = json.loads(file.read_text()) if file.exists() else {"models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        models = {name: Path(path) for name, path in (one.split("=", 1) for one in args.model)}
        for arch in args.arch:
            # GGUF's context ends at the window where all blocks have one: longer than the prompts.
            wider = {"sliding_window": 256} if arch == "mistral" else {}
            models[f"tiny {arch}"] = tiny.build(arch, scratch / arch, **wider)
        for name, source in models.items():
            print(name, file=sys.stderr)
            found["models"][name] = {
                "architecture": type(CausalLM.open(source).model).__name__,
                "machine": cpu_name(),
                "date": time.strftime("%Y-%m-%d"),
                "torch": version("torch"),
                "rows": model_rows(source, scratch, args),
            }
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (args.output / "README.md").write_text(markdown(found) + "\n", encoding="utf-8")
    rows = [row for model in found["models"].values() for row in model["rows"]]
    return 1 if any(row.get("verified") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
