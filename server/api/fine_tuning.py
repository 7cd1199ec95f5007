"""`/v1/fine_tuning/jobs`: training jobs in OpenAI's shapes, with pause, resume and the field `lora`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel

from server.api import fine_tuning_schemas as schemas
from server.api.error_responses import errors
from server.api.files import After, page_of
from server.api.generate import json_response
from server.api.openai_schemas import BOOKKEEPING, refuse_fields
from server.api.state import Services, ServicesDep
from server.errors import InvalidRequest, UnknownName, UnsupportedParameter
from server.jobs.job_store import RUNNING, SUCCEEDED, TRAINING, Job
from server.jobs.training_request import Lora, TrainingRequest, copy_init_adapter, validate

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Id = Annotated[str, PathParameter(max_length=schemas.MAX_FILE_ID)]
Limit = Annotated[int, Query(ge=1, le=1000)]
READ = errors(400, 404, 500, 503, 507)
CHANGE = errors(400, 404, 409, 500, 503, 507)
INHERITED = ("r", "alpha", "target_modules", "rslora")
"""Fields of `lora` that a job with init_from takes from that adapter."""


@router.post("", response_model=schemas.FineTuningJob, responses=errors(400, 404, 409, 500, 503, 507))
async def create(body: schemas.FineTuningBody, services: ServicesDep) -> Response:
    """Train an adapter on a file. The content of the file is checked by the job, whose `error` names the line."""
    _refuse_unsupported(body)
    if body.model != services.model.name:
        services.resolver.model(body.model, None)  # raises UnknownName
        raise InvalidRequest(
            f"model must be the base, {services.model.name!r}; to continue an adapter, set lora.init_from", "model"
        )
    wanted = _training_request(body)

    def add() -> Job:
        with services.files.lock:
            request = validate(wanted, services.training)
            return services.jobs.submit(
                TRAINING,
                body.suffix or "",
                request,
                "ftjob",
                lambda folder: copy_init_adapter(request, services.training, folder),
            )

    return json_response(_job_object(await asyncio.to_thread(add)))


@router.get("", response_model=schemas.FineTuningJobList, responses=errors(400, 503))
async def list_jobs(request: Request, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Training jobs, newest first. `metadata[key]=value` and `metadata=null` filter by metadata."""
    jobs = [job for job in reversed(services.jobs.store.all()) if job.kind == TRAINING and _matches(job, request)]
    return page_of([_job_object(job) for job in jobs], after, limit)


@router.get("/{job_id}", response_model=schemas.FineTuningJob, responses=errors(400, 404, 503))
async def get_job(job_id: Id, services: ServicesDep) -> dict[str, Any]:
    """One training job."""
    return _job_object(_job(services, job_id))


