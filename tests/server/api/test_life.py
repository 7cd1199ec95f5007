"""Failures inside: a step that raises or is stuck; prompts in the log; publishing under load; a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import server.app
from server.api.state import ServerState
from server.api.watchdog import EXIT_CODE, Watchdog
from server.cli import logs
from server.settings import Settings
from tests.server.engine.conftest import Panic
from tests.waiting import until


def test_a_step_that_raises_fails_its_requests_alone(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = live.services.runner
    run = runner.run
    failing = threading.Event()

    def broken(batch: Any) -> Any:
        if failing.is_set():
            raise RuntimeError("kernel")
        return run(batch)

    monkeypatch.setattr(runner, "run", broken)
    failing.set()
    answer = live.generate("x", adapters=[{"name": "a"}])
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
    assert live.http.get("/health/ready").status_code == live.http.get("/health").status_code == 503
    failing.clear()
    assert live.generate("x", adapters=[{"name": "a"}]).status_code == 200
    assert live.http.get("/health/ready").status_code == live.http.get("/health").status_code == 200
    assert live.idle()


def test_one_failed_step_does_not_keep_a_server_unready_that_gets_no_requests(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = live.services.runner
    with monkeypatch.context() as breaking:
        breaking.setattr(runner, "run", lambda batch: 1 / 0)
        assert live.generate("x").status_code == 500
    assert live.http.get("/health/ready").status_code == 503
    monkeypatch.setattr("server.engine.step_stats.FAILING_SECONDS", 0.0)
    assert live.http.get("/health/ready").status_code == 200


def ended_by(steps: Any, limit: float) -> list[int]:
    """The statuses that a watchdog over such an engine ends the process with."""
    ended: list[int] = []
    dog = Watchdog(steps, limit=limit, interval=0.01, end=ended.append)
    dog.start()
    until(lambda: ended)
    dog.stop()
    return ended


def test_a_stuck_step_ends_the_process_and_says_what_ran(caplog: pytest.LogCaptureFixture) -> None:
    """Also where nobody reads the log any more."""

    class Stuck:
        def stuck_for(self) -> float:
            return 31.0

        def current_step(self) -> str:
            return "a step of 5 rows"

        def fatal_error(self) -> None:
            return None

    class Closed(logging.NullHandler):
        def flush(self) -> None:
            raise ValueError("I/O operation on closed file")

    logging.getLogger().addHandler(Closed())
    assert ended_by(Stuck(), limit=0.1) == [EXIT_CODE] and "a step of 5 rows" in caplog.text


def test_a_device_that_is_lost_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    """As a stuck step does, without its wait."""

    class Lost:
        def stuck_for(self) -> float:
            return 0.0

        def current_step(self) -> str:
            return "no step"

        def fatal_error(self) -> str:
            return "the device answers nothing any more"

    assert (
        ended_by(Lost(), limit=3600.0) == [EXIT_CODE]
        and "the process ends: the device answers nothing any more" in caplog.text
    )


def test_a_process_that_was_paused_is_not_stuck() -> None:
    """After SIGSTOP, or with a hypervisor that takes the machine away, a step is old by the clock and has not hung."""

    class Paused:
        looks = 0

        def stuck_for(self) -> float:
            self.looks += 1
            return 200.0 if self.looks < 3 else 0.0

        def current_step(self) -> str:
            return "a step that goes on"

        def fatal_error(self) -> None:
            return None

    ended: list[int] = []
    steps = Paused()
    dog = Watchdog(steps, limit=30.0, interval=0.01, end=ended.append)
    dog.start()
    while steps.looks < 6:
        time.sleep(0.005)
    dog.stop()
    assert not ended


def test_prompts_are_logged_only_if_asked(start: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    quiet = start(access_log=True)
    quiet.generate("a private matter", max_tokens=1)
    quiet.generate("a private matter", max_tokens=100000)
    assert "/generate" in caplog.text and "private" not in caplog.text

    def told() -> list[logging.LogRecord]:
        return [r for r in caplog.records if r.name == "server.api.middleware" and "/generate" in r.getMessage()]

    until(lambda: len(told()) >= 2)  # a line is written once its answer has left
    lines = [json.loads(logs.formatter("json").format(record)) for record in told()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/generate", 200),
        ("POST", "/generate", 400),
    ]
    assert all(line["request_id"].startswith("req-") for line in lines)
    assert "code" not in lines[0] and lines[1]["code"] == "context_length_exceeded"
    loud = start(log_prompts=True, state_dir=tmp_path / "other")
    loud.generate("a private matter", max_tokens=1)
    assert "private" in caplog.text


def test_a_client_that_leaves_before_its_answer_is_logged_as_gone(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    live = start(access_log=True)
    live.slow_down(0.02)
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/generate", json={"prompt": "x", "max_tokens": 200, "ignore_eos": True}, timeout=0.3)
    until(lambda: " gone " in caplog.text)
    assert live.generate("x", max_tokens=1).status_code == 200
    until(lambda: "'/generate' 200" in caplog.text)


def test_publishing_while_serving_never_changes_what_was_leased(live: Any, write_adapter: Any) -> None:
    """Answers of a name that is republished all the while are those of the version that they say they had."""
    live.slow_down(0.002)
    fields = {"prompt": "tell me of it", "max_tokens": 12, "ignore_eos": True, "temperature": 0}
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
    ask = [{**fields, "adapters": [{"name": "hot"}]}] * 40

    def several() -> bool:
        for answer in pool.map(lambda body: live.http.post("/generate", json=body).json(), ask):
            texts.setdefault(answer["adapters"][0]["version"], set()).add(answer["text"])
        return len(texts) > 1

    try:
        with ThreadPoolExecutor(8) as pool:
            until(several, "no other version was published meanwhile")
    finally:
        stop.set()
        thread.join()
    assert len(texts) > 1 and all(len(found) == 1 for found in texts.values()), texts
    assert live.idle()


def test_everything_returns_after_traffic(live: Any) -> None:
    parts = live.services
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": f"p{i}", "max_tokens": 4, "adapters": [{"name": "ab"[i % 2], "weight": i / 10}]}
                  for i in range(40)]  # fmt: skip
        answers = list(pool.map(lambda body: live.http.post("/generate", json=body), bodies))
    assert {a.status_code for a in answers} == {200} and live.idle()
    assert parts.registry.memory()["leases"] == 0 and not parts.inference.live
    assert live.stats()["kv_blocks"]["used"] == 0


def test_a_restart_brings_adapters_and_tasks_back(start: Any, write_adapter: Any, tmp_path: Any) -> None:
    write_adapter("a", 1)
    first = start()
    assert first.http.post("/adapters", json={"name": "kept", "source": "a"}).status_code == 201
    assert first.http.put("/tasks/kept", json={"prompt": "{input}"}).status_code == 201
    before = first.generate("x", task="kept").json()
    first.stop()
    again = start()
    after = again.generate("x", task="kept").json()
    assert after["text"] == before["text"] and after["adapters"] == before["adapters"]


def test_a_backup_as_the_documentation_has_it_is_put_back(live: Any, start: Any, tmp_path: Path) -> None:
    """Made while the server runs; the folders that the adapters came from are gone."""
    answer = live.generate("x", task="mood").json()
    assert live.http.post("/tasks/mood/feedback", json={"id": answer["id"], "score": 0.5}).status_code == 204
    assert live.http.put("/tasks/own", json={"prompt": "Say: {input}"}).status_code == 201

    def told(server: Any) -> list[Any]:
        text = server.generate("so it goes", adapters=[{"name": "b"}]).json()["text"]
        versions = [(a["name"], a["version"]) for a in server.http.get("/adapters").json()["adapters"]]
        (scored,) = server.http.get("/tasks/mood/performance").json()["versions"]
        return [text, versions, server.http.get("/tasks/own").json(), scored["version"], scored["quality"]]

    before, state, backup = told(live), tmp_path / "state", tmp_path / "backup"
    shutil.copytree(state, backup, ignore=shutil.ignore_patterns("cache", "models", "loramux.db*"))
    with (
        closing(sqlite3.connect(state / "loramux.db")) as records,
        closing(sqlite3.connect(backup / "loramux.db")) as to,
    ):
        records.backup(to)
    live.stop()
    assert told(start(state_dir=backup, adapter_dir=tmp_path / "none")) == before


def test_the_end_counts_from_when_it_was_first_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal first, and by the end of the application after that."""
    now = [100.0]
    monkeypatch.setattr("server.api.state.time.monotonic", lambda: now[0])
    runtime = ServerState(Settings())
    runtime.drain()
    now[0] += 7.0
    runtime.drain()
    assert runtime.draining_seconds == 7.0


