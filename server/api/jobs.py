"""`/jobs`: training and evaluation jobs for people, and `POST /tasks/{task}/evaluate`."""

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
from server.jobs.job_store import EVALUATION, METRICS, SUCCEEDED, Job
from server.jobs.worker_messages import DATA
from server.tasks.definitions import BestRoute, Task
from server.tasks.evaluation import check_references, default_metric, pairs

router = APIRouter(tags=["jobs"], dependencies=NO_QUERY)

Id = Annotated[str, Path(max_length=schemas.MAX_FILE_ID)]
MAX_JOBS = 200
"""Jobs in a list."""
MAX_MESSAGES = 50
"""Messages of a job, the last ones."""


@router.get("/jobs", response_model=schemas.JobList, responses=errors(422, 503))
async def list_jobs(services: ServicesDep) -> dict[str, Any]:
    """Jobs of both kinds, newest first."""
    return {"jobs": [summary(job) for job in reversed(services.jobs.store.all()[-MAX_JOBS:])]}


@router.get("/jobs/{id}", response_model=schemas.JobAnswer, responses=errors(404, 422, 500, 503, 507))
async def get_job(id: Id, services: ServicesDep) -> dict[str, Any]:
    """One job with its request, curves and last messages."""
    job = services.jobs.get(id)
    events = await asyncio.to_thread(services.jobs.store.events, job.id)
    values: dict[str, dict[int, float]] = {name: {} for name in METRICS}
    for event in events:
        if event["type"] == "metrics":
            for name in set(METRICS) & event["data"].keys():
                values[name][event["data"]["step"]] = event["data"][name]  # a repeated step replaces the first
    curves = {name: sorted(points.items()) for name, points in values.items()}
    messages = [{k: e[k] for k in ("at", "level", "message")} for e in events if e["type"] == "message"]
    return {**summary(job), "asked": job.request, "curves": curves, "messages": messages[-MAX_MESSAGES:]}


@router.post("/jobs/{id}/cancel", response_model=schemas.JobSummary, responses=errors(404, 409, 422, 500, 503, 507))
async def cancel(id: Id, services: ServicesDep) -> Response:
    """End a job for good, also a failed training job. The answer may still have the status `running`."""
    return json_response(summary(await asyncio.to_thread(services.jobs.cancel, id)))


@router.post(
    "/tasks/{task}/evaluate",
    status_code=202,
    response_model=schemas.JobSummary,
    responses=errors(400, 404, 422, 500, 503, 507),
)
async def evaluate(
    task: Annotated[str, Path(max_length=64)], body: schemas.EvaluateBody, services: ServicesDep
) -> Response:
    """Run candidates of a task over examples with known answers, at the lowest priority. Answers a job."""
    found = services.tasks.get(task)
    candidates = _candidates(services, found, body)
    with rename_params(adapters="candidates"):
        for choice in candidates:
            services.engine.check_mix(services.registry.mix(choice))
    request = {
        "training_file": body.file,
        "candidates": candidates,
        "metric": body.metric or _metric(found),
        "samples": len(body.data) if body.data is not None else None,
    }
    job = await asyncio.to_thread(_submit, services, task, request, body.data or ())
    return json_response(summary(job), 202)


def _submit(services: Services, task: str, request: dict[str, Any], examples: Sequence[schemas.Example]) -> Job:
    lines = "".join(json.dumps(example.model_dump()) + "\n" for example in examples).encode()
    check_size(len(lines), "data", "data")
    if lines:
        _check_data(lines, request["metric"])
    with services.files.lock:
        if request["training_file"] is not None:
            with rename_params(file_id="file"):
                file = services.files.get(request["training_file"])
            check_size(file.bytes, file.filename, "file")
        return services.jobs.submit(
            EVALUATION, task, request, "eval", lambda folder: (folder / DATA).write_bytes(lines) if lines else None
        )


def _check_data(lines: bytes, metric: str) -> None:
    """Raise InvalidData or InvalidRequest for examples that the job could not use."""
    try:
        found = pairs(data.parse(lines, "data"))
    except InvalidData as error:
        raise InvalidData(error.message, "data") from error
    check_references((metric,), found)


def _metric(task: Task) -> str:
    return task.route.metric if isinstance(task.route, BestRoute) else default_metric(task)


def _candidates(services: Services, task: Task, body: schemas.EvaluateBody) -> list[list[tuple[str, float]]]:
    """The candidates of the request, or else of the task's route. A best-of route skips deleted adapters."""
    if body.candidates is not None:
        return [[(part.name, part.weight) for part in choice] for choice in body.candidates]
    if isinstance(task.route, BestRoute):
        named = [[(name, 1.0)] for name in task.route.candidates]
        return [choice for choice in named if _resolves(services, choice)] or named
    return [list(task.route.choice)]


def _resolves(services: Services, choice: list[tuple[str, float]]) -> bool:
    try:
        services.registry.resolve(choice)
    except AdapterError:
        return False
    return True


def summary(job: Job) -> dict[str, Any]:
    """A job as it is listed."""
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
        "progress": 1.0 if job.status == SUCCEEDED else progress.fraction,
        "step": progress.step,
        "steps": progress.steps,
        "loss": progress.loss,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "error": job.error,
        "result": job.result,
    }
