"""`/v1/fine_tuning/jobs`: training jobs in OpenAI's shapes, with pause and resume, and `lora` for what is ours."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel

from server.api import fine_tuning_schemas as schemas
from server.api.error_responses import errors
from server.api.files import After, ends, paged
from server.api.generate import json_response
from server.api.openai_schemas import BOOKKEEPING, refuse_fields
from server.api.state import Services, ServicesDep
from server.errors import InvalidRequest, UnknownName, UnsupportedParameter
from server.jobs.job_store import RUNNING, SUCCEEDED, TRAINING, Job
from server.jobs.requests import Lora, TrainingRequest, checked, keep_init

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Id = Annotated[str, PathParameter(max_length=schemas.MAX_FILE_ID)]
Limit = Annotated[int, Query(ge=1, le=1000)]
ONE = errors(400, 404, 503)
CHANGED = errors(400, 404, 409, 503)
ITS_OWN = ("r", "alpha", "target_modules", "rslora")
"""What a job has of the adapter that it goes on from, and none of its own."""


@router.post("", response_model=schemas.FineTuningJob, responses=errors(400, 404, 409, 500, 503, 507))
async def create(body: schemas.FineTuningBody, parts: ServicesDep) -> Response:
    """Train an adapter on a file. What is wrong inside of the file fails the job, and its `error` names the line."""
    _refuse_unserved(body)
    if body.model != parts.model.name:
        parts.resolver.model(body.model, None)  # raises, if nothing has that name
        raise InvalidRequest(
            f"model must be the base, {parts.model.name!r}; lora.init_from names an adapter to go on from", "model"
        )
    asked = _asked(body)

    def add() -> Job:
        with parts.files.held(asked.training_file, asked.validation_file):
            request = checked(asked, parts.training)
            job = parts.jobs.records.prepare(TRAINING, body.suffix or "", request, "ftjob", {})
            folder = parts.jobs.records.folder(job.id)
            try:
                keep_init(request, parts.training, folder)
                return parts.jobs.enter(job)
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    return json_response(_shown(parts, await asyncio.to_thread(add)))


@router.get("", response_model=schemas.FineTuningJobList, responses=errors(400, 503))
async def list_jobs(request: Request, parts: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Training jobs, newest first. `metadata[key]=value` leaves those that have it, `metadata=null` those without."""
    jobs = [job for job in reversed(parts.jobs.records.all()) if job.kind == TRAINING and _meant(job, request)]
    page, more = paged([_shown(parts, job) for job in jobs], after, limit)
    return {"object": "list", "data": page, "has_more": more}


@router.get("/{job_id}", response_model=schemas.FineTuningJob, responses=ONE)
async def get_job(job_id: Id, parts: ServicesDep) -> dict[str, Any]:
    """One training job."""
    return _shown(parts, _job(parts, job_id))


