"""Which results are published, also when the name changes meanwhile or the server ends at a bad moment."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.errors import InvalidAdapter, InvalidChoice, InvalidData, NoRoom, StoreFailed, UnknownAdapter
from adapters.peft_format import save
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LowRank, Version, with_digest
from server.database import Database
from server.errors import InvalidRequest, NotReady
from server.jobs.active_job import ActiveJob, JobStopped
from server.jobs.comparison import Comparison
from server.jobs.errors import JobError
from server.jobs.evaluation_job import unit_values, wait_for
from server.jobs.file_store import FileStore
from server.jobs.job_store import CANCELLED, TRAINING, Job, JobStore
from server.jobs.publisher import Publisher, losses_table
from server.jobs.worker_messages import RESULT, VALIDATION_PAIRS
from server.tasks.evaluation import Evaluation, prompt_fingerprint
from server.tasks.resolve import Target
from server.tasks.scores import Score

SHAPES = {f"model.layers.0.self_attn.{part}": (6, 4) for part in ("q_proj", "v_proj")}
REFUSED = InvalidRequest("line 1: the prompt is empty", "prompt")


def write(folder: Path, seed: int) -> Path:
    """A tiny adapter. Equal seeds give equal content."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 1.0)
        for path, (out, into) in SHAPES.items()
    }
    save(with_digest("x", modules), folder, shapes=SHAPES)
    return folder


class Scene:
    """A registry, and a trained job `m` whose result the engine gives the loss 0.1, and any other version 0.9.

    Attributes:
        before: Called with the number of each evaluation, from 1. What it raises, the engine raises.
    """

    def __init__(self, root: Path, database: Database, rule: str, task: str | None = None) -> None:
        self.root, self.database = root, database
        self.registry = Registry(AdapterStore(root / "store"), shapes=SHAPES, ram_bytes=1 << 20)
        self.store = JobStore(database, root / "jobs")
        self.files = FileStore(database, root / "files")
        self.targets: list[Target] = []
        self.before: Callable[[int], object] = lambda number: None
        self.out_of_reach, self.recorded, self.reviewed = 0, list[Any](), list[str]()
        self.publisher = self.open()
        request = {"lora": {"publish": rule, "task": task}, "template": {}}
        self.job = self.store.create(TRAINING, "m", request, "ftjob")
        self.folder = self.store.folder(self.job.id)
        write(self.folder / RESULT, 1)
        (self.folder / VALIDATION_PAIRS).write_text('{"input": "a", "output": "b"}')

    def open(self, max_rank: int = 64) -> Publisher:
        tasks: Any = SimpleNamespace(find=lambda name: None)
        quality: Any = SimpleNamespace(record_evaluation=lambda *what: self.recorded.append(what))
        return Publisher(
            self.registry, tasks, quality, self.files, self._evaluate, self.reviewed.append, shapes=SHAPES,
            base_id="b", max_rank=max_rank,
        )  # fmt: skip

    def _evaluate(self, target: Target, examples: Any, metrics: Any, on_progress: Any) -> Future[Evaluation]:
        future: Future[Evaluation] = Future()
        self.targets.append(target)
        try:
            self.before(len(self.targets))
            with self.registry.lease(target.choice) as lease:
                versions = tuple(lease.versions)
            value = 0.1 if target.choice[0][0] == self.job.id else 0.9
            scores = {metric: Score(metric, value, (value,) * len(examples)) for metric in metrics}
            future.set_result(Evaluation(scores, ("",) * len(examples), versions, 3, 4, 0.5, self.out_of_reach))
        except Exception as error:
            future.set_exception(error)
        return future

    def use_losses(self, losses: dict[str, Any] | None) -> None:
        """Compare by the losses of the training process, not on the engine."""
        (self.folder / VALIDATION_PAIRS).unlink()
        self.job.trained = {"losses": losses}
        self.store.save(self.job)

    def add_version(self, seed: int = 2, name: str = "m", source: str = "api") -> Version:
        return self.registry.publish_now(name, write(self.root / f"v{seed}", seed), source=source).version

    def active(self) -> ActiveJob:
        """The job in a server that has just started."""
        store = JobStore(self.database, self.root / "jobs")
        return ActiveJob(store.jobs[self.job.id], store)

    def publish(self) -> dict[str, Any]:
        active = self.active()
        self.publisher.publish(active)
        return active.job.result

    def messages(self) -> str:
        return "\n".join(event["message"] for event in self.store.events(self.job.id))


Make = Callable[..., Scene]


@pytest.fixture
def make(tmp_path: Path, database: Database) -> Iterator[Make]:
    made: list[Scene] = []

    def build(rule: str = "always", task: str | None = None) -> Scene:
        made.append(Scene(tmp_path / str(len(made)), database, rule, task))
        return made[-1]

    yield build
    for scene in made:
        scene.registry.close()


