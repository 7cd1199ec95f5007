"""Clients that disconnect: their work stops within a step, and leases, blocks and slots are freed."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import Future
from http.client import HTTPResponse
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from server.api.errors import error_reply
from server.api.generate import Call
from server.errors import InvalidRequest
from server.tasks.generation import Caller
from tests.waiting import until

LONG = {"prompt": "once", "max_tokens": 200, "ignore_eos": True, "adapters": [{"name": "a"}]}
STEP = 0.3
CANCELLED = 'loramux_requests_total{task="none",adapter="%s",status="cancelled"} 1'


def send(live: Any, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and leave the connection open."""
    data = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + data)
    return connection


def steps(live: Any) -> int:
    return int(live.stats()["steps"])


def requests(live: Any) -> list[Any]:
    return [r.request for g in live.services.inference.live for r in g.replies]


def everything_is_free(live: Any) -> bool:
    return bool(live.stats()["kv_blocks"]["used"] == 0 and live.stats()["slots"]["in_use"] == 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", LONG),
        ("/generate", {**LONG, "stream": True}),
        ("/v1/completions", {"model": "a", **LONG, "adapters": None}),
        ("/v1/completions", {"model": "a", **LONG, "adapters": None, "stream": True, "n": 3}),
    ],
    ids=["generate", "generate stream", "completions", "completions stream"],
)
def test_running_request_stops_within_a_step(live: Any, path: str, body: dict[str, Any]) -> None:
    live.slow_down(STEP)
    connection = send(live, path, body)
    until(lambda: any(r.output for r in requests(live)))
    connection.close()
    before = steps(live)
    assert live.idle(2.0)
    assert steps(live) - before <= 2, "the running step, and one that may be planned"
    assert everything_is_free(live) and CANCELLED % "a" in live.http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_request_stops_within_its_prompt(start: Any, stream: bool) -> None:
    live = start(max_step_tokens=16, max_batch=4)
    live.slow_down(STEP)
    connection = send(live, "/generate", {"prompt": "z" * 180, "max_tokens": 20, "stream": stream})
    until(lambda: requests(live) and requests(live)[0].computed > 0)
    (request,) = requests(live)
    connection.close()
    assert live.idle(2.0) and not request.output and request.computed < 150
    assert everything_is_free(live)


@pytest.mark.parametrize("stream", [False, True])
def test_queued_request_is_removed(start: Any, stream: bool) -> None:
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
def test_load_of_an_adapter_is_cancelled(live: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    never: Future[Any] = Future()
    monkeypatch.setattr(live.services.engine._scheduler.loader, "_fetch", lambda mix: never)
    connection = send(live, "/generate", {**LONG, "stream": stream})
    until(lambda: live.stats()["loading"])
    connection.close()
    assert live.idle(2.0) and never.cancelled()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", LONG),
        ("/generate", {**LONG, "stream": True}),
        ("/v1/completions", {"model": "a", "prompt": ["x", "y"]}),
        ("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_request_of_a_disconnected_client_is_not_started(
    live: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    async def disconnected(request: Request) -> bool:
        return True

    submitted: list[Any] = []
    monkeypatch.setattr(Request, "is_disconnected", disconnected)
    monkeypatch.setattr(live.services.inference.engine, "submit", submitted.append)
    live.http.post(path, json=body)
    assert not submitted and live.idle()
    assert CANCELLED % "a" in live.http.get("/metrics").text


def test_tokenizing_of_labels_stops(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started, stopped, submitted = threading.Event(), threading.Event(), list[Any]()

    async def encode_labels(task: Any, prompt: str, labels: Any, deadline: float, disconnected: Any) -> Any:
        started.set()
        while not disconnected():
            await asyncio.sleep(0.001)
        stopped.set()
        return []

    monkeypatch.setattr(live.services.prompts, "encode_labels", encode_labels)
    monkeypatch.setattr(live.services.inference, "start", lambda *args, **more: submitted.append(args))
    connection = send(live, "/classify", {"prompt": "x", "labels": ["a", "b"]})
    assert started.wait(30)
    connection.close()
    assert stopped.wait(30) and live.idle() and not submitted
    until(lambda: CANCELLED % "base" in live.http.get("/metrics").text)


def test_compilation_of_a_schema_is_cancelled(
    live: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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
    until(lambda: "the client disconnected" in caplog.text)
    go_on.release(100)
    assert live.idle(2.0) and len(compiled) <= 2 and steps(live) == before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    answered = live.http.post("/v1/completions", json={"model": "a", "prompt": "x", "response_format": form})
    assert json.loads(answered.json()["choices"][0]["text"]) == "a"


def test_classification_stops_and_others_go_on(live: Any) -> None:
    live.slow_down(STEP)
    connection = send(live, "/classify", {"prompt": "x" * 150, "labels": [f"label {i}" for i in range(40)]})
    until(lambda: live.stats()["running"])
    connection.close()
    assert live.idle(2.0)
    live.slow_down(0.0)
    assert live.generate("still here", max_tokens=2).status_code == 200


def test_disconnect_within_an_upload_is_logged_without_a_warning(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    host, port = live.url.removeprefix("http://").split(":")
    uploads = live.state.settings.state_dir / "uploads"
    with socket.create_connection((host, int(port))) as connection:
        head = b"POST /adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n"
        connection.sendall(head + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        until(lambda: list(uploads.glob("*")))
    until(lambda: "the client disconnected" in caplog.text)
    until(lambda: not list(uploads.iterdir()))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_draining_lets_running_requests_finish(start: Any) -> None:
    live = start()
    live.slow_down(0.02)
    connection = send(live, "/generate", {"prompt": "x", "max_tokens": 200, "ignore_eos": True})
    until(lambda: live.stats()["running"])
    live.state.drain()
    refused = live.generate("new")
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert refused.headers["connection"] == "close" and live.http.get("/health/ready").status_code == 503
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
