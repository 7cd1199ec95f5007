"""`loramux serve` says what keeps it from starting before it fetches or packs a base."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.store import AdapterStore
from server.api.middleware import RequestBoundary
from server.api.state import ServerState
from server.cli import logs, malloc
from server.cli.options import LEFT_OUT
from server.cli.serve import _server, _sigterm_and_sigint, listen, many_files, serve, spool_in
from server.cli.signals import SAME_SIGNAL
from server.errors import BadSetting
from server.settings import Settings
from tests.waiting import until


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`serve` with flags, where a fetch of the base is a failure of the test."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("the base is fetched before what is wrong is said")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.sources.resolve_model", never)
    monkeypatch.setattr(malloc, "settle", lambda: True)
    monkeypatch.setattr("server.cli.serve.many_files", lambda: None)
    monkeypatch.setattr(logs, "configure", lambda form, level, behind: None)
    listeners = []

    def listening(host: str, port: int) -> object:
        listeners.append(listen(host, port))
        return listeners[-1]

    monkeypatch.setattr("server.cli.serve.listen", listening)

    def run(**flags: object) -> None:
        names = serve.__annotations__
        serve(**{**dict.fromkeys(names), "port": 0, **flags})

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)
    for listener in listeners:
        listener.close()


def test_keys_are_read_first(started: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="admin_keys_file cannot be read"):
        started(admin_keys_file=tmp_path / "absent")


@pytest.mark.parametrize("named", [{"device": "cuda"}, {"kernels": "cuda"}])
def test_kernels_that_are_named_are_looked_for_first(
    started: Callable[..., None], monkeypatch: pytest.MonkeyPatch, named: dict[str, str]
) -> None:
    monkeypatch.setattr("server.kernels.cuda.unavailable", lambda: "there is no GPU")
    with pytest.raises(BadSetting, match="cannot run here: there is no GPU"):
        started(**named)


def test_the_state_directory_is_looked_at_first(started: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadSetting, match="can not be written"):
        started(state_dir=tmp_path / "file")
    store = AdapterStore(tmp_path / "state" / "store")
    try:
        with pytest.raises(BadSetting, match="in use by another process"):
            started(state_dir=tmp_path / "state")
    finally:
        store.close()


@pytest.mark.parametrize("host", ["127..0.0.1", "no such host", "192.0.2.77"])
def test_what_cannot_be_listened_on_for_its_host(host: str) -> None:
    with pytest.raises(BadSetting, match=f"can not listen on {host}:0: .*--host") as e:
        listen(host, 0)
    assert e.value.param == "host"


def test_a_large_body_waits_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the parser of multipart bodies keeps it: in a temporary file that begins in memory."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    spool_in(tmp_path / "state")
    with tempfile.SpooledTemporaryFile(max_size=1) as body:
        body.write(b"two")
        assert os.readlink(f"/proc/self/fd/{body.fileno()}").startswith(str(tmp_path / "state"))


def test_a_signal_ends_what_only_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 7B takes minutes to pack, more than --drain and than whoever stops a container waits."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("server.cli.serve._end_children", lambda: ended_children.append(1))  # those of all tests
    ended_children: list[int] = []
    runtime = ServerState(Settings())
    with _sigterm_and_sigint(runtime, 30.0), pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 0 and not runtime.draining_seconds and ended_children == [1]
    runtime.state = "ready"
    with _sigterm_and_sigint(runtime, 30.0):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # make passes on what its whole group has been sent
        assert runtime.draining_seconds
        time.sleep(SAME_SIGNAL)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


class Written:
    """A connection whose client has yet to take so many bytes."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.transport = self

    def get_write_buffer_size(self) -> int:
        return self.left


def test_a_drain_ends_with_what_ran_when_it_began_and_with_what_was_written() -> None:
    """Requests that are refused meanwhile are none of those, however many come."""

    async def drained() -> None:
        runtime = ServerState(Settings())
        server = _server(Settings(), lambda *_: None, runtime)
        running, refused = asyncio.Event(), asyncio.Event()
        tasks, connections = server.server_state.tasks, server.server_state.connections
        first = asyncio.create_task(running.wait())
        tasks.add(first)
        assert not await server.on_tick(1), "it does not drain"
        runtime.drain()
        assert not await server.on_tick(2)
        tasks.add(later := asyncio.create_task(refused.wait()))
        assert not await server.on_tick(3), "one still runs"
        running.set()
        await first
        tasks.discard(first)
        connections.add(reader := Written(8_000_000))  # type: ignore[arg-type]
        assert not await server.on_tick(4), "its client has not got all of it"
        reader.left = 0
        assert await server.on_tick(5)
        refused.set()
        await later

    asyncio.run(drained())


