"""Load client: rates, parsing of streams, failures, and the timing of requests."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import (
    Outcome,
    closed_loop,
    decode_rate,
    endpoint,
    is_local,
    open_loop,
    percentile,
    read_events,
    run,
    server_stats,
    steady_rate,
    summarize,
)
from benchmarks.slora import completion_body
from benchmarks.workloads import Arrival, closed
from server.errors import BadSetting
from tests.benchmarks.conftest import FakeServer, events

DONE = b"data: [DONE]\n\n"
TEXT_A = b'data: {"choices": [{"text": "a"}]}\n\n'
ARRIVAL, BODY = closed(1, [0], 4, 2), completion_body(["a"], 200)


def outcome(due: float, first: float, last: float, tokens: int, ok: bool = True) -> Outcome:
    """Tokens at even intervals from `first` to `last` on the client's clock."""
    times = tuple(first + (last - first) * i / max(tokens - 1, 1) for i in range(tokens))
    return Outcome(0, ok, tokens, first - due, last - due, due, times)


@pytest.mark.parametrize(
    ("requests", "rate"),
    [
        ([(0.0, 1.0, 3.0, 21), (0.0, 1.5, 3.5, 21)], 40 / 2.5),  # overlapping
        ([(0.0, 5.0, 6.0, 11), (0.0, 1.0, 2.0, 11)], 20 / 2.0),  # one after another
        ([(0.0, 1.0, 5.0, 41), (2.0, 2.5, 3.0, 6)], 45 / 4.0),  # one within another
        ([(0.0, 1.0, 1.0, 1)], math.nan),
        ([], math.nan),
    ],
)
def test_decode_rate(requests: list[tuple[float, float, float, int]], rate: float) -> None:
    assert decode_rate([outcome(*r) for r in requests]) == pytest.approx(rate, nan_ok=True)


def test_answer_that_arrives_at_once_has_no_decode_time() -> None:
    steady, at_once = Outcome(0, True, 11, 1.0, 2.0, 0.0), Outcome(0, True, 100, 1.5, 1.5, 0.0)
    assert decode_rate([steady, at_once]) == pytest.approx(10)
    assert math.isnan(at_once.tpot) and summarize([steady, at_once], 2.0).tpot_p50 == pytest.approx(0.1)


def test_steady_rate_leaves_out_steps_with_a_prefill() -> None:
    """The second request's prefill makes one step 1 s long instead of 0.1 s."""
    rest = tuple(2.5 + 0.1 * i for i in range(6))
    one = outcome(0.0, 1.0, 1.5, 6)
    one = replace(one, tokens=12, times=one.times + rest, e2e=3.0)
    two = outcome(0.0, 2.501, 3.001, 6)
    assert decode_rate([one, two]) == pytest.approx(16 / 2.001)
    assert steady_rate([one, two]) == pytest.approx((5 + 5 * 2) / (0.5 + 0.5))


def test_steady_rate_with_late_first_tokens() -> None:
    """The third request's first token arrives 6 ms after the other tokens of its step."""
    rest = tuple(2.1 + 0.1 * i for i in range(5))
    one = replace(outcome(0.0, 1.0, 1.5, 6), tokens=12, times=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, *rest), e2e=2.5)
    two = replace(one, times=(*one.times[:6], 2.005, *rest))
    three = replace(outcome(0.0, 2.006, 2.5, 6), times=(2.006, *rest))
    assert steady_rate([one, two, three]) == pytest.approx((5 * 2 + 4 * 3) / (0.5 + 0.4))


@pytest.mark.parametrize("step", [0.0101, 0.005, 0.0025])
def test_steady_rate_with_short_steps(step: float) -> None:
    """A request joins every fourth step."""
    joined = [outcome(0.0, 4 * i * step, (4 * i + 63) * step, 64) for i in range(64)]
    running = [sum(0 <= number - 4 * i < 64 for i in range(64)) for number in range(4 * 63 + 64)]
    decode_only = [count for number, count in enumerate(running) if number % 4 or number > 4 * 63]
    assert steady_rate(joined) * step == pytest.approx(sum(decode_only) / len(decode_only))


