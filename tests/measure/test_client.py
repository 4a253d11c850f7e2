from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure.client import HttpClient, SseLines, StreamFault, share_out
from compressor.measure.engines.base import RequestSample
from tests.measure.servers import DONE, Answer, Script, event, good, serving, text_event, usage


def ask(
    script: Script,
    *,
    tokens: int = 4,
    ignore_eos: bool = True,
    see: Callable[[Any, HttpClient], None] | None = None,
    **options: Any,
) -> RequestSample:
    """The sample of one request to a server that answers by `script`."""

    async def whole() -> RequestSample:
        async with serving(script) as server:
            client = server.client(**options)
            try:
                sample = await client.request([1, 2, 3], tokens, ignore_eos=ignore_eos)
                if see:
                    see(server, client)
                return sample
            finally:
                await client.close()

    return asyncio.run(whole())


def test_every_token_has_the_time_at_which_it_came() -> None:
    async def slow(answer: Answer) -> None:
        await answer.head()
        for _ in range(4):
            await asyncio.sleep(0.05)
            await answer.send(event())
        await answer.send(DONE)
        await answer.end()

    before = time.perf_counter()
    sample = ask(slow)
    assert sample.error == "" and sample.output_tokens == 4 and sample.prompt_tokens == 3
    assert before <= sample.start_s < sample.first_token_s == sample.token_times_s[0]
    assert sample.first_token_s - sample.start_s > 0.045
    assert sample.end_s - sample.start_s > 0.19 and len(set(sample.token_times_s)) > 1
    assert list(sample.token_times_s) == sorted(sample.token_times_s)


def test_the_request_is_greedy_and_streams_ids() -> None:
    def see(server: Any, client: HttpClient) -> None:
        assert server.bodies == [
            {
                "model": "m",
                "prompt": [1, 2, 3],
                "max_tokens": 4,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "extra": 1,
            }
        ]
        assert client.counting == {"ids": 1}

    ask(good, see=see, fields={"extra": 1})


def test_tokens_of_one_event_share_its_time() -> None:
    async def speculative(answer: Answer) -> None:
        await answer.head()
        await answer.send(event(1))
        await asyncio.sleep(0.02)
        await answer.send(event(3))
        await answer.send(DONE)
        await answer.end()

    times = ask(speculative).token_times_s
    assert len(times) == 4 and len(set(times)) == 2 and times[1] == times[3]


def test_running_counts_of_llama_cpp() -> None:
    async def llama(answer: Answer) -> None:
        await answer.head()
        for done in (1, 2, 4):  # the third token alone had no text
            await answer.send(
                text_event("x").replace(b"]}\n\n", b'], "timings": {"predicted_n": %d}}\n\n' % done)
            )
        await answer.send(usage(4))
        await answer.send(DONE)
        await answer.end()

    def see(_: Any, client: HttpClient) -> None:
        assert client.counting == {"timings": 1}

    assert ask(llama, see=see).output_tokens == 4


@pytest.mark.parametrize(
    ("total", "how"), [(2, "usage"), (5, "usage, shared out"), (None, "events")]
)
def test_counts_without_ids(total: int | None, how: str) -> None:
    async def plain(answer: Answer) -> None:
        await answer.head()
        await answer.send(text_event("ab"))
        await asyncio.sleep(0.02)
        await answer.send(text_event("cdef") + text_event("", finish_reason="stop"))
        if total is not None:
            await answer.send(usage(total, prompt=9))
        await answer.send(DONE)
        await answer.end()

    def see(server: Any, client: HttpClient) -> None:
        assert client.counting == {how: 1}
        assert server.bodies[0]["prompt"] == "1 2 3" and "ignore_eos" not in server.bodies[0]

    sample = ask(
        plain,
        tokens=8,
        see=see,
        decode=lambda ids: " ".join(map(str, ids)),
        knows_ignore_eos=False,
    )
    assert sample.error == "" and sample.output_tokens == (total or 2)
    assert sample.prompt_tokens == (3 if total is None else 9)
    assert len(set(sample.token_times_s)) == 2