def test_a_drain_ends_when_its_time_is_over() -> None:
    async def drained() -> None:
        runtime = ServerState(Settings(drain="10ms"))
        server = _server(runtime.settings, lambda *_: None, runtime)
        server.server_state.connections.add(Written(1))  # type: ignore[arg-type]
        runtime.drain()
        until(lambda: runtime.draining_seconds > 0.01)
        assert await server.on_tick(1)

    asyncio.run(drained())


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODILESS = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
TWO_ENDS = b"HEAD / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "asked", [[GET], [GET, GET], [GET, BODILESS], [GET, TWO_ENDS]], ids=["closed", "written", "read", "no http"]
)
def test_a_server_ends_though_a_client_does_not_read(
    asked: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it has asked for behind an answer that it leaves unread, and without a fault in the log."""
    monkeypatch.setattr("server.cli.serve.LAST_WORDS", 1)
    runtime, begun, ended = ServerState(Settings(drain=0.0)), [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in ("startup", "shutdown"):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        begun.append(scope["method"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": bytes(16 << 20)})

    server = _server(runtime.settings, RequestBoundary(app, runtime.count_refused, runtime.is_draining), runtime)

    def run() -> None:
        server.run(sockets=[listener])
        ended.append("without an exception")

    with listen("127.0.0.1", 0) as listener, socket.socket() as client:
        running = threading.Thread(target=run, daemon=True)
        running.start()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(listener.getsockname())
        client.sendall(b"".join(asked))
        refused = asked.count(TWO_ENDS)
        until(lambda: (len(begun), caplog.text.count("Invalid HTTP")) == (len(asked) - refused, refused))
        runtime.drain()
        running.join(20)
        assert not running.is_alive() and ended
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_while_the_base_is_fetched_probes_are_answered_and_a_signal_ends_all(tmp_path: Path) -> None:
    """The index is one that takes the connection and says nothing, as a proxy may."""
    with socket.create_server(("127.0.0.1", 0)) as index, socket.create_server(("127.0.0.1", 0)) as free:
        address, port = index.getsockname(), free.getsockname()[1]
        free.close()
        environment = {
            **os.environ,
            "PIP_INDEX_URL": f"http://{address[0]}:{address[1]}/",
            "PIP_CONFIG_FILE": os.devnull,
        }
        command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--state-dir", str(tmp_path)]
        with subprocess.Popen([*command, "--library", "none"], env=environment, stderr=subprocess.PIPE) as serving:
            index.settimeout(120)
            asked, _ = index.accept()
            until(lambda: _status(f"http://127.0.0.1:{port}/health/live") == 200)
            assert _status(f"http://127.0.0.1:{port}/health/ready") == 503
            serving.terminate()
            assert serving.wait(30) == 0
            asked.settimeout(30)
            while asked.recv(65536):  # until pip is gone too
                pass
            asked.close()


def test_every_line_of_a_log_in_json_is_an_object_and_an_error_is_told_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--log-format", "json"]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "OMP_DYNAMIC": "true"}
    run = subprocess.run(
        [*command, "--state-dir", str(tmp_path), "--library", "none"], env=environment, capture_output=True, timeout=120
    )
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    said = [(line["level"], line["message"]) for line in lines]
    assert run.returncode == 1 and run.stdout == b""
    assert ("warning", LEFT_OUT % "OMP_DYNAMIC") in said
    assert ("info", "fetching ...") in said
    assert [level for level, message in said if "could not be fetched" in message] == ["error"]


def _status(url: str) -> int:
    try:
        return int(httpx.get(url, timeout=5).status_code)
    except httpx.HTTPError:
        return 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1 << 20), (1 << 16, 1 << 20)),
        ((1024, resource.RLIM_INFINITY), (1 << 16, resource.RLIM_INFINITY)),
        ((1 << 17, 1 << 20), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_files_that_a_server_may_open(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int] | None
) -> None:
    told = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: before)
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: told.append(limits))
    many_files()
    assert told == ([] if after is None else [after])


@pytest.mark.parametrize(("most", "given"), [(10240, [8192]), (1500, [])])
def test_a_system_that_refuses_many_files_is_asked_for_fewer(
    monkeypatch: pytest.MonkeyPatch, most: int, given: list[int]
) -> None:
    told = []

    def refuse(what: int, limits: tuple[int, int]) -> None:
        if limits[0] > most:
            raise ValueError("current limit exceeds maximum limit")
        told.append(limits[0])

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    many_files()
    assert told == given
