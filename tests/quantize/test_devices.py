"""Linears shared out over devices."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.quantize import driver, registry
from compressor.quantize.devices import share_out, solving_devices, spread
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)


@given(st.lists(st.integers(1, 100), max_size=12), st.integers(1, 4))
def test_every_item_goes_to_one_worker_and_loads_are_even(sizes: list[int], workers: int) -> None:
    shares = share_out(sizes, workers)
    assert len(shares) == workers
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in shares]
    # Nobody could have been given its last (smallest) item later by someone with less to do.
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert all(share == sorted(share) for share in shares)


def test_results_come_back_in_order_from_one_thread_a_device() -> None:
    threads: dict[str, set[int]] = {"a": set(), "b": set()}
    both = threading.Barrier(2, timeout=20)  # broken unless the two run at the same time

    def work(numbers: list[int], device: str) -> list[tuple[int, str]]:
        threads[device].add(threading.get_ident())
        both.wait()
        return [(number, device) for number in numbers]

    found = spread([3, 1, 1, 1], ["a", "b"], work)
    assert found == [(0, "a"), (1, "b"), (2, "b"), (3, "b")]
    assert threads["a"].isdisjoint(threads["b"])


def test_one_device_works_in_the_callers_thread() -> None:
    def work(numbers: list[int], device: str) -> list[int]:
        assert threading.current_thread() is threading.main_thread()
        return numbers

    assert spread([1, 5, 2], ["cpu"], work) == [0, 1, 2]
    assert spread([4], ["cpu", "cpu"], work) == [0]
    assert solving_devices("cpu") == ["cpu"]


def run(root: Path, out: str, devices: list[str], options: dict[str, Any], steps: Any) -> None:
    cls = registry.get("gptq")
    quantizer = cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}))
    refinements = [registry.get(name)(registry.get(name).Options(**o)) for name, o in steps]
    driver.quantize_model(
        CausalLM.open(root / "model"), quantizer, root / out, tokens=TOKENS, batch_size=2,
        refinements=refinements, devices=devices,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        ({"true_sequential": False}, []),
        ({"desc_act": True, "static_groups": False, "symmetric": False}, []),
        ({}, [("coordinate_descent", {}), ("signround", {"iterations": 2})]),
    ],
    ids=["plain", "all_at_once", "g_idx", "refined"],
)
def test_two_devices_give_what_one_gives(
    tmp_path: Path, arch: str, options: dict[str, Any], steps: Any
) -> None:
    tiny.build(arch, tmp_path / "model")
    for out, devices in {"one": ["cpu"], "two": ["cpu", "cpu"]}.items():
        run(tmp_path, out, devices, options, steps)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("sequential", [True, False])
def test_both_devices_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequential: bool
) -> None:
    tiny.build("llama", tmp_path / "model")
    seen: set[int] = set()
    cls = registry.get("gptq")
    original = cls.quantize_all

    def watch(self: Any, weights: Any, hessian: Any) -> Any:
        seen.add(threading.get_ident())
        return original(self, weights, hessian)

    monkeypatch.setattr(cls, "quantize_all", watch)
    run(tmp_path, "out", ["cpu", "cpu"], {"true_sequential": sequential}, [])
    assert len(seen - {threading.get_ident()}) >= 2


def test_an_error_on_one_device_names_the_layers(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    with pytest.raises(RunError, match="group_size"):
        run(tmp_path, "out", ["cpu", "cpu"], {"group_size": 48}, [])
