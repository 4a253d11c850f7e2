"""Tasks run by lm-eval on a tiny model: its own figures, its own data formats, and clear errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import RecipeError, RunError
from compressor.evaluate.lm import LoadedLM
from compressor.evaluate.samples import read_samples
from compressor.evaluate.task_options import TaskChoice
from compressor.evaluate.tasks import (
    builtin_names,
    chosen_documents,
    figures,
    load_tasks,
    run_tasks,
    specifications,
)
from tests import tiny

QUESTIONS = [
    {
        "text": f"It is a truth number {i}",
        "options": ["a man", "a wife so fixed", "in"][: 2 + i % 2],
        "answer": i % 2,
        "word": " his",
        "code": ["of", "the"][i % 2],
    }
    for i in range(14)
]
YAML = {
    "choices": """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: text
doc_to_choice: options
doc_to_target: answer
num_fewshot: 2
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_mutual_info}}, {{metric: mcc}}]
""",
    "words": """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: text
doc_to_target: word
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
""",
    "rolling": """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}} {{{{word}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""",
    "answers": """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: text
doc_to_target: code
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
filter_list:
  - {{name: strict, filter: [{{function: take_first}}]}}
  - name: first
    filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tiny.build("llama", tmp_path_factory.mktemp("model"))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return loaded, AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a task of every kind."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "mine" / "data.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in YAML.items():
        (data.parent / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


def run(
    model: tuple[Any, Any], choices: list[TaskChoice], base: Path, out: Path, limit: int | None
) -> list[dict[str, Any]]:
    tasks = load_tasks(choices, base, [f"r.yaml:{i}" for i in range(len(choices))], 0)
    lm = LoadedLM(*model)
    return run_tasks(lm, tasks, out, limit=limit, seed=0, has_template=True)


def own_run(
    model: tuple[Any, Any], choice: TaskChoice, base: Path, indices: list[int], chat: bool
) -> dict[str, Any]:
    """lm-eval's own results with its own model class."""
    manager, names = specifications(choice, base, "r.yaml:1")
    found = simple_evaluate(
        HFLM(model[0], tokenizer=model[1], batch_size=3),
        tasks=names,
        task_manager=manager,
        samples={name: indices for name in names},
        bootstrap_iters=10,
        apply_chat_template=chat,
        fewshot_random_seed=0,
    )
    assert found is not None
    return found["results"]


@pytest.mark.parametrize("name", builtin_names())
def test_figures_of_built_in_tasks_are_those_of_lm_eval(
    model: tuple[Any, Any], tmp_path: Path, name: str
) -> None:
    choice = TaskChoice(task=name)
    (row,) = run(model, [choice], tmp_path, tmp_path, 12)
    samples = read_samples(tmp_path / row["file"])
    indices = [int(sample.id) for sample in samples]
    assert len(indices) == row["samples"] == 12 and indices == sorted(indices)
    chat = name in ("builtin:refusal", "builtin:over_refusal")
    assert row["chat"] == chat and row["judged"] == ("by rule" if chat else None)
    expected = own_run(model, choice, tmp_path, indices, chat)[name]
    for metric, value in row["metrics"].items():
        assert value["value"] == pytest.approx(expected[f"{metric},none"], abs=1e-12)
        assert value["stderr"] == pytest.approx(expected[f"{metric}_stderr,none"], abs=1e-12)
    assert figures(samples, row["aggregation"]) == row["metrics"]


def test_local_tasks_of_every_kind_have_lm_evals_figures(
    model: tuple[Any, Any], local: Path
) -> None:
    made = run(model, [TaskChoice(path="mine", language="de")], local, local / "out", None)
    rows = {row["task"]: row for row in made}
    expected = own_run(model, TaskChoice(path="mine"), local, list(range(14)), False)
    assert set(rows) == set(expected) and len(rows) == 4
    for name, row in rows.items():
        assert row["axis"] == "language:de" and row["samples"] == 14
        for metric, value in row["metrics"].items():
            if metric == "loglikelihood":
                continue
            key = metric if "," in metric else f"{metric},none"
            assert value["value"] == pytest.approx(expected[name][key], rel=1e-5), metric
        samples = read_samples(local / "out" / row["file"])
        assert figures(samples, row["aggregation"]) == row["metrics"]
    assert set(rows["local_rolling"]["metrics"]) == {
        "loglikelihood", "word_perplexity", "byte_perplexity", "bits_per_byte"
    }  # fmt: skip
    assert set(rows["local_answers"]["metrics"]) == {"exact_match,strict", "exact_match,first"}
    choices = rows["local_choices"]
    assert choices["left_out"] == ["mcc"] and choices["main_metric"] == "acc_norm"
    assert choices["num_fewshot"] == 2
    assert rows["local_words"]["main_metric"] == "acc"
    samples = read_samples(local / "out" / choices["file"])
    for sample, question in zip(samples, QUESTIONS, strict=True):
        assert sample.target == question["answer"]
        assert sample.bytes == tuple(len(option) for option in question["options"])
        best = max(sample.loglikelihoods or ())
        assert sample.loglikelihoods and sample.loglikelihoods.index(best) == sample.choice
        assert sample.scores["acc"] == (sample.choice == sample.target)


def test_perplexity_of_a_text_is_that_of_the_divergence_suite(
    model: tuple[Any, Any], local: Path
) -> None:
    import numpy as np

    from compressor.evaluate.divergence import score_baseline

    (row,) = run(model, [TaskChoice(path="mine/rolling.yaml")], local, local / "out", 1)
    (sample,) = read_samples(local / "out" / row["file"])
    question = QUESTIONS[int(sample.id)]
    ids = [1, *model[1].encode(f"{question['text']} {question['word']}")]
    scores, _ = score_baseline(model[0], np.array([ids], np.int32), 1)
    assert sample.scores["loglikelihood"] == pytest.approx(-float(scores.nll.sum()), rel=1e-4)
    expected = math.exp(float(scores.nll.sum()) / sample.scores["bytes"])
    assert row["metrics"]["byte_perplexity"]["value"] == pytest.approx(expected, rel=1e-4)


def test_a_disturbed_task_asks_the_documents_of_its_original(
    model: tuple[Any, Any], tmp_path: Path
) -> None:
    names = ["social_iqa", "social_iqa_typos", "social_iqa_listed", "social_iqa_shuffled"]
    choices = [TaskChoice(task=f"builtin:{name}") for name in names]
    rows = run(model, choices, tmp_path, tmp_path, 10)
    plain, typos, listed, shuffled = (read_samples(tmp_path / row["file"]) for row in rows)
    for one, other in ((plain, typos), (listed, shuffled)):
        assert [s.id for s in one] == [s.id for s in other]
        assert sum(a.prompt_sha256 != b.prompt_sha256 for a, b in zip(one, other, strict=True)) > 7
    assert [row["of"] for row in rows] == [
        None, "builtin:social_iqa", None, "builtin:social_iqa_listed"
    ]  # fmt: skip
    assert [row["axis"] for row in rows] == ["accuracy", "robustness"] * 2
    again = run(model, choices, tmp_path, tmp_path / "again", 10)
    assert again == rows  # to the byte: the samples' hashes are in them


def test_documents_are_drawn_by_seed_and_name() -> None:
    drawn = chosen_documents(1000, 50, 0, "a")
    assert drawn == sorted(set(drawn)) and len(drawn) == 50 and max(drawn) < 1000
    assert drawn == chosen_documents(1000, 50, 0, "a")
    assert drawn != chosen_documents(1000, 50, 1, "a") != chosen_documents(1000, 50, 1, "b")
    assert chosen_documents(5, 9, 0, "a") == chosen_documents(5, None, 0, "a") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"task": "builtin:social_iq"}, "did you mean 'builtin:social_iqa'"),
        ({"task": "builtin:x"}, "choose from builtin:over_refusal"),
        ({"path": "nowhere.yaml"}, "no YAML file or directory 'nowhere.yaml'"),
        ({"path": "mine/data.jsonl"}, "no YAML file or directory"),
        ({"path": "mine", "task": "local_choice"}, "did you mean 'local_choices'"),
        ({"path": "empty"}, "finds no task"),
    ],
)
def test_a_task_that_is_not_there_is_one_clear_error(
    local: Path, choice: dict[str, Any], words: str
) -> None:
    (local / "empty").mkdir()
    with pytest.raises(RecipeError, match=words) as caught:
        specifications(TaskChoice(**choice), local, "r.yaml:7")
    assert caught.value.where == "r.yaml:7" and caught.value.fix


