"""A training process that is ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.jobs import process
from server.jobs.process import Process


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="the system knows no idle priority")
def test_a_process_of_the_least_priority_does_not_keep_it_to_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that computes without end it would live as long, and the server's own end with it."""
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); print('{}', flush=True); sys.stdin.read()"
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", f"import os, sys; {idle}"])
    child = Process(tmp_path)
    lines = child.lines()
    assert next(lines) == {}
    raised: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setscheduler", lambda thread, kind, how: raised.append((thread, kind)))
        patch.setattr(subprocess.Popen, "kill", lambda self: None)
        child.kill()
        assert raised == [(child.pid, os.SCHED_OTHER)]
    child.kill()
    assert not list(lines) and "SIGKILL" in child.how_it_ended()
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: pytest.fail("its number may be another's by now"))
        child.kill()
