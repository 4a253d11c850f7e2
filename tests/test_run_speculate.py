"""Whole runs of variants that speculate, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from compressor.errors import RecipeError, RunError
from compressor.export import compressed_tensors as formats
from compressor.export.medusa import load_medusa
from compressor.plan import make_plan
from compressor.recipe import load_recipe
from compressor.serve import serve_command, shown
from compressor.speculate.medusa import MedusaHeads
from compressor.store import Store
from compressor.verify import verify
from tests.export.test_medusa import tgi_logits
from tests.projects import RECIPE, completed, compress, report, write
from tests.tiny import build

SMALL = {"epochs": 1, "batch_size": 4}
METHODS = {
    "medusa": {"medusa": {"heads": 2, **SMALL}, "tgi": True},
    "eagle3": {"eagle3": {"depth": 2, "draft_vocabulary": 128, "aux_layers": [0, 1], **SMALL}},
    "draft": {"draft": {"blocks": 1, "depth": 2, **SMALL}},
    "ngram": "ngram",
}


def recipe(**variants: Any) -> dict[str, Any]:
    return {
        **{key: RECIPE[key] for key in ("version", "model", "export")},
        "speculation": {
            "samples": 12,
            "held_out": 4,
            "input_length": 160,
            "output_length": 12,
            "test_samples": 4,
            "sweep": [1, 2],
        },
        "variants": {"int4": RECIPE["variants"]["int4-rtn"], **variants},
    }


def test_every_method_is_trained_tried_and_exported(project: Path) -> None:
    variants = {name: {"from": "int4", "speculate": how} for name, how in METHODS.items()}
    made = completed(project, recipe(**variants))
    (run,) = (project / "runs" / "recipe").iterdir()
    found = {v["name"]: v for v in made["variants"]}
    sizes = {v["size_bytes"] for name, v in found.items() if name in METHODS or name == "int4"}
    assert len(sizes) == 1  # of the model alone: the same artifact for all
    for name in METHODS:
        speculation = found[name]["speculation"]
        assert speculation["method"] == name
        for result in speculation["results"].values():
            assert result["sequences"] == 4
            assert all(tie < 1e-3 for tie in result["ties"])
            assert 1 <= result["tokens_per_step"] <= 1 + speculation["depth"]
        formats = {a["format"] for a in found[name]["artifacts"]}
        extra = {
            "medusa": {"medusa", "medusa-tgi"},
            "eagle3": {"speculators"},
            "draft": {"draft-model"},
        }
        assert formats == {"compressed-tensors"} | extra.get(name, set())
        rows = (run / "acceptance" / f"{name}.jsonl").read_text().splitlines()
        assert len(rows) == 4 * (1 + len(speculation["results"]))
        sizes_at_once = {row["batch_size"] for row in speculation["times"]}
        assert sizes_at_once == {1, 2}
    assert set(found["medusa"]["speculation"]["results"]) == {"chain", "tree"}
    assert found["medusa"]["speculation"]["losses"]
    assert found["int4"]["speculation"] is None
    check_tgi(run / "artifacts" / "medusa")
    assert [failure.sentence for failure in verify(run).failures] == []
    rows = json.loads((run / "stages.json").read_text())
    next(row for row in rows if row["kind"] == "accept")["result"]["results"]["chain"]["steps"] += 1
    (run / "stages.json").write_text(json.dumps(rows))
    assert any("results.chain.steps" in failure.key for failure in verify(run).failures)


def check_tgi(artifacts: Path) -> None:
    """TGI's layout holds the heads that vLLM's does, and names the model beside it."""
    directory = artifacts / "medusa-tgi"
    state, shape = load_medusa(artifacts / "medusa")
    x = torch.randn(3, shape["hidden"])
    expected = MedusaHeads.from_state(shape, state)(x)
    for got, one in zip(tgi_logits(directory, x, torch.empty(0)), expected, strict=True):
        torch.testing.assert_close(got, one)
    base = json.loads((directory / "config.json").read_text())["base_model_name_or_path"]
    assert (directory / base).resolve() == artifacts / "compressed-tensors"
    command = serve_command(directory, installed=False)
    assert shown(command).startswith(f"cd {directory.resolve()} && text-generation-launcher ")
    files = {path.name for path in directory.iterdir()}
    assert "medusa_lm_head.safetensors" in files
    assert not any(name.endswith((".pt", ".bin", ".pkl")) for name in files)


def test_medusa_2_is_another_model_evaluated_and_exported_as_such(project: Path) -> None:
    """The model that is trained with its heads is what the artifact holds, the heads fit it, and
    the first stage is that of Medusa-1."""
    dialogue = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "It is a truth universally acknowledged."},
    ]
    rows = [json.dumps({"messages": dialogue}) for _ in range(20)]  # so that there is what to learn
    (project / "dialogues.jsonl").write_text("\n".join(rows))
    heads = {"heads": 2, "epochs": 2, "batch_size": 4}
    both = {"epochs": 2, "batch_size": 4, "learning_rate": 0.005}
    made = recipe()
    made["variants"] = {
        "first": {"speculate": {"medusa": heads}},
        "second": {"speculate": {"medusa": {**heads, "joint": both}}},
        "third": {"speculate": {"medusa": {**heads, "joint": dict(both)}, "tree_nodes": 4}},
    }
    made["speculation"] |= {
        "prompts": "dialogues.jsonl", "field": "messages", "answers": "given", "output_length": 24,
    }  # fmt: skip
    made |= {"evaluate": RECIPE["evaluate"], "export": ["compressed-tensors", "gguf"]}
    written = completed(project, made)
    (run,) = (project / "runs" / "recipe").iterdir()
    found = {v["name"]: v for v in written["variants"]}
    rows = {row["name"]: row for row in json.loads((run / "stages.json").read_text())}
    assert rows["speculate:first"]["key"] == rows["speculate:second"]["key"]
    assert rows["joint:second"]["key"] == rows["joint:third"]["key"]
    assert rows["accept:second"]["key"] != rows["accept:third"]["key"]
    assert (found["second"]["algorithm"], found["first"]["algorithm"]) == ("medusa-2", None)
    assert found["second"]["speculation"]["evaluations"][-1]["backbone_kl"] > 0
    assert set(found["second"]["speculation"]["seconds"]) >= {"speculate", "joint"}
    assert rows["joint:second"]["result"]["best_step"] > 0  # else it is the model that it was
    assert found["second"]["quality"][0]["kl_mean"] > 0
    assert found["first"]["quality"][0]["kl_mean"] == 0
    proofs = {a["format"]: a["verification"] for a in found["second"]["artifacts"]}
    assert proofs["compressed-tensors"]["verified"]
    ids = torch.arange(3, 40)[None]
    artifacts = run / "artifacts"

    def logits(variant: str) -> torch.Tensor:
        return formats.load_model(artifacts / variant / "compressed-tensors")(ids).logits

    assert not torch.equal(logits("second"), logits("baseline"))
    assert torch.equal(logits("second"), logits("third"))
    states = [load_medusa(artifacts / name / "medusa")[0] for name in ("first", "second")]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    for way in found["second"]["speculation"]["results"].values():
        assert all(tie < 1e-3 for tie in way["ties"])
    assert [failure.sentence for failure in verify(run).failures] == []


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"from": "int4", "speculate": {"medusa": {"joint": {}}}}, "which are quantized here"),
        (
            {"speculate": {"medusa": {"joint": {}, "output": "original"}}},
            "trains the target's output layer too",
        ),
    ],
)
def test_medusa_2_of_what_cannot_be_trained_is_refused(
    project: Path, variant: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(project, recipe(second=variant)))


def test_heads_of_the_baseline_on_a_quantized_target(project: Path) -> None:
    how = {**METHODS["medusa"], "trained_on": "baseline"}
    made = completed(project, recipe(heads={"from": "int4", "speculate": how}))
    (heads,) = [v for v in made["variants"] if v["name"] == "heads"]
    assert heads["speculation"]["trained_on_baseline"]


def test_a_given_draft_as_it_is_and_a_made_one_in_int4(project: Path) -> None:
    """No training for the first; both are directories that transformers loads, and compute what
    was tried."""
    build("llama", project / "small", layers=1, seed=1)
    (project / "small" / "LICENSE").write_text("Of the small model.")
    rtn = [{"rtn": {"scheme": "W4A16", "group_size": 32}}]
    gptq = [{"gptq": {"scheme": "W8A8"}}]
    variants = {
        "given": {"model": "small", "epochs": 0},
        "tuned": {"model": "small", "depth": 2, "epochs": 6, "learning_rate": 0.01},
        "int4": {"blocks": 1, "depth": 2, "quantize": rtn, **SMALL},
        "int8": {"model": "small", "epochs": 0, "quantize": gptq},
    }
    made = recipe()
    made["variants"] = {name: {"speculate": {"draft": how}} for name, how in variants.items()}
    made["speculation"] |= {"test_samples": 2, "sweep": [1]}
    written = completed(project, {**made, "calibration": RECIPE["calibration"]})
    (run,) = (project / "runs" / "recipe").iterdir()
    found = {v["name"]: v["speculation"] for v in written["variants"]}
    stages = {row["name"] for row in json.loads((run / "stages.json").read_text())}
    assert "speculate:tuned" in stages and "features:int4" in stages
    assert not stages & {"corpus:given", "features:int8", "speculate:given"}
    assert found["tuned"]["losses"] and not found["given"]["losses"]
    assert found["given"]["draft"] == found["tuned"]["draft"]
    assert found["given"]["draft"]["source"] == "small"
    assert (found["int4"]["draft"]["algorithm"], found["int4"]["draft"]["scheme"]) == (
        "rtn",
        "W4A16",
    )
    assert found["int8"]["draft"]["scheme"] == "W8A8"
    ids = torch.arange(3, 40)[None]

    def logits(directory: Path) -> torch.Tensor:
        return formats.load_model(directory)(ids).logits

    drafts = {name: run / "artifacts" / name / "draft-model" for name in variants}
    plain = logits(project / "small")
    assert torch.equal(logits(drafts["given"]), plain)
    assert not torch.equal(logits(drafts["tuned"]), plain)
    assert 0 < (logits(drafts["int8"]) - plain).abs().max() < 0.1 * plain.abs().max()
    for name, directory in drafts.items():
        config = json.loads((directory / "config.json").read_text())
        assert ("quantization_config" in config) == (name in ("int4", "int8"))
        assert config["num_hidden_layers"] == 1
        assert AutoTokenizer.from_pretrained(directory).get_vocab()
        (command, *_) = json.loads((directory / "serving.json").read_text())["engines"]
        assert '"method": "draft_model"' in command["words"][-1]
        own = (directory / "LICENSE").is_file()
        assert own == (name != "int4")
    made = json.loads((drafts["int8"] / "compression.json").read_text())
    assert made["draft"] == {"source": "small", "revision": None}
    assert made["licence"]["files"] == ["LICENSE"]
    assert [failure.sentence for failure in verify(run).failures] == []


def test_a_given_draft_of_other_tokens_fails_its_variant_alone(project: Path) -> None:
    build("llama", project / "other", layers=1, vocab_size=400)
    made = recipe()
    made["variants"] = {"draft": {"speculate": {"draft": {"model": "other", "epochs": 0}}}}
    write(project, made)
    assert compress(project).returncode == 1
    (baseline, draft) = report(project)["variants"]
    assert baseline["error"] is None and "vocab_size 400, the target's 384" in draft["error"]
    made["variants"]["draft"]["speculate"]["draft"]["model"] = "gone"
    path = write(project, made)
    with pytest.raises(RunError, match="draft model 'gone': there is no directory") as error:
        make_plan(load_recipe(path), Store(project / ".compressor"))
    line = int(str(error.value.where).rsplit(":", 1)[1])
    assert "model: gone" in path.read_text().splitlines()[line - 1]
    assert "safetensors" in str(error.value.fix)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"from": "b", "speculate": "ngram"}}, "'b' is no variant"),
        ({"a": {"from": "a"}}, "starts from itself"),
        ({"a": {"from": "int4", "speculate": {"ngram": {}, "medusa": {}}}}, "give one of medusa"),
        ({"a": {"from": "int4", "speculate": {"ngram": {"shortest": 5}}}}, "shortest must not"),
        ({"a": {"from": "int4", "speculate": {"medusa": {"head": 4}}}}, "did you mean 'heads'"),
        ({"a": {"speculate": {"ngram": {}, "tgi": True}}}, "a layout of Medusa heads"),
        (
            {"a": {"speculate": {"medusa": {"draft_vocabulary": 9}, "tgi": True}}},
            "no reduced vocabulary",
        ),
        ({"a": {"speculate": {"draft": {}}}}, "give `blocks`, .* or `model`"),
        ({"a": {"speculate": {"draft": {"model": "m", "blocks": 2}}}}, "give `blocks`"),
        ({"a": {"speculate": {"draft": {"blocks": 2, "revision": "v"}}}}, "`revision` is of"),
        ({"a": {"speculate": {"draft": {"blocks": 2, "epochs": 0}}}}, "must be trained"),
        (
            {"a": {"speculate": {"draft": {"blocks": 2, "quantize": ["rotation", "rtn"]}}}},
            "not quantized with rotation",
        ),
        ({"a": {"speculate": {"draft": {"blocks": 2, "quantize": ["awq"]}}}}, "one step must be"),
        (
            {"a": {"speculate": {"draft": {"blocks": 2, "quantize": ["gptq"]}}}},
            "needs a `calibration:`",
        ),
    ],
)
def test_what_cannot_be_is_told_with_its_line(
    project: Path, variants: dict[str, Any], message: str
) -> None:
    path = write(project, recipe(**variants))
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    line = int(str(error.value.where).rsplit(":", 1)[1])
    assert path.read_text().splitlines()[line - 1].strip()


def test_a_variant_takes_what_it_does_not_give_from_another(project: Path) -> None:
    path = write(project, recipe(a={"from": "int4", "speculate": "ngram"}, b={"from": "a"}))
    found = load_recipe(path)
    assert json.dumps(found.variants["b"].model_dump(exclude={"base"}), default=str) == json.dumps(
        found.variants["a"].model_dump(exclude={"base"}), default=str
    )
