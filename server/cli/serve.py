"""`loramux serve`: one process, one event loop, and a stop that lets what runs finish."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from server.cli import logs, malloc
from server.cli.doctor import check_state_dir
from server.cli.options import EVERYTHING, LEFT_OUT, with_settings
from server.cli.output import progress, say_error
from server.cli.signals import SAME_SIGNAL, heard
from server.errors import BadSetting
from server.settings import Settings, keep_few_kernels, leave_threads_alone

if TYPE_CHECKING:
    import uvicorn

    from server.api.state import ServerState

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open. nginx keeps its own for a minute; docs/operations.md tells which proxies
have to be told to close theirs before the server does."""

LAST_WORDS = 5
"""Seconds for answers that were cut short, or connections that are slow, to be sent to their end."""

BEFORE_THE_END = 0.5
"""Of these seconds, those that are left once connections are cut whose clients do not read: who writes to them ends."""

MANY_FILES = 1 << 16
"""Open files that are enough; a shell's own limit of 1024 is not."""

log = logging.getLogger(__name__)


@with_settings(*EVERYTHING)
def serve(settings: Settings) -> None:
    """Serve the base and its adapters over HTTP."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # there is nothing yet to be ended in order
    malloc.settle()
    logs.configure(settings.log_format, settings.log_level, behind=True)
    for name in leave_threads_alone():
        log.warning(LEFT_OUT, name)
    keep_few_kernels()
    many_files()
    faulthandler.enable()  # a crash in native code leaves the stacks of all threads
    check_state_dir(settings.state_dir)
    listener = listen(settings.host, settings.port)
    host, port = settings.host, listener.getsockname()[1]
    log.info("http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, settings.model)

    # What is imported stays: to look through it for garbage takes half a second, at the start and at the end.
    gc.disable()
    from server.app import create_app
    from server.kernels import choose
    from server.sources import Resolved, resolve_model

    gc.freeze()
    gc.enable()
    if settings.device == "cuda" or settings.kernels != "auto":  # what is named runs here or is refused, before a fetch
        choose(settings.kernels, settings.device)

    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    def find(model: str, state_dir: Path) -> Resolved:
        with progress("bytes", tell=log.info if logs.as_json() else None) as bar:
            return resolve_model(model, state_dir, progress=bar)

    app = create_app(settings, failed, find)
    spool_in(settings.state_dir)
    runtime = app.state.server
    server = _server(settings, app, runtime)
    with _sigterm_and_sigint(runtime, settings.drain):
        server.run(sockets=[listener])
    if failures:
        logs.flush()
        if not logs.as_json():  # which has it already
            say_error(getattr(failures[0], "message", str(failures[0])))
        raise typer.Exit(1)
    log.info("stopped")


def spool_in(folder: Path) -> None:
    """Have bodies that are too large for memory wait in `folder`: /tmp may be read-only, small, or memory itself.

    The files have no names, so nothing stays of them. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(folder)


def many_files() -> None:
    """Raise the limit of open files as far as this process may: a connection over it is closed without a word.

    A system may refuse what the hard limit says (macOS, beyond `kern.maxfilesperproc`): then half of it is asked for.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(most, MANY_FILES)
    while now != resource.RLIM_INFINITY and now < wanted:
        try:
            return resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        except (ValueError, OSError):
            wanted //= 2


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is a free one. Raises BadSetting."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # all addresses are also those of IPv4, at which a health check within a container asks
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as e:
        number = getattr(e, "errno", None) or 0  # of a name that nobody knows it is negative
        # The system's words for it: create_server's own tell the address once more.
        reason = os.strerror(number) if number > 0 else getattr(e, "strerror", None) or str(e)
        named = isinstance(e, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL
        advice = "--host takes an address of this machine" if named else "--port chooses another, 0 a free one"
        raise BadSetting(f"can not listen on {host}:{port}: {reason}; {advice}", "host" if named else "port") from None


def _server(settings: Settings, app: Any, runtime: ServerState) -> uvicorn.Server:
    import uvicorn

    from server.cli.uvicorn_protocol import Protocol

    class Server(uvicorn.Server):
        """uvicorn's, with signals left to `_sigterm_and_sigint`: its own would end the process by a signal.

        While it drains it still listens, so that new requests and probes hear 503 and when to come back.
        """

        _begun: set[Any] | None = None
        """What ran when the drain began and has not ended."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def on_tick(self, counter: int) -> bool:
            """Called ten times a second."""
            draining = runtime.draining_seconds
            if draining and draining >= settings.drain:
                runtime.abort_requests()
                self.should_exit = True
            elif draining:
                run = self.server_state.tasks
                self._begun = set(run) if self._begun is None else self._begun & run
                if not self._begun and not self._unread():
                    self.should_exit = True
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """What is cancelled at its end gets an answer, for which whoever reads nothing would be waited for ever."""
            cut = asyncio.get_running_loop().call_later(LAST_WORDS - BEFORE_THE_END, self._cut)
            await super().shutdown(sockets)
            cut.cancel()

        def _cut(self) -> None:
            for one in list(self.server_state.connections):
                if one.transport.get_write_buffer_size():
                    one.transport.abort()

        def _unread(self) -> bool:
            """Whether a client has yet to take what is written to it."""
            return any(one.transport.get_write_buffer_size() for one in self.server_state.connections)

    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=Protocol,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    return Server(config)


@contextlib.contextmanager
def _sigterm_and_sigint(runtime: ServerState, drain: float) -> Iterator[None]:
    """The first signal refuses new requests and lets running ones finish, within `drain` seconds; a second ends.

    While the base is fetched, read or packed nothing runs, and the thread that does it cannot be stopped: the first one
    ends. Of one that was sent to the group, `make` sends its own child another.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if 0 < runtime.draining_seconds < SAME_SIGNAL:
            return
        if runtime.draining_seconds:
            log.critical("stopped at once by a second signal")
            logs.flush()
            os._exit(128 + number)
        if runtime.state == "loading":
            log.info("%s: ended before it was ready", signal.Signals(number).name)
            _end_children()
            logs.flush()
            os._exit(0)
        log.info("%s: draining, at most %g s", signal.Signals(number).name, drain)
        runtime.drain()

    with heard(stop, signal.SIGTERM, signal.SIGINT):
        yield


def _end_children() -> None:
    """Such as pip, which fetches a base. Where the system does not tell of them, they end by themselves."""
    for told in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in told.read_text().split():
                os.kill(int(pid), signal.SIGTERM)
