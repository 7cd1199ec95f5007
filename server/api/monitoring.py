"""`/health/*`, `/stats` and `/metrics`: what the server is doing, for probes, people and Prometheus."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Response

from adapters.memory import resident
from adapters.weights import SHORT_DIGEST, Version
from server.api import schemas
from server.api.error_responses import errors
from server.api.state import ServerState, Services, ServicesDep, StateDep
from server.errors import NotReady
from server.metrics import CONTENT_TYPE, Snapshot
from server.tasks.definitions import Task
from server.tasks.mix_key import MixKey
from server.tasks.quality import EVALUATION

router = APIRouter(tags=["monitoring"])

FIRST_RANK = 8
MOST_MIXES = 100
"""Evaluated mixes of a task beside those of its route: a search that runs every night leaves others each time."""


@router.get("/health/live", response_model=schemas.Health, responses=errors())
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health", response_model=schemas.Health, responses=errors(503))  # as programs that know vLLM ask
@router.get("/health/ready", response_model=schemas.Health, responses=errors(503))
async def ready(parts: ServicesDep) -> dict[str, str]:
    """The model is loaded and requests are taken; 503 while loading, draining, or when the last step has failed."""
    state = parts.engine.state
    if state != "running":
        raise NotReady(f"the engine is {state}; the log says why", retry_after=2.0)
    return {"status": "ready"}


@router.get(
    "/metrics",
    response_class=Response,
    responses={**errors(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(runtime: StateDep) -> Response:  # on the framework's threads: the event loop's may all wait for a disk
    """Every series, in Prometheus's text format."""
    return Response(runtime.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/stats", response_model=schemas.Stats, responses=errors(503))
async def stats(runtime: StateDep, parts: ServicesDep) -> dict[str, Any]:
    """Memory by kind, the engine's counters, slots, and a table of tasks."""
    engine = parts.engine.stats()
    slots = engine.pop("slots")
    names = _names_by_digest(parts)
    slots["resident"] = _named(names, slots["resident"])
    for key in ("waiting_digests", "running_digests"):
        engine[key.replace("digests", "adapters")] = _named(names, engine.pop(key))
    return {
        "base": {"name": parts.model.name, "id": parts.model.id, **parts.model.details},
        "memory": memory(parts),
        "engine": engine,
        "slots": slots,
        "adapters": _adapters(parts),
        "tasks": runtime.metrics.totals(),
    }


def memory(parts: Services) -> dict[str, int]:
    """Bytes by kind. On a CPU nothing is on a device, and an adapter has one copy, whether it holds a slot or not: what
    torch's own ops keep beside it of a batch's adapters is among `activations`."""
    on_device = {"device_allocated": 0, "device_reserved": 0}
    adapters = parts.registry.memory()["bytes"]
    return {**on_device, **parts.runner.nbytes(), "adapters": adapters, "process": process_bytes()}


def _adapters(parts: Services) -> dict[str, int]:
    """What adapters take of RAM; what one more would, like those that there are; and how many such fit beside them.

    The first of all is taken to have rank 8 on every linear.
    """
    told = parts.registry.memory()
    sizes = parts.registry.sizes().values()
    one = sum(sizes) // len(sizes) if sizes else FIRST_RANK * parts.model.details["bytes_per_rank"]
    return {**told, "one_more": one, "more_fit": max(0, told["budget"] - told["bytes"]) // max(one, 1)}


def snapshot(runtime: ServerState) -> Snapshot:
    """What a scrape sees. Before the model is loaded, the process alone."""
    parts = runtime.services
    if parts is None:
        return Snapshot(memory={"process": process_bytes()}, max_slots=runtime.settings.max_slots)
    engine = parts.engine.stats()
    names = _names_by_digest(parts)
    blocks, rows = engine["kv_blocks"], engine["batch_rows"]
    return Snapshot(
        ready=runtime.state == "ready" and parts.engine.state == "running",
        base=parts.model.name,
        versions={name: Version(name, digest).label for name, digest in parts.registry.catalog.current.items()},
        adapter_bytes=parts.registry.sizes(),
        rejected=len(parts.registry.rejected(faults=True)),
        memory=memory(parts),
        kv_blocks={state: blocks[state] for state in ("free", "used", "cached")},
        block_size=blocks["block_size"],
        running=engine["running"],
        waiting=engine["waiting"],
        step_buckets=rows["buckets"],
        step_counts=rows["counts"],
        step_rows=rows["sum"],
        max_slots=engine["slots"]["total"],
        resident=[name for d in engine["slots"]["resident"] for name in names.get(d, ())],
        loading=[name for d in engine["waiting_digests"] for name in names.get(d, ())],
        slot_evictions=engine["slots"]["evictions"],
        quality=_quality(parts),
        training=parts.jobs.training(),
    )


def _quality(parts: Services) -> list[tuple[str, str, str, str, str, float]]:
    """What is known of the tasks that there are, by versions that are still kept, on the base that is served.

    Of mixes that a task's route does not lead to, whose weights would be labels without end, a client's own are left
    out; of those that an evaluation was asked for the last `MOST_MIXES` of a task are told.
    """
    kept, base = parts.registry.catalog.labels, parts.model.id
    tasks = {task.name: task for task in parts.tasks.all()}
    means = parts.quality.means(tasks, lambda subject: subject.base == base and subject.uses_only(kept))
    told, mixes = [], {name: set[MixKey]() for name in tasks}
    for subject, metric, source, mean in means:
        if not _is_ours(tasks[subject.task], subject):
            others = mixes[subject.task]
            if source != EVALUATION or (subject not in others and len(others) >= MOST_MIXES):
                continue
            others.add(subject)
        told.append((subject.task, subject.adapter, subject.label, metric, source, mean))
    return told


def _is_ours(task: Task, subject: MixKey) -> bool:
    """Whether it is one version alone, or what the task's route leads to."""
    choice = subject.choice
    return not choice or (len(choice) == 1 and choice[0][1] == 1.0) or task.route.allows(choice)


def _names_by_digest(parts: Services) -> dict[str, list[str]]:
    """The names of each current version: several adapters may have one content."""
    found: dict[str, list[str]] = {}
    for name, digest in sorted(parts.registry.catalog.current.items()):
        found.setdefault(digest, []).append(name)
    return found


def _named(names: dict[str, list[str]], digests: Iterable[str]) -> list[str]:
    """All names of versions, and of one that has none any more the digest that people see."""
    return [name for digest in digests for name in names.get(digest, [digest[:SHORT_DIGEST]])]


def process_bytes() -> int:
    """Resident bytes of this process; where the system does not tell, or opens no file now, the most so far."""
    now = resident()
    if now is not None:
        return now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
