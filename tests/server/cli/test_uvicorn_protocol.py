"""What is no HTTP, on a connection where the answer may have begun: one answer or none, and no exception.

And what asks for another protocol, which is answered in this one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any
from unittest.mock import Mock

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState

from server.cli.uvicorn_protocol import LOOKS, Protocol

REQUEST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answered", [0, 1, 3])
def test_what_breaks_within_a_body(answered: int) -> None:
    protocol = Protocol.__new__(Protocol)
    protocol.conn, protocol.transport = h11.Connection(h11.SERVER), Mock()
    protocol.conn.receive_data(REQUEST)
    protocol.conn.next_event()
    events = (
        h11.Response(status_code=404, headers=[(b"content-length", b"2")]),
        h11.Data(data=b"no"),
        h11.EndOfMessage(),
    )
    for event in events[:answered]:
        protocol.conn.send(event)
    protocol.conn.receive_data(b"no chunk\r\n")
    with pytest.raises(h11.RemoteProtocolError):
        protocol.conn.next_event()
    protocol.send_400_response("")
    written = b"".join(call.args[0] for call in protocol.transport.write.call_args_list)
    assert (b"invalid_http" in written) == (answered == 0) and protocol.transport.close.called


def connected(written: list[bytes]) -> tuple[Protocol, Mock]:
    """A connection without a socket, on the running loop, to an app that answers 204; and its transport."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, http=Protocol, ws="none", log_config=None, access_log=False)
    config.load()
    connection = Protocol(config, ServerState(), {})
    transport = Mock()
    transport.get_extra_info.return_value, transport.is_closing.return_value = None, False
    transport.write = written.append
    connection.connection_made(transport)
    return connection, transport


HEADS = [
    b"HEAD / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n",
    b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\nno request\r\n\r\n",
]


@pytest.mark.parametrize(("asked", "body"), [*((head, False) for head in HEADS[:2]), (HEADS[2], True)])
def test_what_is_no_http_has_a_body_in_its_answer_unless_head_was_asked(asked: bytes, body: bool) -> None:
    """And the connection is in order for its end."""
    written: list[bytes] = []

    async def ask() -> None:
        connection, transport = connected(written)
        connection.data_received(asked)
        if body:  # else the request is answered before it gets there
            await asyncio.gather(*connection.tasks)
        assert connection.conn.our_state is h11.MUST_CLOSE and transport.close.called
        connection.shutdown()
        connection.connection_lost(None)

    asyncio.run(ask())
    assert b"HTTP/1.1 400" in b"".join(written) and b"".join(written).endswith(b"}") is body


def test_a_connection_on_which_nothing_more_can_be_said_is_closed_at_the_end() -> None:
    async def end() -> None:
        connection, transport = connected([])
        connection.conn.send_failed()
        connection.shutdown()
        assert transport.close.called
        connection.connection_lost(None)

    asyncio.run(end())


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_an_upgrade_is_answered_as_if_none_was_asked_for(protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    """And costs no line of the log, which any client could fill so."""
    caplog.set_level(logging.INFO)
    written: list[bytes] = []

    async def ask() -> None:
        connection, _ = connected(written)
        asked = f"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: {protocol}\r\n\r\n"
        connection.data_received(asked.encode())
        await asyncio.gather(*connection.tasks)
        connection.connection_lost(None)

    asyncio.run(ask())
    assert b"".join(written).startswith(b"HTTP/1.1 204") and not caplog.records


HALF = b"GET / HTTP/1.1\r\nHost: loc"
WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
REFUSED = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    ("asked", "then"),
    [
        (b"", b""),
        (b"", HALF),
        (WHOLE, b""),
        (WHOLE, HALF),
        (REFUSED, b""),
        (REFUSED, b"y"),
    ],
)
def test_a_connection_that_asks_for_nothing_more_is_closed(asked: bytes, then: bytes) -> None:
    """And none while its answer is made, however long that takes: what is asked is answered before it is closed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def ask() -> None:
        config = uvicorn.Config(app, http=Protocol, ws="none", log_config=None, access_log=False)
        config.timeout_keep_alive = 0.1  # type: ignore[assignment]
        config.load()
        connection = Protocol(config, ServerState(), {})
        transport = Mock()
        transport.get_extra_info.return_value = None
        transport.is_closing.return_value = False
        connection.connection_made(transport)
        if asked:
            connection.data_received(asked)
            await asyncio.gather(*connection.tasks)
        if then:
            connection.data_received(then)
        for _ in range(500):
            if transport.close.called:
                break
            await asyncio.sleep(0.01)
        done = [name for name, *_ in transport.mock_calls]
        assert "close" in done
        assert not asked or done.index("write") < done.index("close")
        connection.connection_lost(None)

    asyncio.run(ask())


class Reader:
    """A transport whose client takes, at each of the connection's looks, the next of so many bytes."""

    def __init__(self, connection: Protocol, takes: list[int]) -> None:
        self.connection, self.takes, self.left = connection, list(takes), 1_000_000
        self.looked, self.closing, self.aborted = 0, False, asyncio.Event()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        self.looked += 1
        self.left -= self.takes.pop(0) if self.takes else 0
        return self.left

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted.set()
        self.connection.connection_lost(None)


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize(
    ("takes", "looks"), [([], 1 + LOOKS), ([0, *[0, 1] * 3], 7 + LOOKS), ([0] * LOOKS + [1], 1 + 2 * LOOKS)]
)
def test_a_client_that_takes_nothing_of_its_answers_is_cut_and_one_that_is_slow_is_not(
    takes: list[int], looks: int, closing: bool
) -> None:
    """Whoever writes to it waits, or it is to be closed once all is written: in either case for ever. What one reads
    steadily its system may take in a piece, every few minutes.
    """

    async def answered() -> None:
        config = uvicorn.Config(lambda: None, http=Protocol, ws="none", log_config=None, access_log=False)
        config.timeout_keep_alive = 0.01  # type: ignore[assignment]
        config.load()
        connection = Protocol(config, ServerState(), {})
        client = Reader(connection, takes)
        connection.connection_made(client)  # type: ignore[arg-type]
        if closing:
            client.close()
        else:
            connection._expected()  # it has asked for something
            connection.pause_writing()
        await asyncio.wait_for(client.aborted.wait(), 10)
        assert client.looked == looks

    asyncio.run(answered())


def test_a_stream_that_is_taken_between_two_looks_goes_on() -> None:
    """Though as much waits again at the second one."""

    async def answered() -> None:
        config = uvicorn.Config(lambda: None, http=Protocol, ws="none", log_config=None, access_log=False)
        config.load()
        connection = Protocol(config, ServerState(), {})
        client = Reader(connection, [])
        connection.connection_made(client)  # type: ignore[arg-type]
        for _ in range(2 * LOOKS):
            connection.pause_writing()
            connection._look()
            connection.resume_writing()
        assert client.looked == 2 * LOOKS and not client.aborted.is_set()
        connection.connection_lost(None)

    asyncio.run(answered())


def test_what_the_system_holds_for_a_client_is_not_taken_yet() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Protocol.__new__(Protocol)
        connection.transport = Mock()
        connection.transport.get_extra_info.return_value = ours
        connection.transport.get_write_buffer_size.return_value = 7
        assert connection._left() == 7
        ours.send(b"x" * 1000)
        held = connection._left()
        theirs.recv(1000)
        assert held > 7 == connection._left()
    assert connection._left() == 7, "it is closed"
