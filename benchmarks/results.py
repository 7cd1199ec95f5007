"""What a measurement tells: a table for people, JSON for machines, a file of it if asked for.

Owns the form of both. What is measured is elsewhere.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def report(asked: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file has: what was asked, the machine, and what came of it."""
    from benchmarks.machine import describe  # torch, which commands that only ask take a second for

    return {"asked": asked, "machine": describe(), **found}


def make_room(out: Path | None) -> None:
    """Find out before anything is measured whether what comes of it can be written. Raises OSError."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def table(*headings: str, title: str | None = None) -> Table:
    """A table that folds what its terminal is too narrow for, and cuts no figure off."""
    return Table(*(Column(heading, overflow="fold") for heading in headings), title=title)


def show(result: Mapping[str, Any], shown: Table, as_json: bool, out: Path | None, name: str) -> None:
    """Print the table, or the result as JSON, and write the latter to `name`.json in `out`."""
    text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    if out is not None:
        (out / f"{name}.json").write_text(text)
    if as_json:
        sys.stdout.write(text)
    else:
        Console().print(shown)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not: the rate of nothing, a wait without end, a ratio of those."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