def test_steady_rate_with_several_tokens_per_event() -> None:
    single = Outcome(0, True, 13, 1.0, 2.2, 0.0, tuple(1.0 + 0.1 * i for i in range(13)))
    three = replace(single, tokens=15, e2e=2.2, times=(1.0, 1.3, 1.6, 1.9, 2.2))
    assert steady_rate([single]) == steady_rate([three]) == pytest.approx(10)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_equal_numpy(values: list[float], q: int) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def test_summary_with_failures() -> None:
    done = [outcome(0.0, first, first + 1.0, 11) for first in (0.0, 3.0, 9.0)]
    done[0] = replace(done[0], e2e=2.0, short=True)
    cut = Outcome(0, False, 5, 0.1, 0.2, 0.0, (0.1, 0.2), error="cut", short=True)
    lost = [replace(cut, error=f"{i}") for i in range(4)]
    summary = summarize([*done, cut, *lost], 4.0)
    assert (summary.tokens, summary.short, summary.requests_per_second) == (33, 1, 0.75)
    assert (summary.failed, summary.reasons) == (5, ("cut", "0", "1"))
    assert summary.satisfaction == pytest.approx((1 + 0.75 + 0) / 8) and summary.slo_attainment == pytest.approx(2 / 8)
    assert (summary.ttft_p99, summary.e2e_p50) == (math.inf, math.inf)
    assert (summary.tpot_p50, summary.tpot_p99) == (pytest.approx(0.1), pytest.approx(0.198))


def test_events_arrive_with_their_last_byte() -> None:
    chunks = [
        TEXT_A,
        b'data: {"choices": [{"text": "b"}]}\n\ndata: {"choices": [{"text": "c\\r"}]}\n',
        b'\ndata: {"choices": [], "usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n\ndata: {"cho',
    ]
    received = b"".join(chunks)
    first, second = len(chunks[0]), len(chunks[0]) + len(chunks[1])
    marks = [(first - 5, 1.0), (first + 3, 2.0), (second, 3.0), (len(received), 4.0)]
    assert read_events(received, marks) == (4, [2.0, 3.0, 3.0], "")


def test_events_without_text() -> None:
    """They count only if the answer has a usage."""
    parts = [b'data: {"choices": [{"text": "%s"}]}\n\n' % text for text in (b"a", b"b", b"")]
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 64}}\n\n'
    marks = [(sum(map(len, parts[: i + 1])), float(i)) for i in range(3)]
    received = b"".join(parts)
    assert read_events(received + DONE, marks) == (0, [0.0, 1.0], "")
    assert read_events(received + usage + DONE, [*marks[:2], (10**6, 2.0)]) == (64, [0.0, 1.0, 2.0], "")


@pytest.mark.parametrize(
    "event",
    [
        b'data:{"choices":[{"text":"a","finish_reason":"length"}]}\n\n',
        b'data: {"choices": [{"text": "a", "finish_reason": "stop"}], "error": null, "usage": null}\r\n\r\n',
        b': ping\n\ndata:  {"choices": [{"text": "a"}], "usage": {"completion_tokens": null}}\n\ndata:[DONE]\n\n',
    ],
)
def test_streams_of_other_servers(event: bytes) -> None:
    assert read_events(event, [(len(event), 1.0)]) == (0, [1.0], "")


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (b"", "cut off"),
        (b"data: the server crashed\n\n", "cannot be parsed: data: the server crashed"),
        (b"data: {no JSON}\n\n", "cannot be parsed"),
        (b'data: {"choices": [7]}\n\n', "cannot be parsed"),
        (b'data: {"error": {"message": "full"}}\n\n', "full"),
        (b'data: {"object": "error", "message": "no room", "code": 500}\n\n', "no room"),
        (b'data: {"choices": [{"text": "", "finish_reason": "abort"}]}\n\n', "'abort'"),
    ],
)
def test_failed_streams(event: bytes, error: str) -> None:
    received = TEXT_A + event + (DONE if event else b"")
    _, times, found = read_events(received, [(len(received), 1.0)])
    assert times[0] == 1.0 and error in found


def request_once(reply: Callable[[bytes], bytes]) -> Outcome:
    """One request to a server that answers the head of a request with these bytes and closes the connection."""

    async def request() -> Outcome:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            writer.write(reply(head))
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            [one] = await closed_loop(url, ARRIVAL, BODY, 1)
            return one

    return asyncio.run(request())


def test_connection_errors() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"
    assert "full" in request_once(lambda _: head + TEXT_A + b'data: {"error": {"message": "full"}}\n\n').error
    assert "not completed" in request_once(lambda _: head + TEXT_A).error
    page = b"HTTP/1.1 503 No\r\nContent-Length: 28\r\n\r\n<html>\n<h1>busy</h1>\n</html>"
    assert request_once(lambda _: page).error == "503: <html> <h1>busy</h1> </html>"
    moved = b"HTTP/1.1 301 Moved\r\nLocation: /right\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    refused = b"HTTP/1.1 405 Method\r\nContent-Length: 2\r\n\r\nno"
    error = request_once(lambda head: moved if head.startswith(b"POST") else refused).error
    assert error.startswith("405: no (http://127.0.0.1:") and "/right; use that address" in error


