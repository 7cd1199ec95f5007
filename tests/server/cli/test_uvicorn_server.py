"""Invalid HTTP, connection timeouts, and the end of a drain."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState as UvicornState

from server.api.state import ServerState
from server.cli import uvicorn_server
from server.cli.checks import listen
from server.cli.uvicorn_server import Protocol, Server
from server.settings import Settings
from tests.waiting import until

REQUEST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_invalid_chunk_gets_400_unless_the_response_has_begun(sent: int) -> None:
    protocol = Protocol.__new__(Protocol)
    protocol.conn, protocol.transport = h11.Connection(h11.SERVER), Mock()
    protocol.conn.receive_data(REQUEST)
    protocol.conn.next_event()
    response = (
        h11.Response(status_code=404, headers=[(b"content-length", b"2")]),
        h11.Data(data=b"no"),
        h11.EndOfMessage(),
    )
    for event in response[:sent]:
        protocol.conn.send(event)
    protocol.conn.receive_data(b"no chunk\r\n")
    with pytest.raises(h11.RemoteProtocolError):
        protocol.conn.next_event()
    protocol.send_400_response("")
    written = b"".join(call.args[0] for call in protocol.transport.write.call_args_list)
    assert (b"invalid_http" in written) == (sent == 0) and protocol.transport.close.called


async def answer_204(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 204})
    await send({"type": "http.response.body"})


def connect(keep_alive: float) -> tuple[Protocol, Mock]:
    """A connection without a socket on the running loop, and its transport."""
    config = uvicorn.Config(answer_204, http=Protocol, ws="none", log_config=None, access_log=False)
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]
    config.load()
    connection, transport = Protocol(config, UvicornState(), {}), Mock()
    transport.get_extra_info.return_value, transport.is_closing.return_value = None, False
    transport.get_write_buffer_size.return_value = 0
    connection.connection_made(transport)
    return connection, transport


async def called(method: Mock) -> None:
    async with asyncio.timeout(10):
        while not method.called:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("then", [b"", GET[:20], b"y"])
@pytest.mark.parametrize("request_", [b"", GET, POST])
async def test_connection_without_a_complete_request_is_closed(request_: bytes, then: bytes) -> None:
    """But not while a response is being computed, even if that takes longer than the timeout."""
    connection, transport = connect(keep_alive=0.1)
    if request_:
        connection.data_received(request_)
        await asyncio.gather(*connection.tasks)
    if then:
        connection.data_received(then)
    await called(transport.close)
    calls = [name for name, *_ in transport.mock_calls]
    assert not request_ or calls.index("write") < calls.index("close")
    connection.connection_lost(None)


async def test_idle_connection_with_unread_data_is_aborted() -> None:
    connection, transport = connect(keep_alive=0.05)
    transport.get_write_buffer_size.return_value = 7
    await called(transport.abort)
    assert not transport.close.called
    connection.connection_lost(None)


async def test_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_server, "WRITE_TIMEOUT", 0.2)
    connection, transport = connect(keep_alive=60)
    connection.pause_writing()
    connection.resume_writing()  # it reads again
    await asyncio.sleep(0.4)
    assert not transport.abort.called
    connection.pause_writing()
    await called(transport.abort)
    connection.connection_lost(None)


class Unread:
    """A connection with unread response bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.transport = self

    def get_write_buffer_size(self) -> int:
        return self.size


def draining_server(drain: float) -> tuple[Server, ServerState]:
    state = ServerState(Settings(drain=drain))
    return Server(lambda *_: None, state, drain), state


async def test_drain_ends_when_earlier_requests_are_sent() -> None:
    """Requests that arrive during the drain do not delay it."""
    server, state = draining_server(30.0)
    done, later = asyncio.Event(), asyncio.Event()
    tasks, connections = server.server_state.tasks, server.server_state.connections
    tasks.add(first := asyncio.create_task(done.wait()))
    assert not await server.on_tick(1)
    state.drain()
    assert not await server.on_tick(2)
    tasks.add(second := asyncio.create_task(later.wait()))
    assert not await server.on_tick(3)
    done.set()
    await first
    tasks.discard(first)
    connections.add(client := Unread(8_000_000))  # type: ignore[arg-type]
    assert not await server.on_tick(4)
    client.size = 0
    assert await server.on_tick(5)
    later.set()
    await second


async def test_drain_ends_after_its_timeout() -> None:
    server, state = draining_server(0.01)
    server.server_state.connections.add(Unread(1))  # type: ignore[arg-type]
    assert not await server.on_tick(1)
    state.drain()
    until(lambda: state.draining_seconds > 0.01)
    assert await server.on_tick(2)


def test_keep_alive_is_longer_than_that_of_nginx() -> None:
    assert draining_server(1.0)[0].config.timeout_keep_alive > 60


@pytest.mark.parametrize("requests", [[GET], [GET, GET], [GET, POST]], ids=["one", "pipelined", "unfinished"])
def test_server_stops_although_a_client_does_not_read(
    requests: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uvicorn_server, "SHUTDOWN_TIMEOUT", 1)
    begun: list[str] = []

    async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] == "lifespan":
            for _ in ("startup", "shutdown"):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        begun.append(scope["method"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": bytes(16 << 20)})

    state = ServerState(Settings(drain=0.0))
    server = Server(app, state, 0.0)
    with listen("127.0.0.1", 0) as listener, socket.socket() as client:
        running = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        running.start()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(listener.getsockname())
        client.sendall(b"".join(requests))
        until(lambda: begun)
        state.drain()
        running.join(20)
        assert not running.is_alive()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
