"""Builds the parts of a server from its settings, in order, and takes them down in the reverse one."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters import memory
from adapters.directory_watcher import DirectoryWatcher, scan_library
from adapters.errors import StoreFailed
from adapters.protocols import Observer
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import Version
from server.api.errors import answer
from server.api.state import BaseInfo, Services
from server.api.watchdog import Watchdog
from server.database import Database, database_url
from server.engine.backends import make_runner
from server.engine.backends.protocol import Runner
from server.engine.engine import Engine
from server.engine.grammar import Grammars
from server.engine.overlap import engine_on
from server.engine.tokenizer import ModelTokenizer
from server.errors import BadSetting
from server.jobs.evaluation_job import EvaluationJob
from server.jobs.file_store import FileStore
from server.jobs.job_store import EVALUATION, TRAINING, JobStore
from server.jobs.publisher import Evaluate, Publisher
from server.jobs.requests import TrainingContext
from server.jobs.runner import JobRunner, JobWork
from server.jobs.training_job import TrainingJob
from server.jobs.worker_messages import BaseSource
from server.kernels import choose
from server.kernels.cpu.crash_report import crash_report
from server.kernels.threads import processors
from server.metrics import Metrics
from server.model.loader import Base, load_base
from server.settings import Settings, keep_transfers_in
from server.sources import Resolved, Sources, resolve_model
from server.sources.catalogue import names_of
from server.tasks.admission import Admission
from server.tasks.delivery import EventLoopDelivery
from server.tasks.evaluation import evaluate
from server.tasks.inference import Generation, Inference
from server.tasks.mix_key import AnswerRecord
from server.tasks.prompts import Prompts
from server.tasks.quality import Quality
from server.tasks.resolve import Resolver
from server.tasks.routing import BestRouter
from server.tasks.sampling import ContextLimit
from server.tasks.task_store import TaskStore

log = logging.getLogger(__name__)

LEAST_RAM = 64 << 20
"""Bytes for adapters, however little memory is free."""
KV_SHARE = 0.25
"""Of the memory that is free once the base is there, for keys and values, if the settings do not say."""

TRAINING_THREADS = 2
"""Most threads of a training process: it gets what the server leaves, and more threads would wait for each other."""

ADAPTER_NUMBER = 2
"""Bytes of a number of an adapter: bfloat16."""
KV_TOKENS = 2048
"""Tokens for each sequence of a full batch, beyond which more cache would only fill with old prefixes."""


@dataclass
class RunningServer:
    """The parts, and how to take them down."""

    parts: Services
    closing: list[Callable[[float], object]] = field(default_factory=list)

    def close(self, drain: float) -> None:
        """Stop everything; what runs gets `drain` seconds. What fails to stop keeps nothing else from it, and is raised
        in the end."""
        with ExitStack() as stack:
            for close in self.closing:
                stack.callback(close, drain)


class _Notices(Observer):
    """Passes the registry's news on: to the metrics, to the tasks that adapters' folders bring, and to those that route
    to an adapter.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.on_adapters: Callable[[], set[str]] = set
        """Answers the tasks that went with an adapter."""
        self.on_task_gone: Callable[[str], None] = lambda task: None
        self.on_version: Callable[[str], None] = lambda name: None
        """Hears, after that, the name of an adapter that has another version or is gone."""

    def on_load(self, name: str, outcome: str, seconds: float) -> None:
        self._metrics.on_load(name, outcome, seconds)

    def on_evict(self) -> None:
        self._metrics.on_evict()

    def on_change(self, name: str, version: Version | None) -> None:
        self._metrics.on_change(name, version)
        for task in self.on_adapters():
            self._metrics.forget_task(task)
            self.on_task_gone(task)
        self.on_version(name)


Find = Callable[[str, Path], Resolved]
"""`resolve_model`, or what tells of its progress too."""


def load_and_build(
    settings: Settings, metrics: Metrics, mailbox: EventLoopDelivery, find: Find = resolve_model
) -> RunningServer:
    """Load the base, then everything that stands on it. Raises BadModel, BadSetting, NoRoom, StoreFailed."""
    name, source = find(settings.model, settings.state_dir)
    backend = choose(settings.kernels, settings.device)
    base = load_base(source, name=name, backend=backend, **settings.packing)
    return build(settings, base, metrics, mailbox, source)


