"""Every series of the contract on a live server, and the gateway's reading of the five of its own."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.weights import Version
from server.metrics import (
    DURATION_BUCKETS,
    MAX_PAIRS,
    TPOT_BUCKETS,
    TTFT_BUCKETS,
    Metrics,
    RequestRecord,
    Snapshot,
)
from server.tasks.mix_key import MixKey
from tests.waiting import until

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


def families(text: str) -> dict[str, Any]:
    found = list(text_string_to_metric_families(text))
    assert len({f.name for f in found}) == len(found), "no family comes twice"
    return {f.name: f for f in found}


def value(text: str, name: str, **labels: str) -> float | None:
    for family in families(text).values():
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


def ended(task: str | None, *adapters: str, status: str = "200", **more: Any) -> RequestRecord:
    times: dict[str, Any] = {"submitted": 1.0, "admitted": 1.5, "first_token": 2.0, "finished": 4.0}
    return RequestRecord(
        task,
        adapters,
        status,
        **{**times, "prompt_tokens": 10, "generated_tokens": 5, "longest": 5, "tpot": 0.5, **more},
    )


def test_every_series_has_its_name_type_and_help() -> None:
    found = families(Metrics().render().decode())
    assert {name: family.type for name, family in found.items()} == SERIES
    assert all(family.documentation for family in found.values())


def test_buckets_are_vllms_with_ours_before() -> None:
    assert TPOT_BUCKETS[:4] == (0.001, 0.0025, 0.005, 0.01) and TPOT_BUCKETS[-1] == 80
    assert DURATION_BUCKETS[:5] == (0.01, 0.025, 0.05, 0.1, 0.3) and DURATION_BUCKETS[-1] == 7680
    assert TTFT_BUCKETS[0] == 0.001 and TTFT_BUCKETS[-1] == 2560 and len(TTFT_BUCKETS) == 22


def test_a_request_is_recorded_from_its_own_timestamps() -> None:
    metrics = Metrics()
    metrics.record(ended("mood", "b", "a"))
    text = metrics.render().decode()
    pair = {"task": "mood", "adapter": "a+b"}
    assert value(text, "loramux_requests_total", **pair, status="200") == 1
    assert value(text, "loramux_request_duration_seconds_sum", **pair) == 3.0
    assert value(text, "loramux_time_to_first_token_seconds_sum", **pair) == 1.0
    assert value(text, "loramux_time_per_output_token_seconds_sum", **pair) == 0.5
    assert value(text, "loramux_queue_seconds_sum", **pair) == 0.5
    assert value(text, "loramux_queue_seconds_bucket", **pair, le="0.3") == 0
    assert value(text, "loramux_queue_seconds_bucket", **pair, le="0.5") == 1
    assert value(text, "loramux_queue_seconds_bucket", **pair, le="+Inf") == 1
    assert value(text, "loramux_prompt_tokens_total", **pair) == 10
    metrics.record(ended(None, status="cancelled"))
    metrics.record(ended("mood", "a", "b", latency=False))
    text = metrics.render().decode()
    assert value(text, "loramux_requests_total", task="none", adapter="base", status="cancelled") == 1
    assert value(text, "loramux_request_duration_seconds_count", task="none", adapter="base") == 0
    assert value(text, "loramux_request_duration_seconds_count", **pair) == 1, "evaluation stays out of the latencies"
    assert value(text, "loramux_requests_total", **pair, status="200") == 2


def test_what_the_schema_refuses_is_counted(live: Any) -> None:
    chat = {"model": "tiny", "messages": []}
    for path, body, status in (
        ("/generate?task=mood", {"prompt": 5}, 422),
        ("/generate?tusk=mood", {"prompt": "x"}, 422),
        ("/classify", {}, 422),
        ("/v1/completions", {"model": "tiny"}, 400),
        ("/v1/chat/completions", chat, 400),
    ):
        assert live.http.post(path, json=body).status_code == status
    assert live.http.post("/v1/completions", content=b"{").status_code == 400
    assert live.http.post("/generate", content=b"\xff").status_code in (400, 422)
    assert live.http.post("/tasks/mood/feedback", json={}).status_code == 422
    assert live.http.get("/generate").status_code == 405
    text = live.http.get("/metrics").text
    counts = [value(text, "loramux_requests_total", task="other", adapter="other", status=s) for s in ("422", "400")]
    assert sum(counts) == 7 and counts[0] >= 3 and counts[1] >= 3, counts
    assert value(text, "loramux_requests_total", status="405") is None


def test_a_request_that_gives_two_lengths_is_counted(live: Any) -> None:
    lengths = {"prompt": "x", "max_tokens": 2, "max_completion_tokens": 3}
    for path, body in (("/generate", lengths), ("/v1/completions", {**lengths, "model": "tiny"})):
        assert live.http.post(path, json=body).status_code == 400
    text = live.http.get("/metrics").text
    assert value(text, "loramux_requests_total", task="none", adapter="base", status="400") == 2


def test_what_is_refused_at_the_door_is_counted(start: Any) -> None:
    live = start(api_keys="team:secret-one", metrics_public=True, max_body=2000)
    key = {"authorization": "Bearer secret-one"}
    assert live.http.post("/generate", json={"prompt": "x"}).status_code == 401
    assert (
        live.http.post("/classify", json={"input": "x"}, headers={**key, "origin": "http://e.example"}).status_code
        == 403
    )
    assert live.http.post("/v1/completions", json={"prompt": "x" * 3000}, headers=key).status_code == 413
    assert live.http.get("/adapters").status_code == 401, "which is no request for an answer"
    live.state.drain()
    assert live.http.post("/generate", json={"prompt": "x"}, headers=key).status_code == 503
    text = live.http.get("/metrics").text
    for status in ("401", "403", "413", "503"):
        assert value(text, "loramux_requests_total", task="other", adapter="other", status=status) == 1, status


def test_means_are_over_what_was_measured() -> None:
    """A classification has no first token, and does not make it look earlier."""
    metrics = Metrics()
    metrics.record(RequestRecord("t", ("a",), "200", submitted=10.0, first_token=12.0, finished=13.0))
    for _ in range(4):
        metrics.record(RequestRecord("t", ("a",), "200", submitted=10.0, finished=11.0))
    told = metrics.totals()["t"]
    assert (told["ttft_seconds"], told["duration_seconds"]) == (2.0, 7.0 / 5)
    assert all(not name.startswith("_") for name in told)


def test_a_task_of_refusals_alone_has_no_means(live: Any) -> None:
    assert live.generate("x", max_tokens=10**6).status_code == 400
    told = live.http.get("/stats").json()["tasks"]["none"]
    assert told["errors"] == 1 and told["ttft_seconds"] is None and told["duration_seconds"] is None


def test_mixes_that_requests_make_up_leave_series_to_tasks_and_adapters(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.metrics.MAX_PAIRS", 4)
    for mix in (("a", "b"), ("a", "mood"), ("b", "mood"), ("a", "b")):
        assert live.generate("x", max_tokens=1, adapters=[{"name": name} for name in mix]).status_code == 200
    assert live.generate("x", task="mood", adapters=[{"name": "a"}]).status_code == 200
    assert live.generate("x", task="mood").status_code == 200
    assert live.generate("x", max_tokens=1, adapters=[{"name": "a"}]).status_code == 200
    text = live.http.get("/metrics").text
    counted = {
        (task, adapter): value(text, "loramux_requests_total", task=task, adapter=adapter, status="200")
        for task, adapter in (("none", "a+b"), ("none", "a+mood"), ("mood", "mood"), ("none", "a"), ("other", "other"))
    }
    assert list(counted.values()) == [2, 1, 1, 1, 2], counted
    assert live.http.get("/stats").json()["tasks"]["mood"]["requests"] == 1


@pytest.mark.parametrize("status", ["429", "500", "504", "507"])
def test_the_first_failure_of_a_task_is_seen_to_rise(status: str) -> None:
    metrics = Metrics()
    metrics.record(ended("t", "a"))
    failed = {"task": "t", "adapter": "a", "status": status}
    assert value(metrics.render().decode(), "loramux_requests_total", **failed) == 0
    metrics.record(ended("t", "a", status=status))
    assert value(metrics.render().decode(), "loramux_requests_total", **failed) == 1


def test_readiness_is_a_series(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which restarts without end are told: the process answers in between."""
    assert value(Metrics().render().decode(), "loramux_ready") == 0, "while it loads"
    assert value(live.http.get("/metrics").text, "loramux_ready") == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(live.services.engine), "state", "failing")
        assert live.http.get("/health/ready").status_code == 503
        assert value(live.http.get("/metrics").text, "loramux_ready") == 0
    live.state.drain()
    assert value(live.http.get("/metrics").text, "loramux_ready") == 0


