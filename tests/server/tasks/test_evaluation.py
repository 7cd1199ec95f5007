"""Evaluation through a real engine over the tiny base: what it measures, in which order, and how it ends."""

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
    Score,
    check_metrics,
    default_metric,
    difference,
    evaluate,
    example_ids,
    pairs,
    prompt_fingerprint,
)
from tests.waiting import until

TASK = {"prompt": "Say: {input}", "format": "chat", "defaults": {"max_tokens": 5, "temperature": 1.5, "logprobs": 2}}
EXAMPLES = [Pair(i + 1, f"text {i} " + "and " * (i % 5), ("yes", "no", "in the end")[i % 3]) for i in range(23)]


@pytest_asyncio.fixture
async def parts(tmp_path: Path, tiny_base: Base, tiny_adapter: Callable[..., LoraWeights]) -> AsyncIterator[Services]:
    settings = Settings(state_dir=tmp_path, library=None, kv_cache=8 << 20, threads=1, adapter_ram=64 << 20)
    house = build(settings, tiny_base, Metrics(), EventLoopDelivery(asyncio.get_running_loop()))
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / "made" / name
        folder.mkdir(parents=True)
        save(tiny_adapter(seed), folder)
        house.services.registry.publish_now(name, folder, source="file")
    house.services.tasks.put("say", {**TASK, "route": {"choice": [{"name": "a"}, {"name": "b", "weight": -0.5}]}})
    yield house.services
    await asyncio.to_thread(house.close, 0.0)


async def measured(parts: Services, *metrics: str, override: Any = None, **more: Any) -> Any:
    target = parts.resolver.task("say", override)
    return await evaluate(parts.inference, parts.prompts, target, EXAMPLES, metrics, **more)


async def test_answers_are_greedy_in_order_and_scored_as_the_metric_says(parts: Services) -> None:
    told: list[tuple[int, int]] = []
    found = await measured(parts, "chrf", "accuracy", "chrf", tell=lambda done, total: told.append((done, total)))
    assert set(found.scores) == {"chrf", "accuracy"} and len(found.answers) == len(EXAMPLES)
    assert [v.name for v, _ in found.versions] == ["a", "b"] and [w for _, w in found.versions] == [1.0, -0.5]
    assert told == [(i, len(EXAMPLES)) for i in range(len(EXAMPLES) + 1)]
    references = [e.output for e in EXAMPLES]
    chrf = scores.CORPUS["chrf"]
    assert found.scores["chrf"].value == chrf.score(scores.sums(map(chrf.count, found.answers, references)))
    assert all(0 <= value <= 1 for score in found.scores.values() for value in score.values)
    alone = await measured(parts, "accuracy", in_flight=1)
    assert alone.answers == found.answers, "the same whatever is in the batch"
    assert found.prompt_tokens == alone.prompt_tokens > 0 and found.completion_tokens > len(EXAMPLES)


async def test_the_loss_is_the_trainers(parts: Services, tiny_base: Base) -> None:
    found = (await measured(parts, "loss", override=[])).scores["loss"]
    encode = encoder(ModelTokenizer(tiny_base.vocabulary), Template.of(TASK), 1000)
    tokens = data.tokenize(EXAMPLES, encode, 1000)
    expected, _ = training.evaluate_loss(TrainableModel(tiny_base, "float32"), tokens)
    assert found.value == pytest.approx(expected, rel=1e-4)
    counts = [example.targets for example in tokens.examples]
    weighted = sum(v * n for v, n in zip(found.values, counts, strict=True)) / sum(counts)
    assert weighted == pytest.approx(found.value) and found.lower_is_better