def test_names_of_lm_eval_are_known_and_missing_data_says_where(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'hellaswag'"):
        specifications(TaskChoice(task="helaswag"), tmp_path, "r.yaml:7")
    with pytest.raises(RecipeError, match="did you mean 'builtin:refusal'"):
        specifications(TaskChoice(task="refusal"), tmp_path, "r.yaml:7")
    # HF_HUB_OFFLINE is set for all tests: the Hub is not reachable.
    with pytest.raises(RunError, match="task hellaswag cannot be loaded") as caught:
        load_tasks([TaskChoice(task="hellaswag")], tmp_path, ["r.yaml:7"], 0)
    assert caught.value.where == "r.yaml:7" and "Hub" in str(caught.value.fix)


def test_settings_that_cannot_be_met_are_refused(model: tuple[Any, Any], local: Path) -> None:
    twice = [TaskChoice(task="builtin:refusal"), TaskChoice(task="builtin:refusal")]
    with pytest.raises(RecipeError, match="there twice"):
        load_tasks(twice, local, ["r.yaml:1", "r.yaml:2"], 0)
    with pytest.raises(RecipeError, match="no metric 'bleu'"):
        run(model, [TaskChoice(path="mine/words.yaml", metric="bleu")], local, local / "out", 2)
    chat = TaskChoice(path="mine/words.yaml", apply_chat_template=True)
    tasks = load_tasks([chat], local, ["r.yaml:1"], 0)
    with pytest.raises(RecipeError, match="chat template"):
        run_tasks(LoadedLM(*model), tasks, local, limit=2, seed=0, has_template=False)
    with pytest.raises(ValueError, match="give `task`"):
        TaskChoice()
    with pytest.raises(ValueError, match="by its language or by its axis"):
        TaskChoice(task="x", language="de", axis="safety")