def test_chat_counts_what_is_thought_and_said() -> None:
    async def chat(answer: Answer) -> None:
        await answer.head()
        for delta in ({"role": "assistant"}, {"reasoning_content": "hm"}, {"content": "yes"}, {}):
            line = str({"choices": [{"delta": delta}]}).replace("'", '"')
            await answer.send(f"data: {line}\r\n\r\n".encode())
        await answer.send(DONE)
        await answer.end()

    def see(server: Any, _: HttpClient) -> None:
        assert server.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
        assert "prompt" not in server.bodies[0]

    sample = ask(chat, ignore_eos=False, see=see, decode=lambda _: "hi", chat=True)
    assert sample.output_tokens == 2 and sample.error == ""


def test_a_shorter_answer_is_right_where_it_was_allowed() -> None:
    async def short(answer: Answer) -> None:
        await answer.head()
        await answer.send(event() + event() + DONE)
        await answer.end()

    assert ask(short, ignore_eos=False).error == ""
    assert ask(short, ignore_eos=True).error == "truncated stream: 2 of 4 tokens"
    assert ask(short, tokens=1).error == "2 tokens, 1 were asked for"


async def says_500(answer: Answer) -> None:
    await answer.head("500 Internal Server Error")
    await answer.send(b"out of memory " + b"!" * 1000)
    await answer.end()


async def redirects(answer: Answer) -> None:
    await answer.raw(b"HTTP/1.1 307 R\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n")


async def dies_at_once(answer: Answer) -> None:
    answer.die()


async def dies_in_mid_stream(answer: Answer) -> None:
    await answer.head()
    await answer.send(event())
    await answer.send(event())
    await asyncio.sleep(0.02)
    answer.die()


async def stalls(answer: Answer) -> None:
    await answer.head()
    await answer.send(event())
    await answer.send(event())
    while True:
        await asyncio.sleep(0.02)
        await answer.send(b": still here\n\n")


async def never_begins(answer: Answer) -> None:
    await answer.head()
    await asyncio.sleep(60)


async def never_ends(answer: Answer) -> None:
    await answer.head()
    while True:
        await answer.send(event())
        await asyncio.sleep(0.02)


async def sends_garbage(answer: Answer) -> None:
    await answer.head()
    await answer.send(event() + event() + b"data: {not json\n\n")
    await answer.end()


async def sends_a_number(answer: Answer) -> None:
    await answer.head()
    await answer.send(b"data: 42\n\n")
    await answer.end()


async def is_no_http(answer: Answer) -> None:
    await answer.raw(b"\x00\x01 no http at all\r\n\r\n")


async def ends_early(answer: Answer) -> None:
    await answer.head()
    await answer.send(event() * 4)
    await answer.end()


async def reports_an_error(answer: Answer) -> None:
    await answer.head()
    await answer.send(event() + event() + b'data: {"error": {"message": "engine died"}}\n\n' + DONE)
    await answer.end()


@pytest.mark.parametrize(
    ("script", "error", "tokens"),
    [
        (says_500, "HTTP 500: out of memory !!", 0),
        (redirects, "HTTP 307", 0),
        (dies_at_once, "connection lost: ", 0),
        (dies_in_mid_stream, "", 2),
        (stalls, "timeout: no token for 0.2 s", 2),
        (never_begins, "timeout: not done after 0.5 s", 0),
        (never_ends, "timeout: not done after 0.5 s", None),
        (sends_garbage, "garbage in the stream: {not json", 2),
        (sends_a_number, "garbage in the stream: 42", 0),
        (is_no_http, "", 0),
        (ends_early, "truncated stream: it ended without [DONE]", 4),
        (reports_an_error, "error in the stream: engine died", 2),
    ],
)
def test_faults_are_samples_with_the_tokens_before_them(
    script: Script, error: str, tokens: int | None
) -> None:
    began = time.perf_counter()
    limits = {"total_s": 0.5} if "not done" in error else {"stall_s": 0.2}
    sample = ask(script, tokens=1000, **limits)
    assert sample.error and error in sample.error and len(sample.error) < 260
    assert tokens is None or sample.output_tokens == tokens
    assert sample.output_tokens == len(sample.token_times_s)
    assert began < sample.first_token_s <= time.perf_counter()
    if sample.token_times_s:
        assert sample.first_token_s == sample.token_times_s[0]


