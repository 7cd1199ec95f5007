"""A training process that is ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.jobs import worker_process
from server.jobs.worker_process import WorkerProcess


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="the system knows no idle priority")
def test_a_process_of_the_least_priority_does_not_keep_it_to_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that computes without end it would live as long, and the server's own end with it."""
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); print('{}', flush=True); sys.stdin.read()"
    monkeypatch.setattr(worker_process, "COMMAND", [sys.executable, "-c", f"import os, sys; {idle}"])
    child = WorkerProcess(tmp_path)
    lines = child.lines()
    assert next(lines) == {}
    raised: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setscheduler", lambda thread, kind, how: raised.append((thread, kind)))
        patch.setattr(subprocess.Popen, "kill", lambda self: None)
        child.kill()
        assert raised == [(child._process.pid, os.SCHED_OTHER)]
    child.kill()
    assert not list(lines) and "SIGKILL" in child.how_it_ended()
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: pytest.fail("its number may be another's by now"))
        child.kill()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], WorkerProcess]:
    """`child(code)`: a process that runs this instead of a training."""

    def start(code: str) -> WorkerProcess:
        monkeypatch.setattr(worker_process, "COMMAND", [sys.executable, "-c", code])
        return WorkerProcess(tmp_path)

    return start


def test_it_hears_no_ctrl_c_of_the_server_and_stays_in_its_session(child: Callable[[str], WorkerProcess]) -> None:
    running = child("import sys; sys.stdin.read()")
    pid = running._process.pid
    assert os.getpgid(pid) == pid and os.getsid(pid) == os.getsid(0)
    running.stop()
    running.stop()
    assert not list(running.lines()) and running.how_it_ended().endswith("with status 0, without a word")


def test_what_is_no_line_of_its_own_is_passed_over(child: Callable[[str], WorkerProcess]) -> None:
    """A library may print what it likes, and a kill may cut a line short."""
    print_all = "print('loading'); print('[1]'); print('5'); print('{\"a\": 1}'); print('{\"a\":', end='')"
    assert list(child(print_all).lines()) == [{"a": 1}]


def test_a_process_that_has_ended_leaves_no_file_open(child: Callable[[str], WorkerProcess]) -> None:
    ended = child("raise SystemExit(3)")
    assert not list(ended.lines()) and "with status 3" in ended.how_it_ended()
    assert [pipe.closed for pipe in (ended._process.stdin, ended._process.stdout) if pipe] == [True, True]


def test_modules_of_the_folder_that_the_server_was_started_in_are_none_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "json.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "started")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    started = WorkerProcess(tmp_path / "job")
    started.stop()
    list(started.lines())
    assert "the wrong one" not in started.how_it_ended()
