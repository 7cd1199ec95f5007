"""The training process as the server sees it: messages, stopping, killing, and how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.jobs import worker_process
from server.jobs.worker_process import WorkerProcess, last_stderr


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], WorkerProcess]:
    """`child(code)`: a process that runs this code instead of a training."""

    def start(code: str) -> WorkerProcess:
        monkeypatch.setattr(worker_process, "COMMAND", [sys.executable, "-c", code])
        return WorkerProcess(tmp_path)

    return start


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="the system has no idle priority")
def test_a_process_with_idle_priority_is_killed_at_normal_priority(
    child: Callable[[str], WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); print('{}', flush=True); sys.stdin.read()"
    running = child(f"import os, sys; {idle}")
    messages = running.messages()
    assert next(messages) == {}
    raised: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setscheduler", lambda thread, kind, how: raised.append((thread, kind)))
        patch.setattr(subprocess.Popen, "kill", lambda self: None)
        running.kill()
        assert raised == [(running._process.pid, os.SCHED_OTHER)]
    running.kill()
    assert not list(messages) and "SIGKILL" in running.exit_message()


def test_it_has_its_own_process_group_in_the_session_of_the_server(child: Callable[[str], WorkerProcess]) -> None:
    running = child("import sys; sys.stdin.read()")
    pid = running._process.pid
    assert os.getpgid(pid) == pid and os.getsid(pid) == os.getsid(0)
    running.stop()
    running.stop()
    assert not list(running.messages()) and running.exit_message().endswith("exit status 0 and printed no error")
    assert [pipe.closed for pipe in (running._process.stdin, running._process.stdout) if pipe] == [True, True]


def test_lines_that_are_not_messages_are_skipped(child: Callable[[str], WorkerProcess]) -> None:
    lines = "print('loading'); print('[1]'); print('{\"a\": 1, \"b\": NaN}'); print('{\"a\":', end='')"
    assert list(child(lines).messages()) == [{"a": 1, "b": None}]


def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "json.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "started")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    started = WorkerProcess(tmp_path / "job")
    started.stop()
    list(started.messages())
    assert "the wrong one" not in started.exit_message()


def test_the_last_output_has_no_paths(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 5000 + '\n  File "/home/somebody/lib/torch/nn.py", line 3\nMemoryError: /a/b/c')
    output = last_stderr(tmp_path / "log")
    assert "/" not in output and output.endswith('File "nn.py", line 3\nMemoryError: c') and len(output) <= 600
    assert last_stderr(tmp_path / "none") == ""
