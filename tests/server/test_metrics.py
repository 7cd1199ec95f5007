"""What is counted of requests that have ended, apart from any server."""

from __future__ import annotations

import pytest

from server.metrics import Metrics, RequestRecord


def test_the_totals_of_a_task_are_those_of_all_its_pairs_until_it_is_gone() -> None:
    metrics = Metrics()
    times = {"submitted": 1.0, "admitted": 1.5, "first_token": 2.0, "finished": 5.0}
    for adapters, status in ((("a",), "200"), (("b",), "200"), (("a",), "cancelled"), (("a",), "500")):
        metrics.record(RequestRecord("t", adapters, status, **times, prompt_tokens=3, generated_tokens=4, longest=4))
    metrics.record(RequestRecord("u", ("a",), "200", **times, latency=False))
    assert metrics.totals()["t"] == {
        "requests": 4,
        "errors": 1,
        "cancelled": 1,
        "prompt_tokens": 12,
        "generated_tokens": 16,
        "ttft_seconds": 1.0,
        "duration_seconds": 4.0,
    }
    assert metrics.totals()["u"]["requests"] == 1 and metrics.totals()["u"]["ttft_seconds"] is None
    before = metrics.totals()
    metrics.forget_adapter("a")
    assert metrics.totals() == before, "an evaluated result has a name for as long as it is measured"
    metrics.record(RequestRecord("t", ("a",), "200", **times, prompt_tokens=3, generated_tokens=4, longest=4))
    metrics.forget_adapter("a")
    assert metrics.totals()["t"]["requests"] == 5 and metrics.totals()["t"]["duration_seconds"] == 4.0
    assert 'adapter="a"' not in metrics.render().decode()
    metrics.forget_task("t")
    assert set(metrics.totals()) == {"u"}


def test_a_series_that_has_begun_goes_on_when_there_is_room_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.metrics.MAX_PAIRS", 2)
    metrics = Metrics()
    for name in ("a", "b", "c", "a", "b", "a"):
        metrics.record(RequestRecord("t", (name,), "200"))
    text = metrics.render().decode()
    for name, task, count in (("a", "t", 3), ("b", "t", 2), ("other", "other", 1)):
        assert f'loramux_requests_total{{task="{task}",adapter="{name}",status="200"}} {count}\n' in text


def test_the_mixes_of_an_adapter_go_with_it() -> None:
    metrics = Metrics()
    for adapters in (("a", "b"), ("b", "a", "c"), ("b", "c"), ("b",)):
        metrics.record(RequestRecord("t", adapters, "200"))
    metrics.forget_adapter("a")
    text = metrics.render().decode()
    assert 'adapter="a+b' not in text and 'adapter="b+c"' in text and 'adapter="b"' in text
    assert metrics.totals()["t"]["requests"] == 4
