"""`python held_child.py GATE FOLDER`: the training process, which waits behind the step that the file GATE names.

It goes on when the file names a later one or when it is asked to stop. So a test holds a job at a step for as long as
it wants, however fast or slow the machine is.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from server.jobs import worker

GATE = Path(sys.argv[1])
trained = worker.run


def run(folder: Path, tell: Any, stop: threading.Event) -> None:
    def tell_and_wait(line: dict[str, Any]) -> None:
        tell(line)
        while line["kind"] == "step" and line["step"] >= int(GATE.read_text()) and not stop.wait(0.01):
            pass

    trained(folder, tell_and_wait, stop)


worker.run = run
sys.exit(worker.main(Path(sys.argv[2])))
