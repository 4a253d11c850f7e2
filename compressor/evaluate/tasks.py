"""Tasks by lm-eval: found by name, run on a model, kept document by document.

lm-eval loads the tasks, writes the prompts and counts the scores; any of its `LM` classes answers.
Every figure that is kept is a function of the kept samples (`figures`), so that it can be made
again from them.

Metrics whose value is no mean of numbers (BLEU, F1 over the whole set and their like) are left out
and named.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressorError, RecipeError, RunError
from compressor.evaluate.documents import BUILTIN as BUILTIN_DIRECTORY
from compressor.evaluate.samples import TaskSample, write_samples
from compressor.evaluate.task_options import BUILTIN, TaskChoice

SAMPLES = "samples"
# How a metric's value follows from the samples: mean of scores, or from log-likelihoods.
MEAN, PERPLEXITY = "mean", "perplexity"
_ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")
_UNITS = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}
_FIX_DATA = (
    "check the network, since data sets of lm-eval's own tasks come from the Hub (once downloaded, "
    "they are read from its cache); or give a local task with `path:`, or a built-in one"
)


def builtin_names() -> list[str]:
    """Names of the tasks that come with this package."""
    return sorted(
        BUILTIN + path.name.removesuffix(".yaml")
        for path in BUILTIN_DIRECTORY.iterdir()
        if path.name.endswith(".yaml")
    )


@functools.cache
def _manager(directories: tuple[str, ...], defaults: bool) -> Any:
    """lm-eval's index of the tasks below directories; of its own too with ``defaults`` (10 s)."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=list(directories), include_defaults=defaults)


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's warnings about what is as it should be."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def specifications(choice: TaskChoice, base_dir: Path, where: str) -> tuple[Any, list[str]]:
    """(lm-eval's task manager, what it is to load) of one entry of a recipe.

    Args:
        choice: the entry.
        base_dir: directory of the recipe.
        where: the entry's place, for errors.

    Raises:
        RecipeError: there is no such task, file or directory; with the nearest name.
    """
    if choice.is_builtin:
        _known(str(choice.task), builtin_names(), where)
        return _manager((str(BUILTIN_DIRECTORY),), False), [str(choice.task)]
    if choice.path is None:
        manager = _manager((), True)
        names = [*manager.all_tasks, *builtin_names()]
        _known(str(choice.task), names, where)
        return manager, [str(choice.task)]
    path = base_dir / choice.path
    directory = path if path.is_dir() else path.parent
    if not path.is_dir() and not (path.is_file() and path.suffix in (".yaml", ".yml")):
        raise RecipeError(
            f"there is no YAML file or directory {choice.path!r}",
            where=where,
            fix="correct `path`; it is relative to the recipe",
        )
    manager = _manager((str(directory),), False)
    found = [
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None
        and (path.is_dir() or Path(entry.yaml_path).resolve() == path.resolve())
    ]
    if not found:
        raise RecipeError(
            f"lm-eval finds no task in {choice.path!r}",
            where=where,
            fix="a task's YAML has the keys task, dataset_path or custom_dataset, output_type, "
            "doc_to_text and doc_to_target",
        )
    if choice.task is not None:
        _known(choice.task, list(manager.task_index), where)
        found = [choice.task]
    return manager, found


