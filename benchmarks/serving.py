"""`serving`: a `loramux serve` of its own for a benchmark, on the embedded base, with a fresh state.

Owns the process from its start to its end. Does not know what is asked of it.
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


@dataclass
class Server:
    """A running `loramux serve`."""

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
def serving(state: Path, models: Path, *flags: str, module: str = "server.cli") -> Iterator[Server]:
    """A server on a free port, ready to answer; stopped at the end. `module` is what is run as `loramux`."""
    state.mkdir(parents=True)
    if models.is_dir():
        (state / "models").symlink_to(models)
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--port", str(port), "--state-dir", str(state)]
    told = state / "server.log"
    with told.open("wb") as log:
        process = subprocess.Popen([*command, "--library", "none", *flags], cwd=REPO, stdout=log, stderr=log)
    server = Server(process, f"http://127.0.0.1:{port}", told)
    try:
        end = time.monotonic() + 180
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(told.read_text()[-3000:])
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 200:
                    break
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
