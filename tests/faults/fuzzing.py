"""Random damage to what comes from outside: nothing but a `CompressorError` may come of it.

python -m tests.faults.fuzzing recipe safetensors gguf samples verify --count 100000
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compressor.errors import CompressorError, RunError

ROOT = Path(__file__).parent.parent.parent
# What breaks parsers: numbers at the edges of their types, values of other types, pieces of syntax.
TOKENS = [
    b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"18446744073709551615",
    b"9223372036854775808", b"4294967295", b"-9223372036854775809", b"0.5", b"\x00", b"\xff\xff",
    b"\xff" * 8, b"\x00" * 8, b"\x01\x00\x00\x00\x00\x00\x00\x80", b"../../x", b"/etc/passwd",
    b"\n", b"  ", b": ", b"- ", b"*a", b"&a ", b"!!python/object:os.system", b"<script>", b",",
    b"]", b"}", b"{", b"[", b'"', b"'", b"\xed\xa0\x80", "\u202e".encode(), b"\\ud800", b"9" * 400,
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What is fed: ``seeds`` are sound inputs, ``feed`` takes a damaged one and a directory."""

    seeds: list[bytes]
    feed: Callable[[bytes], None]


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A sound input with some damage, or (rarely) noise."""
    if draw(st.integers(0, 49)) == 0:
        return draw(st.binary(max_size=200))
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + draw(st.sampled_from(TOKENS)) + data[at:]
        elif kind == 2:
            token = draw(st.sampled_from(TOKENS))
            data = data[:at] + token + data[at + len(token) :]
        elif kind == 3:
            data = data[:at] + data[at + draw(st.integers(1, 24)) :]
        elif kind == 4:
            data = data[:at] + data[at : at + draw(st.integers(1, 64))] + data[at:]
        elif kind == 5:
            data = data[:at]
        else:  # a number, or a quoted word, for another
            data = _value_replaced(data, at, draw(st.sampled_from(TOKENS)))
    return data


def _value_replaced(data: bytes, at: int, token: bytes) -> bytes:
    """The run of word characters around a place for a token."""
    word = b"-+.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
    first = last = at
    while first > 0 and data[first - 1] in word:
        first -= 1
    while last < len(data) and data[last] in word:
        last += 1
    return data[:first] + token + data[last:]


def fuzz(target: Target, count: int, number: int = 0) -> int:
    """Feed so many inputs; how many were refused. One that does worse is shrunk and raised."""
    refused = 0

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(target.seeds))
    def attempt(data: bytes) -> None:
        nonlocal refused
        try:
            target.feed(data)
        except CompressorError as error:
            assert error.what and "Traceback" not in str(error)
            refused += 1

    attempt()
    return refused


def recipe(directory: Path) -> Target:
    """Recipes, those of this project for seeds."""
    from compressor.recipe import load_recipe

    path = directory / "recipe.yaml"

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        load_recipe(path).lock()

    return Target([file.read_bytes() for file in sorted((ROOT / "recipes").glob("*.yaml"))], feed)


def safetensors(directory: Path) -> Target:
    """Headers of checkpoints."""
    from compressor.models.checkpoint import Checkpoint

    path = directory / "model.safetensors"
    save_file({"a.weight": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}, path)

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        found = Checkpoint(directory)
        for name in found.names:
            assert found.tensor(name).shape == found.shape(name)

    return Target([path.read_bytes()], feed)


def gguf(directory: Path) -> Target:
    """Headers of GGUF files: resolved, measured and asked for their licence."""
    from gguf import GGMLQuantizationType, GGUFWriter

    from compressor.estimates import model_facts
    from compressor.models.dimensions import gguf_dimensions
    from compressor.models.origin import read_origin
    from compressor.models.source import resolve_source

    path = directory / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_license("apache-2.0")
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), dtype=np.float32))
    blocks = np.zeros((64, 18), dtype=np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        resolved = resolve_source("model.gguf", base_dir=directory)
        model_facts(resolved)
        gguf_dimensions(path)
        read_origin(resolved)

    return Target([path.read_bytes()], feed)


def config(directory: Path) -> Target:
    """config.json beside sound weights."""
    from compressor.estimates import model_facts
    from compressor.models.architecture import CausalLM
    from compressor.models.source import resolve_source
    from tests import tiny

    tiny.build("llama", directory / "model")
    path = directory / "model" / "config.json"

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        resolved = resolve_source("model", base_dir=directory)
        model_facts(resolved)
        CausalLM.open(resolved.path).check_weights()

    return Target([path.read_bytes()], feed)


def samples(directory: Path) -> Target:
    """Files of raw samples, damaged before and after they are packed."""
    from compressor.measure.samples import read_samples

    path = directory / "samples.jsonl.gz"
    found = sorted((ROOT / "reports").glob("*/samples/*.jsonl.gz"))
    row = {
        "request_id": "a/c1/r0/0", "sent_s": 0.5, "token_times_s": [0.75, 1.0], "input_tokens": 3,
        "output_tokens": 2, "error": None,
    }  # fmt: skip
    text = (found and gzip.decompress(found[0].read_bytes())) or (json.dumps(row) + "\n").encode()
    lines = b"".join(text.splitlines(keepends=True)[:3])

    def feed(data: bytes) -> None:
        path.write_bytes(gzip.compress(data, 1) if data[:2] != b"\x1f\x8b" else data)
        read_samples(path)

    return Target([lines, gzip.compress(lines, mtime=0)], feed)


def verify(directory: Path) -> Target:
    """The files of a run, one of which is damaged: each input names its file in its first line.

    The report is drawn again for one input in 200: drawing takes far longer than all the rest.
    """
    from compressor.verify import verify as check
    from tests import tiny
    from tests.projects import RECIPE, completed

    tiny.build("llama", directory / "model")
    small = {
        **{key: RECIPE[key] for key in ("version", "model", "export")},
        "variants": {"int4": RECIPE["variants"]["int4-rtn"]},
        "evaluate": {**RECIPE["evaluate"], "drift": None},
        "measure": {
            "engine": "transformers",
            "workload": {
                "input_length": 8, "output_length": 4, "concurrency": [1], "requests": 2,
                "rounds": 2,
            },
        },
    }  # fmt: skip
    completed(directory, small)
    (run,) = (directory / "runs" / "recipe").iterdir()
    shutil.rmtree(directory / ".compressor")  # links go: nothing else is damaged with them
    kinds = (".json", ".jsonl", ".yaml", ".sha256", ".gz")
    files = [p for p in sorted(run.rglob("*")) if p.suffix in kinds and p.stat().st_size < 200_000]
    names = [str(path.relative_to(run)) for path in files if "report" not in path.parts]

    number = 0

    def feed(data: bytes) -> None:
        nonlocal number
        number += 1
        name, _, content = data.partition(b"\n")
        try:
            path = run / names[int(name, 16) % len(names)]
        except ValueError:
            return
        whole = path.read_bytes()
        path.chmod(0o644)
        try:
            path.write_bytes(content)
            if not check(run, drawn=number % 200 == 0).ok:
                raise RunError("it is told", where=name.decode(), fix="")
        finally:
            path.write_bytes(whole)

    return Target([b"%x\n" % i + (run / name).read_bytes() for i, name in enumerate(names)], feed)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "recipe": recipe,
    "safetensors": safetensors,
    "gguf": gguf,
    "config": config,
    "samples": samples,
    "verify": verify,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=list(TARGETS))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    for name in arguments.targets:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
            refused = fuzz(TARGETS[name](Path(scratch)), arguments.count, arguments.seed)
        row = {
            "target": name,
            "inputs": arguments.count,
            "refused": refused,
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
