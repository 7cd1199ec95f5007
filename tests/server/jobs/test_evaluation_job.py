"""Evaluation jobs: the comparison of candidates, and what is kept if a job does not finish."""

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
from server.database import Database
from server.errors import InvalidRequest
from server.jobs.active_job import ActiveJob
from server.jobs.evaluation_job import EvaluationJob, comparison
from server.jobs.file_store import FileStore
from server.jobs.job_store import EVALUATION, Job, JobStore
from server.jobs.runner import JobRunner
from server.jobs.worker_messages import DATA
from server.tasks import scores
from server.tasks.definitions import FixedRoute, parse
from server.tasks.evaluation import Evaluation, prompt_fingerprint
from server.tasks.resolve import Target
from server.tasks.scores import Score
from tests.waiting import until

LONG = "the cat sat on the mat and looked at the moon with joy"


def corpus_evaluation(metric: str, answers: list[str], references: list[str]) -> Evaluation:
    corpus = scores.CORPUS[metric]
    counts = [corpus.statistics(a, r) for a, r in zip(answers, references, strict=True)]
    values, parts = tuple(map(corpus.single, counts)), scores.jackknife(corpus.score, counts)
    score = Score(metric, corpus.score(scores.column_sums(counts)), values, parts)
    return Evaluation({metric: score}, tuple(answers), (), 3, 4, 0.5)


@pytest.mark.parametrize("metric", sorted(scores.CORPUS))
def test_the_best_by_corpus_score_is_the_best_by_difference(metric: str) -> None:
    """Although the other candidate has more single answers right."""
    references = ["no"] * 9 + [LONG]
    many = corpus_evaluation(metric, ["no"] * 9 + ["yes " * 12], references)
    long = corpus_evaluation(metric, ["yes"] * 9 + [LONG], references)
    result = comparison([many, long], metric)
    first, second = result["candidates"]
    assert result["best"] == 1 and second["difference_to_best"] is None
    difference = first["difference_to_best"]
    assert difference["mean"] == first["score"] - second["score"] < -1
    assert difference["low"] < difference["mean"] < difference["high"]


class Engine:
    """Candidates of a job on an engine with fixed scores. An exception fails the evaluation, None cancels the job.

    `full`: the quality records cannot be written.
    """

    def __init__(self, store: JobStore, scores: dict[str, float | Exception | None], files: Any = None) -> None:
        self.store, self.scores, self.full, self.out_of_reach = store, scores, False, 0
        self.leased, self.reviewed, self.fingerprints = set[str](), list[str](), list[str]()
        self.recorded: list[tuple[str, list[float]]] = []
        self.on_start: Callable[[], object] = lambda: None
        self.leased_at: list[set[str]] = []
        self.task = parse("mood", {"prompt": "{input}"}, default_route=FixedRoute(), source="api")
        tasks: Any = SimpleNamespace(get=lambda name: self.task)
        quality: Any = SimpleNamespace(record_evaluation=self._record)
        self.work = EvaluationJob(tasks, quality, files, self._lease, self._evaluate, self.reviewed.append, "b")
        self.runner = JobRunner(store, {EVALUATION: self.work})
        self.runner.start()

    def run(self, names: list[str], file: str | None = None) -> Job:
        """A finished job over two examples."""
        job = submit(self.runner, names, file)
        until(lambda: job.finished)
        self.runner.close(1.0)
        assert not self.leased
        return job

    def _lease(self, choice: Choice) -> Lease:
        name = choice[0][0]
        if name not in self.scores:
            raise UnknownAdapter(f"no adapter named {name!r} is served", "adapters")
        self.leased.add(name)
        versions = [(Version(name, name * 64), 1.0)]
        return Lease(canonical_mix(versions, 8), versions, lambda lease: self.leased.discard(name))

    def _evaluate(self, target: Target, examples: Any, metrics: Any, on_progress: Any) -> Future[Evaluation]:
        assert target.held is not None
        self.leased_at.append(set(self.leased))
        self.on_start()
        future: Future[Evaluation] = Future()
        value = self.scores[target.choice[0][0]]
        if value is None:
            self.runner.cancel(self.store.all()[0].id)
        elif isinstance(value, Exception):
            future.set_exception(value)
        else:
            score = Score("accuracy", value, (value,) * len(examples))
            versions = tuple(target.held.versions)
            future.set_result(Evaluation({"accuracy": score}, (), versions, 3, 4, 0.5, self.out_of_reach))
        return future

    def _record(self, mix: Any, metric: str, values: dict[str, float], fingerprint: str) -> None:
        if self.full:
            raise StoreFailed("the disk refuses the records")
        self.recorded.append((mix.adapter, list(values.values())))
        self.fingerprints.append(fingerprint)


