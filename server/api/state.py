"""What the routes work with: the parts of a running server, and whether they are all there yet.

`ServerState` exists from the first moment; `Services` when everything has been loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Depends, Query, Request

from adapters.registry import Registry
from server.api.auth import Keys
from server.api.schemas import NoQuery
from server.engine.backends.protocol import Runner
from server.engine.engine import Engine
from server.engine.grammar import Grammars
from server.errors import SHUTTING_DOWN, NotServing
from server.jobs.file_store import FileStore
from server.jobs.requests import TrainingContext
from server.jobs.runner import JobRunner
from server.metrics import Metrics, RequestRecord
from server.settings import Settings
from server.sources import Sources
from server.tasks.inference import Caller, Inference
from server.tasks.prompts import Prompts
from server.tasks.quality import Quality
from server.tasks.resolve import Resolver
from server.tasks.routing import BestRouter
from server.tasks.task_store import TaskStore

GENERATING = frozenset({"/generate", "/classify", "/v1/completions", "/v1/chat/completions"})
"""The routes whose requests are counted."""


class Closing(Protocol):
    """What has to be taken down at the end; what runs gets `drain` seconds."""

    def close(self, drain: float) -> None: ...


@dataclass(frozen=True)
class BaseInfo:
    """The base, as far as the routes need to know it."""

    name: str
    id: str
    created: int
    details: dict[str, Any]


@dataclass(frozen=True)
class Services:
    """All that answers requests."""

    model: BaseInfo
    engine: Engine
    runner: Runner
    registry: Registry
    sources: Sources
    tasks: TaskStore
    resolver: Resolver
    prompts: Prompts
    grammars: Grammars
    inference: Inference
    quality: Quality
    router: BestRouter
    files: FileStore
    jobs: JobRunner
    training: TrainingContext
    """What requests for training are checked against."""


class ServerState:
    """A server's state: "loading", then "ready", at the end "draining"; "failed" if it could not be loaded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys = Keys(settings)
        self.state = "loading"
        self.loaded: Services | None = None
        self.house: Closing | None = None
        self._draining_since: float | None = None

    def drain(self) -> None:
        """Take no new requests from here on; those that run go on."""
        self.state = "draining"
        self._draining_since = self._draining_since or time.monotonic()

    @property
    def draining_for(self) -> float:
        """Seconds since `drain`; 0 before it."""
        return 0.0 if self._draining_since is None else max(1e-9, time.monotonic() - self._draining_since)

    def closes(self) -> bool:
        """Whether it drains."""
        return self._draining_since is not None

    def cut_short(self) -> None:
        """End what clients still wait for: each answer says so itself. On the event loop's thread."""
        if self.loaded is not None:
            self.loaded.inference.abort_client_requests()

    def parts(self) -> Services:
        """The parts. Raises NotServing while loading or draining."""
        if self.state != "ready" or self.loaded is None:
            why = {
                "loading": "the server is loading its model; try again in a moment",
                "draining": SHUTTING_DOWN,
                "failed": "the server could not start; its log says why",
            }
            raise NotServing(why.get(self.state, self.state), retry_after=2.0)
        return self.loaded

    def unread(self, method: str, path: str, status: int) -> None:
        """Count a request that is refused before a route sees it: nothing of it was resolved."""
        if method == "POST" and path in GENERATING:
            self.metrics.record(RequestRecord(None, (), str(status), known=False))

    def caller(self, request: Request, deadline_ms: int | None) -> Caller:
        """Who asks, and until when: the request's deadline within the server's."""
        seconds = self.settings.deadline
        if deadline_ms is not None:
            seconds = min(seconds, deadline_ms / 1000)
        return Caller(tenant=request.state.tenant, deadline=time.monotonic() + seconds)


async def runtime(request: Request) -> ServerState:
    """The server's runtime, as a dependency."""
    found: ServerState = request.app.state.runtime
    return found


async def parts(request: Request) -> Services:
    """The server's parts, as a dependency. Raises NotServing."""
    found: ServerState = request.app.state.runtime
    return found.parts()


StateDep = Annotated[ServerState, Depends(runtime)]
ServicesDep = Annotated[Services, Depends(parts)]


async def without_query(_: Annotated[NoQuery, Query()]) -> None:
    """That a route's query is empty, as a dependency of it."""


NO_QUERY = [Depends(without_query)]
"""`dependencies=` of our own routes that have no query: one that is ignored would be answered by something else."""
