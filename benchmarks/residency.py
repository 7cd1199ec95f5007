"""What an adapter's place costs, and what memory the server has: over HTTP, on servers of its own, by medians.

Run it as `python -m benchmarks.residency BASE.gguf`. Adapters of 5 MB (rank 22 on q, k, v, o of the embedded base) are
asked for one at a time, one short prompt and one token, without a prefix cache:

- from disk: by a server that was started again after it had taken them in, so that it has none in memory, and with the
  files of its store dropped from the system's cache; with `--cached` they stay in it. That each one's tier is `disk`
  before it is asked for, that as many are read as are asked for, and that the system read their bytes, is checked;
- from RAM: loaded, and put out of their slots again by others;
- warm: each of both asked for once more, right after.

What a place costs is the median of each adapter's own difference to warm, as a machine's pace changes within seconds.
Beside them runs a stream on the base, whose gaps between tokens are told apart by what was asked for at that time, and
beside them those while it was warm (`warm_gap`): a running request waits for no load. Then the memory: what is resident
above a process that has imported the same modules and done nothing, over what `/stats` accounts for: after loading,
with the adapters that were taken in; once started again, which maps the base and has read little of it yet; and after
these requests.
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

from benchmarks import machine
from benchmarks.server_process import MODELS, ServerProcess, free_port, loramux_server, running, serve_command
from benchmarks.synthetic import write_adapter
from server.kernels import choose
from server.model.loader import load_base

RANK = 22
SLOTS = 4
TAKEN_IN_SECONDS = 300
PROMPT = list(range(1000, 1016))
IMPORTED = """
import server.app, server.cli.serve, uvicorn, uvicorn.protocols.http.auto, uvicorn.loops.auto, torch
import server.engine.backends.cpu.runner, server.sources, server.model.loader
from server.kernels.cpu.bindings import library
library()
print(int(open("/proc/self/statm").read().split()[1]) * __import__("os").sysconf("SC_PAGE_SIZE"))
"""
"""Prints the bytes that the interpreter and the libraries have in memory before anything is loaded."""


async def first_token(http: aiohttp.ClientSession, model: str) -> float:
    """Seconds from asking to the whole answer of one token."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    async with http.post("/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.read()
    return time.perf_counter() - start


async def stream(http: aiohttp.ClientSession, times: list[float]) -> None:
    """A long answer of the base, asked for again and again until cancelled; notes when its tokens come."""
    body = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    while True:
        async with http.post("/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data:"):
                    times.append(time.perf_counter())


async def ask_all(http: aiohttp.ClientSession, names: list[str], times: list[float]) -> dict[str, Any]:
    """Ask for each in turn, twice: milliseconds to its token where it is and warm, and the gaps of a stream, whose
    `times` are given, while each was asked for."""
    there: list[float] = []
    warm: list[float] = []
    gaps: list[float] = []
    warm_gaps: list[float] = []
    for name in names:
        for taken, beside in ((there, gaps), (warm, warm_gaps)):
            before = max(0, len(times) - 1)  # the last token before, as a wait may begin with the request
            taken.append(1000 * await first_token(http, name))
            await asyncio.sleep(0.05)  # so that the stream has tokens of its own between two
            beside += (1000 * np.diff(times[before:])).tolist()
    found = {"ms_p50": statistics.median(there), "ms_p90": float(np.percentile(there, 90)), "ms_max": max(there)}
    found["warm_ms_p50"] = statistics.median(warm)
    found["over_warm_ms"] = statistics.median(a - b for a, b in zip(there, warm, strict=True))
    for kind, each in (("gap", gaps), ("warm_gap", warm_gaps)):
        if each:
            found |= {f"{kind}_ms_p{q}": float(np.percentile(each, q)) for q in (50, 99, 100)}
    return found


