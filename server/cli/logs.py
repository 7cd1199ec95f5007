"""The log on standard error: lines for people, or one JSON object a line. A server waits for no reader of it."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import time
from queue import SimpleQueue
from typing import NoReturn, TextIO

import typer

from server.cli.output import PATIENCE, escaped, say_error

MOST_LINES = 10_000
"""Lines that wait to be written; what comes on top of them is counted instead."""
MOST_BYTES = 16 << 20
"""Bytes of the lines that wait, one that is longer waiting alone."""
BETWEEN = 10.0
"""Seconds between two lines that tell a slow reader how many were lost."""

log = logging.getLogger(__name__)

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
        return escaped(super().formatMessage(record))


class Behind(logging.Handler):
    """Writes to a file of the system's without waiting for who reads it.

    Whoever reads the log may stop reading, as a pager does, or a collector that hangs: no request waits for that then,
    and no end. A line that there is room for is written at once, so that a crash costs none; others wait for a thread,
    and what has no room there either is lost, and a line says how many lines that were.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._descriptor = stream.fileno()
        self._encoding = stream.encoding
        self._waiting = SimpleQueue[bytes | threading.Event]()  # to which a signal's handler may put amid another's
        self._own = threading.RLock()
        """Of what follows. The handler's lock is held while it flushes as the process ends, and flushing waits for the
        thread."""
        self._behind = False
        """Whether there are lines that the thread has yet to write."""
        self._came = self._gone = 0
        """Bytes that were ever put for the thread, and those that it has written: no count that two threads change."""
        self._lost = 0
        self._told = time.monotonic()
        threading.Thread(target=self._run, name="loramux-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:  # a message that does not fit what it was given, as the handlers of the library have it
            self.handleError(record)
            return
        with self._own:
            if not self._behind and len(line) <= select.PIPE_BUF and self._has_room(0.0):
                self._write(line)
            elif self._waiting.qsize() < MOST_LINES and self._takes(len(line)):
                self._behind = True
                self._came += len(line)
                self._waiting.put(line)
            else:
                self._lost += 1

    def flush(self) -> None:
        """Wait until what was logged before is written, but not for long."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(PATIENCE)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(self._encoding, "backslashreplace")

    def _takes(self, more: int) -> bool:
        """Whether so many bytes may wait beside those that do."""
        wait = self._came - self._gone
        return wait <= 0 or wait + more <= MOST_BYTES

    def _has_room(self, seconds: float | None) -> bool:
        """Whether so much can be written as a pipe takes in one piece."""
        try:
            return bool(select.select([], [self._descriptor], [], seconds)[1])
        except OSError:  # it is closed, as writing will tell
            return True

    def _run(self) -> None:
        while True:
            item = self._waiting.get()
            if not isinstance(item, threading.Event):
                self._write(item)
                self._gone += len(item)
            if lost := self._untold():
                message = f"{lost} lines of the log are lost: whoever reads it is too slow"
                self._write(self._line(logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)))
            if isinstance(item, threading.Event):
                item.set()

    def _untold(self) -> int:
        """How many lines are lost that nobody was told of, if it is time to tell."""
        if not self._own.acquire(blocking=False):
            return 0  # somebody logs, or waits for this thread within that; what comes of it comes here
        try:
            self._behind = not self._waiting.empty()
            lost, now = self._lost, time.monotonic()
            if not lost or (self._behind and now - self._told <= BETWEEN):
                return 0
            self._lost, self._told = 0, now
            return lost
        finally:
            self._own.release()

    def _write(self, rest: bytes) -> None:
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # a terminal that another program has told not to wait
                self._has_room(None)
            except OSError:  # nobody reads it any more, or the disk is full
                return


def configure(form: str, level: str, *, behind: bool = False) -> None:
    """Send all loggers to standard error, written `behind` those who log or by them. The libraries' own talk starts at
    warnings."""
    handler = Behind(sys.stderr) if behind else logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in ("uvicorn", "uvicorn.error", "asyncio", "httpx", "httpx2", "fsspec", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)


def as_json() -> bool:
    """Whether lines of the log are JSON: whoever reads them reads all that the process says."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def say_last(message: str) -> None:
    """Why a process ends, once, where it is read."""
    if as_json():
        log.error("%s", message)
    else:
        say_error(message)


def fail(message: str) -> NoReturn:
    """End the command with an error beside results that have been told."""
    sys.stdout.flush()
    say_last(message)
    raise typer.Exit(1)


def flush() -> None:
    """Have what was logged written, before the process ends without a word to anybody."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure_quietly(form: str, level: str) -> None:
    """For a command that ends with an answer: "info", which a server says by itself, is warnings alone here."""
    configure(form, "warning" if level == "info" else level)
