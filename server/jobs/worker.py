"""`python -m server.jobs.worker FOLDER`: the training process of one job.

It runs at the lowest priority, and the OOM killer ends it first. It stops at a checkpoint when its standard input is
closed, which also happens when the server ends. Messages go to standard output as JSON lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from server.jobs.worker_messages import WorkerSpec
    from server.model.loader import Base

LOCK, UNSENT = "lock", "untold.jsonl"
PROGRESS = ("step", "eval", "checkpoint")
"""Kinds of messages that are sent again by the next process."""
NICE = 19
OOM_SCORE = "1000"

Send = Callable[[dict[str, Any]], None]


def main(folder: Path) -> int:
    """Run the job in `folder`. The exit status is 0 if the last message says how the job ended."""
    output = _take_stdout()
    lower_priority()
    stop = threading.Event()
    threading.Thread(target=_wait_for_eof, args=(sys.stdin.fileno(), stop), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    send = sender(output, folder / UNSENT)
    with lock_folder(folder, stop) as locked:
        if locked:
            resend(folder / UNSENT, send)
            _import_torch()
            run(folder, send, stop)
    return 0


def sender(output: TextIO, unsent: Path) -> Send:
    """A function that sends a message to the server. If the server has ended, it goes to the file `unsent`."""

    def send(message: dict[str, Any]) -> None:
        line = json.dumps(message) + "\n"
        try:
            output.write(line)
            output.flush()
        except BrokenPipeError:
            with unsent.open("a", encoding="utf-8") as file:
                file.write(line)

    return send


def resend(unsent: Path, send: Send) -> None:
    """Send the progress that an earlier process of this job made after its server had ended."""
    if not unsent.exists():
        return
    lines = unsent.read_text(encoding="utf-8", errors="replace").splitlines()
    unsent.unlink()
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill truncated the line
            message = json.loads(line)
            if message["kind"] in PROGRESS:
                send(message)


def run(folder: Path, send: Send, stop: threading.Event) -> None:
    """Run the job in `folder` in this process. The last message says how it ended."""
    import torch

    from adapters.errors import AdapterError, TrainingStopped
    from server.errors import ServerError
    from server.jobs.errors import JobError, os_error_message
    from server.jobs.fine_tune import fine_tune
    from server.jobs.worker_messages import FAILED, STOPPED, WorkerSpec
    from server.model.chat_template import template_time

    spec = WorkerSpec.read(folder)
    torch.set_num_threads(spec.threads)
    try:
        with template_time(spec.created_at):
            fine_tune(spec, _load_base(spec), folder, send, stop.is_set)
    except TrainingStopped as error:
        send({"kind": STOPPED, "message": error.message})
    except JobError as error:
        send({"kind": FAILED, "code": error.code, "message": error.message, "param": error.param})
    except (AdapterError, ServerError) as error:
        send({"kind": FAILED, "code": "failed", "message": error.message, "param": error.param})
    except OSError as error:
        send({"kind": FAILED, "code": "failed", "message": os_error_message(error), "param": None})


def _load_base(spec: WorkerSpec) -> Base:
    """Map the packed file of the served base. Raises BadModel if it has changed."""
    from server.errors import BadModel
    from server.kernels import choose
    from server.model.loader import load_base

    source = spec.base
    base = load_base(
        source.source,
        name=source.name,
        backend=choose(source.kernels),
        quantization=source.quantization,
        group_size=source.group_size,
        double_quant=source.double_quant,
        table_bits=source.table_bits,
        cache_dir=source.cache_dir,
    )
    if base.id != source.id:
        raise BadModel(f"the files of {source.name} have changed since the server loaded them; restart the server")
    return base


def lower_priority() -> None:
    """Give this process the lowest CPU priority, and make it the OOM killer's first choice."""
    os.nice(NICE)
    with contextlib.suppress(OSError, AttributeError):  # not on Linux, or not permitted
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


@contextlib.contextmanager
def lock_folder(folder: Path, stop: threading.Event) -> Iterator[bool]:
    """Hold the job's lock, and yield whether it is held. Returns False when `stop` is set while waiting.

    The process of a server that was killed may still write its last checkpoint.
    """
    with (folder / LOCK).open("w") as lock:
        while not stop.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)  # `stop.wait` would hold the lock that the signal handler's `stop.set` needs
        yield not stop.is_set()


def _import_torch() -> None:
    # Garbage collection while importing torch, and of its objects at exit, takes more than half a second.
    gc.disable()
    import server.jobs.fine_tune  # noqa: F401

    gc.freeze()
    gc.enable()


def _take_stdout() -> TextIO:
    """A stream to standard output. Whatever libraries print goes to standard error from here on."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


def _wait_for_eof(stdin: int, stop: threading.Event) -> None:
    # os.read, because a thread that waits in sys.stdin holds a lock that Python needs when it exits.
    while os.read(stdin, 1):
        continue
    stop.set()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
