"""ASGI middleware around every request: request id, error responses, access log, body limits.

It is plain ASGI because Starlette's `BaseHTTPMiddleware` hides client disconnects from the routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_responses import ALWAYS
from server.api.errors import INVALID_HTTP, ErrorReply, error_reply, is_openai
from server.errors import SHUTTING_DOWN, BodyTooLarge, BodyTooSlow, NotReady, ServerError

log = logging.getLogger(__name__)

MAX_DISCARDED = 64 << 20
"""Bytes of a refused body that are read and discarded: a client that still sends does not read the answer."""
DISCARD_SECONDS = 20.0
CLIENT_CLOSED = 499
"""Status in the access log of a request whose client disconnected, as in nginx."""
BYTES_PER_SECOND = 16 << 10
"""A client gets one more second for each so many bytes of its body."""
MAX_KEYS = 1 << 18
"""Most object keys in a JSON body. Parsing and validating them blocks the event loop: about 300 a millisecond."""
_KEY = re.compile(rb'"[\s\0]*:')  # \0 because JSON may be UTF-16
UPLOADS = {"POST": re.compile("/adapters|/v1/files"), "PUT": re.compile("/adapters/[^/]+")}
"""Routes with the limit of uploads. Multipart bodies on other routes have the limit of JSON bodies."""
_CLOSE = (b"connection", b"close")
TWO_LENGTHS = ErrorReply(
    400,
    "send either Content-Length or Transfer-Encoding, not both",
    code=INVALID_HTTP,
    headers={"connection": "close"},
)


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


class RequestBoundary:
    """Outermost middleware: request id, error responses for exceptions, access log, HEAD as GET.

    While the server drains, responses close their connection, and a request that uvicorn cancels is answered with 503.

    Args:
        on_refused: called with method, path and status of requests that the middleware refused.
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
            scope = {**scope, "method": "GET"}  # uvicorn still leaves out the body
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        status, disconnected, start = 0, False, time.monotonic()

        async def receive_noting_disconnect() -> Message:
            nonlocal disconnected
            message = await receive()
            disconnected = disconnected or (not status and message["type"] == "http.disconnect")
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self.is_draining() and _CLOSE not in message["headers"]:
                    message["headers"].append(_CLOSE)
            await send(message)

        try:
            if _has_two_lengths(scope):
                await send_reply(TWO_LENGTHS, scope, send_with_headers)
            else:
                await self.app(scope, receive_noting_disconnect, send_with_headers)
        except ClientDisconnect:
            log.info("request %s: the client disconnected", request_id, extra={"request_id": request_id})
        except asyncio.CancelledError:
            if self.is_draining() and not status:
                await send_error(NotReady(SHUTTING_DOWN, retry_after=2.0), scope, send_with_headers)
            raise
        except Exception as error:
            if status:
                log.exception(
                    "request %s failed after its response began", request_id, extra={"request_id": request_id}
                )
                raise
            await send_reply(error_reply(error, request_id, openai=is_openai(scope["path"])), scope, send_with_headers)
        finally:
            if status in ALWAYS:
                self.on_refused(scope["method"], scope["path"], status)
            if self.access_log:
                _log_access(scope, CLIENT_CLOSED if disconnected or not status else status, start)


def _has_two_lengths(scope: Scope) -> bool:
    """Whether a body has both a length and chunks. A proxy may see another end of it: request smuggling."""
    return {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}


def _log_access(scope: Scope, status: int, start: float) -> None:
    ms = (time.monotonic() - start) * 1000
    state = scope["state"]
    fields = {key: state[key] for key in ("request_id", "tenant", "code") if state.get(key)}
    fields |= {"method": scope["method"], "path": scope["path"], "status": status, "ms": ms}
    log.info("%s %r %d %.1f ms %s", scope["method"], scope["path"], status, ms, state["request_id"], extra=fields)


class BodyLimit:
    """Limits the size of bodies and the time to receive them. JSON bodies are read before the route runs."""

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int, body_time: float) -> None:
        self.app = app
        self.max_body = max_body
        self.max_upload = max_upload
        self.body_time = body_time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif _is_upload(scope):
            await self._stream_upload(scope, receive, send)
        else:
            await self._read_body(scope, receive, send)

    async def _read_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, then run the application with it."""
        receive_in_time = with_time_limit(receive, self.body_time)
        messages: list[Message] = []
        try:
            size = _content_length(scope)
            if size > self.max_body:
                await discard_body(receive)
                raise _too_large(self.max_body, "--max-body")
            size = 0
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive_in_time())
                if messages[-1]["type"] == "http.disconnect":
                    return
                size += len(messages[-1].get("body", b""))
                if size > self.max_body:
                    if messages[-1].get("more_body"):
                        await discard_body(receive)
                    raise _too_large(self.max_body, "--max-body")
            if sum(len(_KEY.findall(message.get("body", b""))) for message in messages) > MAX_KEYS:
                raise BodyTooLarge(f"the body has more than {MAX_KEYS:,} keys; split it, or upload a file instead")
        except ServerError as error:
            await send_error(error, scope, send)
            return
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _stream_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, which reads the body itself. What it leaves unread is discarded before it answers."""
        if _content_length(scope) > self.max_upload:
            await discard_body(receive)
            await send_error(_too_large(self.max_upload, "--max-upload"), scope, send)
            return
        receive_in_time = with_time_limit(receive, self.body_time)
        size, unread = 0, True

        async def receive_limited() -> Message:
            nonlocal size, unread
            unread = False  # after an error below the rest is not read
            message = await receive_in_time()
            size += len(message.get("body", b""))
            more = bool(message.get("more_body"))
            if size > self.max_upload:
                if more:
                    await discard_body(receive)
                raise _too_large(self.max_upload, "--max-upload")
            unread = more
            return message

        async def send_after_body(message: Message) -> None:
            nonlocal unread
            if unread and message["type"] == "http.response.start":
                unread = False
                await discard_body(receive)
            await send(message)

        await self.app(scope, receive_limited, send_after_body)


async def send_error(error: ServerError, scope: Scope, send: Send) -> None:
    """Send the error response for an exception."""
    await send_reply(error_reply(error), scope, send)


async def send_reply(reply: ErrorReply, scope: Scope, send: Send) -> None:
    scope.setdefault("state", {})["code"] = reply.code
    body = reply.encode()
    headers = [(name.encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def discard_body(receive: Receive) -> None:
    """Read and discard the rest of a body, up to MAX_DISCARDED bytes and DISCARD_SECONDS."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while size <= MAX_DISCARDED:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                size += len(message.get("body", b""))


def with_time_limit(receive: Receive, seconds: float) -> Receive:
    """A `receive` that waits for the body at most `seconds` in total, plus one second per BYTES_PER_SECOND received.

    Only the time inside `receive` counts. It raises BodyTooSlow.
    """
    left, more = seconds, True

    async def receive_in_time() -> Message:
        nonlocal left, more
        if not more:
            return await receive()
        start = time.monotonic()
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow("the body arrives too slowly (--body-time); send it without pauses") from None
        left += len(message.get("body", b"")) / BYTES_PER_SECOND - (time.monotonic() - start)
        more = bool(message.get("more_body"))
        return message

    return receive_in_time


def _is_upload(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    if not kind.lower().startswith(b"multipart/form-data") or scope["method"] not in UPLOADS:
        return False
    return UPLOADS[scope["method"]].fullmatch(scope["path"]) is not None


def _content_length(scope: Scope) -> int:
    """The declared length of the body, 0 if there is none."""
    value = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(value) if value.isdigit() else 0


def _too_large(limit: int, flag: str) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes ({flag})")
