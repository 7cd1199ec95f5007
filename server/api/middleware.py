"""Middleware around every request: its id, its errors, how large its body may be and how slow. Plain ASGI throughout.

`BaseHTTPMiddleware` would hide a client's disconnect from the routes, and with it the moment to stop working.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import islice

from starlette.requests import ClientDisconnect

from server.api.error_responses import ALWAYS
from server.api.errors import Answer, answer, is_openai
from server.api.types import ASGIApp, Message, Receive, Scope, Send
from server.errors import SHUTTING_DOWN, BodyTooLarge, BodyTooSlow, NotReady

log = logging.getLogger(__name__)

DRAINED = 64 << 20
"""Bytes of a refused body that are read and thrown away, so that the client gets to see the answer."""
DRAIN_SECONDS = 20.0
GONE = 499
"""The status of a request whose client has left, in the log for machines: that of nginx, as HTTP has none."""
PACE = 16 << 10
"""Bytes of a body that buy its client a second more: slower than any line, and faster than who means to be slow."""
MAX_KEYS = 1 << 18
"""Of all objects in a JSON body. Nobody else is answered while they are read and checked, at some 300 a millisecond."""
_KEY = re.compile(rb'(?<!\\)(?:\\\\)*"[\s\0]*:')  # no quotation mark within a text, and as UTF-16 has it too
UPLOADS = {"POST": re.compile("/adapters|/v1/files"), "PUT": re.compile("/adapters/[^/]+")}
"""The routes that take files. A body that says so elsewhere is read whole, and held to what that may be."""
_CLOSE = (b"connection", b"close")


def new_request_id() -> str:
    """An id by which the log knows a request, and its client too."""
    return f"req-{uuid.uuid4().hex}"


class RequestBoundary:
    """Outermost: gives the request its id and turns whatever escaped into an answer. HEAD is GET without the body.

    `unread` hears of each request that the middleware refuses: method, path and status. Once it `closes` each answer
    is its connection's last, so that the client's next request finds another server; and what the server then cancels
    because it waits no longer is answered first, if it has no answer yet. One before which a client was never told to
    go on (`Expect: 100-continue`) is its connection's last too: it may send that body all the same, or a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_refused: Callable[[str, str, int], None],
        is_draining: Callable[[], bool],
        access_log: bool = False,
    ) -> None:
        self.app = app
        self.on_refused = on_refused
        self.is_draining = is_draining
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # a copy: the server itself leaves the body of the answer out
        if scope["path"].lower().startswith(("http://", "https://")):  # RFC 9112, 3.2.2: as one asks through a proxy
            scope = {**scope, "path": "/" + scope["path"].partition("://")[2].partition("/")[2]}
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        header, named_so = (b"x-request-id", request_id.encode()), {"request_id": request_id}
        status, gone = 0, False
        start = time.monotonic()

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (not status and message["type"] == "http.disconnect")
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
                last = self.is_draining() or _withholds(scope)
                if last and _CLOSE not in message["headers"]:
                    message["headers"].append(_CLOSE)
            await send(message)

        try:
            await self.app(scope, heard, named)
        except ClientDisconnect:
            log.info("request %s: its client left before it could be answered", request_id, extra=named_so)
        except asyncio.CancelledError:
            if self.is_draining() and not status:
                late = answer(NotReady(SHUTTING_DOWN, retry_after=2.0))
                await refuse(late, scope, receive, named, more=False)
            raise
        except Exception as error:
            if status:
                log.exception("request %s failed after its answer had begun", request_id, extra=named_so)
                raise
            await refuse(answer(error, request_id, openai=is_openai(scope["path"])), scope, receive, named, more=False)
        finally:
            if status in ALWAYS:
                self.on_refused(scope["method"], scope["path"], status)
            if self.access_log:
                took = (time.monotonic() - start) * 1000
                asked = {"method": scope["method"], "path": scope["path"]}
                gone = gone or not status
                told = (*asked.values(), "gone" if gone else status, took, request_id)
                more = {key: scope["state"][key] for key in ("tenant", "code") if scope["state"].get(key)}
                more |= {"status": GONE if gone else status, "ms": took}
                log.info("%s %r %s %.1f ms %s", *told, extra={**named_so, **asked, **more})


