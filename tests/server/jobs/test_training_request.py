"""Validation of training requests, and the specs that they become."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import StoreFailed, UnknownAdapter
from adapters.registry import Registry
from adapters.store import AdapterStore
from server.database import Database
from server.errors import InvalidRequest, UnknownName
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.training_request import (
    Lora,
    TrainingContext,
    TrainingRequest,
    check_base,
    copy_init_adapter,
    training_config,
    validate,
    worker_spec,
)
from server.jobs.worker_messages import BaseSource
from server.tasks.definitions import FixedRoute, Task, parse
from tests.server.jobs.test_publisher import SHAPES, write

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def context(database: Database, tmp_path: Path) -> TrainingContext:
    """A base in files, and a registry without adapters."""
    nothing: Any = SimpleNamespace(names=lambda: [], resolve=lambda choice: None, find=lambda name: None)
    return TrainingContext(
        base_source=BaseSource(tmp_path, "tiny", "reference", "int4", None, False, 8, tmp_path, "0" * 64),
        base_name="tiny",
        max_rank=16,
        threads=3,
        files=FileStore(database, tmp_path / "files"),
        registry=nothing,
        store=nothing,
        tasks=nothing,
        module_paths=("model.layers.0.self_attn.q_proj",),
    )


@pytest.fixture
def with_registry(context: TrainingContext, tmp_path: Path) -> Iterator[TrainingContext]:
    registry = Registry(store := AdapterStore(tmp_path / "store"), shapes=SHAPES, ram_bytes=1 << 20)
    yield replace(context, registry=registry, store=store)
    registry.close()


def with_tasks(context: TrainingContext, *tasks: Task) -> TrainingContext:
    found: Any = SimpleNamespace(find={task.name: task for task in tasks}.get)
    return replace(context, tasks=found)


def task(name: str, source: Any = "api", **body: Any) -> Task:
    return parse(name, {"prompt": "{input}", "format": "raw", **body}, default_route=FixedRoute(), source=source)


def upload(context: TrainingContext, name: str = "x.jsonl", purpose: str = "fine-tune") -> str:
    return context.files.add(lambda path: path.write_text('{"input": "a", "output": "b"}'), name, purpose).id


def test_defaults_and_the_settings_of_a_run(context: TrainingContext) -> None:
    file = upload(context)
    request = validate(TrainingRequest(file), context)
    assert (request["lora"]["r"], request["lora"]["alpha"], request["lora"]["task"]) == (8, 16.0, None)
    assert request["metadata"] is request["route"] is None and request["template"] == {}
    assert request["base"] == {"name": "tiny", "id": "0" * 64}
    default = training_config(request)
    assert (default.epochs, default.batch_size, default.learning_rate, default.save_steps) == (3.0, 16, 5e-4, 20)
    wanted = TrainingRequest(
        file, seed=5, n_epochs=0.5, batch_size=4, learning_rate_multiplier=2.0, lora=Lora(r=16, rslora=True),
        metadata={"a": "b"},
    )  # fmt: skip
    request = validate(wanted, context)
    config = training_config(request)
    assert (config.epochs, config.batch_size, config.learning_rate, config.seed) == (0.5, 4, 1e-3, 5)
    assert (config.lora_rank, config.lora_alpha, config.use_rslora) == (16, 32.0, True)
    assert request["metadata"] == {"a": "b"}
    assert validate(TrainingRequest(file, lora=Lora(r=4, auto_rank=True, prune_to=9)), context)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"suffix": "tiny"}, "suffix", "'tiny' is reserved"),
        ({"suffix": "base"}, "suffix", "'base' is reserved"),
        ({"suffix": "ftjob-" + 24 * "a"}, "suffix", "is reserved"),
        ({"lora": Lora(r=16, auto_rank=True)}, "lora.r", r"up to 16 \(--max-rank\), and auto_rank may give"),
        ({"lora": Lora(r=17)}, "lora.r", "up to 16"),
        ({"lora": Lora(r=4, prune_to=4)}, "lora.prune_to", r"prune_to must be below r \(4\)"),
        ({"lora": Lora(r=2, prune_to=8, auto_rank=True)}, "lora.prune_to", r"below 4 times r \(8\)"),
        ({"lora": Lora(task="nobody")}, "lora.task", "there is no task 'nobody'"),
        ({"lora": Lora(target_modules=("nothing",))}, "lora.target_modules", "nothing"),
        ({"lora": Lora(init_from="m", rslora=True)}, "lora.rslora", "leave rslora out"),
        ({"lora": Lora(r=4, init_from="m", auto_rank=True)}, "lora.auto_rank", "leave auto_rank out"),
        ({"lora": Lora(init_from="m"), "given": {"r"}}, "lora.r", "leave r out"),
        ({"lora": Lora(init_from="m"), "given": {"alpha"}}, "lora.alpha", "leave alpha out"),
        ({"lora": Lora(init_from="m"), "given": {"target_modules"}}, "lora.target_modules", "leave target_modules"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(
    context: TrainingContext, fields: dict[str, Any], param: str, message: str
) -> None:
    wanted = TrainingRequest(upload(context), **{**fields, "given": frozenset(fields.get("given", ()))})
    with pytest.raises((InvalidRequest, UnknownName), match=message) as error:
        validate(wanted, context)
    assert error.value.param == param


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_files_must_exist_and_be_for_training(context: TrainingContext, param: str) -> None:
    good, result = upload(context), upload(context, "r.csv", "fine-tune-results")
    files = {"training_file": good, "validation_file": good}
    for wrong, kind in ((result, InvalidRequest), ("file-x", UnknownName)):
        with pytest.raises(kind) as error:
            validate(TrainingRequest(**{**files, param: wrong}), context)
        assert error.value.param == param


def test_a_job_keeps_the_task_that_it_was_created_with(context: TrainingContext, tmp_path: Path) -> None:
    file = upload(context)
    before = with_tasks(context, task("say", prompt="Translate: {input}"))
    request = validate(TrainingRequest(file, suffix="say"), before)
    spec = worker_spec("say", request, before, tmp_path)
    assert spec.template["prompt"] == "Translate: {input}" and spec.task == {"task": "say", **spec.template}
    for after in (with_tasks(context, task("say", prompt="Other: {input}")), context):
        assert worker_spec("say", request, after, tmp_path) == spec
    plain = worker_spec("m", validate(TrainingRequest(file, suffix="m"), before), before, tmp_path)
    assert plain.template == {} and plain.task is None


@pytest.mark.parametrize("source", ["api", "file"])
def test_only_the_adapter_of_the_tasks_name_brings_the_task(
    context: TrainingContext, tmp_path: Path, source: str
) -> None:
    """And its route, if the task comes from an adapter's folder."""
    say = task("say", source, route={"choice": [{"name": "b", "weight": 0.5}]})
    context = with_tasks(context, say)
    own = worker_spec("say", validate(TrainingRequest(upload(context), suffix="say"), context), context, tmp_path)
    route = {"route": say.body()["route"]} if source == "file" else {}
    assert own.task == {"task": "say", **own.template, **route} and "route" not in own.template
    wanted = TrainingRequest(upload(context), suffix="m", lora=Lora(task="say"))
    other = worker_spec("m", validate(wanted, context), context, tmp_path)
    assert other.template == own.template and other.task is None