@router.get("/{job_id}/events", response_model=schemas.FineTuningEventList, responses=READ)
async def list_events(job_id: Id, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """The events of a job, newest first. Events of the type "metrics" have its losses."""
    events = await asyncio.to_thread(services.jobs.store.events, _job(services, job_id).id)
    return page_of([_event_object(event) for event in reversed(events)], after, limit)


@router.get("/{job_id}/checkpoints", response_model=schemas.FineTuningCheckpointList, responses=READ)
async def list_checkpoints(job_id: Id, services: ServicesDep, after: After = None, limit: Limit = 10) -> dict[str, Any]:
    """The checkpoints that a job has written, newest first. It resumes from the last one."""
    job = _job(services, job_id)
    events = await asyncio.to_thread(services.jobs.store.events, job.id)
    found = [_checkpoint_object(job, event) for event in reversed(events) if "checkpoint" in event["data"]]
    return page_of(found, after, limit, with_ends=True)


@router.post("/{job_id}/cancel", response_model=schemas.FineTuningJob, responses=CHANGE)
async def cancel(job_id: Id, services: ServicesDep) -> Response:
    """End a job for good, also a failed one. The answer may still have the status `running`."""
    _job(services, job_id)
    return json_response(_job_object(await asyncio.to_thread(services.jobs.cancel, job_id)))


@router.post("/{job_id}/pause", response_model=schemas.FineTuningJob, responses=CHANGE)
async def pause(job_id: Id, services: ServicesDep) -> Response:
    """Stop a job at a checkpoint after the current step. The answer may still have the status `running`."""
    _job(services, job_id)
    return json_response(_job_object(await asyncio.to_thread(services.jobs.pause, job_id)))


@router.post("/{job_id}/resume", response_model=schemas.FineTuningJob, responses=CHANGE)
async def resume(job_id: Id, services: ServicesDep) -> Response:
    """Continue a paused or failed job from its checkpoint, or withdraw a pause that has not taken effect yet."""
    _job(services, job_id)
    return json_response(_job_object(await asyncio.to_thread(services.jobs.resume, job_id)))


def _matches(job: Job, request: Request) -> bool:
    """Whether a job has the metadata of the query."""
    metadata: Mapping[str, str] = job.request["metadata"] or {}
    wanted = {k[9:-1]: v for k, v in request.query_params.items() if k.startswith("metadata[") and k.endswith("]")}
    return wanted.items() <= metadata.items() and not (metadata and request.query_params.get("metadata") == "null")


def _job(services: Services, id: str) -> Job:
    job = services.jobs.store.jobs.get(id)
    if job is None:
        raise UnknownName(f"there is no training job {id[:64]!r}; GET /v1/fine_tuning/jobs lists them", "id")
    if job.kind != TRAINING:
        raise UnknownName(f"{id} is an evaluation job; use GET /jobs/{id} and POST /jobs/{id}/cancel", "id")
    return job


def _refuse_unsupported(body: schemas.FineTuningBody) -> None:
    refuse_fields(body, "", BOOKKEEPING)
    parts: list[tuple[str, BaseModel | None]] = [
        ("hyperparameters.", body.hyperparameters),
        ("method.", body.method),
        ("lora.", body.lora),
    ]
    if body.method is not None:
        if body.method.type != "supervised":
            raise UnsupportedParameter(
                f"method {body.method.type[:64]!r} is not supported; use supervised", "method.type"
            )
        parts.append(("method.supervised.", body.method.supervised))
        if body.method.supervised is not None:
            parts.append(("method.supervised.hyperparameters.", body.method.supervised.hyperparameters))
    for prefix, part in parts:
        if part is not None:
            refuse_fields(part, prefix)


def _training_request(body: schemas.FineTuningBody) -> TrainingRequest:
    hyperparameters = body.hyperparameters
    if body.method is not None and body.method.supervised is not None:
        hyperparameters = body.method.supervised.hyperparameters or hyperparameters
    numbers = hyperparameters.model_dump(include=set(schemas.Hyperparameters.model_fields)) if hyperparameters else {}
    lora = body.lora.model_dump(include=set(schemas.LoraBody.model_fields), exclude_none=True) if body.lora else {}
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


def _job_object(job: Job) -> dict[str, Any]:
    request, progress = job.request, job.progress
    hyperparameters = request["hyperparameters"]
    if float(hyperparameters["n_epochs"]).is_integer():  # clients expect an integer
        hyperparameters = {**hyperparameters, "n_epochs": int(hyperparameters["n_epochs"])}
    inherited = INHERITED if request["lora"]["init_from"] is not None else ()
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "started_at": None if job.started_at is None else int(job.started_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "estimated_finish": _estimated_finish(job),
        "status": job.status,
        "error": job.error,
        "model": request["base"]["name"],
        "fine_tuned_model": job.result.get("model"),
        "organization_id": "loramux",
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "training_file": request["training_file"],
        "validation_file": request["validation_file"],
        "result_files": list(job.result.get("files", [])),
        "trained_tokens": progress.tokens if job.status == SUCCEEDED else None,
        "seed": request["seed"],
        "metadata": request["metadata"],
        "user_provided_suffix": request["suffix"],
        "integrations": [],
        "lora": request["lora"] | dict.fromkeys(inherited),
    }


def _estimated_finish(job: Job) -> int | None:
    """When training may finish, from its average step time so far."""
    progress = job.progress
    if job.status != RUNNING or not progress.step or not progress.seconds:
        return None
    return int(time.time() + (progress.steps - progress.step) * progress.seconds / progress.step)


def _event_object(event: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: event[name] for name in ("id", "level", "message", "type", "data")}
    return {"object": "fine_tuning.job.event", "created_at": int(event["at"]), **fields}


def _checkpoint_object(job: Job, event: Mapping[str, Any]) -> dict[str, Any]:
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