async def places(server: ServerProcess, names: list[str], beside: bool) -> dict[str, Any]:
    """Both places, with a stream beside them or alone. Raises RuntimeError where `names` are not on disk before, or are
    not read as often as they should be."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as http:
        await first_token(http, "smollm2-135m")
        times: list[float] = []
        streaming = asyncio.create_task(stream(http, times)) if beside else None
        await asyncio.sleep(0.5)
        tiers = await tiers_of(http, names)
        if set(tiers.values()) != {"disk"}:
            raise RuntimeError(f"not all are on disk before they are asked for: {tiers}")
        found: dict[str, Any] = {}
        for place, reads in (("disk", len(names)), ("ram", 0)):
            loads, read = await loads_of(http), bytes_read(server)
            found[place] = await ask_all(http, names, times)
            found[place] |= {"loads": await loads_of(http) - loads, "read_MB": (bytes_read(server) - read) / 1e6}
            if found[place]["loads"] != reads:
                raise RuntimeError(f"{found[place]['loads']} adapters were read from disk, not {reads}, for {place!r}")
        if streaming is not None:
            streaming.cancel()
            await asyncio.wait([streaming])
        return found


async def tiers_of(http: aiohttp.ClientSession, names: list[str]) -> dict[str, str]:
    """Where each adapter is now: `disk`, `ram` or `device`."""
    async with http.get("/adapters") as answer:
        answer.raise_for_status()
        told = {adapter["name"]: str(adapter["tier"]) for adapter in (await answer.json())["adapters"]}
    return {name: told.get(name, "not there") for name in names}


async def loads_of(http: aiohttp.ClientSession) -> int:
    """How many adapters the server has read from its store."""
    async with http.get("/metrics") as answer:
        answer.raise_for_status()
        lines = (await answer.text()).splitlines()
    return int(float(next(line.split()[-1] for line in lines if line.startswith("loramux_adapter_load_seconds_count"))))


def bytes_read(server: ServerProcess) -> int:
    """Bytes that the server's process has had the system read from a disk; those from its cache do not count."""
    lines = Path(f"/proc/{server.process.pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


@contextlib.contextmanager
def serving_again(state: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server on a state that another has left."""
    port = free_port()
    with running(serve_command(port, state, *flags), port, "/health/ready", state / "again.log") as server:
        yield server


def take_in(state: Path, models: Path, names: list[str], own: int, *flags: str) -> dict[str, float]:
    """Have a server take the adapters into the store of a fresh state, and end. Returns its memory then. Raises
    RuntimeError if it does not."""
    with loramux_server(state, models, *flags) as server:
        end = time.monotonic() + TAKEN_IN_SECONDS
        while {a["name"] for a in httpx.get(f"{server.url}/adapters").json()["adapters"]} < set(names):
            if time.monotonic() > end:
                raise RuntimeError(f"the adapters were not taken in within {TAKEN_IN_SECONDS} s")
            time.sleep(0.2)
        return memory(server, own)


def memory(server: ServerProcess, own: int) -> dict[str, float]:
    """Megabytes resident, of which interpreter and libraries, accounted, and the ratio."""
    stats = httpx.get(f"{server.url}/stats").json()["memory"]
    accounted = sum(size for kind, size in stats.items() if kind != "process")
    resident = server.resident()
    return {
        "resident_MB": resident / 1e6,
        "interpreter_and_libraries_MB": own / 1e6,
        "accounted_MB": accounted / 1e6,
        "ratio": (resident - own) / accounted,
    }


def check_read(runs: dict[str, Any], megabytes: float) -> None:
    """Raises RuntimeError where less was read from the disk for `disk`: a folder in RAM cannot be dropped from it."""
    for name, run in runs.items():
        if run["disk"]["read_MB"] < megabytes:
            raise RuntimeError(
                f"{name}: {run['disk']['read_MB']:.1f} MB were read from the disk, not {megabytes:.1f}: "
                "name a folder that is on one with TMPDIR"
            )


def drop(folder: Path) -> None:
    """Put the files below a folder out of the system's cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--count", type=int, default=40, help="adapters of each run")
    parser.add_argument("--cached", action="store_true", help="leave their files in the system's cache")
    parser.add_argument("--models", type=Path, default=MODELS, help="where the base has been fetched")
    given = parser.parse_args()
    if given.count <= SLOTS:
        parser.error(f"--count must be above {SLOTS}: as many slots there are, and what has one is not loaded again")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = load_base(given.base, name="base", backend=choose("reference"), cache_dir=folder / "cache").shapes()
        own = int(subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True).stdout)
        runs: dict[str, Any] = {}
        for place, beside in (("alone", False), ("beside a stream", True)):
            adapters = folder / f"adapters-{beside:d}"
            names = [f"a{i}" for i in range(given.count)]
            for i, adapter in enumerate(names):
                write_adapter(adapters / adapter, shapes, rank=RANK, seed=i)
            flags = ["--adapter-dir", str(adapters), "--max-slots", str(SLOTS), "--no-prefix-cache"]
            state = folder / f"state-{beside:d}"
            loaded = take_in(state, given.models, names, own, *flags)
            with serving_again(state, *flags) as server:
                if not given.cached:
                    drop(state / "store")
                again = memory(server, own)
                runs[place] = asyncio.run(places(server, names, beside))
                runs[place]["memory"] = {
                    "after loading": loaded,
                    "started again": again,
                    "after the requests": memory(server, own),
                }
        nbytes = (folder / "adapters-0" / "a0" / "adapter_model.safetensors").stat().st_size
        check_read(runs, 0 if given.cached else given.count * nbytes / 1e6)
        asked = {"count": given.count, "rank": RANK, "slots": SLOTS, "cached": given.cached, "base": given.base.name}
        told = {"asked": asked, "machine": machine.describe(), "adapter_MB": nbytes / 1e6, **runs}
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
