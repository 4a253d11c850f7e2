"""Samples survive the file, and what is not a sample is named with its line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.evaluate.samples import TaskSample, read_samples, write_samples

_FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def _samples(draw):
    count = draw(st.integers(1, 5))
    generated = draw(st.booleans())
    return TaskSample(
        id=draw(st.text(max_size=8)),
        prompt_sha256=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        target=draw(st.none() | st.integers(0, 4) | st.text(max_size=5)),
        choice=None if generated else draw(st.integers(0, count - 1)),
        loglikelihoods=None if generated else tuple(draw(st.tuples(*[_FINITE] * count))),
        bytes=None if generated else tuple(draw(st.tuples(*[st.integers(0, 99)] * count))),
        response=draw(st.text(max_size=20)) if generated else None,
        scores=draw(st.dictionaries(st.text(max_size=4), _FINITE, max_size=3)),
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(_samples(), max_size=6))
def test_samples_are_what_was_written(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("samples") / "deep" / "task.jsonl"
    write_samples(samples, path)
    assert read_samples(path) == samples


def _line(**changes):
    value = {
        "id": "0", "prompt_sha256": "ab", "target": 1, "choice": 1,
        "loglikelihoods": [-2.0, -1.0], "bytes": [3, 4], "response": None, "scores": {"acc": 1},
    }  # fmt: skip
    return json.dumps(value | changes)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        json.dumps({"id": "0"}),
        _line(extra=1),
        _line(scores=None),
        _line(scores={"acc": "x"}),
        _line(choice=2),
        _line(choice="1"),
        _line(bytes=[3]),
        _line(loglikelihoods=[float("-inf"), -1.0]),
        _line(id=3),
        _line(response=3),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    path = tmp_path / "task.jsonl"
    path.write_text(f"{_line()}\n{line}\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"task\.jsonl:2"):
        read_samples(path)


def test_a_missing_file_is_one_error(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_samples(tmp_path / "none.jsonl")


def test_a_number_that_json_does_not_hold_is_refused(tmp_path):
    sample = TaskSample("0", "", None, None, None, None, "", {"acc": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write_samples([sample], tmp_path / "task.jsonl")