async def closes_what_it_promised_to_keep(answer: Answer) -> None:
    """As llama-server does."""
    await good(answer)
    raise ConnectionResetError


def test_a_connection_that_is_closed_after_each_answer_is_not_used_again() -> None:
    async def run() -> list[RequestSample]:
        async with serving(closes_what_it_promised_to_keep) as server:
            client = server.client(keep_alive=False)
            found = [await client.request([1, 2, 3], 2) for _ in range(20)]
            await client.close()
            assert all("connection: close" in head.lower() for head in server.heads)
            return found

    assert [sample.error for sample in asyncio.run(run())] == [""] * 20


def test_a_refused_connection_is_a_sample() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]

    async def whole() -> RequestSample:
        client = HttpClient(f"http://127.0.0.1:{port}/v1/completions", model="m")
        try:
            return await client.request([1, 2], 4)
        finally:
            await client.close()

    sample = asyncio.run(whole())
    assert sample.error.startswith("connection failed: ") and sample.output_tokens == 0
    assert sample.prompt_tokens == 2


def test_a_key_never_gets_into_an_error() -> None:
    async def tells(answer: Answer) -> None:
        await answer.head("401 Unauthorized")
        await answer.send(b"incorrect key sk-secret, header Bearer sk-secret")
        await answer.end()

    def see(server: Any, _: HttpClient) -> None:
        assert "Authorization: Bearer sk-secret" in server.heads[0]

    error = ask(tells, headers={"Authorization": "Bearer sk-secret"}, see=see).error
    assert error.startswith("HTTP 401") and "sk-secret" not in error


def test_a_cancelled_request_is_cancelled() -> None:
    async def whole() -> None:
        async with serving(never_begins) as server:
            client = server.client()
            try:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.request([1], 2), 0.1)
            finally:
                await client.close()

    asyncio.run(whole())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(max_size=8).filter(lambda b: b"\n" not in b and b.strip() == b)),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_payloads_do_not_depend_on_how_the_bytes_are_cut(
    payloads: list[bytes], cuts: list[int]
) -> None:
    whole = b"".join(b": ping\r\ndata: " + payload + b"\r\n\r\n" for payload in payloads)
    lines, found, at, turn = SseLines(), [], 0, 0
    while at < len(whole):
        step = cuts[turn % len(cuts)]
        found += lines.feed(whole[at : at + step])
        at, turn = at + step, turn + 1
    assert found == payloads


def test_a_line_without_end_is_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.measure.client._EVENT_BYTES", 100)
    with pytest.raises(StreamFault, match="more than 100 bytes"):
        SseLines().feed(b"data: " + b"x" * 200)


@given(st.integers(0, 200), st.lists(st.integers(0, 20), max_size=30))
def test_shares_add_up(total: int, lengths: list[int]) -> None:
    shares = share_out(total, lengths)
    assert len(shares) == len(lengths) and all(share >= 0 for share in shares)
    assert sum(shares) == (total if lengths else 0)
    if total >= len(lengths):
        assert all(share >= 1 for share in shares)


def test_longer_texts_have_more_tokens() -> None:
    assert share_out(15, [2, 2, 8]) == [3, 3, 9]
    assert share_out(2, [0, 3, 1]) == [0, 1, 1]
    assert share_out(3, [0, 0]) == [1, 2]