@router.get("/{job_id}/events", response_model=schemas.FineTuningEventList, responses=ONE)
async def list_events(job_id: Id, parts: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """What has happened to a job, newest first; events of the type "metrics" are its losses."""
    events = await asyncio.to_thread(parts.jobs.records.events, _job(parts, job_id).id)
    page, more = paged([_event(event) for event in reversed(events)], after, limit)
    return {"object": "list", "data": page, "has_more": more}


@router.get("/{job_id}/checkpoints", response_model=schemas.FineTuningCheckpointList, responses=ONE)
async def list_checkpoints(job_id: Id, parts: ServicesDep, after: After = None, limit: Limit = 10) -> dict[str, Any]:
    """The points that a job could go on from, newest first. The last one is kept until the job has succeeded or is
    cancelled; of jobs that have failed, those of the last 2,000.
    """
    job = _job(parts, job_id)
    events = await asyncio.to_thread(parts.jobs.records.events, job.id)
    found = [_checkpoint(job, event) for event in reversed(events) if "checkpoint" in event["data"]]
    page, more = paged(found, after, limit)
    return {"object": "list", "data": page, **ends(page), "has_more": more}


@router.post("/{job_id}/cancel", response_model=schemas.FineTuningJob, responses=CHANGED)
async def cancel(job_id: Id, parts: ServicesDep) -> Response:
    """End a job for good, one that has failed too; the process ends at once, though the answer may say that it runs."""
    _job(parts, job_id)
    return json_response(_shown(parts, await asyncio.to_thread(parts.jobs.cancel, job_id)))


@router.post("/{job_id}/pause", response_model=schemas.FineTuningJob, responses=CHANGED)
async def pause(job_id: Id, parts: ServicesDep) -> Response:
    """Stop a job at a checkpoint, after the step that runs; the answer may still say that it runs, and an event says
    that the pause is asked for.
    """
    _job(parts, job_id)
    return json_response(_shown(parts, await asyncio.to_thread(parts.jobs.pause, job_id)))


@router.post("/{job_id}/resume", response_model=schemas.FineTuningJob, responses=CHANGED)
async def resume(job_id: Id, parts: ServicesDep) -> Response:
    """Go on with a job that is paused or has failed, from its checkpoint; or take back a pause that has yet to come."""
    _job(parts, job_id)
    return json_response(_shown(parts, await asyncio.to_thread(parts.jobs.resume, job_id)))


def _meant(job: Job, request: Request) -> bool:
    """Whether a job has the metadata that a list is asked for."""
    has: Mapping[str, str] = job.request["metadata"] or {}
    wanted = {k[9:-1]: v for k, v in request.query_params.items() if k.startswith("metadata[") and k.endswith("]")}
    return wanted.items() <= has.items() and not (has and request.query_params.get("metadata") == "null")


def _job(parts: Services, id: str) -> Job:
    job = parts.jobs.records.jobs.get(id)
    if job is None:
        raise UnknownName(f"there is no training job {id[:64]!r}; GET /v1/fine_tuning/jobs lists them", "id")
    if job.kind != TRAINING:
        raise UnknownName(f"{id} is an evaluation, no training job; GET /jobs/{id} shows it, POST /jobs/{id}/cancel "
                          "ends it", "id")  # fmt: skip
    return job


# Bodies


def _refuse_unserved(body: schemas.FineTuningBody) -> None:
    refuse_fields(body, "", BOOKKEEPING)
    parts: list[tuple[str, BaseModel | None]] = [
        ("hyperparameters.", body.hyperparameters),
        ("method.", body.method),
        ("lora.", body.lora),
    ]
    if body.method is not None:
        if body.method.type != "supervised":
            raise UnsupportedParameter(f"method {body.method.type[:64]!r} is not served; supervised is", "method.type")
        parts.append(("method.supervised.", body.method.supervised))
        if body.method.supervised is not None:
            parts.append(("method.supervised.hyperparameters.", body.method.supervised.hyperparameters))
    for prefix, part in parts:
        if part is not None:
            refuse_fields(part, prefix)


def _asked(body: schemas.FineTuningBody) -> TrainingRequest:
    hyper = body.hyperparameters
    if body.method is not None and body.method.supervised is not None:
        hyper = body.method.supervised.hyperparameters or hyper
    numbers = {} if hyper is None else {k: getattr(hyper, k) for k in schemas.Hyperparameters.model_fields}
    ours = set(schemas.LoraBody.model_fields)
    lora = body.lora.model_dump(include=ours, exclude_none=True) if body.lora is not None else {}
    if isinstance(lora.get("target_modules"), list):
        lora["target_modules"] = tuple(lora["target_modules"])
    return TrainingRequest(
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed or 0,
        **{k: v for k, v in numbers.items() if v not in (None, "auto")},
        lora=Lora(**lora),
        given=frozenset(lora),
        metadata=body.metadata,
    )


def _shown(parts: Services, job: Job) -> dict[str, Any]:
    asked, progress = job.request, job.progress
    hyper = asked["hyperparameters"]
    if float(hyper["n_epochs"]).is_integer():
        hyper = {**hyper, "n_epochs": int(hyper["n_epochs"])}  # a count in OpenAI's shape: not every client reads 1.0
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "finished_at": _whole(job.finished_at),
        "estimated_finish": _estimate(job),
        "status": job.status,
        "error": job.error,
        "model": asked.get("base", {}).get("name", parts.model.name),  # requests of before have none
        "fine_tuned_model": job.result.get("model"),
        "organization_id": "loramux",
        "hyperparameters": hyper,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
        "training_file": asked["training_file"],
        "validation_file": asked["validation_file"],
        "result_files": list(job.result.get("files", [])),
        "trained_tokens": progress.tokens if job.status == SUCCEEDED else None,
        "seed": asked["seed"],
        "metadata": asked["metadata"],
        "user_provided_suffix": asked["suffix"],
        "integrations": [],
        "lora": asked["lora"] | (dict.fromkeys(ITS_OWN) if asked["lora"]["init_from"] is not None else {}),
    }


def _estimate(job: Job) -> int | None:
    """When training may end, by its speed since it began; a job that waits has no such time."""
    progress = job.progress
    if job.status != RUNNING or not progress.step or not progress.seconds:
        return None
    return int(time.time() + (progress.steps - progress.step) * progress.seconds / progress.step)


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": event["id"],
        "object": "fine_tuning.job.event",
        "created_at": int(event["at"]),
        "level": event["level"],
        "message": event["message"],
        "type": event["type"],
        "data": event["data"],
    }


def _checkpoint(job: Job, event: Mapping[str, Any]) -> dict[str, Any]:
    step = event["data"]["checkpoint"]
    return {
        "id": f"ftckpt-{event['id'].removeprefix('ftevent-')}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event["at"]),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": f"{job.name}:ckpt-step-{step}",
        "step_number": step,
        "metrics": {"step": step, **{k: v for k, v in event["data"].items() if k != "checkpoint"}},
    }


def _whole(at: float | None) -> int | None:
    return None if at is None else int(at)
