"""Evaluation with a real engine on the tiny base: scores, intervals, refusals, retries and cancellation."""

from __future__ import annotations

import asyncio
import math
import statistics
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adapters import data, training
from adapters.data import Completion, Pair
from adapters.errors import NoRoom
from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.api.startup import build
from server.api.state import Services
from server.engine.request import Delivery
from server.errors import InvalidRequest, QueueFull
from server.jobs.encoding import Template, encoder
from server.jobs.trainable_model import TrainableModel
from server.metrics import Metrics
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from server.settings import Settings
from server.tasks import scores
from server.tasks.definitions import BestRoute, Task
from server.tasks.delivery import EventLoopDelivery
from server.tasks.evaluation import (
    PRIORITY,
    check_metrics,
    default_metric,
    evaluate,
    example_ids,
    pairs,
    prompt_fingerprint,
)
from server.tasks.scores import Score, difference
from tests.waiting import until

TASK = {"prompt": "Say: {input}", "format": "chat", "defaults": {"max_tokens": 5, "temperature": 1.5, "logprobs": 2}}
EXAMPLES = [Pair(i + 1, f"text {i} " + "and " * (i % 5), ("yes", "no", "in the end")[i % 3]) for i in range(23)]


@pytest_asyncio.fixture
async def services(
    tmp_path: Path, tiny_base: Base, tiny_adapter: Callable[..., LoraWeights]
) -> AsyncIterator[Services]:
    settings = Settings(state_dir=tmp_path, library=None, kv_cache=8 << 20, threads=1, adapter_ram=64 << 20)
    server = build(settings, tiny_base, Metrics(), EventLoopDelivery(asyncio.get_running_loop()))
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / "made" / name
        folder.mkdir(parents=True)
        save(tiny_adapter(seed), folder)
        server.services.registry.publish_now(name, folder, source="file")
    server.services.tasks.put("say", {**TASK, "route": {"choice": [{"name": "a"}, {"name": "b", "weight": -0.5}]}})
    yield server.services
    await asyncio.to_thread(server.close, 0.0)


async def run(services: Services, *metrics: str, mix: Any = None, examples: Any = EXAMPLES, **options: Any) -> Any:
    target = services.resolver.task("say", mix)
    return await evaluate(services.inference, services.prompts, target, examples, metrics, **options)


def intercept(services: Services, monkeypatch: pytest.MonkeyPatch, first: Callable[[Any], bool]) -> list[Any]:
    """Every submitted request goes to `first`, and to the engine if that returns False. Returns all requests."""
    engine, requests = services.inference.engine, list[Any]()
    submit = engine.submit

    def submitted(request: Any) -> None:
        requests.append(request)
        if not first(request):
            submit(request)

    monkeypatch.setattr(engine, "submit", submitted)
    return requests


def no_leases(services: Services) -> bool:
    return not services.inference.live and not services.registry.memory()["leases"]


async def test_answers_are_in_order_and_do_not_depend_on_the_batch(services: Services) -> None:
    progress: list[tuple[int, int]] = []
    found = await run(
        services, "chrf", "accuracy", "chrf", on_progress=lambda done, total: progress.append((done, total))
    )
    assert set(found.scores) == {"chrf", "accuracy"} and len(found.answers) == len(EXAMPLES)
    assert [v.name for v, _ in found.versions] == ["a", "b"] and [w for _, w in found.versions] == [1.0, -0.5]
    assert progress == [(i, len(EXAMPLES)) for i in range(len(EXAMPLES) + 1)]
    references, chrf = [e.output for e in EXAMPLES], scores.CORPUS["chrf"]
    expected = chrf.score(scores.column_sums(map(chrf.statistics, found.answers, references)))
    assert found.scores["chrf"].value == expected
    assert all(0 <= value <= 1 for score in found.scores.values() for value in score.values)
    alone = await run(services, "accuracy", max_running=1)
    assert alone.answers == found.answers
    assert found.prompt_tokens == alone.prompt_tokens > 0 and found.completion_tokens > len(EXAMPLES)


