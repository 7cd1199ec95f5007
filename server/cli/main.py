"""All commands under one name, and how their errors end: one line that says what to do, and a status of 1."""

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
from server.cli.options import LEFT_OUT
from server.cli.output import in_json
from server.cli.signals import INTERRUPTED, Interrupted, heard
from server.errors import RemoteError, ServerError, out_of_memory_message
from server.settings import leave_threads_alone

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
    context: typer.Context,
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Say the version and end."),
) -> None:
    """Serve many LoRA adapters, and weighted mixes of them, on one resident 4-bit base."""
    for name in leave_threads_alone() if context.invoked_subcommand != "serve" else ():  # whose log tells it
        sys.stderr.write(f"{LEFT_OUT % name}\n")


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


APART = frozenset(("loramux-temporary", "loramux-grammar"))
"""The threads of `kernels.threads.run_in_thread` and `engine.grammar`, which are slow to import. An interpreter
that ends while one is within a library ends the process by a signal."""

_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)
"""Click's, which typer does not name: what is wrong with the arguments themselves."""


def main() -> None:
    """Run `loramux` with the process's arguments."""
    _settle_streams()
    with heard(_as_ctrl_c, signal.SIGTERM):
        status = _run()
    status = status if isinstance(status, int) else 0
    if any(thread.name in APART for thread in threading.enumerate()):  # interrupted while it computes
        logs.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run() -> object:
    """What the command answers. Ends the process, with words, for what it raises."""
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
        return _interrupted(Interrupted()) if status == INTERRUPTED else status
    except Interrupted as error:
        return _interrupted(error)
    except _UsageError as error:
        _tell(error, error.format_message(), getattr(getattr(error, "param", None), "name", None))
        error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        _say_end("aborted")
        sys.exit(1)
    except (ServerError, AdapterError) as error:
        _fail(error, error.message, error.param)
    except OSError as error:
        _fail(error, _in_words(error))
    except SafetensorError as error:
        _fail(error, f"a file of tensors cannot be read or written: {error}")
    except (MemoryError, RuntimeError) as error:
        if (words := out_of_memory_message(error)) is not None:
            _fail(error, words)
        if "can't start new thread" not in str(error):
            raise
        _fail(error, "the system lets this process have no more threads; raise its limits (ulimit -u and -v)")


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """What a command has in a folder of its own goes with it, however it is asked to end. `serve` and `train` have
    better to do."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # a shell ignores it for what runs in the background
        raise KeyboardInterrupt
    handler(number, frame)


def _settle_streams() -> None:
    """Whatever the process was started with, it has three streams, and no character ends it.

    One that is closed becomes /dev/null, before a file of ours gets its number; what a locale cannot write is escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # the lowest free number: its own
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _interrupted(error: Interrupted) -> int:
    if not error.told:
        _tell(error, error.message)
    with contextlib.suppress(OSError):
        sys.stdout.flush()  # the process may end without another chance
    _say_end(error.message)
    return INTERRUPTED


def _say_end(words: str) -> None:
    """Why a process ends that somebody wanted to end: no error of anybody's."""
    if logs.as_json():
        logs.say_last(words)
    else:
        sys.stderr.write(f"{words}\n")


def _fail(error: Exception, message: str, param: str | None = None) -> NoReturn:
    _tell(error, message, param)
    logs.say_last(message)
    sys.exit(1)


def _tell(error: Exception, message: str, param: str | None = None) -> None:
    """An error for machines, where the command was asked for JSON; a server's own as it came."""
    if "--json" in sys.argv:
        body = dict(error.body) if isinstance(error, RemoteError) else in_json(error, message, param)
        with contextlib.suppress(OSError):  # it may be what has failed
            sys.stdout.write(json.dumps({"error": body}) + "\n")
            sys.stdout.flush()


def _in_words(error: OSError) -> str:
    """What the system refuses, without its number; how the disk refuses is often told without the file."""
    named = error.filename if isinstance(error.filename, str) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{named or 'a file'} cannot be written: no space left on the disk"
    reason = error.strerror or str(error) or type(error).__name__
    return f"{named} cannot be read or written: {reason}" if named else reason
