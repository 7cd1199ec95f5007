"""Feedback and performance over HTTP, and a `best` route that finds the better adapter by them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.model.tokenizer import FAST_ENCODE_CHARS
from server.tasks.mix_key import MixKey
from server.tasks.prompts import MESSAGE
from tests.waiting import SECONDS, until

BEST = {"prompt": "{input}", "labels": ["x", "y"], "route": {"best": ["a", "b"], "min_samples": 40}}


def send(live: Any, task: str, **body: Any) -> int:
    return int(live.http.post(f"/tasks/{task}/feedback", json=body).status_code)


def test_feedback_counts_once_an_id_and_the_last_wins(live: Any) -> None:
    answer = live.generate("x", task="mood").json()
    assert send(live, "mood", id=answer["id"], score=0.0) == 204
    assert send(live, "mood", id=answer["id"], expected=answer["text"]) == 204
    told = live.http.get("/tasks/mood/performance").json()
    (version,) = told["versions"]
    assert told["task"] == "mood" and told["best"] is None and version["version"] == answer["adapters"][0]["version"]
    (quality,) = version["quality"]
    assert (quality["samples"], quality["mean"], quality["source"]) == (1, 1.0, "feedback")
    assert 0 <= quality["low"] < quality["high"] <= 1
    assert version["requests"] == 1 and version["errors"] == 0 and version["ttft"]["p50"] > 0
    assert version["tokens"]["generated"] == answer["usage"]["completion_tokens"]
    metrics, pair = live.http.get("/metrics").text, f'task="mood",version="{version["version"]}"'
    assert f'loramux_task_quality{{adapter="mood",metric="accuracy",source="feedback",{pair}}} 1.0' in metrics


def test_answers_of_every_route_can_be_scored_by_their_task_alone(live: Any) -> None:
    live.http.put("/tasks/other-task", json={"prompt": "{input}"})
    chat = live.http.post(
        "/v1/chat/completions", json={"model": "mood", "messages": [{"role": "user", "content": "x"}]}
    )
    label = live.http.post("/classify?task=mood", json={"prompt": "x"}).json()
    assert send(live, "mood", id=chat.json()["id"], score=1) == 204
    assert send(live, "mood", id=label["id"], expected=label["label"]) == 204
    assert send(live, "other-task", id=chat.json()["id"], score=1) == 404
    assert send(live, "mood", id="gen-unknown", score=1) == 404
    assert send(live, "nobody", id=chat.json()["id"], score=1) == 404
    plain = live.generate("x").json()
    assert send(live, "mood", id=plain["id"], score=1) == 404
    assert live.http.get("/tasks/mood/performance").json()["versions"][0]["quality"][0]["mean"] == 1.0


def test_feedback_that_waits_for_the_disk_holds_up_no_long_prompt_and_no_scrape(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though as much of it waits as the event loop has threads."""
    waiting, disk = list[str](), threading.Event()
    messages = [{"role": "user", "content": "x"}] * (1 + FAST_ENCODE_CHARS // MESSAGE)

    def feedback(task: str, id: str, *asked: Any, **more: Any) -> None:
        waiting.append(id)
        assert disk.wait(SECONDS)

    monkeypatch.setattr(live.services.quality, "record_feedback", feedback)
    most = min(32, (os.cpu_count() or 1) + 4)
    with ThreadPoolExecutor(most) as clients:
        scored = [clients.submit(send, live, "mood", id=str(i), score=1) for i in range(most)]
        try:
            until(lambda: len(waiting) == most)
            long = live.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
            scrape = live.http.get("/metrics")
        finally:
            disk.set()
        assert [answer.result(SECONDS) for answer in scored] == [204] * most
    assert long.status_code == 400 and "tokens" in long.json()["error"]["message"] and scrape.status_code == 200
    own = [thread for thread in threading.enumerate() if thread.name.startswith("loramux-prompts")]
    live.stop()
    until(lambda: own and not any(thread.is_alive() for thread in own))


@pytest.mark.parametrize("body", [{}, {"score": 1, "expected": "x"}])
def test_feedback_is_a_score_or_an_expectation(live: Any, body: Any) -> None:
    assert send(live, "mood", id="x", **body) == 400
    assert send(live, "mood", id="x", score=2) == 422


def test_feedback_is_the_keys_own(start: Any) -> None:
    live = start(api_keys="one:alpha,two:beta", admin_keys="boss:gamma")
    one, two, boss = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta", "gamma"))
    assert live.http.put("/tasks/t", json={"prompt": "{input}"}, headers=boss).status_code == 201
    answer = live.http.post("/generate?task=t", json={"prompt": "x", "max_tokens": 2}, headers=one).json()
    body = {"id": answer["id"], "score": 1}
    assert live.http.post("/tasks/t/feedback", json=body, headers=two).status_code == 404
    assert live.http.post("/tasks/t/feedback", json=body, headers=one).status_code == 204


def test_a_best_route_takes_turns_and_then_serves_the_better_one(live: Any) -> None:
    assert live.http.put("/tasks/contest", json=BEST).status_code == 201
    served = []
    for _ in range(100):
        answer = live.http.post("/classify?task=contest", json={"prompt": "x"}).json()
        name = answer["adapters"][0]["name"]
        served.append(name)
        assert send(live, "contest", id=answer["id"], score=1.0 if name == "b" else 0.0) == 204
    assert sorted(served[:10]) == ["a"] * 5 + ["b"] * 5, "turns"
    assert served[80:].count("a") <= 2, "the better one, but for one in twenty"
    told = live.http.get("/tasks/contest/performance").json()
    assert told["best"]["leader"] == "b" and told["best"]["version"].startswith("b@")
    assert "better by at least" in told["best"]["decided"]
    assert {v["version"][0] for v in told["versions"]} == {"a", "b"}
    live.http.put("/tasks/contest", json={"prompt": "{input}"})
    assert live.http.get("/tasks/contest/performance").json()["best"] is None


def test_a_best_route_is_looked_at_when_the_task_or_a_version_has_changed(
    live: Any, write_adapter: Callable[..., Path]
) -> None:
    """By scores that are there already nobody has to ask who leads: it took turns until a score came, or a look."""
    parts = live.services
    first = {name: parts.registry.current(name) for name in "ab"}
    for name, value in (("a", 0.0), ("b", 1.0)):
        subject = MixKey.of("contest", [(first[name], 1.0)], parts.model.id)
        parts.quality.record_evaluation(subject, "accuracy", {f"{i}": value for i in range(100)})

    def served() -> list[str]:
        route = parts.tasks.get("contest").route
        return [parts.router.pick(parts.tasks.get("contest"), route) for _ in range(10)]

    route = {"best": ["a", "b"], "source": "evaluation", "min_samples": 40}
    assert live.http.put("/tasks/contest", json={"prompt": "{input}", "route": route}).status_code == 201
    assert served().count("b") >= 8
    write_adapter("b2", seed=77)
    assert live.http.put("/adapters/b", json={"source": "b2"}).status_code == 200
    assert served().count("a") == 5, "another version, of which nothing is known"
    parts.router.forget_task("contest")
    assert live.http.put("/adapters/b", json={"version": first["b"].label}).status_code == 200
    assert served().count("b") >= 8
    assert live.http.delete("/tasks/contest").status_code == 200
    assert parts.quality.leader("contest", "accuracy by evaluation") is None
