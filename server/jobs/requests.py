"""What clients may ask of a training job, checked: names, defaults, and the settings that they make.

Owns the meaning of OpenAI's hyperparameters and of `lora`. Form and bounds of the fields are the API's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.atomic_files import refused
from adapters.errors import AdapterError, UnknownAdapter
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.training import TrainingConfig
from adapters.weights import RESERVED, Version
from server.errors import InvalidRequest, UnknownName, rename_params
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.job_store import TRAINING_ID
from server.jobs.recipe import AUTO_WIDENS, HELD_OUT, highest_rank
from server.jobs.worker_messages import INIT, RIVAL, BaseSource, WorkerSpec
from server.tasks.task_store import TaskStore

EPOCHS, BATCH = 3, 16
LEARNING_RATE = 5e-4
"""What a learning_rate_multiplier multiplies."""
SAVE_STEPS = 20

_PARAM = {
    "lora_rank": "lora.r", "lora_alpha": "lora.alpha", "target_modules": "lora.target_modules",
    "epochs": "hyperparameters.n_epochs", "batch_size": "hyperparameters.batch_size",
    "learning_rate": "hyperparameters.learning_rate_multiplier",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """What is asked of the adapter beyond OpenAI's words."""

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
    """A training job as a client wants it. None is "auto"; `given` are the fields of `lora` that were given."""

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
    """What requests are checked against, and specs are made of. `origin` is None for a base that no file holds.

    `linears` are the paths of the modules that an adapter may have. `lend` says what a process may have of the GPU,
    None on a CPU. `context` is how many tokens of prompt and answer the engine takes; None is as many as the base.
    """

    origin: BaseSource | None
    base_name: str
    max_rank: int
    threads: int
    files: FileStore
    registry: Registry
    store: AdapterStore
    tasks: TaskStore
    linears: Collection[str]
    lend: Callable[[], Mapping[str, Any] | None] = lambda: None
    context: int | None = None


def checked(asked: TrainingRequest, ground: TrainingContext) -> dict[str, Any]:
    """The request as it is recorded. Raises InvalidRequest, UnknownName, UnknownAdapter, each naming the field."""
    if ground.origin is None:
        raise InvalidRequest("this server's base is in memory alone, and a training process could not map it", "model")
    for param in ("training_file", "validation_file"):
        id = getattr(asked, param)
        with rename_params(file_id=param):
            if id is not None and ground.files.get(id).purpose != "fine-tune":
                raise InvalidRequest(f"{param} must have been uploaded with the purpose fine-tune", param)
    if asked.suffix is not None and asked.suffix in RESERVED | {ground.base_name}:
        raise InvalidRequest(f"the name {asked.suffix!r} is reserved", "suffix")
    if asked.suffix is not None and TRAINING_ID.fullmatch(asked.suffix):
        raise InvalidRequest(f"{asked.suffix!r} is as jobs are called by themselves; give another name", "suffix")
    task = _task(asked, ground)
    found = ground.tasks.find(task) if task is not None else None
    _check_ranks(asked, ground)
    request = {
        "training_file": asked.training_file,
        "validation_file": asked.validation_file,
        "suffix": asked.suffix,
        "seed": asked.seed,
        "hyperparameters": {
            "n_epochs": asked.n_epochs or EPOCHS,
            "batch_size": asked.batch_size or BATCH,
            "learning_rate_multiplier": asked.learning_rate_multiplier or 1.0,
        },
        "lora": {**vars(asked.lora), "alpha": asked.lora.alpha or 2.0 * asked.lora.r, "task": task},
        # As it is now: the job may begin, or go on from a checkpoint, when the task is another or none.
        "template": {k: v for k, v in found.body().items() if k != "route"} if found is not None else {},
        # Of a task that a folder brings, which the result's own then takes the place of.
        "route": found.body()["route"] if found is not None and found.source == "file" else None,
        "metadata": dict(asked.metadata or {}) or None,
        "base": {"name": ground.origin.name, "id": ground.origin.id},
    }
    try:
        spec = config_of(request).spec()
        if asked.lora.init_from is None:
            spec.ranks(ground.linears)
    except AdapterError as error:
        raise InvalidRequest(error.message, _PARAM.get(error.param or "", error.param)) from error
    return request


def _task(asked: TrainingRequest, ground: TrainingContext) -> str | None:
    """The task whose template the data go through: the one that is named, else that of the adapter's name."""
    name = asked.lora.task
    if name is None:
        return asked.suffix if asked.suffix and ground.tasks.find(asked.suffix) is not None else None
    if ground.tasks.find(name) is None:
        raise UnknownName(f"there is no task {name[:64]!r}; GET /tasks lists them", "lora.task")
    return name


