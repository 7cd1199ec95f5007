"""`/jobs` and `POST /tasks/{task}/evaluate`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from server.jobs.job_store import Job
from tests import waiting
from tests.server.api.jobs import LINES, client_of, finished, stored_job, upload
from tests.server.api.test_openapi_document import check

TASK = {"prompt": "{input}", "labels": ["good", "bad"], "defaults": {"max_tokens": 4}}


@pytest.fixture
def live(start: Any, write_adapter: Any) -> Any:
    """A server with the adapters a and b and a task without adapters."""
    live = start()
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(name, seed)
        assert live.http.post("/adapters", json={"name": name, "source": name}).status_code in (200, 201)
    live.http.put("/tasks/mood", json=TASK).raise_for_status()
    return live


@pytest.fixture
def client(live: Any) -> openai.OpenAI:
    return client_of(live)


def evaluate(live: Any, **body: Any) -> Any:
    return live.http.post("/tasks/mood/evaluate", json=body)


def test_evaluating_candidates_of_a_task(live: Any, client: openai.OpenAI) -> None:
    route = {"best": ["a", "b"], "source": "evaluation", "min_samples": 5}
    live.http.put("/tasks/mood", json={**TASK, "route": route}).raise_for_status()
    answer = evaluate(live, data=LINES)
    assert answer.status_code == 202
    job = finished(live, answer.json()["id"])
    assert job["status"] == "succeeded" and job["steps"] == job["step"] == 24, job
    rows = job["result"]["candidates"]
    assert [row["adapters"][0]["name"] for row in rows] == ["a", "b"] and rows[0]["samples"] == 12
    versions = live.http.get("/tasks/mood/performance").json()["versions"]
    assert {v["version"] for v in versions} == {row["adapters"][0]["version"] for row in rows}

    mixes = [[], [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]]
    job = finished(live, evaluate(live, file=upload(client), candidates=mixes, metric="loss").json()["id"])
    assert job["status"] == "succeeded" and job["result"]["candidates"][0]["adapters"] == []
    assert all(row["score"] > 0 for row in job["result"]["candidates"])
    bad = upload(client, [{"prompt": "x", "completion": "y"}])
    job = finished(live, evaluate(live, file=bad).json()["id"])
    assert job["status"] == "failed" and "line 1" in job["error"]["message"]
    assert live.idle()


def test_bad_evaluations_are_refused(live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    file = upload(client)
    wrong: list[tuple[dict[str, Any], int]] = [
        ({}, 422),
        ({"data": LINES, "file": file}, 422),
        ({"file": "file-none"}, 404),
        ({"data": LINES, "candidates": [[{"name": "nobody"}]]}, 404),
        ({"data": LINES, "candidates": [[{"name": "a"}, {"name": "a"}]]}, 400),
        ({"data": LINES, "metric": "beauty"}, 422),
    ]
    for body, status in wrong:
        assert evaluate(live, **body).status_code == status, body
    assert live.http.post("/tasks/nobody/evaluate", json={"data": LINES}).status_code == 404
    for output, code, param in ((" ", "invalid_data", "data"), ("good", "invalid_request", "metric")):
        answer = evaluate(live, data=[LINES[0], {"input": "x", "output": output}], metric="bleu")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    with monkeypatch.context() as small:
        small.setattr("server.jobs.evaluation_job.MAX_BYTES", 100)
        for body, param in (({"data": LINES}, "data"), ({"file": file}, "file")):
            answer = evaluate(live, **body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    with monkeypatch.context() as few:
        few.setattr(live.services.engine._slots, "count", 1)
        answer = evaluate(live, data=LINES, candidates=[[{"name": "a"}, {"name": "b"}]])
        assert (answer.status_code, answer.json()["error"]["param"]) == (507, "candidates"), answer.text


def test_candidates_and_metric_come_from_the_route(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.services.jobs, "_next", lambda kind: None)
    mix = {"choice": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.25}]}
    best = {"best": ["a", "b"], "metric": "rougeL", "source": "evaluation"}
    requests = []

    def request_of(task: str) -> dict[str, Any]:
        answer = live.http.post(f"/tasks/{task}/evaluate", json={"data": LINES})
        assert answer.status_code == 202
        request: dict[str, Any] = live.http.get(f"/jobs/{answer.json()['id']}").json()["asked"]
        requests.append(request)
        return request

    for task, route in (("mixed", mix), ("best", best)):
        live.http.put(f"/tasks/{task}", json={"prompt": "{input}", "route": route}).raise_for_status()
    mixed = request_of("mixed")
    assert mixed["candidates"] == [[["a", 0.5], ["b", 0.25]]] and mixed["samples"] == len(LINES)
    assert request_of("best")["candidates"] == [[["a", 1.0]], [["b", 1.0]]] and requests[-1]["metric"] == "rougeL"
    live.services.registry.retire_now("a")
    assert request_of("best")["candidates"] == [[["b", 1.0]]]
    live.services.registry.retire_now("b")
    for task in ("best", "mixed"):
        assert live.http.post(f"/tasks/{task}/evaluate", json={"data": LINES}).status_code == 404


def test_a_candidate_that_is_deleted_before_its_turn_is_still_evaluated(live: Any) -> None:
    live.slow_down(0.2)
    body = {"data": LINES, "candidates": [[{"name": "a"}], [{"name": "b"}]]}
    id = evaluate(live, **body).json()["id"]
    waiting.until(lambda: live.stats()["running"])
    for name in ("a", "b"):
        live.http.delete(f"/adapters/{name}").raise_for_status()
    live.slow_down(0.0)
    job = finished(live, id)
    assert job["status"] == "succeeded", job["error"]
    assert [row["adapters"][0]["name"] for row in job["result"]["candidates"]] == ["a", "b"]
    assert live.idle() and live.http.get("/adapters").json()["adapters"] == []
    assert evaluate(live, **body).status_code == 404


def test_a_drain_that_times_out_ends_answers_of_clients_but_no_job(live: Any) -> None:
    live.slow_down(0.1)
    id = evaluate(live, data=LINES, candidates=[[]]).json()["id"]
    waiting.until(lambda: live.stats()["running"])
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(live.generate, "x", max_tokens=100, ignore_eos=True)
        inference = live.services.inference
        waiting.until(lambda: any(generation.caller.client for generation in inference.live))
        inference._delivery.loop.call_soon_threadsafe(live.state.abort_requests)
        assert answer.result(30).json()["finish_reason"] == "cancelled"
    live.slow_down(0.0)
    job = finished(live, id)
    assert job["status"] == "succeeded", job


def test_an_evaluation_is_cancelled_by_the_route_that_errors_name(live: Any, client: openai.OpenAI) -> None:
    document = live.http.get("/openapi.json").json()
    file = upload(client)
    live.slow_down(0.3)
    id = evaluate(live, file=file, candidates=[[]]).json()["id"]
    kept = live.http.delete(f"/v1/files/{file}")
    assert kept.status_code == 409 and f"POST /jobs/{id}/cancel" in kept.json()["error"]["message"]
    elsewhere = live.http.post(f"/v1/fine_tuning/jobs/{id}/cancel")
    assert elsewhere.status_code == 404 and f"POST /jobs/{id}/cancel" in elsewhere.json()["error"]["message"]
    ended = live.http.post(f"/jobs/{id}/cancel")
    assert ended.status_code == 200 and ended.json()["id"] == id and ended.json()["kind"] == "evaluation"
    live.slow_down(0.0)
    assert finished(live, id)["status"] == "cancelled"
    assert live.http.delete(f"/v1/files/{file}").status_code == 200
    again, unknown = live.http.post(f"/jobs/{id}/cancel"), live.http.post("/jobs/eval-none/cancel")
    assert (again.status_code, unknown.status_code) == (409, 404)
    for answer in (elsewhere, ended, again, unknown):
        check(document, answer)


def test_the_last_jobs_and_messages_are_shown(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.jobs.MAX_JOBS", 2)
    monkeypatch.setattr("server.api.jobs.MAX_MESSAGES", 2)
    second, third = [stored_job(live, status="running", pausing=pausing) for pausing in (True, True, False)][1:]
    shown = live.http.get("/jobs").json()["jobs"]
    assert [(job["id"], job["pausing"]) for job in shown] == [(third.id, False), (second.id, True)]
    for message in ("one", "two", "three"):
        live.services.jobs.store.add_event(third, message)
    assert [m["message"] for m in live.http.get(f"/jobs/{third.id}").json()["messages"]] == ["two", "three"]
    assert live.http.get(f"/jobs/{second.id}").json()["messages"] == []


def test_changes_need_an_admin_key_and_answers_show_no_secrets(start: Any, tmp_path: Any) -> None:
    live = start(api_keys="team:secret-one", admin_keys="boss:secret-two")
    team, boss = ({"authorization": f"Bearer {s}"} for s in ("secret-one", "secret-two"))
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/fine_tuning/jobs/x/events"),
        ("POST", "/v1/fine_tuning/jobs/x/pause"),
        ("POST", "/tasks/mood/evaluate"),
    ):
        assert live.http.request(method, path, headers=team).status_code == 403, path
        assert live.http.request(method, path, headers=boss).status_code not in (401, 403), path
    assert live.http.get("/jobs", headers=team).json() == {"jobs": []}
    job: Job = stored_job(live)
    shown = [live.http.get(path, headers=team) for path in ("/jobs", f"/jobs/{job.id}")]
    shown += [live.http.get(f"/v1/fine_tuning/jobs/{job.id}{x}", headers=boss) for x in ("", "/events?limit=100")]
    assert all(answer.status_code == 200 for answer in shown)
    assert all(str(tmp_path) not in answer.text and "secret" not in answer.text for answer in shown)
