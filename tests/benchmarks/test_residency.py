"""Residency benchmark: adapters are really on disk when they are measured as such."""

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
from benchmarks.residency import check_reads, drop_page_cache, measure_tiers, request_all
from benchmarks.server_process import ServerProcess

NAMES = ["a0", "a1"]


class FakeServer(ThreadingHTTPServer):
    """Adapters are in `tiers`; `counting` is whether loads appear in the metrics."""

    tiers: dict[str, str]
    counting: bool
    loads: int


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        adapters = [{"name": name, "tier": tier} for name, tier in self.server.tiers.items()]
        metrics = f"# TYPE x histogram\nloramux_adapter_load_seconds_count {self.server.loads}.0\n"
        self.answer(json.dumps({"adapters": adapters}) if self.path == "/adapters" else metrics)

    def do_POST(self) -> None:
        model = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        if self.server.tiers.get(model) == "disk":
            self.server.tiers[model] = "ram"
            self.server.loads += self.server.counting
        self.answer("{}")

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer(("127.0.0.1", 0), Handler)
    server.tiers, server.counting, server.loads = dict.fromkeys(NAMES, "disk"), True, 3
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def measure(server: FakeServer) -> dict[str, Any]:
    process: Any = SimpleNamespace(pid=os.getpid())
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return asyncio.run(measure_tiers(ServerProcess(process, url, Path("log")), NAMES, with_stream=False))


def test_loads_are_checked(server: FakeServer) -> None:
    found = measure(server)
    assert (found["disk"]["loads"], found["ram"]["loads"]) == (2, 0)
    with pytest.raises(RuntimeError, match=r"not all adapters are on disk.*'a1': 'ram'"):
        measure(server)
    server.tiers, server.counting = dict.fromkeys(NAMES, "disk"), False
    with pytest.raises(RuntimeError, match="0 adapters were loaded from disk, not 2"):
        measure(server)


async def test_each_adapter_is_compared_with_its_warm_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.030, 0.010, 0.070, 0.020, 0.040, 0.015])
    times = [0.0, 0.01]

    async def request_token(http: Any, model: str) -> float:
        for gap in (0.3 if len(times) == 2 else 0.01, 0.01, 0.02):
            times.append(times[-1] + gap)
        return next(seconds)

    monkeypatch.setattr(benchmarks.residency, "request_token", request_token)
    http: Any = None
    found = await request_all(http, ["a0", "a1", "a2"], times)
    assert (found["ms_p50"], found["warm_ms_p50"], found["over_warm_ms"]) == pytest.approx((40, 15, 25))
    assert (found["gap_ms_p100"], found["warm_gap_ms_p100"]) == pytest.approx((300, 20))


def test_page_cache_of_all_files_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "versions" / "one").mkdir(parents=True)
    (tmp_path / "versions" / "one" / "weights").write_bytes(b"x" * 5000)
    (tmp_path / "names.json").write_text("{}")
    dropped: list[tuple[str, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda f, at, size, how: dropped.append((os.readlink(f"/proc/self/fd/{f}"), how))
    )
    drop_page_cache(tmp_path)
    assert {Path(path).name for path, how in dropped if how == os.POSIX_FADV_DONTNEED} == {"weights", "names.json"}


def test_reads_from_memory_are_an_error() -> None:
    check_reads({"alone": {"disk": {"read_MB": 10.1}}}, 10.0)
    with pytest.raises(RuntimeError, match="TMPDIR"):
        check_reads({"alone": {"disk": {"read_MB": 0.0}}}, 10.0)
