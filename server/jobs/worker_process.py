"""`WorkerProcess`: starts the training process of a job, reads its messages and stops it."""

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
"""-P keeps modules in the server's working directory from being imported."""
STDERR = "stderr.log"
MAX_STDERR = 600
"""Characters of its standard error in an error message."""
_FOLDERS = re.compile(r"(?:/[^\s/'\":,()]+)+/")


class WorkerProcess:
    """A running training process.

    Args:
        folder: The job's folder, with the spec.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / STDERR).open("wb") as stderr:
            self._process = subprocess.Popen(
                [*COMMAND, str(folder.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # An own process group does not receive Ctrl-C. An own session would get an equal share of the CPU
                # whatever its priority (sched_autogroup).
                process_group=0,
                env=training_environment(),
            )

    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages of the process as they arrive. Ends when the process has ended."""
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                try:
                    message = json.loads(line, parse_constant=lambda name: None)  # NaN and infinity
                except ValueError:
                    continue  # a kill truncated the line
                if isinstance(message, dict):
                    yield message
        self._process.wait()
        self.stop()

    def stop(self) -> None:
        """Ask the process to write a checkpoint and exit, by closing its standard input. Thread-safe."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def kill(self) -> None:
        """End the process at once. Its last checkpoint remains."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            self._process.kill()
            # Threads with idle priority die only when the CPU is idle, so raise their priority.
            for thread in os.listdir(f"/proc/{self._process.pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))

    def exit_message(self) -> str:
        """How the process ended, with the end of its standard error. Without paths."""
        status = self._process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            message = f"the training process was ended by {name}"
            if name == "SIGKILL":
                message += ", which the system sends when memory runs out"
        else:
            message = f"the training process ended with exit status {status}"
        stderr = last_stderr(self._folder / STDERR)
        return f"{message}; its last output: {stderr}" if stderr else f"{message} and printed no error"


def last_stderr(file: Path) -> str:
    """The end of a log file. Folders are removed from paths."""
    try:
        text = file.read_bytes()[-4 * MAX_STDERR :].decode("utf-8", "replace")
    except OSError:
        return ""
    return _FOLDERS.sub("", text).strip()[-MAX_STDERR:]