class Killed(Exception):
    """Stands for the end of the process."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("rule", ["always", "if_better"])
def test_a_result_is_published_once_however_often_the_server_ends(
    make: Make, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    scene = make(rule)
    with monkeypatch.context() as patch:
        patch.setattr(scene.publisher, "_add_files", kill)
        with pytest.raises(Killed):
            scene.publish()
    served = scene.registry.current("m")
    first = scene.publish()
    assert first["model"] == "m" and first["version"] == served.label and len(first["files"]) == 1
    assert scene.publish() == first and scene.registry.current("m") == served
    assert not (scene.folder / RESULT).exists()


def test_a_job_that_failed_after_publishing_is_not_compared_with_itself(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, active = make("if_better"), None

    def full(*_: Any, **__: Any) -> None:
        raise StoreFailed("the disk is full")

    active = scene.active()
    with monkeypatch.context() as patch:
        patch.setattr(scene.publisher, "_add_files", full)
        with pytest.raises(StoreFailed):
            scene.publisher.publish(active)
    active.store.save(active.job)
    evaluations = len(scene.targets)
    result = scene.publish()
    assert (result["model"], result["version"]) == ("m", scene.registry.current("m").label)
    assert len(result["files"]) == 1 and len(scene.targets) == evaluations


def test_scores_are_recorded_before_the_result_is_published(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make("always", task="mood")
    publish_now = scene.registry.publish_now
    with monkeypatch.context() as patch:
        patch.setattr(
            scene.registry, "publish_now", lambda name, *_, **__: kill() if name == "m" else publish_now(name, *_, **__)
        )
        with pytest.raises(Killed):
            scene.publish()
    assert len(scene.recorded) == 1 and scene.reviewed == ["mood"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_comparison_during_which_the_name_changes_is_a_conflict(make: Make, old: bool, change: str) -> None:
    """The job can be resumed and compares again."""
    scene = make("if_better")
    if old:
        scene.add_version()
    scene.before = lambda number: (
        None if number > 1 else scene.add_version(3) if change == "replaced" else old and scene.registry.retire_now("m")
    )
    if old or change == "replaced":
        with pytest.raises(JobError, match="m was replaced or deleted during the evaluation") as error:
            scene.publish()
        assert error.value.code == "conflict"
    assert scene.publish()["model"] == "m"


def test_a_result_that_is_always_published_is_not_compared_again(make: Make) -> None:
    scene = make("always")
    scene.before = lambda number: scene.add_version()
    result = scene.publish()
    assert scene.registry.current("m").label == result["version"] and len(scene.targets) == 1


def losses(**fields: Any) -> dict[str, Any]:
    return {"examples": 3, "eval": 1.0, "replaced": 2.0, "replaced_digest": "", **fields}


def test_losses_are_compared_with_the_version_that_they_are_of(make: Make) -> None:
    scene = make("if_better")
    old = scene.add_version(2)
    scene.use_losses(losses(replaced_digest=old.digest))
    newer = scene.add_version(3)
    result = scene.publish()
    assert scene.registry.current("m") == newer and result["model"] is None and len(result["files"]) == 3
    assert result["evaluation"] == {"metric": "loss", "samples": 3, "score": 1.0, "replaced": None}
    assert f"{newer.label} was published after training began" in scene.messages()

    scene = make("if_better")
    scene.use_losses(losses(replaced_digest=scene.add_version(2).digest))
    assert scene.publish()["model"] == "m"


def test_a_version_that_is_published_at_the_last_moment_is_not_replaced(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make("if_better")
    scene.use_losses(losses(replaced_digest=scene.add_version(2).digest))
    publish_now, late = scene.registry.publish_now, list[Version]()

    def publish(*args: Any, **more: Any) -> Any:
        late.append(publish_now("m", write(scene.root / "late", 3)).version)
        return publish_now(*args, **more)

    monkeypatch.setattr(scene.registry, "publish_now", publish)
    with pytest.raises(JobError, match="was replaced or deleted"):
        scene.publish()
    assert scene.registry.current("m") == late[0]


@pytest.mark.parametrize(
    ("changes", "published"), [({"replaced": None}, True), ({"eval": None}, False)], ids=["of version", "of result"]
)
def test_a_loss_that_is_not_finite_is_worse_than_any_other(
    make: Make, changes: dict[str, Any], published: bool
) -> None:
    scene = make("if_better")
    old = scene.add_version(2)
    scene.use_losses(losses(replaced_digest=old.digest, **changes))
    result = scene.publish()
    assert (result["model"] == "m") == published == (scene.registry.current("m") != old)
    if published:
        assert result["evaluation"] == {"metric": "loss", "samples": 3, "score": 1.0, "replaced": None}
    else:
        assert "evaluation" not in result
        assert "could not be evaluated: its validation loss is not finite" in scene.messages()


@pytest.mark.parametrize("error", [REFUSED, InvalidChoice("no"), InvalidData("line 1: no")])
@pytest.mark.parametrize(
    ("rule", "old", "published", "files"),
    [("always", True, "m", 1), ("never", True, None, 3), ("if_better", False, "m", 1), ("if_better", True, None, 3)],
)
def test_a_result_that_cannot_be_evaluated_is_not_lost(
    make: Make, error: Exception, rule: str, old: bool, published: str | None, files: int
) -> None:
    def refuse(number: int) -> None:
        raise error

    scene = make(rule)
    scene.before = refuse
    if old:
        scene.add_version()
    result = scene.publish()
    assert (result["model"], len(result["files"])) == (published, files)
    assert "evaluation" not in result and "could not be evaluated: " in scene.messages()
    assert scene.registry.names() == ["m"], "the candidate is deleted"
    assert [scene.files.get(id).purpose for id in result["files"]] == ["fine-tune-results"] * files
    assert not (scene.folder / "candidate").exists()
    [event] = [e for e in scene.store.events(scene.job.id) if "could not be evaluated" in e["message"]]
    assert event["level"] == "warn"


@pytest.mark.parametrize("old", [True, False])
def test_a_result_without_validation_data_is_published_unless_it_must_be_better(make: Make, old: bool) -> None:
    for rule, published in (("always", True), ("if_better", not old)):
        scene = make(rule)
        scene.use_losses(None)
        if old:
            scene.add_version()
        assert (scene.publish()["model"] == "m") == published
        assert ("because there is no validation_file" in scene.messages()) == old


@pytest.mark.parametrize("rule", ["always", "never", "if_better"])
@pytest.mark.parametrize("error", [NotReady("the engine stopped"), NoRoom("over --adapter-ram")])
def test_a_job_can_be_resumed_if_the_server_could_not_evaluate_the_result(
    make: Make, rule: str, error: Exception
) -> None:
    def stop(number: int) -> None:
        raise error

    scene = make(rule)
    scene.before = stop
    if rule == "never" and isinstance(error, NoRoom):  # a result that is not served needs no room
        assert len(scene.publish()["files"]) == 3
        return
    with pytest.raises(type(error)):
        scene.publish()
    assert scene.registry.names() == []
    scene.before = lambda number: None
    assert scene.publish()["evaluation"]["samples"] and scene.registry.names() == (["m"] if rule != "never" else [])


def test_any_score_is_better_than_a_version_that_cannot_be_evaluated(make: Make) -> None:
    def overflow(number: int) -> None:
        if number == 2:
            raise InvalidRequest("the numbers overflow with m@1", "adapters")

    scene = make("if_better")
    broken = scene.add_version()
    scene.before = overflow
    result = scene.publish()
    assert result["model"] == "m" and scene.registry.current("m") != broken
    assert result["evaluation"]["replaced"] is None
    assert f"{broken.label} could not be evaluated: the numbers overflow" in scene.messages()


def test_an_adapter_that_is_missing_fails_the_job_at_once(make: Make) -> None:
    def missing(number: int) -> None:
        raise UnknownAdapter("there is no adapter", "adapters")

    scene = make()
    scene.before = missing
    with pytest.raises(UnknownAdapter):
        scene.publish()
    assert len(scene.targets) == 1


def test_a_result_is_evaluated_with_its_task_although_that_was_deleted(make: Make) -> None:
    scene = make("always", task="mood")
    body = {
        "prompt": "Q: {input}",
        "format": "raw",
        "system": None,
        "labels": ["b", "c"],
        "defaults": {"max_tokens": 2},
    }
    scene.job.request["template"] = body
    scene.store.save(scene.job)
    assert scene.publish()["evaluation"]["metric"] == "accuracy"
    [target], [(_, metric, _, fingerprint)] = scene.targets, scene.recorded
    assert target.task is not None and target.task.name == "mood" and scene.reviewed == ["mood"]
    assert {k: v for k, v in target.task.body().items() if k != "route"} == body
    assert (metric, fingerprint) == ("accuracy", prompt_fingerprint(target.task, "accuracy"))


def test_the_versions_that_are_evaluated_and_the_events(make: Make) -> None:
    scene = make("if_better")
    old = scene.add_version()
    scene.out_of_reach = 1
    result = scene.publish()
    assert [target.choice for target in scene.targets] == [[(scene.job.id, 1.0)], [(f"m@{old.digest}", 1.0)]]
    data = [event["data"] for event in scene.store.events(scene.job.id) if event["data"]]
    assert data == [{"out_of_reach": 1}, result["evaluation"], {"version": result["version"]}]


def test_candidates_of_an_ended_server_are_deleted_at_the_start(make: Make) -> None:
    scene, uploaded = make(), "ftjob-" + 24 * "0"
    for name in (scene.job.id, f"ft-{scene.job.id}", "ftjob-mine", "m"):
        scene.add_version(name=name, source="job")
    scene.add_version(name=uploaded)
    scene.open()
    assert scene.registry.names() == sorted([f"ft-{scene.job.id}", "ftjob-mine", "m", uploaded])


def test_a_candidate_that_could_not_be_deleted_is_replaced(make: Make) -> None:
    scene = make()
    scene.add_version(name=scene.job.id, source="job")
    assert scene.publish()["model"] == "m" and scene.registry.names() == ["m"]


def test_a_result_that_is_served_already_stays_unpublished_by_its_job(make: Make) -> None:
    scene = make("never")
    scene.registry.publish_now("m", scene.folder / RESULT)
    result = scene.publish()
    assert result["model"] is None and len(result["files"]) == 3


def test_a_score_of_an_earlier_try_is_removed(make: Make) -> None:
    scene = make("always")
    scene.job.result["evaluation"] = {"metric": "loss"}
    scene.store.save(scene.job)

    def refuse(number: int) -> None:
        raise REFUSED

    scene.before = refuse
    assert "evaluation" not in scene.publish()


def test_an_adapter_of_the_candidates_name_is_not_touched(make: Make) -> None:
    scene = make()
    theirs = scene.add_version(name=scene.job.id)
    with pytest.raises(JobError, match=r"DELETE /adapters/ftjob-.* and resume the job") as taken:
        scene.publish()
    assert taken.value.code == "name_taken" and scene.registry.current(scene.job.id) == theirs


def test_a_stopped_job_publishes_nothing(make: Make) -> None:
    scene = make()
    active = scene.active()
    active.request_stop(CANCELLED)
    with pytest.raises(JobStopped):
        scene.publisher.publish(active)
    evaluation: Future[Evaluation] = Future()
    with pytest.raises(JobStopped):
        wait_for(active, evaluation)
    assert evaluation.cancelled() and scene.registry.names() == []


def test_a_result_is_read_with_the_rank_limit_of_the_server(make: Make) -> None:
    scene = make()
    with pytest.raises(InvalidAdapter, match="over the limit of 1"):
        scene.open(max_rank=1).publish(scene.active())


def test_a_full_disk_is_reported_without_paths(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/secret/place")

    scene = make()
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreFailed, match=r"a copy of the result: No space left on device$") as error:
        scene.publish()
    assert "secret" not in error.value.message


@pytest.mark.parametrize("at", [2, 3, "record"])
def test_result_files_are_added_completely_or_not_at_all(
    make: Make, monkeypatch: pytest.MonkeyPatch, at: int | str
) -> None:
    scene = make("never")
    active = scene.active()
    add, save, names = FileStore.add, active.store.save, list[str]()

    def full(files: FileStore, write: Any, name: str, purpose: str) -> Any:
        names.append(name)
        if len(names) == at:
            raise StoreFailed("no space left")
        return add(files, write, name, purpose)

    def unsaved(job: Job) -> None:
        if "files" in job.result and at == "record":
            raise StoreFailed("no space left")
        save(job)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "add", full)
        patch.setattr(active.store, "save", unsaved)
        with pytest.raises(StoreFailed):
            scene.publisher.publish(active)
    assert scene.files.all() == [] and "files" not in active.job.result
    scene.publisher.publish(active)
    assert len(scene.files.all()) == len(active.job.result["files"]) == 3


@pytest.mark.parametrize(
    ("metric", "result", "current", "better"),
    [
        ("accuracy", 0.9, 0.8, True),
        ("accuracy", 0.8, 0.8, False),
        ("accuracy", 0.7, 0.8, False),
        ("loss", 0.1, 0.2, True),
        ("loss", 0.2, 0.2, False),
        ("accuracy", 0.9, None, False),
        ("accuracy", 0.0, math.nan, True),
    ],
)
def test_when_a_result_is_better(metric: str, result: float, current: float | None, better: bool) -> None:
    assert Comparison(metric, 9, result, current).better == better


def test_scores_as_quality_records_take_them() -> None:
    assert unit_values(Score("loss", 1.0, (0.0, 1e9))) == [0.0, 1.0]
    assert unit_values(Score("accuracy", 1.0, (1.0,))) == [1.0]


def test_the_table_of_losses_has_a_row_for_each_step() -> None:
    def event(step: int, **data: float) -> dict[str, Any]:
        return {"type": "metrics", "data": {"step": step, **data}}

    events = [event(1, train_loss=2.0), event(2, train_loss=1.0), event(2, valid_loss=1.5), {"type": "message"}]
    assert losses_table(events).splitlines()[1:] == ["1,2,,,", "2,1,,1.5,"]
