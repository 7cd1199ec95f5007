"""Server state for the routes: the services, and whether they are loading, ready, draining or failed."""

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
from server.jobs.runner import JobRunner
from server.jobs.training_request import TrainingContext
from server.metrics import Metrics, RequestRecord
from server.settings import Settings
from server.sources import Sources
from server.tasks.generation import Caller
from server.tasks.inference import Inference
from server.tasks.prompts import Prompts
from server.tasks.quality import Quality
from server.tasks.resolve import Resolver
from server.tasks.routing import BestRouter
from server.tasks.task_store import TaskStore

GENERATION_ROUTES = frozenset({"/generate", "/classify", "/v1/completions", "/v1/chat/completions"})
"""Routes whose requests are counted in `loramux_requests_total`."""

NOT_READY = {
    "loading": "the server is loading its model; try again in a moment",
    "draining": SHUTTING_DOWN,
    "failed": "the server could not start; see its log",
}


@dataclass(frozen=True)
class BaseInfo:
    """What the routes need to know about the base model."""

    name: str
    id: str
    created: int
    details: dict[str, Any]


@dataclass(frozen=True)
class Services:
    """Everything that answers requests. Created by `startup.build`."""

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


class Running(Protocol):
    """The loaded server: see `startup.RunningServer`."""

    @property
    def services(self) -> Services: ...

    def close(self, drain: float) -> None: ...


class ServerState:
    """State of the server process: "loading", "ready", "draining" or "failed". Exists before the model is loaded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys = Keys(settings)
        self.state = "loading"
        self.running: Running | None = None
        self._draining_since: float | None = None

    @property
    def services(self) -> Services | None:
        """The services, or None while they are loading."""
        return None if self.running is None else self.running.services

    def require_services(self) -> Services:
        """The services. Raises NotServing while loading or draining."""
        if self.state != "ready" or self.running is None:
            raise NotServing(NOT_READY.get(self.state, self.state), retry_after=2.0)
        return self.running.services

    def drain(self) -> None:
        """Refuse new requests from now on. Running requests continue."""
        self.state = "draining"
        self._draining_since = self._draining_since or time.monotonic()

    def is_draining(self) -> bool:
        return self._draining_since is not None

    @property
    def draining_seconds(self) -> float:
        """Seconds since the first call of `drain`; 0 before it."""
        return 0.0 if self._draining_since is None else max(1e-9, time.monotonic() - self._draining_since)

    def abort_requests(self) -> None:
        """Cancel the requests that still run; each gets an error. Call it on the event loop's thread."""
        if self.running is not None:
            self.running.services.inference.abort_client_requests()

    def count_refused(self, method: str, path: str, status: int) -> None:
        """Count a generation request that was refused before its route read it."""
        if method == "POST" and path in GENERATION_ROUTES:
            self.metrics.record(RequestRecord(None, (), str(status), known=False))

    def caller(self, request: Request, deadline_ms: int | None) -> Caller:
        """The tenant and the deadline of a request: its own, but at most the server's."""
        seconds = self.settings.deadline
        if deadline_ms is not None:
            seconds = min(seconds, deadline_ms / 1000)
        return Caller(tenant=request.state.tenant, deadline=time.monotonic() + seconds)


async def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


async def _services(request: Request) -> Services:
    state: ServerState = request.app.state.server
    return state.require_services()


async def _no_query(_: Annotated[NoQuery, Query()]) -> None:
    """Refuses any query parameter."""


StateDep = Annotated[ServerState, Depends(_state)]
ServicesDep = Annotated[Services, Depends(_services)]
NO_QUERY = [Depends(_no_query)]
"""`dependencies=` of routes without query parameters. Ignoring one could do something else than the client meant."""
