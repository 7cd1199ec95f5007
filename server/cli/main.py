"""The `loramux` application: registers the commands and turns exceptions into error messages."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from importlib import metadata
from types import FrameType
from typing import NoReturn, cast

import typer
from safetensors import SafetensorError

from adapters.errors import AdapterError
from benchmarks import command as bench
from server.cli import adapters, evaluate, generate, logs, merge, models, search, serve, train
from server.cli.options import IGNORED_VARIABLE
from server.cli.output import error_json
from server.cli.signals import INTERRUPTED, Interrupted, handle_signals
from server.errors import RemoteError, ServerError, out_of_memory_message
from server.settings import leave_threads_alone

app = typer.Typer(
    name="loramux",
    help="Serve many LoRA adapters, and weighted mixes of them, on one 4-bit base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(metadata.version("loramux"))
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
) -> None:
    """Serve many LoRA adapters, and weighted mixes of them, on one 4-bit base model."""
    for name in leave_threads_alone() if context.invoked_subcommand != "serve" else ():  # serve logs it
        sys.stderr.write(f"{IGNORED_VARIABLE % name}\n")


app.command()(serve.serve)
app.command()(generate.generate)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(search.search)
app.command()(merge.compose)
app.command()(merge.prune)
app.add_typer(adapters.app, name="adapters")
app.command()(models.pull)
app.command()(models.quantize)
app.command()(models.doctor)
app.add_typer(bench.app, name="bench")


LIBRARY_THREADS = "loramux-"
"""Name prefix of threads that run native code. Python aborts the process if it exits while one of them is running."""

_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)
"""click.UsageError, which typer does not export."""


def main() -> None:
    """Run `loramux` with the arguments of the process."""
    _prepare_streams()
    with handle_signals(_same_as_ctrl_c, signal.SIGTERM):
        status = _run()
    status = status if isinstance(status, int) else 0
    if any(thread.name.startswith(LIBRARY_THREADS) for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run() -> object:
    """Run the command and return its status. Exits with a message if it raises a known error."""
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
        return _interrupted(Interrupted()) if status == INTERRUPTED else status
    except Interrupted as error:
        return _interrupted(error)
    except _UsageError as error:
        _print_json_error(error, error.format_message(), getattr(getattr(error, "param", None), "name", None))
        error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        _report_end("aborted")
        sys.exit(1)
    except (ServerError, AdapterError) as error:
        _fail(error, error.message, error.param)
    except OSError as error:
        _fail(error, _describe_os_error(error))
    except SafetensorError as error:
        _fail(error, f"A safetensors file cannot be read or written: {error}")
    except (MemoryError, RuntimeError) as error:
        if (message := out_of_memory_message(error)) is not None:
            _fail(error, message)
        if "can't start new thread" not in str(error):
            raise
        _fail(error, "The system does not allow more threads. Raise the limits (ulimit -u and -v).")


def _same_as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C, so that temporary folders are removed."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, as for background jobs of a shell
        raise KeyboardInterrupt
    handler(number, frame)


def _prepare_streams() -> None:
    """Open /dev/null for closed standard streams, and escape characters that stdout cannot encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _interrupted(error: Interrupted) -> int:
    if not error.in_output:
        _print_json_error(error, error.message)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    _report_end(error.message)
    return INTERRUPTED


def _report_end(message: str) -> None:
    """Report an end that the user requested."""
    if logs.is_json():
        logs.report_error(message)
    else:
        sys.stderr.write(f"{message}\n")


def _fail(error: Exception, message: str, param: str | None = None) -> NoReturn:
    _print_json_error(error, message, param)
    logs.report_error(message)
    sys.exit(1)


def _print_json_error(error: Exception, message: str, param: str | None = None) -> None:
    """Print the error as JSON if the command was called with --json."""
    if "--json" in sys.argv:
        body = dict(error.body) if isinstance(error, RemoteError) else error_json(error, message, param)
        with contextlib.suppress(OSError):
            sys.stdout.write(json.dumps({"error": body}) + "\n")
            sys.stdout.flush()


def _describe_os_error(error: OSError) -> str:
    path = error.filename if isinstance(error.filename, str) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path or 'A file'} cannot be written: no space left on the disk"
    reason = error.strerror or str(error) or type(error).__name__
    return f"{path} cannot be read or written: {reason}" if path else reason
