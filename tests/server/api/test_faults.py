"""What breaks around a server that runs: files on the disk, the clock, the budget. Nothing is lost, and it says why."""

from __future__ import annotations

import errno
import http.server
import io
import os
import shutil
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def stored(live: Any, name: str) -> Path:
    """The folder of an adapter's version in the store."""
    registry = live.services.registry
    return Path(live.services.training.store.path(registry.resolve([(name, 1.0)])[0][0].digest))


def evict(live: Any, name: str) -> None:
    """Take an adapter out of slots and RAM, so that the next request has to read it."""
    parts = live.services
    digest = parts.registry.resolve([(name, 1.0)])[0][0].digest
    parts.engine.forget(digest)

    def gone() -> bool:
        parts.registry._ram.discard(digest)
        return not parts.engine.holds(digest) and digest not in parts.registry._ram.resident()

    until(gone)


def text_of(live: Any, name: str) -> str:
    answer = live.generate("tell me", adapters=[{"name": name}], max_tokens=6, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["text"])


def test_an_answer_whose_record_fails_is_given_all_the_same(
    live: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(generation: Any) -> None:
        raise RuntimeError("no record today")

    monkeypatch.setattr(live.services.inference, "on_ended", failing)
    assert live.generate(max_tokens=2).status_code == 200
    assert live.idle() and "no record today" in caplog.text


def test_a_process_without_a_file_to_open_still_tells_of_itself(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that hold all connections are what /metrics is looked at for; and what is wanted is told as that."""
    opened, read = os.open, io.open

    def short(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).startswith("/proc/") or TENSORS in str(path):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return (opened if rest and isinstance(rest[0], int) else read)(path, *rest, **options)

    evict(live, "a")
    monkeypatch.setattr(os, "open", short)
    monkeypatch.setattr(io, "open", short)
    assert live.http.get("/stats").json()["memory"]["process"] > 0
    assert 'loramux_memory_bytes{kind="process"}' in live.http.get("/metrics").text
    for answer in (
        live.generate("x", adapters=[{"name": "a"}]),
        live.http.post("/adapters/compose", json={"name": "c", "from": [{"name": "a", "weight": 1}], "rank": 1}),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (507, "store_failed"), answer.text
        assert "Too many open files" in error["message"] and "/" not in error["message"]
    monkeypatch.undo()
    assert text_of(live, "a")


@pytest.mark.usefixtures("idle_watch")
@pytest.mark.parametrize("harm", ["deleted", "cut", "swapped", "folder"])
def test_files_of_the_store_that_are_harmed_while_served(live: Any, harm: str, write_adapter: Any) -> None:
    before, other = text_of(live, "a"), text_of(live, "b")
    tensors = stored(live, "a") / TENSORS
    if harm == "deleted":
        tensors.unlink()
    elif harm == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif harm == "swapped":
        tensors.unlink()
        shutil.copy(stored(live, "b") / TENSORS, tensors)
        (stored(live, "a") / CONFIG).write_bytes((stored(live, "b") / CONFIG).read_bytes())
    else:
        shutil.rmtree(tensors.parent)
    assert text_of(live, "a") == before, "what is in memory is served on"
    evict(live, "a")
    refused = live.generate("tell me", adapters=[{"name": "a"}], max_tokens=6, ignore_eos=True)
    error = refused.json()["error"]
    assert refused.status_code == 507 and "a@" in error["message"], refused.text
    assert str(tensors.parent) not in refused.text, "no path of ours"
    assert text_of(live, "b") == other, "others are served on"
    assert live.idle()
    again = live.http.put("/adapters/a", json={"source": "a"})
    assert again.status_code == 200, again.text
    assert text_of(live, "a") == before, "publishing it again heals it"


def test_an_adapter_whose_numbers_overflow_is_named(live: Any, write_adapter: Any, caplog: Any) -> None:
    write_adapter("huge", 7, targets=("gate_proj", "up_proj"), size=1e10)
    version = live.http.post("/adapters", json={"name": "huge", "source": "huge"}).json()["version"]
    answer = live.generate(adapters=[{"name": "a"}, {"name": "huge"}], max_tokens=4)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "adapters", answer.text
    assert version in error["message"] and "smaller" in error["message"] and version in caplog.text
    assert live.http.get("/metrics").text.count('adapter="a+huge",status="400"} 1') == 1
    assert live.generate(adapters=[{"name": "a"}], max_tokens=4).status_code == 200


@pytest.mark.usefixtures("quick_watch")
def test_files_of_the_users_folder_that_are_harmed_while_served(live: Any, write_adapter: Any) -> None:
    folder = write_adapter("a", 1)
    first = text_of(live, "a")
    registry = live.services.registry

    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    # A look within the write of before may have had its own reason.
    until(lambda: [r for r in registry.rejected() if r["path"] == "a" and TENSORS in r["reason"]])
    assert text_of(live, "a") == first
    write_adapter("a", 77)  # swapped for another one, in place
    until(lambda: text_of(live, "a") != first)
    until(lambda: registry.rejected() == [], "what is mended is listed on")  # that goes after the version has come
    (folder / TENSORS).unlink()  # half of it is gone: that is no removal
    second = text_of(live, "a")
    until(lambda: [r for r in registry.rejected() if r["path"] == "a"])
    assert text_of(live, "a") == second


@pytest.mark.usefixtures("quick_watch")
@pytest.mark.parametrize("jump", [400 * 86_400.0, -400 * 86_400.0])
def test_a_clock_that_jumps_ends_nothing(
    live: Any, write_adapter: Any, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Deadlines, rates and waits go by the monotonic clock; the wall clock is for what people read."""
    live.slow_down(0.02)
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    real_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(offset[0] * 1e9))
    answers: list[Any] = []
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "adapters": [{"name": "a"}], "deadline_ms": 20_000}
    thread = threading.Thread(target=lambda: answers.append(live.http.post("/generate", json=body)))
    thread.start()
    until(lambda: live.stats()["running"])
    offset[0] = jump
    live.slow_down(0.0)
    thread.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 200
    assert 0 < answers[0].json()["timings"]["total_ms"] < 20_000
    live.slow_down(0.02)
    late = live.generate("y", max_tokens=200, ignore_eos=True, deadline_ms=200)
    assert late.status_code == 504, "and a deadline is one still"
    live.slow_down(0.0)
    write_adapter("late", 5)
    until(lambda: "late" in live.services.registry.names(), "the watch waits for a clock")
    assert live.http.put("/adapters/a", json={"source": "b"}).status_code == 200
    offset[0] = 0.0
    versions = live.http.get("/adapters/a").json()["versions"]
    assert len(versions) == 2 and live.generate("x", adapters=[{"name": "a"}]).status_code == 200
    assert live.idle()