def build(
    settings: Settings, base: Base, metrics: Metrics, mailbox: EventLoopDelivery, source: Path | None = None
) -> RunningServer:
    """Everything that stands on a base that has been loaded, from `source`: without it, nothing can be trained."""
    text = ModelTokenizer(base.vocabulary)
    notices = _Notices(metrics)
    database = Database(database_url(settings.database_url, settings.state_dir))
    store = AdapterStore(settings.state_dir / "store", size=base.sizes())
    shutil.rmtree(settings.state_dir / "uploads", ignore_errors=True)  # what a killed process left: the store is ours
    registry = Registry(
        store,
        shapes=base.shapes(),
        ram_bytes=adapter_ram(settings),
        prepare=base.prepare,
        max_rank=settings.max_rank,
        max_mix=settings.max_mix,
        reserved=(base.name,),
        observer=notices,
    )
    longest = base.config.context_length
    context = min(longest, settings.max_context or longest)
    if settings.max_context is not None and settings.max_context > longest:
        log.warning("--max-context is %d, and the base's own limit %d: that holds", settings.max_context, longest)
    runner, engine = _engine(settings, base, registry, text, context, mailbox.wake)
    registry.slots, registry.bases = engine, names_of(base.name)
    tasks = _tasks(settings, base, text, registry, notices)
    metrics.served = lambda task, adapters: (
        (task is None or tasks.find(task) is not None) and set(adapters) <= set(registry.names())
    )
    registry.start()
    watch = DirectoryWatcher(registry, settings.watched_dir, library=settings.library)
    if settings.library is not None:
        scan_library(registry, settings.library)
    watch.poll()
    room = min(context, engine.context_length)
    if room < context:
        log.warning("--kv-cache holds %d tokens, and the context is %d: longer requests are refused", room, context)
    prompts = Prompts(text, ContextLimit(room, text.size), longest_token(text), settings.max_queue_tokens)
    inference = Inference(engine, registry, metrics, mailbox, lambda error: answer(error).status)
    quality = Quality(settings.state_dir / "quality.db", settings.quality_retention)
    router = BestRouter(quality, registry, base.id)
    notices.on_version = _looked_at(tasks, router)
    notices.on_task_gone = _forgotten(router)
    inference.admission = Admission(
        settings.key_rate, settings.key_concurrency, settings.task_rate, settings.task_concurrency
    )
    inference.on_ended = _ending(settings, quality, text, base.id)
    training = _ground(settings, base, source, registry, store, tasks, runner, prompts.limit.context)
    evaluations = _evaluations(inference, prompts, mailbox)
    jobs = _jobs(settings, training, tasks, quality, evaluations, router, base, _lends(base, engine))
    parts = Services(
        model=BaseInfo(base.name, base.id, int(time.time()), _details(base, room)),
        engine=engine,
        runner=runner,
        registry=registry,
        sources=_sources(settings),
        tasks=tasks,
        resolver=Resolver(tasks, registry, base.name, router),
        prompts=prompts,
        grammars=Grammars(text, base.config.vocab_size),
        inference=inference,
        quality=quality,
        router=router,
        files=training.files,
        jobs=jobs,
        training=training,
    )
    engine.start()
    watch.start()
    watchdog = Watchdog(engine, limit=settings.step_limit)
    watchdog.start()
    jobs.start()
    closing: list[Callable[[float], object]] = [
        lambda drain: database.close(),
        lambda drain: parts.grammars.close(),
        lambda drain: prompts.close(),
        lambda drain: quality.close(),
        lambda drain: registry.close(),
        engine.stop,
        lambda drain: watchdog.stop(),
        lambda drain: watch.stop(),
        jobs.close,
    ]
    return RunningServer(parts, closing)


def _ground(
    settings: Settings,
    base: Base,
    source: Path | None,
    registry: Registry,
    store: AdapterStore,
    tasks: TaskStore,
    runner: Runner,
    context: int,
) -> TrainingContext:
    return TrainingContext(
        origin=None if source is None else _origin(settings, base, source),
        base_name=base.name,
        max_rank=settings.max_rank,
        threads=min(TRAINING_THREADS, settings.threads or processors()),
        files=FileStore(settings.state_dir / "files"),
        registry=registry,
        store=store,
        tasks=tasks,
        linears=tuple(base.shapes()),
        lend=_lender(base, runner),
        context=context,
    )


def _lender(base: Base, runner: Runner) -> Callable[[], Mapping[str, Any] | None]:
    """What says how much of the GPU a training process may have."""
    if base.backend.name != "cuda":
        return lambda: None
    from server.engine.backends.cuda.runner import CudaRunner

    assert isinstance(runner, CudaRunner), "the CUDA kernels have one runner"
    return runner.loan


