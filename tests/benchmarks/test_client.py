"""The load client's sums: decoding told apart from the rest, by times alone."""

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
    address,
    closed_loop,
    decode_rate,
    open_loop,
    percentile,
    read_events,
    steady_rate,
    summarize,
)
from benchmarks.slora import body_of
from benchmarks.workloads import Arrival, closed
from server.errors import BadSetting
from tests.benchmarks.conftest import Answering, events

DONE = b"data: [DONE]\n\n"


def outcome(due: float, first: float, last: float, tokens: int, ok: bool = True) -> Outcome:
    """`first` and `last` on the client's clock, the other tokens evenly between them."""
    times = tuple(first + (last - first) * i / max(tokens - 1, 1) for i in range(tokens))
    return Outcome(0, ok, tokens, first - due, last - due, due, times)


def test_decoding_at_once_counts_its_time_once() -> None:
    together = [outcome(0.0, 1.0, 3.0, 21), outcome(0.0, 1.5, 3.5, 21)]
    assert decode_rate(together) == pytest.approx(40 / 2.5)


def test_decoding_one_after_another_leaves_out_what_lies_between() -> None:
    turns = [outcome(0.0, 5.0, 6.0, 11), outcome(0.0, 1.0, 2.0, 11)]
    assert decode_rate(turns) == pytest.approx(20 / 2.0)


def test_one_within_another_adds_tokens_and_no_time() -> None:
    assert decode_rate([outcome(0.0, 1.0, 5.0, 41), outcome(2.0, 2.5, 3.0, 6)]) == pytest.approx(45 / 4.0)


def test_single_tokens_are_no_decoding() -> None:
    assert math.isnan(decode_rate([outcome(0.0, 1.0, 1.0, 1)]))
    assert math.isnan(decode_rate([]))


def test_steps_that_read_a_prompt_are_no_steady_decoding() -> None:
    """The second request's prompt is read while the first decodes, which takes that step 1 s instead of 0.1."""
    one = outcome(0.0, 1.0, 1.5, 6)
    rest = tuple(2.5 + 0.1 * i for i in range(6))
    one = replace(one, tokens=12, times=one.times + rest, e2e=3.0)
    two = outcome(0.0, 2.501, 3.001, 6)
    assert decode_rate([one, two]) == pytest.approx(16 / 2.001)
    assert steady_rate([one, two]) == pytest.approx((5 + 5 * 2) / (0.5 + 0.5))


def test_first_tokens_that_come_late_belong_to_the_step_of_the_others() -> None:
    """The third's first token is 6 ms behind the first's token of the same step, which took 0.5 s, and 1 behind the
    second's. When the next step began cannot be told."""
    rest = tuple(2.1 + 0.1 * i for i in range(5))
    one = replace(outcome(0.0, 1.0, 1.5, 6), tokens=12, times=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, *rest), e2e=2.5)
    two = replace(one, times=(*one.times[:6], 2.005, *rest))
    three = replace(outcome(0.0, 2.006, 2.5, 6), times=(2.006, *rest))
    assert steady_rate([one, two, three]) == pytest.approx((5 * 2 + 4 * 3) / (0.5 + 0.4))


@pytest.mark.parametrize("step", [0.0101, 0.0099, 0.005, 0.0025])
def test_steps_are_told_apart_however_short_they_are(step: float) -> None:
    """A request joins every fourth step, and each has 64 tokens: one that joins leaves out its own step alone."""
    joined = [outcome(0.0, 4 * i * step, (4 * i + 63) * step, 64) for i in range(64)]
    running = [sum(0 <= number - 4 * i < 64 for i in range(64)) for number in range(4 * 63 + 64)]
    alone = [count for number, count in enumerate(running) if number % 4 or number > 4 * 63]
    assert steady_rate(joined) * step == pytest.approx(sum(alone) / len(alone))


def test_a_short_step_that_only_reads_a_prompt_is_not_part_of_the_next() -> None:
    """The second answer begins 5 ms after the first one's end."""
    turns = [outcome(0.0, 1.0, 1.05, 11), outcome(0.0, 1.055, 1.105, 11)]
    assert steady_rate(turns) == pytest.approx((9 + 9) / (0.045 + 0.045))


def test_steady_decoding_one_after_another_leaves_out_what_lies_between() -> None:
    turns = [outcome(0.0, 5.0, 6.0, 11), outcome(0.0, 1.0, 2.0, 11)]
    assert steady_rate(turns) == pytest.approx(20 / 2.0)