def test_pairs_are_bounded_and_go_with_their_adapter() -> None:
    metrics = Metrics()
    for i in range(MAX_PAIRS + 50):
        metrics.record(ended(f"t{i}", f"a{i}"))
    text = metrics.render().decode()
    assert value(text, "loramux_requests_total", task="other", adapter="other") == 50
    assert text.count(',status="200"} ') == MAX_PAIRS + 1
    metrics.record(ended(None, "a7", "zz"))
    metrics.forget_adapter("a7")
    text = metrics.render().decode()
    assert 'adapter="a7"' not in text and 'adapter="a7+zz"' not in text
    metrics.record(ended("fresh", "new"))
    assert value(metrics.render().decode(), "loramux_requests_total", task="fresh", adapter="new") == 1


def test_names_that_were_not_found_are_no_labels(live: Any) -> None:
    live.generate("x", task="made-up-by-a-client")
    live.generate("x", adapters=[{"name": "another-made-up"}])
    live.http.post("/v1/completions", json={"model": "third", "prompt": "x"})
    text = live.http.get("/metrics").text
    assert "made-up" not in text and "third" not in text
    assert value(text, "loramux_requests_total", task="other", adapter="other", status="404") == 3


def test_a_scrape_at_200_pairs_is_quick() -> None:
    metrics = Metrics()
    for i in range(MAX_PAIRS):
        metrics.record(ended(f"t{i}", f"a{i}"))
    best = min(_timed(metrics.render) for _ in range(5))
    assert best < 0.15, f"{best * 1000:.0f} ms"


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_a_live_server_tells_of_its_traffic(live: Any) -> None:
    live.generate("hello", task="mood", ignore_eos=True)
    live.generate("hello", adapters=[{"name": "b"}, {"name": "a", "weight": 0.5}])
    live.generate("hello", max_tokens=100000)
    text = live.http.get("/metrics").text
    assert value(text, "loramux_requests_total", task="mood", adapter="mood", status="200") == 1
    assert value(text, "loramux_requests_total", task="none", adapter="a+b", status="200") == 1
    assert value(text, "loramux_requests_total", task="none", adapter="base", status="400") == 1
    assert value(text, "loramux_generation_tokens_total", task="mood", adapter="mood") == 6
    version = live.http.get("/adapters/a").json()["version"]
    assert value(text, "loramux_adapter_info", adapter="a", version=version) == 1
    assert (value(text, "loramux_adapter_bytes", adapter="a", tier="device") or 0) > 0
    for kind in ("base", "kv_cache", "adapters", "activations", "process"):
        assert (value(text, "loramux_memory_bytes", kind=kind) or 0) > 0, kind
    for kind in ("device_allocated", "device_reserved"):
        assert value(text, "loramux_memory_bytes", kind=kind) == 0, "there is no device here, which is not no answer"
    total = sum(value(text, "loramux_kv_blocks", state=s) or 0 for s in ("free", "used", "cached"))
    assert total == live.stats()["kv_blocks"]["total"]
    steps = value(text, "loramux_batch_size_count") or 0
    assert 0 <= live.stats()["steps"] - steps <= 1, "the last step is counted once its answers are on their way"
    stats = live.http.get("/stats").json()
    assert stats["tasks"]["mood"]["requests"] == 1 and stats["slots"]["resident"]
    assert set(stats["memory"]) >= {"base", "kv_cache", "adapters", "activations", "process"}