@pytest.mark.parametrize(("url", "key"), [("http://my..host:8000", ""), ("http://localhost:1", "ab\x01c")])
def test_invalid_host_or_key_is_a_failure(url: str, key: str) -> None:
    [one] = asyncio.run(closed_loop(url, ARRIVAL, BODY, 1, key=key))
    assert not one.ok and one.error


@pytest.mark.parametrize(
    ("data", "error"), [(["[DONE]"], "has no token"), ('{"error": "streams are off"}', "streams are off")]
)
def test_answers_without_tokens(fake_server: FakeServer, data: Any, error: str) -> None:
    fake_server.reply = lambda body: (200, data)
    [one] = asyncio.run(closed_loop(fake_server.url, ARRIVAL, BODY, 1))
    assert not one.ok and error in one.error


def test_timeout(fake_server: FakeServer) -> None:
    waiting = threading.Event()
    fake_server.reply = lambda body: (200, events(2)) if waiting.wait(30) else (500, "")
    try:
        assert asyncio.run(closed_loop(fake_server.url, ARRIVAL, BODY, 1, timeout=0.05))[0].error == "timeout"
    finally:
        waiting.set()


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_endpoint(end: str) -> None:
    assert endpoint(f"http://localhost:8000{end}") == "http://localhost:8000/v1/completions"
    assert endpoint(f"http://host/a/v10{end}", chat=True) == "http://host/a/v10/v1/chat/completions"


@pytest.mark.parametrize("url", ["", "localhost:8000", "http://", "ftp://host"])
def test_invalid_urls(url: str) -> None:
    with pytest.raises(BadSetting, match="Give it as http://localhost:8000"):
        endpoint(url)


def test_local_urls() -> None:
    assert all(map(is_local, ("http://localhost:1", "127.0.0.1:80/v1", "http://[::1]:8")))
    assert not any(map(is_local, ("https://example.org/v1", "example.org", "http://[::1")))


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_key_is_sent(fake_server: FakeServer, loop: str) -> None:
    fake_server.reply = lambda body: (200, events(2, usage=False)) if fake_server.requests[-1][1] else (401, ["key?"])

    def request(**key: str) -> list[Outcome]:
        arrivals = closed(2, [0], 4, 2)
        if loop == "open":
            return asyncio.run(open_loop(f"{fake_server.url}/v1", arrivals, BODY, **key))
        return asyncio.run(closed_loop(f"{fake_server.url}/v1", arrivals, BODY, 1, **key))

    assert [(o.ok, o.tokens) for o in request(key="me:secret")] == [(True, 2)] * 2
    assert {(route, key) for route, key, _ in fake_server.requests} == {("/v1/completions", "Bearer me:secret")}
    assert "--api-key" in request()[0].error


def test_open_loop_sends_at_the_given_times(fake_server: FakeServer) -> None:
    arrivals = [Arrival(time, -1, 4, 2) for time in (0.0, 0.3)]
    running = open_loop(fake_server.url, arrivals, lambda arrival, i: {"max_tokens": 2, "number": i})
    first, second = asyncio.run(running)
    assert second.due - first.due == pytest.approx(0.3, abs=1e-6) and first.ttft > 0 and second.ttft > 0
    assert [body["number"] for *_, body in fake_server.requests] == [0, 1]


def test_closed_loop_keeps_its_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, numbers = [0], [0], list[int]()

    async def send(session: Any, url: str, body: Any, due: float, adapter: int) -> Outcome:
        running[0] += 1
        most[0] = max(most[0], running[0])
        numbers.append(body["number"])
        for _ in range(5):
            await asyncio.sleep(0)
        running[0] -= 1
        return outcome(due, due, due, 1)

    monkeypatch.setattr("benchmarks.client.send", send)
    outcomes = asyncio.run(closed_loop("http://host", closed(7, [0], 4, 2), lambda arrival, i: {"number": i}, 3))
    assert len(outcomes) == 7 and most == [3] and numbers == list(range(7))


def test_stats_of_other_servers(fake_server: FakeServer) -> None:
    for stats in (None, {}, {"adapters": 3}, ["x"]):
        fake_server.stats = stats
        assert run(server_stats(fake_server.url)) is None
    assert run(server_stats("http://127.0.0.1:1")) is None
