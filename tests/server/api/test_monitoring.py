"""/metrics, /stats and /health of a live server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.metrics import Metrics
from server.tasks.mix_key import MixKey
from tests.server.prometheus import families, value
from tests.waiting import until


def scrape(live: Any, name: str, **labels: str) -> float | None:
    return value(live.http.get("/metrics").text, name, **labels)


def requests(live: Any, task: str, adapter: str, status: str) -> float | None:
    return scrape(live, "loramux_requests_total", task=task, adapter=adapter, status=status)


def test_series_of_a_server_with_traffic(live: Any) -> None:
    live.generate("hello", task="mood", ignore_eos=True)
    live.generate("hello", adapters=[{"name": "b"}, {"name": "a", "weight": 0.5}])
    live.generate("hello", max_tokens=100000)
    text = live.http.get("/metrics").text
    for task, adapter, status in (("mood", "mood", "200"), ("none", "a+b", "200"), ("none", "base", "400")):
        assert value(text, "loramux_requests_total", task=task, adapter=adapter, status=status) == 1
    assert value(text, "loramux_generation_tokens_total", task="mood", adapter="mood") == 6
    version = live.http.get("/adapters/a").json()["version"]
    assert value(text, "loramux_adapter_info", adapter="a", version=version) == 1
    assert (value(text, "loramux_adapter_bytes", adapter="a", tier="device") or 0) > 0
    for kind in ("base", "kv_cache", "adapters", "activations", "process"):
        assert (value(text, "loramux_memory_bytes", kind=kind) or 0) > 0, kind
    for kind in ("device_allocated", "device_reserved"):
        assert value(text, "loramux_memory_bytes", kind=kind) == 0
    total = sum(value(text, "loramux_kv_blocks", state=s) or 0 for s in ("free", "used", "cached"))
    assert total == live.stats()["kv_blocks"]["total"]
    assert 0 <= live.stats()["steps"] - (value(text, "loramux_batch_size_count") or 0) <= 1
    stats = live.http.get("/stats").json()
    assert stats["tasks"]["mood"]["requests"] == 1 and stats["slots"]["resident"]
    assert set(stats["memory"]) >= {"base", "kv_cache", "adapters", "activations", "process"}
    refused = stats["tasks"]["none"]
    assert refused["errors"] == 1 and refused["requests"] == 2


def test_requests_that_never_run_are_counted(live: Any) -> None:
    chat = {"model": "tiny", "messages": []}
    for path, body, status in (
        ("/generate?task=mood", {"prompt": 5}, 422),
        ("/generate?tusk=mood", {"prompt": "x"}, 422),
        ("/classify", {}, 422),
        ("/v1/completions", {"model": "tiny"}, 400),
        ("/v1/chat/completions", chat, 400),
        ("/generate?task=made-up-by-a-client", {"prompt": "x"}, 404),
        ("/generate", {"prompt": "x", "adapters": [{"name": "made-up-too"}]}, 404),
        ("/v1/completions", {"model": "made-up-again", "prompt": "x"}, 404),
    ):
        assert live.http.post(path, json=body).status_code == status
    assert live.http.post("/v1/completions", content=b"{").status_code == 400
    assert live.http.post("/tasks/mood/feedback", json={}).status_code == 422, "not a generation request"
    two_lengths = {"prompt": "x", "max_tokens": 2, "max_completion_tokens": 3}
    assert live.http.post("/generate", json=two_lengths).status_code == 400
    for status, count in (("422", 3), ("400", 3), ("404", 3)):
        assert requests(live, "other", "other", status) == count
    assert requests(live, "none", "base", "400") == 1
    assert "made-up" not in live.http.get("/metrics").text, "nothing that clients write becomes a label"


def test_requests_that_the_middleware_refuses_are_counted(start: Any) -> None:
    live = start(api_keys="team:secret-one", metrics_public=True, max_body=2000)
    key = {"authorization": "Bearer secret-one"}
    live.http.post("/generate", json={"prompt": "x"})
    live.http.post("/classify", json={"input": "x"}, headers={**key, "origin": "http://e.example"})
    live.http.post("/v1/completions", json={"prompt": "x" * 3000}, headers=key)
    live.http.get("/adapters")  # not a generation request
    live.state.drain()
    live.http.post("/generate", json={"prompt": "x"}, headers=key)
    for status in ("401", "403", "413", "503"):
        assert requests(live, "other", "other", status) == 1, status


def test_readiness_series(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value(Metrics().render(), "loramux_ready") == 0
    assert scrape(live, "loramux_ready") == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(live.services.engine), "state", "failing")
        assert live.http.get("/health/ready").status_code == 503
        assert scrape(live, "loramux_ready") == 0
    live.state.drain()
    assert scrape(live, "loramux_ready") == 0


def test_expected_size_of_one_more_adapter(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = live.http.get("/adapters").json()["adapters"]
    monkeypatch.setattr(live.services.registry, "list", None)  # too slow for a scrape with many adapters
    stats = live.http.get("/stats").json()["adapters"]
    assert stats["one_more"] == sum(a["bytes"] for a in listed) // len(listed)
    assert stats["more_fit"] == (stats["budget"] - stats["bytes"]) // stats["one_more"] > 0
    assert live.http.get("/metrics").status_code == 200


def test_requests_that_outlive_their_adapter_or_task_are_other(live: Any) -> None:
    body = {"prompt": "{input}", "route": {"choice": [{"name": "b", "weight": 1.0}]}}
    assert live.http.put("/tasks/brief", json=body).status_code == 201
    assert live.http.post("/adapters", json={"name": "brief", "source": "a"}).status_code == 201
    live.slow_down(0.03)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(live.generate, "x", adapters=[{"name": "brief"}], max_tokens=200, ignore_eos=True),
            pool.submit(live.generate, "x", task="brief", max_tokens=200, ignore_eos=True),
        ]
        until(lambda: live.stats()["running"] == 2)
        assert live.http.delete("/tasks/brief").status_code == 200
        assert live.http.delete("/adapters/brief").status_code == 202
        live.slow_down(0.0)
        assert [run.result().json()["finish_reason"] for run in runs] == ["length", "length"]
    assert "brief" not in live.http.get("/metrics").text
    assert requests(live, "other", "other", "200") == 2


@pytest.mark.parametrize("covered", [False, True])
def test_series_of_a_task_are_removed_with_it(live: Any, covered: bool) -> None:
    """If a task.json file with the same task applies again, they stay."""
    name = "mood" if covered else "own"
    live.http.put(f"/tasks/{name}", json={"prompt": "{input}"}).raise_for_status()
    assert live.generate("x", task=name, max_tokens=1).status_code == 200 and live.idle()
    live.http.delete(f"/tasks/{name}").raise_for_status()
    assert (f'task="{name}"' in live.http.get("/metrics").text) == covered


def test_quality_of_custom_mixes_has_no_series(live: Any) -> None:
    answer = live.generate("x", task="mood").json()
    own = live.generate("x", task="mood", adapters=[{"name": "mood", "weight": 0.123}]).json()
    for id, score in ((answer["id"], 0.5), (own["id"], 1.0)):
        assert live.http.post("/tasks/mood/feedback", json={"id": id, "score": score}).status_code == 204
    labels = {"task": "mood", "version": answer["adapters"][0]["version"], "metric": "accuracy", "source": "feedback"}
    assert scrape(live, "loramux_task_quality", **labels) == 0.5
    assert "0.123" not in live.http.get("/metrics").text
    assert live.http.delete("/tasks/mood").status_code == 200
    assert "loramux_task_quality{" not in live.http.get("/metrics").text
    assert live.http.put("/tasks/mood", json={"prompt": "{input}"}).status_code == 201
    assert scrape(live, "loramux_task_quality", **labels) == 0.5, "the records are kept"


def test_number_of_evaluated_mixes_with_series_is_limited(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.monitoring.MAX_EVALUATED_MIXES", 2)
    services = live.services
    a, b = (services.registry.current(name) for name in ("a", "b"))
    route = {"choice": [{"name": "a", "weight": 0.25}, {"name": "b", "weight": 0.75}]}
    assert live.http.put("/tasks/mood", json={"prompt": "{input}", "route": route}).status_code == 200
    for weights in ((0.25, 0.75), (1.0, 0.0), (0.1, 0.2), (0.3, 0.2), (0.5, 0.2), (0.7, 0.2)):
        key = MixKey.of("mood", zip((a, b), weights, strict=True), services.model.id)
        for metric in ("accuracy", "chrf"):
            services.quality.record_evaluation(key, metric, {"x": 1.0})
    samples = families(live.http.get("/metrics").text)["loramux_task_quality"].samples
    last = (f"{a.label}*0.5+{b.label}*0.2", f"{a.label}*0.7+{b.label}*0.2")
    shown = [f"{a.label}*0.25+{b.label}*0.75", a.label, *last]
    assert sorted(s.labels["version"] for s in samples) == sorted(2 * shown)


def gateway_score(text: str, model: str) -> float:
    """The score of this server for an adapter, as the Kubernetes gateway computes it."""
    samples = families(text)["vllm:lora_requests_info"].samples
    labels = max(samples, key=lambda s: s.value).labels
    active, waiting = (
        {name for name in labels[key].split(",") if name} for key in ("running_lora_adapters", "waiting_lora_adapters")
    )
    if model in active:
        return 1.0
    if len(active) + len(waiting) < int(labels["max_lora"]):
        return 0.8
    return 0.6 if model in waiting else 0.0


def test_gateway_prefers_servers_with_a_resident_adapter(live: Any) -> None:
    assert gateway_score(live.http.get("/metrics").text, "a") == 0.8
    live.generate("x", adapters=[{"name": "a"}], max_tokens=1)
    assert live.http.post("/adapters", json={"name": "twin", "source": "a"}).status_code == 201
    text = live.http.get("/metrics").text
    assert gateway_score(text, "a") == gateway_score(text, "twin") == 1.0, "twin has the same content"
    assert gateway_score(text, "b") == 0.8
    config = families(text)["vllm:cache_config_info"].samples[0].labels
    assert config["block_size"] == "16" and int(config["num_gpu_blocks"]) == live.stats()["kv_blocks"]["total"]


def test_gateway_gauges_follow_the_load(start: Any) -> None:
    live = start(max_batch=1)
    live.slow_down(0.03)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(live.generate, "x", max_tokens=100, ignore_eos=True)

        def seen(*names: str) -> list[float | None]:
            text = live.http.get("/metrics").text
            return [value(text, f"vllm:{name}") for name in names]

        until(lambda: seen("num_requests_running", "num_requests_waiting") == [1.0, 3.0], every=0.02)
        assert (seen("kv_cache_usage_perc")[0] or 0) > 0
        live.slow_down(0.0)


def test_adapter_info_has_the_current_version_only(live: Any, write_adapter: Callable[..., Path]) -> None:
    def versions() -> list[str]:
        samples = families(live.http.get("/metrics").text)["loramux_adapter_info"].samples
        return [sample.labels["version"] for sample in samples if sample.labels["adapter"] == "a"]

    (first,) = versions()
    write_adapter("later", 77)
    second = live.http.put("/adapters/a", json={"source": "later"}).json()["version"]
    assert versions() == [second] != [first]


def test_device_evictions(start: Any, write_adapter: Callable[..., Path]) -> None:
    live = start(max_slots=1)
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(name, seed)
        assert live.http.post("/adapters", json={"name": name, "source": name}).status_code in (200, 201)
        assert live.generate("x", adapters=[{"name": name}], max_tokens=1).status_code == 200
    assert scrape(live, "loramux_adapter_evictions_total", tier="device") == 2


def test_prompts_that_never_ran_are_not_counted_as_tokens(start: Any) -> None:
    live = start(max_batch=1)
    live.slow_down(0.2)
    first = threading.Thread(target=live.generate, kwargs={"max_tokens": 10, "ignore_eos": True})
    first.start()
    until(lambda: live.stats()["running"] == 1)
    assert live.http.put("/tasks/late", json={"prompt": "{input}"}).status_code == 201
    assert live.generate("many words", task="late", deadline_ms=20).status_code == 504
    first.join()
    assert requests(live, "late", "base", "504") == 1
    assert scrape(live, "loramux_prompt_tokens_total", task="late", adapter="base") == 0


def test_kv_cache_limits(start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = start(kv_cache=1)
    assert live.http.get("/stats").json()["base"]["context"] == live.services.engine.context_length == 16
    assert "--kv-cache holds only 16 tokens" in caplog.text
    failed = start(ready=False, kv_cache=1 << 60, state_dir=tmp_path / "other")
    until(lambda: failed.state.state == "failed")
    (record,) = [r for r in caplog.records if "the server cannot start: kv_cache (--kv-cache)" in r.message]
    assert not record.exc_info, "errors in settings have no traceback"


def test_adapters_that_other_settings_would_serve_are_rejected_but_no_error(
    start: Any, write_adapter: Callable[..., Path], adapter_dir: Path
) -> None:
    write_adapter("large", 1, rank=4)
    live = start()
    live.http.post("/adapters", json={"name": "large", "source": "large"}).raise_for_status()
    live.stop()
    (adapter_dir / "large").rename(adapter_dir.parent / "gone")
    live = start(max_rank=2)
    assert [entry["path"] for entry in live.http.get("/adapters").json()["rejected"]] == ["large"]
    assert scrape(live, "loramux_adapters_rejected") == 0
