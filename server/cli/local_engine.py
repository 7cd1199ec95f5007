"""An engine in this process, for commands that generate text without a server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.output import progress
from server.errors import InvalidRequest, UnknownName
from server.settings import Settings, given_path

if TYPE_CHECKING:
    from adapters.weights import Choice
    from server.api.startup import RunningServer
    from server.kernels import Backend
    from server.model.loader import Base
    from server.tasks.resolve import Target

BASE_ALONE = "base"
"""The candidate without any adapter."""


def load_model(settings: Settings, backend: Backend, quiet: bool) -> Base:
    """Download and quantize the base that the settings name, with a progress bar unless `quiet`."""
    from server.model.loader import load_base
    from server.sources import resolve_model

    with progress("bytes", quiet=quiet) as bar:
        name, source = resolve_model(settings.model, settings.state_dir, progress=bar)
    with progress("parameters", quiet=quiet) as bar:
        return load_base(source, name=name, backend=backend, **settings.packing, progress=bar)


def thread_count(settings: Settings) -> int:
    """Number of compute threads: `--threads`, or one per available processor."""
    from server.kernels.threads import available_cpus

    return settings.threads or available_cpus()


@contextlib.asynccontextmanager
async def local_server(settings: Settings, base: Base) -> AsyncIterator[RunningServer]:
    """The services of a server without HTTP, with the shipped adapters.

    They use a temporary state directory, because a server may be using the real one.
    """
    from server.api.startup import build
    from server.metrics import Metrics
    from server.tasks.delivery import EventLoopDelivery

    delivery = EventLoopDelivery(asyncio.get_running_loop())
    with tempfile.TemporaryDirectory(prefix="loramux-") as folder:
        changes = {"state_dir": Path(folder), "adapter_dir": None, "step_limit": math.inf}
        local = settings.model_copy(update=changes)
        building = asyncio.ensure_future(asyncio.to_thread(build, local, base, Metrics(), delivery))
        try:
            server = await asyncio.shield(building)
        except asyncio.CancelledError:  # Ctrl-C: the thread still uses the folder
            (await building).close(0.0)
            raise
        try:
            yield server
        finally:
            await asyncio.to_thread(server.close, 0.0)


def resolve_target(server: RunningServer, task: str | None, choice: Choice | None) -> Target:
    """The task and mix to run; `choice` replaces the task's mix. Raises UnknownName with the known tasks."""
    try:
        return server.services.resolver.task(task, choice)
    except UnknownName as error:
        known = ", ".join(known.name for known in server.services.tasks.all()) or "none"
        raise UnknownName(
            f"There is no task {str(task)[:64]!r}. Known tasks: {known}. Give the folder of an adapter that has one.",
            "task",
        ) from error


def parse_mix(server: RunningServer, text: str) -> list[tuple[str, float]]:
    """Parse `NAME=0.7+FOLDER=0.3`; "base" is no adapter. Raises InvalidRequest."""
    if text == BASE_ALONE:
        return []
    parts = [text] if given_path(Path(text)).is_dir() else text.split("+")
    return [parse_weighted(server, part) for part in parts]


def parse_weighted(server: RunningServer, text: str) -> tuple[str, float]:
    """Parse `NAME=WEIGHT` or `FOLDER=WEIGHT`. A folder is published, under its own name if that is free.

    Raises:
        InvalidRequest: the weight is not a number, or the name is unknown.
        AdapterError: the folder is not a valid adapter.
    """
    from adapters.errors import AdapterError
    from adapters.weights import check_weight

    name, equals, weight_text = text.rpartition("=")
    if not equals or given_path(Path(text)).is_dir():
        name, weight_text = text, "1"
    try:
        weight = float(weight_text)
        check_weight(weight)
    except ValueError:
        raise InvalidRequest(f"The weight of {name!r} must be a number, not {weight_text!r}.", "adapter") from None
    registry = server.services.registry
    known, folder = registry.names(), given_path(Path(name))
    if name not in known and folder.is_dir():
        own = folder.resolve().name
        numbered = (f"{own}-{number}" for number in itertools.count(2))
        name = next(free for free in itertools.chain([own], numbered) if free not in known)
        try:
            registry.publish_now(name, folder, source="file")
        except AdapterError as error:  # say which folder
            raise type(error)(f"{folder}: {error.message}", error.param) from error
    elif name.partition("@")[0] not in known:
        raise InvalidRequest(
            f"{name!r} is neither a known adapter nor a folder. Known adapters: {', '.join(known) or 'none'}. Give the "
            "folder of an adapter in PEFT format.",
            "adapter",
        )
    return name, weight
