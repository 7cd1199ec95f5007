"""uvicorn with loramux's error format, timeouts for idle and stalled clients, and draining at shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import INVALID_HTTP, ErrorReply
from server.api.middleware import new_request_id

if TYPE_CHECKING:
    from server.api.state import ServerState

KEEP_ALIVE = 75
"""Seconds before an idle connection is closed. Longer than nginx keeps its upstream connections (60 s)."""
WRITE_TIMEOUT = 600.0
"""Seconds after which a connection is cut if the client does not read its response."""
SHUTDOWN_TIMEOUT = 5
"""Seconds for remaining responses to be sent at shutdown."""
CUT_BEFORE_END = 0.5
"""Connections whose clients do not read are cut this long before `SHUTDOWN_TIMEOUT` ends."""

log = logging.getLogger(__name__)


class Protocol(H11Protocol):
    """HTTP/1.1 with a 400 in loramux's JSON format for invalid requests, and two timeouts that uvicorn does not have.

    - A connection must send a complete request head within `KEEP_ALIVE` seconds. Otherwise clients without a key could
      use up all open files.
    - A client must read its response within `WRITE_TIMEOUT` seconds.
    """

    _request_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_request_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_request_timer()
        self._cancel_write_timer()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_request_timer()

    def on_response_complete(self) -> None:
        self._start_request_timer()
        super().on_response_complete()  # may start the next request

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait for the client
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_write_timer()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response has begun
            self.transport.close()
            return
        request_id = new_request_id()
        reason = str(sys.exc_info()[1]).partition(": b")[0]  # the rest quotes the request, which may hold secrets
        log.info("request %s is invalid HTTP: %.200s", request_id, reason, extra={"request_id": request_id})
        body = ErrorReply(400, "The request is not valid HTTP.", code=INVALID_HTTP).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _cut(self) -> None:
        log.info("a client does not read its response; the connection is cut")
        self.transport.abort()

    def _start_request_timer(self) -> None:
        self._cancel_request_timer()
        self._request_timer = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _cancel_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class Server(uvicorn.Server):
    """A server that keeps listening while it drains, so that new requests and probes get a 503.

    It stops when the requests that ran at the start of the drain are finished and sent, or after `drain` seconds.
    """

    def __init__(self, app: Any, state: ServerState, drain: float) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=Protocol,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        super().__init__(config)
        self._state, self._drain = state, drain
        self._unfinished: set[Any] | None = None
        """Requests that ran when the drain began and have not finished."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`: uvicorn would end the process with the signal."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second; returns whether to stop."""
        if self._state.draining_seconds >= self._drain and self._state.draining_seconds:
            self._state.abort_requests()
            self.should_exit = True
        elif self._state.draining_seconds:
            running = self.server_state.tasks
            self._unfinished = set(running) if self._unfinished is None else self._unfinished & running
            if not self._unfinished and not any(map(_unsent, self.server_state.connections)):
                self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Send the last responses. Clients that do not read are cut off before the timeout."""
        cut = asyncio.get_running_loop().call_later(SHUTDOWN_TIMEOUT - CUT_BEFORE_END, self._cut_unread)
        await super().shutdown(sockets)
        cut.cancel()

    def _cut_unread(self) -> None:
        for connection in list(self.server_state.connections):
            if _unsent(connection):
                connection.transport.abort()


def _unsent(connection: Any) -> int:
    """Response bytes that the client has not read."""
    return int(connection.transport.get_write_buffer_size())
