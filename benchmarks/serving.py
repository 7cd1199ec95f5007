"""`serving`: a `loramux serve` of its own for a benchmark, on the embedded base, with a fresh state.

Owns the process from its start to its end, and so does `running` for any other server. Does not know what is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

REPO = Path(__file__).resolve().parents[1]
MODELS = REPO / "data" / "models"
"""Where the base lies once `make serve` has fetched it; a server without it fetches its own."""
CACHE = REPO / "data" / "cache"
"""Where it lies packed then."""
START_SECONDS = 180


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def resident(self) -> int:
        """Bytes of the process in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def count(self, kind: str) -> int:
        """How many of `task` (threads) or `fd` the process has."""
        return len(os.listdir(f"/proc/{self.process.pid}/{kind}"))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, ready: str, log: Path) -> Iterator[Server]:
    """The server that `command` starts on `port`, once its route `ready` answers 200; stopped at the end.

    Raises RuntimeError, with the end of its log, if it ends before that or takes too long.
    """
    with log.open("wb") as told:
        process = subprocess.Popen(command, cwd=REPO, stdout=told, stderr=told)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()[-3000:])
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}{ready}", timeout=5).status_code == 200:
                    break
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def serving(state: Path, models: Path, *flags: str, module: str = "server.cli") -> Iterator[Server]:
    """A server on a free port, ready to answer; stopped at the end. `module` is what is run as `loramux`."""
    state.mkdir(parents=True)
    for name, kept in (("models", models.resolve()), ("cache", CACHE)):
        if kept.is_dir():
            (state / name).symlink_to(kept)
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--port", str(port), "--state-dir", str(state)]
    with running([*command, "--library", "none", *flags], port, "/health/ready", state / "server.log") as server:
        yield server
