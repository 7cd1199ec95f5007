"""A client that goes away: its work stops within one step, and leases, blocks and slots return."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import Future
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect, Request

from server.api.errors import error_reply
from server.api.generate import Call
from server.errors import InvalidRequest
from server.tasks.generation import Caller
from tests.waiting import until

LONG = {"prompt": "once", "max_tokens": 200, "ignore_eos": True, "adapters": [{"name": "a"}]}
STEP = 0.3


def send(live: Any, path: str, body: dict[str, Any]) -> socket.socket:
    """Write a request and leave the connection open."""
    data = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    )
    connection.sendall("\r\n".join((*head, "", "")).encode() + data)
    return connection


def steps(live: Any) -> int:
    return int(live.stats()["steps"])


@pytest.mark.parametrize(
    ("path", "body", "then"),
    [
        ("/generate", LONG, b""),
        ("/generate", LONG, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("/generate", {**LONG, "stream": True}, b""),
        ("/v1/completions", {**LONG, "model": "a"}, b""),
        ("/v1/completions", {**LONG, "model": "a", "stream": True, "n": 3}, b""),
    ],
    ids=["generate", "generate and pipeline", "generate stream", "completions", "completions stream"],
)
def test_running_work_stops_within_a_step(live: Any, path: str, body: dict[str, Any], then: bytes) -> None:
    live.slow_down(STEP)
    body = {k: v for k, v in body.items() if not (k == "adapters" and path != "/generate")}
    connection = send(live, path, body)
    until(lambda: live.stats()["running"])
    until(lambda: any(r.request.output for g in live.services.inference.live for r in g.replies))
    connection.sendall(then)
    connection.close()
    before = steps(live)
    assert live.idle(2.0)
    assert steps(live) - before <= 2, "the step that ran, and at most one that had been planned"
    assert live.stats()["kv_blocks"]["used"] == 0 and live.stats()["slots"]["in_use"] == 0
    text = live.http.get("/metrics").text
    assert 'loramux_requests_total{task="none",adapter="a",status="cancelled"} 1' in text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", LONG),
        ("/generate", {**LONG, "stream": True}),
        ("/v1/completions", {"model": "a", "prompt": ["x", "y"]}),
        ("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_nothing_is_begun_for_who_has_sent_a_request_and_gone(
    live: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    async def gone(request: Request) -> bool:
        return True

    begun: list[Any] = []
    monkeypatch.setattr(Request, "is_disconnected", gone)
    monkeypatch.setattr(live.services.inference.engine, "submit", begun.append)
    live.http.post(path, json=body)  # to which nobody listens
    assert not begun and not live.services.inference.live
    assert len(live.services.registry._leases) == 0
    text = live.http.get("/metrics").text
    assert 'loramux_requests_total{task="none",adapter="a",status="cancelled"} 1' in text


def test_labels_are_looked_at_no_more_once_the_client_has_gone(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, heard, begun = threading.Event(), threading.Event(), list[Any]()

    async def looked_at(task: Any, prompt: str, labels: Any, deadline: float, left: Any) -> Any:
        asked.set()
        while not left():
            await asyncio.sleep(0.001)
        heard.set()
        return []

    monkeypatch.setattr(live.services.prompts, "encode_labels", looked_at)
    monkeypatch.setattr(live.services.inference, "start", lambda *args, **more: begun.append(args))
    connection = send(live, "/classify", {"prompt": "x", "labels": ["a", "b"]})
    assert asked.wait(30)
    connection.close()
    assert heard.wait(30) and live.idle() and not begun
    cancelled = 'loramux_requests_total{task="none",adapter="base",status="cancelled"} 1'
    until(lambda: cancelled in live.http.get("/metrics").text)


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_before_the_first_token(start: Any, write_adapter: Any, stream: bool) -> None:
    write_adapter("a", 1)
    live = start(max_step_tokens=16, max_batch=4)
    assert live.http.post("/adapters", json={"name": "a", "source": "a"}).status_code in (200, 201)
    live.slow_down(STEP)
    connection = send(live, "/generate", {**LONG, "prompt": "z" * 180, "max_tokens": 20, "stream": stream})
    until(lambda: live.stats()["running"])
    requests = [r.request for g in live.services.inference.live for r in g.replies]
    until(lambda: requests[0].computed > 0)
    connection.close()
    before = steps(live)
    assert live.idle(2.0) and steps(live) - before <= 2
    assert not requests[0].output and requests[0].computed < 150, "it was within its prompt"
    assert live.stats()["kv_blocks"]["used"] == 0 and live.stats()["slots"]["in_use"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_queued_work_stops_before_it_ran(start: Any, write_adapter: Any, stream: bool) -> None:
    live = start(max_batch=1)
    live.slow_down(STEP)
    first = send(live, "/generate", {"prompt": "one", "max_tokens": 200, "ignore_eos": True})
    until(lambda: live.stats()["running"])
    second = send(live, "/generate", {"prompt": "two", "max_tokens": 200, "ignore_eos": True, "stream": stream})
    until(lambda: live.stats()["waiting"])
    second.close()
    until(lambda: not live.stats()["waiting"])
    assert live.stats()["running"] == 1
    first.close()
    assert live.idle(2.0)


@pytest.mark.parametrize("stream", [False, True])
def test_loading_work_stops_while_its_adapter_is_on_its_way(
    live: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    never: Future[Any] = Future()
    monkeypatch.setattr(live.services.engine._scheduler.loader, "_fetch", lambda mix: never)
    connection = send(live, "/generate", {**LONG, "stream": stream})
    until(lambda: live.stats()["loading"])
    connection.close()
    assert live.idle(2.0) and never.cancelled()
    assert live.stats()["slots"]["in_use"] == 0


def test_compiling_stops_that_nobody_waits_for(
    live: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is run by it, or told as a failure of ours."""
    caplog.set_level(logging.INFO)
    grammars = live.services.grammars
    go_on, compile, compiled = threading.Semaphore(0), grammars._compile, []

    def counted(schema: str) -> Any:
        compiled.append(schema)
        go_on.acquire()
        return compile(schema)

    monkeypatch.setattr(grammars, "_compile", counted)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "a"}}}
    before = steps(live)
    connection = send(live, "/v1/completions", {"model": "a", "prompt": "x", "n": 16, "response_format": form})
    until(lambda: compiled)
    connection.close()
    until(lambda: all(job.future.cancelled() for jobs in grammars._jobs.values() for job in jobs))
    go_on.release(2)
    until(lambda: "its client left" in caplog.text)
    until(lambda: not grammars._busy)
    assert len(compiled) == 1 and steps(live) == before and live.idle(2.0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = live.http.get("/metrics").text
    assert 'loramux_requests_total{task="none",adapter="a",status="cancelled"} 1' in text
    go_on.release(100)
    answered = live.http.post("/v1/completions", json={"model": "a", "prompt": "x", "response_format": form})
    assert json.loads(answered.json()["choices"][0]["text"]) == "a"


def test_classification_stops_too(live: Any) -> None:
    live.slow_down(STEP)
    labels = [f"label {i}" for i in range(40)]
    connection = send(live, "/classify", {"prompt": "x" * 150, "labels": labels})
    until(lambda: live.stats()["running"])
    connection.close()
    assert live.idle(2.0)


def test_the_server_goes_on_for_others(live: Any) -> None:
    live.slow_down(0.01)
    for _ in range(5):
        connection = send(live, "/generate", LONG)
        until(lambda: live.stats()["running"])
        connection.close()
    assert live.generate("still here", max_tokens=2).status_code == 200
    assert live.idle()


def test_a_client_that_leaves_within_its_upload_is_no_failure_of_ours(
    live: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host, port = live.url.removeprefix("http://").split(":")
    head = b"POST /adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        until(lambda: list((live.state.settings.state_dir / "uploads").glob("*")))
    until(lambda: "its client left" in caplog.text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    until(lambda: not list((live.state.settings.state_dir / "uploads").iterdir()))


def test_many_at_once_against_a_short_queue_are_answered_or_refused(start: Any) -> None:
    live = start(max_queue=8, max_batch=2)
    live.slow_down(0.01)
    with httpx.Client(base_url=live.url, limits=httpx.Limits(max_connections=None), timeout=30) as client:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(40) as pool:
            answers = list(
                pool.map(lambda i: client.post("/generate", json={"prompt": f"p{i}", "max_tokens": 8}), range(40))
            )
    statuses = {a.status_code for a in answers}
    assert statuses == {200, 429}
    for refused in (a for a in answers if a.status_code == 429):
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
    assert live.idle()


def test_shutting_down_lets_what_runs_finish(start: Any) -> None:
    live = start()
    live.slow_down(0.02)
    connection = send(live, "/generate", {"prompt": "x", "max_tokens": 200, "ignore_eos": True})
    until(lambda: live.stats()["running"])
    live.state.drain()
    refused = live.generate("new")
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert refused.headers["connection"] == "close", "another server may have the next one"
    assert live.http.get("/health/ready").status_code == 503
    live.slow_down(0.0)
    connection.settimeout(10)
    with HTTPResponse(connection) as answer:
        answer.begin()
        whole = json.loads(answer.read())
    assert (answer.status, whole["finish_reason"], whole["usage"]["completion_tokens"]) == (200, "length", 200)
    connection.close()


@pytest.mark.parametrize(
    ("end", "status"), [(InvalidRequest("x"), 400), (ClientDisconnect(), "cancelled"), (asyncio.CancelledError(), 503)]
)
def test_a_call_that_ends_before_the_engine_is_counted_with_the_status_of_its_answer(
    end: BaseException, status: int | str
) -> None:
    counted: list[Any] = []

    class Records:
        def record_rejection(self, target: None, error: Exception, caller: Caller) -> None:
            counted.append(error_reply(error).status)

        def record_disconnect(self, target: None, caller: Caller) -> None:
            counted.append("cancelled")

    with pytest.raises(type(end)), Call(Records(), Caller()):  # type: ignore[arg-type]
        raise end
    assert counted == [status]
