"""Creates the parts that run training and evaluation jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapters.registry import Registry
from adapters.store import AdapterStore
from server.database import Database
from server.engine.backends.protocol import Runner
from server.engine.engine import Engine
from server.jobs.evaluation_job import Evaluate, EvaluationJob
from server.jobs.file_store import FileStore
from server.jobs.job_store import EVALUATION, TRAINING, JobStore
from server.jobs.publisher import Publisher
from server.jobs.runner import JobRunner, JobWork
from server.jobs.training_job import TrainingJob
from server.jobs.training_request import TrainingContext
from server.jobs.worker_messages import BaseSource
from server.kernels.threads import available_cpus
from server.model.loader import Base
from server.settings import Settings
from server.tasks.evaluation import evaluate
from server.tasks.inference import Inference
from server.tasks.prompts import Prompts
from server.tasks.quality import Quality
from server.tasks.routing import BestRouter
from server.tasks.task_store import TaskStore

MAX_TRAINING_THREADS = 2
"""A training process shares the CPU with the server, so more threads do not help."""


def training_context(
    settings: Settings,
    base: Base,
    source: Path | None,
    database: Database,
    registry: Registry,
    store: AdapterStore,
    tasks: TaskStore,
    runner: Runner,
    context: int,
) -> TrainingContext:
    """What training requests are checked against. Without `source` there is nothing to train on."""
    base_source = None
    if source is not None:  # a training process loads the same packed file, with the layout of the same kernels
        packing = settings.packing | {"cache_dir": settings.cache_dir.resolve()}
        base_source = BaseSource(
            source=source.resolve(), name=base.name, kernels=base.backend.name, id=base.id, **packing
        )
    return TrainingContext(
        base_source=base_source,
        base_name=base.name,
        max_rank=settings.max_rank,
        threads=min(MAX_TRAINING_THREADS, settings.threads or available_cpus()),
        files=FileStore(database, settings.state_dir / "files"),
        registry=registry,
        store=store,
        tasks=tasks,
        module_paths=tuple(base.shapes()),
        gpu_share=_gpu_share(base, runner),
        context_length=context,
    )


def _gpu_share(base: Base, runner: Runner) -> Callable[[], Mapping[str, Any] | None]:
    """Function that returns how much of the GPU a training process may use; None on a CPU."""
    if base.backend.name != "cuda":
        return lambda: None
    from server.engine.backends.cuda.runner import CudaRunner

    assert isinstance(runner, CudaRunner)
    return runner.training_share


def build_jobs(
    settings: Settings,
    base: Base,
    database: Database,
    training: TrainingContext,
    engine: Engine,
    inference: Inference,
    prompts: Prompts,
    quality: Quality,
    router: BestRouter,
    loop: asyncio.AbstractEventLoop,
) -> JobRunner:
    """The job runner with its job kinds. Evaluations run on the event loop `loop`."""
    files, registry, tasks = training.files, training.registry, training.tasks

    evaluations: Evaluate = lambda target, examples, metrics, tell: asyncio.run_coroutine_threadsafe(  # noqa: E731
        evaluate(inference, prompts, target, examples, metrics, on_progress=tell), loop
    )

    def review(task: str) -> None:
        router.review_task(tasks.find(task))

    def on_training(running: bool) -> None:
        if base.backend.name != "cuda":  # on a CPU the engine rests between steps while a process trains
            engine.share_cpu(running)

    store = JobStore(database, settings.state_dir / "jobs")
    publisher = Publisher(
        registry,
        tasks,
        quality,
        files,
        evaluations,
        review,
        shapes=base.shapes(),
        base_id=base.id,
        max_rank=settings.max_rank,
    )
    kinds: dict[str, JobWork] = {
        TRAINING: TrainingJob(training, publisher, on_training),
        EVALUATION: EvaluationJob(tasks, quality, files, registry.lease, evaluations, review, base.id),
    }
    jobs = JobRunner(store, kinds)
    files.used_by = jobs.using
    return jobs
