"""What is published of a result, by rule, where somebody else publishes too or the server ends at a bad moment; and
that a job keeps the template that it was asked with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
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
from server.errors import InvalidRequest, NotReady, ServerError, UnknownName
from server.jobs.errors import JobError
from server.jobs.evaluation_job import DATA, EvaluationJob
from server.jobs.file_store import FileStore
from server.jobs.job_store import CANCELLED, EVALUATION, TRAINING, Job, JobStore
from server.jobs.publisher import Publisher, Verdict, awaited
from server.jobs.requests import Lora, TrainingContext, TrainingRequest, checked, config_of, keep_init, spec_of
from server.jobs.runner import ActiveJob, JobStopped
from server.jobs.training_job import TrainingJob
from server.jobs.worker_messages import JUDGED, RESULT, BaseSource
from server.tasks.definitions import FixedRoute, Task, parse
from server.tasks.evaluation import Evaluation, Score, prompt_fingerprint
from server.tasks.resolve import Target

SHAPES = {f"model.layers.0.self_attn.{part}": (6, 4) for part in ("q_proj", "v_proj")}
SPEC: Any = SimpleNamespace(max_rank=64)


def write(folder: Path, seed: int) -> Path:
    """A tiny adapter; equal seeds are equal content."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 1.0)
        for path, (out, into) in SHAPES.items()
    }
    save(with_digest("x", modules), folder, shapes=SHAPES)
    return folder


class Judged(Publisher):
    """Publishes by a verdict that a test gives. `meanwhile` is called while the result is judged."""

    verdict: Verdict | None = None

    def meanwhile(self) -> None:
        pass

    def _judge(self, active: ActiveJob, rival: Version | None) -> Verdict | None:
        self.meanwhile()
        return self.verdict


class Scene:
    """A registry, and a training job `m` whose result is there."""

    def __init__(self, root: Path, rule: str) -> None:
        self.root = root
        self.registry = Registry(AdapterStore(root / "store"), shapes=SHAPES, ram_bytes=1 << 20)
        self.records = JobStore(root / "jobs")
        nothing: Any = SimpleNamespace(find=lambda name: None)
        self.publishing = Judged(
            self.registry, nothing, nothing, FileStore(root / "files"), nothing, nothing, shapes=SHAPES, base_id="b",
            records=self.records,
        )  # fmt: skip
        job = self.records.prepare(TRAINING, "m", {"lora": {"publish": rule, "task": None}}, "ftjob", {})
        self.records.enter(job)
        write(self.records.folder(job.id) / RESULT, 1)
        self.job = job

    def publish(self) -> dict[str, Any]:
        """Publish in a server that has just started: all that it knows is on the disk. Answers the result."""
        records = JobStore(self.root / "jobs")
        job = records.jobs[self.job.id]
        self.publishing.publish(ActiveJob(job, records), SPEC)
        return job.result


@pytest.fixture
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    scene = Scene(tmp_path, request.param)
    yield scene
    scene.registry.close()


