"""The log on standard error: lines for people, or one JSON object a line; a server's written by a thread of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import threading
import time
from queue import SimpleQueue

MOST_LINES = 10_000
"""Lines that wait to be written; what comes on top of them is counted instead."""
LAST_WORDS = 2.0
"""Seconds for the lines that still wait when the process ends."""

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """One object a record: time (UTC), level, logger, message, what was given as `extra`, and an exception's text."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextLines(logging.Formatter):
    """A line for each record, whatever is in its message: names in adapters are written by strangers."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda sign: repr(sign[0])[1:-1], super().formatMessage(record))


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Behind(logging.Handler):
    """Writes to the file `descriptor` on a thread of its own.

    Whoever reads the log may stop reading, as a pager does, or a collector that hangs: no request waits for that then,
    and no end. What such a reader leaves no room for is lost, and a line says how many lines that were.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines = SimpleQueue[str | threading.Event]()  # a signal's handler may put a line amid another's
        self._lost = 0
        threading.Thread(target=self._run, name="loramux-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # a message that does not fit what it was given, as the handlers of the library have it
            self.handleError(record)
            return
        if self._lines.qsize() < MOST_LINES:
            self._lines.put(line)
        else:
            self._lost += 1

    def flush(self) -> None:
        """Wait until what was logged before is written, but not for long."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(LAST_WORDS)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
            else:
                self._write(line)
            if self._lost and self._lines.empty():
                self.acquire()
                lost, self._lost = self._lost, 0
                self.release()
                told = f"{lost} lines of the log are lost: whoever reads it was too slow"
                record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, told, None, None)
                self._write(self.format(record))

    def _write(self, line: str) -> None:
        rest = f"{line}\n".encode("utf-8", "backslashreplace")
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # a terminal that another program has told not to wait
                select.select([], [self._descriptor], [])
            except OSError:  # nobody reads it any more, or the disk is full
                return


def configure(form: str, level: str, *, behind: bool = False) -> None:
    """Send all loggers to standard error, written `behind` those who log or by them. The libraries' own talk starts at
    warnings."""
    handler = Behind(sys.stderr.fileno()) if behind else logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in ("uvicorn", "uvicorn.error", "asyncio", "httpx", "httpx2", "fsspec", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)


def flush() -> None:
    """Have what was logged written, before the process ends without a word to anybody."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure_quietly(form: str, level: str) -> None:
    """For a command that ends with an answer: "info", which a server says by itself, is warnings alone here."""
    configure(form, "warning" if level == "info" else level)