async def test_requests_are_greedy_at_the_lowest_priority(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = intercept(services, monkeypatch, lambda request: False)
    await run(services, "accuracy")
    assert {(r.sampling.max_tokens, r.sampling.temperature, r.sampling.logprobs) for r in requests} == {(5, 0.0, None)}
    assert {(r.tenant, r.priority) for r in requests} == {("", PRIORITY)}
    requests[0].check_fits()
    assert no_leases(services)
    size = services.registry._ram.size(requests[0].mix.digests[0])
    monkeypatch.setattr(services.registry._ram, "capacity", size)
    with pytest.raises(NoRoom, match="the mix takes"):
        requests[0].check_fits()


async def test_the_loss_is_that_of_the_trainer(services: Services, tiny_base: Base) -> None:
    evaluation = await run(services, "loss", mix=[])
    found = evaluation.scores["loss"]
    encode = encoder(ModelTokenizer(tiny_base.vocabulary), Template.of(TASK), 1000)
    tokens = data.tokenize(EXAMPLES, encode, 1000)
    expected, _ = training.evaluate_loss(TrainableModel(tiny_base, "float32"), tokens)
    assert found.value == pytest.approx(expected, rel=1e-4)
    counts = [example.targets for example in tokens.examples]
    weighted = sum(v * n for v, n in zip(found.values, counts, strict=True)) / sum(counts)
    assert weighted == pytest.approx(found.value) and found.lower_is_better and evaluation.answers == ()


async def test_a_difference_has_the_unit_of_its_metric_and_the_sign_of_the_scores(services: Services) -> None:
    answers = (await run(services, "accuracy", mix=[])).answers
    examples = [Pair(one.line, one.input, f"{answer} .") for one, answer in zip(EXAMPLES, answers, strict=True)]
    metrics = ("bleu", "chrf", "loss", "rougeL")
    ours, theirs = [await run(services, *metrics, mix=mix, examples=examples) for mix in ([], None)]
    assert ours.scores["bleu"].value > theirs.scores["bleu"].value + 1
    for metric, one in ours.scores.items():
        found = difference(one, theirs.scores[metric])
        assert found.mean == one.value - theirs.scores[metric].value, metric
        assert found.low < found.mean < found.high, metric
        assert len(one.influences) == (0 if metric == "rougeL" else len(EXAMPLES))
    same = difference(ours.scores["loss"], ours.scores["loss"])
    assert (same.low, same.mean, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (31, 2.042), (1001, 1.962)]
)
def test_intervals_of_differences_follow_students_t(count: int, t: float) -> None:
    ours = [float(i % 2) for i in range(count)]
    found = difference(Score("loss", statistics.mean(ours), tuple(ours)), Score("loss", 0.0, (0.0,) * count))
    error = statistics.stdev(ours) / math.sqrt(count)
    assert (found.high - found.mean) / error == pytest.approx(t, rel=0.01)
    assert (found.mean - found.low) / error == pytest.approx(t, rel=0.01)
    assert math.isinf(difference(Score("loss", 1, (1.0,)), Score("loss", 1, (2.0,))).high)


@pytest.mark.parametrize(("count", "one", "other"), [(5, 0.9, 0.9), (10, 0.95, 0.85), (20, 0.9, 0.8), (60, 0.95, 0.9)])
def test_intervals_of_few_hits_cover_the_true_difference(count: int, one: float, other: float) -> None:
    """In at least 95 % of all outcomes, weighted by their probability."""
    win, loss = one * (1 - other), other * (1 - one)
    covered = 0.0
    for wins in range(count + 1):
        for losses in range(count + 1 - wins):
            ways = math.comb(count, wins) * math.comb(count - wins, losses)
            chance = ways * win**wins * loss**losses * (1 - win - loss) ** (count - wins - losses)
            ours = Score("accuracy", wins / count, (1.0,) * wins + (0.0,) * (count - wins))
            theirs = Score("accuracy", losses / count, (0.0,) * (count - losses) + (1.0,) * losses)
            found = difference(ours, theirs)
            covered += chance * (found.low <= one - other <= found.high)
    assert covered >= 0.95


