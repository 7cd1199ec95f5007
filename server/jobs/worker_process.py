"""`WorkerProcess`: the training process of one job, seen from the server.

Owns starting it, reading its lines, asking it to stop, and what can be told of one that died.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.settings import training_environment

COMMAND = (sys.executable, "-P", "-m", "server.jobs.worker")
"""Without the folder that the server was started in among those that modules come from."""
STDERR = "stderr.log"
LAST_WORDS = 600
"""Characters."""
_PATH = re.compile(r"(?:/[^\s/'\":,()]+)+/")


class WorkerProcess:
    """A running child. `lines()` until it ends; `stop()` lets it write a checkpoint, `kill()` does not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / STDERR).open("wb") as stderr:
            self._process = subprocess.Popen(
                [*COMMAND, str(folder.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # A group, so that a Ctrl-C is the server's alone to hear, and no session: Linux would give it an equal
                # share of the processors beside the server (sched_autogroup), whatever its priority.
                process_group=0,
                env=training_environment(),
            )

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the child tells, as it comes; ends when the child has."""
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                try:
                    told = json.loads(line)
                except ValueError:
                    continue  # a line cut short by a kill
                if isinstance(told, dict):
                    yield told
        self._process.wait()
        self._let_go()

    def stop(self) -> None:
        """Ask it to write a checkpoint and end. Idempotent; from any thread."""
        self._let_go()

    def kill(self) -> None:
        """End it at once. Its last checkpoint stays."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            self._process.kill()
            # At the least priority a thread ends only where nobody else computes; some may have ended by now.
            for thread in os.listdir(f"/proc/{self._process.pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))

    def how_it_ended(self) -> str:
        """For a person: the signal or the status, and the last words, without any path."""
        status = self._process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            how = f"the training process was ended by {name}"
            if name == "SIGKILL":
                how += ", as the system does when memory runs out"
        else:
            how = f"the training process ended with status {status}"
        words = last_words(self._folder / STDERR)
        return f"{how}; its last words: {words}" if words else f"{how}, without a word"

    def _let_go(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def last_words(file: Path) -> str:
    """The end of what a process wrote to its standard error; of a path only the last part is told."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 4 * LAST_WORDS))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return _PATH.sub("", text).strip()[-LAST_WORDS:]
