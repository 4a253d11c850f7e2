"""What is read from a vLLM server, without one; with one: tests/engines/test_vllm.py."""

from __future__ import annotations

from compressor.measure.engines.vllm import drafted
from compressor.measure.runner import drafted_since

# As vLLM 0.32 serves them, of two engines.
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 40.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 10.0
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 120.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 50.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 1.2e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="2"} 2.0
vllm:generation_tokens_total{engine="0",model_name="m"} 112.0
"""


def test_counters_of_drafts_are_read() -> None:
    assert drafted(METRICS) == {
        "drafts": 50,
        "draft_tokens": 150,
        "accepted_tokens": 62,
        "accepted_by_position": [36, 19, 7],
    }
    assert drafted("vllm:generation_tokens_total 3.0\n") is None


def test_counts_of_a_load_are_the_difference() -> None:
    before, after = drafted(METRICS), drafted(METRICS.replace(" 40.0", " 45.0"))
    found = drafted_since(before, after)
    assert found is not None
    assert found["drafts"] == 5
    assert found["accepted_by_position"] == [0, 0, 0]
    first = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_by_position": []}
    assert drafted_since(first, after) == after
    assert drafted_since(None, None) is None
