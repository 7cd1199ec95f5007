"""More than there is room for, over real connections: requests, slots, and an adapter that is slow to load."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.waiting import until


def ask_all(url: str, bodies: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any], str | None]]:
    """Send all at once, each on a connection of its own: status, body, Retry-After."""

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


def test_a_thousand_at_once_against_a_queue_of_256(start: Any, write_adapter: Callable[..., Path]) -> None:
    for i in range(6):
        write_adapter(f"x{i}", i)
    live = start(max_queue=256, max_batch=8, max_slots=4)
    register(live, *(f"x{i}" for i in range(6)))
    live.slow_down(0.002)
    deadline_ms = 3000
    bodies = [
        {
            "prompt": f"{i} and so on",
            "max_tokens": 3,
            "ignore_eos": True,
            "deadline_ms": deadline_ms,
            "adapters": [{"name": f"x{(i + k) % 6}", "weight": 0.5 + k} for k in range(i % 4)],
        }
        for i in range(1000)
    ]
    answers = ask_all(live.url, bodies)
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) <= {200, 429, 504} and statuses[200] and statuses[429], statuses
    for status, body, retry_after in answers:
        if status == 200:
            assert body["usage"]["completion_tokens"] == 3 and body["timings"]["total_ms"] < deadline_ms + 2000
        else:
            assert set(body) == {"error"} and (status == 504 or int(retry_after or 0) >= 1)
    assert live.idle() and live.stats()["kv_blocks"]["used"] == 0 and live.stats()["slots"]["in_use"] == 0
    assert live.generate("and now", max_tokens=2).status_code == 200


def test_a_call_that_the_queue_could_never_hold_is_refused_for_good(start: Any) -> None:
    live = start(max_queue=4, max_queue_tokens=40)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    for asked in ({**body, "n": 5}, {**body, "prompt": ["a"] * 5}, {**body, "prompt": ["a long prompt, tokens"] * 3}):
        refused = live.http.post("/v1/completions", json=asked)
        assert refused.status_code == 507 and refused.headers["x-should-retry"] == "false", refused.text
        assert "--max-queue" in refused.json()["error"]["message"]
    assert len(live.http.post("/v1/completions", json={**body, "n": 4}).json()["choices"]) == 4
    assert live.generate("one prompt may be longer than that: it waits for nobody but itself", max_tokens=1).is_success
    assert live.idle()


def test_mixes_that_compete_for_the_last_slots_all_finish(start: Any, write_adapter: Callable[..., Path]) -> None:
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
    for (_, told, _), body in zip(answers, bodies, strict=True):
        assert [a["name"] for a in told["adapters"]] == [a["name"] for a in body["adapters"]]
    alone = [live.http.post("/generate", json=body).json()["text"] for body in bodies[:6]]
    assert [told["text"] for _, told, _ in answers[:6]] == alone
    assert live.idle() and live.stats()["slots"]["in_use"] == 0


@pytest.mark.usefixtures("idle_watch")
def test_an_adapter_that_is_slow_to_load_delays_nobody_else(
    start: Any, write_adapter: Callable[..., Path], monkeypatch: Any
) -> None:
    """While its load goes on, forty requests on a warm adapter enter with the very next step."""
    write_adapter("warm", 1)
    write_adapter("cold", 2)
    live = start(adapter_ram=1 << 20, max_batch=4)
    register(live, "warm", "cold")
    assert live.generate("x", adapters=[{"name": "warm"}]).status_code == 200
    parts = live.services
    digest = live.http.get("/adapters/cold").json()["version"].partition("@")[2]
    ram, release = parts.registry._ram, threading.Event()
    for full in list(ram.resident()):
        if full.startswith(digest):
            ram.discard(full)
    until(lambda: not any(full.startswith(digest) for full in ram.resident()))
    read = ram._read

    def slow(wanted: str) -> Any:
        if wanted.startswith(digest):
            assert release.wait(60)
        return read(wanted)

    monkeypatch.setattr(ram, "_read", slow)
    waited: list[int] = []
    engine: Any = parts.engine
    entered: dict[str, int] = {}
    submit = engine.submit

    def counting(request: Any) -> None:
        entered[request.id] = engine.stats()["steps"]
        submit(request)

    monkeypatch.setattr(engine, "submit", counting)
    schedule = engine._scheduler.schedule

    def watching(*args: Any, **more: Any) -> Any:
        made = schedule(*args, **more)
        waited.extend(
            engine.stats()["steps"] - entered[request.id] for request in made.admitted if request.id in entered
        )
        return made

    monkeypatch.setattr(engine._scheduler, "schedule", watching)
    told: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: told.append(live.generate("y", max_tokens=2, adapters=[{"name": "cold"}])))
    thread.start()
    until(lambda: live.stats()["loading"] == 1)
    for i in range(40):
        warm = live.generate(f"p{i}", max_tokens=2, adapters=[{"name": "warm"}]).json()
        assert warm["timings"]["load_ms"] == 0.0
    assert not told and live.stats()["loading"] == 1, "the load still goes on"
    assert 'running_lora_adapters="warm",waiting_lora_adapters="cold"' in live.http.get("/metrics").text
    assert len(waited) == 40 and max(waited) <= 1
    release.set()
    thread.join()
    timings = told[0].json()["timings"]
    assert told[0].status_code == 200 and 0 < timings["load_ms"] <= timings["ttft_ms"]
    assert timings["queue_ms"] + timings["load_ms"] <= timings["ttft_ms"], "what it waits for its adapter is no queue"
    assert timings["queue_ms"] < timings["load_ms"] / 2
    assert live.idle()


def test_limits_of_a_key_and_of_a_task(start: Any, monkeypatch: Any) -> None:
    """A call over a limit is refused before its prompt is tokenized."""
    live = start(key_rate=0.02, task_rate=0.01, api_keys="one:alpha,two:beta", admin_keys="boss:gamma")
    one, two, boss = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta", "gamma"))
    assert live.http.put("/tasks/own", json={"prompt": "{input}"}, headers=boss).status_code == 201
    body = {"prompt": "x", "max_tokens": 1}

    def ask(headers: dict[str, str], path: str = "/generate", **more: str) -> httpx.Response:
        answer: httpx.Response = live.http.post(path, json={**body, **more}, headers=headers)
        return answer

    assert ask(one).status_code == 200 and ask(two, "/generate?task=own").status_code == 200
    monkeypatch.setattr(live.services.prompts, "encode_input", None)
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
    assert ask(boss).status_code == 200, "what the task refused has spent none of the key's"
    told = live.http.get("/metrics", headers=boss).text
    assert 'loramux_requests_total{task="own",adapter="base",status="429"} 2' in told


def evaluating(live: Any, count: int) -> str:
    """The id of an evaluation of that many examples that has begun."""
    route = {"choice": [{"name": "a"}]}
    body = {"prompt": "Say: {input}", "format": "raw", "defaults": {"max_tokens": 8}, "route": route}
    assert live.http.put("/tasks/say", json=body).status_code == 201
    data = [{"input": f"text {i}", "output": "yes"} for i in range(count)]
    job = live.http.post("/tasks/say/evaluate", json={"data": data, "metric": "accuracy"}).json()["id"]
    until(lambda: live.stats()["running"] > 0)
    return str(job)


def test_an_evaluation_takes_nobodys_place_under_the_limit_of_its_task(
    start: Any, write_adapter: Callable[..., Path]
) -> None:
    write_adapter("a", 1)
    live = start(task_concurrency=1, key_concurrency=1)
    register(live, "a")
    live.slow_down(0.01)
    job = evaluating(live, 600)  # far from its end when it is looked at
    for _ in range(5):
        answer = live.generate("x", task="say", max_tokens=1)
        assert answer.status_code == 200, answer.text
    assert live.http.get(f"/jobs/{job}").json()["status"] == "running"
    live.slow_down(0.0)
    until(lambda: live.http.get(f"/jobs/{job}").json()["status"] == "succeeded", every=0.02)
    assert live.services.inference.admission.idle()


def test_what_a_client_asks_goes_before_an_evaluation_that_came_first(
    start: Any, write_adapter: Callable[..., Path]
) -> None:
    """Of the same task, whose requests otherwise go in the order in which they came."""
    write_adapter("a", 1)
    live = start(max_batch=1)
    register(live, "a")
    live.slow_down(0.02)
    job = evaluating(live, 40)
    until(lambda: live.stats()["waiting"] >= 30)
    before = live.stats()["steps"]
    assert live.generate("x", task="say", max_tokens=1).status_code == 200
    assert live.stats()["steps"] - before < 30, "of 30 that wait, one step each at least"
    assert live.http.get(f"/jobs/{job}").json()["status"] == "running"


def test_an_evaluation_that_makes_room_for_others_goes_on_later(start: Any, write_adapter: Callable[..., Path]) -> None:
    for i, name in enumerate("ab"):
        write_adapter(name, i)
    live = start(max_queue=8, max_batch=2)
    register(live, "a", "b")
    live.slow_down(0.03)
    job = evaluating(live, 24)
    until(lambda: live.stats()["waiting"] == 8)
    mixes: list[list[dict[str, Any]]] = [[], [{"name": "b"}], [{"name": "a"}], [{"name": "a"}, {"name": "b"}]]
    answers = ask_all(live.url, [{"prompt": "x", "adapters": mix, "max_tokens": 2} for mix in mixes])
    assert [status for status, _, _ in answers] == [200] * 4, "each put one of the evaluation's out of the queue"
    live.slow_down(0.0)
    until(lambda: live.http.get(f"/jobs/{job}").json()["status"] not in ("queued", "running"), every=0.02)
    told = live.http.get(f"/jobs/{job}").json()
    assert told["status"] == "succeeded", told["error"]
    assert not re.search('status="429"} [1-9]', live.http.get("/metrics").text)