def _check_ranks(asked: TrainingRequest, ground: TrainingContext) -> None:
    lora = asked.lora
    most = highest_rank(lora.r, lora.auto_rank)
    if most > ground.max_rank:
        why = f", and auto_rank may give a module {AUTO_WIDENS} times r" if lora.auto_rank else ""
        raise InvalidRequest(f"this server takes ranks of up to {ground.max_rank} (--max-rank){why}", "lora.r")
    if lora.init_from is not None:
        with rename_params(adapters="lora.init_from"):
            ground.registry.resolve([(lora.init_from, 1.0)])
        fixed = set(asked.given & {"r", "alpha", "target_modules"})
        fixed |= {name for name in ("rslora", "auto_rank") if getattr(lora, name)}
        if fixed:
            one = sorted(fixed)[0]
            raise InvalidRequest(f"an adapter that is started from has its own ranks; leave {one} out", f"lora.{one}")
    elif lora.prune_to is not None and lora.prune_to >= most:
        what = f"{AUTO_WIDENS} times r" if lora.auto_rank else "r"
        raise InvalidRequest(f"prune_to must be below {what}, which is {most}: nothing would be cut", "lora.prune_to")


def config_of(request: Mapping[str, Any]) -> TrainingConfig:
    """The settings of a run. Raises AdapterError."""
    lora, hyper = request["lora"], request["hyperparameters"]
    targets = lora["target_modules"]
    return TrainingConfig(
        epochs=float(hyper["n_epochs"]),
        batch_size=hyper["batch_size"],
        learning_rate=LEARNING_RATE * hyper["learning_rate_multiplier"],
        lora_rank=lora["r"],
        lora_alpha=float(lora["alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=lora["rslora"],
        seed=request["seed"],
        save_steps=SAVE_STEPS,
    )


def _routed(request: Mapping[str, Any]) -> dict[str, Any]:
    route = request.get("route")  # requests of before have none
    return {} if route is None else {"route": route}


def keep_init(request: Mapping[str, Any], ground: TrainingContext, folder: Path) -> None:
    """Put the adapter to start from, as it is now, into the job's folder. Raises UnknownAdapter, StoreFailed."""
    name = request["lora"]["init_from"]
    if name is None:
        return
    with ground.registry.lease([(name, 1.0)]) as lease:
        [(version, _)] = lease.versions
        _copy(ground, version, folder / INIT)


def _copy(ground: TrainingContext, version: Version, target: Path) -> None:
    """The folder of a version that is leased. Raises StoreFailed, for what is damaged too: nothing goes on from that,
    and who is to be compared with it would be told at the end of a training only.
    """
    ground.registry.read_version(version)
    with refused(f"a copy of {version.label}"):
        target.mkdir(parents=True)
        for file in ground.store.path(version.digest).iterdir():  # not copytree, whose error has no reason
            shutil.copyfile(file, target / file.name)


def check_base(name: str, id: str, ground: TrainingContext) -> None:
    """Raises JobError where the server has another base than that, on which a job was asked for or trained."""
    there = ground.origin
    if there is not None and there.id == id:
        return
    has = f"{name} packed otherwise, or of other files" if ground.base_name == name else ground.base_name
    raise JobError(
        "other_base",
        f"it was asked for on the base {name}, and the server has {has}: start the server with what it had then and "
        "resume the job, or ask anew",
    )


def spec_of(name: str, request: Mapping[str, Any], ground: TrainingContext, folder: Path) -> WorkerSpec:
    """What the training process is told. The adapter that the result would replace is copied, as it is now.

    Raises UnknownName for a file that is gone, JobError for an adapter to start from that is, StoreFailed.
    """
    if ground.origin is None:
        raise JobError("other_base", "this server's base is in memory alone, and a training process could not map it")
    lora, files = request["lora"], ground.files
    if lora["init_from"] is not None and not (folder / INIT).exists():
        raise JobError("init_missing", "the job's copy of what it starts from is gone: ask anew", "lora.init_from")
    validation = request["validation_file"]
    rival = folder / RIVAL
    shutil.rmtree(rival, ignore_errors=True)
    if name in ground.registry.names():
        # It may go at this moment, and the name is free.
        with contextlib.suppress(UnknownAdapter), ground.registry.lease([(name, 1.0)]) as lease:
            [(version, _)] = lease.versions
            _copy(ground, version, rival)
    return WorkerSpec(
        base=ground.origin,
        name=name,
        config=replace(config_of(request), data=files.get(request["training_file"]).filename),
        data=files.path(request["training_file"]).resolve(),
        data_name=files.get(request["training_file"]).filename,
        validation=files.path(validation).resolve() if validation else None,
        validation_name=files.get(validation).filename if validation else "",
        held_out=HELD_OUT if lora["publish"] == "if_better" and not validation else 0.0,
        template=request["template"],
        # An adapter that is called otherwise than the task would take the task from the one that has it.
        task={"task": name, **request["template"], **_routed(request)} if lora["task"] == name else None,
        threads=ground.threads,
        max_rank=ground.max_rank,
        init=(folder / INIT).resolve() if lora["init_from"] is not None else None,
        init_name=(lora["init_from"] or "").partition("@")[0],
        rival=rival.resolve() if rival.exists() else None,
        auto_rank=lora["auto_rank"],
        prune_to=lora["prune_to"],
        loan=ground.lend(),
        context=ground.context,
    )