async def test_who_is_told_to_leave_while_it_loads_is_never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    house = SimpleNamespace(services=SimpleNamespace(model=SimpleNamespace(name="m")))
    monkeypatch.setattr(server.app, "load_and_build", lambda *_: house)
    runtime = ServerState(Settings())
    runtime.drain()
    await server.app._load(runtime, lambda error: None, find=lambda *_: None)  # type: ignore[arg-type, return-value]
    assert runtime.state == "draining" and runtime.running is house


@pytest.mark.parametrize("kind", [Panic, SystemExit, ValueError])
async def test_whatever_fails_while_it_loads_fails_the_start(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def failing(*_: object) -> None:
        raise kind("at line 1")

    monkeypatch.setattr(server.app, "load_and_build", failing)
    runtime, failures = ServerState(Settings()), list[Exception]()
    await server.app._load(runtime, failures.append, find=lambda *_: None)  # type: ignore[arg-type, return-value]
    assert runtime.state == "failed" and [str(error) for error in failures] == ["at line 1"]


async def test_a_start_that_is_cancelled_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "to_thread", cancelled)
    runtime = ServerState(Settings())
    with pytest.raises(asyncio.CancelledError):
        await server.app._load(runtime, lambda error: None, find=lambda *_: None)  # type: ignore[arg-type, return-value]
    assert runtime.state == "loading"