def test_a_run_counts_what_was_finished() -> None:
    run = [outcome(0.0, 1.0, 3.0, 21), outcome(0.0, math.nan, 0.5, 0, ok=False)]
    summary = summarize(run, 4.0)
    assert (summary.requests, summary.finished) == (2, 1)
    assert summary.tokens_per_second == pytest.approx(21 / 4)
    assert summary.decode_tokens_per_second == pytest.approx(20 / 2)
    assert summary.slo_attainment == 0.5


def test_events_came_when_their_last_byte_did() -> None:
    events = [
        b'data: {"choices": [{"text": "a"}]}\n\n',
        b'data: {"choices": [{"text": "b"}]}\n\ndata: {"choices": [{"text": "c\\r"}]}\n',
        b'\ndata: {"choices": [], "usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n\ndata: {"cho',
    ]
    received = b"".join(events)
    first, second = len(events[0]), len(events[0]) + len(events[1])
    marks = [(first - 5, 1.0), (first + 3, 2.0), (second, 3.0), (len(received), 4.0)]
    assert read_events(received, marks) == (4, [2.0, 3.0, 3.0], "")


def test_an_error_ends_a_stream() -> None:
    received = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "full"}}\n\n'
    tokens, times, error = read_events(received, [(len(received), 1.0)])
    assert (tokens, times) == (0, [1.0])
    assert "full" in error


def test_an_event_without_text_is_no_token() -> None:
    """llama-server ends its streams with one, and it comes with those before it or a step later."""
    received = b"".join(b'data: {"choices": [{"text": "%s"}]}\n\n' % text for text in (b"a", b"b", b""))
    marks = [(n, float(n)) for n in (received.index(b"\n\n") + 2, len(received) - 3, len(received))]
    tokens, times, error = read_events(received + DONE, marks)
    assert (tokens, error) == (0, "")
    assert times == [marks[0][0], marks[1][0]]


def test_an_answer_lasts_until_its_last_token_shown_or_not() -> None:
    """Four tokens that are shown, then sixty that are not and come with the event that ends the answer."""
    texts = (b"a", b"b", b"c", b"d", b"")
    parts = [b'data: {"choices": [{"text": "%s"}]}\n\n' % text for text in texts]
    parts[-1] += b'data: {"choices": [], "usage": {"completion_tokens": 64}}\n\n'
    times = [0.02, 0.04, 0.06, 0.08, 1.28]
    marks = [(sum(map(len, parts[: i + 1])), time) for i, time in enumerate(times)]
    assert read_events(b"".join([*parts, DONE]), marks) == (64, times, "")
    done = Outcome(0, True, 64, times[0], times[-1], 0.0, tuple(times))
    assert done.tpot == pytest.approx(0.02) and decode_rate([done]) == pytest.approx(50)


def test_tokens_of_no_text_are_there_with_the_first_event() -> None:
    received = b'data: {"choices": [{"text": ""}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
    assert read_events(received + DONE, [(len(received), 1.0)]) == (1, [1.0], "")
    assert read_events(received.replace(b"1}", b"0}") + DONE, [(len(received), 1.0)]) == (0, [], "")


@pytest.mark.parametrize(
    "event",
    [
        b'data:{"choices":[{"text":"a","finish_reason":"length"}]}\n\n',
        b'data: {"choices": [{"text": "a", "finish_reason": "stop"}], "error": null, "usage": null}\r\n\r\n',
        b': ping\n\ndata:  {"choices": [{"text": "a"}], "usage": {"completion_tokens": null}}\n\ndata:[DONE]\n\n',
    ],
)
def test_other_servers_streams_are_read(event: bytes) -> None:
    assert read_events(event, [(len(event), 1.0)]) == (0, [1.0], "")


def test_an_answer_that_is_cut_off_is_a_failure() -> None:
    received = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
    assert "cut off" in read_events(received, [(len(received), 1.0)])[2]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (b"the model fell over", "cannot be read: data: the model fell over"),
        (b'{"object": "error", "message": "no room", "code": 500}', "no room"),
        (b'{"choices": [{"text": "", "finish_reason": "abort"}]}', "'abort'"),
        (b'{"choices": [{"text": "b", "finish_reason": "error"}]}', "'error'"),
    ],
)
def test_an_answer_that_ends_in_an_error_is_a_failure_in_whatever_words(event: bytes, told: str) -> None:
    received = b'data: {"choices": [{"text": "a"}]}\n\ndata: ' + event + b"\n\n" + DONE
    assert told in read_events(received, [(len(received), 1.0)])[2]


