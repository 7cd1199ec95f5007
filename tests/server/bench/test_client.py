"""The load client's sums: decoding told apart from the rest, by times alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from server.bench.client import Outcome, decode_rate, read_events, steady_rate, summarize


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
    second's."""
    rest = tuple(2.1 + 0.1 * i for i in range(5))
    one = replace(outcome(0.0, 1.0, 1.5, 6), tokens=12, times=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, *rest), e2e=2.5)
    two = replace(one, times=(*one.times[:6], 2.005, *rest))
    three = replace(outcome(0.0, 2.006, 2.5, 6), times=(2.006, *rest))
    assert steady_rate([one, two, three]) == pytest.approx((5 * 2 + 5 * 3) / (0.5 + 0.5))


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
