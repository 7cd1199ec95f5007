"""Overload over real connections: full queues, adapter slots, slow loads, limits, and evaluation traffic."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.waiting import until

Write = Callable[..., Path]


def ask_all(url: str, bodies: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any], str | None]]:
    """Send all requests at once, each on its own connection: status, body, Retry-After."""

    async def run() -> list[tuple[int, dict[str, Any], str | None]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(body: dict[str, Any]) -> tuple[int, dict[str, Any], str | None]:
                async with session.post(f"{url}/generate", json=body) as answer:
                    return answer.status, await answer.json(), answer.headers.get("retry-after")

            return await asyncio.gather(*map(one, bodies))

    return asyncio.run(run())


def register(live: Any, *names: str) -> None:
    for name in names:
        assert live.http.post("/adapters", json={"name": name, "source": name}).status_code in (200, 201)


def test_a_thousand_requests_against_a_queue_of_256(start: Any, write_adapter: Write) -> None:
    for i in range(6):
        write_adapter(f"x{i}", i)
    live = start(max_queue=256, max_batch=8, max_slots=4)
    register(live, *(f"x{i}" for i in range(6)))
    live.slow_down(0.002)
    bodies = [
        {
            "prompt": f"{i} and so on",
            "max_tokens": 3,
            "ignore_eos": True,
            "deadline_ms": 3000,
            "adapters": [{"name": f"x{(i + k) % 6}", "weight": 0.5 + k} for k in range(i % 4)],
        }
        for i in range(1000)
    ]
    answers = ask_all(live.url, bodies)
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) <= {200, 429, 504} and statuses[200] and statuses[429], statuses
    for status, body, retry_after in answers:
        if status == 200:
            assert body["usage"]["completion_tokens"] == 3 and body["timings"]["total_ms"] < 5000
        else:
            assert set(body) == {"error"} and (status == 504 or int(retry_after or 0) >= 1)
            assert status == 504 or body["error"]["code"] == "queue_full"
    assert live.idle() and live.stats()["kv_blocks"]["used"] == 0 and live.stats()["slots"]["in_use"] == 0
    assert live.generate("and now", max_tokens=2).status_code == 200


def test_calls_larger_than_the_queue_are_507(start: Any) -> None:
    live = start(max_queue=4, max_queue_tokens=40)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    for more in ({"n": 5}, {"prompt": ["a"] * 5}, {"prompt": ["a long prompt, tokens"] * 3}):
        refused = live.http.post("/v1/completions", json={**body, **more})
        assert refused.status_code == 507 and refused.headers["x-should-retry"] == "false", refused.text
        assert "--max-queue" in refused.json()["error"]["message"]
    assert len(live.http.post("/v1/completions", json={**body, "n": 4}).json()["choices"]) == 4
    assert live.generate("a single prompt may be longer than the token limit of the queue", max_tokens=1).is_success
    assert live.idle()


def test_mixes_that_compete_for_slots_all_finish(start: Any, write_adapter: Write) -> None:
    for i, name in enumerate("abcde"):
        write_adapter(name, i)
    live = start(max_slots=3, max_batch=6, prefix_cache=False)
    register(live, *"abcde")
    mixes = [("a", "b"), ("b", "a"), ("c", "d", "e")]
    bodies = [
        {"prompt": f"tell {i}", "max_tokens": 6, "ignore_eos": True, "adapters": [{"name": n} for n in mixes[i % 3]]}
        for i in range(60)
    ]
    answers = ask_all(live.url, bodies)
    assert [status for status, _, _ in answers] == [200] * 60
    for (_, answer, _), body in zip(answers, bodies, strict=True):
        assert [a["name"] for a in answer["adapters"]] == [a["name"] for a in body["adapters"]]
    alone = [live.http.post("/generate", json=body).json()["text"] for body in bodies[:6]]
    assert [answer["text"] for _, answer, _ in answers[:6]] == alone
    assert live.idle() and live.stats()["slots"]["in_use"] == 0


@pytest.mark.usefixtures("idle_watch")
def test_slow_adapter_load_does_not_delay_other_requests(
    start: Any, write_adapter: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter("warm", 1)
    write_adapter("cold", 2)
    live = start(adapter_ram=1 << 20, max_batch=4)
    register(live, "warm", "cold")
    assert live.generate("x", adapters=[{"name": "warm"}]).status_code == 200
    digest, ram = live.services.registry.current("cold").digest, live.services.registry._ram
    release, read = threading.Event(), ram._read
    until(lambda: ram.discard(digest) or digest not in ram.resident())

    def slow(wanted: str) -> Any:
        assert wanted != digest or release.wait(60)
        return read(wanted)

    monkeypatch.setattr(ram, "_read", slow)
    with ThreadPoolExecutor(1) as pool:
        cold = pool.submit(live.generate, "y", max_tokens=2, adapters=[{"name": "cold"}])
        until(lambda: live.stats()["loading"] == 1)
        for i in range(20):
            before = live.stats()["steps"]
            warm = live.generate(f"p{i}", max_tokens=2, adapters=[{"name": "warm"}]).json()
            assert warm["timings"]["load_ms"] == 0.0 and live.stats()["steps"] - before <= 4
        assert not cold.done() and live.stats()["loading"] == 1
        assert 'running_lora_adapters="warm",waiting_lora_adapters="cold"' in live.http.get("/metrics").text
        release.set()
        timings = cold.result().json()["timings"]
    assert 0 < timings["load_ms"] and timings["queue_ms"] + timings["load_ms"] <= timings["ttft_ms"]
    assert timings["queue_ms"] < timings["load_ms"] / 2, "waiting for the adapter is not queue time"
    assert live.idle()


def test_rate_limits_of_a_key_and_of_a_task(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live = start(key_rate=0.02, task_rate=0.01, api_keys="one:alpha,two:beta", admin_keys="boss:gamma")
    one, two, boss = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta", "gamma"))
    assert live.http.put("/tasks/own", json={"prompt": "{input}"}, headers=boss).status_code == 201

    def ask(headers: dict[str, str], path: str = "/generate", **more: str) -> httpx.Response:
        answer: httpx.Response = live.http.post(path, json={"prompt": "x", "max_tokens": 1, **more}, headers=headers)
        return answer

    assert ask(one).status_code == 200 and ask(two, "/generate?task=own").status_code == 200
    monkeypatch.setattr(live.services.prompts, "encode_input", None)  # refused before tokenizing
    refused = {
        "this key": [ask(one), ask(one, "/v1/completions", model="tiny")],
        "the task 'own'": [ask(boss, "/generate?task=own"), ask(boss, "/v1/completions", model="own")],
    }
    for whose, answers in refused.items():
        for answer in answers:
            assert answer.status_code == 429 and f"of {whose} is used up" in answer.json()["error"]["message"]
            assert 1 <= int(answer.headers["retry-after"]) <= 100
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    monkeypatch.undo()
    assert ask(boss).status_code == 200, "a request that the task refused does not count against the key"
    metrics = live.http.get("/metrics", headers=boss).text
    assert 'loramux_requests_total{task="own",adapter="base",status="429"} 2' in metrics


def start_evaluation(live: Any, count: int) -> str:
    """Start an evaluation with `count` examples; returns its id."""
    body = {"prompt": "Say: {input}", "format": "raw", "defaults": {"max_tokens": 8}}
    assert live.http.put("/tasks/say", json={**body, "route": {"choice": [{"name": "a"}]}}).status_code == 201
    data = [{"input": f"text {i}", "output": "yes"} for i in range(count)]
    job = live.http.post("/tasks/say/evaluate", json={"data": data, "metric": "accuracy"}).json()["id"]
    until(lambda: live.stats()["running"] > 0)
    return str(job)


def status_of(live: Any, job: str) -> str:
    return str(live.http.get(f"/jobs/{job}").json()["status"])


def test_evaluation_does_not_count_against_concurrency_limits(start: Any, write_adapter: Write) -> None:
    write_adapter("a", 1)
    live = start(task_concurrency=1, key_concurrency=1)
    register(live, "a")
    live.slow_down(0.01)
    job = start_evaluation(live, 600)
    for _ in range(5):
        assert live.generate("x", task="say", max_tokens=1).status_code == 200
    assert status_of(live, job) == "running"
    live.slow_down(0.0)
    until(lambda: status_of(live, job) == "succeeded", every=0.02)
    assert live.services.inference.admission.idle()


def test_client_requests_run_before_evaluation_requests(start: Any, write_adapter: Write) -> None:
    write_adapter("a", 1)
    live = start(max_batch=1)
    register(live, "a")
    live.slow_down(0.02)
    job = start_evaluation(live, 40)
    until(lambda: live.stats()["waiting"] >= 30)
    before = live.stats()["steps"]
    assert live.generate("x", task="say", max_tokens=1).status_code == 200
    assert live.stats()["steps"] - before < 30, "30 waiting requests need at least one step each"
    assert status_of(live, job) == "running"


def test_evaluation_makes_room_in_a_full_queue_and_continues_later(start: Any, write_adapter: Write) -> None:
    for i, name in enumerate("ab"):
        write_adapter(name, i)
    live = start(max_queue=8, max_batch=2)
    register(live, "a", "b")
    live.slow_down(0.03)
    job = start_evaluation(live, 24)
    until(lambda: live.stats()["waiting"] == 8)
    mixes: list[list[dict[str, Any]]] = [[], [{"name": "b"}], [{"name": "a"}], [{"name": "a"}, {"name": "b"}]]
    answers = ask_all(live.url, [{"prompt": "x", "adapters": mix, "max_tokens": 2} for mix in mixes])
    assert [status for status, _, _ in answers] == [200] * 4
    live.slow_down(0.0)
    until(lambda: status_of(live, job) not in ("queued", "running"), every=0.02)
    assert status_of(live, job) == "succeeded"
    assert not re.search('status="429"} [1-9]', live.http.get("/metrics").text)
