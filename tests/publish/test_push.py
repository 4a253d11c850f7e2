"""`compress push` against a server that speaks the Hub's API: pushed, pulled again, cut off."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download

from compressor.errors import RecipeError
from compressor.export.artifact import write_sums
from compressor.recipe import load_recipe
from tests.projects import RECIPE
from tests.publish.conftest import READ_ONLY, TOKEN, environment, push, verify_all
from tests.publish.hub_server import Hub


def local(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def pulled(hub: Hub, tmp_path: Path, repo: str, revision: str | None = None) -> dict[str, bytes]:
    """What `snapshot_download` brings, by path."""
    code = (
        "import sys; from huggingface_hub import snapshot_download as s; "
        "s(sys.argv[1], revision=sys.argv[2] or None, local_dir=sys.argv[3])"
    )
    target = tmp_path / f"pulled-{repo.replace('/', '-')}-{revision}"
    subprocess.run(
        [sys.executable, "-c", code, repo, revision or "", str(target)],
        env=environment(hub, tmp_path / "other-home"),
        check=True,
        capture_output=True,
        timeout=120,
    )
    return {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file() and path.relative_to(target).parts[0] not in (".cache", ".gitattributes")
    }


def test_pushed_and_pulled_again_are_the_same_bytes(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = push(run, hub, "--repo", "acme/tiny-q", "--format", "compressed-tensors")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.repos) == ["acme/tiny-q-int4", "acme/tiny-q-int8"]
    report = {f"report/{name}": data for name, data in local(run / "report").items()}
    for variant in ("int8", "int4"):
        name = f"acme/tiny-q-{variant}"
        repo = hub.repos[name]
        assert repo.private and len(repo.messages) == 2  # the first one, and one commit of it all
        expected = local(run / "artifacts" / variant / "compressed-tensors") | report
        assert hub.files(name) == expected
        got = pulled(hub, tmp_path, name)
        assert got == expected
        for line in got["SHA256SUMS"].decode().splitlines():
            digest, _, path = line.partition("  ")
            assert hashlib.sha256(got[path]).hexdigest() == digest
        model = repo.branches["main"]["model.safetensors"]
        assert model.sha256 in repo.objects  # large file storage, in parts
    parts = [path for verb, path, _ in hub.requests if verb == "PUT"]
    assert any(path.endswith("/2") for path in parts)
    assert done.stdout.count("pushed: ") == 2
    # What a client of the Hub makes of the card.
    card = ModelCard(got["README.md"].decode()).data
    assert card.base_model == "acme/tiny" and card["base_model_relation"] == "quantized"
    assert card.license == "other" and card.license_name == "acme-research"
    assert card["extra_gated_prompt"] == "You agree to be kind."
    assert {one.metric_type for one in card.eval_results} >= {"perplexity", "top1_agreement"}
    # and what it is told of the licence
    assert "non-commercial" in done.stderr and "gated" in done.stderr


def test_pushing_again_sends_no_weights_and_makes_no_commit(run: Path, hub: Hub) -> None:
    arguments = ("--repo", "acme/t", "--only", "int4", "--format", "gguf")
    assert push(run, hub, *arguments).returncode == 0
    sent, messages = len(hub.stored), list(hub.repos["acme/t"].messages)
    assert sent
    assert push(run, hub, *arguments).returncode == 0
    assert len(hub.stored) == sent and hub.repos["acme/t"].messages == messages


def test_what_a_push_left_and_the_next_one_lacks_is_removed(run: Path, hub: Hub) -> None:
    directory = run / "artifacts" / "int4" / "gguf"
    (directory / "extra.json").write_text("{}")
    write_sums(directory)
    arguments = ("--repo", "acme/t", "--only", "int4", "--format", "gguf")
    assert push(run, hub, *arguments).returncode == 0
    assert "extra.json" in hub.files("acme/t")
    (directory / "extra.json").unlink()
    write_sums(directory)
    assert push(run, hub, *arguments).returncode == 0
    assert hub.files("acme/t").keys() == local(directory).keys() | {
        f"report/{name}" for name in local(run / "report")
    }


def test_folders_hold_every_artifact_and_one_report(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = push(run, hub, "--repo", "alice/all", "--layout", "folders")
    assert done.returncode == 0, done.stderr
    got = pulled(hub, tmp_path, "alice/all")
    for variant in ("int8", "int4"):
        for fmt in ("compressed-tensors", "gguf"):
            prefix = f"{variant}-{fmt}/"
            inside = {
                path.removeprefix(prefix): data
                for path, data in got.items()
                if path.startswith(prefix)
            }
            assert inside == local(run / "artifacts" / variant / fmt)
    rest = {path for path in got if path.count("/") == 0 or path.startswith("report/")}
    assert rest == {"README.md", *(f"report/{name}" for name in local(run / "report"))}
    assert "(int4-gguf/)" in got["README.md"].decode()
    assert ModelCard(got["README.md"].decode()).data.base_model == "acme/tiny"


def test_branches_hold_one_artifact_each(run: Path, hub: Hub, tmp_path: Path) -> None:
    arguments = ("--repo", "alice/all", "--layout", "branches", "--format", "gguf")
    done = push(run, hub, *arguments)
    assert done.returncode == 0, done.stderr
    assert set(hub.repos["alice/all"].branches) == {"main", "int8", "int4"}
    for variant in ("int8", "int4"):
        assert pulled(hub, tmp_path, "alice/all", variant) == local(
            run / "artifacts" / variant / "gguf"
        )
    main = pulled(hub, tmp_path, "alice/all")
    assert set(main) == {"README.md", *(f"report/{name}" for name in local(run / "report"))}
    assert push(run, hub, *arguments).returncode == 0  # branches that are there already


def enlarge(run: Path) -> Path:
    """Two more large files in an artifact: cut in the middle, one is there and one is not."""
    directory = run / "artifacts" / "int4" / "gguf"
    rng = np.random.default_rng(0)
    for name in ("a.bin", "b.bin"):
        (directory / name).write_bytes(rng.bytes(2_500_000))
    write_sums(directory)
    return directory


@pytest.mark.parametrize("how", ["killed", "cut"])
def test_an_upload_that_broke_off_goes_on(run: Path, hub: Hub, how: str) -> None:
    directory = enlarge(run)
    second = hashlib.sha256((directory / "b.bin").read_bytes()).hexdigest()
    first = hashlib.sha256((directory / "a.bin").read_bytes()).hexdigest()
    command = [
        sys.executable, "-m", "compressor", "push", str(run), "--repo", "acme/t",
        "--only", "int4", "--format", "gguf",
    ]  # fmt: skip
    process: subprocess.Popen[str] | None = None
    started = threading.Event()

    def break_off(path: str, length: int) -> None:
        if f"/{second}/10" in path:  # the tenth of 25 parts
            started.wait(30)
            assert process is not None
            process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
            raise ConnectionError

    hub.on_store = break_off
    process = subprocess.Popen(
        command,
        env=environment(hub, run.parent / "home"),
        cwd=run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.set()
    out, err = process.communicate(timeout=120)
    # The interrupt or the broken connection, whichever it meets first.
    assert process.returncode in ([-signal.SIGKILL] if how == "killed" else [130, 1])
    assert TOKEN not in out + err
    if how == "cut":
        assert "run the same command again" in err
    repo = hub.repos["acme/t"]
    assert len(repo.messages) == 1 and not hub.files("acme/t")  # nothing half is to be seen
    assert hub.stored.count(first) == 1 and second not in hub.stored

    hub.on_store = None
    before = list(hub.stored)
    done = push(run, hub, "--repo", "acme/t", "--only", "int4", "--format", "gguf")
    assert done.returncode == 0, done.stderr
    again = hub.stored[len(before) :]
    assert not set(again) & set(before) and second in again
    got = hub.files("acme/t")
    assert {k: v for k, v in got.items() if not k.startswith("report/")} == local(directory)


def test_a_server_that_hangs_up_is_named_and_the_next_push_goes_on(run: Path, hub: Hub) -> None:
    directory = enlarge(run)
    second = hashlib.sha256((directory / "b.bin").read_bytes()).hexdigest()

    def hang_up(path: str, length: int) -> None:
        if second in path:
            raise ConnectionError

    hub.on_store = hang_up
    code = (
        "import huggingface_hub.utils._http as h, sys; h.time.sleep = lambda s: None; "
        "from compressor.cli import main; sys.argv = sys.argv[1:]; main()"
    )  # the library waits up to 8 s between its tries
    arguments = [str(run), "--repo", "acme/t", "--only", "int4", "--format", "gguf"]
    done = subprocess.run(
        [sys.executable, "-c", code, "compress", "push", *arguments],
        env=environment(hub, run.parent / "home"),
        cwd=run.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "broke off" in done.stderr and "run the same command again" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    hub.on_store = None
    before = list(hub.stored)
    assert push(run, hub, *arguments[1:]).returncode == 0
    assert not set(hub.stored[len(before) :]) & set(before)


def test_through_xet_what_arrived_is_not_stored_twice(run: Path, hub: Hub) -> None:
    """The library's default: hf_xet itself cuts files into chunks and keeps them, here in a
    directory. The first push is killed between two large files."""
    directory = enlarge(run)
    storage = run.parent / "xet"
    hub.xet = f"local://{storage}"
    arguments = ["--repo", "acme/t", "--only", "int4", "--format", "gguf"]
    more = {"HF_HUB_DISABLE_XET": "0"}

    def stored() -> int:
        xorbs = storage / "xet" / "xorbs"
        return sum(p.stat().st_size for p in xorbs.rglob("default.*") if p.is_file())

    process: subprocess.Popen[str] | None = None
    started = threading.Event()

    def kill(paths: list[str]) -> None:
        if paths == ["b.bin"]:
            started.wait(30)
            assert process is not None
            process.kill()
            raise ConnectionError

    hub.on_preupload = kill
    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", "push", str(run), *arguments],
        env=environment(hub, run.parent / "home", **more),
        cwd=run.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    started.set()
    assert process.wait(120) == -signal.SIGKILL
    first = stored()
    assert 2_500_000 <= first < 2_700_000  # a.bin, and no more
    assert not hub.files("acme/t")

    hub.on_preupload = None
    done = push(run, hub, *arguments, **more)
    assert done.returncode == 0, done.stderr
    whole = sum(len(data) for data in local(directory).values())
    assert whole - 100_000 < stored() < whole + 200_000  # a.bin once
    head = hub.repos["acme/t"].branches["main"]
    for name in ("a.bin", "b.bin", "model.gguf"):
        data = (directory / name).read_bytes()
        assert head[name].sha256 == hashlib.sha256(data).hexdigest()
        assert head[name].size == len(data)
    assert not any(verb == "PUT" for verb, _, _ in hub.requests)


def test_without_a_token_nothing_is_asked(run: Path, hub: Hub) -> None:
    done = push(run, hub, "--repo", "acme/t", token=None)
    assert done.returncode == 1
    assert "no access token" in done.stderr and "HF_TOKEN" in done.stderr
    assert not hub.requests


def test_the_token_may_come_from_the_login_store(run: Path, hub: Hub) -> None:
    home = run.parent / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    arguments = ["push", str(run), "--repo", "acme/t", "--only", "int8", "--format", "gguf"]
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *arguments],
        env=environment(hub, home, None),
        cwd=run.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    sent = [{key.lower(): value for key, value in one.items()} for one in hub.headers]
    assert any(one.get("authorization") == f"Bearer {TOKEN}" for one in sent)


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("hf_" + "unknownToThisServer" + "2" * 16, "acme/t", "does not know this access token"),
        (READ_ONLY, "acme/t", "may not write there"),
        (TOKEN, "stranger/t", "may not write there"),
    ],
)
def test_a_token_that_does_not_do(run: Path, hub: Hub, token: str, repo: str, words: str) -> None:
    done = push(run, hub, "--repo", repo, token=token)
    assert done.returncode == 1 and words in done.stderr and "fix:" in done.stderr
    assert not hub.repos
    # Nor does a traceback show it, where one is asked for.
    shown = push(run, hub, "--repo", repo, token=token, COMPRESSOR_TRACEBACK="1")
    assert shown.returncode != 0 and token not in shown.stderr


def test_a_name_that_is_taken(run: Path, hub: Hub) -> None:
    hub.make("acme/t", private=True)
    blob = hub.repos["acme/t"].branches["main"][".gitattributes"]
    hub.repos["acme/t"].commit("main", {".gitattributes": blob, "novel.txt": blob}, "a novel")
    arguments = ("--repo", "acme/t", "--only", "int4", "--format", "gguf")
    done = push(run, hub, *arguments)
    assert done.returncode == 1 and "taken" in done.stderr and "novel.txt" in done.stderr
    assert set(hub.files("acme/t")) == {"novel.txt"}
    assert push(run, hub, *arguments, "--force").returncode == 0
    assert {"novel.txt", "model.gguf"} <= set(hub.files("acme/t"))


def test_a_public_repository_is_not_taken_for_a_private_one(run: Path, hub: Hub) -> None:
    hub.make("acme/t", private=False)
    arguments = ("--repo", "acme/t", "--only", "int4", "--format", "gguf")
    done = push(run, hub, *arguments)
    assert done.returncode == 1 and "public" in done.stderr and "--public" in done.stderr
    assert not hub.files("acme/t")
    assert push(run, hub, *arguments, "--public").returncode == 0
    assert hub.repos["acme/t"].gated == "manual"  # as its base model


def test_public_when_asked_for(run: Path, hub: Hub) -> None:
    arguments = ("--repo", "acme/t", "--only", "int4", "--format", "gguf", "--public")
    assert push(run, hub, *arguments).returncode == 0
    assert not hub.repos["acme/t"].private


def test_dry_run_lists_every_file_and_asks_nobody(run: Path, hub: Hub) -> None:
    done = push(run, hub, "--repo", "acme/t", "--layout", "folders", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    listed = {}
    for line in done.stdout.splitlines():
        size, _, path = line.strip().partition("  ")
        listed[path] = int(size.replace(",", ""))
    for fmt in ("compressed-tensors", "gguf"):
        for path in (run / "artifacts" / "int4" / fmt).iterdir():
            assert listed[f"acme/t/int4-{fmt}/{path.name}"] == path.stat().st_size
    total = next(size for path, size in listed.items() if path.endswith("files"))
    assert total == sum(size for path, size in listed.items() if not path.endswith("files"))
    assert not hub.requests


@pytest.mark.parametrize(
    ("verified", "why"), [(None, "absent"), (None, "vLLM is not installed"), (False, "it is not")]
)
def test_the_unverified_are_refused_unless_forced(
    run: Path, hub: Hub, verified: bool | None, why: str
) -> None:
    verify_all(run, verified, why)
    done = push(run, hub, "--repo", "acme/t", "--only", "int4", "--format", "gguf")
    assert done.returncode == 1 and "int4 is not pushed" in done.stderr
    assert why == "absent" or why in done.stderr
    assert not hub.requests
    forced = push(run, hub, "--repo", "acme/t", "--only", "int4", "--format", "gguf", "--force")
    assert forced.returncode == 0 and "model.gguf" in hub.files("acme/t")
    assert "warning: int4:" in forced.stderr


def test_altered_weights_and_files_with_tokens_are_not_sent(run: Path, hub: Hub) -> None:
    arguments = ("--repo", "acme/t", "--only", "int4", "--format", "gguf")
    path = run / "artifacts" / "int4" / "gguf" / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    done = push(run, hub, *arguments)
    assert done.returncode == 1 and "SHA256SUMS" in done.stderr and "model.gguf" in done.stderr
    data[-9] ^= 1
    path.write_bytes(data)
    other = "hf_" + "somebodyElsesToken" + "3" * 20
    (path.parent / "note.txt").write_text(f"token: {other}\n")
    write_sums(path.parent)
    done = push(run, hub, *arguments)
    assert done.returncode == 1 and "access token" in done.stderr and other not in done.stderr
    (path.parent / "note.txt").unlink()
    done = push(run, hub, *arguments)
    assert done.returncode == 1 and "note.txt" in done.stderr  # listed, but not there
    assert not hub.repos


@pytest.mark.parametrize(
    "arguments",
    [
        ("--repo", "no-slash"),
        ("--repo", "acme/a--b"),
        ("--repo", "acme/t", "--only", "int5"),
        ("--repo", "acme/t", "--format", "awq"),
        ("--repo", "acme/{variant}"),  # two formats of one variant
        ("--repo", "acme/{variant}", "--layout", "folders"),
        (),
    ],
)
def test_bad_arguments_are_one_message(run: Path, hub: Hub, arguments: tuple[str, ...]) -> None:
    done = push(run, hub, *arguments)
    assert done.returncode == 2 and "fix:" in done.stderr, done.stderr
    assert not hub.requests


@pytest.mark.parametrize("verified", [True, None])
def test_a_recipe_can_ask_for_it(run: Path, made: Path, hub: Hub, verified: bool | None) -> None:
    """What `compress run` does when its work is done."""
    project = made.parents[2]
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe["publish"] = {"repo": "acme/t", "layout": "branches", "variants": ["int4"]}
    path = project / f"publish-{verified}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    verify_all(run, verified)
    code = (
        "import sys; from pathlib import Path; from compressor import cli; "
        "loaded = cli._load(Path(sys.argv[1]), None, None); "
        "plan = cli._plan(loaded, None, None, True); "
        "sys.exit(cli._publish(plan, Path(sys.argv[2]), True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(run)],
        env=environment(hub, run.parent / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert TOKEN not in done.stdout + done.stderr
    if verified:
        assert done.returncode == 0, done.stderr
        assert set(hub.repos["acme/t"].branches) == {
            "main", "int4-compressed-tensors", "int4-gguf",
        }  # fmt: skip
        assert hub.repos["acme/t"].private
    else:
        assert done.returncode == 1 and not hub.repos
        assert "int4-gguf is not pushed: no consumer has verified it" in done.stderr


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"repo": "no-slash"}, "publish.repo: give org/name"),
        ({"repo": "acme/t", "variants": ["int3"]}, "no variant 'int3'"),
        ({"repo": "acme/t", "token": "hf_x"}, "unknown key 'token'"),
        ({"repo": "acme/t", "layout": "heap"}, "publish.layout"),
    ],
)
def test_bad_sections_are_named(tmp_path: Path, section: dict[str, Any], words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "publish": section}, sort_keys=False))
    with pytest.raises(RecipeError, match=re.escape(words)):
        load_recipe(path)


def test_names_with_places(run: Path, hub: Hub) -> None:
    done = push(run, hub, "--repo", "acme/x-{variant}-{format}", "--only", "int4")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.repos) == ["acme/x-int4-compressed-tensors", "acme/x-int4-gguf"]


def test_the_server_is_what_the_library_takes_for_a_hub(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own way to upload, list, check and download, without anything of ours."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = run / "artifacts" / "int8" / "compressed-tensors"
    api = HfApi(endpoint=hub.url, token=TOKEN)
    assert api.whoami()["name"] == "alice"
    repo = api.create_repo("acme/plain", private=True)
    assert repo.repo_id == "acme/plain" and api.repo_info("acme/plain").private
    api.upload_folder(repo_id="acme/plain", folder_path=folder)
    assert hub.files("acme/plain") == local(folder)
    assert set(api.list_repo_files("acme/plain")) == local(folder).keys() | {".gitattributes"}
    api.create_branch("acme/plain", branch="other")
    assert {ref.name for ref in api.list_repo_refs("acme/plain").branches} == {"main", "other"}
    target = snapshot_download(
        "acme/plain", endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "plain", revision="other"
    )
    for name, data in local(folder).items():
        assert (Path(target) / name).read_bytes() == data
    checked = api.verify_repo_checksums("acme/plain", local_dir=target)
    assert checked.checked_count == len(local(folder)) + 1 and not checked.mismatches
    with pytest.raises(OSError, match="404"):
        HfApi(endpoint=hub.url, token=TOKEN).repo_info("acme/none")
