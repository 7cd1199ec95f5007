"""The log on standard error: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time

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


def configure(form: str, level: str) -> None:
    """Send all loggers to standard error. The libraries' own talk starts at warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in ("uvicorn", "uvicorn.error", "asyncio", "httpx", "httpx2", "fsspec", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)


def configure_quietly(form: str, level: str) -> None:
    """For a command that ends with an answer: "info", which a server says by itself, is warnings alone here."""
    configure(form, "warning" if level == "info" else level)
