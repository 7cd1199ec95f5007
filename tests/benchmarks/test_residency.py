"""What is called `disk` is on disk: checked before it is asked for, and by what was read."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.residency
from benchmarks.residency import ask_all, check_read, drop, places
from benchmarks.server_process import ServerProcess

NAMES = ["a0", "a1"]


class Places(ThreadingHTTPServer):
    """Answers what `places` asks of a server; adapters are in `tiers`, and `reading` says whether those on disk are
    counted when they are read."""

    tiers: dict[str, str]
    reading: bool
    loads: int


class Answer(BaseHTTPRequestHandler):
    server: Places

    def do_GET(self) -> None:
        told = [{"name": name, "tier": tier} for name, tier in self.server.tiers.items()]
        metrics = f"# TYPE x histogram\nloramux_adapter_load_seconds_count {self.server.loads}.0\n"
        self.say(json.dumps({"adapters": told}) if self.path == "/adapters" else metrics)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        if self.server.tiers.get(asked) == "disk":
            self.server.tiers[asked] = "ram"
            self.server.loads += self.server.reading
        self.say("{}")

    def say(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[Places]:
    server = Places(("127.0.0.1", 0), Answer)
    server.tiers, server.reading, server.loads = dict.fromkeys(NAMES, "disk"), True, 3
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def measured(server: Places) -> dict[str, Any]:
    process: Any = SimpleNamespace(pid=os.getpid())
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return asyncio.run(places(ServerProcess(process, url, Path("log")), NAMES, beside=False))


def test_adapters_on_disk_are_read_once_and_then_in_ram(answering: Places) -> None:
    found = measured(answering)
    assert (found["disk"]["loads"], found["ram"]["loads"]) == (2, 0)


async def test_each_adapter_is_compared_with_itself_when_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.030, 0.010, 0.070, 0.020, 0.040, 0.015])
    asked: list[str] = []

    async def first_token(http: Any, model: str) -> float:
        asked.append(model)
        return next(taken)

    monkeypatch.setattr(benchmarks.residency, "first_token", first_token)
    http: Any = None
    found = await ask_all(http, ["a0", "a1", "a2"], [])
    assert asked == ["a0", "a0", "a1", "a1", "a2", "a2"]
    assert (found["ms_p50"], found["warm_ms_p50"], found["over_warm_ms"]) == pytest.approx((40, 15, 25))


async def test_the_longest_gap_of_a_stream_is_seen_even_if_it_begins_with_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = [0.0, 0.01]

    async def first_token(http: Any, model: str) -> float:
        for gap in (0.3 if len(times) == 2 else 0.01, 0.01, 0.02):
            times.append(times[-1] + gap)
        return 0.04

    monkeypatch.setattr(benchmarks.residency, "first_token", first_token)
    http: Any = None
    found = await ask_all(http, ["a0", "a1"], times)
    assert (found["gap_ms_p50"], found["gap_ms_p100"]) == pytest.approx((15, 300))
    assert (found["warm_gap_ms_p50"], found["warm_gap_ms_p100"]) == pytest.approx((10, 20))


def test_one_that_is_in_ram_already_is_not_measured_as_from_disk(answering: Places) -> None:
    answering.tiers["a1"] = "ram"
    with pytest.raises(RuntimeError, match=r"not all are on disk.*'a1': 'ram'"):
        measured(answering)


def test_what_was_not_read_is_not_measured_as_from_disk(answering: Places) -> None:
    answering.reading = False
    with pytest.raises(RuntimeError, match="0 adapters were read from disk, not 2"):
        measured(answering)


def test_all_files_of_a_store_are_put_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "versions" / "one").mkdir(parents=True)
    (tmp_path / "versions" / "one" / "weights").write_bytes(b"x" * 5000)
    (tmp_path / "names.json").write_text("{}")
    dropped: list[tuple[str, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda f, at, size, how: dropped.append((os.readlink(f"/proc/self/fd/{f}"), how))
    )
    drop(tmp_path)
    assert {(Path(path).name, how) for path, how in dropped} == {
        ("weights", os.POSIX_FADV_DONTNEED),
        ("names.json", os.POSIX_FADV_DONTNEED),
    }


def test_what_was_read_from_memory_is_not_the_disk() -> None:
    check_read({"alone": {"disk": {"read_MB": 10.1}}}, 10.0)
    check_read({"alone": {"disk": {"read_MB": 0.0}}}, 0.0)
    with pytest.raises(RuntimeError, match="TMPDIR"):
        check_read({"alone": {"disk": {"read_MB": 0.0}}}, 10.0)
