"""Which engine is chosen for a variant, and how often engines are started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compressor.errors import RunError
from compressor.measure.engines.base import ServedEngine
from compressor.measure.engines.static import StaticEngine
from compressor.measure.fleet import Fleet
from compressor.measure.settings import MeasureSettings
from compressor.measure.workload import Workload
from tests.engines.serving import Calls, llama

SLOW = 0.02  # seconds more for a step


class Watched:
    """Real engines, in the order in which they were started and stopped."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def candidate(
        self, label: str, *, seconds: float = 0.0, error: str = ""
    ) -> Callable[[], ServedEngine]:
        events = self.events

        class Engine(StaticEngine):
            def start(self) -> None:
                if self._thread is None:
                    events.append(f"+{label}")
                super().start()

            def stop(self) -> None:
                if self._thread is not None:
                    events.append(f"-{label}")
                super().stop()

        def load(dtype: torch.dtype) -> Any:
            if error:
                raise RunError(error)
            model = llama(dtype)
            Calls(model, before=lambda _: time.sleep(seconds))
            return model

        return lambda: Engine(load)


def fleet(variants: dict[str, Any], **options: Any) -> Fleet:
    settings = MeasureSettings(
        input_length=4, output_length=4, concurrency=(1,), requests=2, rounds=2, **options
    )
    return Fleet(variants, Workload(((3, 4, 5, 6),), "here", 0, False), settings)


@pytest.mark.parametrize(
    ("seconds", "error", "events"),
    [
        ((SLOW, 0.0), "", ["+one", "-one", "+two"]),  # the last has won: it stays up
        ((0.0, SLOW), "", ["+one", "-one", "+two", "-two", "+one"]),
        ((0.0, 0.0), "no kernel", ["+one", "-one", "+two", "+one"]),
    ],
)
def test_the_winner_is_started_again_only_where_it_is_not_up(
    seconds: tuple[float, float], error: str, events: list[str]
) -> None:
    watched = Watched()
    candidates = {
        "one": watched.candidate("one", seconds=seconds[0]),
        "two": watched.candidate("two", seconds=seconds[1], error=error),
    }
    made = fleet({"baseline": candidates})
    made.prepare("baseline")
    assert watched.events == events
    engine, probe = made.use("baseline"), made.probes["baseline"]
    assert engine is not None and engine.healthy() and watched.events == events
    assert made.metadata["baseline"]["batching"] == "static"
    assert probe.dtype == events[-1][1:] and probe.failed == ({"two": error} if error else {})
    made.stop_all()
    assert watched.events == [*events, f"-{probe.dtype}"] and not engine.healthy()


def test_a_winner_that_stayed_up_is_stopped_where_engines_take_turns() -> None:
    watched = Watched()
    variants = {
        name: {
            "one": watched.candidate(f"{name} one", seconds=SLOW),
            "two": watched.candidate(f"{name} two"),
        }
        for name in ("baseline", "other")
    }
    made = fleet(variants, keep_loaded=False)
    for name in variants:
        made.prepare(name)
    tried = [[f"+{name} one", f"-{name} one", f"+{name} two", f"-{name} two"] for name in variants]
    assert watched.events == [*tried[0], *tried[1][:3]]
    assert made.use("other") is not None and watched.events == [*tried[0], *tried[1][:3]]
    assert made.use("baseline") is not None
    assert watched.events == [*tried[0], *tried[1], "+baseline two"]
    made.stop_all()
    assert watched.events[-1] == "-baseline two"
