"""`create_app`: the server as an ASGI application, from its settings.

Owns the order of loading and of leaving. What is loaded answers in `api`; how it is built is each part's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.middleware import Middleware

from server.api import (
    adapters,
    auth,
    errors,
    files,
    fine_tuning,
    generate,
    jobs,
    middleware,
    monitoring,
    openai,
    openapi,
    page,
    tasks,
    vllm,
)
from server.api.startup import Find, RunningServer, load_and_build
from server.api.state import ServerState
from server.settings import Settings
from server.sources import resolve_model
from server.tasks.delivery import EventLoopDelivery

log = logging.getLogger(__name__)

LEAVING = 5.0
"""Seconds that jobs get to stop at a checkpoint, however long the requests took."""
DESCRIPTION = "Many LoRA adapters, and weighted mixes of them, on one resident 4-bit base."


def create_app(
    settings: Settings,
    on_failure: Callable[[Exception], None] = lambda error: None,
    find: Find = resolve_model,
) -> FastAPI:
    """The application. It answers /health/live at once, and everything else when its model has been loaded.

    `on_failure` hears of a model or a setting that cannot be served; the application then stays unready. `find` brings
    the base, from wherever it is, on the thread that loads it. Raises BadSetting for keys that cannot be read.
    """
    runtime = ServerState(settings)
    runtime.metrics.snapshot = lambda: monitoring.snapshot(runtime)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(runtime, on_failure, find))
        try:
            yield
        finally:
            await _leave(runtime, loading)

    app = FastAPI(
        title="loramux",
        version=_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(
                middleware.RequestBoundary, unread=runtime.unread, closes=runtime.closes, access_log=settings.access_log
            ),
            Middleware(auth.AuthMiddleware, keys=runtime.keys, hosts=auth.known_hosts(settings)),
            Middleware(
                middleware.BodyLimit,
                max_body=settings.max_body,
                max_upload=settings.max_upload,
                body_time=settings.body_time,
            ),
        ],
    )
    app.state.runtime = runtime
    errors.install(app, runtime.unread)
    openapi.install(app)
    page.install(app)
    for part in (generate, openai, vllm, adapters, tasks, files, fine_tuning, jobs, monitoring, openapi, page):
        app.include_router(part.router)
    return app


async def _load(runtime: ServerState, on_failure: Callable[[Exception], None], find: Find) -> None:
    """Build all parts on a thread, then open the doors."""
    mailbox = EventLoopDelivery(asyncio.get_running_loop())
    try:
        house: RunningServer = await asyncio.to_thread(load_and_build, runtime.settings, runtime.metrics, mailbox, find)
    except asyncio.CancelledError:
        raise
    except BaseException as failure:  # a panic of a library is no Exception, and the start would hang
        error = failure if isinstance(failure, Exception) else RuntimeError(str(failure))
        log.error("the server cannot start: %s", error, exc_info=not hasattr(error, "message"))
        runtime.state = "failed"
        on_failure(error)
        return
    runtime.house, runtime.loaded = house, house.parts
    if runtime.state == "loading":  # it may have been told to leave by now
        runtime.state = "ready"
    log.info("ready: %s", house.parts.model.name)


async def _leave(runtime: ServerState, loading: asyncio.Task[None]) -> None:
    """Let what runs finish, for what is left of the time that the settings give it, then stop."""
    await asyncio.gather(loading, return_exceptions=True)
    runtime.drain()
    if runtime.house is not None:
        left = max(runtime.settings.drain - runtime.draining_for, min(runtime.settings.drain, LEAVING))
        await asyncio.to_thread(runtime.house.close, left)
        await asyncio.sleep(0)  # the last deliveries reach their readers


def _version() -> str:
    try:
        return version("loramux")
    except PackageNotFoundError:
        return "0"
