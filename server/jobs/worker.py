"""`python -m server.jobs.worker FOLDER`: the training process, one job long.

Owns how it behaves beside the server: it takes only what processor time nobody else wants, it is the first to go when
memory runs out, and it stops at a checkpoint as soon as its standard input ends, which it does with the server too.
What it does is `fine_tune`'s. Lines of JSON go to standard output, last words to standard error.
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
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from server.jobs.worker_messages import WorkerSpec

LOCK, UNTOLD = "lock", "untold.jsonl"
PROGRESS = ("step", "eval", "checkpoint")
AGAIN = "again"
"""In lines that the server before may have heard."""
ON_THEIR_WAY = 64
"""Lines of a busy server's pipe that are written once more, at most; each is a step."""
NICE = 19
OOM_SCORE = "1000"


def main(folder: Path) -> int:
    """Run the job in `folder`. The exit status is 0 if its end was told, however it ended."""
    words = Words(_own_output(), folder / UNTOLD)
    yield_to_others()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin.fileno(), stop), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    with _alone(folder, stop) as held:
        if held:
            words.tell_untold()
            _import()
            run(folder, words.tell, stop)
        else:
            from server.jobs.worker_messages import STOPPED

            words.tell({"kind": STOPPED, "message": "stopped before it began"})
    return 0


class Words:
    """What is told to the server. What it does not hear, since it is gone, is kept for the next one, and so is the last
    that was told before: it may have been on its way still. The next one hears such lines as told again.
    """

    def __init__(self, out: TextIO, untold: Path) -> None:
        self._out, self._untold = out, untold
        self._last: deque[str] = deque(maxlen=ON_THEIR_WAY)

    def tell(self, line: dict[str, Any]) -> None:
        """One line."""
        text = json.dumps(line) + "\n"
        try:
            self._out.write(text)
            self._out.flush()
            self._last.append(text)
        except BrokenPipeError:
            with self._untold.open("a", encoding="utf-8") as kept:
                kept.writelines([*self._last, text])
            self._last.clear()

    def tell_untold(self) -> None:
        """What a process before this one has done of the job after its server was gone; how it ended is nobody's."""
        if self._untold.exists():
            kept = self._untold.read_text(encoding="utf-8", errors="replace").splitlines()
            self._untold.unlink()  # before `tell` keeps there what this server does not hear either
            for text in kept:
                try:
                    line = json.loads(text)
                except ValueError:  # the last one, if the disk was full or the power went
                    continue
                if line.get("kind") in PROGRESS:
                    self.tell({**line, AGAIN: True})


def _import() -> None:
    """Import what is heavy, at the lowest priority. All of it stays: to look through it for garbage, as Python does
    while it grows and when the process ends, takes more than half a second.
    """
    gc.disable()
    import server.jobs.fine_tune  # noqa: F401

    gc.freeze()
    gc.enable()


def run(folder: Path, tell: Any, stop: threading.Event) -> None:
    """Do the job in `folder`, in whatever process this is; the last line that is told says how it ended."""
    import torch

    from adapters.errors import AdapterError, TrainingStopped
    from server.errors import ServerError
    from server.jobs.errors import JobError, refused
    from server.jobs.fine_tune import fine_tune
    from server.jobs.worker_messages import FAILED, STOPPED, WorkerSpec
    from server.model.chat_template import template_time

    spec = WorkerSpec.read(folder)
    torch.set_num_threads(spec.threads)
    try:
        with template_time(spec.created_at):
            fine_tune(spec, _base(spec), folder, tell, stop.is_set)
    except TrainingStopped as error:
        tell({"kind": STOPPED, "message": error.message})
    except JobError as error:
        tell({"kind": FAILED, "code": error.code, "message": error.message, "param": error.param})
    except (AdapterError, ServerError) as error:
        tell({"kind": FAILED, "code": "failed", "message": error.message, "param": error.param})
    except OSError as error:  # a full disk, most likely: a reason to tell, not to die of
        tell({"kind": FAILED, "code": "failed", "message": refused(error), "param": None})


def _base(spec: WorkerSpec) -> Any:
    """The served base, mapped from its packed file. Raises BadModel if it is another one by now."""
    from server.errors import BadModel
    from server.kernels import choose
    from server.model.loader import load_base

    told = spec.base
    base = load_base(
        told.source,
        name=told.name,
        backend=choose(told.kernels),
        quantization=told.quantization,
        group_size=told.group_size,
        double_quant=told.double_quant,
        table_bits=told.table_bits,
        cache_dir=told.cache_dir,
    )
    if base.id != told.id:
        raise BadModel(f"the files of {told.name} have changed since the server loaded them; restart the server")
    return base


def yield_to_others() -> None:
    """Lowest priority in everything that this system lets a process give up."""
    os.nice(NICE)
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or not allowed: nice is what there is
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


def _own_output() -> TextIO:
    """Standard output for our lines alone: what any library prints goes to standard error."""
    words = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return words


def _listen(stdin: int, stop: threading.Event) -> None:
    # Not through `sys.stdin`: a thread that waits within it holds its lock, which Python wants at its end, and aborts.
    while os.read(stdin, 1):
        continue
    stop.set()


@contextlib.contextmanager
def _alone(folder: Path, stop: threading.Event) -> Any:
    """Hold the job's lock, so that no two processes write its checkpoints; answers whether it is held, or `stop` came.

    The process of a server that was killed holds it until it has done its update, or its evaluation, and that may be
    minutes at its priority.
    """
    with (folder / LOCK).open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.is_set():
                    break
                time.sleep(0.1)  # not `stop.wait`: it holds a lock that a signal's handler, on this thread, would want
        yield not stop.is_set()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
