"""Shared parts of the `loramux bench` commands: options, tables, and JSON results with a description of the machine."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from server.settings import given_path

console = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the JSON result and the plot.", callback=given_path)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

PROMPT_TOKENS, NEW_TOKENS = 128, 64
"""Default lengths of a prompt and of its answer."""


def log(line: str) -> None:
    """Print progress to stderr."""
    console.print(line, markup=False)


def check_extra() -> None:
    """Raise BadSetting if the packages of the `bench` extra are missing."""
    from server.errors import BadSetting, install_command

    for module in ("aiohttp", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise BadSetting(f"This command needs {module}. Install it with {install_command('bench')}", "bench")


def check_output(out: Path | None) -> None:
    """Create the output folder, and raise OSError before the measurement if it cannot be written."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def machine() -> dict[str, str | int]:
    """The processor, the cores of this process, Python's version and the time (UTC)."""
    from server.kernels.cpu_info import cpuinfo_field
    from server.kernels.threads import available_cpus

    return {
        "processor": cpuinfo_field("model name") or platform.processor() or platform.machine(),
        "cores": available_cpus(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def result(parameters: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON result: the parameters of the run ("asked"), the machine, and the measurements."""
    return {"asked": parameters, "machine": machine(), **measured}


def table(*headings: str, title: str | None = None) -> Table:
    """A table that wraps long cells instead of cutting them off."""
    return Table(*(Column(heading, overflow="fold") for heading in headings), title=title)


def show(result: Mapping[str, Any], shown: Table, as_json: bool, out: Path | None, name: str) -> None:
    """Print the table, or the result as JSON, and write the result to `out`/`name`.json."""
    text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    if out is not None:
        (out / f"{name}.json").write_text(text)
    if as_json:
        sys.stdout.write(text)
    else:
        Console().print(shown)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity with None, because JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
