"""Validates training requests and turns them into settings and worker specs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.atomic_files import store_errors
from adapters.errors import AdapterError, UnknownAdapter
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.training import TrainingConfig
from adapters.weights import RESERVED, Version
from server.errors import InvalidRequest, UnknownName, rename_params
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.job_store import TRAINING_ID
from server.jobs.recipe import AUTO_RANK_FACTOR, HELD_OUT, max_module_rank
from server.jobs.worker_messages import INIT, REPLACED, BaseSource, WorkerSpec
from server.tasks.task_store import TaskStore

EPOCHS, BATCH = 3, 16
LEARNING_RATE = 5e-4
"""The learning rate at a learning_rate_multiplier of 1."""
SAVE_STEPS = 20
IN_MEMORY_BASE = "the base of this server is in memory only, so a training process cannot map it"

_PARAM = {
    "lora_rank": "lora.r", "lora_alpha": "lora.alpha", "target_modules": "lora.target_modules",
    "epochs": "hyperparameters.n_epochs", "batch_size": "hyperparameters.batch_size",
    "learning_rate": "hyperparameters.learning_rate_multiplier",
}  # fmt: skip
"""Fields of TrainingConfig and of the request."""


@dataclass(frozen=True)
class Lora:
    """The `lora` field of a request."""

    r: int = 8
    alpha: float | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    auto_rank: bool = False
    prune_to: int | None = None
    task: str | None = None
    publish: str = "always"
    init_from: str | None = None


@dataclass(frozen=True)
class TrainingRequest:
    """A request for a training job. None is "auto". `given` names the fields of `lora` that the client sent."""

    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int = 0
    n_epochs: float | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    lora: Lora = field(default_factory=Lora)
    given: frozenset[str] = frozenset()
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class TrainingContext:
    """The parts of the server that training requests are validated against.

    Attributes:
        base_source: How to load the base; None for a base without files.
        module_paths: Paths of the linear modules of the base.
        gpu_share: Returns what a training process may use of the GPU; None on a CPU.
        context_length: Maximum tokens of prompt and answer that the engine takes; None for the base's own limit.
    """

    base_source: BaseSource | None
    base_name: str
    max_rank: int
    threads: int
    files: FileStore
    registry: Registry
    store: AdapterStore
    tasks: TaskStore
    module_paths: Collection[str]
    gpu_share: Callable[[], Mapping[str, Any] | None] = lambda: None
    context_length: int | None = None


def validate(request: TrainingRequest, context: TrainingContext) -> dict[str, Any]:
    """The request as it is stored in the job, with all defaults filled in.

    Raises InvalidRequest, UnknownName or UnknownAdapter; `param` names the wrong field.
    """
    if context.base_source is None:
        raise InvalidRequest(IN_MEMORY_BASE, "model")
    for param in ("training_file", "validation_file"):
        id = getattr(request, param)
        with rename_params(file_id=param):
            if id is not None and context.files.get(id).purpose != "fine-tune":
                raise InvalidRequest(f"{param} must have the purpose fine-tune; upload it again with that", param)
    if request.suffix is not None and (
        request.suffix in RESERVED | {context.base_name} or TRAINING_ID.fullmatch(request.suffix)
    ):
        raise InvalidRequest(f"the name {request.suffix!r} is reserved; choose another suffix", "suffix")
    task_name = _task_name(request, context)
    task = context.tasks.find(task_name) if task_name is not None else None
    body = task.body() if task is not None else {}
    _check_ranks(request, context)
    stored = {
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "suffix": request.suffix,
        "seed": request.seed,
        "hyperparameters": {
            "n_epochs": request.n_epochs or EPOCHS,
            "batch_size": request.batch_size or BATCH,
            "learning_rate_multiplier": request.learning_rate_multiplier or 1.0,
        },
        "lora": {**vars(request.lora), "alpha": request.lora.alpha or 2.0 * request.lora.r, "task": task_name},
        # The task as it is now, because it may have changed when the job starts or resumes.
        "template": {k: v for k, v in body.items() if k != "route"},
        # A task that comes from an adapter's folder is replaced by the result's, which keeps its route.
        "route": body["route"] if task is not None and task.source == "file" else None,
        "metadata": dict(request.metadata or {}) or None,
        "base": {"name": context.base_source.name, "id": context.base_source.id},
    }
    try:
        spec = training_config(stored).spec()
        if request.lora.init_from is None:
            spec.ranks(context.module_paths)
    except AdapterError as error:
        raise InvalidRequest(error.message, _PARAM.get(error.param or "", error.param)) from error
    return stored


def _task_name(request: TrainingRequest, context: TrainingContext) -> str | None:
    """The task whose prompt template is used: `lora.task`, or else the task of the result's name."""
    name = request.lora.task
    if name is None:
        return request.suffix if request.suffix and context.tasks.find(request.suffix) is not None else None
    if context.tasks.find(name) is None:
        raise UnknownName(f"there is no task {name[:64]!r}; GET /tasks lists all tasks", "lora.task")
    return name