def _origin(settings: Settings, base: Base, source: Path) -> BaseSource:
    """How a training process loads the same base: from the same packed file, so with the same kernels' layout."""
    return BaseSource(
        source=source.resolve(),
        name=base.name,
        kernels=base.backend.name,
        id=base.id,
        **settings.packing | {"cache_dir": settings.cache_dir.resolve()},
    )


def _evaluations(inference: Inference, prompts: Prompts, mailbox: EventLoopDelivery) -> Evaluate:
    """Evaluations for threads that are not the loop's."""
    return lambda target, examples, metrics, tell: asyncio.run_coroutine_threadsafe(
        evaluate(inference, prompts, target, examples, metrics, tell=tell), mailbox.loop
    )


def _lends(base: Base, engine: Engine) -> Callable[[bool], None]:
    """Who hears that a process trains: on a CPU the engine, to rest between steps. On a GPU nobody needs to."""
    return engine.lend if base.backend.name != "cuda" else lambda training: None


def _jobs(
    settings: Settings,
    training: TrainingContext,
    tasks: TaskStore,
    quality: Quality,
    evaluations: Evaluate,
    router: BestRouter,
    base: Base,
    lend: Callable[[bool], None],
) -> JobRunner:
    files = training.files

    def reviewed(name: str) -> None:
        router.review_task(tasks.find(name))

    records = JobStore(settings.state_dir / "jobs")
    publishing = Publisher(
        training.registry,
        tasks,
        quality,
        files,
        evaluations,
        reviewed,
        shapes=base.shapes(),
        base_id=base.id,
        records=records,
    )
    works: dict[str, JobWork] = {
        TRAINING: TrainingJob(training, publishing, lend),
        EVALUATION: EvaluationJob(tasks, quality, files, training.registry.lease, evaluations, reviewed, base.id),
    }
    jobs = JobRunner(records, works)
    files.used_by = jobs.using
    return jobs


def _tasks(settings: Settings, base: Base, text: ModelTokenizer, registry: Registry, notices: _Notices) -> TaskStore:
    """The tasks, which the registry asks and tells."""
    file, size = settings.state_dir / "tasks.json", text.size
    tasks = TaskStore(file, registry, reserved=(base.name,), vocabulary=size, max_mix=settings.max_mix)
    registry.tasks, registry.task_errors, registry.referenced_versions = tasks.routing_to, tasks.faults, tasks.versions
    notices.on_adapters = tasks.refresh
    return tasks


def _forgotten(router: BestRouter) -> Callable[[str], None]:
    """Forgets who leads a task that went with its adapter."""

    def forget(task: str) -> None:
        try:
            router.forget_task(task)
        except StoreFailed as error:
            log.warning("who leads the task %r, which is gone, is still written down: %s", task, error.message)

    return forget


def _looked_at(tasks: TaskStore, router: BestRouter) -> Callable[[str], None]:
    """Looks at who leads all tasks, and answers what looks again at those that route to an adapter: a version that it
    has again, or that was measured before it was published, has its scores already.
    """

    def look(several: Sequence[str]) -> None:
        for name in several:
            try:
                router.review_task(tasks.find(name))
            except StoreFailed as error:
                log.warning("who leads the task %r is looked at again when a score comes: %s", name, error.message)

    look([task.name for task in tasks.all()])
    return lambda adapter: look(tasks.routing_to(adapter))


def _sources(settings: Settings) -> Sources:
    if settings.hub_allow:
        keep_transfers_in(settings.cache_dir)
    return Sources(
        settings.watched_dir,
        settings.state_dir / "fetched",
        hub_allow=settings.hub_allow,
        url_allow=settings.url_allow,
        max_bytes=settings.max_upload,
        disk=settings.fetch_disk,
        seconds=settings.fetch_time,
    )


def _ending(settings: Settings, quality: Quality, text: ModelTokenizer, base_id: str) -> Callable[[Generation], None]:
    """What is done once a generation has ended."""

    def ended(generation: Generation) -> None:
        if (answered := AnswerRecord.from_generation(generation, base_id)) is not None:
            quality.record_answer(answered)
        if settings.log_prompts:
            for reply in generation.replies:
                said = "".join(reply.text)
                log.info("%s: prompt %r, answer %r", reply.request.id, text.decode(reply.request.prompt), said)

    return ended