def test_a_source_that_hangs_delays_nobody(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sources.retries.PAUSE", 0.0)
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/lora"
    live = start(url_allow=[url])
    told: list[Any] = []
    post = threading.Thread(
        target=lambda: told.append(live.http.post("/adapters", json={"name": "far", "source": url}))
    )
    post.start()
    connection, _ = silent.accept()
    for _ in range(10):
        assert live.generate("meanwhile", max_tokens=2).status_code == 200
    assert not told, "it still waits"
    silent.close()
    connection.close()
    post.join()
    assert told[0].status_code == 400 and "could not be read, 3 times" in told[0].json()["error"]["message"]
    assert live.http.get("/adapters/far").status_code == 404 and live.idle()


def test_an_adapter_of_a_url_is_served(
    start: Any, write_adapter: Any, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the host itself: a proxy that the process has is asked for nothing, and would see what is loaded."""
    write_adapter("a", 1)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing to say."""

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
        assert made.status_code == 201, made.text
        near = live.http.post("/adapters", json={"name": "near", "source": "a"}).json()
        assert made.json()["version"].partition("@")[2] == near["version"].partition("@")[2]
        assert text_of(live, "far") == text_of(live, "near")
        assert live.http.post("/adapters", json={"name": "no", "source": f"{url}/b"}).status_code == 400
        assert live.http.post("/adapters", json={"name": "no", "source": "http://127.0.0.1:1/a"}).status_code == 400
    finally:
        host.shutdown()
        host.server_close()
        thread.join()


def test_over_the_budget_is_507_and_the_old_version_serves_on(start: Any, write_adapter: Any) -> None:
    write_adapter("a", 1, rank=2)
    folder = write_adapter("large", 2, rank=32, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    live = start(adapter_ram=64 << 10)
    assert live.http.post("/adapters", json={"name": "a", "source": "a"}).status_code in (200, 201)
    before = text_of(live, "a")
    assert (folder / TENSORS).stat().st_size > 64 << 10
    refused = live.http.put("/adapters/a", json={"source": "large"})
    assert refused.status_code == 507 and refused.headers["x-should-retry"] == "false"
    assert "--adapter-ram" in refused.json()["error"]["message"] or "bytes" in refused.json()["error"]["message"]
    assert text_of(live, "a") == before
    assert live.http.get("/health/ready").status_code == 200 and live.idle()
