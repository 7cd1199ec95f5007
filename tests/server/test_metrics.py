"""Metrics without a server: names, buckets, request series and their limit, values of a snapshot."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.weights import Version
from server.metrics import Metrics, RequestRecord, Snapshot, requests
from server.metrics.requests import DURATION_BUCKETS, TPOT_BUCKETS, TTFT_BUCKETS
from tests.server.prometheus import families, value

SERIES = {
    "loramux_requests": "counter",
    "loramux_request_duration_seconds": "histogram",
    "loramux_time_to_first_token_seconds": "histogram",
    "loramux_time_per_output_token_seconds": "histogram",
    "loramux_queue_seconds": "histogram",
    "loramux_prompt_tokens": "counter",
    "loramux_generation_tokens": "counter",
    "loramux_adapter_info": "gauge",
    "loramux_task_quality": "gauge",
    "loramux_adapter_bytes": "gauge",
    "loramux_adapter_loads": "counter",
    "loramux_adapter_load_seconds": "histogram",
    "loramux_ready": "gauge",
    "loramux_adapters_rejected": "gauge",
    "loramux_adapter_evictions": "counter",
    "loramux_memory_bytes": "gauge",
    "loramux_kv_blocks": "gauge",
    "loramux_batch_size": "histogram",
    "loramux_training_loss": "gauge",
    "loramux_training_tokens": "counter",
    "loramux_training_progress": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:lora_requests_info": "gauge",
}


def ended(task: str | None, *adapters: str, status: str = "200", **more: Any) -> RequestRecord:
    times: dict[str, Any] = {"submitted": 1.0, "admitted": 1.5, "first_token": 2.0, "finished": 4.0}
    counts = {"prompt_tokens": 10, "generated_tokens": 5, "longest": 5, "tpot": 0.5}
    return RequestRecord(task, adapters, status, **{**times, **counts, **more})


def recorded(*records: RequestRecord) -> Metrics:
    metrics = Metrics()
    for record in records:
        metrics.record(record)
    return metrics


def count(metrics: Metrics, **labels: str) -> float | None:
    return value(metrics.render(), "loramux_requests_total", **labels)


def test_names_types_and_help_of_all_series() -> None:
    found = families(Metrics().render())
    assert {name: family.type for name, family in found.items()} == SERIES
    assert all(family.documentation for family in found.values())


def test_buckets() -> None:
    assert TPOT_BUCKETS[:4] == (0.001, 0.0025, 0.005, 0.01) and TPOT_BUCKETS[-1] == 80
    assert DURATION_BUCKETS[:5] == (0.01, 0.025, 0.05, 0.1, 0.3) and DURATION_BUCKETS[-1] == 7680
    assert TTFT_BUCKETS[0] == 0.001 and TTFT_BUCKETS[-1] == 2560 and len(TTFT_BUCKETS) == 22


def test_latencies_come_from_the_timestamps_of_the_request() -> None:
    metrics = recorded(ended("mood", "b", "a"), ended("mood", "a", "b", latency=False), ended(None, status="cancelled"))
    text, pair = metrics.render(), {"task": "mood", "adapter": "a+b"}
    for name, seconds in (
        ("request_duration", 3.0),
        ("time_to_first_token", 1.0),
        ("time_per_output_token", 0.5),
        ("queue", 0.5),
    ):
        assert value(text, f"loramux_{name}_seconds_sum", **pair) == seconds
        assert value(text, f"loramux_{name}_seconds_count", **pair) == 1, "without the one that has latency=False"
    for le, total in (("0.3", 0), ("0.5", 1), ("+Inf", 1)):
        assert value(text, "loramux_queue_seconds_bucket", **pair, le=le) == total
    assert value(text, "loramux_prompt_tokens_total", **pair) == 20
    assert value(text, "loramux_generation_tokens_total", **pair) == 10
    assert count(metrics, **pair, status="200") == 2
    assert count(metrics, task="none", adapter="base", status="cancelled") == 1
    assert value(text, "loramux_request_duration_seconds_count", task="none", adapter="base") == 0


def test_zero_is_a_duration_and_nan_is_none() -> None:
    zero = {"submitted": 1.0, "admitted": 1.0, "first_token": 1.0, "finished": 1.0, "tpot": 0.0}
    text = recorded(RequestRecord("t", ("a",), "200", **zero), RequestRecord("u", ("a",), "200")).render()
    for name in ("request_duration", "time_to_first_token", "time_per_output_token", "queue"):
        assert value(text, f"loramux_{name}_seconds_count", task="t") == 1
        assert value(text, f"loramux_{name}_seconds_count", task="u") == 0


@given(st.lists(st.floats(0, 1e4), max_size=20))
def test_histogram_counts_values_up_to_each_bound(values: list[float]) -> None:
    metrics = recorded(*(RequestRecord("t", (), "200", submitted=0.0, finished=v) for v in values))
    text = metrics.render()
    for le in DURATION_BUCKETS if values else ():
        expected = sum(v <= le for v in values)
        assert value(text, "loramux_request_duration_seconds_bucket", le=str(le)) == expected


@pytest.mark.parametrize("status", ["429", "500", "504", "507"])
def test_error_counts_start_at_zero(status: str) -> None:
    metrics = recorded(ended("t", "a"))
    assert count(metrics, task="t", adapter="a", status=status) == 0
    metrics.record(ended("t", "a", status=status))
    assert count(metrics, task="t", adapter="a", status=status) == 1


def test_number_of_pairs_is_limited() -> None:
    metrics = recorded(*(ended(f"t{i}", f"a{i}") for i in range(requests.MAX_PAIRS + 50)))
    assert count(metrics, task="other", adapter="other") == 50
    assert metrics.render().count(b',status="200"} ') == requests.MAX_PAIRS + 1
    start = time.perf_counter()
    metrics.render()
    assert time.perf_counter() - start < 1.0
    metrics.record(ended("t3", "a3"))
    assert count(metrics, task="t3", adapter="a3", status="200") == 2, "existing pairs continue"
    metrics.forget_adapter("a7")
    metrics.record(ended("fresh", "new"))
    assert count(metrics, task="fresh", adapter="new") == 1


def test_custom_mixes_get_at_most_half_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_PAIRS", 2)
    mixes = recorded(ended("t", "a", custom_mix=True), ended("u", "a", custom_mix=True))
    assert count(mixes, task="u") is None and count(mixes, adapter="other") == 1
    single = recorded(ended(None, "x", known=False), *(ended(None, name, custom_mix=True) for name in "abc"))
    assert count(single, adapter="b") == 1, "one adapter without a task is not a mix"
    assert count(single, adapter="c") is None and count(single, adapter="other") == 2


def test_pairs_that_are_not_served_any_more_are_other() -> None:
    metrics = Metrics()
    metrics.served = lambda task, adapters: False
    metrics.record(ended("t", "a"))
    assert count(metrics, task="other", adapter="other") == 1 and count(metrics, task="t") is None


def test_removed_adapters_have_no_series_but_count_in_totals() -> None:
    metrics = recorded(*(ended("t", *mix) for mix in (("a", "b"), ("b", "a", "c"), ("ab",), ("b",))))
    before = metrics.totals()
    metrics.forget_adapter("a")
    assert count(metrics, adapter="a+b") is None and count(metrics, adapter="a+b+c") is None
    assert count(metrics, adapter="ab") == count(metrics, adapter="b") == 1
    assert metrics.totals() == before
    metrics.forget_task("t")
    assert metrics.totals() == {} and count(metrics, task="t") is None


def test_totals() -> None:
    metrics = recorded(
        ended("t", "a"),
        ended("t", "b", finished=6.0),
        ended("t", "a", status="cancelled"),
        ended("t", "c", status="500"),
        RequestRecord("t", ("a",), "200", submitted=1.0, finished=2.0),
        ended("u", latency=False),
    )
    assert metrics.totals()["t"] == {
        "requests": 5,
        "errors": 1,
        "cancelled": 1,
        "prompt_tokens": 40,
        "generated_tokens": 20,
        "ttft_seconds": 1.0,
        "duration_seconds": 3.0,
    }
    assert metrics.totals()["u"]["ttft_seconds"] is None


def test_adapter_loads_and_evictions() -> None:
    metrics = Metrics(lambda: Snapshot(slot_evictions=2))
    version = Version("a", "0" * 64)
    metrics.on_change("a", version)
    for outcome in ("ok", "failed"):
        assert value(metrics.render(), "loramux_adapter_loads_total", adapter="a", outcome=outcome) == 0
    metrics.on_load("a", "ok", 0.25)
    metrics.on_load("a", "failed", 9.0)
    metrics.on_change("a", version)
    for _ in range(3):
        metrics.on_evict()
    text = metrics.render()
    for outcome in ("ok", "failed"):
        assert value(text, "loramux_adapter_loads_total", adapter="a", outcome=outcome) == 1
    assert value(text, "loramux_adapter_load_seconds_sum") == 0.25
    assert value(text, "loramux_adapter_evictions_total", tier="ram") == 3
    assert value(text, "loramux_adapter_evictions_total", tier="device") == 2
    metrics.on_change("a", None)
    assert b'adapter="a"' not in metrics.render()


def test_values_of_a_snapshot() -> None:
    now = Snapshot(
        quality=[("t", "a", "a@1", "accuracy", "feedback", 0.5)],
        training=[(f"j{i}", 1.5, 10, 0.25) for i in range(30)],
        kv_blocks={"free": 5, "used": 1, "cached": 2},
        step_buckets=(1.0, 4.0),
        step_counts=(2, 3, 1),
        step_rows=25,
        max_slots=3,
        resident=["b", "a", "b"],
        loading=["d", "c", "d"],
    )
    text = Metrics(lambda: now).render()
    assert value(text, "loramux_task_quality", task="t", version="a@1") == 0.5
    assert value(text, "loramux_training_tokens_total", job="j29") == 10
    assert value(text, "loramux_training_loss", job="j9") is None, "only the last 20 jobs"
    assert value(text, "loramux_training_progress", job="j10") == 0.25
    assert value(text, "vllm:kv_cache_usage_perc") == 0.125
    assert value(text, "loramux_batch_size_sum") == 25 and value(text, "loramux_batch_size_count") == 6
    assert value(text, "loramux_batch_size_bucket", le="4.0") == 5
    [sample] = families(text)["vllm:lora_requests_info"].samples
    assert sample.labels == {"max_lora": "3", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c,d"}
    assert abs(sample.value - time.time()) < 10
    assert value(Metrics().render(), "vllm:kv_cache_usage_perc") == 0.0
