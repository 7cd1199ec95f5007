"""Faults around a running server: failed steps, damaged files, slow sources, budgets, restarts."""

from __future__ import annotations

import asyncio
import http.server
import logging
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import server.app
from server.api.state import ServerState
from server.api.watchdog import EXIT_CODE, Watchdog
from server.settings import Settings
from tests.server.engine.conftest import Panic
from tests.waiting import until

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Write = Callable[..., Path]


def stored(live: Any, name: str) -> Path:
    """The folder of an adapter's current version in the store."""
    return Path(live.services.training.store.path(live.services.registry.current(name).digest))


def evict(live: Any, name: str) -> None:
    """Remove an adapter from device slots and RAM, so that the next request reads it from disk."""
    services = live.services
    digest = services.registry.current(name).digest
    services.engine.unload(digest)

    def gone() -> bool:
        services.registry._ram.discard(digest)
        return not services.engine.holds(digest) and digest not in services.registry._ram.resident()

    until(gone)


def text_of(live: Any, name: str) -> str:
    answer = live.generate("tell me", adapters=[{"name": name}], max_tokens=6, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["text"])


def test_failed_step_fails_its_requests_and_readiness(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as breaking:
        breaking.setattr(live.services.runner, "run", lambda batch: 1 / 0)
        answer = live.generate("x", adapters=[{"name": "a"}])
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
        assert live.http.get("/health/ready").status_code == live.http.get("/health").status_code == 503
    with monkeypatch.context() as patched:  # ready again after a while, even without requests
        patched.setattr("server.engine.step_stats.FAILING_SECONDS", 0.0)
        assert live.http.get("/health/ready").status_code == 200
    assert live.generate("x", adapters=[{"name": "a"}]).status_code == 200
    assert live.http.get("/health/ready").status_code == 200 and live.idle()


class Steps:
    """An engine for the watchdog."""

    def __init__(self, stuck: list[float], error: str | None = None) -> None:
        self.stuck, self.error, self.checks = stuck, error, 0

    def stuck_for(self) -> float:
        self.checks += 1
        return self.stuck.pop(0) if len(self.stuck) > 1 else self.stuck[0]

    def current_step(self) -> str:
        return "a step of 5 rows"

    def fatal_error(self) -> str | None:
        return self.error


@pytest.mark.parametrize(
    ("steps", "limit", "reason"),
    [
        (Steps([31.0]), 0.1, "a step of 5 rows"),
        (Steps([0.0], "the device does not answer"), 3600.0, "the process ends: the device does not answer"),
        (Steps([200.0, 200.0, 0.0]), 30.0, None),  # a paused process is not stuck
    ],
    ids=["stuck", "fatal error", "paused"],
)
def test_watchdog(caplog: pytest.LogCaptureFixture, steps: Steps, limit: float, reason: str | None) -> None:
    class Closed(logging.NullHandler):
        def flush(self) -> None:
            raise ValueError("I/O operation on closed file")

    ended: list[int] = []
    watchdog = Watchdog(steps, limit=limit, interval=0.01, end=ended.append)
    logging.getLogger().addHandler(handler := Closed())
    watchdog.start()
    until(lambda: ended or (reason is None and steps.checks > 6))
    watchdog.stop()
    logging.getLogger().removeHandler(handler)
    assert ended == ([] if reason is None else [EXIT_CODE]) and (reason is None or reason in caplog.text)


def test_failing_record_does_not_fail_the_answer(
    live: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(generation: Any) -> None:
        raise RuntimeError("no record today")

    monkeypatch.setattr(live.services.inference, "on_ended", failing)
    assert live.generate(max_tokens=2).status_code == 200
    assert live.idle() and "no record today" in caplog.text


@pytest.mark.usefixtures("idle_watch")
@pytest.mark.parametrize("damage", ["deleted", "truncated", "swapped"])
def test_damaged_store_is_507_and_publishing_repairs_it(live: Any, damage: str) -> None:
    before, other = text_of(live, "a"), text_of(live, "b")
    tensors = stored(live, "a") / TENSORS
    if damage == "deleted":
        shutil.rmtree(tensors.parent)
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    else:
        for file in (TENSORS, CONFIG):
            shutil.copy(stored(live, "b") / file, stored(live, "a") / file)
    assert text_of(live, "a") == before, "the loaded copy is served"
    evict(live, "a")
    refused = live.generate("tell me", adapters=[{"name": "a"}])
    assert refused.status_code == 507 and "a@" in refused.json()["error"]["message"], refused.text
    assert str(tensors.parent) not in refused.text and text_of(live, "b") == other
    assert live.http.put("/adapters/a", json={"source": "a"}).status_code == 200
    assert text_of(live, "a") == before and live.idle()


def test_adapter_with_overflowing_logits_is_named(live: Any, write_adapter: Write) -> None:
    write_adapter("huge", 7, targets=("gate_proj", "up_proj"), size=1e10)
    version = live.http.post("/adapters", json={"name": "huge", "source": "huge"}).json()["version"]
    answer = live.generate(adapters=[{"name": "a"}, {"name": "huge"}], max_tokens=4)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "adapters" and version in error["message"], answer.text
    assert live.http.get("/metrics").text.count('adapter="a+huge",status="400"} 1') == 1
    assert live.generate(adapters=[{"name": "a"}], max_tokens=4).status_code == 200


@pytest.mark.usefixtures("quick_watch")
def test_damaged_folder_is_rejected_and_the_last_version_served(live: Any, write_adapter: Write) -> None:
    folder = write_adapter("a", 1)
    first, registry = text_of(live, "a"), live.services.registry
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:100])
    until(lambda: [r for r in registry.rejected() if r["path"] == "a" and TENSORS in r["reason"]])
    assert text_of(live, "a") == first
    write_adapter("a", 77)
    until(lambda: text_of(live, "a") != first)
    until(lambda: registry.rejected() == [])


