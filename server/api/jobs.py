"""`/jobs`: training and evaluation jobs as people look at them, and their end; and `POST /tasks/{task}/evaluate`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from adapters import data
from adapters.errors import AdapterError, InvalidData
from server.api import fine_tuning_schemas as schemas
from server.api.error_responses import errors
from server.api.generate import json_response
from server.api.state import NO_QUERY, Services, ServicesDep
from server.errors import rename_params
from server.jobs.evaluation_job import check_size
from server.jobs.job_store import CURVES, EVALUATION, SUCCEEDED, Job
from server.jobs.worker_messages import DATA
from server.tasks.definitions import BestRoute, Task
from server.tasks.evaluation import check_references, default_metric, pairs

router = APIRouter(tags=["jobs"], dependencies=NO_QUERY)

Id = Annotated[str, Path(max_length=schemas.MAX_FILE_ID)]
SHOWN = 200
"""Jobs of a list."""
MESSAGES = 50
"""The last ones of a job that are shown."""


@router.get("/jobs", response_model=schemas.JobList, responses=errors(422, 503))
async def list_jobs(parts: ServicesDep) -> dict[str, Any]:
    """Jobs of both kinds, newest first."""
    return {"jobs": [summary(job) for job in reversed(parts.jobs.records.all()[-SHOWN:])]}


@router.get("/jobs/{id}", response_model=schemas.JobAnswer, responses=errors(404, 422, 503))
async def get_job(id: Id, parts: ServicesDep) -> dict[str, Any]:
    """One job, with its curves and what was said of it."""
    job = parts.jobs.get(id)
    events = await asyncio.to_thread(parts.jobs.records.events, job.id)
    values: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for event in events:
        if event["type"] == "metrics":
            for name in CURVES:
                if name in event["data"]:  # of a step that was taken twice, after a crash, what it was at last
                    values[name][event["data"]["step"]] = event["data"][name]
    curves = {name: sorted(those.items()) for name, those in values.items()}
    said = [{k: e[k] for k in ("at", "level", "message")} for e in events if e["type"] == "message"]
    return {**summary(job), "asked": job.request, "curves": curves, "messages": said[-MESSAGES:]}


@router.post("/jobs/{id}/cancel", response_model=schemas.JobSummary, responses=errors(404, 409, 422, 503))
async def cancel(id: Id, parts: ServicesDep) -> Response:
    """End a job of either kind for good, at once, a training job that has failed too; the answer may still say that it
    runs.
    """
    return json_response(summary(await asyncio.to_thread(parts.jobs.cancel, id)))


@router.post(
    "/tasks/{task}/evaluate",
    status_code=202,
    response_model=schemas.JobSummary,
    responses=errors(400, 404, 422, 500, 503, 507),
)
async def evaluate(
    task: Annotated[str, Path(max_length=64)], body: schemas.EvaluateBody, parts: ServicesDep
) -> Response:
    """Run candidates of a task over examples with known answers, behind all other requests. Answers a job."""
    found = parts.tasks.get(task)
    candidates = _candidates(parts, found, body)
    with rename_params(adapters="candidates"):
        for choice in candidates:  # a mix that no request could have is told now, not by the job
            parts.engine.check_mix(parts.registry.mix(choice))
    request = {
        "training_file": body.file,
        "candidates": candidates,
        "metric": body.metric or _metric(found),
        "samples": len(body.data) if body.data is not None else None,
    }
    job = await asyncio.to_thread(_add, parts, task, request, body.data or ())
    return json_response(summary(job), 202)


def _add(parts: Services, task: str, request: dict[str, Any], examples: Sequence[schemas.Example]) -> Job:
    lines = "".join(json.dumps(example.model_dump()) + "\n" for example in examples).encode()
    check_size(len(lines), "data", "data")
    if lines:
        _check_data(lines, request["metric"])
    files = {DATA: lines} if lines else {}
    with parts.files.held(request["training_file"]):
        if request["training_file"] is not None:
            with rename_params(file_id="file"):
                file = parts.files.get(request["training_file"])
            check_size(file.bytes, file.filename, "file")
        return parts.jobs.enter(parts.jobs.records.prepare(EVALUATION, task, request, "eval", files))


def _check_data(lines: bytes, metric: str) -> None:
    """Raises InvalidData and InvalidRequest for what the job would fail by."""
    try:
        found = pairs(data.parse(lines, "data"))
    except InvalidData as error:
        raise InvalidData(error.message, "data") from error
    check_references((metric,), found)


def _metric(task: Task) -> str:
    return task.route.metric if isinstance(task.route, BestRoute) else default_metric(task)


def _candidates(parts: Services, task: Task, body: schemas.EvaluateBody) -> list[list[tuple[str, float]]]:
    """Those of the request, else the route's; of a `best` one those that it serves, as long as it serves any."""
    if body.candidates is not None:
        return [[(part.name, part.weight) for part in choice] for choice in body.candidates]
    if isinstance(task.route, BestRoute):
        named = [[(name, 1.0)] for name in task.route.candidates]
        return [choice for choice in named if _resolves(parts, choice)] or named
    return [list(task.route.choice)]


def _resolves(parts: Services, choice: list[tuple[str, float]]) -> bool:
    try:
        parts.registry.resolve(choice)
    except AdapterError:
        return False
    return True


def summary(job: Job) -> dict[str, Any]:
    """A job in a list."""
    progress = job.progress
    return {
        "id": job.id,
        "kind": job.kind,
        "name": job.name,
        "status": job.status,
        "pausing": job.pausing,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "progress": 1.0 if job.status == SUCCEEDED else progress.share,
        "step": progress.step,
        "steps": progress.steps,
        "loss": progress.loss,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "error": job.error,
        "result": job.result,
    }
