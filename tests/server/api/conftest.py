"""A real server over the tiny base, on a free port, with adapters and a task; and a runner that can be slowed."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import server.app
from adapters.directory_watcher import DirectoryWatcher
from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.api import startup
from server.api.startup import RunningServer, build
from server.api.state import ServerState
from server.app import create_app
from server.cli.uvicorn_protocol import Protocol
from server.model.loader import Base
from server.settings import Settings
from tests.waiting import SECONDS

TASK = {
    "task": "mood",
    "format": "chat",
    "prompt": "Is it good?\n\n{input}",
    "labels": ["good", "bad", "goodish"],
    "defaults": {"max_tokens": 6, "temperature": 0.0},
}


class Live:
    """A running server: `http` is a client of it, `runtime` its inside."""

    def __init__(self, runtime: ServerState, port: int) -> None:
        self.runtime = runtime
        self.app: Any = None
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.delay = 0.0
        self.stop: Callable[[], None] = lambda: None

    @property
    def house(self) -> RunningServer:
        assert isinstance(self.runtime.house, RunningServer)
        return self.runtime.house

    def generate(self, prompt: str = "hello there", task: str | None = None, **fields: Any) -> httpx.Response:
        query = {} if task is None else {"task": task}
        return self.http.post("/generate", params=query, json={"prompt": prompt, **fields})

    def stats(self) -> dict[str, Any]:
        return self.house.parts.engine.stats()

    def slow_down(self, seconds: float) -> None:
        """Let each step take so much longer."""
        runner: Any = self.house.parts.runner
        run = runner.run

        def slow(batch: Any) -> Any:
            time.sleep(self.delay)
            return run(batch)

        if not self.delay:
            runner.run = slow
        self.delay = seconds

    def idle(self, seconds: float = SECONDS) -> bool:
        """Wait until nothing runs, waits or is leased."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.stats()
            leases = self.house.parts.registry.memory()["leases"]
            if not (stats["running"] or stats["waiting"] or leases or self.house.parts.inference.live):
                return True
            time.sleep(0.01)
        return False


class Uvicorn(uvicorn.Server):
    """uvicorn's own looks ten times a second whether it is to end, and waits for a tenth at its end whatever there is.

    With a server a test that is most of the time of many. This one ends as soon as it can once it is told to.
    """

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in self.servers:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.005)
        await self.lifespan.shutdown()


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """`app` on a free port, by uvicorn, on a thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    server = Uvicorn(uvicorn.Config(app, http=Protocol, port=port, log_level="warning", lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield port
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server does not end"


def wait_ready(client: httpx.Client) -> None:
    for _ in range(1000):
        if client.get("/health/ready").status_code == 200:
            return
        time.sleep(0.005)
    raise AssertionError("the server does not get ready")


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's watch looks ten times a second, at folders that have been still, and are gone, after some tenths."""
    monkeypatch.setattr("adapters.directory_watcher.GONE_SECONDS", 0.3)
    monkeypatch.setattr(startup, "DirectoryWatcher", partial(DirectoryWatcher, interval=0.1, still=0.2))


@pytest.fixture
def idle_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's watch looks once, at the start: what a test puts out of memory it would take in again."""
    monkeypatch.setattr(startup, "DirectoryWatcher", partial(DirectoryWatcher, interval=3600.0))


Start = Callable[..., Live]


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def write_adapter(tiny_adapter: Callable[..., LoraWeights], adapter_dir: Path) -> Callable[..., Path]:
    """`write_adapter(name, seed, task=None, **shape)`: a PEFT folder inside the adapter directory."""

    def write(name: str, seed: int, task: dict[str, Any] | None = None, **shape: Any) -> Path:
        folder = adapter_dir / name
        folder.mkdir(exist_ok=True)
        save(tiny_adapter(seed, **shape), folder, task=task)
        return folder

    return write


@pytest.fixture
def start(tmp_path: Path, adapter_dir: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start(**settings)`: a live server over the tiny base. Everything is taken down at the end."""
    monkeypatch.setattr(
        server.app,
        "load_and_build",
        lambda settings, metrics, mailbox, find: build(settings, tiny_base, metrics, mailbox),
    )
    running: list[Live] = []

    def begin(ready: bool = True, **given: Any) -> Live:
        settings = Settings(
            **{
                "state_dir": tmp_path / "state",
                "adapter_dir": adapter_dir,
                "library": None,
                "kv_cache": 8 << 20,
                "threads": 1,
                "adapter_ram": 64 << 20,
                "drain": 2.0,
                **given,
            }
        )
        app = create_app(settings)
        context = serving(app)
        live = Live(app.state.runtime, context.__enter__())
        live.app = app
        running.append(live)

        def stop() -> None:
            if live in running:
                running.remove(live)
                live.delay = 0.0
                live.http.close()
                context.__exit__(None, None, None)

        live.stop = stop
        if ready:
            wait_ready(live.http)
        return live

    yield begin
    for live in list(running):
        live.stop()


@pytest.fixture
def live(start: Start, write_adapter: Callable[..., Path]) -> Live:
    """A server with the adapters a, b and mood, of which mood brings a task."""
    write_adapter("a", 1)
    write_adapter("b", 2, rank=3)
    write_adapter("mood", 3, task=TASK)
    live = start()
    for name in ("a", "b", "mood"):
        if name not in live.house.parts.registry.names():
            answer = live.http.post("/adapters", json={"name": name, "source": name})
            assert answer.status_code in (200, 201), answer.text
    return live


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events, parsed; the closing mark as it is."""
    found = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [data if data == "[DONE]" else json.loads(data) for data in found]
