"""Bodies at their limits, and what is logged of who leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from server.api import middleware
from server.api.middleware import BodyLimit, RequestBoundary, patient
from server.api.types import Message, Receive, Scope, Send

MULTIPART = [(b"content-type", b"multipart/form-data; boundary=x")]


class House:
    """An application behind the limit of ten bytes, and a client that sends `pieces`, then leaves or `goes_on`."""

    def __init__(self, pieces: list[bytes], goes_on: bool = False, whole: bool = True) -> None:
        self.pieces, self.goes_on, self.whole = list(pieces), goes_on, whole
        self.got: list[bytes] = []
        self.asked = 0
        self.sent: list[Message] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            assert message["type"] == "http.request", "no application hears of half a body"
            self.got.append(message["body"])
            more = message["more_body"]

    async def receive(self) -> Message:
        self.asked += 1
        assert self.asked < 1000, "it is read on and on"
        if self.goes_on and not self.pieces:
            return {"type": "http.request", "body": b"x" * 10, "more_body": True}
        if not self.pieces:
            return {"type": "http.disconnect"}
        piece = self.pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self.pieces) or self.goes_on or not self.whole}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def ask(self, path: str = "/generate", headers: Any = ()) -> int | None:
        """The status of the answer, if there is one."""
        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        limit = BodyLimit(self.app, max_body=10, max_upload=10, body_time=60.0)
        asyncio.run(asyncio.wait_for(limit(scope, self.receive, self.send), 5))
        return self.sent[0]["status"] if self.sent else None


@pytest.mark.parametrize(("path", "kind"), [("/generate", []), ("/adapters", MULTIPART)])
@pytest.mark.parametrize("declared", [[(b"content-length", b"10")], []])
def test_a_body_of_just_the_limit_is_let_in(path: str, kind: Any, declared: Any) -> None:
    house = House([b"12345", b"67890"])
    assert house.ask(path, [*kind, *declared]) is None and b"".join(house.got) == b"1234567890"


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"11")]])
def test_of_a_body_without_an_end_no_more_is_read_than_is_thrown_away(
    headers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "DRAINED", 100)
    house = House([], goes_on=True)
    assert house.ask(headers=headers) == 413 and not house.got and house.asked <= 14


@pytest.mark.parametrize("pieces", [[b"12345", b"678901"], [b"x" * 11, b"2", b"3"]])
def test_a_body_over_the_limit_is_read_to_its_end_and_no_further(pieces: list[bytes]) -> None:
    """Who has sent all of it says nothing more: its answer would wait for as long as a body is thrown away."""
    house = House(pieces)
    assert house.ask() == 413 and not house.got and house.asked == len(pieces)
    upload = House(pieces)
    with pytest.raises(middleware.BodyTooLarge, match="--max-upload"):
        upload.ask("/adapters", MULTIPART)
    assert upload.asked == len(pieces)


def test_a_body_over_the_limit_that_stalls_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "DRAIN_SECONDS", 0.01)
    house = House([b"x" * 11], whole=False)
    receive = house.receive

    async def stalls() -> Message:
        if not house.pieces:
            await asyncio.Event().wait()
        return await receive()

    house.receive = stalls  # type: ignore[method-assign]
    assert house.ask() == 413


@pytest.mark.parametrize(
    ("method", "path", "kind", "most"),
    [
        ("POST", "/adapters", b"Multipart/Form-Data; boundary=x", 10),
        ("PUT", "/adapters/mine", b"multipart/form-data; boundary=x", 10),
        ("PUT", "/tasks/mine", b"multipart/form-data; boundary=x", 5),
        ("POST", "/adapters/mine", b"multipart/form-data; boundary=x", 5),
        ("POST", "/adapters", b"application/json", 5),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_an_upload_may_be_as_large_as_uploads_where_there_are_any(
    method: str, path: str, kind: bytes, most: int, declared: bool
) -> None:
    for size in (most, most + 1):
        house = House([b"x" * size])
        length = [(b"content-length", str(size).encode())] if declared else []
        scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", kind), *length]}
        boundary = RequestBoundary(BodyLimit(house.app, 5, 10, 60.0), lambda *_: None, lambda: False)
        asyncio.run(boundary(scope, house.receive, house.send))
        assert [sent["status"] for sent in house.sent if "status" in sent] == ([] if size == most else [413])


async def stalls() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def test_who_sends_nothing_more_is_answered_at_once() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    house = House([])
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    await asyncio.wait_for(BodyLimit(house.app, 10, 10, body_time=0.01)(dict(scope), stalls, house.send), 5)
    await asyncio.wait_for(RequestBoundary(broken, lambda *_: None, lambda: False)(dict(scope), stalls, house.send), 5)
    assert [sent["status"] for sent in house.sent if "status" in sent] == [408, 500]


def test_a_client_that_leaves_within_its_body_is_not_heard() -> None:
    house = House([b"{", b'"prompt"'], whole=False)
    assert house.ask() is None and not house.got


def test_an_upload_over_the_limit_is_read_to_its_end() -> None:
    house = House([b"12345", b"678901", b"2", b"3"])
    with pytest.raises(middleware.BodyTooLarge):
        house.ask("/adapters", MULTIPART)
    assert house.got == [b"12345"] and not house.pieces


@pytest.mark.parametrize("looked_at", [0, 1, 3])
@pytest.mark.parametrize("withholds", [False, True])
def test_the_answer_of_a_route_that_leaves_an_upload_unread_waits_for_its_end(looked_at: int, withholds: bool) -> None:
    """Else a connection that is to be closed is reset, and the answer lost. Who has not sent its body hears at once."""

    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(looked_at):
            await receive()
        await send({"type": "http.response.start", "status": 412, "headers": []})
        left.append(len(house.pieces))
        await send({"type": "http.response.body", "body": b"{}"})

    house, left = House([b"1", b"2", b"3"]), list[int]()
    scope = {"type": "http", "method": "PUT", "path": "/adapters/mine", "headers": MULTIPART}
    scope["state"] = {"withholds": lambda: withholds}
    limit = BodyLimit(refuses, max_body=10, max_upload=10, body_time=60.0)
    asyncio.run(asyncio.wait_for(limit(scope, house.receive, house.send), 5))
    assert left == [3 - looked_at if withholds else 0] and house.asked == 3 - left[0]
    assert [message["type"] for message in house.sent] == ["http.response.start", "http.response.body"]


async def test_of_an_upload_that_is_too_slow_no_more_is_waited_for() -> None:
    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(middleware.BodyTooSlow):
            await receive()
        await send({"type": "http.response.start", "status": 408, "headers": []})

    house, scope = House([]), {"type": "http", "method": "POST", "path": "/adapters", "headers": MULTIPART}
    await asyncio.wait_for(BodyLimit(told, 10, 10, body_time=0.01)(scope, stalls, house.send), 5)
    assert [message["status"] for message in house.sent] == [408]


async def test_after_its_body_nobody_is_waited_for_too_long() -> None:
    left: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Message:
        if left:
            return left.pop()
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    kept = patient(receive, 0.01)
    assert [(await kept())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]


def test_who_leaves_after_the_answer_has_begun_is_not_logged_as_gone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({}).encode()})
        assert (await receive())["type"] == "http.disconnect"

    house = House([])
    boundary = RequestBoundary(app, lambda *_: None, lambda: False, access_log=True)
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(boundary(scope, house.receive, house.send))
    assert "'/generate' 200 " in caplog.text and "gone" not in caplog.text


@pytest.mark.parametrize("answered", [True, False])
def test_who_leaves_before_the_answer_has_begun_is_logged_as_gone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(middleware, "time", SimpleNamespace(monotonic=iter([3.0, 3.25]).__next__))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["tenant"] = "team"
        if answered:
            assert (await receive())["type"] == "http.disconnect"
            await send({"type": "http.response.start", "status": 200, "headers": []})

    house = House([])
    boundary = RequestBoundary(app, lambda *_: None, lambda: False, access_log=True)
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(boundary(scope, house.receive, house.send))
    (record,) = (record for record in caplog.records if "'/generate' gone 250.0 ms" in record.getMessage())
    told = record.__dict__
    assert (told["status"], told["ms"], told["tenant"], told["path"]) == (499, 250.0, "team", "/generate")


@pytest.mark.parametrize(("status", "heard"), [(200, False), (401, True), (404, False), (413, True)])
def test_what_the_middleware_refuses_is_told_and_the_last_answer_of_a_connection_says_so(
    status: int, heard: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})

    house, unread = House([]), list[tuple[str, str, int]]()
    for closes in (False, True):
        boundary = RequestBoundary(app, lambda *told: unread.append(told), lambda closes=closes: closes)  # type: ignore[misc]
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
        asyncio.run(boundary(scope, house.receive, house.send))
        assert ((b"connection", b"close") in house.sent[-1]["headers"]) is closes
    assert unread == [("GET", "/x", status)] * 2 * heard


@pytest.mark.parametrize(
    ("closes", "begun", "statuses"), [(True, False, [503]), (True, True, [200]), (False, False, [])]
)
async def test_what_a_server_that_leaves_cancels_is_answered_first(
    closes: bool, begun: bool, statuses: list[int]
) -> None:
    """As all errors are; and whoever cancels still hears that it has ended by that."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    house, scope = House([]), {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asked = asyncio.create_task(RequestBoundary(app, lambda *_: None, lambda: closes)(scope, stalls, house.send))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 5)
    assert [sent["status"] for sent in house.sent if "status" in sent] == statuses
    if statuses == [503]:
        told = json.loads(house.sent[-1]["body"])["error"]
        assert told["code"] == "not_ready" and "shutting down" in told["message"]
        assert {name for name, _ in house.sent[0]["headers"]} >= {b"retry-after", b"connection", b"x-request-id"}


def test_what_fails_after_its_answer_has_begun_is_not_answered_twice(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    house = House([])
    boundary = RequestBoundary(app, lambda *_: None, lambda: False)
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(boundary(scope, house.receive, house.send))
    assert [message["type"] for message in house.sent] == ["http.response.start"]
    assert "failed after its answer had begun" in caplog.text
