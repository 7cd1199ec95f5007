"""Latency of adapters on disk, in RAM and on the device, and memory of a server.

    python -m benchmarks.residency BASE.gguf

Adapters of 5 MB (rank 22 on q, k, v, o of the embedded base) are requested one at a time, with a short prompt and one
token, without prefix cache:

- from disk: from a server that was restarted, with the files of its store dropped from the page cache (unless
  --cached). The script checks that the adapters are on disk and that their bytes are read;
- from RAM: loaded, but evicted from their slots by others;
- warm: the same adapter again.

The cost of a tier is the median difference to the warm request. The same is measured beside a running stream, and the
gaps between its tokens are reported. Memory is the resident size above that of a process with the same imports,
relative to the sum that /stats reports.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np

from benchmarks import report
from benchmarks.server_process import MODELS, ServerProcess, free_port, loramux_server, running, serve_command
from benchmarks.synthetic import write_adapter
from server.kernels import choose
from server.model.loader import load_base

RANK = 22
SLOTS = 4
PUBLISH_TIMEOUT = 300
PROMPT = list(range(1000, 1016))
IMPORTS = """
import server.app, server.cli.serve, uvicorn, uvicorn.protocols.http.auto, uvicorn.loops.auto, torch
import server.engine.backends.cpu.runner, server.sources, server.model.loader
from server.kernels.cpu.bindings import library
library()
print(int(open("/proc/self/statm").read().split()[1]) * __import__("os").sysconf("SC_PAGE_SIZE"))
"""
"""Prints the resident bytes of a server's imports."""


async def request_token(http: aiohttp.ClientSession, model: str) -> float:
    """Seconds for an answer of one token."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    async with http.post("/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.read()
    return time.perf_counter() - start


async def stream(http: aiohttp.ClientSession, times: list[float]) -> None:
    """Stream answers of the base until cancelled, and record the arrival times of tokens."""
    body = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    while True:
        async with http.post("/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data:"):
                    times.append(time.perf_counter())


async def request_all(http: aiohttp.ClientSession, names: list[str], times: list[float]) -> dict[str, Any]:
    """Request each adapter twice.

    Returns:
        Milliseconds of the first and the warm request, and the gaps between tokens of the stream (`times`).
    """
    cold: list[float] = []
    warm: list[float] = []
    gaps: list[float] = []
    warm_gaps: list[float] = []
    for name in names:
        for seconds, stream_gaps in ((cold, gaps), (warm, warm_gaps)):
            before = max(0, len(times) - 1)  # includes the gap that is open at the start
            seconds.append(1000 * await request_token(http, name))
            await asyncio.sleep(0.05)
            stream_gaps += (1000 * np.diff(times[before:])).tolist()
    found = {"ms_p50": statistics.median(cold), "ms_p90": float(np.percentile(cold, 90)), "ms_max": max(cold)}
    found["warm_ms_p50"] = statistics.median(warm)
    found["over_warm_ms"] = statistics.median(a - b for a, b in zip(cold, warm, strict=True))
    for kind, values in (("gap", gaps), ("warm_gap", warm_gaps)):
        if values:
            found |= {f"{kind}_ms_p{q}": float(np.percentile(values, q)) for q in (50, 99, 100)}
    return found


async def measure_tiers(server: ServerProcess, names: list[str], with_stream: bool) -> dict[str, Any]:
    """Measure adapters on disk, then in RAM. Raises RuntimeError if they are not where they should be."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as http:
        await request_token(http, "smollm2-135m")
        times: list[float] = []
        streaming = asyncio.create_task(stream(http, times)) if with_stream else None
        await asyncio.sleep(0.5)
        tiers = await adapter_tiers(http, names)
        if set(tiers.values()) != {"disk"}:
            raise RuntimeError(f"not all adapters are on disk at the start: {tiers}")
        found: dict[str, Any] = {}
        for tier, expected in (("disk", len(names)), ("ram", 0)):
            loads, read = await load_count(http), bytes_read(server)
            found[tier] = await request_all(http, names, times)
            found[tier] |= {"loads": await load_count(http) - loads, "read_MB": (bytes_read(server) - read) / 1e6}
            if found[tier]["loads"] != expected:
                raise RuntimeError(f"{found[tier]['loads']} adapters were loaded from disk, not {expected} ({tier!r})")
        if streaming is not None:
            streaming.cancel()
            await asyncio.wait([streaming])
        return found


