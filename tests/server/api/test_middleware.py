"""Body limits, slow and refused bodies, the access log, and the end of a server."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import select
import socket
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api import middleware
from server.api.middleware import BodyLimit, RequestBoundary, with_time_limit
from server.errors import BodyTooSlow
from tests.waiting import until

MULTIPART = [(b"content-type", b"multipart/form-data; boundary=x")]


class Client:
    """Sends `pieces` to an application behind a limit of ten bytes, then disconnects or sends `forever`."""

    def __init__(self, pieces: list[bytes], forever: bool = False) -> None:
        self.pieces, self.forever = list(pieces), forever
        self.received: list[bytes] = []
        self.reads = 0
        self.sent: list[Message] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            assert message["type"] == "http.request", "the application never sees half a body"
            self.received.append(message["body"])
            more = message["more_body"]

    async def receive(self) -> Message:
        self.reads += 1
        assert self.reads < 1000
        if self.forever and not self.pieces:
            return {"type": "http.request", "body": b"x" * 10, "more_body": True}
        if not self.pieces:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.pieces.pop(0), "more_body": bool(self.pieces) or self.forever}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def request(self, path: str = "/generate", headers: Any = (), app: Any = None, method: str = "POST") -> int | None:
        """The status of the response, if there is one."""
        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        limit = BodyLimit(app or self.app, max_body=10, max_upload=20, body_time=60.0)
        boundary = RequestBoundary(limit, lambda *_: None, lambda: False)
        asyncio.run(asyncio.wait_for(boundary(scope, self.receive, self.send), 5))
        return self.sent[0]["status"] if self.sent else None


@pytest.mark.parametrize(
    ("method", "path", "kind", "limit"),
    [
        ("POST", "/generate", b"application/json", 10),
        ("POST", "/adapters", b"Multipart/Form-Data; boundary=x", 20),
        ("PUT", "/adapters/mine", b"multipart/form-data; boundary=x", 20),
        ("PUT", "/tasks/mine", b"multipart/form-data; boundary=x", 10),
        ("POST", "/adapters/mine", b"multipart/form-data; boundary=x", 10),
        ("POST", "/adapters", b"application/json", 10),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_body_limit_of_each_route(method: str, path: str, kind: bytes, limit: int, declared: bool) -> None:
    for size in (limit, limit + 1):
        client = Client([b"x" * (size - 3), b"yyy"])
        length = [(b"content-length", str(size).encode())] if declared else []
        status = client.request(path, [(b"content-type", kind), *length], method=method)
        assert status == (None if size == limit else 413)
        assert size > limit or b"".join(client.received) == b"x" * (size - 3) + b"yyy"
        assert not client.pieces, "a refused body is read to its end, so that the client reads the answer"


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"11")]])
def test_endless_body_is_discarded_up_to_a_limit(headers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_DISCARDED", 100)
    client = Client([], forever=True)
    assert client.request(headers=headers) == 413 and not client.received and client.reads <= 14


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_unread_rest_of_an_upload_is_discarded_before_the_answer(reads: int) -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(reads):
            await receive()
        await send({"type": "http.response.start", "status": 412, "headers": []})
        assert not client.pieces
        await send({"type": "http.response.body", "body": b"{}"})

    client = Client([b"1", b"2", b"3"])
    assert client.request("/adapters", MULTIPART, app=refuses) == 412 and client.reads == 3


def test_client_that_disconnects_within_its_body_starts_nothing() -> None:
    client = Client([b"{"])
    receive = client.receive

    async def half() -> Message:
        return {**await receive(), "more_body": True}

    client.receive = half  # type: ignore[method-assign]
    assert client.request() is None and not client.received


async def stalled() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def test_stalled_body_is_408() -> None:
    client = Client([])
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    await asyncio.wait_for(BodyLimit(client.app, 10, 10, body_time=0.01)(scope, stalled, client.send), 5)
    assert client.sent[0]["status"] == 408


@pytest.mark.parametrize(("sent", "pauses", "in_time"), [(1 << 20, [0, 0.1, 0.1], True), (1, [0, 0.06, 60], False)])
async def test_received_bytes_extend_the_time_limit(sent: int, pauses: list[float], in_time: bool) -> None:
    left = list(pauses)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(left.pop(0))
        return {"type": "http.request", "body": b"x" * sent, "more_body": bool(left)}

    limited = with_time_limit(receive, 0.05)
    if in_time:
        assert sum([len((await limited())["body"]) for _ in pauses]) == 3 * sent
    else:
        with pytest.raises(BodyTooSlow, match="--body-time"):
            for _ in pauses:
                await limited()


@pytest.mark.parametrize(
    ("path", "kind", "begin"),
    [
        ("/generate", "application/json", b"{"),
        ("/adapters", "multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n'),
    ],
)
def test_trickling_body_over_a_real_connection_is_408(start: Any, path: str, kind: str, begin: bytes) -> None:
    live = start(body_time=0.1)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
        connection.sendall(head.encode() + begin)
        while not select.select([connection], [], [], 0.01)[0]:
            connection.sendall(b" ")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        error = json.loads(answer.read())["error"]
    assert (answer.status, error["code"], answer.headers["connection"]) == (408, "body_too_slow", "close")
    assert not list((live.state.settings.state_dir / "uploads").glob("*"))


def test_large_bodies_are_answered_over_a_real_connection(start: Any) -> None:
    live = start(max_body=10_000)
    for size in (10_001, 12 << 20):
        assert live.http.post("/generate", json={"prompt": "x" * size}).status_code == 413
        streamed = live.http.post("/generate", content=iter([b"x" * 65536] * (size // 65536 + 1)))
        assert streamed.status_code == 413 and "--max-body" in streamed.json()["error"]["message"]
    assert live.generate("small").status_code == 200


def test_body_with_too_many_keys_is_413(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_KEYS", 50)
    live = start()
    for colon, code in ((":", "utf-8"), (" :", "utf-8"), (":", "utf-16-le")):
        for more, status in ((49, 422), (50, 413)):
            body = '{"prompt": "a:b, c:d"' + "".join(f',"{i}"{colon}0' for i in range(more)) + "}"
            headers = {"content-type": "application/json"}
            answer = live.http.post("/generate", content=body.encode(code), headers=headers)
            assert answer.status_code == status
    assert live.generate("a:" * 60, max_tokens=1).status_code == 200, "colons in texts are not keys"


def test_head_is_get_without_the_body(start: Any) -> None:
    live = start(api_keys="team:secret-one")
    for path, status in (("/health/live", 200), ("/", 200), ("/stats", 401)):
        head, get = live.http.head(path), live.http.get(path)
        assert head.status_code == get.status_code == status and not head.content
        assert head.headers["content-length"] == str(len(get.content)), path


def test_access_log(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    live = start(api_keys="team:secret-one", access_log=True, max_body=1000)
    key = {"authorization": "Bearer secret-one"}
    live.http.get("/adapters")
    live.http.get("/adapters", headers={"host": "evil.example"})
    live.http.post("/generate", content=b"x" * 2000, headers=key)
    live.slow_down(0.02)
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "a private matter", "max_tokens": 200, "ignore_eos": True}
        live.http.post("/generate", json=body, timeout=0.3, headers=key)

    def lines() -> list[tuple[Any, ...]]:
        records = [r.__dict__ for r in caplog.records if r.name == middleware.__name__ and "status" in r.__dict__]
        return [
            (r["method"], r["path"], r["status"], r.get("code"), r.get("tenant"))
            for r in records
            if "/health" not in r["path"]
        ]

    until(lambda: len(lines()) >= 4)  # lines are written after the response
    assert lines() == [
        ("GET", "/adapters", 401, "invalid_api_key", None),
        ("GET", "/adapters", 403, "forbidden", None),
        ("POST", "/generate", 413, "body_too_large", "team"),
        ("POST", "/generate", 499, None, "team"),
    ]
    assert "private" not in caplog.text and not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(("status", "counted"), [(200, False), (401, True), (404, False), (413, True)])
def test_refusals_of_the_middleware_are_counted_and_draining_closes_connections(status: int, counted: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})

    client, refused = Client([]), list[tuple[str, str, int]]()
    for draining in (False, True):
        boundary = RequestBoundary(app, lambda *given: refused.append(given), lambda draining=draining: draining)  # type: ignore[misc]
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
        asyncio.run(boundary(scope, client.receive, client.send))
        assert ((b"connection", b"close") in client.sent[-1]["headers"]) is draining
    assert refused == [("GET", "/x", status)] * 2 * counted


@pytest.mark.parametrize(
    ("draining", "begun", "statuses"), [(True, False, [503]), (True, True, [200]), (False, False, [])]
)
async def test_cancelled_request_is_503_while_draining(draining: bool, begun: bool, statuses: list[int]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    client, scope = Client([]), {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    boundary = RequestBoundary(app, lambda *_: None, lambda: draining)
    task = asyncio.create_task(boundary(scope, stalled, client.send))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert [sent["status"] for sent in client.sent if "status" in sent] == statuses
    if statuses == [503]:
        assert "shutting down" in json.loads(client.sent[-1]["body"])["error"]["message"]
        assert {name for name, _ in client.sent[0]["headers"]} >= {b"retry-after", b"connection", b"x-request-id"}


def test_exception_after_the_response_began_is_not_answered_twice(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    client = Client([b"{}"])
    with pytest.raises(ValueError, match="broken"):
        client.request(app=app)
    assert [message["type"] for message in client.sent] == ["http.response.start"]
    assert "failed after its response began" in caplog.text