def _engine(
    settings: Settings, base: Base, registry: Registry, text: ModelTokenizer, context: int, told: Callable[[], None]
) -> tuple[Runner, Engine]:
    """The runner of the base's kernels, and the engine on it; `told` is the engine's."""
    of_device: dict[str, Any]
    if base.backend.name == "cuda":
        runner, of_device = _on_gpu(settings, base, context)
    else:
        host = make_runner(base, settings.max_slots, settings.threads or processors())
        block_bytes = host.block_bytes(settings.block_size)
        blocks = kv_blocks(settings, block_bytes, context)
        runner = host
        of_device = {"blocks": blocks, "max_slots": settings.max_slots, "step_limit": settings.step_limit}
        work = host.work_bytes(blocks * settings.block_size)
        check_room(blocks * block_bytes, registry.memory()["budget"], work)
    try:
        engine = engine_on(
            runner,
            fetch=registry.fetch,
            text=text,
            eos_ids=base.vocabulary.eos_ids,
            vocab_size=base.config.vocab_size,
            context_length=context,
            base_id=base.id,
            block_size=settings.block_size,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            max_queue_tokens=settings.max_queue_tokens,
            max_step_tokens=settings.max_step_tokens,
            prefix_cache=settings.prefix_cache,
            tell=crash_report(),
            told=told,
            **of_device,
        )
    except MemoryError:
        raise BadSetting(
            "the system gives no memory for the KV cache: lower --kv-cache or --max-context", "kv_cache"
        ) from None
    return runner, engine


def _on_gpu(settings: Settings, base: Base, context: int) -> tuple[Runner, dict[str, Any]]:
    """The runner on the GPU, and what the engine is told of it."""
    from server.engine.backends.cuda.runner import SLOTS, CudaRunner, gpu_memory

    runner = CudaRunner(
        base,
        settings.max_batch,
        memory=gpu_memory(settings.gpu_memory),
        device=torch.device("cuda"),
        max_step_tokens=settings.max_step_tokens,
        kv_cache=settings.kv_cache,
        adapters=settings.adapter_device_memory,
        context=context,
    )
    blocks = max(1, runner.shares.kv_cache // runner.block_bytes(settings.block_size))
    # What bounds adapters there is their memory; the setting's default is a CPU's.
    slots = min(settings.max_slots, SLOTS) if "max_slots" in settings.model_fields_set else SLOTS
    return runner, {"blocks": blocks, "max_slots": slots, "room": runner.room}


def adapter_ram(settings: Settings) -> int:
    """Bytes of RAM for adapters: what `--adapter-ram` says, and by default no more than half of what is free."""
    room = max(LEAST_RAM, memory.free() // 2)
    if "adapter_ram" in settings.model_fields_set or settings.adapter_ram <= room:
        return settings.adapter_ram
    log.warning("adapters may have %d MiB, half of the memory that is free (--adapter-ram)", room >> 20)
    return room


def kv_blocks(settings: Settings, block_bytes: int, context: int) -> int:
    """How many blocks of KV cache to allocate: what `--kv-cache` says, or a share of free memory, and at most what a
    full batch of 2,048 tokens each needs. At least one context fits unless `--kv-cache` says otherwise. Raises
    BadSetting for more than this process may have.
    """
    one = -(-context // settings.block_size)
    if settings.kv_cache is not None:
        if settings.kv_cache > (there := memory.most()):
            raise BadSetting(
                f"kv_cache (--kv-cache) is over the {there:,} bytes that this process may have", "kv_cache"
            )
        return max(1, settings.kv_cache // block_bytes)
    share = int(memory.free() * KV_SHARE) // block_bytes
    enough = -(-min(context, KV_TOKENS) // settings.block_size) * settings.max_batch
    return max(one, min(share, enough))


def check_room(kv_cache: int, adapters: int, work: int) -> None:
    """Say so where memory that is promised is not there: it is taken as it is used, and then the system ends us."""
    if kv_cache + adapters + work > (free := memory.free()):
        log.warning(
            "the KV cache may take %d MiB, adapters %d and steps %d, and %d are free: lower --kv-cache, --adapter-ram, "
            "--max-context or --threads before the system ends the process",
            kv_cache >> 20,
            adapters >> 20,
            work >> 20,
            free >> 20,
        )


def longest_token(text: ModelTokenizer) -> int:
    """The most characters that one token stands for."""
    return max(map(len, text.vocabulary.tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _details(base: Base, context: int) -> dict[str, object]:
    return {
        "quantization": dict(base.quantization),
        "kernels": base.backend.name,
        "context": context,
        "bytes_per_rank": ADAPTER_NUMBER * sum(map(sum, base.shapes().values())),
        "notes": list(base.notes),
    }
