"""`compress verify` on a real run: it holds, wherever it lies, and every tampering is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.measure.samples import read_samples, write_samples
from compressor.measure.workload import read_prompts, write_prompts
from compressor.record import MANIFEST, recorded_key, write_manifest
from compressor.verify import differences, verify
from tests import tiny
from tests.edits import edit, named
from tests.test_cli import compress

RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "model"},
    "calibration": {"source": "builtin:calibration", "samples": 4, "length": 32},
    "variants": {
        "int8": {"quantize": [{"gptq": {"scheme": "W8A8"}}]},
        "int4-rtn": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]},
    },
    "evaluate": {
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 512}],
        "length": 64,
    },
    "measure": {
        "workload": {
            "input_length": 24, "output_length": 4, "concurrency": [1, 2], "requests": 4,
            "rounds": 2, "split": True,
        },
        "dtype": "float32",
        "prices": {"host_usd_per_hour": 0.01, "storage_usd_per_gb_month": 0.1},
    },
}  # fmt: skip
SAMPLES = "samples/int4-rtn.jsonl.gz"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    tiny.build("llama", path / "model")
    (path / "r.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    done = compress("run", "r.yaml", "--quiet", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def run(project: Path, tmp_path: Path) -> Path:
    """A copy of the run on its own: no store, no model, no recipe beside it."""
    (made,) = (project / "runs" / "r").iterdir()
    return Path(shutil.copytree(made, tmp_path / "moved"))


def rehash_samples(run: Path, digest: str, **facts: Any) -> None:
    """What a forger who knows the ledger does: the hash there follows the altered file."""
    edit(
        run / "ledger.json",
        lambda ledger: ledger["samples"]["int4-rtn"].update(sha256=digest, **facts),
    )


def test_a_moved_run_holds_and_says_what_was_compared(run: Path) -> None:
    found = verify(run)
    assert found.ok, [one.sentence for one in found.failures]
    counts = {check.name: check.count for check in found.checks}
    assert counts.pop("acceptance recomputed") == 0  # no variant speculates
    assert counts.pop("task figures recomputed") == counts.pop("gate") == 0  # nor tasks, limits
    assert all(counts.values()), counts
    assert counts["performance figures recomputed"] > 150
    assert counts["quality figures recomputed"] > 3 * 40
    assert [check.note for check in found.checks if check.note] == ["the recipe sets no limits"]
    seal = hashlib.sha256((run / MANIFEST).read_bytes()).hexdigest()
    assert found.seal == seal and verify(run, seal).ok and not verify(run, "0" * 64).ok


def test_command_says_so_in_a_table_and_in_json(run: Path) -> None:
    done = compress("verify", str(run), cwd=run)
    assert done.returncode == 0, done.stderr
    assert "performance figures recomputed" in done.stdout and "equal" in done.stdout
    (run / "report" / "report.md").write_text("forged")
    done = compress("verify", str(run), cwd=run)
    assert done.returncode == 1 and "report/report.md: line 1" in done.stderr
    assert "Traceback" not in done.stderr
    done = compress("verify", str(run), "--json", cwd=run)
    assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False


def test_manifest_is_readable_by_sha256sum_and_run_again_holds(project: Path) -> None:
    (made,) = (project / "runs" / "r").iterdir()
    listed = [line.split("  ") for line in (made / MANIFEST).read_text().splitlines()]
    for digest, name in listed:
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    assert compress("run", "r.yaml", "--quiet", cwd=project).returncode == 0
    assert compress("report", str(made), cwd=project).returncode == 0
    assert verify(made).ok


def test_changed_latency_is_found_although_every_hash_was_fixed(run: Path) -> None:
    rows = read_samples(run / SAMPLES)
    last = rows[0].token_times_s
    rows[0] = dataclasses.replace(rows[0], token_times_s=(*last[:-1], last[-1] + 0.05))
    digest = write_samples(run / SAMPLES, rows)
    rehash_samples(run, digest)
    write_manifest(run)
    failures = named(run)
    assert (SAMPLES, "") in failures
    row = 'performance["int4-rtn"][0].'
    assert ("ledger.json", row + "throughput_tok_s.value") in failures
    assert ("ledger.json", row + "cost_usd_per_mtok_output.value") in failures
    key = ("report/report.json", "variants[2].performance[0].cost_usd_per_mtok_output.value")
    assert "recorded" in failures[key] and "recomputed" in failures[key]
    assert not any("variants[1].performance" in key for _, key in failures)


def test_changed_latency_is_found_although_the_stages_were_forged_too(run: Path) -> None:
    rows = read_samples(run / SAMPLES)
    last = rows[0].token_times_s
    rows[0] = dataclasses.replace(rows[0], token_times_s=(*last[:-1], last[-1] + 0.05))
    digest = write_samples(run / SAMPLES, rows)
    rehash_samples(run, digest)

    def forge(stages: list[dict[str, Any]]) -> None:
        (stage,) = [stage for stage in stages if stage["kind"] == "measure"]
        stage["result"] = json.loads((run / "ledger.json").read_text())
        for entry in stage["files"]:
            data = (run / entry["path"]).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    edit(run / "stages.json", forge)
    write_manifest(run)
    failures = named(run)
    assert ("ledger.json", 'performance["int4-rtn"][0].throughput_tok_s.value') in failures
    assert (SAMPLES, "") not in failures


def test_deleted_sample_is_named_by_its_id(run: Path) -> None:
    rows = read_samples(run / SAMPLES)
    gone = rows.pop(5)
    rehash_samples(run, write_samples(run / SAMPLES, rows), requests=len(rows))
    write_manifest(run)
    assert "missing" in named(run)[SAMPLES, gone.request_id]


def test_impossible_samples_are_named(run: Path) -> None:
    rows = read_samples(run / SAMPLES)
    first = rows[0]
    rows[0] = dataclasses.replace(first, start_s=first.first_token_s + 1, prompt=10**6)
    rows[1] = dataclasses.replace(rows[1], output_tokens=9)
    write_samples(run / SAMPLES, rows)
    sentences = [one.sentence for one in verify(run).failures if one.check == "raw samples"]
    for words in ("run backwards", "prompt 1000000 does not exist", "9 tokens, but 4"):
        assert any(words in sentence for sentence in sentences)


def test_price_changed_in_the_ledger_is_named(run: Path) -> None:
    edit(run / "ledger.json", lambda ledger: ledger["prices"].update(accelerator_usd_per_hour=0.01))
    write_manifest(run)
    failures = named(run)
    assert "recorded 0.01" in failures["ledger.json", "prices.accelerator_usd_per_hour"]
    assert ("report/report.json", 'record["ledger.json"]') in failures


def test_price_changed_in_the_table_of_the_run_is_named(run: Path) -> None:
    edit(
        run / "ledger.json",
        lambda ledger: ledger["price_basis"]["table"]["rows"][0].update(usd_per_instance_hour=9),
    )
    write_manifest(run)
    failures = named(run)
    assert ("ledger.json", "price_basis.table.rows[0].usd_per_instance_hour") in failures
    assert ("ledger.json", "prices.accelerator_usd_per_hour") in failures


def test_price_changed_in_the_recipe_is_named(run: Path) -> None:
    path = run / "recipe.lock.yaml"
    lock = yaml.safe_load(path.read_text())
    lock["measure"]["prices"]["host_usd_per_hour"] = 0.0
    path.write_text(yaml.safe_dump(lock, sort_keys=False))
    write_manifest(run)
    failures = named(run)
    key = "measure.prices.host_usd_per_hour"
    assert failures["recipe.lock.yaml", key].endswith("recorded 0.0, recomputed 0.01")
    assert ("ledger.json", "prices.host_usd_per_hour") in failures
    assert ("report/report.json", "recipe.sha256") in failures


def test_price_changed_in_recipe_and_stage_settings_breaks_the_stage_key(run: Path) -> None:
    def cheaper(stages: list[dict[str, Any]]) -> None:
        (stage,) = [stage for stage in stages if stage["kind"] == "measure"]
        assert recorded_key(stage) == stage["key"]
        stage["config"]["prices"]["host_usd_per_hour"] = 0.0

    edit(run / "stages.json", cheaper)
    measured = [stage["kind"] for stage in json.loads((run / "stages.json").read_text())]
    assert ("stages.json", f"[{measured.index('measure')}].key") in named(run)


def test_flipped_byte_of_an_artifact_is_named(run: Path) -> None:
    name = "artifacts/int8/compressed-tensors/model.safetensors"
    data = bytearray((run / name).read_bytes())
    data[-7] ^= 1
    (run / name).write_bytes(data)
    sums = run / name.replace("model.safetensors", "SHA256SUMS")
    old = sums.read_text().splitlines()
    new = f"{hashlib.sha256(data).hexdigest()}  model.safetensors"
    sums.write_text("\n".join(new if "model.s" in line else line for line in old) + "\n")
    found = verify(run)
    assert {one.file for one in found.failures} >= {name}
    assert any(one.check == "stages" and one.file == name for one in found.failures)


def test_surplus_and_missing_files_are_named(run: Path) -> None:
    (run / "artifacts/int8/compressed-tensors/extra.py").write_text("")
    (run / "artifacts/baseline/compressed-tensors/config.json").unlink()
    (run / "artifacts/ghost").mkdir()
    (run / "artifacts/ghost/model.safetensors").write_text("")
    found = {one.file for one in verify(run).failures if one.check == "artifacts"}
    assert found >= {
        "artifacts/int8/compressed-tensors/extra.py",
        "artifacts/baseline/compressed-tensors/config.json",
        "artifacts/ghost/model.safetensors",
    }


def test_swapped_prompt_is_named_although_its_file_was_rehashed(run: Path) -> None:
    path = run / "prompts.jsonl.gz"
    prompts = read_prompts(path)
    prompts[1] = prompts[1][::-1]
    digest = write_prompts(path, prompts)["sha256"]
    edit(run / "ledger.json", lambda ledger: ledger["prompts"].update(sha256=digest))
    write_manifest(run)
    failures = named(run)
    assert ("prompts.jsonl.gz", "prompt 1") in failures
    assert ("ledger.json", "workload.prompts_sha256") in failures
    assert ("prompts.jsonl.gz", "prompt 0") not in failures


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (
            "variants[1].performance[0].cost_usd_per_mtok_output.value",
            lambda r: r["variants"][1]["performance"][0].update(
                cost_usd_per_mtok_output={"value": 1.0, "low": 0.9, "high": 1.1}
            ),
        ),
        (
            "variants[1].quality[0].perplexity",
            lambda r: r["variants"][1]["quality"][0].update(perplexity=7.0),
        ),
        ("variants[2].size_bytes", lambda r: r["variants"][2].update(size_bytes=5)),
        ("verdict.outcome", lambda r: r["verdict"].update(outcome="failed")),
        ("prices.pue", lambda r: r["prices"].update(pue=3.0)),
        ("created", lambda r: r.update(created="2001-01-01T00:00:00+00:00")),
    ],
)
def test_edited_figure_of_the_report_is_named(run: Path, key: str, change: Any) -> None:
    edit(run / "report" / "report.json", change)
    assert compress("report", str(run), cwd=run).returncode == 0  # drawn and hashed again
    if key == "verdict.outcome":  # the command above makes the verdict anew
        edit(run / "report" / "report.json", change)
    assert ("report/report.json", key) in named(run)


def test_report_of_an_earlier_version_may_lack_keys_that_say_nothing_and_no_others(
    run: Path,
) -> None:
    path = run / "report" / "report.json"

    def older(report: dict[str, Any]) -> None:
        for variant in report["variants"]:
            del variant["speculation"]  # none speculates

    edit(path, older)
    write_manifest(run)
    assert named(run) == {}
    edit(path, lambda report: report["variants"][1].pop("size_bytes"))
    write_manifest(run)
    assert set(named(run)) == {("report/report.json", "variants[1].size_bytes")}


def test_forged_score_of_one_token_changes_the_quality(run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = run / "scores" / "int8" / "novel.safetensors"
    scores = load_file(path)
    scores["nll"][0, 0] += 1
    save_file(scores, path)
    failures = named(run)
    assert ("report/report.json", "variants[1].quality[0].perplexity") in failures
    assert any(file == "stages.json" and key.endswith(".perplexity") for file, key in failures)


def test_mangled_files_are_failures_and_no_traceback(run: Path) -> None:
    (run / "ledger.json").write_text("{")
    (run / SAMPLES).write_bytes(b"no gzip")
    (run / MANIFEST).unlink()
    done = compress("verify", str(run), cwd=run)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ledger.json: cannot be checked" in done.stderr


def test_every_measured_point_is_reported_beside_its_estimate(run: Path) -> None:
    report = json.loads((run / "report" / "report.json").read_text())
    made, ledger = report["estimates"], json.loads((run / "ledger.json").read_text())
    assert made["device"] == ledger["device"] and made["device"]["command"].endswith("devices cpu")
    assert [(r["variant"], r["concurrency"]) for r in made["rows"]] == [
        (name, size) for name in ("baseline", "int8", "int4-rtn") for size in (1, 2)
    ]
    reached = made["efficiency"]
    assert 0 < reached["decode"] < 1
    for row in made["rows"]:
        (variant,) = [v for v in report["variants"] if v["name"] == row["variant"]]
        (point,) = [p for p in variant["performance"] if p["concurrency"] == row["concurrency"]]
        assert row["measured_tpot_ms"] == point["tpot_ms"]["p50"]
        assert row["predicted_tpot_ms"] == pytest.approx(row["bound_tpot_ms"] / reached["decode"])
        assert row["tpot_ms_error"] == row["predicted_tpot_ms"] / row["measured_tpot_ms"] - 1
    # The efficiency is the median over the baseline's two points: it lies between them.
    assert made["rows"][0]["tpot_ms_error"] * made["rows"][1]["tpot_ms_error"] <= 0
    shown = (run / "report" / "report.md").read_text()
    assert "## Estimates beside the measurement" in shown and made["device"]["command"] in shown


def test_input_and_output_tokens_cost_apart(run: Path) -> None:
    report = json.loads((run / "report" / "report.json").read_text())
    ledger = json.loads((run / "ledger.json").read_text())
    assert list(ledger["workload"]["requests"]) == [
        "c1", "c1-prefill", "c1-decode", "c2", "c2-prefill", "c2-decode",
    ]  # fmt: skip
    for variant in report["variants"]:
        assert [row["concurrency"] for row in variant["split"]] == [1, 2]
        assert variant["split"] == ledger["split"][variant["name"]]
        assert all(point["requests"] == 4 for point in variant["performance"])
        for row in variant["split"]:
            tokens = {
                part: (group["input_tokens"] / 4, group["output_tokens"] / 4)
                for part, group in row["groups"].items()
            }
            assert tokens == {"load": (24, 4), "prefill": (24, 1), "decode": (16, 4)}
    shown = (run / "report" / "report.md").read_text()
    assert "## Input and output tokens apart" in shown


def test_a_sample_moved_to_another_part_is_named(run: Path) -> None:
    rows = read_samples(run / SAMPLES)
    place = next(i for i, row in enumerate(rows) if row.part == "decode")
    rows[place] = dataclasses.replace(rows[place], part="")
    rehash_samples(run, write_samples(run / SAMPLES, rows))
    failures = named(run)
    assert "contradict its id" in failures[SAMPLES, rows[place].request_id] or (
        "16 prompt tokens" in failures[SAMPLES, rows[place].request_id]
    )
    assert any(key.startswith("split") for file, key in failures if file == "ledger.json")


def test_estimates_of_another_model_are_calibrated_on_a_run(run: Path) -> None:
    asked = ("estimate", "artifacts/int8/compressed-tensors", "--run", ".")
    done = compress(*asked, "--json", cwd=run)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    report = json.loads((run / "report" / "report.json").read_text())
    assert made["comparison"] == report["estimates"]
    assert made["device"] == report["estimates"]["device"]  # the run's, not measured anew
    assert made["efficiency"] == report["estimates"]["efficiency"]
    done = compress(*asked, "--device", "h100", cwd=run)
    assert done.returncode == 0 and "estimate against measurement" in done.stdout
    assert "H100" in done.stdout
    edit(run / "ledger.json", lambda ledger: ledger.update(device=None))
    done = compress(*asked, cwd=run)
    assert done.returncode == 1 and "does not say what it ran on" in done.stderr


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("device.bandwidth", lambda device: device.update(bandwidth=1e12)),
        ("device.peak.float32", lambda device: device["peak"].update(float32=1e15)),
    ],
)
def test_a_device_that_was_not_measured_so_is_named(run: Path, key: str, change: Any) -> None:
    edit(run / "ledger.json", lambda ledger: change(ledger["device"]))
    failures = named(run)
    assert ("ledger.json", key) in failures
    assert any(key.startswith("estimates.") for _, key in failures)


def test_flipped_bits_inside_compressed_files_are_failures(run: Path) -> None:
    for name in (SAMPLES, "prompts.jsonl.gz", "scores/int8/novel.safetensors"):
        data = bytearray((run / name).read_bytes())
        for place in range(12, 40):
            data[place] ^= 255
        (run / name).write_bytes(data)
    found = verify(run)
    assert {one.file for one in found.failures} >= {SAMPLES, "prompts.jsonl.gz"}


def test_a_directory_that_is_no_run_is_one_error(tmp_path: Path) -> None:
    done = compress("verify", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1 and "stages.json" in done.stderr and "fix:" in done.stderr


def test_differences_names_paths_and_keeps_types_apart() -> None:
    old = {"a": [1, {"b-c": 2.0}], "d": True, "gone": None}
    new = {"a": [1.0, {"b-c": 2.5}, 3], "d": 1}
    assert [key for key, _, _ in differences(old, new)] == ['a[1]["b-c"]', "a[2]", "d", "gone"]
    assert not list(differences({"x": 1.0}, {"x": 1.0 + 1e-12}))
