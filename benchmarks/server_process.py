"""Server processes for benchmarks: loramux itself, or any other HTTP server."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError

REPO = Path(__file__).resolve().parents[1]
MODELS = REPO / "data" / "models"
"""Default location of the downloaded base, as `make serve` leaves it."""
CACHE = REPO / "data" / "cache"
START_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0


class NotStarted(ServerError):
    """A server exited or did not become ready."""


@dataclass
class ServerProcess:
    """A running server and its log file."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def resident(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def count(self, kind: str) -> int:
        """Number of threads (`task`) or open files (`fd`)."""
        return len(os.listdir(f"/proc/{self.process.pid}/{kind}"))


def free_port() -> int:
    """A TCP port that is currently free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, ready: str, log: Path, timeout: float = START_TIMEOUT
) -> Iterator[ServerProcess]:
    """Run a server until the context ends, then stop its whole process group.

    Args:
        command: starts the server on `port`.
        ready: route that answers 200 once the server is ready.
        log: file that receives stdout and stderr.
        timeout: seconds until the server must be ready.

    Raises:
        NotStarted: the server cannot be started, exits, or is not ready in time. The message has the end of the log.
    """
    name = Path(command[0]).name
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
        except OSError as error:
            raise NotStarted(f"{command[0]!r} cannot be run: {error}; see docs/benchmarks.md", "peers") from error
    try:
        deadline = time.monotonic() + timeout
        while not _is_ready(port, ready):
            if process.poll() is not None:
                raise NotStarted(f"{name!r} exited with status {process.returncode}:\n{_tail(log)}", "peers")
            if time.monotonic() > deadline:
                raise NotStarted(f"{name!r} was not ready after {timeout:.0f} s:\n{_tail(log)}", "peers")
            time.sleep(0.05)
        yield ServerProcess(process, f"http://127.0.0.1:{port}", log)
    finally:
        try:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def serve_command(port: int, state: Path, *flags: str) -> list[str]:
    """The command for `loramux serve` on the CPU without the shipped adapters, unless `flags` say otherwise."""
    started = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--state-dir", str(state)]
    return [*started, "--library", "none", "--device", "cpu", *flags]


@contextlib.contextmanager
def loramux_server(state: Path, models: Path, *flags: str) -> Iterator[ServerProcess]:
    """Run `loramux serve` on a new state directory, with the base from `models`."""
    state.mkdir(parents=True)
    for name, kept in (("models", models.resolve()), ("cache", CACHE)):
        if kept.is_dir():
            (state / name).symlink_to(kept)
    port = free_port()
    with running(serve_command(port, state, *flags), port, "/health/ready", state / "server.log") as server:
        yield server


def _is_ready(port: int, route: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", route)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:])