async def adapter_tiers(http: aiohttp.ClientSession, names: list[str]) -> dict[str, str]:
    """The tier of each adapter: disk, ram or device."""
    async with http.get("/adapters") as answer:
        answer.raise_for_status()
        tiers = {adapter["name"]: str(adapter["tier"]) for adapter in (await answer.json())["adapters"]}
    return {name: tiers.get(name, "missing") for name in names}


async def load_count(http: aiohttp.ClientSession) -> int:
    """Number of adapters that the server has loaded from its store."""
    async with http.get("/metrics") as answer:
        answer.raise_for_status()
        lines = (await answer.text()).splitlines()
    return int(float(next(line.split()[-1] for line in lines if line.startswith("loramux_adapter_load_seconds_count"))))


def bytes_read(server: ServerProcess) -> int:
    """Bytes that the process has read from disk, without those from the page cache."""
    lines = Path(f"/proc/{server.process.pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


@contextlib.contextmanager
def restarted_server(state: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server on the state directory of an earlier one."""
    port = free_port()
    with running(serve_command(port, state, *flags), port, "/health/ready", state / "again.log") as server:
        yield server


def publish_all(state: Path, models: Path, names: list[str], imports: int, *flags: str) -> dict[str, float]:
    """Run a server until it has stored all adapters. Returns its memory."""
    with loramux_server(state, models, *flags) as server:
        deadline = time.monotonic() + PUBLISH_TIMEOUT
        while {a["name"] for a in httpx.get(f"{server.url}/adapters").json()["adapters"]} < set(names):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the adapters were not stored within {PUBLISH_TIMEOUT} s")
            time.sleep(0.2)
        return memory(server, imports)


def memory(server: ServerProcess, imports: int) -> dict[str, float]:
    """Resident megabytes, those of the imports, those in /stats, and (resident - imports) / stats."""
    stats = httpx.get(f"{server.url}/stats").json()["memory"]
    accounted = sum(size for kind, size in stats.items() if kind != "process")
    resident = server.resident()
    return {
        "resident_MB": resident / 1e6,
        "interpreter_and_libraries_MB": imports / 1e6,
        "accounted_MB": accounted / 1e6,
        "ratio": (resident - imports) / accounted,
    }


def check_reads(runs: dict[str, Any], megabytes: float) -> None:
    """Raise RuntimeError if fewer bytes were read from disk than the adapters have."""
    for name, run in runs.items():
        if run["disk"]["read_MB"] < megabytes:
            raise RuntimeError(
                f"{name}: {run['disk']['read_MB']:.1f} MB were read from disk, not {megabytes:.1f}. Set TMPDIR to a "
                "folder on a disk."
            )


def drop_page_cache(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--count", type=int, default=40, help="number of adapters")
    parser.add_argument("--cached", action="store_true", help="keep the files in the page cache")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder with the downloaded base")
    options = parser.parse_args()
    if options.count <= SLOTS:
        parser.error(f"--count must be above {SLOTS}, the number of slots")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = load_base(options.base, name="base", backend=choose("reference"), cache_dir=folder / "cache").shapes()
        imports = int(subprocess.check_output([sys.executable, "-c", IMPORTS], text=True))
        runs: dict[str, Any] = {}
        for label, with_stream in (("alone", False), ("beside a stream", True)):
            adapters = folder / f"adapters-{with_stream:d}"
            names = [f"a{i}" for i in range(options.count)]
            for i, adapter in enumerate(names):
                write_adapter(adapters / adapter, shapes, rank=RANK, seed=i)
            flags = ["--adapter-dir", str(adapters), "--max-slots", str(SLOTS), "--no-prefix-cache"]
            state = folder / f"state-{with_stream:d}"
            loaded = publish_all(state, options.models, names, imports, *flags)
            with restarted_server(state, *flags) as server:
                if not options.cached:
                    drop_page_cache(state / "store")
                restarted = memory(server, imports)
                runs[label] = asyncio.run(measure_tiers(server, names, with_stream))
                after = memory(server, imports)
            runs[label]["memory"] = {"after loading": loaded, "restarted": restarted, "after the requests": after}
        size = (folder / "adapters-0" / "a0" / "adapter_model.safetensors").stat().st_size
        check_reads(runs, 0 if options.cached else options.count * size / 1e6)
        parameters = {"count": options.count, "rank": RANK, "slots": SLOTS, "cached": options.cached}
        result = report.result({**parameters, "base": options.base.name}, {"adapter_MB": size / 1e6, **runs})
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