async def test_a_mix_of_its_own_and_a_pair_on_the_same_examples(parts: Services) -> None:
    one = (await measured(parts, "loss", override=[("a", 1.0)])).scores["loss"]
    two = (await measured(parts, "loss", override=[("b", 1.0)])).scores["loss"]
    assert one.values != two.values
    found = difference(one, two)
    assert found.low < found.mean < found.high
    assert found.mean == one.value - two.value
    same = difference(one, one)
    assert (same.low, same.mean, same.high) == (0.0, 0.0, 0.0)
    assert math.isinf(difference(Score("loss", 1, (1.0,)), Score("loss", 1, (2.0,))).high)


@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (31, 2.042), (1001, 1.962)]
)
def test_few_examples_make_a_difference_less_certain(count: int, t: float) -> None:
    """By a table of Student's t for 95 %."""
    ours = [float(i % 2) for i in range(count)]
    found = difference(Score("loss", statistics.mean(ours), tuple(ours)), Score("loss", 0.0, (0.0,) * count))
    error = statistics.stdev(ours) / math.sqrt(count)
    assert (found.high - found.mean) / error == pytest.approx(t, rel=0.01)
    assert (found.mean - found.low) / error == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize(("count", "one", "other"), [(5, 0.9, 0.9), (10, 0.95, 0.85), (20, 0.9, 0.8), (60, 0.95, 0.9)])
def test_few_hits_are_no_certainty(count: int, one: float, other: float) -> None:
    """The interval holds the true difference in at least 95 % of all outcomes, each counted by its chance."""
    win, loss = one * (1 - other), other * (1 - one)
    held = 0.0
    for wins in range(count + 1):
        for losses in range(count + 1 - wins):
            ways = math.comb(count, wins) * math.comb(count - wins, losses)
            chance = ways * win**wins * loss**losses * (1 - win - loss) ** (count - wins - losses)
            ours = Score("accuracy", wins / count, (1.0,) * wins + (0.0,) * (count - wins))
            theirs = Score("accuracy", losses / count, (0.0,) * (count - losses) + (1.0,) * losses)
            told = difference(ours, theirs)
            held += chance * (told.low <= one - other <= told.high)
    assert held >= 0.95


async def test_a_difference_has_the_unit_of_its_metric_and_the_sign_of_the_scores(parts: Services) -> None:
    said = (await measured(parts, "accuracy", override=[])).answers
    examples = [Pair(one.line, one.input, f"{answer} .") for one, answer in zip(EXAMPLES, said, strict=True)]
    metrics = ("bleu", "chrf", "loss", "rougeL")
    ours, theirs = [
        await evaluate(parts.inference, parts.prompts, parts.resolver.task("say", mix), examples, metrics)
        for mix in ([], None)
    ]
    assert ours.scores["bleu"].value > theirs.scores["bleu"].value + 1
    for metric, one in ours.scores.items():
        found = difference(one, theirs.scores[metric])
        assert found.mean == one.value - theirs.scores[metric].value, metric
        assert found.low <= found.mean <= found.high, metric
        assert len(one.parts) == (0 if metric == "rougeL" else len(EXAMPLES))


async def test_what_is_deleted_meanwhile_is_evaluated_to_its_end(parts: Services) -> None:
    expected = await measured(parts, "accuracy", override=[("a", 1.0)])
    parts.tasks.put("say", {**TASK, "route": {"choice": []}})

    def delete(done: int, total: int) -> None:
        if done == 3:
            parts.registry.retire_now("a")

    found = await measured(parts, "accuracy", override=[("a", 1.0)], in_flight=2, tell=delete)
    assert found.answers == expected.answers and found.versions == expected.versions
    assert parts.registry.names() == ["b"] and not parts.registry.memory()["leases"]


async def test_cancelling_stops_everything_and_gives_the_leases_back(parts: Services) -> None:
    begun = asyncio.Event()
    job = asyncio.create_task(measured(parts, "accuracy", in_flight=3, tell=lambda done, total: done and begun.set()))
    await begun.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await asyncio.to_thread(until, lambda: not parts.inference.live and not parts.registry.memory()["leases"])


