"""A real server over the tiny base on a free port, with adapters and a task."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import server.app
from adapters.directory_watcher import DirectoryWatcher
from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.api.startup import build
from server.api.state import ServerState, Services
from server.app import create_app
from server.cli.uvicorn_server import Protocol
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
    """A running server. `http` is a client for it; `services` are its parts."""

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        self.state: ServerState = app.state.server
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.delay = 0.0
        self.stop: Callable[[], None] = lambda: None

    @property
    def services(self) -> Services:
        assert self.state.services is not None, "the server is not loaded"
        return self.state.services

    def generate(self, prompt: str = "hello there", task: str | None = None, **fields: Any) -> httpx.Response:
        query = {} if task is None else {"task": task}
        return self.http.post("/generate", params=query, json={"prompt": prompt, **fields})

    def stats(self) -> dict[str, Any]:
        return self.services.engine.stats()

    def slow_down(self, seconds: float) -> None:
        """Make every step take this much longer."""
        runner: Any = self.services.runner
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
            leases = self.services.registry.memory()["leases"]
            if not (stats["running"] or stats["waiting"] or leases or self.services.inference.live):
                return True
            time.sleep(0.01)
        return False


class Uvicorn(uvicorn.Server):
    """A uvicorn server that stops at once. The original polls every 0.1 s, which dominates short tests."""

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
    """Serve `app` with uvicorn on a thread and a free port; yields the port."""
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
        assert not thread.is_alive(), "the server does not stop"


def wait_ready(client: httpx.Client) -> None:
    for _ in range(1000):
        if client.get("/health/ready").status_code == 200:
            return
        time.sleep(0.005)
    raise AssertionError("the server does not become ready")


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory watcher waits tenths of a second for folders to settle."""
    monkeypatch.setattr("adapters.directory_watcher.STILL_SECONDS", 0.2)
    monkeypatch.setattr("adapters.directory_watcher.REMOVED_SECONDS", 0.3)


@pytest.fixture
def idle_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory watcher scans once, at startup. Later scans would reload adapters that a test has evicted."""
    monkeypatch.setattr(DirectoryWatcher, "start", lambda self: None)


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
    """`start(**settings)`: starts a server over the tiny base. All servers are stopped at the end."""
    monkeypatch.setattr(server.app, "load_and_build", lambda settings, *given: build(settings, tiny_base, *given[:2]))
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
        live = Live(app, context.__enter__())
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
    """A server with the adapters a, b and mood; mood has a task.json."""
    write_adapter("a", 1)
    write_adapter("b", 2, rank=3)
    write_adapter("mood", 3, task=TASK)
    live = start()
    for name in ("a", "b", "mood"):
        if name not in live.services.registry.names():
            answer = live.http.post("/adapters", json={"name": name, "source": name})
            assert answer.status_code in (200, 201), answer.text
    return live


def events(response: httpx.Response) -> list[Any]:
    """The parsed data of server-sent events; `[DONE]` stays a string."""
    found = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [data if data == "[DONE]" else json.loads(data) for data in found]