@pytest.mark.parametrize("scene", ["always", "if_better"], indirect=True)
def test_a_result_is_published_once_however_often_the_server_ends(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(Exception):
        """Stands in for the end of the process."""

    def end(*_: Any, **__: Any) -> None:
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr(scene.publishing, "_leave_files", end)  # served, and nothing of it written down
        with pytest.raises(Ended):
            scene.publish()
    served = scene.registry.current("m")
    first = scene.publish()
    assert first["model"] == "m" and first["version"] == served.label and len(first["files"]) == 1
    assert scene.publish() == first and scene.registry.current("m") == served
    assert not (scene.records.folder(scene.job.id) / RESULT).exists()


@pytest.mark.parametrize("scene", ["if_better"], indirect=True)
def test_a_job_that_failed_after_it_had_published_is_no_rival_of_itself(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFailed("the disk is full")

    records = JobStore(scene.root / "jobs")
    job = records.jobs[scene.job.id]
    scene.publishing.verdict = Verdict("accuracy", 10, 0.9, None)
    with monkeypatch.context() as patch:
        patch.setattr(scene.publishing, "_leave_files", full)
        with pytest.raises(StoreFailed):
            scene.publishing.publish(ActiveJob(job, records), SPEC)
    records.save(job)
    scene.publishing.verdict = Verdict("accuracy", 10, 0.9, 0.9)
    result = scene.publish()
    assert (result["model"], result["version"]) == ("m", scene.registry.current("m").label)
    assert len(result["files"]) == 1


@pytest.mark.parametrize("scene", ["always"], indirect=True)
def test_scores_are_recorded_before_a_result_is_published(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        """Stands in for the end of the process."""

    seen: list[Verdict | None] = []
    scene.publishing.verdict = Verdict("accuracy", 10, 0.9, None)
    monkeypatch.setattr(scene.publishing, "_record", lambda task, version, rival, verdict: seen.append(verdict))
    publish = scene.registry.publish_now

    def end(*given: Any, **options: Any) -> None:
        publish(*given, **options)
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr(scene.registry, "publish_now", end)
        with pytest.raises(Ended):
            scene.publish()
    assert scene.publish()["model"] == "m" and seen == [scene.publishing.verdict]


@pytest.mark.parametrize("scene", ["if_better"], indirect=True)
def test_what_came_while_a_result_was_judged_is_compared_with_too(scene: Scene) -> None:
    tries = []

    def meanwhile() -> None:
        if not tries:
            scene.registry.publish_now("m", write(scene.root / "other", 2))
            scene.publishing.verdict = Verdict("accuracy", 10, 0.1, None)
        else:
            scene.publishing.verdict = Verdict("accuracy", 10, 0.1, 0.9)
        tries.append(scene.registry.current("m"))

    scene.publishing.meanwhile = meanwhile  # type: ignore[method-assign]
    result = scene.publish()
    assert len(tries) == 2 and result["model"] is None and result["evaluation"]["replaced"] == 0.9
    assert scene.registry.current("m") == tries[0], "the better one stays"


class Engine:
    """Stands in for evaluations on the engine: each version has the score that its place in `scores` gives it.

    `before` is called before each, and what it raises is what the engine raises.
    """

    def __init__(self, registry: Registry, scores: list[float]) -> None:
        self.registry, self.scores = registry, scores
        self.targets: list[Target] = []
        self.before: Callable[[int], object] = lambda number: None
        self.out_of_reach = 0

    def __call__(self, target: Target, examples: Any, metrics: Any, tell: Any) -> Future[Evaluation]:
        future: Future[Evaluation] = Future()
        self.targets.append(target)
        try:
            self.before(len(self.targets))
            with self.registry.lease(target.choice) as lease:
                versions = tuple(lease.versions)
            value = self.scores[(len(self.targets) - 1) % len(self.scores)]
            scores = {metric: Score(metric, value, (value,) * len(examples)) for metric in metrics}
            future.set_result(Evaluation(scores, ("",) * len(examples), versions, 3, 4, 0.5, self.out_of_reach))
        except Exception as error:
            future.set_exception(error)
        return future


class Measured(Scene):
    """A scene whose result is measured by `engine`, on one example, or by the losses that its training has told."""

    def __init__(self, root: Path, rule: str, task: str | None = None) -> None:
        super().__init__(root, rule)
        self.engine = Engine(self.registry, [0.9, 0.1])
        self.taken: list[Any] = []
        self.reviewed: list[str] = []
        tasks: Any = SimpleNamespace(find=lambda name: None)
        quality: Any = SimpleNamespace(evaluated=lambda *what: self.taken.append(what))
        files = FileStore(root / "files")
        self.open: Callable[[], Publisher] = lambda: Publisher(
            self.registry, tasks, quality, files, self.engine, self.reviewed.append, shapes=SHAPES, base_id="b",
            records=JobStore(root / "jobs"),
        )  # fmt: skip
        self.publishing = self.open()  # type: ignore[assignment]
        self.job.request |= {"template": {}}
        self.job.request["lora"]["task"] = task
        self.on_engine(True)

    def on_engine(self, whether: bool) -> None:
        """Whether the examples are the engine's to answer, or known by the losses alone."""
        path = self.records.folder(self.job.id) / JUDGED
        path.write_text('{"input": "a", "output": "b"}') if whether else path.unlink(missing_ok=True)
        self.records.save(self.job)

    def said(self) -> str:
        return "\n".join(event["message"] for event in self.records.events(self.job.id))


@pytest.fixture
def measured(tmp_path: Path) -> Iterator[Callable[..., Measured]]:
    made: list[Measured] = []

    def make(rule: str, **more: Any) -> Measured:
        made.append(Measured(tmp_path / str(len(made)), rule, **more))
        return made[-1]

    yield make
    for scene in made:
        scene.registry.close()


def test_a_loss_is_compared_with_the_version_that_it_is_of(measured: Callable[..., Measured]) -> None:
    """The training process knew the version that had the name at its start, and no other can be told by it."""
    scene = measured("if_better")
    old = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    losses = {"examples": 3, "eval": 1.0, "rival": 2.0, "rival_digest": old.digest}
    scene.job.trained = {"losses": losses}
    scene.on_engine(False)
    better = scene.registry.publish_now("m", write(scene.root / "better", 3)).version
    result = scene.publish()
    assert scene.registry.current("m") == better and result["model"] is None and len(result["files"]) == 3
    assert result["evaluation"] == {"metric": "loss", "samples": 3, "score": 1.0, "replaced": None}
    assert f"{better.label} came after the training began" in scene.said()

    scene = measured("if_better")
    known = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.job.trained = {"losses": {**losses, "rival_digest": known.digest}}
    scene.on_engine(False)
    assert scene.publish()["model"] == "m" and scene.registry.current("m") != known


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_whatever_has_a_loss_is_better_than_a_version_whose_numbers_overflow(
    measured: Callable[..., Measured], loss: float
) -> None:
    scene = measured("if_better")
    broken = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.job.trained = {"losses": {"examples": 3, "eval": 1.0, "rival": loss, "rival_digest": broken.digest}}
    scene.on_engine(False)
    result = scene.publish()
    assert result["model"] == "m" and scene.registry.current("m") != broken
    assert result["evaluation"] == {"metric": "loss", "samples": 3, "score": 1.0, "replaced": None}
    [told] = [event["data"] for event in scene.records.events(scene.job.id) if "metric" in event["data"]]
    assert told == result["evaluation"]


def test_a_result_whose_own_numbers_overflow_is_not_better(measured: Callable[..., Measured]) -> None:
    scene = measured("if_better")
    old = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.job.trained = {"losses": {"examples": 3, "eval": math.nan, "rival": 2.0, "rival_digest": old.digest}}
    scene.on_engine(False)
    result = scene.publish()
    assert result["model"] is None and "evaluation" not in result and scene.registry.current("m") == old
    assert "could not be measured: its numbers overflow: its loss is nan" in scene.said()


def test_a_loss_of_a_version_that_came_at_the_last_moment_decides_nothing(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = measured("if_better")
    old = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.job.trained = {"losses": {"examples": 3, "eval": 1.0, "rival": 2.0, "rival_digest": old.digest}}
    scene.on_engine(False)
    publish_now, came = scene.registry.publish_now, []

    def late(*args: Any, **more: Any) -> Any:
        monkeypatch.setattr(scene.registry, "publish_now", publish_now)
        came.append(publish_now("m", write(scene.root / "late", 3)).version)
        return publish_now(*args, **more)

    monkeypatch.setattr(scene.registry, "publish_now", late)
    assert scene.publish()["model"] is None and "came after the training began" in scene.said()
    assert [scene.registry.current("m")] == came


def test_examples_that_no_answer_can_reach_are_told_once(measured: Callable[..., Measured]) -> None:
    scene = measured("if_better")
    scene.registry.publish_now("m", write(scene.root / "old", 2))
    scene.engine.out_of_reach = 1
    scene.publish()
    assert len(scene.engine.targets) == 2
    assert scene.said().count("1 of 1 expected answers have more tokens than an answer may have") == 1


REFUSED = InvalidRequest("line 1: the prompt is empty", "prompt")


@pytest.mark.parametrize("error", [REFUSED, InvalidChoice("no"), InvalidData("line 1: no")])
def test_a_result_that_cannot_be_measured_is_not_lost(measured: Callable[..., Measured], error: Exception) -> None:
    def refuse(number: int) -> None:
        raise error

    for rule, published, files in (("always", "m", 1), ("never", None, 3), ("if_better", "m", 1)):
        scene = measured(rule)
        scene.engine.before = refuse
        if rule != "if_better":
            scene.registry.publish_now("m", write(scene.root / "old", 2))
        result = scene.publish()
        assert (result["model"], len(result["files"])) == (published, files), rule
        assert "evaluation" not in result and f"could not be measured: {error.message}" in scene.said()  # type: ignore[attr-defined]
        assert scene.registry.names() == ["m"], "nothing is left of what was measured"


def test_a_result_that_nothing_measures_says_so_where_it_replaces_another(measured: Callable[..., Measured]) -> None:
    scene = measured("always")
    scene.on_engine(False)
    scene.publish()
    assert "is not known" not in scene.said()
    scene = measured("always")
    scene.on_engine(False)
    old = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.publish()
    assert f"Whether it is better than {old.label} is not known: give a validation_file." in scene.said()


@pytest.mark.parametrize("rule", ["always", "never", "if_better"])
def test_a_job_whose_server_fails_to_measure_can_be_resumed(measured: Callable[..., Measured], rule: str) -> None:
    def stop(number: int) -> None:
        raise NotReady("the engine stopped")

    scene = measured(rule)
    scene.engine.before = stop
    with pytest.raises(NotReady):
        scene.publish()
    assert scene.registry.names() == [], "neither the result nor what was measured"
    scene.engine.before = lambda number: None
    assert scene.publish()["evaluation"]["samples"] and scene.registry.names() == (["m"] if rule != "never" else [])


def test_whatever_can_be_measured_is_better_than_a_version_that_cannot(measured: Callable[..., Measured]) -> None:
    def overflow(number: int) -> None:
        if number == 2:
            raise InvalidRequest("the numbers overflow with m@1", "adapters")

    scene = measured("if_better")
    broken = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.engine.before = overflow
    result = scene.publish()
    assert result["model"] == "m" and scene.registry.current("m") != broken
    assert result["evaluation"]["replaced"] is None
    assert f"{broken.label} could not be measured: the numbers overflow" in scene.said()


@pytest.mark.parametrize("rule", ["always", "never", "if_better"])
def test_a_result_for_which_there_is_no_room_is_not_lost_where_it_is_not_to_be_served(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Else more room is given to it, and the job is resumed."""

    def full(*_: Any, **__: Any) -> None:
        raise NoRoom("it takes more than --adapter-ram")

    scene = measured(rule)
    with monkeypatch.context() as patch:
        patch.setattr(scene.registry, "publish_now", full)
        if rule == "never":
            assert len(scene.publish()["files"]) == 3
            assert "could not be measured: it takes more than --adapter-ram" in scene.said()
            return
        with pytest.raises(NoRoom):
            scene.publish()
    assert scene.publish()["model"] == "m"


def test_what_cannot_be_compared_is_not_published(measured: Callable[..., Measured]) -> None:
    def refuse(number: int) -> None:
        if len(refused) < 1:
            refused.append(number)
            raise error

    error: ServerError = REFUSED
    refused: list[int] = []
    scene = measured("if_better")
    old = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.engine.before = refuse
    result = scene.publish()
    assert result["model"] is None and len(result["files"]) == 3 and scene.registry.current("m") == old
    assert f"Not published: it could not be compared with {old.label}." in scene.said()

    scene, error = measured("if_better"), NotReady("the engine stopped")
    refused.clear()
    old = scene.registry.publish_now("m", write(scene.root / "old", 2)).version
    scene.engine.before = refuse
    with pytest.raises(NotReady):
        scene.publish()
    assert scene.publish()["model"] == "m", "another try compares"


@pytest.mark.parametrize("rule", ["always", "if_better"])
def test_what_a_result_would_replace_may_be_deleted_meanwhile(measured: Callable[..., Measured], rule: str) -> None:
    scene = measured(rule)
    scene.registry.publish_now("m", write(scene.root / "old", 2))
    scene.engine.before = lambda number: scene.registry.retire_now("m") if number == 2 else None
    result = scene.publish()
    assert result["model"] == "m" and result["evaluation"]["replaced"] is None
    assert len(scene.engine.targets) == 3 and "was deleted or replaced meanwhile" in scene.said()


def test_a_result_is_measured_by_its_task_though_that_is_gone(measured: Callable[..., Measured]) -> None:
    scene = measured("always", task="mood")
    body = {
        "prompt": "Q: {input}",
        "format": "raw",
        "system": None,
        "labels": ["b", "c"],
        "defaults": {"max_tokens": 2},
    }
    scene.job.request["template"] = body
    scene.on_engine(True)
    assert scene.publish()["evaluation"]["metric"] == "accuracy"
    [target] = scene.engine.targets
    assert target.task is not None and target.task.name == "mood"
    assert {k: v for k, v in target.task.body().items() if k != "route"} == body
    assert [what[1] for what in scene.taken] == ["accuracy"] and scene.reviewed == ["mood"]
    assert [what[3] for what in scene.taken] == [prompt_fingerprint(target.task, "accuracy")]


def test_a_disk_that_refuses_a_copy_is_told_as_such(
    measured: Callable[..., Measured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/secret/place")

    scene = measured("if_better")
    scene.registry.publish_now("m", write(scene.root / "old", 2))
    ground: Any = SimpleNamespace(registry=scene.registry, store=AdapterStore(tmp_path / "other"))
    ground.store.path = lambda digest: scene.root / "old"
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreFailed, match=r"^the disk refuses a copy of the result: No space left on device$"):
        scene.publish()
    with pytest.raises(StoreFailed, match=r"^the disk refuses a copy of m@[0-9a-f]+: No space left on device$"):
        keep_init({"lora": {"init_from": "m"}}, ground, tmp_path / "job")


def test_nothing_goes_on_from_a_damaged_version(measured: Callable[..., Measured], tmp_path: Path) -> None:
    scene = measured("always")
    digest = scene.registry.publish_now("m", write(scene.root / "old", 2)).version.digest
    store = scene.registry._store
    tensors = store.path(digest) / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ground: Any = SimpleNamespace(registry=scene.registry, store=store)
    with pytest.raises(StoreFailed, match=r"cannot be read from the store: .*; publish it again"):
        keep_init({"lora": {"init_from": "m"}}, ground, tmp_path / "job")
    assert not (tmp_path / "job").exists()
    grounds = grounded(tmp_path, registry=scene.registry, store=store)
    asked = checked(TrainingRequest(uploaded(grounds, "x.jsonl")), grounds)
    with pytest.raises(StoreFailed, match=r"^m@[0-9a-f]+ cannot be read from the store: .*; publish it again"):
        spec_of("m", asked, grounds, tmp_path / "job")
    scene.registry.publish_now("m", scene.root / "old")
    keep_init({"lora": {"init_from": "m"}}, ground, tmp_path / "job")
    assert tensors.read_bytes() == whole


def test_what_was_measured_when_the_server_was_killed_is_taken_away(measured: Callable[..., Measured]) -> None:
    scene = measured("always")
    assert scene.job.id.startswith("ftjob-")
    uploaded = "ftjob-" + 24 * "0"
    for name in (scene.job.id, f"ft-{scene.job.id}", "ftjob-mine", "m"):
        scene.registry.publish_now(name, write(scene.root / "old", 2), source="job")
    scene.registry.publish_now(uploaded, write(scene.root / "old", 2))
    scene.open()
    assert scene.registry.names() == sorted([f"ft-{scene.job.id}", "ftjob-mine", "m", uploaded])


def test_a_result_that_is_called_as_jobs_are_stays(measured: Callable[..., Measured], tmp_path: Path) -> None:
    """Whether its own job is called so, another one, or one that is known no more. Nothing is called so any more."""
    scene = measured("always")
    for name in (other := "ftjob-" + 24 * "a", scene.job.id, gone := "ftjob-" + 24 * "b"):
        scene.registry.publish_now(name, write(scene.root / "old", 2), source="job")
    for name in (other, scene.job.id):
        scene.records.enter(scene.records.prepare(TRAINING, name, scene.job.request, "ftjob", {}))
    scene.open()
    assert scene.registry.names() == sorted([other, scene.job.id, gone])
    ground = grounded(tmp_path)
    with pytest.raises(InvalidRequest, match="is as jobs are called by themselves") as refused:
        checked(TrainingRequest(uploaded(ground, "x.jsonl"), suffix=other), ground)
    assert refused.value.param == "suffix"


def test_nothing_is_measured_under_a_name_that_is_somebodys(measured: Callable[..., Measured]) -> None:
    scene = measured("always")
    theirs = scene.registry.publish_now(scene.job.id, write(scene.root / "old", 2)).version
    with pytest.raises(JobError, match=r"is called as this job is.*: DELETE /adapters/ftjob-.*, then resume") as taken:
        scene.publish()
    assert taken.value.code == "name_taken" and scene.registry.current(scene.job.id) == theirs
    scene.registry.retire_now(scene.job.id)
    scene.registry.publish_now(scene.job.id, write(scene.root / "left", 3), source="job")
    assert scene.publish()["model"] == "m" and scene.registry.names() == ["m"], "a measure that could not be ended"


def test_an_evaluation_that_begins_again_counts_anew(measured: Callable[..., Measured]) -> None:
    scene = measured("always")
    scene.registry.publish_now("m", write(scene.root / "old", 2))
    task = parse("mood", {"prompt": "{input}"}, default_route=FixedRoute(), source="api")
    request = {"training_file": None, "candidates": [[["m", 1.0]], []], "metric": "accuracy"}
    content = {DATA: json.dumps([{"input": "a", "output": "b"}]).encode()}
    job = scene.records.prepare(EVALUATION, "mood", request, "eval", content)
    scene.records.enter(job)
    tasks: Any = SimpleNamespace(get=lambda name: task)
    quality: Any = SimpleNamespace(evaluated=lambda *what: None)
    files = FileStore(scene.root / "files")
    work = EvaluationJob(tasks, quality, files, scene.registry.lease, scene.engine, lambda name: None, "b")
    for _ in range(2):
        work(ActiveJob(job, scene.records))
        assert (job.progress.tokens, job.progress.seconds, job.progress.steps) == (14, 1.0, 2)


def grounded(root: Path, **changes: Any) -> TrainingContext:
    """What a request is checked against, of a base in a file and a registry without adapters."""
    told: dict[str, Any] = {
        "origin": BaseSource(root, "tiny", "reference", "int4", None, False, 8, root, "0" * 64),
        "base_name": "tiny",
        "max_rank": 16,
        "threads": 3,
        "files": FileStore(root / "files"),
        "registry": SimpleNamespace(names=lambda: [], resolve=lambda choice: None),
        "store": None,
        "tasks": SimpleNamespace(find=lambda name: None),
        "linears": ("model.layers.0.self_attn.q_proj",),
    }
    return TrainingContext(**{**told, **changes})


def uploaded(ground: TrainingContext, name: str, purpose: str = "fine-tune") -> str:
    return ground.files.add(lambda path: path.write_text('{"input": "a", "output": "b"}'), name, purpose).id


def test_a_job_keeps_the_template_that_it_was_asked_with(tmp_path: Path) -> None:
    def task(prompt: str) -> Task:
        return parse("say", {"prompt": prompt, "format": "raw"}, default_route=FixedRoute(), source="api")

    tasks = {"say": task("Translate: {input}")}
    ground = grounded(tmp_path, tasks=SimpleNamespace(find=tasks.get), max_rank=64)
    file = uploaded(ground, "x.jsonl")
    request = checked(TrainingRequest(file, suffix="say"), ground)
    plain = checked(TrainingRequest(file, suffix="m", lora=Lora()), ground)
    asked = spec_of("say", request, ground, tmp_path)
    assert asked.template["prompt"] == "Translate: {input}" and asked.task == {"task": "say", **asked.template}
    for changed in ({"say": task("Other: {input}")}, {}):
        tasks.clear()
        tasks.update(changed)
        assert spec_of("say", request, ground, tmp_path) == asked
    bare = spec_of("m", plain, ground, tmp_path)
    assert bare.template == {} and bare.task is None
    assert bare.context is None and spec_of("m", plain, replace(ground, context=9), tmp_path).context == 9

    for given in ({"rslora": False}, {"auto_rank": False}, {}):
        lora = Lora(init_from="m", **given)
        assert checked(TrainingRequest(file, lora=lora, given=frozenset({"init_from", *given})), ground)["lora"] == {
            **plain["lora"], "init_from": "m"
        }  # fmt: skip
    for name, value in {"rslora": True, "auto_rank": True, "r": 8, "target_modules": ("q_proj",)}.items():
        lora = Lora(init_from="m", **{name: value})
        with pytest.raises(InvalidRequest, match=f"leave {name} out"):
            checked(TrainingRequest(file, lora=lora, given=frozenset({"init_from", name})), ground)


def test_the_version_that_is_compared_with_is_measured_whatever_its_name_has_by_then(tmp_path: Path) -> None:
    scene = Measured(tmp_path, "if_better")
    try:
        old = scene.registry.publish_now("m", write(tmp_path / "old", 2)).version
        scene.publish()
        assert [target.choice for target in scene.engine.targets] == [[(scene.job.id, 1.0)], [(f"m@{old.digest}", 1.0)]]
    finally:
        scene.registry.close()


def test_an_evaluation_that_ends_with_its_job_is_no_failure(tmp_path: Path) -> None:
    records = JobStore(tmp_path)
    active = ActiveJob(records.prepare(TRAINING, "", {}, "ftjob", {}), records)
    active.ask(CANCELLED)
    evaluation: Future[Evaluation] = Future()
    with pytest.raises(JobStopped):
        awaited(active, evaluation)
    assert evaluation.cancelled()


@pytest.mark.parametrize("scene", ["always"], indirect=True)
def test_what_is_always_published_waits_for_no_comparison(scene: Scene) -> None:
    """Another version that comes while the result is judged costs no second judging, and no try of three."""
    came = []
    scene.publishing.meanwhile = lambda: came.append(  # type: ignore[method-assign]
        scene.registry.publish_now("m", write(scene.root / f"other{len(came)}", 2 + len(came)))
    )
    assert scene.publish()["model"] == "m" and len(came) == 1


@pytest.mark.parametrize("scene", ["if_better"], indirect=True)
@pytest.mark.parametrize("times", [2, 3])
def test_a_name_that_keeps_changing_is_tried_for_three_times(scene: Scene, times: int) -> None:
    tries = []

    def meanwhile() -> None:
        if len(tries) < times:
            scene.registry.publish_now("m", write(scene.root / f"other{len(tries)}", 2 + len(tries)))
        tries.append(scene.registry.current("m"))
        scene.publishing.verdict = Verdict("accuracy", 10, 0.9, 0.1)

    scene.publishing.meanwhile = meanwhile  # type: ignore[method-assign]
    if times == 2:
        assert scene.publish()["model"] == "m" and len(tries) == 3
        return
    records = JobStore(scene.root / "jobs")
    job = records.jobs[scene.job.id]
    with pytest.raises(JobError, match="at each of 3 tries to publish") as failure:
        scene.publishing.publish(ActiveJob(job, records), SPEC)
    assert failure.value.code == "conflict" and len(tries) == 3
    assert set(job.result) == {"evaluation"}, "nothing is about to be published"


def test_a_score_of_an_earlier_try_is_not_told_of_one_that_could_not_be_measured(
    measured: Callable[..., Measured],
) -> None:
    scene = measured("if_better")

    def before(number: int) -> None:
        if number == 1:
            scene.registry.publish_now("m", write(scene.root / "other", 2))
        else:
            raise REFUSED

    scene.engine.before = before
    result = scene.publish()
    assert result["model"] is None and len(scene.engine.targets) == 2 and "evaluation" not in result


@pytest.mark.parametrize("scene", ["always"], indirect=True)
def test_a_job_that_is_to_end_publishes_nothing(scene: Scene) -> None:
    records = JobStore(scene.root / "jobs")
    active = ActiveJob(records.jobs[scene.job.id], records)
    active.ask(CANCELLED)
    with pytest.raises(JobStopped):
        scene.publishing.publish(active, SPEC)
    assert scene.registry.names() == []


@pytest.mark.parametrize("scene", ["always"], indirect=True)
def test_a_result_is_read_by_the_bound_of_its_server(scene: Scene) -> None:
    records = JobStore(scene.root / "jobs")
    low: Any = SimpleNamespace(max_rank=1)
    with pytest.raises(InvalidAdapter, match="over the limit of 1"):
        scene.publishing.publish(ActiveJob(records.jobs[scene.job.id], records), low)


def test_an_adapter_that_is_missing_from_the_measure_fails_the_job_at_once(
    measured: Callable[..., Measured],
) -> None:
    """One that nobody replaced will not be there at the next try either."""

    def missing(number: int) -> None:
        raise UnknownAdapter("there is no adapter", "adapters")

    scene = measured("always")
    scene.engine.before = missing
    with pytest.raises(UnknownAdapter):
        scene.publish()
    assert len(scene.engine.targets) == 1 and "was deleted or replaced" not in scene.said()


def test_what_is_left_of_a_measured_result_are_files_of_results(
    measured: Callable[..., Measured],
) -> None:
    scene = measured("never")
    ids = scene.publish()["files"]
    files = FileStore(scene.root / "files")
    assert [files.get(id).purpose for id in ids] == ["fine-tune-results"] * 3
    assert not (scene.records.folder(scene.job.id) / "candidate").exists(), "a copy as large as the adapter"


@pytest.mark.parametrize("at", [2, 3, "record"])
def test_files_of_a_result_that_cannot_all_be_left_are_not_left_for_good(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch, at: int | str
) -> None:
    scene = measured("never")
    records = JobStore(scene.root / "jobs")
    job = records.jobs[scene.job.id]
    add, save, tries = FileStore.add, records.save, list[str]()

    def full(files: FileStore, write: Any, name: str, purpose: str) -> Any:
        tries.append(name)
        if len(tries) == at:
            raise StoreFailed("no space left")
        return add(files, write, name, purpose)

    def unsaved(job: Job) -> None:
        if "files" in job.result and at == "record":
            raise StoreFailed("no space left")
        save(job)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "add", full)
        patch.setattr(records, "save", unsaved)
        with pytest.raises(StoreFailed):
            scene.publishing.publish(ActiveJob(job, records), SPEC)
    assert FileStore(scene.root / "files").all() == [] and "files" not in job.result
    scene.publishing.publish(ActiveJob(job, records), SPEC)
    assert len(FileStore(scene.root / "files").all()) == len(job.result["files"]) == 3


def test_events_have_the_scores_and_the_version_as_data(measured: Callable[..., Measured]) -> None:
    scene = measured("always")
    scene.registry.publish_now("m", write(scene.root / "old", 2))
    result = scene.publish()
    told = [event["data"] for event in scene.records.events(scene.job.id) if event["data"]]
    assert told == [result["evaluation"], {"version": result["version"]}]

    scene = measured("always")
    scene.engine.before = lambda number: (_ for _ in ()).throw(REFUSED)
    scene.publish()
    [event] = [e for e in scene.records.events(scene.job.id) if "could not be measured" in e["message"]]
    assert event["level"] == "warn"


def test_what_is_asked_is_recorded_with_what_is_usual_and_trained_so(tmp_path: Path) -> None:
    body = {"prompt": "{input}", "format": "raw", "route": {"choice": []}}
    said = parse("say", body, default_route=FixedRoute(), source="api")
    ground = grounded(tmp_path, tasks=SimpleNamespace(find={"say": said}.get))
    file = uploaded(ground, "x.jsonl")
    usual = checked(TrainingRequest(file, suffix="say"), ground)
    assert (usual["lora"]["r"], usual["lora"]["alpha"], usual["lora"]["task"]) == (8, 16.0, "say")
    assert usual["metadata"] is None and usual["route"] is None and "route" not in usual["template"]
    config = config_of(checked(TrainingRequest(file, seed=5, lora=Lora(r=16, rslora=True)), ground))
    assert (config.seed, config.lora_rank, config.lora_alpha, config.use_rslora) == (5, 16, 32.0, True)
    assert config.save_steps == 20, "what a kill may cost"
    for rule, share in (("if_better", 0.1), ("always", 0.0), ("never", 0.0)):
        asked = checked(TrainingRequest(file, lora=Lora(publish=rule)), ground)
        assert spec_of("m", asked, ground, tmp_path).held_out == share
    assert checked(TrainingRequest(file, lora=Lora(r=4, auto_rank=True, prune_to=9)), ground)["lora"]["prune_to"] == 9
    with pytest.raises(InvalidRequest, match="leave alpha out"):
        checked(
            TrainingRequest(file, lora=Lora(init_from="m", alpha=3.0), given=frozenset({"init_from", "alpha"})), ground
        )


def test_a_run_is_compared_with_what_has_the_name_as_it_begins(tmp_path: Path) -> None:
    """A job that runs again finds the copy of its first run, of a version that may be another by now, or gone."""
    registry = Registry(store := AdapterStore(tmp_path / "store"), shapes=SHAPES, ram_bytes=1 << 20)
    try:
        ground, folder = grounded(tmp_path, registry=registry, store=store), tmp_path / "job"
        request = checked(TrainingRequest(uploaded(ground, "x.jsonl")), ground)
        assert spec_of("m", request, ground, folder).rival is None and not folder.exists()
        for seed in (1, 2):
            registry.publish_now("m", write(tmp_path / f"v{seed}", seed))
            rival = spec_of("m", request, ground, folder).rival
            stored = store.path(registry.current("m").digest)
            assert rival == (folder / "rival").resolve() and not (folder / "init").exists()
            assert {f.name: f.read_bytes() for f in rival.iterdir()} == {
                f.name: f.read_bytes() for f in stored.iterdir()
            }
        assert spec_of("n", request, ground, folder).rival is None
        registry.publish_now("n", tmp_path / "v1")
        assert spec_of("n", request, ground, folder).rival is not None
        registry.retire_now("n")
        assert spec_of("n", request, ground, folder).rival is None and not (folder / "rival").exists()
        going: Any = SimpleNamespace(names=lambda: ["n"], lease=registry.lease)
        assert spec_of("n", request, replace(ground, registry=going), folder).rival is None, "it went at this moment"
    finally:
        registry.close()


def test_a_job_is_of_the_base_that_it_was_asked_for(tmp_path: Path) -> None:
    """With another one it neither trains nor publishes, says why, and goes on where its own is served again."""
    ground = grounded(tmp_path)
    assert ground.origin is not None
    request = checked(TrainingRequest(uploaded(ground, "x.jsonl")), ground)
    assert request["base"] == {"name": "tiny", "id": "0" * 64}
    other = replace(ground, origin=replace(ground.origin, name="big", id="1" * 64), base_name="big")
    repacked = replace(ground, origin=replace(ground.origin, id="1" * 64))
    nothing: Any = None

    def went(on: TrainingContext, **changes: Any) -> str | None:
        work = TrainingJob(on, nothing, lambda lent: None)
        job = Job("ftjob-1", TRAINING, "m", request, **changes)
        try:
            work(ActiveJob(job, JobStore(tmp_path)))
        except JobError as error:
            assert error.code == "other_base"
            return error.message
        except AttributeError:  # on to what the test leaves out
            return None
        raise AssertionError

    spec = spec_of("m", request, ground, tmp_path)
    (tmp_path / "ftjob-1").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingJob, "_train", lambda self, active: None)
        for trained in (None, {"made": {}}):
            assert went(ground, trained=trained) is None
            assert went(other, trained=trained) == (
                "it was asked for on the base tiny, and the server has big: start the server with what it had then "
                "and resume the job, or ask anew"
            )
            assert "the server has tiny packed otherwise" in (went(repacked, trained=trained) or "")
            assert "start the server with" in (went(replace(ground, origin=None), trained=trained) or "")
        del request["base"]  # of before: what it was trained on is in its spec
        assert went(other) is None and "in memory alone" in (went(replace(ground, origin=None)) or "")
        spec.write(tmp_path / "ftjob-1")
        assert "base tiny" in (went(other, trained={"made": {}}) or "")
        assert went(ground, trained={"made": {}}) is None


def test_a_run_is_told_its_files_and_what_people_call_them(tmp_path: Path) -> None:
    ground = grounded(tmp_path, lend=lambda: {"gpu": 1})
    learned, judged = uploaded(ground, "learn.jsonl"), uploaded(ground, "judge.jsonl")
    lora = Lora(publish="if_better", auto_rank=True, r=4, prune_to=3)
    spec = spec_of("m", checked(TrainingRequest(learned, judged, lora=lora), ground), ground, tmp_path)
    assert spec.data.read_bytes() == spec.validation.read_bytes()  # type: ignore[union-attr]
    assert (spec.data, spec.validation) == tuple(ground.files.path(id).resolve() for id in (learned, judged))
    assert (spec.data_name, spec.validation_name, spec.config.data) == ("learn.jsonl", "judge.jsonl", "learn.jsonl")
    assert spec.held_out == 0.0, "there is a file to compare on"
    assert (spec.auto_rank, spec.prune_to, spec.threads, spec.max_rank) == (True, 3, 3, 16)
    assert spec.loan == {"gpu": 1} and (spec.init, spec.init_name, spec.rival) == (None, "", None)
    alone = spec_of("m", checked(TrainingRequest(learned), ground), ground, tmp_path)
    assert (alone.validation, alone.validation_name, alone.auto_rank, alone.prune_to) == (None, "", False, None)
    other = uploaded(ground, "results.csv", "fine-tune-results")
    for asked, param in (
        (TrainingRequest(other, judged), "training_file"),
        (TrainingRequest(learned, other), "validation_file"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{param} must have been uploaded") as refused:
            checked(asked, ground)
        assert refused.value.param == param
    for asked, param in (
        (TrainingRequest("file-x", judged), "training_file"),
        (TrainingRequest(learned, "file-x"), "validation_file"),
    ):
        with pytest.raises(UnknownName) as missing:
            checked(asked, ground)
        assert missing.value.param == param


def test_a_run_goes_on_from_a_version_by_the_name_of_its_adapter(tmp_path: Path) -> None:
    registry = Registry(store := AdapterStore(tmp_path / "store"), shapes=SHAPES, ram_bytes=1 << 20)
    try:
        ground, folder = grounded(tmp_path, registry=registry, store=store), tmp_path / "job"
        first = registry.publish_now("old", write(tmp_path / "v1", 1)).version
        registry.publish_now("old", write(tmp_path / "v2", 2))
        lora = Lora(init_from=first.label)
        request = checked(
            TrainingRequest(uploaded(ground, "x.jsonl"), lora=lora, given=frozenset({"init_from"})), ground
        )
        keep_init(request, ground, folder)
        spec = spec_of("m", request, ground, folder)
        assert (spec.init, spec.init_name) == ((folder / "init").resolve(), "old")
        tensors = "adapter_model.safetensors"
        assert (spec.init / tensors).read_bytes() == (store.path(first.digest) / tensors).read_bytes()  # type: ignore[operator]
        with pytest.raises(UnknownAdapter) as missing:
            checked(TrainingRequest(request["training_file"], lora=Lora(init_from="nobody")), ground)
        assert missing.value.param == "lora.init_from"
        shutil.rmtree(folder / "init")
        with pytest.raises(JobError, match="is gone: ask anew"):
            spec_of("m", request, ground, folder)
    finally:
        registry.close()


def test_what_is_asked_of_a_run_is_what_it_does(tmp_path: Path) -> None:
    body = {"prompt": "{input}", "format": "raw", "route": {"choice": [{"name": "b", "weight": 0.5}]}}
    tasks = {name: parse(name, body, default_route=FixedRoute(), source=name) for name in ("api", "file")}  # type: ignore[arg-type]
    ground = grounded(tmp_path, tasks=SimpleNamespace(find=tasks.get))
    id = uploaded(ground, "x.jsonl")
    usual, own = (
        config_of(checked(asked, ground))
        for asked in (
            TrainingRequest(id),
            TrainingRequest(id, n_epochs=0.5, batch_size=4, learning_rate_multiplier=2.0),
        )
    )
    assert (usual.epochs, usual.batch_size, usual.learning_rate) == (3.0, 16, 5e-4)
    assert (own.epochs, own.batch_size, own.learning_rate) == (0.5, 4, 1e-3)
    assert checked(TrainingRequest(id, metadata={"a": "b"}), ground)["metadata"] == {"a": "b"}
    for name, told in (("api", {}), ("file", {"route": tasks["file"].body()["route"]})):
        request = checked(TrainingRequest(id, suffix=name), ground)
        spec = spec_of(name, request, ground, tmp_path)
        assert spec.task == {"task": name, "prompt": "{input}", "format": "raw", **spec.template, **told}
        assert "route" not in spec.template
        other = spec_of("m", checked(TrainingRequest(id, suffix="m", lora=Lora(task=name)), ground), ground, tmp_path)
        assert other.template == spec.template and other.task is None, "the task is another adapter's"
    assert checked(TrainingRequest(id, suffix="m"), ground)["lora"]["task"] is None
    with pytest.raises(InvalidRequest, match="'tiny' is reserved") as reserved:
        checked(TrainingRequest(id, suffix="tiny"), ground)
    assert reserved.value.param == "suffix"
    with pytest.raises(InvalidRequest, match=r"ranks of up to 16 \(--max-rank\), and auto_rank may give") as wide:
        checked(TrainingRequest(id, lora=Lora(r=16, auto_rank=True)), ground)
    assert wide.value.param == "lora.r"
