"""Terminal output: tables and progress bars for people, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

Progress = Callable[[str, int, int], None]
"""Called with a description, the amount done and the total (0 if unknown)."""

PIPE_WIDTH = 1000
"""Columns if stdout is not a terminal, so that tables are not folded."""
PROGRESS_INTERVAL = 30.0
"""Seconds between progress lines if stderr is not a terminal."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escape(text: str, keep_newlines: bool = False) -> str:
    """Escape control characters and text direction marks. Names and cards of adapters are untrusted."""
    if keep_newlines:
        text = text.replace("\r\n", "\n").expandtabs()
    return _CONTROL.sub(lambda c: "\n" if keep_newlines and c[0] == "\n" else repr(c[0])[1:-1], text)


class _EscapingConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape(text, keep_newlines=True), **options)


def stdout() -> Console:
    """A console for results. It escapes control characters and prints square brackets as text."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return _EscapingConsole(highlight=False, soft_wrap=True, markup=False, width=width)


def print_json(value: Any) -> None:
    """Print one JSON document to stdout, indented on a terminal."""
    sys.stdout.write(json.dumps(value, indent=None if not sys.stdout.isatty() else 2, default=str) + "\n")


def error_json(error: Exception, message: str, param: str | None) -> dict[str, str | None]:
    """The value of "error" in the JSON output of a command."""
    return {"message": message, "type": type(error).__name__, "param": param}


def print_error(message: str) -> None:
    """Print an error to stderr."""
    sys.stderr.write(f"error: {escape(message, keep_newlines=True)}\n")


@contextlib.contextmanager
def progress(unit: str, quiet: bool = False, log: Callable[[str], object] | None = None) -> Iterator[Progress]:
    """Show the progress of long work on stderr.

    Without a terminal, or with `log`, it writes a line for each new description and one every `PROGRESS_INTERVAL`.

    Args:
        unit: "bytes" shows sizes; anything else shows per cent.
        quiet: show nothing.
        log: receives the lines instead of stderr.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda description, done, total: None
    elif log is not None or not console.is_terminal:
        yield _progress_lines(log or console.print)
    else:
        with _progress_bar(console, unit) as update:
            yield update


def _progress_lines(write: Callable[[str], object]) -> Progress:
    last: dict[str, float] = {}

    def update(description: str, done: int, total: int) -> None:
        now = time.monotonic()
        if description not in last:
            write(f"{description} ...")
        elif total and now - last[description] >= PROGRESS_INTERVAL:
            write(f"{description} {100 * done // total} %")
        else:
            return
        last[description] = now

    return update


@contextlib.contextmanager
def _progress_bar(console: Console, unit: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    amount = DownloadColumn() if unit == "bytes" else TextColumn("{task.percentage:>3.0f} %")
    with Bar(
        TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def update(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bar.add_task(description, total=total or None)
            bar.update(tasks[description], completed=done, total=total or None)

        yield update


def format_size(size: float) -> str:
    """Bytes with a unit, for example "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
