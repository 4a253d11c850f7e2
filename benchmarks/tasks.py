"""Tasks and perplexity by our model class against lm-eval's own, side by side: time and answers.

    python benchmarks/tasks.py MODEL [--limit 200] [--dtypes float32 bfloat16] [--batch 1 8 32]
        [--rounds 3] [--tasks builtin:social_iqa ...] [--text builtin:novel] [--output FILE.json]

Both run in this process on the same loaded model, in turns; a round is one pass over the same
requests, and times are medians over the rounds (wall clock, and the processor's time, which other
programs disturb less). HFLM has the best of the given batch sizes. Exit code 1 when an answer
differs: the choice of any document, or in float32 a log-likelihood by 1e-4 of its size, or rolling
perplexity by 1e-3.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.data.sources import load_texts
from compressor.evaluate.divergence import score_baseline
from compressor.evaluate.lm import LoadedLM
from compressor.evaluate.task_options import TaskChoice
from compressor.evaluate.tasks import chosen_documents, load_tasks

LEAST = 1.5


def requests_of(name: str, limit: int, lm: Any) -> list[Instance]:
    """All requests of a task, as lm-eval's `evaluate` builds them."""
    (loaded,) = load_tasks([TaskChoice(task=name)], Path(), [name], 0)
    chat = bool(loaded.labels.get("chat"))
    loaded.task.build_all_requests(
        samples=chosen_documents(len(loaded.task.eval_docs), limit, 0, loaded.of or name),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=lm.apply_chat_template if chat else None,
    )
    return loaded.task.instances


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds, seconds of the processor)."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def compare(
    requests: list[Instance], lms: dict[str, Any], rounds: int
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Answers and median times by model class, which take turns."""
    kind = requests[0].request_type
    answers: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in lms}
    for _ in range(rounds):
        for name, lm in lms.items():
            call = getattr(lm, kind)
            made, *took = timed(lambda call=call: call(requests, disable_tqdm=True))
            answers[name] = made
            times[name].append((took[0], took[1]))
    medians = {
        name: {
            "seconds": statistics.median(wall for wall, _ in rows),
            "processor_seconds": statistics.median(own for _, own in rows),
        }
        for name, rows in times.items()
    }
    return answers, medians


def agreement(requests: list[Instance], own: list[Any], other: list[Any]) -> dict[str, Any]:
    """How far two models' answers are apart."""
    if requests[0].request_type == "generate_until":
        return {"documents": len(own), "texts_that_differ": sum(map(str.__ne__, own, other))}
    apart = [abs(a[0] - b[0]) / max(abs(b[0]), 1e-9) for a, b in zip(own, other, strict=True)]
    documents: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        documents.setdefault(request.doc_id, []).append(place)
    choices = [
        tuple(int(np.argmax([made[i][0] for i in places])) for made in (own, other))
        for places in documents.values()
    ]
    return {
        "documents": len(documents),
        "choices_that_differ": sum(a != b for a, b in choices),
        "greedy_that_differ": sum(a[1] != b[1] for a, b in zip(own, other, strict=True)),
        "largest_relative_difference": max(apart),
    }


def perplexity(model: Any, tokenizer: Any, lms: dict[str, Any], text: str) -> dict[str, Any]:
    """exp of minus the mean log-likelihood of one text by all: rolling, and by our own suite.

    The text fits into one window, so that all predict every token from the same ones before it.
    """
    ids = tokenizer.encode(text)
    (first,) = (lm.prefix_token_id for name, lm in lms.items() if name == "ours")
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    found = {
        name: float(np.exp(-lm.loglikelihood_rolling(request, disable_tqdm=True)[0] / len(ids)))
        for name, lm in lms.items()
    }
    scores, _ = score_baseline(model, np.array([[first, *ids]], np.int32), 1)
    return {"tokens": len(ids), **found, "divergence suite": float(np.exp(scores.nll.mean()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[
            "builtin:social_iqa",
            "builtin:social_iqa_typos",
            "builtin:social_iqa_listed",
            "builtin:social_iqa_shuffled",
            "builtin:refusal",
            "builtin:over_refusal",
        ],
    )
    parser.add_argument("--text", default="builtin:novel")
    parser.add_argument("--text-tokens", type=int, default=1800)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, texts, good = [], [], True
    for name in args.dtypes:
        dtype = getattr(torch, name)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        ours = LoadedLM(model, tokenizer)
        lms: dict[str, Any] = {"ours": ours}
        lms |= {f"HFLM {n}": HFLM(model, tokenizer=tokenizer, batch_size=n) for n in args.batch}
        for task in args.tasks:
            requests = requests_of(task, args.limit, ours)
            before = ours.tokens, ours.tokens_computed
            answers, times = compare(requests, lms, args.rounds)
            best = min(
                (key for key in times if key != "ours"),
                key=lambda key, times=times: times[key]["processor_seconds"],
            )
            row = {
                "dtype": name,
                "task": task,
                "requests": len(requests),
                "tokens": (ours.tokens - before[0]) // args.rounds,
                "tokens_computed": (ours.tokens_computed - before[1]) // args.rounds,
                "times": times,
                "best": best,
                "speedup": times[best]["seconds"] / times["ours"]["seconds"],
                "speedup_processor": times[best]["processor_seconds"]
                / times["ours"]["processor_seconds"],
                **agreement(requests, answers["ours"], answers[best]),
            }
            rows.append(row)
            if name == "float32":
                same = not row.get("choices_that_differ") and not row.get("texts_that_differ")
                good &= same and row.get("largest_relative_difference", 0) < 1e-4
            print(json.dumps(row), flush=True)
        whole = load_texts(args.text, base_dir=Path())[0]
        text = tokenizer.decode(tokenizer.encode(whole)[: args.text_tokens])
        found = {"dtype": name, **perplexity(model, tokenizer, lms, text)}
        texts.append(found)
        values = [value for key, value in found.items() if key not in ("dtype", "tokens")]
        good &= name != "float32" or max(values) / min(values) - 1 < 1e-3
        print(json.dumps(found), flush=True)
    if args.output:
        args.output.write_text(json.dumps({"tasks": rows, "perplexity": texts}, indent=1) + "\n")
    scored = [row["speedup"] for row in rows if "choices_that_differ" in row]
    print(f"answers {'agree' if good else 'DIFFER'}; speedups of multiple choice {scored}")
    return 0 if good and min(scored, default=LEAST) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