def test_a_spec_has_the_files_and_their_names(context: TrainingContext, tmp_path: Path) -> None:
    context = replace(context, gpu_share=lambda: {"gpu": 1}, context_length=9)
    data, held = upload(context, "learn.jsonl"), upload(context, "judge.jsonl")
    lora = Lora(publish="if_better", auto_rank=True, r=4, prune_to=3)
    spec = worker_spec("m", validate(TrainingRequest(data, held, lora=lora), context), context, tmp_path)
    assert (spec.data, spec.validation) == tuple(context.files.path(id).resolve() for id in (data, held))
    assert (spec.data_name, spec.validation_name, spec.config.data) == ("learn.jsonl", "judge.jsonl", "learn.jsonl")
    assert (spec.auto_rank, spec.prune_to, spec.threads, spec.max_rank) == (True, 3, 3, 16)
    assert (spec.gpu_share, spec.context_length, spec.held_out) == ({"gpu": 1}, 9, 0.0)
    for rule, held_out in (("if_better", 0.1), ("always", 0.0), ("never", 0.0)):
        request = validate(TrainingRequest(data, lora=Lora(publish=rule)), context)
        spec = worker_spec("m", request, context, tmp_path)
        assert (spec.held_out, spec.validation, spec.validation_name) == (held_out, None, "")
        assert (spec.init, spec.init_name, spec.replaced) == (None, "", None)


