"""Server processes for benchmarks: readiness, error messages, and cleanup of child processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.server_process import NotStarted, free_port, running, serve_command
from tests.benchmarks.conftest import runs
from tests.waiting import until

SERVER = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

statuses = iter([503, 503])
Path(sys.argv[2]).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(next(statuses, 200) if self.path == "/ready" else 404)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_waits_until_ready_and_stops_the_process_group(tmp_path: Path) -> None:
    port, child = free_port(), tmp_path / "pid"
    command = [sys.executable, "-c", SERVER, str(port), str(child)]
    with running(command, port, "/ready", tmp_path / "log") as server:
        assert server.url == f"http://127.0.0.1:{port}" and server.process.poll() is None
        assert server.resident() > 1 << 20 and server.count("task") >= 1 and server.count("fd") >= 3
        assert (tmp_path / "log").read_text().count(" 503 ") == 2
    assert server.process.returncode is not None
    until(lambda: not runs(int(child.read_text())))


@pytest.mark.parametrize(
    ("script", "timeout", "message"),
    [
        ("print('no such model'); raise SystemExit(3)", 60.0, r"exited with status 3:\nno such model"),
        ("import time; print('loading', flush=True); time.sleep(100)", 1.0, "was not ready after 1 s"),
        (None, 1.0, "cannot be run"),
    ],
)
def test_a_server_that_does_not_start_gives_the_reason(
    tmp_path: Path, script: str | None, timeout: float, message: str
) -> None:
    command = [str(tmp_path / "missing")] if script is None else [sys.executable, "-c", script]
    with pytest.raises(NotStarted, match=message), running(command, free_port(), "/", tmp_path / "log", timeout):
        raise AssertionError("the server never becomes ready")


def test_flags_override_the_defaults() -> None:
    command = serve_command(1, Path("state"), "--device", "cuda")
    assert command[-4:] == ["--device", "cpu", "--device", "cuda"]
