"""uvicorn's HTTP protocol, with the one error that it answers by itself in the shape of all others, and no upgrades."""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import Answer

PIPELINED = 65536
"""Bytes after a request that are read while it is answered."""


class Protocol(H11Protocol):
    """What is no HTTP at all reaches no route, and is answered here; the connection is closed then.

    Within a body whose request is being answered, or has been, it is too late for that.
    """

    def handle_events(self) -> None:
        """What a client sends on after a request waits in the connection until that is answered. uvicorn reads no more
        meanwhile, and would not hear that the client has gone away; up to a bound, reading goes on.
        """
        super().handle_events()
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
        body = Answer(400, "this is no HTTP request: it cannot be read", code="invalid_http").encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