def test_what_one_more_adapter_costs_and_how_many_fit(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = live.http.get("/adapters").json()["adapters"]
    told = live.http.get("/stats").json()["adapters"]
    assert told["one_more"] == sum(a["bytes"] for a in listed) // len(listed)
    assert told["more_fit"] == (told["budget"] - told["bytes"]) // told["one_more"] > 0

    def described() -> Any:
        raise AssertionError("a thousand adapters are not described to tell their versions and sizes")

    monkeypatch.setattr(live.services.registry, "list", described)
    assert [live.http.get(path).status_code for path in ("/stats", "/metrics")] == [200, 200]


def test_what_outlives_its_name_is_no_series(live: Any) -> None:
    """A request that ends after its adapter was retired, and one whose task is gone, are counted as other."""
    from concurrent.futures import ThreadPoolExecutor

    body = {"prompt": "{input}", "route": {"choice": [{"name": "b", "weight": 1.0}]}}
    assert live.http.put("/tasks/brief", json=body).status_code == 201
    assert live.http.post("/adapters", json={"name": "brief", "source": "a"}).status_code == 201
    live.slow_down(0.03)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(live.generate, "x", adapters=[{"name": "brief"}], max_tokens=200, ignore_eos=True),
            pool.submit(live.generate, "x", task="brief", max_tokens=200, ignore_eos=True),
        ]
        until(lambda: live.stats()["running"] == 2, "they never ran side by side")
        assert live.http.delete("/tasks/brief").status_code == 200
        assert live.http.delete("/adapters/brief").status_code == 202
        live.slow_down(0.0)
        assert [run.result().json()["finish_reason"] for run in runs] == ["length", "length"]
    text = live.http.get("/metrics").text
    assert 'adapter="brief"' not in text and 'task="brief"' not in text
    assert value(text, "loramux_requests_total", task="other", adapter="other", status="200") == 2


