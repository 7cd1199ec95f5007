"""Composition root: creates all parts of a server in order, and stops them in reverse order."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapters.directory_watcher import DirectoryWatcher, scan_library
from adapters.errors import StoreFailed
from adapters.protocols import Observer
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import Version
from server.api.engine_setup import adapter_ram_bytes, build_engine
from server.api.errors import error_reply
from server.api.jobs_setup import build_jobs, training_context
from server.api.state import BaseInfo, Services
from server.api.watchdog import Watchdog
from server.database import Database, database_url
from server.database.catalog import SqlCatalog
from server.database.legacy_jobs import import_jobs
from server.database.legacy_tasks import import_legacy_tasks
from server.engine.grammar import Grammars
from server.kernels import choose
from server.metrics import Metrics
from server.model.loader import Base, load_base
from server.model.tokenizer import ModelTokenizer
from server.settings import Settings, keep_transfers_in
from server.sources import Resolved, Sources, resolve_model
from server.sources.catalogue import names_of
from server.tasks.admission import Admission
from server.tasks.delivery import EventLoopDelivery
from server.tasks.generation import Generation
from server.tasks.inference import Inference
from server.tasks.mix_key import AnswerRecord
from server.tasks.prompts import Prompts
from server.tasks.quality import Quality
from server.tasks.resolve import Resolver
from server.tasks.routing import BestRouter
from server.tasks.sampling import ContextLimit
from server.tasks.task_store import TaskStore

log = logging.getLogger(__name__)

ADAPTER_BYTES_PER_NUMBER = 2
"""Adapters are held in bfloat16."""

Find = Callable[[str, Path], Resolved]
"""Finds or downloads a model: `resolve_model`, or a version of it that reports progress."""


@dataclass
class RunningServer:
    """The services, and the functions that stop them. Each takes the seconds that running work may still take."""

    services: Services
    closers: list[Callable[[float], object]]

    def close(self, drain: float) -> None:
        """Stop everything in reverse order. If a closer fails the others still run; its error is raised at the end."""
        with ExitStack() as stack:
            for close in self.closers:
                stack.callback(close, drain)


class RegistryEvents(Observer):
    """Forwards events of the adapter registry to metrics, tasks and the best-of router."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.refresh_tasks: Callable[[], set[str]] = set
        """Reads task.json of all adapters again and returns the names of removed tasks."""
        self.task_removed: Callable[[str], None] = lambda task: None
        self.version_changed: Callable[[str], None] = lambda name: None

    def on_load(self, name: str, outcome: str, seconds: float) -> None:
        self._metrics.on_load(name, outcome, seconds)

    def on_evict(self) -> None:
        self._metrics.on_evict()

    def on_change(self, name: str, version: Version | None) -> None:
        self._metrics.on_change(name, version)
        for task in self.refresh_tasks():
            self._metrics.forget_task(task)
            self.task_removed(task)
        self.version_changed(name)


def load_and_build(
    settings: Settings, metrics: Metrics, delivery: EventLoopDelivery, find: Find = resolve_model
) -> RunningServer:
    """Load the base model, then build the server. Raises BadModel, BadSetting, NoRoom, StoreFailed."""
    name, source = find(settings.model, settings.state_dir)
    backend = choose(settings.kernels, settings.device)
    base = load_base(source, name=name, backend=backend, **settings.packing)
    return build(settings, base, metrics, delivery, source)


