"""What people and machines see: progress bars on a terminal, JSON where it is asked for."""

from __future__ import annotations

import contextlib
import json
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

WIDE = 1000
"""Columns of a file or a pipe."""

Progress = Callable[[str, int, int], None]

PATIENCE = 2.0
"""Seconds that whoever reads standard error has for the last lines of a process."""
SECONDS_BETWEEN_LINES = 30.0
"""How often long work without a terminal says how far it is."""


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escaped(text: str, lines: bool = False) -> str:
    """A text as a terminal may have it: adapters have names, cards and tensors that strangers wrote. Control characters
    and those that turn the direction are escaped, ends of lines too unless there may be several `lines`.
    """
    if lines:
        text = text.replace("\r\n", "\n").expandtabs()
    return _CONTROL.sub(lambda sign: "\n" if lines and sign[0] == "\n" else repr(sign[0])[1:-1], text)


class _Results(Console):
    def render_str(self, text: str, **how: Any) -> Text:  # through which all texts go, those of tables too
        return super().render_str(escaped(text, lines=True), **how)


def out() -> Console:
    """For results. Square brackets in them, of a path or a pattern, are text; tables are whole where nobody looks."""
    width = None if sys.stdout.isatty() else WIDE
    return _Results(highlight=False, soft_wrap=True, markup=False, width=width)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=None if not sys.stdout.isatty() else 2, default=str) + "\n")


def in_json(error: Exception, message: str, param: str | None) -> dict[str, str | None]:
    """An error as it stands under "error" in the JSON of every command."""
    return {"message": message, "type": type(error).__name__, "param": param}


def say_error(message: str) -> None:
    """What a process ends by, or what one of several things has failed by; whoever reads standard error and has stopped
    is not waited for."""
    try:
        taken = select.select([], [sys.stderr], [], PATIENCE)[1]
    except (OSError, ValueError):  # it is no file of the system's
        taken = [sys.stderr]
    if taken:
        sys.stderr.write(f"error: {escaped(message, lines=True)}\n")


@contextlib.contextmanager
def progress(unit: str, quiet: bool = False, tell: Callable[[str], object] | None = None) -> Iterator[Progress]:
    """A bar on standard error for `call(what, done, total)`; `unit` is "bytes" or "parameters".

    `total` 0 is not known yet. Without a terminal there is a line for each new `what`, and how far it is now and then;
    `tell` hears these lines, if it is given, wherever standard error is.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda what, done, total: None
    elif tell is not None or not console.is_terminal:
        line = tell or console.print
        said: dict[str, float] = {}

        def say(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            if what not in said:
                line(f"{what} ...")
            elif total and now - said[what] >= SECONDS_BETWEEN_LINES:
                line(f"{what} {100 * done // total} %")
            else:
                return
            said[what] = now

        yield say
    else:
        with _bar(console, unit) as call:
            yield call


@contextlib.contextmanager
def _bar(console: Console, unit: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    amount = DownloadColumn() if unit == "bytes" else TextColumn("{task.percentage:>3.0f} %")
    with Bar(
        TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def call(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield call


def size(n: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("the last unit always fits")
