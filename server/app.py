"""Creates the ASGI application: middleware, routes, loading at startup and draining at shutdown."""

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
from server.api.startup import Find, load_and_build
from server.api.state import ServerState
from server.settings import Settings
from server.sources import resolve_model
from server.tasks.delivery import EventLoopDelivery

log = logging.getLogger(__name__)

MIN_CLOSE_SECONDS = 5.0
"""Jobs get this long to reach a checkpoint, even if the requests used up `--drain`."""
DESCRIPTION = "Many LoRA adapters, and weighted mixes of them, on one resident 4-bit base."


def create_app(
    settings: Settings,
    on_failure: Callable[[Exception], None] = lambda error: None,
    find: Find = resolve_model,
) -> FastAPI:
    """Create the application. It answers /health/live at once and the other routes once the model is loaded.

    Args:
        on_failure: called with the error if the model cannot be loaded. The application then stays unready.
        find: finds or downloads the base model, on the thread that loads it.

    Raises:
        BadSetting: a key file cannot be read.
    """
    state = ServerState(settings)
    state.metrics.snapshot = lambda: monitoring.snapshot(state)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(state, on_failure, find))
        try:
            yield
        finally:
            await _shut_down(state, loading)

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
                middleware.RequestBoundary,
                on_refused=state.count_refused,
                is_draining=state.is_draining,
                access_log=settings.access_log,
            ),
            Middleware(auth.AuthMiddleware, keys=state.keys, hosts=auth.known_hosts(settings)),
            Middleware(
                middleware.BodyLimit,
                max_body=settings.max_body,
                max_upload=settings.max_upload,
                body_time=settings.body_time,
            ),
        ],
    )
    app.state.server = state
    errors.install(app, state.count_refused)
    openapi.install(app)
    page.install(app)
    for part in (generate, openai, vllm, adapters, tasks, files, fine_tuning, jobs, monitoring, openapi, page):
        app.include_router(part.router)
    return app


async def _load(state: ServerState, on_failure: Callable[[Exception], None], find: Find) -> None:
    """Load the model on a thread, then accept requests."""
    delivery = EventLoopDelivery(asyncio.get_running_loop())
    try:
        running = await asyncio.to_thread(load_and_build, state.settings, state.metrics, delivery, find)
    except asyncio.CancelledError:
        raise
    except BaseException as failure:  # a panic in a Rust library is not an Exception
        error = failure if isinstance(failure, Exception) else RuntimeError(str(failure))
        log.error("the server cannot start: %s", error, exc_info=not hasattr(error, "message"))
        state.state = "failed"
        on_failure(error)
        return
    state.running = running
    if state.state == "loading":  # it may be draining by now
        state.state = "ready"
    log.info("ready: %s", running.services.model.name)


async def _shut_down(state: ServerState, loading: asyncio.Task[None]) -> None:
    """Let running work finish within what is left of `--drain`, then stop everything."""
    await asyncio.gather(loading, return_exceptions=True)
    state.drain()
    if state.running is not None:
        drain = state.settings.drain
        seconds = max(drain - state.draining_seconds, min(drain, MIN_CLOSE_SECONDS))
        await asyncio.to_thread(state.running.close, seconds)
        await asyncio.sleep(0)  # lets the last deliveries reach their readers


def _version() -> str:
    try:
        return version("loramux")
    except PackageNotFoundError:
        return "0"