async def test_an_adapter_deleted_meanwhile_is_evaluated_to_the_end(services: Services) -> None:
    expected = await run(services, "accuracy", mix=[("a", 1.0)])
    services.tasks.put("say", {**TASK, "route": {"choice": []}})

    def delete(done: int, total: int) -> None:
        if done == 3:
            services.registry.retire_now("a")

    found = await run(services, "accuracy", mix=[("a", 1.0)], max_running=2, on_progress=delete)
    assert found.answers == expected.answers and found.versions == expected.versions
    assert services.registry.names() == ["b"] and no_leases(services)


async def test_cancelling_stops_running_requests_and_releases_the_leases(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.tasks.put("say", {**TASK, "defaults": {"max_tokens": 100}, "route": {"choice": []}})
    cancel, cancelled = services.inference.engine.cancel, set[str]()
    requests = intercept(services, monkeypatch, lambda request: bool(len(requests) == 3 and job.cancel()) and False)

    def counted(id: str) -> None:
        cancelled.add(id)
        cancel(id)

    monkeypatch.setattr(services.inference.engine, "cancel", counted)
    job = asyncio.create_task(run(services, "accuracy", max_running=3))
    with pytest.raises(asyncio.CancelledError):
        await job
    assert len(requests) == 3 and {request.id for request in requests} <= cancelled
    await asyncio.to_thread(until, lambda: no_leases(services))


@pytest.mark.parametrize(
    ("metrics", "examples", "message", "param"),
    [
        (["accuracy"], [*EXAMPLES, Pair(99, "x " * 400, "yes")], "line 99: .*context", "prompt"),
        (["loss"], [*EXAMPLES, Pair(99, "x " * 400, "yes")], "line 99: .*context", "prompt"),
        (["accuracy"], [], "no examples", "data"),
        (["chrf", "bleu"], [Pair(1, "x", "in the end")], "^bleu needs 4 tokens.*; use chrf", "metric"),
        (["chrf", "rougeL"], [Pair(1, "x", "да")], "^rougeL compares words.*; use chrf", "metric"),
    ],
)
async def test_bad_examples_are_refused_before_any_runs(
    services: Services, monkeypatch: pytest.MonkeyPatch, metrics: Any, examples: Any, message: str, param: str
) -> None:
    requests = intercept(services, monkeypatch, lambda request: True)
    with pytest.raises(InvalidRequest, match=message) as error:
        await run(services, *metrics, examples=examples)
    assert not requests and error.value.param == param


async def test_expected_answers_longer_than_an_answer_may_be_are_counted(services: Services) -> None:
    """Answers of the task have five tokens; each token is one letter here."""
    outputs = ("vwxyz", "vwxyzv", "z", "vwxyz" * 2000)
    examples = [Pair(i + 1, "text", output) for i, output in enumerate(outputs)]
    for metric, count in (("chrf", 1), ("loss", 0)):
        assert (await run(services, metric, mix=[], examples=examples[:3])).out_of_reach == count
    longer = services.prompts.has_more_tokens
    assert [await longer(output, 5) for output in outputs] == [False, True, False, True]
    assert not await longer(outputs[-1], 10_000) and await longer(outputs[-1], 9_999)


@pytest.mark.parametrize("displaced", [False, True])
async def test_a_full_queue_is_tried_again_and_counts_as_no_failed_request(
    services: Services, monkeypatch: pytest.MonkeyPatch, displaced: bool
) -> None:
    """The queue refuses a request, or accepts it and then displaces it for a client."""
    statuses: list[str] = []
    services.inference.on_ended = lambda generation: statuses.append(generation.status)

    def full(request: Any) -> bool:
        if len(requests) > 5:
            return False
        error = QueueFull("full", retry_after=0.01)
        if not displaced:
            raise error
        request.deliver(Delivery(finish_reason="error", error=error))
        return True

    requests = intercept(services, monkeypatch, full)
    found = await run(services, "exact_match")
    assert len(requests) == len(EXAMPLES) + 5 and len(found.answers) == len(EXAMPLES)
    assert statuses == ["200"] * len(EXAMPLES) and no_leases(services)


async def test_a_full_queue_is_tried_again_within_a_second(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep, slept, waits = asyncio.sleep, list[float](), iter([None, 0.25, 30.0])

    def full(request: Any) -> bool:
        for wait in waits:
            raise QueueFull("full", retry_after=wait)
        return False

    async def slept_for(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    intercept(services, monkeypatch, full)
    monkeypatch.setattr(asyncio, "sleep", slept_for)
    await run(services, "exact_match", max_running=1)
    assert [seconds for seconds in slept if seconds] == [1.0, 0.25, 1.0]


async def test_an_error_names_the_line_of_its_example(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(request: Any) -> bool:
        error = InvalidRequest("the numbers overflow", "adapters")
        if len(requests) == 1:
            request.deliver(Delivery(finish_reason="error", error=error))
        return len(requests) == 1

    requests = intercept(services, monkeypatch, overflow)
    with pytest.raises(InvalidRequest, match="line 1: the numbers overflow") as caught:
        await run(services, "exact_match")
    assert caught.value.param == "adapters"


async def test_scores_are_computed_on_threads_and_not_after_a_cancellation(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, threads = asyncio.get_running_loop(), list[threading.Thread]()

    def cancel(answer: str, reference: str) -> float:
        threads.append(threading.current_thread())
        loop.call_soon_threadsafe(job.cancel)
        return 1.0

    monkeypatch.setattr("server.tasks.evaluation.SCORING_BATCH", 2)
    monkeypatch.setitem(scores.MEAN, "exact_match", cancel)  # type: ignore[arg-type]
    job = asyncio.create_task(run(services, "exact_match"))
    with pytest.raises(asyncio.CancelledError):
        await job
    await asyncio.sleep(0.05)
    assert 0 < len(threads) <= 2 and threading.current_thread() not in threads


def test_metrics_and_records_are_checked() -> None:
    assert check_metrics(["bleu", "loss", "bleu"]) == ("bleu", "loss")
    for metrics, message in ((["perplexity"], "unknown metric 'perplexity'; use one of accuracy"), ([], "needed")):
        with pytest.raises(InvalidRequest, match=message):
            check_metrics(metrics)
    longest = Pair(1, "a", "b" * 100_000)
    assert pairs([longest]) == [longest]
    for record, message in (
        (Completion(2, "a", "b"), "line 2: .*'input'"),
        (Pair(2, "a", "b" * 100_001), "^line 2: 100,001 characters of 'output' are over the limit of 100,000"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            pairs([longest, record])


def test_example_ids_depend_on_the_content_and_differ_for_duplicates() -> None:
    found = example_ids([Pair(1, "a", "b"), Pair(2, "a", "b"), Pair(3, "a", "b"), Pair(4, "a", "c")])
    assert len(set(found)) == 4
    assert example_ids([Pair(9, "a", "c"), Pair(10, "a", "b")]) == [found[3], found[0]]


@pytest.mark.parametrize(
    ("change", "accuracy", "loss"),
    [
        ({"prompt": "Say: {input} "}, True, True),
        ({"format": "chat"}, True, True),
        ({"format": "chat", "system": "Be brief."}, True, True),
        ({"defaults": {"max_tokens": 65}}, True, False),
        ({"defaults": {"stop": ["."]}}, True, False),
        ({"defaults": {"frequency_penalty": 0.5}}, True, False),
        ({"defaults": {"max_tokens": 64, "temperature": 1.5, "seed": 3, "logprobs": 2, "stop": []}}, False, False),
        ({"name": "u", "labels": ("yes",), "source": "file", "route": BestRoute(("c", "d"))}, False, False),
    ],
)
def test_the_fingerprint_of_a_prompt_changes_with_what_changes_scores(
    change: dict[str, Any], accuracy: bool, loss: bool
) -> None:
    task = Task("t", "Say: {input}", BestRoute(("a", "b")))
    for metric, changes in (("accuracy", accuracy), ("loss", loss)):
        assert (prompt_fingerprint(replace(task, **change), metric) != prompt_fingerprint(task, metric)) is changes
    stops = [replace(task, defaults={"stop": order}) for order in (["a", "b"], ["b", "a"])]
    assert prompt_fingerprint(stops[0], "chrf") == prompt_fingerprint(stops[1], "chrf")


def test_the_default_metric_is_accuracy_with_labels_and_chrf_without() -> None:
    assert default_metric(Task("t", "{input}", BestRoute(("a", "b")), labels=("a", "b"))) == "accuracy"
    assert default_metric(Task("t", "{input}", BestRoute(("a", "b")))) == default_metric(None) == "chrf"
