"""Logging to stderr through the standard library: text lines or JSON lines, formatted by structlog."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from server.cli.output import escape, print_error

if TYPE_CHECKING:
    from structlog.stdlib import ProcessorFormatter

log = logging.getLogger(__name__)

JSON_HANDLER = "loramux-json"
"""Name of the log handler that writes JSON."""
LIBRARIES = ("uvicorn", "uvicorn.error", "asyncio", "httpx", "httpx2", "fsspec", "huggingface_hub", "alembic")
"""Loggers that are limited to warnings."""


def configure(log_format: str, level: str) -> None:
    """Send all log records to stderr.

    Args:
        log_format: "text" or "json".
        level: lowest level to log, for example "info".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format))
    if log_format == "json":
        handler.set_name(JSON_HANDLER)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


def configure_for_command(log_format: str, level: str) -> None:
    """Logging of a command that prints a result: the server's default level "info" becomes "warning"."""
    configure(log_format, "warning" if level == "info" else level)


def formatter(log_format: str) -> ProcessorFormatter:
    """The formatter for "text" or "json" lines.

    JSON objects have the keys time (UTC), level, logger and message, those of `extra`, and exception.
    """
    from structlog import processors, stdlib

    last: list[Any]
    if log_format == "json":
        last = [
            processors.TimeStamper(fmt="iso", utc=True, key="time"),
            processors.EventRenamer("message"),
            processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    else:
        last = [processors.TimeStamper(fmt="%H:%M:%S", utc=False, key="time"), _text_line]
    return stdlib.ProcessorFormatter(
        foreign_pre_chain=[stdlib.add_log_level, stdlib.add_logger_name, stdlib.ExtraAdder()],
        processors=[stdlib.ProcessorFormatter.remove_processors_meta, processors.format_exc_info, *last],
    )


def is_json() -> bool:
    """Whether log lines are JSON."""
    return any(handler.get_name() == JSON_HANDLER for handler in logging.getLogger().handlers)


def report_error(message: str) -> None:
    """Write the error that ends the process, in the format of the log."""
    if is_json():
        log.error("%s", message)
    else:
        print_error(message)


def fail(message: str) -> NoReturn:
    """Report an error after results have been printed, and exit with status 1."""
    sys.stdout.flush()
    report_error(message)
    raise typer.Exit(1)


def _text_line(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    """One line per record; adapter names in messages are untrusted, so control characters are escaped."""
    line = escape(f"{event['time']} {event['level'].upper()} {event['event']}")
    return f"{line}\n{event['exception']}" if "exception" in event else line
