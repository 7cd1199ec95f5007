"""`/tasks`: definitions of tasks, feedback on their answers, and how their versions do."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from adapters.errors import StoreFailed
from server.api import schemas
from server.api.error_responses import errors
from server.api.generate import json_response
from server.api.state import NO_QUERY, Services, ServicesDep, StateDep
from server.errors import InvalidRequest
from server.tasks.definitions import BestRoute

log = logging.getLogger(__name__)

router = APIRouter(prefix="/tasks", tags=["tasks"], dependencies=NO_QUERY)

Name = Annotated[str, Path(max_length=64)]


@router.get("", response_model=schemas.TaskList, responses=errors(422, 503))
async def list_tasks(parts: ServicesDep) -> dict[str, Any]:
    """All tasks by name."""
    return {"tasks": [task.describe() for task in parts.tasks.all()]}


@router.get("/{task}", response_model=schemas.TaskAnswer, responses=errors(404, 422, 503))
async def get_task(task: Name, parts: ServicesDep) -> dict[str, Any]:
    """One task, and whether a folder or the API has defined it."""
    return parts.tasks.get(task).describe()


@router.put(
    "/{task}",
    response_model=schemas.TaskAnswer,
    responses={
        **errors(400, 404, 422, 503, 507),
        201: {"model": schemas.TaskAnswer, "description": "the name is new"},
    },
)
async def put_task(task: Name, body: schemas.TaskBody, parts: ServicesDep) -> Response:
    """Define a task. It wins over the one that an adapter's folder brings."""
    given = body.model_dump(exclude_none=True, exclude={"name", "task", "source"})
    defined, created = await asyncio.to_thread(parts.tasks.put, task, given)
    await _rerouted(parts, task)
    return json_response(defined.describe(), 201 if created else 200)


@router.delete("/{task}", response_model=schemas.TaskAnswer, responses=errors(404, 422, 503, 507))
async def delete_task(task: Name, runtime: StateDep, parts: ServicesDep) -> dict[str, Any]:
    """Take a task away; one of a folder that it had covered comes back."""
    deleted = await asyncio.to_thread(parts.tasks.delete, task)
    if parts.tasks.find(task) is None:
        runtime.metrics.forget_task(task)
    await _rerouted(parts, task)
    return deleted.describe()


async def _rerouted(parts: Services, name: str) -> None:
    """Who leads a task is looked at by the route that it has now, and forgotten where that asks for nobody. The task is
    what it has become, whatever the disk says to that."""
    task = parts.tasks.find(name)
    try:
        if task is not None and isinstance(task.route, BestRoute):
            await asyncio.to_thread(parts.router.review_task, task)
        else:
            await asyncio.to_thread(parts.router.forget_task, name)
    except StoreFailed as error:
        log.warning("who leads the task %r is not written: %s", name, error.message)


@router.post(
    "/{task}/feedback",
    status_code=204,
    response_class=Response,
    responses=errors(400, 404, 422, 503, 507),
)
async def feedback(task: Name, body: schemas.FeedbackBody, request: Request, parts: ServicesDep) -> Response:
    """Score an answer of the last 24 hours that the same key has asked for. Once an id: the last score counts."""
    if (body.score is None) == (body.expected is None):
        raise InvalidRequest("give either score or expected", "score")
    parts.tasks.get(task)

    def take() -> None:
        parts.quality.record_feedback(task, body.id, request.state.tenant, score=body.score, expected=body.expected)
        parts.router.review_task(parts.tasks.find(task))

    await asyncio.to_thread(take)
    return Response(status_code=204)


@router.get("/{task}/performance", response_model=schemas.Performance, responses=errors(404, 422, 503))
async def performance(task: Name, parts: ServicesDep) -> dict[str, Any]:
    """Per version: quality by source with its interval, latencies, tokens and errors; and the best, with the reason."""
    found = parts.tasks.get(task)

    def look() -> dict[str, Any]:
        best = parts.router.describe(found, found.route) if isinstance(found.route, BestRoute) else None
        return {"task": task, "versions": parts.quality.performance(task), "best": best}

    return await asyncio.to_thread(look)
