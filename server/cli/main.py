"""All commands under one name, and how their errors end: one line that says what to do, and a status of 1."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import typer

from adapters.errors import AdapterError
from server.bench import command as bench
from server.cli import adapters, evaluate, generate, models, offline, search, serve, train
from server.errors import ServerError

app = typer.Typer(
    name="loramux",
    help="Serve many LoRA adapters, and weighted mixes of them, on one resident 4-bit base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(metadata.version("loramux"))
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Say the version and end."),
) -> None:
    """Serve many LoRA adapters, and weighted mixes of them, on one resident 4-bit base."""


app.command()(serve.serve)
app.command()(generate.generate)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(search.search)
app.command()(offline.compose)
app.command()(offline.prune)
app.add_typer(adapters.app, name="adapters")
app.command()(models.pull)
app.command()(models.quantize)
app.command()(models.doctor)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run `loramux` with the process's arguments."""
    try:
        app()
    except (ServerError, AdapterError) as error:
        if "--json" in sys.argv:
            body = {"message": error.message, "type": type(error).__name__, "param": error.param}
            sys.stdout.write(json.dumps({"error": body}) + "\n")
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(1)
