"""/tasks/{task}/feedback and /performance, and `best` routes that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.tasks.mix_key import MixKey


def send(live: Any, task: str, **body: Any) -> int:
    return int(live.http.post(f"/tasks/{task}/feedback", json=body).status_code)


def test_last_feedback_of_an_id_counts(live: Any) -> None:
    answer = live.generate("x", task="mood").json()
    assert send(live, "mood", id=answer["id"], score=0.0) == 204
    assert send(live, "mood", id=answer["id"], expected=answer["text"]) == 204
    performance = live.http.get("/tasks/mood/performance").json()
    (version,) = performance["versions"]
    assert performance["task"] == "mood" and performance["best"] is None
    assert version["version"] == answer["adapters"][0]["version"]
    (quality,) = version["quality"]
    assert (quality["samples"], quality["mean"], quality["source"]) == (1, 1.0, "feedback")
    assert 0 <= quality["low"] < quality["high"] <= 1
    assert version["requests"] == 1 and version["errors"] == 0 and version["ttft"]["p50"] > 0
    assert version["tokens"]["generated"] == answer["usage"]["completion_tokens"]
    metrics, pair = live.http.get("/metrics").text, f'task="mood",version="{version["version"]}"'
    assert f'loramux_task_quality{{adapter="mood",metric="accuracy",source="feedback",{pair}}} 1.0' in metrics


def test_feedback_needs_an_id_of_the_same_task(live: Any) -> None:
    live.http.put("/tasks/other-task", json={"prompt": "{input}"})
    messages = [{"role": "user", "content": "x"}]
    chat = live.http.post("/v1/chat/completions", json={"model": "mood", "messages": messages}).json()
    label = live.http.post("/classify?task=mood", json={"prompt": "x"}).json()
    assert send(live, "mood", id=chat["id"], score=1) == 204
    assert send(live, "mood", id=label["id"], expected=label["label"]) == 204
    for task, id in (
        ("other-task", chat["id"]),
        ("mood", "gen-unknown"),
        ("nobody", chat["id"]),
        ("mood", live.generate("x").json()["id"]),
    ):
        assert send(live, task, id=id, score=1) == 404
    assert live.http.get("/tasks/mood/performance").json()["versions"][0]["quality"][0]["mean"] == 1.0


@pytest.mark.parametrize(("body", "status"), [({}, 400), ({"score": 1, "expected": "x"}, 400), ({"score": 2}, 422)])
def test_feedback_is_a_score_or_an_expected_answer(live: Any, body: Any, status: int) -> None:
    assert send(live, "mood", id="x", **body) == status


def test_feedback_needs_the_key_of_the_request(start: Any) -> None:
    live = start(api_keys="one:alpha,two:beta", admin_keys="boss:gamma")
    one, two, boss = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta", "gamma"))
    assert live.http.put("/tasks/t", json={"prompt": "{input}"}, headers=boss).status_code == 201
    answer = live.http.post("/generate?task=t", json={"prompt": "x", "max_tokens": 2}, headers=one).json()
    body = {"id": answer["id"], "score": 1}
    assert live.http.post("/tasks/t/feedback", json=body, headers=two).status_code == 404
    assert live.http.post("/tasks/t/feedback", json=body, headers=one).status_code == 204


def test_best_route_alternates_and_then_serves_the_better_adapter(live: Any) -> None:
    task = {"prompt": "{input}", "labels": ["x", "y"], "route": {"best": ["a", "b"], "min_samples": 40}}
    assert live.http.put("/tasks/contest", json=task).status_code == 201
    served = []
    for _ in range(100):
        answer = live.http.post("/classify?task=contest", json={"prompt": "x"}).json()
        name = answer["adapters"][0]["name"]
        served.append(name)
        assert send(live, "contest", id=answer["id"], score=1.0 if name == "b" else 0.0) == 204
    assert sorted(served[:10]) == ["a"] * 5 + ["b"] * 5
    assert served[80:].count("a") <= 2, "one in twenty requests goes to the others"
    best = live.http.get("/tasks/contest/performance").json()["best"]
    assert best["leader"] == "b" and best["version"].startswith("b@") and "better by at least" in best["decided"]
    live.http.put("/tasks/contest", json={"prompt": "{input}"})
    assert live.http.get("/tasks/contest/performance").json()["best"] is None


def test_leader_is_chosen_again_when_the_task_or_a_version_changes(
    live: Any, write_adapter: Callable[..., Path]
) -> None:
    services = live.services
    first = {name: services.registry.current(name) for name in "ab"}
    for name, value in (("a", 0.0), ("b", 1.0)):
        key = MixKey.of("contest", [(first[name], 1.0)], services.model.id)
        services.quality.record_evaluation(key, "accuracy", {f"{i}": value for i in range(100)})

    def served() -> list[str]:
        task = services.tasks.get("contest")
        return [services.router.pick(task, task.route) for _ in range(10)]

    route = {"best": ["a", "b"], "source": "evaluation", "min_samples": 40}
    assert live.http.put("/tasks/contest", json={"prompt": "{input}", "route": route}).status_code == 201
    assert served().count("b") >= 8
    write_adapter("b2", seed=77)
    assert live.http.put("/adapters/b", json={"source": "b2"}).status_code == 200
    assert served().count("a") == 5, "the new version has no scores"
    assert live.http.put("/adapters/b", json={"version": first["b"].label}).status_code == 200
    assert served().count("b") >= 8
    assert live.http.delete("/tasks/contest").status_code == 200
    assert services.quality.leader("contest", "accuracy by evaluation") is None