async def test_an_example_that_does_not_fit_is_named_by_its_line(
    parts: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*EXAMPLES, Pair(99, "x " * 400, "yes")]
    target = parts.resolver.task("say", None)
    asked: list[Any] = []
    monkeypatch.setattr(parts.inference.engine, "submit", asked.append)
    for metric in ("accuracy", "loss"):
        with pytest.raises(InvalidRequest, match="line 99: .*context"):
            await evaluate(parts.inference, parts.prompts, target, long, [metric])
    assert not asked, "the others are not answered for nothing"
    with pytest.raises(InvalidRequest, match="no examples"):
        await evaluate(parts.inference, parts.prompts, target, [], ["accuracy"])


async def test_expected_answers_that_no_answer_can_reach_are_counted(parts: Services) -> None:
    """The task's answers have five tokens, of which each stands for a letter here."""
    outputs = ("vwxyz", "vwxyzv", "z", "vwxyz" * 2000)
    examples = [Pair(i + 1, "text", output) for i, output in enumerate(outputs)]

    async def reached(metric: str) -> int:
        target = parts.resolver.task("say", [])
        return (await evaluate(parts.inference, parts.prompts, target, examples[:3], [metric])).out_of_reach

    assert await reached("chrf") == 1 and await reached("loss") == 0, "the loss has no answers"
    assert [await parts.prompts.is_longer(output, 5) for output in outputs] == [False, True, False, True]
    assert not await parts.prompts.is_longer(outputs[-1], 10_000) and await parts.prompts.is_longer(outputs[-1], 9_999)