def build(
    settings: Settings, base: Base, metrics: Metrics, delivery: EventLoopDelivery, source: Path | None = None
) -> RunningServer:
    """Build and start everything on a loaded base model.

    Args:
        source: files of the base model. Training jobs load it from there; without it they are refused.
    """
    tokenizer = ModelTokenizer(base.vocabulary)
    events = RegistryEvents(metrics)
    database = Database(database_url(settings.database_url, settings.state_dir))
    root = settings.state_dir / "store"
    store = AdapterStore(root, SqlCatalog(database, root), size=base.sizes())  # locks the state directory
    import_legacy_tasks(settings.state_dir, database)
    import_jobs(database, settings.state_dir)
    shutil.rmtree(settings.state_dir / "uploads", ignore_errors=True)  # left over from a killed process
    registry = Registry(
        store,
        shapes=base.shapes(),
        ram_bytes=adapter_ram_bytes(settings),
        prepare=base.prepare,
        max_rank=settings.max_rank,
        max_mix=settings.max_mix,
        reserved=(base.name,),
        observer=events,
    )
    context = _context_length(settings, base)
    runner, engine = build_engine(settings, base, registry, tokenizer, context, delivery.wake)
    if engine.context_length < context:
        context = engine.context_length
        log.warning("--kv-cache holds only %d tokens; longer requests are refused", context)
    registry.slots, registry.bases = engine, names_of(base.name)

    tasks = TaskStore(
        database,
        registry,
        reserved=(base.name,),
        vocabulary=tokenizer.size,
        max_mix=settings.max_mix,
    )
    registry.tasks, registry.task_errors, registry.referenced_versions = tasks.routing_to, tasks.faults, tasks.versions
    events.refresh_tasks = tasks.refresh
    metrics.served = lambda task, adapters: (
        (task is None or tasks.find(task) is not None) and set(adapters) <= set(registry.names())
    )
    registry.start()
    watcher = DirectoryWatcher(registry, settings.watched_dir, library=settings.library)
    if settings.library is not None:
        scan_library(registry, settings.library)
    watcher.scan()

    prompts = Prompts(
        tokenizer, ContextLimit(context, tokenizer.size), longest_token(tokenizer), settings.max_queue_tokens
    )
    inference = Inference(engine, registry, metrics, delivery, lambda error: error_reply(error).status)
    inference.admission = Admission(
        settings.key_rate, settings.key_concurrency, settings.task_rate, settings.task_concurrency
    )
    quality = Quality(database, settings.quality_retention)
    router = BestRouter(quality, registry, base.id)
    _connect_router(router, tasks, events)
    inference.on_ended = _record_answers(settings, quality, tokenizer, base.id)

    training = training_context(settings, base, source, database, registry, store, tasks, runner, context)
    jobs = build_jobs(settings, base, database, training, engine, inference, prompts, quality, router, delivery.loop)
    services = Services(
        model=BaseInfo(base.name, base.id, int(time.time()), _base_details(base, context)),
        engine=engine,
        runner=runner,
        registry=registry,
        sources=_build_sources(settings),
        tasks=tasks,
        resolver=Resolver(tasks, registry, base.name, router),
        prompts=prompts,
        grammars=Grammars(tokenizer, base.config.vocab_size),
        inference=inference,
        quality=quality,
        router=router,
        files=training.files,
        jobs=jobs,
        training=training,
    )
    watchdog = Watchdog(engine, limit=settings.step_limit)
    engine.start()
    watcher.start()
    watchdog.start()
    jobs.start()
    return RunningServer(
        services,
        closers=[  # in the order of start; they run from the last to the first
            lambda drain: database.close(),
            lambda drain: services.grammars.close(),
            lambda drain: prompts.close(),
            lambda drain: quality.close(),
            lambda drain: registry.close(),
            engine.stop,
            lambda drain: watchdog.stop(),
            lambda drain: watcher.stop(),
            jobs.close,
        ],
    )


def _context_length(settings: Settings, base: Base) -> int:
    """Longest prompt plus answer in tokens."""
    longest = base.config.context_length
    if settings.max_context is not None and settings.max_context > longest:
        log.warning(
            "--max-context is %d, but the model's limit is %d; using %d", settings.max_context, longest, longest
        )
    return min(longest, settings.max_context or longest)


def _connect_router(router: BestRouter, tasks: TaskStore, events: RegistryEvents) -> None:
    """Let the router choose the leader of every task again, now and whenever an adapter has a new version."""

    def review(names: list[str]) -> None:
        for name in names:
            try:
                router.review_task(tasks.find(name))
            except StoreFailed as error:
                log.warning("the leader of task %r cannot be stored: %s", name, error.message)

    def forget(task: str) -> None:
        try:
            router.forget_task(task)
        except StoreFailed as error:
            log.warning("the leader of the removed task %r cannot be deleted: %s", task, error.message)

    review([task.name for task in tasks.all()])
    events.version_changed = lambda adapter: review(list(tasks.routing_to(adapter)))
    events.task_removed = forget


def _record_answers(
    settings: Settings, quality: Quality, tokenizer: ModelTokenizer, base_id: str
) -> Callable[[Generation], None]:
    """Callback for finished generations: keeps them for feedback, and logs prompts if the settings say so."""

    def on_ended(generation: Generation) -> None:
        if (record := AnswerRecord.from_generation(generation, base_id)) is not None:
            quality.record_answer(record)
        if settings.log_prompts:
            for reply in generation.replies:
                prompt, text = tokenizer.decode(reply.request.prompt), "".join(reply.text)
                log.info("%s: prompt %r, answer %r", reply.request.id, prompt, text)

    return on_ended


def _build_sources(settings: Settings) -> Sources:
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


def longest_token(tokenizer: ModelTokenizer) -> int:
    """The most characters of one token."""
    return max(map(len, tokenizer.vocabulary.tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _base_details(base: Base, context: int) -> dict[str, object]:
    return {
        "quantization": dict(base.quantization),
        "kernels": base.backend.name,
        "context": context,
        "bytes_per_rank": ADAPTER_BYTES_PER_NUMBER * sum(map(sum, base.shapes().values())),
        "notes": list(base.notes),
    }