def ask_once(reply: Callable[[bytes], bytes]) -> Outcome:
    """One request to a server that answers what begins so with these bytes, and hangs up."""

    async def asking() -> Outcome:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            writer.write(reply(head))
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            [outcome] = await closed_loop(url, closed(1, [0], 4, 2), body_of(["a"], 200), 1)
            return outcome

    return asyncio.run(asking())


def test_a_server_that_says_why_and_hangs_up_is_heard() -> None:
    said = b'data: {"choices": [{"text": "a"}]}\n\n', b'data: {"error": {"message": "full"}}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"
    assert "full" in ask_once(lambda _: head + b"".join(said)).error
    assert "not completed" in ask_once(lambda _: head + said[0]).error


def test_a_page_that_refuses_is_told_in_one_line() -> None:
    page = b"HTTP/1.1 503 No\r\nContent-Length: 28\r\n\r\n<html>\n<h1>busy</h1>\n</html>"
    assert ask_once(lambda _: page).error == "503: <html> <h1>busy</h1> </html>"


def test_an_address_that_leads_elsewhere_is_told() -> None:
    """A POST becomes a GET on the way, which other servers refuse."""
    moved = b"HTTP/1.1 301 Moved\r\nLocation: /right\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    none = b"HTTP/1.1 405 Method\r\nContent-Length: 2\r\n\r\nno"
    error = ask_once(lambda head: moved if head.startswith(b"POST") else none).error
    assert error.startswith("405: no (http://127.0.0.1:") and "/right: give that address" in error


def test_an_answer_that_takes_too_long_is_told(answering: Answering) -> None:
    waiting = threading.Event()
    answering.reply = lambda body: (200, events(2)) if waiting.wait(30) else (500, "")
    try:
        asking = closed_loop(answering.url, closed(1, [0], 4, 2), body_of(["a"], 200), 1, timeout=0.05)
        assert asyncio.run(asking)[0].error == "it did not end in time"
    finally:
        waiting.set()


def test_what_is_no_stream_is_told(answering: Answering) -> None:
    answering.reply = lambda body: (200, '{"error": "streams are off"}')
    [one] = asyncio.run(closed_loop(answering.url, closed(1, [0], 4, 2), body_of(["a"], 200), 1))
    assert not one.ok and "streams are off" in one.error


def test_an_answer_that_comes_at_once_has_no_time_of_decoding() -> None:
    steady = Outcome(0, True, 11, 1.0, 2.0, 0.0)
    at_once = Outcome(0, True, 100, 1.5, 1.5, 0.0)
    assert decode_rate([steady, at_once]) == pytest.approx(10)
    assert math.isnan(at_once.tpot) and summarize([steady, at_once], 2.0).tpot_p50 == pytest.approx(0.1)


@pytest.mark.parametrize("event", [b"{no JSON}", b'{"choices": [7]}', b'{"usage": {"tokens": 1}}'])
def test_an_event_that_cannot_be_read_is_a_failure(event: bytes) -> None:
    received = b'data: {"choices": [{"text": "a"}]}\n\ndata: ' + event + b"\n\n"
    _, times, error = read_events(received, [(len(received), 1.0)])
    assert times == [1.0] and "cannot be read" in error


def test_events_of_several_tokens_count_as_the_usage_has_them() -> None:
    """As many tokens a second, whether each comes with an event of its own or three with one."""
    single = Outcome(0, True, 13, 1.0, 2.2, 0.0, tuple(1.0 + 0.1 * i for i in range(13)))
    three = replace(single, tokens=15, e2e=2.2, times=(1.0, 1.3, 1.6, 1.9, 2.2))
    assert steady_rate([single]) == pytest.approx(10)
    assert steady_rate([three]) == pytest.approx(10)


def test_who_does_not_finish_waits_for_ever() -> None:
    """Three of a hundred that fail are more than the last percent, however soon they did."""
    done = [outcome(0.0, 1.0, 3.0, 21)] * 97
    lost = [Outcome(0, False, 0, math.nan, 0.1, 0.0, error="429: full")] * 2
    broken = Outcome(0, False, 3, 0.2, 0.4, 0.0, (0.2, 0.3, 0.4), error="ClientPayloadError: cut")
    summary = summarize([*done, *lost, broken], 10.0)
    assert (summary.ttft_p50, summary.ttft_p90, summary.ttft_p99) == (1.0, 1.0, math.inf)
    assert (summary.failed, summary.reasons) == (3, ("429: full", "ClientPayloadError: cut"))
    assert summary.tokens_per_second == pytest.approx(97 * 21 / 10)
    nobody = summarize(lost, 10.0)
    assert (nobody.ttft_p50, nobody.e2e_p50) == (math.inf, math.inf) and math.isnan(nobody.tpot_p50)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_those_of_numpy(values: list[float], q: int) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_be_that_of_other_clients(end: str) -> None:
    assert address(f"http://localhost:8000{end}") == "http://localhost:8000/v1/completions"
    assert address(f"http://host/a/v10{end}") == "http://host/a/v10/v1/completions"