def submit(runner: JobRunner, names: list[str], file: str | None = None) -> Job:
    request = {"training_file": file, "candidates": [[[name, 1.0]] for name in names], "metric": "accuracy"}
    lines = json.dumps([{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]).encode()
    return runner.submit(EVALUATION, "mood", request, "eval", lambda folder: (folder / DATA).write_bytes(lines))


NOT_FINITE = InvalidRequest("the logits are not finite")


def test_scores_of_finished_candidates_are_kept_if_another_fails(store: JobStore) -> None:
    engine = Engine(store, {"a": 0.25, "c": 0.5, "e": NOT_FINITE, "f": 1.0})
    job = engine.run(["a", "c", "e", "f"])
    assert job.status == "failed" and job.error is not None and "not finite" in job.error["message"]
    assert [row["adapters"][0]["name"] for row in job.result["candidates"]] == ["a", "c"]
    assert job.result["best"] == 1 and job.result["candidates"][0]["difference_to_best"]["mean"] == -0.25
    assert engine.recorded == [("a", [0.25] * 2), ("c", [0.5] * 2)] and engine.reviewed == ["mood"]


def test_scores_are_recorded_with_the_prompt_of_the_start(store: JobStore) -> None:
    engine = Engine(store, {"a": 0.25})
    task, another = engine.task, replace(engine.task, prompt="Another: {input}")
    engine.on_start = lambda: setattr(engine, "task", another)
    assert engine.run(["a"]).status == "succeeded"
    assert engine.fingerprints == [prompt_fingerprint(task, "accuracy")] != [prompt_fingerprint(another, "accuracy")]


def test_all_candidates_are_leased_from_the_start(store: JobStore) -> None:
    engine = Engine(store, {"a": 0.25, "c": 0.5})
    assert engine.run(["a", "c"]).status == "succeeded"
    assert engine.leased_at == [{"a", "c"}, {"c"}]


def test_answers_that_are_too_short_for_the_examples_are_a_warning(store: JobStore) -> None:
    engine = Engine(store, {"a": 0.25, "c": 0.5})
    engine.out_of_reach = 1
    job = engine.run(["a", "c"])
    [warning] = [event for event in store.events(job.id) if "out_of_reach" in event["data"]]
    assert warning["level"] == "warn" and warning["data"] == {"out_of_reach": 1}


@pytest.mark.parametrize("names", [["a", "gone"], ["gone", "a"]])
def test_a_deleted_candidate_fails_the_job_before_any_runs(store: JobStore, names: list[str]) -> None:
    engine = Engine(store, {"a": 0.25})
    job = engine.run(names)
    assert job.status == "failed" and job.error is not None and "'gone'" in job.error["message"]
    assert not engine.leased_at and job.result == {}


def test_a_job_that_starts_again_counts_from_zero(store: JobStore) -> None:
    engine = Engine(store, {"a": 0.25, "c": 0.5})
    engine.runner.close(0.0)
    job = submit(engine.runner, ["a", "c"])
    for _ in range(2):
        engine.work(ActiveJob(job, store))
        assert (job.progress.tokens, job.progress.seconds, job.progress.steps) == (14, 1.0, 4)


@pytest.mark.parametrize(
    ("last", "status", "message"),
    [(None, "cancelled", None), (NOT_FINITE, "failed", "not finite"), (0.5, "failed", "the disk refuses")],
)
def test_records_that_cannot_be_written(
    store: JobStore, caplog: pytest.LogCaptureFixture, last: float | Exception | None, status: str, message: str | None
) -> None:
    """They are logged if the job fails anyway, and fail it otherwise."""
    engine = Engine(store, {"a": 0.5, "c": last})
    engine.full = True
    job = engine.run(["a", "c"])
    assert job.status == status and (job.error is None if message is None else message in (job.error or {})["message"])
    assert (f"the scores of {job.id} are lost: the disk refuses" in caplog.text) == (last != 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"\\ud800": 1}', "mine.jsonl, line 1: it has \\ud800; use 'input'"),
        (b'{"prompt": "x", "completion": "y"}', "mine.jsonl, line 1: "),
        (None, "mine.jsonl cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_used_fails_the_job(
    store: JobStore, database: Database, tmp_path: Path, content: bytes | None, message: str
) -> None:
    files = FileStore(database, tmp_path / "files")
    file = files.add(lambda path: path.write_bytes(content or b"x"), "mine.jsonl", "fine-tune").id
    if content is None:
        files.path(file).unlink()
    error = Engine(store, {"a": 0.5}, files).run(["a"], file).error
    assert error is not None and (error["code"], error["param"]) == ("invalid_file", "file")
    assert error["message"].startswith(message)