def _known(name: str, names: Sequence[str], where: str) -> None:
    if name in names:
        return
    short = {known.removeprefix(BUILTIN): known for known in names}
    near = difflib.get_close_matches(name.removeprefix(BUILTIN), short, 3, cutoff=0.6)
    prefixed = [BUILTIN + name] if BUILTIN + name in names else []
    hint = " or ".join(map(repr, dict.fromkeys([*prefixed, *(short[one] for one in near)])))
    few = names if len(names) < 20 else []
    raise RecipeError(
        f"there is no task {name!r}",
        where=where,
        fix=f"did you mean {hint}?"
        if hint
        else f"choose from {', '.join(few)}"
        if few
        else "`lm-eval ls tasks` lists lm-eval's own; those of this package begin with builtin:",
    )


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm-eval, ready to run, with what the recipe says of it."""

    name: str
    task: Any
    choice: TaskChoice
    where: str

    @property
    def labels(self) -> Mapping[str, Any]:
        """What the YAML's ``metadata`` says for the report: axis, of, chat, judged."""
        metadata = self.task.config.metadata
        found = metadata.get("labels") if isinstance(metadata, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    @property
    def axis(self) -> str:
        """accuracy, robustness, safety or language:<code>."""
        if self.choice.language is not None:
            return f"language:{self.choice.language}"
        return str(self.choice.axis or self.labels.get("axis") or "accuracy")

    @property
    def of(self) -> str | None:
        """The task that it disturbs."""
        return self.choice.of or self.labels.get("of")


def load_tasks(
    choices: Sequence[TaskChoice], base_dir: Path, places: Sequence[str], seed: int
) -> list[LoadedTask]:
    """The recipe's tasks with their data; groups and tags become the tasks in them.

    Args:
        choices: as the recipe has them.
        base_dir: its directory.
        places: where each stands, for errors.
        seed: of the examples in prompts.

    Raises:
        RecipeError: no such task, one is named twice, or it runs code that a model wrote.
        RunError: its data cannot be loaded.
    """
    loaded: dict[str, LoadedTask] = {}
    for choice, where in zip(choices, places, strict=True):
        manager, names = specifications(choice, base_dir, where)
        with quiet():
            try:
                tasks = manager.load(names)["tasks"]
            except Exception as error:  # data sets raise a dozen unrelated types
                first = (str(error).strip() or "no message").splitlines()[0]
                raise RunError(
                    f"task {', '.join(names)} cannot be loaded ({type(error).__name__}: {first})",
                    where=where,
                    fix=_FIX_DATA,
                ) from error
        for name, task in tasks.items():
            if _file_name(name) in map(_file_name, loaded):
                raise RecipeError(
                    f"task {name!r} is there twice", where=where, fix="remove one of the two"
                )
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise RecipeError(
                    f"task {name!r} runs code that the model writes, or needs pictures or sound",
                    where=where,
                    fix="leave it out",
                )
            shots = choice.num_fewshot
            if shots is not None or task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(seed)
            loaded[name] = LoadedTask(name, task, choice, where)
    return list(loaded.values())


def chosen_documents(count: int, limit: int | None, seed: int, name: str) -> list[int]:
    """Indices of the documents that are asked, ascending; the same for every model.

    Args:
        count: documents of the task.
        limit: how many to take; None for all.
        seed: of the recipe.
        name: the task, or the one that it disturbs.
    """
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed}/{name}").sample(range(count), limit))


def run_tasks(
    lm: Any,
    tasks: Sequence[LoadedTask],
    directory: Path,
    *,
    limit: int | None,
    seed: int,
    has_template: bool,
) -> list[dict[str, Any]]:
    """Ask a model everything, and write the samples.

    Args:
        lm: one of lm-eval's models.
        tasks: from `load_tasks`.
        directory: gets ``samples/<task>.jsonl``.
        limit: documents of a task that has no limit of its own; None for all.
        seed: of the choice of documents, and of what is drawn.
        has_template: whether the model has a chat template.

    Returns:
        one row a task: task, axis, version, num_fewshot, chat, metrics (value and standard error),
        aggregation, left_out, main_metric, samples, file, sha256, of, judged.

    Raises:
        RecipeError: a chat template is asked for that is not there, or a metric.
        RunError: lm-eval fails.
    """
    from transformers import set_seed

    rows: dict[str, dict[str, Any]] = {}
    for chat in (False, True):
        part = [task for task in tasks if _in_chat(task, has_template) == chat]
        if not part:
            continue
        set_seed(seed)
        indices = {
            each.name: chosen_documents(
                len(each.task.eval_docs), each.choice.limit or limit, seed, each.of or each.name
            )
            for each in part
        }
        answered = _evaluate(lm, part, indices, chat)
        for each in part:
            samples = _samples(each, answered[each.name])
            rows[each.name] = _row(each, samples, chat, directory)
    return [rows[each.name] for each in tasks]