async def test_a_metric_that_says_nothing_of_the_examples_is_refused(
    parts: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perfect answers and others would be equals at 0."""

    def asked(request: Any) -> None:
        raise RuntimeError("an example is answered for nothing")

    monkeypatch.setattr(parts.inference.engine, "submit", asked)
    for metric, output in (("bleu", "in the end"), ("rougeL", "да")):
        examples = [Pair(1, "x", output)]
        with pytest.raises(InvalidRequest, match=f"^{metric} looks at .*; take chrf") as refused:
            await evaluate(parts.inference, parts.prompts, parts.resolver.task("say", []), examples, ["chrf", metric])
        assert refused.value.param == "metric"


async def test_a_full_queue_is_waited_for_and_is_no_failed_request(parts: Services) -> None:
    submit, refused = parts.inference.engine.submit, []

    def full(request: Any) -> None:
        if len(refused) < 5:
            refused.append(request.id)
            raise QueueFull("full", retry_after=0.01)
        submit(request)

    parts.inference.engine.submit = full  # type: ignore[method-assign]
    found = await measured(parts, "exact_match")
    assert len(refused) == 5 and len(found.answers) == len(EXAMPLES)


async def test_an_example_that_was_displaced_is_tried_again_and_is_no_failed_request(parts: Services) -> None:
    submit, displaced, recorded = parts.inference.engine.submit, [], []
    parts.inference.on_ended = lambda generation: recorded.append(generation.status)

    def make_room(request: Any) -> None:
        if len(displaced) < 5:
            displaced.append(request.id)
            request.deliver(Delivery(finish_reason="error", error=QueueFull("full", retry_after=0.01)))
        else:
            submit(request)

    parts.inference.engine.submit = make_room  # type: ignore[method-assign]
    found = await measured(parts, "exact_match")
    assert len(displaced) == 5 and len(found.answers) == len(EXAMPLES)
    assert recorded == ["200"] * len(EXAMPLES)
    assert not parts.inference.live and not parts.registry.memory()["leases"]


async def test_a_request_can_ask_whether_its_mix_still_fits(parts: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, asked = parts.inference.engine.submit, []

    def look(request: Any) -> None:
        asked.append(request)
        submit(request)

    parts.inference.engine.submit = look  # type: ignore[method-assign]
    await measured(parts, "exact_match")
    asked[0].check_fits()
    assert not parts.registry.memory()["leases"]
    room = parts.registry._ram.size(asked[0].mix.digests[0])
    monkeypatch.setattr(parts.registry._ram, "capacity", room)
    with pytest.raises(NoRoom, match="the mix takes"):
        asked[0].check_fits()


def test_metrics_and_records_are_checked() -> None:
    assert check_metrics(["bleu", "loss", "bleu"]) == ("bleu", "loss")
    with pytest.raises(InvalidRequest, match="no metric"):
        check_metrics(["perplexity"])
    with pytest.raises(InvalidRequest, match="needed"):
        check_metrics([])
    with pytest.raises(InvalidRequest, match="line 2: .*'input'"):
        pairs([Pair(1, "a", "b"), Completion(2, "a", "b")])
    longest = Pair(1, "a", "b" * 100_000)
    assert pairs([longest]) == [longest]
    with pytest.raises(InvalidRequest, match="^line 2: 100,001 characters of 'output' are over the limit of 100,000"):
        pairs([longest, Pair(2, "a", "b" * 100_001)])


def test_what_single_answers_are_worth() -> None:
    for metric, text in ("bleu", "two words"), ("chrf", "abc"):
        corpus = scores.CORPUS[metric]
        assert corpus.single(corpus.count(text, text)) == pytest.approx(1.0)
    assert scores.MEAN["rougeL"]("a b", "a c") == pytest.approx(0.5)
    assert scores.MEAN["accuracy"](" YES", "yes") == 1.0


async def test_scores_are_computed_off_the_loop(parts: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is held up for seconds answers nobody."""
    where: list[threading.Thread] = []
    count = scores.CORPUS["chrf"].count

    def counted(answer: str, reference: str) -> Any:
        where.append(threading.current_thread())
        return count(answer, reference)

    monkeypatch.setitem(scores.CORPUS, "chrf", replace(scores.CORPUS["chrf"], count=counted))
    await measured(parts, "chrf")
    assert len(where) >= len(EXAMPLES) and threading.current_thread() not in where


async def test_scores_that_nobody_wants_any_more_are_computed_no_further(
    parts: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, scored = asyncio.get_running_loop(), []

    def cancel(answer: str, reference: str) -> float:
        scored.append(answer)
        loop.call_soon_threadsafe(job.cancel)
        return 1.0

    monkeypatch.setattr("server.tasks.evaluation.SCORED_AT_A_TIME", 2)
    monkeypatch.setitem(scores.MEAN, "exact_match", cancel)
    job = asyncio.create_task(measured(parts, "exact_match"))
    with pytest.raises(asyncio.CancelledError):
        await job
    await asyncio.sleep(0.05)  # of the thread that computed
    assert len(scored) <= 2 < len(EXAMPLES)


async def test_the_loss_alone_has_no_answers(parts: Services) -> None:
    assert (await measured(parts, "loss")).answers == ()


async def test_a_full_queue_is_tried_again_within_a_second(parts: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, sleep, slept = parts.inference.engine.submit, asyncio.sleep, []
    waits = iter([None, 0.25, 30.0])

    def full(request: Any) -> None:
        for wait in waits:
            raise QueueFull("full", retry_after=wait)
        submit(request)

    async def slept_for(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    parts.inference.engine.submit = full  # type: ignore[method-assign]
    monkeypatch.setattr(asyncio, "sleep", slept_for)
    await measured(parts, "exact_match", in_flight=1)
    assert [seconds for seconds in slept if seconds] == [1.0, 0.25, 1.0]


def test_an_example_is_the_same_in_any_file_and_a_line_that_is_there_twice_is_two() -> None:
    found = example_ids([Pair(1, "a", "b"), Pair(2, "a", "b"), Pair(3, "a", "b"), Pair(4, "a", "c")])
    assert len(set(found)) == 4
    assert example_ids([Pair(9, "a", "c"), Pair(10, "a", "b")]) == [found[3], found[0]]


@pytest.mark.parametrize(
    ("other", "of_loss"),
    [
        ({"prompt": "Say: {input} "}, True),
        ({"format": "chat"}, True),
        ({"format": "chat", "system": "Be brief."}, True),
        ({"defaults": {"max_tokens": 65}}, False),
        ({"defaults": {"stop": ["."]}}, False),
        ({"defaults": {"frequency_penalty": 0.5}}, False),
    ],
)
def test_what_a_task_asks_with_is_what_its_scores_hang_on(other: dict[str, Any], of_loss: bool) -> None:
    task = Task("t", "Say: {input}", BestRoute(("a", "b")))
    assert prompt_fingerprint(replace(task, **other), "accuracy") != prompt_fingerprint(task, "accuracy")
    assert (prompt_fingerprint(replace(task, **other), "loss") != prompt_fingerprint(task, "loss")) == of_loss


def test_what_makes_no_other_answer_is_no_other_question() -> None:
    task = Task("t", "Say: {input}", BestRoute(("a", "b")))
    usual = {"max_tokens": 64, "temperature": 1.5, "top_p": 0.5, "seed": 3, "logprobs": 2, "stop": []}
    alike = Task("u", "Say: {input}", BestRoute(("c", "d")), labels=("yes", "no"), defaults=usual, source="file")
    for stops in ({"stop": ["a", "b"]}, {"stop": ["b", "a"]}):
        assert prompt_fingerprint(replace(task, defaults=stops), "chrf") == prompt_fingerprint(
            replace(task, defaults={"stop": ["a", "b"]}), "chrf"
        )
    assert prompt_fingerprint(alike, "chrf") == prompt_fingerprint(task, "chrf") == prompt_fingerprint(task, "accuracy")


def test_without_a_metric_it_is_accuracy_where_there_are_labels() -> None:
    assert default_metric(Task("t", "{input}", BestRoute(("a", "b")), labels=("a", "b"))) == "accuracy"
    assert default_metric(Task("t", "{input}", BestRoute(("a", "b")))) == default_metric(None) == "chrf"


async def test_an_example_is_answered_as_its_task_says(parts: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, asked = parts.inference.engine.submit, []

    def look(request: Any) -> None:
        asked.append(request)
        submit(request)

    monkeypatch.setattr(parts.inference.engine, "submit", look)
    await measured(parts, "accuracy")
    assert {request.sampling.max_tokens for request in asked} == {5}
    assert {(request.sampling.temperature, request.sampling.logprobs) for request in asked} == {(0.0, None)}
    assert {(request.tenant, request.priority) for request in asked} == {("", PRIORITY)}


async def test_what_an_example_fails_at_is_told_with_its_line(parts: Services) -> None:
    submit, failed = parts.inference.engine.submit, []

    def overflow(request: Any) -> None:
        if failed:
            submit(request)
        else:
            failed.append(request)
            request.deliver(Delivery(finish_reason="error", error=InvalidRequest("the numbers overflow", "adapters")))

    parts.inference.engine.submit = overflow  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match="line 1: the numbers overflow") as caught:
        await measured(parts, "exact_match")
    assert caught.value.param == "adapters"


async def test_cancelling_takes_what_runs_out_of_the_engine(parts: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.tasks.put("say", {**TASK, "defaults": {"max_tokens": 100}, "route": {"choice": []}})
    submit, cancel, submitted, cancelled = parts.inference.engine.submit, parts.inference.engine.cancel, [], []

    def look(request: Any) -> None:
        submit(request)
        submitted.append(request.id)
        if len(submitted) == 3:
            job.cancel()

    def cancel_too(id: str) -> None:
        cancelled.append(id)
        cancel(id)

    monkeypatch.setattr(parts.inference.engine, "submit", look)
    monkeypatch.setattr(parts.inference.engine, "cancel", cancel_too)
    job = asyncio.create_task(measured(parts, "accuracy", in_flight=3))
    with pytest.raises(asyncio.CancelledError):
        await job
    assert len(submitted) == 3 and set(submitted) <= set(cancelled)