def test_deadlines_do_not_depend_on_the_wall_clock(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live.slow_down(0.02)
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    body = {"max_tokens": 50, "ignore_eos": True, "deadline_ms": 20_000}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(live.generate, "x", **body)
        until(lambda: live.stats()["running"])
        offset[0] = 400 * 86_400.0
        answer = running.result().json()
    assert answer["usage"]["completion_tokens"] == 50 and 0 < answer["timings"]["total_ms"] < 20_000
    assert live.generate("y", max_tokens=200, ignore_eos=True, deadline_ms=200).status_code == 504


def test_hanging_source_delays_nobody(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sources.retries.PAUSE", 0.0, raising=False)
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/lora"
    live = start(url_allow=[url])
    with ThreadPoolExecutor(1) as pool:
        register = pool.submit(live.http.post, "/adapters", json={"name": "far", "source": url})
        connection, _ = silent.accept()
        for _ in range(5):
            assert live.generate("meanwhile", max_tokens=2).status_code == 200
        assert not register.done()
        silent.close()
        connection.close()
        assert register.result().status_code == 400
    assert live.http.get("/adapters/far").status_code == 404 and live.idle()


def test_adapter_from_a_url_without_the_proxy_of_the_environment(
    start: Any, write_adapter: Write, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter("a", 1)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(adapter_dir)))
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{host.server_port}"
        live = start(url_allow=[url])
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        made = live.http.post("/adapters", json={"name": "far", "source": f"{url}/a"})
        near = live.http.post("/adapters", json={"name": "near", "source": "a"})
        assert made.status_code == 201, made.text
        assert made.json()["version"].partition("@")[2] == near.json()["version"].partition("@")[2]
        for source in (f"{url}/b", "http://127.0.0.1:1/a"):
            assert live.http.post("/adapters", json={"name": "no", "source": source}).status_code == 400
    finally:
        host.shutdown()
        host.server_close()
        thread.join()


def test_adapter_over_the_budget_is_507_and_the_old_version_served(start: Any, write_adapter: Write) -> None:
    write_adapter("a", 1, rank=2)
    write_adapter("large", 2, rank=32, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    live = start(adapter_ram=64 << 10)
    assert live.http.post("/adapters", json={"name": "a", "source": "a"}).status_code in (200, 201)
    before = text_of(live, "a")
    refused = live.http.put("/adapters/a", json={"source": "large"})
    assert refused.status_code == 507 and refused.headers["x-should-retry"] == "false"
    assert text_of(live, "a") == before and live.http.get("/health/ready").status_code == 200


def test_answers_match_the_version_they_name_while_it_is_republished(live: Any, write_adapter: Write) -> None:
    live.slow_down(0.002)
    body = {"prompt": "tell me of it", "max_tokens": 12, "ignore_eos": True, "adapters": [{"name": "hot"}]}
    stop = threading.Event()

    def republish() -> None:
        seed = 0
        while not stop.is_set():
            write_adapter("moving", 100 + seed % 3)
            assert live.http.put("/adapters/hot", json={"source": "moving"}).status_code in (200, 201)
            seed += 1

    assert live.http.put("/adapters/hot", json={"source": "a"}).status_code == 201
    thread = threading.Thread(target=republish)
    thread.start()
    texts: dict[str, set[str]] = {}

    def several_versions() -> bool:
        for answer in pool.map(lambda _: live.http.post("/generate", json=body).json(), range(40)):
            texts.setdefault(answer["adapters"][0]["version"], set()).add(answer["text"])
        return len(texts) > 1

    try:
        with ThreadPoolExecutor(8) as pool:
            until(several_versions)
    finally:
        stop.set()
        thread.join()
    assert all(len(found) == 1 for found in texts.values()), texts
    assert live.idle() and not live.services.inference.live
    assert live.stats()["kv_blocks"]["used"] == 0


def test_restart_from_a_backup(live: Any, start: Any, tmp_path: Path) -> None:
    """The backup is made as the documentation says, while the server runs. The adapter directory is not needed."""
    answer = live.generate("x", task="mood").json()
    assert live.http.post("/tasks/mood/feedback", json={"id": answer["id"], "score": 0.5}).status_code == 204
    assert live.http.put("/tasks/own", json={"prompt": "Say: {input}"}).status_code == 201

    def state_of(server: Any) -> list[Any]:
        text = server.generate("so it goes", adapters=[{"name": "b"}]).json()["text"]
        versions = [(a["name"], a["version"]) for a in server.http.get("/adapters").json()["adapters"]]
        (scored,) = server.http.get("/tasks/mood/performance").json()["versions"]
        return [text, versions, server.http.get("/tasks/own").json(), scored["version"], scored["quality"]]

    before, state, backup = state_of(live), tmp_path / "state", tmp_path / "backup"
    shutil.copytree(state, backup, ignore=shutil.ignore_patterns("cache", "models", "loramux.db*"))
    with (
        closing(sqlite3.connect(state / "loramux.db")) as records,
        closing(sqlite3.connect(backup / "loramux.db")) as to,
    ):
        records.backup(to)
    live.stop()
    assert state_of(start(state_dir=backup, adapter_dir=tmp_path / "none")) == before


def test_prompts_are_logged_only_with_log_prompts(start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    quiet = start(access_log=True)
    quiet.generate("a private matter", max_tokens=1)
    until(lambda: "/generate" in caplog.text)
    assert "private" not in caplog.text
    loud = start(log_prompts=True, state_dir=tmp_path / "other")
    loud.generate("a private matter", max_tokens=1)
    assert "private" in caplog.text


def test_drain_counts_from_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("server.api.state.time.monotonic", lambda: now[0])
    state = ServerState(Settings())
    state.drain()
    now[0] += 7.0
    state.drain()
    assert state.draining_seconds == 7.0


async def load(state: ServerState, failures: list[Exception]) -> None:
    await server.app._load(state, failures.append, find=lambda *_: None)  # type: ignore[arg-type, return-value]


async def test_server_that_drains_while_it_loads_is_never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    running = SimpleNamespace(services=SimpleNamespace(model=SimpleNamespace(name="m")))
    monkeypatch.setattr(server.app, "load_and_build", lambda *_: running)
    state = ServerState(Settings())
    state.drain()
    await load(state, [])
    assert state.state == "draining" and state.running is running


@pytest.mark.parametrize("kind", [Panic, SystemExit, ValueError])
async def test_any_failure_while_loading_fails_the_start(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def failing(*_: object) -> None:
        raise kind("at line 1")

    monkeypatch.setattr(server.app, "load_and_build", failing)
    state, failures = ServerState(Settings()), list[Exception]()
    await load(state, failures)
    assert state.state == "failed" and [str(error) for error in failures] == ["at line 1"]


async def test_cancelled_start_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "to_thread", cancelled)
    state = ServerState(Settings())
    with pytest.raises(asyncio.CancelledError):
        await load(state, [])
    assert state.state == "loading"
