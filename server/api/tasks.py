"""`/tasks`: task definitions, feedback, and performance."""

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
async def list_tasks(services: ServicesDep) -> dict[str, Any]:
    """All tasks."""
    return {"tasks": [task.describe() for task in services.tasks.all()]}


@router.get("/{task}", response_model=schemas.TaskAnswer, responses=errors(404, 422, 503))
async def get_task(task: Name, services: ServicesDep) -> dict[str, Any]:
    """One task. `source` says whether a task.json file or the API defined it."""
    return services.tasks.get(task).describe()


@router.put(
    "/{task}",
    response_model=schemas.TaskAnswer,
    responses={
        **errors(400, 404, 422, 503, 507),
        201: {"model": schemas.TaskAnswer, "description": "the name is new"},
    },
)
async def put_task(task: Name, body: schemas.TaskBody, services: ServicesDep) -> Response:
    """Define a task. It overrides a task.json file with the same task."""
    given = body.model_dump(exclude_none=True, exclude={"name", "task", "source"})
    defined, created = await asyncio.to_thread(services.tasks.put, task, given)
    await _update_leader(services, task)
    return json_response(defined.describe(), 201 if created else 200)


@router.delete("/{task}", response_model=schemas.TaskAnswer, responses=errors(404, 422, 503, 507))
async def delete_task(task: Name, state: StateDep, services: ServicesDep) -> dict[str, Any]:
    """Delete a task. A task.json file that it overrode applies again."""
    deleted = await asyncio.to_thread(services.tasks.delete, task)
    if services.tasks.find(task) is None:
        state.metrics.forget_task(task)
    await _update_leader(services, task)
    return deleted.describe()


async def _update_leader(services: Services, name: str) -> None:
    """Choose the leader of a changed task again, or forget it. The change is valid even if this cannot be stored."""
    task = services.tasks.find(name)
    try:
        if task is not None and isinstance(task.route, BestRoute):
            await asyncio.to_thread(services.router.review_task, task)
        else:
            await asyncio.to_thread(services.router.forget_task, name)
    except StoreFailed as error:
        log.warning("the leader of task %r cannot be stored: %s", name, error.message)


@router.post(
    "/{task}/feedback",
    status_code=204,
    response_class=Response,
    responses=errors(400, 404, 422, 503, 507),
)
async def feedback(task: Name, body: schemas.FeedbackBody, request: Request, services: ServicesDep) -> Response:
    """Score an answer of the last 24 hours that the same key requested. The last score of an id counts."""
    if (body.score is None) == (body.expected is None):
        raise InvalidRequest("send either score or expected", "score")
    services.tasks.get(task)

    def record() -> None:
        tenant = request.state.tenant
        services.quality.record_feedback(task, body.id, tenant, score=body.score, expected=body.expected)
        services.router.review_task(services.tasks.find(task))

    await asyncio.to_thread(record)
    return Response(status_code=204)


@router.get("/{task}/performance", response_model=schemas.Performance, responses=errors(404, 422, 503))
async def performance(task: Name, services: ServicesDep) -> dict[str, Any]:
    """Quality, latency, tokens and errors of each version, and the leader of a `best` route with the reason."""
    found = services.tasks.get(task)

    def read() -> dict[str, Any]:
        best = services.router.describe(found, found.route) if isinstance(found.route, BestRoute) else None
        return {"task": task, "versions": services.quality.performance(task), "best": best}

    return await asyncio.to_thread(read)
