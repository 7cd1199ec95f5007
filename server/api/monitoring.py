"""`/health/*`, `/stats` and `/metrics`."""

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

DEFAULT_RANK = 8
"""Assumed rank of the next adapter while there is none."""
MAX_EVALUATED_MIXES = 100
"""Evaluated mixes per task with quality series, in addition to those of its route."""


@router.get("/health/live", response_model=schemas.Health, responses=errors())
async def live() -> dict[str, str]:
    """200 while the process answers."""
    return {"status": "live"}


@router.get("/health", response_model=schemas.Health, responses=errors(503))  # vLLM's name
@router.get("/health/ready", response_model=schemas.Health, responses=errors(503))
async def ready(services: ServicesDep) -> dict[str, str]:
    """200 if requests are accepted; 503 while loading or draining, or if the last step failed."""
    state = services.engine.state
    if state != "running":
        raise NotReady(f"the engine is {state}; see the log", retry_after=2.0)
    return {"status": "ready"}


@router.get(
    "/metrics",
    response_class=Response,
    responses={**errors(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(state: StateDep) -> Response:  # not async: runs on a thread of its own pool
    """All series in Prometheus' text format."""
    return Response(state.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/stats", response_model=schemas.Stats, responses=errors(503))
async def stats(state: StateDep, services: ServicesDep) -> dict[str, Any]:
    """Memory by kind, engine counters, adapter slots, and totals by task."""
    engine = services.engine.stats()
    slots = engine.pop("slots")
    names = _names_by_digest(services)
    slots["resident"] = _adapter_names(names, slots["resident"])
    for key in ("waiting_digests", "running_digests"):
        engine[key.replace("digests", "adapters")] = _adapter_names(names, engine.pop(key))
    return {
        "base": {"name": services.model.name, "id": services.model.id, **services.model.details},
        "memory": memory(services),
        "engine": engine,
        "slots": slots,
        "adapters": _adapter_memory(services),
        "tasks": state.metrics.totals(),
    }


def memory(services: Services) -> dict[str, int]:
    """Bytes by kind. On a CPU the device kinds are 0."""
    on_device = {"device_allocated": 0, "device_reserved": 0}
    adapters = services.registry.memory()["bytes"]
    return {**on_device, **services.runner.nbytes(), "adapters": adapters, "process": process_bytes()}


def _adapter_memory(services: Services) -> dict[str, int]:
    """RAM of adapters, the expected size of one more, and how many more fit."""
    used = services.registry.memory()
    sizes = services.registry.sizes().values()
    one = sum(sizes) // len(sizes) if sizes else DEFAULT_RANK * services.model.details["bytes_per_rank"]
    return {**used, "one_more": one, "more_fit": max(0, used["budget"] - used["bytes"]) // max(one, 1)}


def snapshot(state: ServerState) -> Snapshot:
    """The values that `/metrics` reads at a scrape."""
    services = state.services
    if services is None:
        return Snapshot(memory={"process": process_bytes()}, max_slots=state.settings.max_slots)
    engine = services.engine.stats()
    names = _names_by_digest(services)
    blocks, rows = engine["kv_blocks"], engine["batch_rows"]
    return Snapshot(
        ready=state.state == "ready" and services.engine.state == "running",
        base=services.model.name,
        versions={name: Version(name, digest).label for name, digest in services.registry.catalog.current.items()},
        adapter_bytes=services.registry.sizes(),
        rejected=len(services.registry.rejected(faults=True)),
        memory=memory(services),
        kv_blocks={kind: blocks[kind] for kind in ("free", "used", "cached")},
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
        quality=_quality_series(services),
        training=services.jobs.training_metrics(),
    )


def _quality_series(services: Services) -> list[tuple[str, str, str, str, str, float]]:
    """(task, adapter, version, metric, source, mean) of current tasks, stored versions and the served base.

    Mixes that clients choose would be an unbounded label, so only single versions, mixes of a task's route, and the
    last `MAX_EVALUATED_MIXES` evaluated mixes of each task have series.
    """
    stored, base = services.registry.catalog.labels, services.model.id
    tasks = {task.name: task for task in services.tasks.all()}
    means = services.quality.means(tasks, lambda key: key.base == base and key.uses_only(stored))
    series, evaluated = [], {name: set[MixKey]() for name in tasks}
    for key, metric, source, mean in means:
        if not _is_of_route(tasks[key.task], key):
            seen = evaluated[key.task]
            if source != EVALUATION or (key not in seen and len(seen) >= MAX_EVALUATED_MIXES):
                continue
            seen.add(key)
        series.append((key.task, key.adapter, key.label, metric, source, mean))
    return series


def _is_of_route(task: Task, key: MixKey) -> bool:
    """Whether the key is the base, one version at weight 1, or a mix of the task's route."""
    choice = key.choice
    return not choice or (len(choice) == 1 and choice[0][1] == 1.0) or task.route.allows(choice)


def _names_by_digest(services: Services) -> dict[str, list[str]]:
    """Adapter names by digest of their current version. Several names may have the same content."""
    found: dict[str, list[str]] = {}
    for name, digest in sorted(services.registry.catalog.current.items()):
        found.setdefault(digest, []).append(name)
    return found


def _adapter_names(names: dict[str, list[str]], digests: Iterable[str]) -> list[str]:
    """The names of versions; a short digest for versions without a name."""
    return [name for digest in digests for name in names.get(digest, [digest[:SHORT_DIGEST]])]


def process_bytes() -> int:
    """Resident bytes of this process, or the peak where the present value cannot be read."""
    now = resident()
    if now is not None:
        return now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
