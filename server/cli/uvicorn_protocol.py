"""uvicorn's HTTP protocol, with the one error that it answers by itself in the shape of all others, no upgrades, and a
time within which a connection has to ask for something, or take something of what it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import sys
import termios
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import INVALID_HTTP, ErrorReply
from server.api.middleware import new_request_id

Event = Any
"""h11's; NEED_DATA and PAUSED are types of their own."""
PIECES, PIECE = 1024, 64
"""Chunks of a body that may be as small as they like, and the bytes that more of them have on average, at least."""
PIPELINED = 65536
"""Bytes after a request that are read while it is answered."""
LOOKS = 8
"""Looks in a row, each as far apart as a connection may be idle, at which a client has taken nothing: it is cut then.
Where its system's buffers are full they ask for more only once a good part of them is read, which of a slow client
takes minutes."""

log = logging.getLogger(__name__)


class Protocol(H11Protocol):
    """What is no HTTP at all reaches no route, and is answered here; the connection is closed then.

    Within a body whose request is being answered, or has been, it is too late for that. And a connection on which no
    request's headers are complete for as long as one may be idle is closed: uvicorn closes those alone that have been
    silent since an answer, and a client without a key could hold every file that the process may open. For the same
    reason one is cut whose client takes nothing of its answers for `LOOKS` times as long, and none that is only slow.
    """

    _unasked: asyncio.TimerHandle | None = None
    _looks: asyncio.TimerHandle | None = None
    _untaken: int | None = None
    """Bytes that the client had yet to take at the last look, if all who write have waited for it since."""
    _in_vain = 0
    """Looks in a row that found nothing taken."""
    _bodiless = False
    """Whether HEAD is asked: a body in its answer is no HTTP, of which nothing more could be said on the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn.next_event = _checked(self.conn.next_event, self._asked)  # type: ignore[method-assign]
        self._expect()
        self._looks = self.loop.call_later(self.timeout_keep_alive, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expected()
        if self._looks is not None:
            self._looks.cancel()
            self._looks = None

    def _asked(self, method: bytes) -> None:
        self._bodiless = method == b"HEAD"

    def shutdown(self) -> None:
        """Where nothing more can be said uvicorn's own raises, and the server would end without its last words to all
        others.
        """
        if self.conn.our_state is h11.ERROR:
            self.transport.close()
        else:
            super().shutdown()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._untaken = None

    def _look(self) -> None:
        """Cut the connection if its client has taken nothing for `LOOKS` looks, in all of which nothing was added.

        It has read nothing then, or too little for its system to ask for more.
        """
        full = self.flow.write_paused or self.transport.is_closing()
        left = self._left() if full else None
        taken = left is None or self._untaken is None or left < self._untaken
        self._in_vain = 0 if taken else self._in_vain + 1
        if self._in_vain >= LOOKS:
            log.info("a client takes nothing of its answer any more; its connection is cut")
            self._looks = None
            self.transport.abort()
            return
        self._untaken = left
        self._looks = self.loop.call_later(self.timeout_keep_alive, self._look)

    def _left(self) -> int:
        """Bytes that the client has yet to take. The system holds megabytes of them, and takes more from us only when
        a third of these is gone: by the buffer here, a slow client would seem to be none.
        """
        held = bytearray(4)
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError, ValueError):  # it may be closed by now
                fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, held)
        return self.transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    def on_response_complete(self) -> None:
        self._expect()
        super().on_response_complete()  # which may find the next request at once

    def _expect(self) -> None:
        self._expected()
        self._unasked = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _expected(self) -> None:
        if self._unasked is not None:
            self._unasked.cancel()
            self._unasked = None

    def handle_events(self) -> None:
        """What a client sends on after a request waits in the connection until that is answered. uvicorn reads no more
        meanwhile, and would not hear that the client has gone away; up to a bound, reading goes on.
        """
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:  # else what comes is the rest of a refused body
            self._expected()
        waits = self.flow.read_paused and self.conn.their_state is h11.DONE
        if waits and len(self.conn.trailing_data[0]) <= PIPELINED:
            self.flow.resume_reading()

    def _should_upgrade(self) -> bool:
        """Never: the request is answered as if it asked for none. uvicorn's own logs advice to install WebSockets."""
        return False

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        request_id = new_request_id()
        # The rest of the message quotes what was sent, which may be a key or a prompt.
        reason = str(sys.exc_info()[1]).partition(": b")[0]
        log.info("request %s is no HTTP: %.200s", request_id, reason, extra={"request_id": request_id})
        body = ErrorReply(400, "this is no HTTP request: it cannot be read", code=INVALID_HTTP).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        data = h11.Data(data=b"" if self._bodiless else body)
        for event in (h11.Response(status_code=400, headers=headers), data, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _checked(next_event: Callable[[], Event], asked: Callable[[bytes], None]) -> Callable[[], Event]:
    """`next_event` of a connection whose bodies have one end, and come in pieces worth their while. `asked` hears each
    request's method, and once all of that has come, an empty one.

    Of a body with a length and chunks too (RFC 9112, 6.1), or with chunks in HTTP/1.0, a proxy in between may see
    another end, and let pass as a part of the body what is the next request here. And each piece is an event of its
    own, which takes as long as some kilobytes do: a client without a key could keep all others waiting by chunks of a
    byte.
    """
    pieces = size = 0

    def checked() -> Event:
        nonlocal pieces, size
        event = next_event()
        if isinstance(event, h11.Request):
            pieces = size = 0
            asked(event.method)
            named = {name for name, _ in event.headers}
            if b"transfer-encoding" in named and (b"content-length" in named or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("where the body ends is told twice, or in chunks to HTTP/1.0")
        elif isinstance(event, h11.Data):
            pieces, size = pieces + 1, size + len(event.data)
            if pieces > PIECES and size < pieces * PIECE:
                raise h11.RemoteProtocolError(f"chunks of less than {PIECE} bytes on average are too many")
        elif isinstance(event, h11.EndOfMessage):
            asked(b"")
        return event

    return checked
