"""Servers that a measurement starts for itself, ours and others.

Owns their processes from start to end. Does not know what they are asked.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError

START_SECONDS = 180.0
STOP_SECONDS = 60.0


class NotStarted(ServerError):
    """A server ended, or took too long, before it answered."""


@dataclass
class ServerProcess:
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
def running(
    command: Sequence[str], port: int, ready: str, log: Path, seconds: float = START_SECONDS
) -> Iterator[ServerProcess]:
    """The server that `command` starts on `port`, once its route `ready` answers 200; stopped at the end, with all that
    it has started.

    Raises NotStarted, with the end of its log, if it cannot be run, ends before that, or takes longer than `seconds`.
    """
    name = Path(command[0]).name
    with log.open("wb") as told:
        try:
            process = subprocess.Popen(command, stdout=told, stderr=told, process_group=0)
        except OSError as error:
            raise NotStarted(f"{command[0]!r} cannot be run: {error}; see docs/benchmarks.md", "peers") from error
    server = ServerProcess(process, f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + seconds
        while not _answers(port, ready):
            if process.poll() is not None:
                raise NotStarted(f"{name!r} ended with status {process.returncode}:\n{_tail(log)}", "peers")
            if time.monotonic() > end:
                raise NotStarted(f"{name!r} did not answer within {seconds:.0f} s:\n{_tail(log)}", "peers")
            time.sleep(0.05)
        yield server
    finally:
        try:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:  # whoever waits for that may be asked to end a second time
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(port: int, route: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", route)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: Path) -> str:
    """The last lines, which say why. A log need not be text throughout."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:])
