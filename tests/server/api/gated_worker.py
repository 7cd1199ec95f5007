"""`python gated_worker.py GATE FOLDER`: the training process, which waits after the step that the file GATE names.

It continues when the file names a later step, or when it is asked to stop. So a test holds a job at a step.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from server.jobs import worker

GATE = Path(sys.argv[1])
run_job = worker.run


def run(folder: Path, send: Any, stop: threading.Event) -> None:
    def send_and_wait(message: dict[str, Any]) -> None:
        send(message)
        while message["kind"] == "step" and message["step"] >= int(GATE.read_text()) and not stop.wait(0.01):
            pass

    run_job(folder, send_and_wait, stop)


worker.run = run
sys.exit(worker.main(Path(sys.argv[2])))
