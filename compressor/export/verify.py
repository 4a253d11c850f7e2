"""Proof that an artifact is what was evaluated: what will load it loads it, and computes the same.

The reference is the model as it was evaluated, in float32. It continues some prompts greedily; the
consumer is then given the same tokens, and its choice behind each and its logits are compared. A
consumer in this process (transformers), or a library in an environment of its own (GPTQModel),
computes in float32 and must agree but for the order of sums. Engines compute in 16 bits, or with
activations in 8, and may choose otherwise where two tokens are nearly equally likely.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from compressor.doctor import gptqmodel_python, vllm_python
from compressor.errors import RunError, first_line

GGUF_FILE = "model.gguf"
_PROGRAM = Path(__file__).parent / "consumers" / "gptqmodel_logits.py"
_TOP = 40  # likeliest tokens that llama.cpp is asked for


@dataclass(frozen=True)
class Limits:
    """How far a consumer may be from the reference.

    Attributes:
        difference: length of the logits' difference / that of the logits; of an engine, mean
            difference of the log-probabilities of the reference's tokens [nats].
        tie: logits that are no further apart count as equal: either may be chosen.
        agreement: least share of choices that are equal in that sense.
    """

    difference: float
    tie: float
    agreement: float


EXACT = Limits(1e-3, 1e-3, 1.0)
# Formats with scales in float16: those of a model in bfloat16 are exact, of one in float32 rounded.
HALVES = Limits(5e-3, 2e-2, 1.0)
# Weights stored in 16 bits after all, or activations rounded to 8 bits in another way (transformers
# takes absmax / 127.5 for their scale, engines and we absmax / 127): 0.11 for SmolLM2's plain W8A8.
ROUNDED = Limits(0.15, 0.3, 0.9)
ENGINE = Limits(0.15, 0.3, 0.9)


@dataclass(frozen=True)
class Reference:
    """What the evaluated model makes of some prompts.

    Attributes:
        sequences: token ids of each prompt and its greedy continuation.
        starts: tokens of each prompt.
        logits: float32 [continuation, vocabulary] each, from which the continuation was chosen.
    """

    sequences: list[list[int]]
    starts: list[int]
    logits: list[torch.Tensor]


@dataclass(frozen=True)
class Verification:
    """Outcome for one artifact.

    Attributes:
        consumer: what loaded it; empty where nothing could be tried.
        version: of the consumer.
        loads: whether it loaded.
        greedy_agreement: share of the reference's greedy tokens that it chooses too.
        max_logit_difference: largest difference of a logit, or, of an engine that tells no logits,
            of a chosen token's log-probability.
        verified: whether it agrees; None where nothing could be tried.
        why: reason, where it is not verified.
    """

    consumer: str
    version: str | None
    loads: bool
    greedy_agreement: float | None
    max_logit_difference: float | None
    verified: bool | None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class _CannotRead(Exception):
    """The consumer has no way to read this artifact, whoever wrote it."""


@torch.no_grad()
def make_reference(model: nn.Module, prompts: Sequence[Sequence[int]], count: int) -> Reference:
    """Continue prompts by ``count`` greedy tokens each; end-of-sequence is a token like others."""
    device = next(model.parameters()).device
    made = Reference([], [], [])
    for prompt in prompts:
        step, cache, rows = torch.tensor([list(prompt)], device=device), None, []
        tokens = list(prompt)
        for _ in range(count):
            out = model(step, past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].float().cpu())
            step, cache = rows[-1].argmax().view(1, 1).to(device), out.past_key_values
            tokens.append(int(step))
        made.sequences.append(tokens)
        made.starts.append(len(prompt))
        made.logits.append(torch.stack(rows))
    return made


def verify_artifact(
    directory: Path,
    fmt: str,
    reference: Reference,
    consumers: Sequence[str],
    missing: str,
    *,
    rounded: bool = False,
) -> Verification:
    """Load an artifact in the first consumer that can, and compare.

    Args:
        directory: the artifact.
        fmt: its format.
        reference: of the model as it was evaluated.
        consumers: to be tried, in this order.
        missing: why others are not tried (`compressor.export.readers.available`).
        rounded: whether more than the order of sums may differ (see `ROUNDED`).
    """
    exact = HALVES if fmt in ("gptq", "awq", "gguf") else EXACT
    limits = ROUNDED if rounded else exact
    reasons = [] if consumers else [missing]
    for consumer in consumers:
        try:
            return _CONSUMERS[consumer](directory, fmt, reference, limits)
        except _CannotRead as reason:
            reasons.append(str(reason))
    return Verification("", None, False, None, None, None, "; ".join(reasons))


def compare_logits(
    reference: Reference, logits: Sequence[torch.Tensor], limits: Limits, consumer: str, found: str
) -> Verification:
    """Judge a consumer by its logits [length, vocabulary] over each whole sequence.

    Args:
        found: the consumer's version.
    """
    worst = error = size = 0.0
    chosen: list[torch.Tensor] = []
    for own, theirs, start in zip(reference.logits, logits, reference.starts, strict=True):
        part = theirs[start - 1 : -1, : own.shape[1]].float()
        apart = part - own
        worst = max(worst, float(apart.abs().max().nan_to_num(torch.inf)))
        error += float(apart.square().sum())
        size += float(own.square().sum())
        chosen.append(part.argmax(-1))
    relative = (error / size) ** 0.5 if size else 0.0
    return _judge(reference, chosen, worst, relative, limits, consumer, found)


def _judge(
    reference: Reference,
    chosen: Sequence[torch.Tensor],
    worst: float,
    difference: float,
    limits: Limits,
    consumer: str,
    found: str | None,
) -> Verification:
    """Judge by the chosen tokens, int64 [continuation] each, and the differences."""
    own = torch.cat(reference.logits)
    tokens = torch.cat(list(chosen))
    best = own.argmax(-1)
    gaps = (own.max(-1).values - own.gather(1, tokens.unsqueeze(1)).squeeze(1)) > limits.tie
    agreement = float((tokens == best).float().mean())
    decided = 1 - float(gaps.float().mean())
    problems = []
    if not difference <= limits.difference:  # or not a number
        problems.append(f"its logits are {difference:.2g} off, at most {limits.difference:g} is")
    if decided < limits.agreement:
        problems.append(f"it chooses {agreement:.0%} of the greedy tokens")
    return Verification(
        consumer, found, True, agreement, worst, not problems, " and ".join(problems)
    )


def _failed(consumer: str, found: str | None, why: str) -> Verification:
    return Verification(consumer, found, False, None, None, False, why)


@torch.no_grad()
def _by_transformers(
    directory: Path, fmt: str, reference: Reference, limits: Limits
) -> Verification:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    arguments: dict[str, Any] = {}
    if fmt == "gguf":
        arguments = {
            "gguf_file": GGUF_FILE,
            "quantization_config": GgufConfig(dequantize=True),
        }
    elif fmt == "compressed-tensors":
        _check_zero_points(directory)
    name = f"transformers {version('transformers')}"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # further libraries' progress bars
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
            model, facts = loaded
            if unread := [*facts["missing_keys"], *facts["mismatched_keys"]]:
                raise _CannotRead(f"{name} finds no weight for {len(unread)} parameters of it")
            model.eval()
            if fmt == "compressed-tensors" and _has_joined_experts(model):
                limits = ROUNDED
            logits = [
                model(torch.tensor([row]), use_cache=False).logits[0] for row in reference.sequences
            ]
    except (
        OSError, ValueError, ImportError, RuntimeError, AttributeError, KeyError, TypeError,
        NotImplementedError, AssertionError, SafetensorError,
    ) as error:  # fmt: skip
        first = first_line(error)
        if fmt in ("safetensors", "bitsandbytes"):  # nothing else than this reads them
            return _failed("transformers", version("transformers"), first)
        raise _CannotRead(f"{name} cannot read it ({first})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return compare_logits(reference, logits, limits, "transformers", version("transformers"))


def _has_joined_experts(model: nn.Module) -> bool:
    """Whether experts lie in one tensor each: transformers 5.23 dequantizes those from
    compressed-tensors in their scales' 16 bits, whatever dtype is asked for."""
    return any(
        name.endswith("proj") and value.dim() == 3 for name, value in model.named_parameters()
    )


