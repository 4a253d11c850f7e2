"""A checkpoint or a text that is at odds with itself: one clear error that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.faults.conftest import SMALL
from tests.projects import report, write
from tests.zygote import Zygote

WEIGHTS = "model.safetensors"


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})


def change_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        (key,) = (key for key in tensors if key.endswith(name))
        tensors[key][0, 0] = value

    return lambda model: change_weights(model, change)


def scale(name: str, factor: float) -> Callable[[Path], None]:
    """So large that what comes out of it is infinite: the weights themselves are finite."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        (key,) = (key for key in tensors if key.endswith(name))
        tensors[key] = (tensors[key].float() * factor).clamp(-3e38, 3e38)

    return lambda model: change_weights(model, change)


def lie_about_size(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])


def cut_short(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2])


def more_tokens_than_rows(model: Path) -> None:
    rows = 100

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, value in tensors.items():
            if len(value) == tiny.VOCABULARY:
                tensors[key] = value[:rows].clone()

    change_weights(model, change)
    change_config(model, vocab_size=rows)


def drop(name: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(name)]:
            del tensors[key]

    return lambda model: change_weights(model, change)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "header that lies": (lie_about_size, WEIGHTS),
    "file cut short": (cut_short, WEIGHTS),
    "NaN in a linear": (poison("layers.1.mlp.down_proj.weight", float("nan")), "down_proj"),
    "infinite embedding": (poison("embed_tokens.weight", float("inf")), "embed_tokens"),
    "activations overflow": (scale("layers.0.mlp.down_proj.weight", 3e38), "NaN or infinite"),
    "config says wider": (lambda m: change_config(m, intermediate_size=256), "gate_proj"),
    "config says more heads": (lambda m: change_config(m, num_attention_heads=8), "q_proj"),
    "config says more blocks": (lambda m: change_config(m, num_hidden_layers=5), "layers."),
    "weight that is not there": (drop("layers.0.mlp.up_proj.weight"), "up_proj"),
    "tokenizer of another model": (more_tokens_than_rows, "tokenizer"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer that is no JSON": (
        lambda m: (m / "tokenizer.json").write_text("{"),  # type: ignore[dict-item]
        "tokenizer",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_at_odds_with_itself_is_one_error(
    zygote: Zygote, tmp_path: Path, name: str
) -> None:
    damage, told = BROKEN[name]
    tiny.build("llama", tmp_path / "model")
    damage(tmp_path / "model")
    write(tmp_path, SMALL)
    code, printed = zygote.run(tmp_path)
    print(code, printed[-700:])
    assert code in (1, 2), printed
    assert told in printed and "fix:" in printed, printed
    assert "Traceback" not in printed and "unexpected" not in printed, printed
    assert not list((tmp_path / "runs").rglob("artifacts/int4")), "made all the same"


@pytest.mark.parametrize("use", ["calibration", "evaluate"])
def test_text_that_is_not_utf_8_is_one_error(zygote: Zygote, tmp_path: Path, use: str) -> None:
    tiny.build("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 and so on " * 400)
    recipe: dict[str, Any] = json.loads(json.dumps(SMALL))
    if use == "calibration":
        recipe["calibration"]["source"] = "text.txt"
    else:
        recipe["evaluate"]["texts"] = [{"name": "own", "source": "text.txt"}]
    write(tmp_path, recipe)
    code, printed = zygote.run(tmp_path)
    assert code in (1, 2) and "text.txt" in printed and "fix:" in printed, printed
    assert "UTF-8" in printed and "unexpected" not in printed, printed


def test_experts_that_nothing_chooses_are_named(zygote: Zygote, tmp_path: Path) -> None:
    tiny.build("mixtral", tmp_path / "model")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, value in tensors.items():
            if key.endswith("embed_tokens.weight"):
                value[:, 0] = 10  # positive for every token,
            elif key.endswith("gate.weight"):
                value[3] = 0
                value[3, 0] = -100  # which keeps the last expert from being chosen

    change_weights(tmp_path / "model", change)
    write(tmp_path, SMALL)
    code, printed = zygote.run(tmp_path)
    assert code == 0, printed
    (variant,) = (row for row in report(tmp_path)["variants"] if row["name"] == "int4")
    dead = [row for row in variant["quantization"]["layers"] if ".experts.3." in row["name"]]
    assert len(dead) == 2 * 3
    assert all(row["tokens"] == 0 and row["undersampled"] for row in dead)
