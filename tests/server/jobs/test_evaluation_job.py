"""What an evaluation job tells of its candidates, and what it keeps of them where it does not come to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import StoreFailed, UnknownAdapter
from adapters.leases import Lease
from adapters.weights import Choice, Version, canonical_mix
from server.errors import InvalidRequest
from server.jobs.evaluation_job import DATA, EvaluationJob, told
from server.jobs.file_store import FileStore
from server.jobs.job_store import EVALUATION, Job, JobStore
from server.jobs.runner import JobRunner
from server.tasks import scores
from server.tasks.definitions import FixedRoute, parse
from server.tasks.evaluation import Evaluation, Score, prompt_fingerprint
from server.tasks.resolve import Target
from tests.waiting import until

LONG = "the cat sat on the mat and looked at the moon with joy"


def found(metric: str, answers: list[str], references: list[str]) -> Evaluation:
    """As it comes of these answers."""
    corpus = scores.CORPUS[metric]
    counts = [corpus.count(a, r) for a, r in zip(answers, references, strict=True)]
    values, parts = tuple(map(corpus.single, counts)), scores.parts(corpus.score, counts)
    score = Score(metric, corpus.score(scores.sums(counts)), values, parts)
    return Evaluation({metric: score}, tuple(answers), (), 3, 4, 0.5)


def test_the_best_by_score_is_the_best_by_difference() -> None:
    """Although the other has more of the single answers right."""
    references = ["no"] * 9 + [LONG]
    for metric in scores.CORPUS:
        many = found(metric, ["no"] * 9 + ["yes " * 12], references)
        long = found(metric, ["yes"] * 9 + [LONG], references)
        result = told([many, long], metric)
        first, second = result["candidates"]
        assert result["best"] == 1 and second["difference_to_best"] is None
        apart = first["difference_to_best"]
        assert apart["mean"] == first["score"] - second["score"] < -1
        assert apart["low"] < apart["mean"] < apart["high"]


def test_the_best_does_not_differ_from_itself() -> None:
    """Of few hits an interval is wide, though all that they are compared with are alike."""
    hits = [Score("accuracy", share, (1.0,) * round(5 * share) + (0.0,) * round(5 - 5 * share)) for share in (1.0, 0.8)]
    result = told([Evaluation({"accuracy": score}, (), (), 3, 4, 0.5) for score in hits], "accuracy")
    best, other = (row["difference_to_best"] for row in result["candidates"])
    assert result["best"] == 0 and best is None and other["mean"] == pytest.approx(-0.2)
    assert other["low"] < other["mean"] < other["high"]


class House:
    """The candidates of an evaluation job on an engine that answers by `scores`, or fails with what is there; None
    cancels the job. With `full` the disk takes no records."""

    def __init__(
        self, root: Path, scores: dict[str, float | Exception | None], files: Any = None, full: bool = False
    ) -> None:
        self.full, self.out_of_reach = full, 0
        self.scores, self.out, self.reviewed = scores, set[str](), list[str]()
        self.taken: list[tuple[str, dict[str, float]]] = []
        self.asked: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None
        """Called as each evaluation begins."""
        self.out_at: list[set[str]] = []
        """Which leases are out when each evaluation begins."""
        self.task = parse("mood", {"prompt": "{input}"}, default_route=FixedRoute(), source="api")
        tasks: Any = SimpleNamespace(get=lambda name: self.task)
        quality: Any = SimpleNamespace(evaluated=self._record)
        self.records = JobStore(root)
        work = EvaluationJob(tasks, quality, files, self._lease, self._evaluate, self._review, "b")
        self.jobs = JobRunner(self.records, {EVALUATION: work})
        self.jobs.start()

    def run(self, names: list[str], file: str | None = None) -> Job:
        """A job over two examples, at its end, as the disk has it."""
        request = {"training_file": file, "candidates": [[[name, 1.0]] for name in names], "metric": "accuracy"}
        lines = json.dumps([{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]).encode()
        job = self.jobs.enter(self.jobs.records.prepare(EVALUATION, "mood", request, "eval", {DATA: lines}))
        until(lambda: job.over)
        self.jobs.close(1.0)
        assert not self.out
        return JobStore(self.records._folder).jobs[job.id]

    def _lease(self, choice: Choice) -> Lease:
        name = choice[0][0]
        if name not in self.scores:
            raise UnknownAdapter(f"no adapter named {name!r} is served", "adapters")
        self.out.add(name)
        versions = [(Version(name, name * 64), 1.0)]
        return Lease(canonical_mix(versions, 8), versions, lambda lease: self.out.discard(name))

    def _evaluate(self, target: Target, examples: Any, metrics: Any, tell: Any) -> Future[Evaluation]:
        assert target.held is not None
        self.out_at.append(set(self.out))
        self.meanwhile()
        future: Future[Evaluation] = Future()
        value = self.scores[target.choice[0][0]]
        if value is None:
            self.jobs.cancel(self.records.all()[0].id)
        elif isinstance(value, Exception):
            future.set_exception(value)
        else:
            score = Score("accuracy", value, (value,) * len(examples))
            held = tuple(target.held.versions)
            future.set_result(Evaluation({"accuracy": score}, (), held, 3, 4, 0.5, self.out_of_reach))
        return future

    def _record(self, subject: Any, metric: str, values: dict[str, float], asked: str) -> None:
        if self.full:
            raise StoreFailed("the disk refuses the records")
        self.taken.append((subject.adapter, values))
        self.asked.append(asked)

    def _review(self, task: str) -> None:
        self.reviewed.append(task)


def test_candidates_that_were_done_outlive_one_that_fails(tmp_path: Path) -> None:
    house = House(tmp_path, {"a": 0.25, "c": 0.5, "e": InvalidRequest("the logits are not finite"), "f": 1.0})
    job = house.run(["a", "c", "e", "f"])
    assert job.status == "failed" and job.error is not None and "not finite" in job.error["message"]
    assert [row["adapters"][0]["name"] for row in job.result["candidates"]] == ["a", "c"]
    assert job.result["best"] == 1 and job.result["candidates"][0]["difference_to_best"]["mean"] == -0.25
    assert [(name, list(values.values())) for name, values in house.taken] == [("a", [0.25] * 2), ("c", [0.5] * 2)]
    assert house.reviewed == ["mood"]


def test_scores_are_recorded_with_what_was_asked(tmp_path: Path) -> None:
    """Not with what the task has become meanwhile."""
    house = House(tmp_path, {"a": 0.25})
    task, another = house.task, replace(house.task, prompt="Another: {input}")
    house.meanwhile = lambda: setattr(house, "task", another)
    assert house.run(["a"]).status == "succeeded"
    assert house.asked == [prompt_fingerprint(task, "accuracy")] != [prompt_fingerprint(another, "accuracy")]


def test_all_candidates_are_held_from_the_start_to_their_turn(tmp_path: Path) -> None:
    house = House(tmp_path, {"a": 0.25, "c": 0.5})
    assert house.run(["a", "c"]).status == "succeeded"
    assert house.out_at == [{"a", "c"}, {"c"}]


def test_examples_that_no_answer_can_reach_are_told_once(tmp_path: Path) -> None:
    house = House(tmp_path, {"a": 0.25, "c": 0.5})
    house.out_of_reach = 1
    job = house.run(["a", "c"])
    [told] = [event for event in house.records.events(job.id) if "out_of_reach" in event["data"]]
    assert told["level"] == "warn" and told["data"] == {"out_of_reach": 1}
    assert told["message"].startswith("1 of 2 expected answers have more tokens than an answer may have")


@pytest.mark.parametrize("gone", [["a", "gone"], ["gone", "a"]])
def test_one_that_is_gone_already_is_told_before_any_runs(tmp_path: Path, gone: list[str]) -> None:
    house = House(tmp_path, {"a": 0.25})
    job = house.run(gone)
    assert job.status == "failed" and job.error is not None and "'gone'" in job.error["message"]
    assert not house.out_at and job.result == {}


def test_what_was_done_before_the_server_ended_outlives_one_that_is_gone_then(tmp_path: Path) -> None:
    house = House(tmp_path, {"a": 0.25})
    before = house.records.prepare

    def half_done(*given: Any) -> Job:
        job = before(*given)
        job.result, job.progress.step, job.progress.steps = {"best": 0}, 2, 4
        return job

    house.records.prepare = half_done  # type: ignore[method-assign]
    job = house.run(["a", "gone"])
    assert job.status == "failed" and job.error is not None and "'gone'" in job.error["message"]
    assert job.result == {"best": 0} and (job.progress.step, job.progress.steps) == (2, 4)


@pytest.mark.parametrize(
    ("last", "status"), [(None, "cancelled"), (InvalidRequest("the logits are not finite"), "failed")]
)
def test_a_disk_that_refuses_the_records_too_is_not_what_ended_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: Exception | None, status: str
) -> None:
    job = House(tmp_path, {"a": 0.5, "c": last}, full=True).run(["a", "c"])
    assert job.status == status and (job.error is None or "not finite" in job.error["message"])
    assert f"what {job.id} has measured is not in the task's records: the disk refuses" in caplog.text


def test_records_that_the_disk_refuses_fail_what_has_succeeded_else(tmp_path: Path) -> None:
    job = House(tmp_path, {"a": 0.5}, full=True).run(["a"])
    assert job.status == "failed" and job.error is not None and "the disk refuses" in job.error["message"]


def test_a_file_that_names_half_of_a_pair_fails_its_job_alone(tmp_path: Path) -> None:
    """What is told of it is sent with all other jobs."""
    files = FileStore(tmp_path / "files")
    file = files.add(lambda path: path.write_bytes(b'{"\\ud800": 1}'), "mine.jsonl", "fine-tune").id
    house = House(tmp_path, {"a": 0.5}, files)
    assert (error := house.run(["a"], file).error) is not None
    assert error["message"].startswith("mine.jsonl, line 1: it has \\ud800; an example has")
    assert [job.error for job in house.records.all()] == [error], "in memory too"


def test_a_file_whose_content_is_gone_is_told_as_the_file(tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files")
    file = files.add(lambda path: path.write_bytes(b"x"), "mine.jsonl", "fine-tune").id
    files.path(file).unlink()
    job = House(tmp_path, {"a": 0.5}, files).run(["a"], file)
    told = {"code": "invalid_file", "message": "mine.jsonl cannot be read: No such file or directory", "param": "file"}
    assert job.error == told
