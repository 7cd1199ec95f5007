"""`loramux serve`: runs the HTTP server in one process."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from server.cli import logs, malloc
from server.cli.checks import check_state_dir, listen
from server.cli.options import ALL_SETTINGS, IGNORED_VARIABLE, with_settings
from server.cli.output import print_error, progress
from server.cli.signals import REPEAT_WINDOW, handle_signals
from server.settings import Settings, keep_few_kernels, leave_threads_alone

if TYPE_CHECKING:
    from server.api.state import ServerState

MAX_OPEN_FILES = 1 << 16

log = logging.getLogger(__name__)


@with_settings(*ALL_SETTINGS)
def serve(settings: Settings) -> None:
    """Serve the base model and its adapters over HTTP."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # nothing to clean up yet
    malloc.configure_malloc()
    logs.configure(settings.log_format, settings.log_level)
    for name in leave_threads_alone():
        log.warning(IGNORED_VARIABLE, name)
    keep_few_kernels()
    raise_file_limit()
    faulthandler.enable()
    check_state_dir(settings.state_dir)
    listener = listen(settings.host, settings.port)
    host, port = settings.host, listener.getsockname()[1]
    log.info("http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, settings.model)

    gc.disable()  # imported modules are never freed, so the collector need not scan them
    from server.app import create_app
    from server.cli.uvicorn_server import Server
    from server.kernels import choose
    from server.sources import Resolved, resolve_model

    gc.freeze()
    gc.enable()
    if settings.device == "cuda" or settings.kernels != "auto":  # fail before a download
        choose(settings.kernels, settings.device)

    failures: list[Exception] = []

    def on_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    def find(model: str, state_dir: Path) -> Resolved:
        with progress("bytes", log=log.info if logs.is_json() else None) as bar:
            return resolve_model(model, state_dir, progress=bar)

    app = create_app(settings, on_failure, find)
    use_temporary_folder(settings.state_dir)
    state = app.state.server
    server = Server(app, state, settings.drain)
    with stop_on_signals(state, settings.drain):
        server.run(sockets=[listener])
    if failures:
        if not logs.is_json():  # the JSON log has it already
            print_error(getattr(failures[0], "message", str(failures[0])))
        raise typer.Exit(1)
    log.info("stopped")


def use_temporary_folder(folder: Path) -> None:
    """Put temporary files, such as large request bodies, into `folder`: /tmp may be small or in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(folder)


def raise_file_limit() -> None:
    """Raise the limit of open files to `MAX_OPEN_FILES`, or as high as the system allows."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    while limit != resource.RLIM_INFINITY and limit < wanted:
        try:
            return resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # macOS allows less than its hard limit says
            wanted //= 2


@contextlib.contextmanager
def stop_on_signals(state: ServerState, drain: float) -> Iterator[None]:
    """Drain on the first SIGTERM or SIGINT, exit at once on the second, or while the model is loading."""

    def stop(number: int, frame: FrameType | None) -> None:
        if 0 < state.draining_seconds < REPEAT_WINDOW:
            return
        if state.draining_seconds:
            log.critical("second signal: exiting at once")
            os._exit(128 + number)
        if state.state == "loading":
            log.info("%s: stopped while loading", signal.Signals(number).name)
            _end_children()
            os._exit(0)
        log.info("%s: draining for at most %g s", signal.Signals(number).name, drain)
        state.drain()

    with handle_signals(stop, signal.SIGTERM, signal.SIGINT):
        yield


def _end_children() -> None:
    """Terminate child processes, such as a download by pip (Linux only)."""
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in file.read_text().split():
                os.kill(int(pid), signal.SIGTERM)