@pytest.mark.parametrize("url", ["", "localhost:8000", "http://", "ftp://host"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BadSetting, match="give it as http://localhost:8000"):
        address(url)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_key_is_sent_and_one_that_is_missing_is_asked_for(answering: Answering, loop: str) -> None:
    answering.reply = lambda body: (200, events(2, usage=False)) if answering.asked[-1][1] else (401, ["who are you?"])
    arrivals, body = closed(2, [0], 4, 2), body_of(["a"], 200)

    def ask(**key: str) -> list[Outcome]:
        if loop == "open":
            return asyncio.run(open_loop(f"{answering.url}/v1", arrivals, body, **key))
        return asyncio.run(closed_loop(f"{answering.url}/v1", arrivals, body, 1, **key))

    assert [(o.ok, o.tokens) for o in ask(key="me:secret")] == [(True, 2)] * 2
    assert {(route, key) for route, key, _ in answering.asked} == {("/v1/completions", "Bearer me:secret")}
    [first, _] = ask()
    assert not first.ok and "--api-key" in first.error and "who are you?" in first.error


def test_an_answer_without_a_token_has_a_reason(answering: Answering) -> None:
    answering.reply = lambda body: (200, ["[DONE]"])
    [outcome] = asyncio.run(closed_loop(answering.url, closed(1, [0], 4, 2), body_of(["a"], 200), 1))
    assert not outcome.ok and "without a token" in outcome.error


@pytest.mark.parametrize(("url", "key"), [("http://my..host:8000", ""), ("http://localhost:1", "ab\x01c")])
def test_a_name_or_a_key_that_is_none_is_a_failure(url: str, key: str) -> None:
    [one] = asyncio.run(closed_loop(url, closed(1, [0], 4, 2), body_of(["a"], 200), 1, key=key))
    assert not one.ok and one.error


def test_requests_go_out_when_they_are_due_each_with_its_body(answering: Answering) -> None:
    """And their times count from then on, whatever has kept the client from sending them."""
    arrivals = [Arrival(time, -1, 4, 2) for time in (0.0, 0.3)]
    asking = open_loop(answering.url, arrivals, lambda arrival, i: {"max_tokens": arrival.output_tokens, "number": i})
    first, second = asyncio.run(asking)
    assert second.due - first.due == pytest.approx(0.3, abs=1e-6)
    assert first.ttft > 0 and second.ttft > 0, "none was sent before"
    assert [body["number"] for _, _, body in answering.asked] == [0, 1]


def test_so_many_requests_are_in_flight_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, numbers = [0], [0], list[int]()

    async def ask(session: Any, url: str, body: Any, due: float, adapter: int) -> Outcome:
        running[0] += 1
        most[0] = max(most[0], running[0])
        numbers.append(body["number"])
        for _ in range(5):
            await asyncio.sleep(0)
        running[0] -= 1
        return outcome(due, due, due, 1)

    monkeypatch.setattr("benchmarks.client.ask", ask)
    asking = closed_loop("http://host", closed(7, [0], 4, 2), lambda arrival, i: {"number": i}, 3)
    assert len(asyncio.run(asking)) == 7 and most == [3] and numbers == list(range(7))


def test_what_a_summary_counts_is_of_those_that_finished() -> None:
    """And S-LoRA's satisfaction is that of all: 1 at once, 0 from the service level on and for who failed."""
    done = [outcome(0.0, first, first + 1.0, 11) for first in (0.0, 3.0, 9.0)]
    done[0] = replace(done[0], e2e=2.0, short=True)
    cut = Outcome(0, False, 5, 0.1, 0.2, 0.0, (0.1, 0.2), error="cut", short=True)
    lost = [replace(cut, error=f"{i}") for i in range(4)]
    summary = summarize([*done, cut, *lost], 4.0)
    assert (summary.tokens, summary.short, summary.requests_per_second) == (33, 1, 0.75)
    assert (summary.failed, summary.reasons) == (5, ("cut", "0", "1")), "the first few different ones"
    assert summary.satisfaction == pytest.approx((1 + 0.75 + 0) / 8)
    assert summary.slo_attainment == pytest.approx(2 / 8)
    assert (summary.tpot_p50, summary.tpot_p99) == (pytest.approx(0.1), pytest.approx(0.198))