def test_quality_is_told_of_tasks_and_versions_that_there_are(live: Any, write_adapter: Any) -> None:
    answer = live.generate("x", task="mood").json()
    sent = {"id": answer["id"], "score": 0.5}
    assert live.http.post("/tasks/mood/feedback", json=sent).status_code == 204
    version = answer["adapters"][0]["version"]
    labels = {"task": "mood", "version": version, "metric": "accuracy", "source": "feedback"}
    own = live.generate("x", task="mood", adapters=[{"name": "mood", "weight": 0.123}]).json()
    assert live.http.post("/tasks/mood/feedback", json={"id": own["id"], "score": 1.0}).status_code == 204
    told = live.http.get("/metrics").text
    assert value(told, "loramux_task_quality", **labels) == 0.5
    assert "0.123" not in told, "weights that a client makes up are no label"
    assert live.http.delete("/tasks/mood").status_code == 200
    assert "loramux_task_quality{" not in live.http.get("/metrics").text
    assert live.http.put("/tasks/mood", json={"prompt": "{input}"}).status_code == 201
    assert value(live.http.get("/metrics").text, "loramux_task_quality", **labels) == 0.5, "the records were kept"


def test_of_mixes_that_were_evaluated_the_last_are_series(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of every night leaves others each time."""
    monkeypatch.setattr("server.api.monitoring.MAX_EVALUATED_MIXES", 2)
    parts = live.services
    a, b = (parts.registry.current(name) for name in ("a", "b"))
    route = {"choice": [{"name": "a", "weight": 0.25}, {"name": "b", "weight": 0.75}]}
    for name in ("mood", "second"):
        assert live.http.put(f"/tasks/{name}", json={"prompt": "{input}", "route": route}).status_code in (200, 201)
        for weights in ((0.25, 0.75), (1.0, 0.0), (0.1, 0.2), (0.3, 0.2), (0.5, 0.2), (0.7, 0.2)):
            subject = MixKey.of(name, zip((a, b), weights, strict=True), parts.model.id)
            for metric in ("accuracy", "chrf"):
                parts.quality.record_evaluation(subject, metric, {"x": 1.0})
    found = families(live.http.get("/metrics").text)["loramux_task_quality"].samples
    shown = [f"{a.label}*0.25+{b.label}*0.75", a.label, f"{a.label}*0.5+{b.label}*0.2", f"{a.label}*0.7+{b.label}*0.2"]
    for name in ("mood", "second"):
        labels = [sample.labels for sample in found if sample.labels["task"] == name]
        assert sorted(label["version"] for label in labels) == sorted(2 * shown)
        assert {label["metric"] for label in labels} == {"accuracy", "chrf"}


def test_of_versions_that_are_gone_a_scrape_reads_no_mix(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = live.services
    for n in range(5):
        for weight in (1.0, 0.5):
            gone = MixKey.of("mood", [(Version("mood", f"{n}" * 64), weight)], parts.model.id)
            parts.quality.record_evaluation(gone, "accuracy", {"x": 1.0})
    there = MixKey.of("mood", [(parts.registry.current("mood"), 1.0)], parts.model.id)
    parts.quality.record_evaluation(there, "accuracy", {"x": 1.0})
    read = list[str]()

    def loads(text: str) -> Any:
        read.append(text)
        return json.loads(text)

    monkeypatch.setattr("server.tasks.mix_key.json", SimpleNamespace(loads=loads, dumps=json.dumps))
    text = live.http.get("/metrics").text
    assert value(text, "loramux_task_quality", task="mood", version=there.label) == 1.0
    assert set(read) == {there.mix}


# What the gateway does: parse the families, take the newest LoRA series, score.


def newest(text: str) -> dict[str, str]:
    samples = families(text)["vllm:lora_requests_info"].samples
    return dict(max(samples, key=lambda s: s.value).labels)


def score(labels: dict[str, str], model: str) -> float:
    def names(key: str) -> set[str]:
        return {part.strip() for part in labels[key].split(",") if part.strip()}

    active, waiting = names("running_lora_adapters"), names("waiting_lora_adapters")
    if model in active:
        return 1.0
    if len(active) + len(waiting) < int(labels["max_lora"]):
        return 0.8
    return 0.6 if model in waiting else 0.0


def test_the_gateway_scores_us_by_what_is_resident(live: Any) -> None:
    text = live.http.get("/metrics").text
    assert len(families(text)["vllm:lora_requests_info"].samples) == 1
    assert score(newest(text), "a") == 0.8 and newest(text)["running_lora_adapters"] == ""
    live.generate("x", adapters=[{"name": "a"}], max_tokens=1)
    text = live.http.get("/metrics").text
    samples = families(text)["vllm:lora_requests_info"].samples
    assert len(samples) == 1 and abs(samples[0].value - time.time()) < 10
    assert score(newest(text), "a") == 1.0 and score(newest(text), "b") == 0.8
    assert live.http.post("/adapters", json={"name": "twin", "source": "a"}).status_code == 201
    assert score(newest(live.http.get("/metrics").text), "twin") == 1.0, "the same content by another name"
    assert newest(text)["max_lora"] == "64" and "mood" not in newest(text)["running_lora_adapters"]
    assert value(text, "vllm:num_requests_running") == 0 and value(text, "vllm:num_requests_waiting") == 0
    config = families(text)["vllm:cache_config_info"].samples[0].labels
    assert config["block_size"] == "16" and int(config["num_gpu_blocks"]) == live.stats()["kv_blocks"]["total"]


def test_the_gateways_gauges_follow_the_load(start: Any, write_adapter: Any) -> None:
    live = start(max_batch=1)
    live.slow_down(0.03)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(live.generate, "x", max_tokens=100, ignore_eos=True)

        def seen(*names: str) -> list[float | None]:
            text = live.http.get("/metrics").text
            return [value(text, f"vllm:{name}") for name in names]

        until(lambda: seen("num_requests_running", "num_requests_waiting") == [1.0, 3.0], every=0.02)
        assert (seen("kv_cache_usage_perc")[0] or 0) > 0
        live.slow_down(0.0)


def test_each_adapter_is_told_of_with_the_version_that_it_has_now(live: Any, write_adapter: Any) -> None:
    def versions() -> list[str]:
        samples = families(live.http.get("/metrics").text)["loramux_adapter_info"].samples
        return [sample.labels["version"] for sample in samples if sample.labels["adapter"] == "a"]

    first = live.http.get("/adapters/a").json()["version"]
    write_adapter("later", 77)
    assert versions() == [first]
    second = live.http.put("/adapters/a", json={"source": "later"}).json()["version"]
    assert versions() == [second] != [first]
    assert live.http.put("/adapters/a", json={"version": first}).status_code == 200
    assert versions() == [first]


def test_an_adapter_that_gives_its_slot_up_is_counted(start: Any, write_adapter: Any) -> None:
    live = start(max_slots=1)
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(name, seed)
        assert live.http.post("/adapters", json={"name": name, "source": name}).status_code in (200, 201)
        assert live.generate("x", adapters=[{"name": name}], max_tokens=1).status_code == 200
    assert value(live.http.get("/metrics").text, "loramux_adapter_evictions_total", tier="device") == 2


@pytest.mark.parametrize("outcome", ["ok", "failed"])
def test_the_first_load_is_seen_to_rise(outcome: str) -> None:
    metrics = Metrics()
    metrics.on_change("a", Version("a", "0" * 64))
    sample = f'loramux_adapter_loads_total{{adapter="a",outcome="{outcome}"}}'
    assert f"{sample} 0.0" in metrics.render().decode(), "a series that began at 1 would have no rate, and no alert"
    metrics.on_load("a", outcome, 0.1)
    metrics.on_change("a", Version("a", "1" * 64))
    assert f"{sample} 1.0" in metrics.render().decode()
    metrics.on_change("a", None)
    assert sample not in metrics.render().decode()


def test_a_prompt_that_was_never_read_is_no_work(start: Any, write_adapter: Any) -> None:
    """Requests whose time is over while they wait would look like tokens read, the more the longer the queue."""
    write_adapter("a", 1)
    live = start(max_batch=1)  # where it can only wait
    assert live.http.post("/adapters", json={"name": "a", "source": "a"}).status_code in (200, 201)
    live.slow_down(0.2)
    first = threading.Thread(target=live.generate, kwargs={"max_tokens": 10, "ignore_eos": True})
    first.start()
    until(lambda: live.stats()["running"] == 1)
    late = live.generate("many words that nobody reads", adapters=[{"name": "a"}], deadline_ms=20)
    assert late.status_code == 504
    first.join()
    text = live.http.get("/metrics").text
    assert 'loramux_requests_total{task="none",adapter="a",status="504"} 1' in text
    assert 'loramux_prompt_tokens_total{task="none",adapter="a"} 0' in text


def test_loads_and_evictions_are_heard_of() -> None:
    metrics = Metrics(lambda: Snapshot(slot_evictions=2))
    metrics.on_load("a", "ok", 0.25)
    metrics.on_load("a", "failed", 9.0)
    metrics.on_evict()
    text = metrics.render().decode()
    assert value(text, "loramux_adapter_loads_total", adapter="a", outcome="ok") == 1
    assert value(text, "loramux_adapter_loads_total", adapter="a", outcome="failed") == 1
    assert value(text, "loramux_adapter_load_seconds_sum") == 0.25
    assert value(text, "loramux_adapter_evictions_total", tier="ram") == 1
    assert value(text, "loramux_adapter_evictions_total", tier="device") == 2
    metrics.on_change("a", None)
    assert 'adapter="a"' not in metrics.render().decode()


def test_snapshot_values_reach_their_series() -> None:
    metrics = Metrics(lambda: Snapshot(base="b", quality=[("t", "a", "a@1", "accuracy", "feedback", 0.5)],
                                       training=[(f"j{i}", 1.5, 10, 0.25) for i in range(30)]))  # fmt: skip
    text = metrics.render().decode()
    assert value(text, "loramux_task_quality", task="t", version="a@1") == 0.5
    assert value(text, "loramux_training_tokens_total", job="j29") == 10
    assert value(text, "loramux_training_loss", job="j9") is None, "the last twenty jobs"
    assert value(text, "loramux_training_progress", job="j10") == pytest.approx(0.25)


def test_a_cache_that_is_smaller_than_the_context_is_told(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    live = start(kv_cache=1)
    assert live.http.get("/stats").json()["base"]["context"] == live.services.engine.context_length == 16
    assert "--kv-cache holds only 16 tokens" in caplog.text


def test_a_cache_that_no_machine_holds_keeps_the_server_from_starting(start: Any, caplog: Any) -> None:
    live = start(ready=False, kv_cache=1 << 60)
    until(lambda: live.state.state == "failed")
    (told,) = [r for r in caplog.records if "the server cannot start: kv_cache (--kv-cache) is over" in r.message]
    assert not told.exc_info, "no trace for what a setting says"


def test_what_other_settings_would_serve_is_listed_and_no_fault(
    start: Any, write_adapter: Any, adapter_dir: Path
) -> None:
    write_adapter("large", 1, rank=4)
    live = start()
    live.http.post("/adapters", json={"name": "large", "source": "large"}).raise_for_status()
    live.stop()
    shutil.rmtree(adapter_dir / "large")
    live = start(max_rank=2)
    assert [entry["path"] for entry in live.http.get("/adapters").json()["rejected"]] == ["large"]
    assert value(live.http.get("/metrics").text, "loramux_adapters_rejected") == 0


def test_series_of_an_adapter_outlive_one_whose_name_is_part_of_its() -> None:
    metrics = Metrics()
    for adapters in (("a",), ("ab",), ("ab", "c")):
        metrics.record(ended("t", *adapters))
    metrics.forget_adapter("a")
    text = metrics.render().decode()
    assert value(text, "loramux_requests_total", adapter="a") is None
    assert value(text, "loramux_requests_total", adapter="ab") == value(text, "loramux_requests_total", adapter="ab+c")
    assert value(text, "loramux_requests_total", adapter="ab") == 1


def test_a_time_of_nothing_is_a_time() -> None:
    """An answer that began as it was asked for, on a clock of some milliseconds."""
    metrics = Metrics()
    metrics.record(
        RequestRecord("t", ("a",), "200", submitted=1.0, admitted=1.0, first_token=1.0, finished=1.0, tpot=0.0)
    )
    text = metrics.render().decode()
    for name in ("request_duration", "time_to_first_token", "time_per_output_token", "queue"):
        assert value(text, f"loramux_{name}_seconds_count", task="t") == 1, name
    metrics.record(RequestRecord("u", ("a",), "200"))
    text = metrics.render().decode()
    assert value(text, "loramux_queue_seconds_count", task="u") == 0


def test_another_version_begins_no_counter_again() -> None:
    """One that falls without a restart is a restart to Prometheus."""
    metrics = Metrics()
    version: Any = object()
    metrics.on_change("a", version)
    assert value(metrics.render().decode(), "loramux_adapter_loads_total", adapter="a", outcome="failed") == 0
    metrics.on_load("a", "ok", 0.5)
    metrics.on_load("a", "failed", 0.5)
    metrics.on_change("a", version)
    text = metrics.render().decode()
    for outcome in ("ok", "failed"):
        assert value(text, "loramux_adapter_loads_total", adapter="a", outcome=outcome) == 1


def test_every_eviction_is_counted() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.on_evict()
    assert value(metrics.render().decode(), "loramux_adapter_evictions_total", tier="ram") == 3


def test_the_share_of_the_cache_is_of_one() -> None:
    text = Metrics(lambda: Snapshot(kv_blocks={"free": 5, "used": 1, "cached": 2})).render().decode()
    assert value(text, "vllm:kv_cache_usage_perc") == 0.125
    assert value(Metrics().render().decode(), "vllm:kv_cache_usage_perc") == 0.0


def test_an_adapter_is_named_once_to_the_gateway_in_order() -> None:
    now = Snapshot(max_slots=3, resident=["b", "a", "b"], loading=["d", "c", "d"])
    [sample] = families(Metrics(lambda: now).render().decode())["vllm:lora_requests_info"].samples
    assert sample.labels == {"max_lora": "3", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c,d"}


def test_rows_of_steps_are_summed() -> None:
    now = Snapshot(step_buckets=(1.0, 4.0), step_counts=(2, 3, 1), step_rows=25)
    text = Metrics(lambda: now).render().decode()
    assert value(text, "loramux_batch_size_sum") == 25 and value(text, "loramux_batch_size_count") == 6
    assert value(text, "loramux_batch_size_bucket", le="4.0") == 5


def test_a_mix_that_is_the_same_is_one_series_in_whatever_order() -> None:
    metrics = Metrics()
    metrics.record(ended("t", "a", "b"))
    metrics.record(ended("t", "b", "a"))
    assert value(metrics.render().decode(), "loramux_requests_total", task="t", adapter="a+b") == 2


def test_what_is_on_a_bound_is_under_it() -> None:
    """`le` is less or equal."""
    metrics = Metrics()
    metrics.record(RequestRecord("t", (), "200", submitted=0.0, admitted=0.5, finished=0.5))
    text = metrics.render().decode()
    assert value(text, "loramux_queue_seconds_bucket", le="0.5") == 1
    assert value(text, "loramux_queue_seconds_bucket", le="0.3") == 0


def test_series_of_others_do_not_take_the_room_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.metrics.MAX_PAIRS", 2)
    metrics = Metrics()
    metrics.record(ended(None, "x", known=False))
    for name in ("a", "b", "c"):
        metrics.record(ended(None, name))
    text = metrics.render().decode()
    assert value(text, "loramux_requests_total", adapter="b") == 1
    assert value(text, "loramux_requests_total", adapter="c") is None
    assert value(text, "loramux_requests_total", adapter="other") == 2


def test_cancelled_answers_of_all_of_a_tasks_adapters_are_counted() -> None:
    metrics = Metrics()
    for name in ("a", "b", "c"):
        metrics.record(ended("t", name, status="cancelled" if name != "c" else "200"))
    assert metrics.totals()["t"]["cancelled"] == 2 and metrics.totals()["t"]["errors"] == 0


def test_one_adapter_of_a_request_is_no_mix_that_it_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.metrics.MAX_PAIRS", 2)
    metrics = Metrics()
    for name in ("a", "b"):
        metrics.record(ended(None, name, custom_mix=True))
    assert value(metrics.render().decode(), "loramux_requests_total", adapter="b") == 1
    metrics = Metrics()
    for task in ("t", "u"):
        metrics.record(ended(task, "a", custom_mix=True))
    text = metrics.render().decode()
    assert value(text, "loramux_requests_total", task="u") is None
    assert value(text, "loramux_requests_total", adapter="other") == 1