def test_the_version_to_replace_is_copied_at_each_start(with_registry: TrainingContext, tmp_path: Path) -> None:
    context, registry, folder = with_registry, with_registry.registry, tmp_path / "job"
    request = validate(TrainingRequest(upload(context)), context)
    assert worker_spec("m", request, context, folder).replaced is None and not folder.exists()
    for seed in (1, 2):
        registry.publish_now("m", write(tmp_path / f"v{seed}", seed))
        replaced = worker_spec("m", request, context, folder).replaced
        stored = context.store.path(registry.current("m").digest)
        assert replaced == (folder / "rival").resolve()
        assert {f.name: f.read_bytes() for f in replaced.iterdir()} == {
            f.name: f.read_bytes() for f in stored.iterdir()
        }
    registry.retire_now("m")
    assert worker_spec("m", request, context, folder).replaced is None and not (folder / "rival").exists()
    going: Any = SimpleNamespace(names=lambda: ["m"], lease=registry.lease)
    assert worker_spec("m", request, replace(context, registry=going), folder).replaced is None, "deleted just now"


def test_training_starts_from_a_copy_of_a_version(with_registry: TrainingContext, tmp_path: Path) -> None:
    context, registry, folder = with_registry, with_registry.registry, tmp_path / "job"
    first = registry.publish_now("old", write(tmp_path / "v1", 1)).version
    registry.publish_now("old", write(tmp_path / "v2", 2))
    wanted = TrainingRequest(upload(context), lora=Lora(init_from=first.label), given=frozenset({"init_from"}))
    request = validate(wanted, context)
    copy_init_adapter(request, context, folder)
    spec = worker_spec("m", request, context, folder)
    assert (spec.init, spec.init_name) == ((folder / "init").resolve(), "old")
    assert (folder / "init" / TENSORS).read_bytes() == (context.store.path(first.digest) / TENSORS).read_bytes()
    with pytest.raises(UnknownAdapter) as missing:
        validate(TrainingRequest(request["training_file"], lora=Lora(init_from="nobody")), context)
    assert missing.value.param == "lora.init_from"
    shutil.rmtree(folder / "init")
    with pytest.raises(JobError, match="is missing; create a new job"):
        worker_spec("m", request, context, folder)


def test_a_damaged_version_is_neither_started_from_nor_compared_with(
    with_registry: TrainingContext, tmp_path: Path
) -> None:
    context, registry = with_registry, with_registry.registry
    digest = registry.publish_now("m", write(tmp_path / "old", 2)).version.digest
    tensors = context.store.path(digest) / TENSORS
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    request = validate(TrainingRequest(upload(context)), context)
    start: list[Callable[[], object]] = [
        lambda: copy_init_adapter({"lora": {"init_from": "m"}}, context, tmp_path / "job"),
        lambda: worker_spec("m", request, context, tmp_path / "job"),
    ]
    for one in start:
        with pytest.raises(StoreFailed, match="publish it again"):
            one()
    assert not (tmp_path / "job").exists()


def test_a_job_needs_the_base_that_it_was_created_on(context: TrainingContext, tmp_path: Path) -> None:
    assert context.base_source is not None
    request = validate(TrainingRequest(upload(context)), context)
    check_base(request["base"], context)
    other = replace(context, base_source=replace(context.base_source, name="big", id="1" * 64), base_name="big")
    repacked = replace(context, base_source=replace(context.base_source, id="1" * 64))
    in_memory = replace(context, base_source=None)
    for current, message in (
        (other, "created on the base tiny, and this server has big; start the server with that base"),
        (repacked, "this server has tiny with other files or packing"),
        (in_memory, "start the server with that base"),
    ):
        with pytest.raises(JobError, match=message) as error:
            check_base(request["base"], current)
        assert error.value.code == "other_base"
    with pytest.raises(InvalidRequest, match="in memory only") as refused:
        validate(TrainingRequest(request["training_file"]), in_memory)
    assert refused.value.param == "model"
    with pytest.raises(JobError, match="in memory only"):
        worker_spec("m", request, in_memory, tmp_path)