class BodyLimit:
    """Reads a JSON body whole before the routes see it, and counts an upload while it streams. Waits for neither longer
    than `body_time` seconds lets it.
    """

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int, body_time: float) -> None:
        self.app = app
        self.max_body = max_body
        self.max_upload = max_upload
        self.body_time = body_time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = _is_upload(scope)
        limit = self.max_upload if upload else self.max_body
        declared = _content_length(scope)
        if declared is not None and declared > limit:
            await refuse(answer(_too_large(limit, upload)), scope, receive, send)
        elif upload:
            body = _Streamed(scope, receive, send, limit, self.body_time)
            await self.app(scope, body.receive, body.send)
        else:
            await self._whole(scope, receive, send, limit)

    async def _whole(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        kept = patient(receive, self.body_time)
        try:
            first = await kept()
            messages, size = [first], len(first.get("body", b""))
            while messages[-1]["type"] == "http.request" and messages[-1].get("more_body") and size <= limit:
                messages.append(await kept())
                size += len(messages[-1].get("body", b""))
        except BodyTooSlow as error:
            await refuse(answer(error), scope, receive, send, more=False)
            return
        if messages[-1]["type"] == "http.disconnect":
            return
        if size > limit:
            rest = bool(messages[-1].get("more_body"))
            await refuse(answer(_too_large(limit, False)), scope, receive, send, more=rest)
            return
        if _keys(messages) > MAX_KEYS:
            many = BodyTooLarge(f"the body has over {MAX_KEYS:,} keys; send less at a time, or what is long as a file")
            await refuse(answer(many), scope, receive, send, more=False)
            return
        messages.reverse()

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replayed, send)


async def refuse(reply: Answer, scope: Scope, receive: Receive, send: Send, more: bool = True) -> None:
    """Answer, after the rest of the body was read and thrown away: a client that still writes never reads.

    One that asks first whether it may send its body (`Expect: 100-continue`) hears at once that it may not. To read
    would tell it to.
    """
    scope.setdefault("state", {})["code"] = reply.code
    body = reply.encode()
    headers = [(name.encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if more and not _withholds(scope):
        await _drain(receive)
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _withholds(scope: Scope) -> bool:
    """Whether the client keeps its body back until it is told to go on, which it has not been."""
    return bool(scope.get("state", {}).get("withholds", bool)())


async def _drain(receive: Receive) -> None:
    size = 0
    with contextlib.suppress(TimeoutError):  # a client this slow gets its answer all the same
        async with asyncio.timeout(DRAIN_SECONDS):
            while size <= DRAINED:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                size += len(message.get("body", b""))


class _Streamed:
    """An upload, counted while a route reads it, and its answer. What a route that refuses it has left of the body is
    read and thrown away before, as `refuse` does: a connection that is closed then would be reset, and the answer lost.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int, seconds: float) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._patient = patient(receive, seconds)
        self._limit, self._size = limit, 0
        self._rest = True
        """Whether more of the body may come that is worth waiting for."""

    async def receive(self) -> Message:
        """Raises BodyTooLarge, BodyTooSlow."""
        self._rest = False  # of who is too slow, or sends too much, no more is waited for
        message = await self._patient()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            if message.get("more_body"):
                await _drain(self._receive)
            raise _too_large(self._limit, True)
        self._rest = bool(message.get("more_body"))
        return message

    async def send(self, message: Message) -> None:
        """The first part of an answer waits for the rest of the body."""
        rest, self._rest = self._rest, False
        if rest and message["type"] == "http.response.start" and not _withholds(self._scope):
            await _drain(self._receive)
        await self._send(message)


def patient(receive: Receive, seconds: float) -> Receive:
    """`receive` of a client that is waited for `seconds` in all within its body, and one more for each PACE bytes that
    have come. Time between two calls is not the client's. Raises BodyTooSlow.
    """
    left, more = seconds, True

    async def waiting() -> Message:
        nonlocal left, more
        if not more:
            return await receive()
        begun = time.monotonic()
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow("the body takes too long to arrive (--body-time); send it in one go") from None
        left += len(message.get("body", b"")) / PACE - (time.monotonic() - begun)
        more = bool(message.get("more_body"))
        return message

    return waiting


def _is_upload(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    multipart = bool(kinds) and kinds[0].lower().startswith(b"multipart/form-data")
    return multipart and scope["method"] in UPLOADS and bool(UPLOADS[scope["method"]].fullmatch(scope["path"]))


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _keys(messages: Sequence[Message]) -> int:
    """What looks like keys in a JSON body, if they might be too many."""
    parts = [message.get("body", b"") for message in messages]
    if sum(part.count(b":") for part in parts) <= MAX_KEYS:
        return 0
    found = 0
    for part in parts:
        found += sum(1 for _ in islice(_KEY.finditer(part), MAX_KEYS + 1 - found))
    return found


def _too_large(limit: int, upload: bool) -> BodyTooLarge:
    flag = "--max-upload" if upload else "--max-body"
    return BodyTooLarge(f"the body is larger than {limit} bytes ({flag})")