def _check_ranks(request: TrainingRequest, context: TrainingContext) -> None:
    lora = request.lora
    highest = max_module_rank(lora.r, lora.auto_rank)
    if highest > context.max_rank:
        why = f", and auto_rank may give a module {AUTO_RANK_FACTOR} times r" if lora.auto_rank else ""
        raise InvalidRequest(f"this server takes ranks of up to {context.max_rank} (--max-rank){why}", "lora.r")
    if lora.init_from is not None:
        with rename_params(adapters="lora.init_from"):
            context.registry.resolve([(lora.init_from, 1.0)])
        fixed = set(request.given & {"r", "alpha", "target_modules"})
        fixed |= {name for name in ("rslora", "auto_rank") if getattr(lora, name)}
        for name in sorted(fixed):
            raise InvalidRequest(f"init_from keeps the ranks of that adapter; leave {name} out", f"lora.{name}")
    elif lora.prune_to is not None and lora.prune_to >= highest:
        limit = f"{AUTO_RANK_FACTOR} times r" if lora.auto_rank else "r"
        raise InvalidRequest(f"prune_to must be below {limit} ({highest})", "lora.prune_to")


def training_config(request: Mapping[str, Any]) -> TrainingConfig:
    """The settings of a run. Raises AdapterError."""
    lora, hyperparameters = request["lora"], request["hyperparameters"]
    targets = lora["target_modules"]
    return TrainingConfig(
        epochs=float(hyperparameters["n_epochs"]),
        batch_size=hyperparameters["batch_size"],
        learning_rate=LEARNING_RATE * hyperparameters["learning_rate_multiplier"],
        lora_rank=lora["r"],
        lora_alpha=float(lora["alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=lora["rslora"],
        seed=request["seed"],
        save_steps=SAVE_STEPS,
    )


def copy_init_adapter(request: Mapping[str, Any], context: TrainingContext, folder: Path) -> None:
    """Copy the adapter version that training starts from into the job's folder. Raises UnknownAdapter, StoreFailed."""
    name = request["lora"]["init_from"]
    if name is not None:
        with context.registry.lease([(name, 1.0)]) as lease:
            [(version, _)] = lease.versions
            _copy_version(context, version, folder / INIT)


def _copy_version(context: TrainingContext, version: Version, target: Path) -> None:
    context.registry.read_version(version)  # verifies the content
    with store_errors(f"a copy of {version.label}"):
        target.mkdir(parents=True)
        for file in context.store.path(version.digest).iterdir():
            shutil.copyfile(file, target / file.name)


def check_base(base: Mapping[str, str], context: TrainingContext) -> None:
    """Raise JobError if the server has another base than the one of the request."""
    current = context.base_source
    if current is not None and current.id == base["id"]:
        return
    name = base["name"]
    found = f"{name} with other files or packing" if context.base_name == name else context.base_name
    raise JobError(
        "other_base",
        f"the job was created on the base {name}, and this server has {found}; start the server with that base and "
        "resume the job, or create a new one",
    )


def worker_spec(name: str, request: Mapping[str, Any], context: TrainingContext, folder: Path) -> WorkerSpec:
    """The spec of the training process. Copies the version that the result would replace into the job's folder.

    Raises UnknownName for a deleted file, JobError for a missing base or adapter to start from, and StoreFailed.
    """
    if context.base_source is None:
        raise JobError("other_base", IN_MEMORY_BASE)
    lora, files = request["lora"], context.files
    if lora["init_from"] is not None and not (folder / INIT).exists():
        raise JobError(
            "init_missing", "the copy of the adapter to start from is missing; create a new job", "lora.init_from"
        )
    replaced = folder / REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    if name in context.registry.names():
        with contextlib.suppress(UnknownAdapter), context.registry.lease([(name, 1.0)]) as lease:
            [(version, _)] = lease.versions
            _copy_version(context, version, replaced)
    data, validation = request["training_file"], request["validation_file"]
    route = {} if request["route"] is None else {"route": request["route"]}
    return WorkerSpec(
        base=context.base_source,
        name=name,
        config=replace(training_config(request), data=files.get(data).filename),
        data=files.path(data).resolve(),
        data_name=files.get(data).filename,
        validation=files.path(validation).resolve() if validation else None,
        validation_name=files.get(validation).filename if validation else "",
        held_out=HELD_OUT if lora["publish"] == "if_better" and not validation else 0.0,
        template=request["template"],
        # An adapter with another name must not bring the task along: the task belongs to the adapter of its own name.
        task={"task": name, **request["template"], **route} if lora["task"] == name else None,
        threads=context.threads,
        max_rank=context.max_rank,
        init=(folder / INIT).resolve() if lora["init_from"] is not None else None,
        init_name=(lora["init_from"] or "").partition("@")[0],
        replaced=replaced.resolve() if replaced.exists() else None,
        auto_rank=lora["auto_rank"],
        prune_to=lora["prune_to"],
        gpu_share=context.gpu_share(),
        context_length=context.context_length,
    )
