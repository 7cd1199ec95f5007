"""What several commands of `loramux bench` share: options, the console, and what has to be installed.

Owns no command.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.settings import given_path

console = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the JSON, and for a picture.", callback=given_path)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

PROMPT, NEW = 128, 64
"""Tokens of a prompt and of its answer, where nothing else is asked for."""


def extra() -> None:
    """Raises BadSetting where what clients and pictures need is not installed."""
    from server.errors import BadSetting, install_command

    for module in ("aiohttp", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise BadSetting(f"{module} is missing, which this command needs: {install_command('bench')}", "bench")