def _in_chat(task: LoadedTask, has_template: bool) -> bool:
    asked = task.choice.apply_chat_template
    if asked and not has_template:
        raise RecipeError(
            f"task {task.name!r} asks for a chat template, and the model has none",
            where=task.where,
            fix="remove apply_chat_template",
        )
    return bool(task.labels.get("chat") and has_template) if asked is None else asked


def _evaluate(
    lm: Any, tasks: Sequence[LoadedTask], indices: Mapping[str, list[int]], chat: bool
) -> Mapping[str, list[dict[str, Any]]]:
    """lm-eval's logged samples by task."""
    from lm_eval.evaluator import evaluate

    with quiet():
        try:
            found = evaluate(
                lm=lm,
                task_dict={"tasks": {each.name: each.task for each in tasks}, "groups": {}},
                samples=dict(indices),
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except CompressorError:
            raise
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            raise RunError(
                f"lm-eval failed ({type(error).__name__}: {first})",
                where=", ".join(each.name for each in tasks),
                fix="run the same task with lm-eval itself to see whether it is the task's fault",
            ) from error
    assert found is not None
    return found["samples"]


def _samples(loaded: LoadedTask, logged: Sequence[Mapping[str, Any]]) -> list[TaskSample]:
    """One sample a document, in their order; where a task has several filters, their scores are
    told apart as ``metric,filter``, and the answer kept is that of the first."""
    several = len({row["filter"] for row in logged}) > 1
    firsts: dict[Any, Mapping[str, Any]] = {}
    scores: dict[Any, dict[str, float]] = {}
    for row in logged:
        firsts.setdefault(row["doc_id"], row)
        suffix = f",{row['filter']}" if several else ""
        scores.setdefault(row["doc_id"], {}).update(_scores(row, suffix))
    return [_sample(loaded.task, row, scores[place]) for place, row in firsts.items()]


def _scores(row: Mapping[str, Any], suffix: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in row["metrics"]:
        value = row[metric]
        if metric in _ROLLING and isinstance(value, tuple | list):
            scores |= {"loglikelihood": float(value[0]), _UNITS[metric]: float(value[1])}
        elif isinstance(value, bool | int | float | np.integer | np.floating):
            scores[metric + suffix] = float(value)
    return scores


def _sample(task: Any, row: Mapping[str, Any], scores: Mapping[str, float]) -> TaskSample:
    prompt = sha256(str(row["arguments"][0][0]).encode("utf-8")).hexdigest()
    if task.OUTPUT_TYPE != "multiple_choice":
        answer = row["filtered_resps"][0]
        text = answer if isinstance(answer, str) else None
        return TaskSample(
            id=str(row["doc_id"]),
            prompt_sha256=prompt,
            target=_plain(row["target"]) if text is not None else None,
            choice=None,
            loglikelihoods=None,
            bytes=None,
            response=text,
            scores=scores,
        )
    choices = task.doc_to_choice(row["doc"])
    likelihoods = [float(answer[0]) for answer in row["filtered_resps"]][: len(choices)]
    target = task.doc_to_text(row["doc"]) if task.multiple_input else row["target"]
    if isinstance(target, str) and target in choices:
        target = choices.index(target)
    return TaskSample(
        id=str(row["doc_id"]),
        prompt_sha256=prompt,
        target=_plain(target),
        choice=int(np.argmax(likelihoods)),
        loglikelihoods=tuple(likelihoods),
        bytes=tuple(len(choice.encode("utf-8")) for choice in choices),
        response=None,
        scores=scores,
    )


def _plain(value: Any) -> int | str | None:
    if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
        return value
    return int(value) if isinstance(value, np.integer) else json.dumps(value, default=str)


def _aggregation(
    task: Any, samples: Sequence[TaskSample]
) -> tuple[dict[str, str], dict[str, bool], list[str]]:
    """(how each metric follows from the samples, whether more of it is better, those left out)."""
    from lm_eval.api.metrics import mean, perplexity

    kept: dict[str, str] = {}
    better: dict[str, bool] = {}
    functions, directions = task.aggregation(), task.higher_is_better()
    there = dict.fromkeys(name for sample in samples for name in sample.scores)
    left = [name for name in functions if not any(key.split(",")[0] == name for key in there)]
    for name in there:
        metric = name.split(",")[0]
        function = functions.get(metric, mean)
        if name in ("words", "bytes"):
            continue
        if name == "loglikelihood" or function is mean:
            kept[name], better[name] = MEAN, directions.get(metric, True) is not False
        elif function is perplexity:
            kept[name], better[name] = PERPLEXITY, False
        else:
            left.append(name)
    for name in _ROLLING:
        if name in left and _UNITS[name] in there:
            left.remove(name)
            kept[name], better[name] = name, False
    return kept, better, left


def figures(
    samples: Sequence[TaskSample], aggregation: Mapping[str, str]
) -> dict[str, dict[str, float | None]]:
    """Value and standard error of every metric.

    Args:
        samples: at least one.
        aggregation: by metric ``mean`` (of the samples that have it; the error is that of the
            sample mean, as lm-eval has it), ``perplexity`` (exp of minus the mean), or one of
            word_perplexity, byte_perplexity and bits_per_byte, made of all documents'
            log-likelihoods over their words or bytes.

    Raises ValueError for another way, KeyError where no sample has the scores.
    """
    made: dict[str, dict[str, float | None]] = {}
    for metric, way in aggregation.items():
        error = None
        if way in (MEAN, PERPLEXITY):
            values = np.array([s.scores[metric] for s in samples if metric in s.scores])
            if not len(values):
                raise KeyError(metric)
            value = float(values.mean())
            if way == PERPLEXITY:
                value = math.exp(-value)
            elif len(values) > 1:
                error = float(values.std(ddof=1) / math.sqrt(len(values)))
        elif way in _ROLLING:
            total = sum(sample.scores["loglikelihood"] for sample in samples)
            rate = -total / sum(sample.scores[_UNITS[way]] for sample in samples)
            value = rate / math.log(2) if way == "bits_per_byte" else math.exp(rate)
        else:
            raise ValueError(f"unknown aggregation {way!r}")
        made[metric] = {"value": value, "stderr": error}
    return made


def _row(
    loaded: LoadedTask, samples: Sequence[TaskSample], chat: bool, directory: Path
) -> dict[str, Any]:
    aggregation, better, left = _aggregation(loaded.task, samples)
    usable = [name for name, more in better.items() if more]
    main = loaded.choice.metric
    if main is None:
        main = next((n for n in usable if n.split(",")[0] == "acc_norm"), next(iter(usable), None))
    if main is None or main not in usable:
        raise RecipeError(
            f"task {loaded.name!r} has no metric {main!r} of which more is better"
            if main
            else f"task {loaded.name!r} has no metric whose value is a mean over documents",
            where=loaded.where,
            fix=f"choose from {', '.join(usable)}" if usable else "leave it out",
        )
    file = f"{SAMPLES}/{_file_name(loaded.name)}.jsonl"
    write_samples(samples, directory / file)
    return {
        "task": loaded.name,
        "axis": loaded.axis,
        "version": loaded.task.VERSION,
        "num_fewshot": loaded.task.config.num_fewshot or 0,
        "chat": chat,
        "metrics": figures(samples, aggregation),
        "aggregation": aggregation,
        "left_out": left,
        "main_metric": main,
        "samples": len(samples),
        "file": file,
        "sha256": sha256((directory / file).read_bytes()).hexdigest(),
        "of": loaded.of,
        "judged": loaded.labels.get("judged"),
    }


def _file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in task)


def counter(note: Callable[[str], None]) -> Callable[[int], None]:
    """Adds up the requests that are done and passes on how many in words."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        note(f"{done} requests")

    return advance
