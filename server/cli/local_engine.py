"""A base and the parts of a server in this process, for commands that answer without one. Owns how they are opened.

A server may hold the store of the state directory, so the parts stand on a store of their own, which goes at the end.
"""

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
from server.cli.signals import waking
from server.errors import InvalidRequest, UnknownName
from server.settings import Settings, given_path

if TYPE_CHECKING:
    from adapters.weights import Choice
    from server.api.startup import RunningServer
    from server.kernels import Backend
    from server.model.loader import Base
    from server.tasks.resolve import Target

BASE_ALONE = "base"
"""As a candidate: no adapter at all."""


def open_base(settings: Settings, backend: Backend, quiet: bool) -> Base:
    """The base that the settings name, fetched and packed with a bar for people unless `quiet`."""
    from server.model.loader import load_base
    from server.sources import resolve_model

    with progress("bytes", quiet=quiet) as bar:
        name, source = resolve_model(settings.model, settings.state_dir, progress=bar)
    with progress("parameters", quiet=quiet) as bar:
        return load_base(source, name=name, backend=backend, **settings.packing, progress=bar)


def threads_of(settings: Settings) -> int:
    """How many threads the settings give to a command that computes by itself."""
    from server.kernels.threads import available_cpus

    return settings.threads or available_cpus()


@contextlib.asynccontextmanager
async def opened(settings: Settings, base: Base) -> AsyncIterator[RunningServer]:
    """The parts of a server over `base`, in this process, with the library's adapters and no others."""
    from server.api.startup import build
    from server.metrics import Metrics
    from server.tasks.delivery import EventLoopDelivery

    loop = asyncio.get_running_loop()
    with waking(loop), tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
        # Nothing restarts a command whose machine is slow.
        changed = {"state_dir": Path(scratch), "adapter_dir": None, "step_limit": math.inf}
        own = settings.model_copy(update=changed)
        mailbox = EventLoopDelivery(loop)
        building = asyncio.ensure_future(asyncio.to_thread(build, own, base, Metrics(), mailbox))
        try:
            house = await asyncio.shield(building)
        except asyncio.CancelledError:  # Ctrl-C: the thread goes on, and its folder may not go before it has ended
            (await building).close(0.0)
            raise
        try:
            yield house
        finally:
            await asyncio.to_thread(house.close, 0.0)


def target_of(house: RunningServer, task: str | None, choice: Choice | None) -> Target:
    """What a task means here, or the choice instead of its mix. Raises UnknownName with the tasks that there are."""
    try:
        return house.services.resolver.task(task, choice)
    except UnknownName as error:
        known = ", ".join(known.name for known in house.services.tasks.all()) or "none is"
        raise UnknownName(
            f"there is no task {str(task)[:64]!r} ({known} here); give the folder of the adapter that brings it", "task"
        ) from error


def choice_of(house: RunningServer, mix: str) -> list[tuple[str, float]]:
    """`NAME=0.7+FOLDER=0.3` as a choice; `base` is the base alone. Raises InvalidRequest."""
    if mix == BASE_ALONE:
        return []
    parts = [mix] if given_path(Path(mix)).is_dir() else mix.split("+")
    return [weighted(house, part) for part in parts]


def weighted(house: RunningServer, text: str) -> tuple[str, float]:
    """NAME=WEIGHT as an entry of a choice; a folder is published first, under its own name if that is free.

    Raises InvalidRequest, and what is wrong with the folder.
    """
    from adapters.errors import AdapterError
    from adapters.weights import check_weight

    name, equals, weight_text = text.rpartition("=")
    if not equals or given_path(Path(text)).is_dir():
        name, weight_text = text, "1"
    try:
        weight = float(weight_text)  # which is told as it was asked for, like the API's
        check_weight(weight)
    except ValueError:
        raise InvalidRequest(f"the weight of {name!r} must be a number, not {weight_text!r}", "adapter") from None
    registry = house.services.registry
    known, folder = registry.names(), given_path(Path(name))
    if name not in known and folder.is_dir():
        own = folder.resolve().name
        others = (f"{own}-{number}" for number in itertools.count(2))
        name = next(free for free in itertools.chain([own], others) if free not in known)
        try:
            registry.publish_now(name, folder, source="file")
        except AdapterError as error:  # there may be several
            raise type(error)(f"{folder}: {error.message}", error.param) from error
    elif name.partition("@")[0] not in known:
        here = ", ".join(known) or "none is"
        raise InvalidRequest(
            f"{name!r} is neither an adapter ({here} here) nor a folder; give the folder of one, as PEFT writes it",
            "adapter",
        )
    return name, weight