def _check_zero_points(directory: Path) -> None:
    """transformers 5.23 expects an asymmetric grid's zero points unpacked, which is not the
    format's layout: it computes something else from a checkpoint of any tool."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    if any(not group["weights"].get("symmetric", True) for group in groups):
        raise _CannotRead(
            f"transformers {version('transformers')} does not read the format's zero points"
        )


def _by_gptqmodel(directory: Path, _: str, reference: Reference, limits: Limits) -> Verification:
    python = gptqmodel_python()
    assert python is not None
    with tempfile.TemporaryDirectory() as scratch:
        sequences, output = Path(scratch) / "sequences.json", Path(scratch) / "logits.safetensors"
        sequences.write_text(json.dumps(reference.sequences), encoding="utf-8")
        done = subprocess.run(
            [str(python), str(_PROGRAM), str(directory.resolve()), str(sequences), str(output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=scratch,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or [""]
        if done.returncode:
            return _failed("gptqmodel", None, lines[-1])
        facts = json.loads(lines[-1])
        found = load_file(output)
        logits = [found[str(number)] for number in range(len(reference.sequences))]
    return compare_logits(reference, logits, limits, "gptqmodel", facts["version"])


def _by_vllm(directory: Path, _: str, reference: Reference, __: Limits) -> Verification:
    from compressor.measure.engines.vllm import SERVED_NAME, VllmServer

    python = vllm_python()
    assert python is not None
    longest = max(len(row) for row in reference.sequences)
    flags = ["--max-model-len", str(longest + 8)]

    def scores(server: VllmServer, row: list[int], start: int) -> list[tuple[int, float | None]]:
        body = {"model": SERVED_NAME, "prompt": row, "max_tokens": 1, "prompt_logprobs": 1}
        told = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        found = []
        for place in range(start, len(row)):
            best = min(told[place], key=lambda token: told[place][token]["rank"])
            found.append((int(best), told[place][str(row[place])]["logprob"]))
        return found

    def make(log: Path) -> VllmServer:
        return VllmServer(python, directory, log, flags)

    return _served(reference, make, scores, "vllm")


def _by_llama_cpp(directory: Path, _: str, reference: Reference, __: Limits) -> Verification:
    from gguf import GGUFReader

    from compressor.measure.engines.llama_cpp import LlamaCppServer

    (file,) = directory.glob("*.gguf")
    field = GGUFReader(file).get_field("tokenizer.ggml.eos_token_id")
    end = int(field.contents()) if field is not None else -1

    def scores(
        server: LlamaCppServer, row: list[int], start: int
    ) -> list[tuple[int, float | None]]:
        found: list[tuple[int, float | None]] = []
        for place in range(start, len(row)):
            body = {
                "prompt": row[:place],
                "n_predict": 1,
                "temperature": 0.0,
                "n_probs": _TOP,
                "return_tokens": True,
                "cache_prompt": True,
            }
            answer = server.post("/completion", body)
            if not answer.get("completion_probabilities"):
                # It tells none where the token ends the answer, or is a part of a character.
                found.append((next(iter(answer["tokens"]), end), None))
                continue
            told = answer["completion_probabilities"][0]
            likely = {one["id"]: one["logprob"] for one in told["top_logprobs"]}
            found.append((told["id"], likely.get(row[place], -math.inf)))
        return found

    def make(log: Path) -> LlamaCppServer:
        longest = max(len(row) for row in reference.sequences)
        return LlamaCppServer(file, log, context_length=longest + 8)

    return _served(reference, make, scores, "llama.cpp")


def _served(
    reference: Reference,
    make: Callable[[Path], Any],
    scores: Callable[[Any, list[int], int], list[tuple[int, float | None]]],
    consumer: str,
) -> Verification:
    """Judge a server by (token chosen, log-probability of the reference's token) at each place;
    -inf where that is not among the likeliest, None where it is not told."""
    chosen: list[torch.Tensor] = []
    apart: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with make(Path(scratch) / "log") as server:
                found = server.metadata().get("engine_version")
                for row, start, own in zip(
                    reference.sequences, reference.starts, reference.logits, strict=True
                ):
                    told = scores(server, row, start)
                    chosen.append(torch.tensor([token for token, _ in told]))
                    best = torch.log_softmax(own, -1).max(-1).values.tolist()
                    apart += [
                        abs(value - ours)
                        for (_, value), ours in zip(told, best, strict=True)
                        if value is not None
                    ]
        except RunError as error:
            return _failed(consumer, None, error.what)
    mean = sum(apart) / max(len(apart), 1)
    return _judge(reference, chosen, max(apart, default=0.0), mean, ENGINE, consumer, found)


_CONSUMERS: Mapping[str, Callable[[Path, str, Reference, Limits], Verification]] = {
    "transformers": _by_transformers,
    "gptqmodel": _by_gptqmodel,
    "vllm": _by_vllm,
    "llama.cpp": _by_llama_cpp,
}
