"""Servers that measurements start: one that does not come up says why, and none outlives its measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server_process import NotStarted, free_port, running
from tests.benchmarks.conftest import runs
from tests.waiting import until

ANSWERING = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

left = iter([503, 503])
Path(sys.argv[2]).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(next(left, 200) if self.path == "/ready" else 404)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_it_is_there_once_it_answers_and_ends_with_all_that_it_started(tmp_path: Path) -> None:
    port, helper = free_port(), tmp_path / "pid"
    command = [sys.executable, "-c", ANSWERING, str(port), str(helper)]
    with running(command, port, "/ready", tmp_path / "log") as server:
        assert server.url == f"http://127.0.0.1:{port}" and server.process.poll() is None
        assert server.resident() > 1 << 20 and server.count("task") >= 1 and server.count("fd") >= 3
        assert (tmp_path / "log").read_text().count(" 503 ") == 2
    assert server.process.returncode is not None
    until(lambda: not runs(int(helper.read_text())))


def test_it_ends_where_the_wait_for_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a second Ctrl-C, which its own end takes long enough to invite."""
    port = free_port()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + ANSWERING
    command = [sys.executable, "-c", deaf, str(port), str(tmp_path / "pid")]
    waits = iter([KeyboardInterrupt()])
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], seconds: float | None = None) -> int:
        for error in waits:
            raise error
        return wait(process, seconds)

    with pytest.raises(KeyboardInterrupt), running(command, port, "/ready", tmp_path / "log") as server:
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    assert server.process.returncode is not None
    until(lambda: not runs(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    ("script", "seconds", "told"),
    [
        ("print('no such model'); raise SystemExit(3)", 60.0, r"ended with status 3:\nno such model"),
        ("import time; print('loading', flush=True); time.sleep(100)", 1.0, "did not answer within 1 s"),
    ],
)
def test_one_that_does_not_come_up_says_why(tmp_path: Path, script: str, seconds: float, told: str) -> None:
    with (
        pytest.raises(NotStarted, match=told),
        running([sys.executable, "-c", script], free_port(), "/", tmp_path / "log", seconds),
    ):
        raise AssertionError("it answers nothing")


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(NotStarted, match="cannot be run"),
        running([str(tmp_path / "none")], free_port(), "/", tmp_path / "log"),
    ):
        raise AssertionError("it is not there")
