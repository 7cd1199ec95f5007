"""What is recorded of calls of several answers, and of those that never ran."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.weights import Version
from server.engine.request import Delivery, Request, Sampling, TokenLogprob
from server.errors import DeadlineExceeded, InvalidRequest, NotFinite, NotReady, QueueFull, UnknownName
from server.metrics import RequestRecord
from server.tasks.admission import Admission
from server.tasks.definitions import FixedRoute, Task
from server.tasks.inference import Caller, Generation, Inference, Reply, request_record, samplings_per_choice, timings
from server.tasks.resolve import Target


def test_a_call_of_several_answers_lasts_from_its_first_to_its_last() -> None:
    """The second began first, the third never ran."""
    target, lease = SimpleNamespace(task=None, custom_mix=False), SimpleNamespace(versions=())
    generation: Any = Generation("g", target, lease, Caller(arrived=1.0), None)  # type: ignore[arg-type]
    times = (3.0, 5.0, 9.0, 4, 0.0), (2.0, 4.0, 8.0, 6, 0.25), (math.nan, math.nan, 7.0, 0, 0.0)
    for admitted, first, finished, tokens, load in times:
        request: Any = SimpleNamespace(
            prompt=(1, 2), output=[0] * tokens, submitted=1.5, admitted=admitted, first_token=first, finished=finished,
            load_seconds=load,
        )  # fmt: skip
        generation.replies.append(Reply(request))
    record = request_record(generation)
    assert (record.submitted, record.admitted, record.first_token, record.finished) == (1.0, 2.0, 4.0, 9.0)
    assert (record.prompt_tokens, record.generated_tokens, record.longest) == (4, 10, 6)
    assert timings(generation) == {
        "queue_ms": 750.0, "load_ms": 250.0, "ttft_ms": 3000.0, "total_ms": 8000.0, "tokens_per_second": 1.0,
    }  # fmt: skip


def test_what_never_came_was_waited_for_until_the_end() -> None:
    target, lease = SimpleNamespace(task=None, custom_mix=False), SimpleNamespace(versions=())
    for admitted, waited in ((math.nan, 5750.0), (2.0, 750.0)):
        generation: Any = Generation("g", target, lease, Caller(arrived=1.0), None)  # type: ignore[arg-type]
        request: Any = SimpleNamespace(
            prompt=(1, 2), output=[], submitted=1.5, admitted=admitted, first_token=math.nan, finished=7.0,
            load_seconds=0.25,
        )  # fmt: skip
        generation.replies.append(Reply(request))
        assert timings(generation) == {
            "queue_ms": waited, "load_ms": 250.0, "ttft_ms": 6000.0, "total_ms": 6000.0, "tokens_per_second": 0.0,
        }  # fmt: skip


def test_a_call_that_is_refused_at_the_door_leaves_its_place() -> None:
    refused: list[Any] = []

    def check_call(requests: int, tokens: int) -> None:
        raise QueueFull("full", retry_after=1.0)

    engine, metrics = SimpleNamespace(check_call=check_call), SimpleNamespace(record=refused.append)
    inference = Inference(engine, None, metrics, None, lambda error: 429)  # type: ignore[arg-type]
    inference.admission = Admission(per_key=1)
    target: Any = SimpleNamespace(task=None, choice=[("a", 1.0)], custom_mix=False)
    for _ in range(2):
        with pytest.raises(QueueFull, match="full"):
            inference.start(target, [[1]], [Sampling()], Caller("key"))
    assert [(ended.status, ended.adapters) for ended in refused] == [("429", ("a",))] * 2


class House:
    """An engine that does as it is told, leases that are counted, and what is recorded. One call at a time a key."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.out = 0
        self.records: list[RequestRecord] = []
        self.over: list[Generation] = []
        self.room = 99
        self.asked_for_room: list[Any] = []
        engine: Any = SimpleNamespace(
            check_call=lambda requests, tokens: None, submit=self._submit, cancel=self.cancelled.append
        )
        mailbox: Any = SimpleNamespace(post=lambda receiver, item: receiver(item))
        metrics: Any = SimpleNamespace(record=self.records.append)
        leases: Any = SimpleNamespace(lease=self.lease, check_room=self.asked_for_room.append)
        codes = {QueueFull: 429, NotFinite: 500, InvalidRequest: 400, DeadlineExceeded: 504, NotReady: 503}
        self.inference = Inference(engine, leases, metrics, mailbox, lambda error: codes[type(error)])
        self.inference.admission = Admission(per_key=1)
        self.inference.on_ended = self.over.append

    def lease(self, choice: Any) -> Any:
        def release() -> None:
            self.out -= 1

        self.out += 1
        versions = [(Version(name.partition("@")[0], name[0] * 64), weight) for name, weight in choice]
        mix = SimpleNamespace(digests=[version.digest for version, _ in versions])
        return SimpleNamespace(versions=versions, mix=mix, release=release, again=lambda: self.lease(choice))

    def _submit(self, request: Request) -> None:
        if len(self.submitted) >= self.room:
            raise QueueFull("full", retry_after=1.0)
        self.submitted.append(request)

    def start(
        self, prompts: int = 1, caller: Caller | None = None, target: Target | None = None, **more: Any
    ) -> Generation:
        target = target or Target(None, [("a", 1.0)])
        asked = [[i, i] for i in range(1, prompts + 1)]
        return self.inference.start(target, asked, [Sampling()] * prompts, caller or Caller("key"), **more)

    def end(self, index: int, reason: str = "length", error: Exception | None = None) -> None:
        request = self.submitted[index]
        request.output.append(7)
        request.deliver(Delivery("x", (7,), finish_reason=reason, error=error))


def test_a_call_that_is_refused_half_way_is_over_when_what_ran_of_it_is() -> None:
    house = House()
    house.room = 2
    with pytest.raises(QueueFull):
        house.start(3)
    assert house.cancelled == [request.id for request in house.submitted] and len(house.cancelled) == 2
    assert [record.status for record in house.records] == ["429"] and house.out == 1
    house.end(0, "cancelled")
    assert house.out == 1, "the other one still has it"
    with pytest.raises(QueueFull, match="in flight"):
        house.inference.check(Target(None, []), Caller("key"))
    house.end(1, "cancelled")
    assert (house.out, len(house.records), house.over, house.inference.live) == (0, 1, [], set())
    house.room = 99
    house.start()
    house.end(2)
    house.room = 0
    for _ in range(2):  # nothing of it ran: it has left at once
        with pytest.raises(QueueFull, match="full"):
            house.start()
    assert house.out == 0 and [record.status for record in house.records] == ["429", "200", "429", "429"]


def test_what_is_cut_short_is_what_clients_wait_for_and_nothing_begins_for_them_after_it() -> None:
    """A job's generations end with the job."""
    house, job = House(), Caller("key", client=False)
    house.start()
    house.start(caller=job)
    house.inference.abort_client_requests()
    assert house.cancelled == [house.submitted[0].id]
    with pytest.raises(NotReady, match="shutting down") as refused:
        house.start()
    assert refused.value.retry_after and len(house.submitted) == 2 and house.out == 2
    assert [record.status for record in house.records] == ["503"]
    house.start(caller=job)
    assert len(house.submitted) == 3


def test_each_sequence_is_asked_for_on_the_terms_of_its_call() -> None:
    house = House()
    caller = Caller("key", deadline=99.0, priority=3)
    own: Any = ["one", "two"]
    task = Task("mood", "{input}", FixedRoute())
    generation = house.start(2, caller, Target(task, [("a", 1.0), ("b", 0.5)]), scored=(1, 2), constraints=own)
    assert house.inference.live == {generation}
    for i, request in enumerate(house.submitted):
        assert (request.tenant, request.priority, request.deadline, request.fair_key) == ("key", 3, 99.0, "mood")
        assert (request.prompt, request.scored, request.constraint) == ((i + 1, i + 1), i + 1, own[i])
        request.check_fits()
        assert house.asked_for_room.pop() is request.mix
        assert request.mix is not None and list(request.mix.digests) == ["a" * 64, "b" * 64]
        house.end(i)
    assert not house.inference.live and house.over == [generation] and generation.status == "200"


def test_a_call_on_a_lease_that_its_caller_has_is_on_the_same() -> None:
    house = House()
    held = house.lease([("old", 1.0)])
    generation = house.start(target=Target(None, [("a", 1.0)], held=held))
    assert [version.name for version, _ in generation.versions] == ["old"] and house.out == 2
    house.end(0)
    assert house.out == 1 and house.records[0].adapters == ("old",)


@pytest.mark.parametrize("client", [True, False])
def test_what_is_recorded_of_a_call_is_what_became_of_it(client: bool) -> None:
    """The server's own calls, evaluations, are counted where they answered; they refuse nobody and keep no limit."""
    caller = Caller("key", client=client, arrived=1.0)
    deadline, full = DeadlineExceeded("late"), QueueFull("evicted")
    for reason, errors, status, count in (
        ("length", (None, None), "200", 1),
        ("cancelled", (None, None), "cancelled", client),
        ("error", (deadline, full), "504", client),
        ("error", (full, deadline), "429", client),
    ):
        house = House()
        if not client:
            house.inference.admission.enter("key", None)
        generation = house.start(2, caller, Target(None, [("a", 1.0), ("b", 0.0)], custom_mix=True))
        for i in range(2):
            house.submitted[i].submitted, house.submitted[i].finished = 5.0 + i, 7.0 + i
            house.end(i, reason, errors[i])
        retried = not client and full in errors
        assert generation.status == ("" if retried else status) and len(house.over) == (not retried)
        assert [record.status for record in house.records] == [status] * count and house.out == 0
        for record in house.records:
            assert (record.submitted, record.finished) == (1.0 if client else 5.0, 8.0)
            assert (record.latency, record.custom_mix, record.adapters) == (client, True, ("a",))
        if not client:
            with pytest.raises(QueueFull, match="in flight"):
                house.inference.check(Target(None, []), Caller("key"))


async def test_the_first_error_ends_what_else_runs_of_a_call() -> None:
    house = House()
    generation = house.start(3)
    house.end(0)
    house.end(1, "error", DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded):
        async for _ in generation.steps():
            pass
    assert house.cancelled == [house.submitted[2].id], "what has ended already has no need"


def test_numbers_that_overflow_are_the_adapters_or_else_the_servers_fault() -> None:
    for choice, expected in (([("a", 3.0), ("b", 0.0)], InvalidRequest), ([("b", 0.0)], NotFinite)):
        house = House()
        generation = house.start(target=Target(None, choice))
        house.end(0, "error", NotFinite("not finite"))
        [reply] = generation.replies
        assert type(reply.error) is expected and generation.status == ("400" if expected is InvalidRequest else "500")
        if expected is InvalidRequest:
            assert "overflow with a@" in str(reply.error) and "b@" not in str(reply.error)


def test_calls_that_never_ran_are_counted_by_names_that_there_are() -> None:
    house = House()
    house.inference._status_of = lambda error: 404 if isinstance(error, UnknownName) else 400
    known = Target(Task("mood", "{input}", FixedRoute()), [("a@012345", 1.0), ("a", 2.0), ("b", 0.0)], custom_mix=True)
    for target, error in ((known, InvalidRequest("x")), (known, UnknownName("x")), (None, InvalidRequest("x"))):
        house.inference.record_rejection(target, error, Caller())
    house.inference.record_disconnect(known, Caller())
    house.inference.record_rejection(known, InvalidRequest("x"), Caller(client=False))
    assert [(r.status, r.known, r.task, r.adapters, r.custom_mix) for r in house.records] == [
        ("400", True, "mood", ("a",), True),
        ("404", False, "mood", ("a",), True),
        ("400", False, None, (), False),
        ("cancelled", True, "mood", ("a",), True),
    ]


def test_answers_to_one_prompt_have_a_seed_each() -> None:
    seeds = [each.seed for each in samplings_per_choice(Sampling(seed=(1 << 63) - 1), 4)]
    assert seeds[0] == (1 << 63) - 1 and len(set(seeds)) == 4 and all(0 <= seed < 1 << 63 for seed in seeds)  # type: ignore[operator]
    assert seeds == [each.seed for each in samplings_per_choice(Sampling(seed=(1 << 63) - 1), 4)]
    assert (
        samplings_per_choice(Sampling(seed=5), 1) == [Sampling(seed=5)]
        and samplings_per_choice(Sampling(), 3) == [Sampling()] * 3
    )


def test_a_classification_says_the_label_of_the_largest_sum_however_small_all_are() -> None:
    generation = Generation.__new__(Generation)
    generation.labels, generation.answers = ("no", "yes"), 1
    generation.replies = [Reply(None, logprobs=[TokenLogprob(1, value)] * 2) for value in (-1000.0, -999.5)]  # type: ignore[arg-type]
    assert generation.answer_text() == "yes"
    assert generation.scores() == pytest.approx({"no": 1 / (1 + math.e), "yes": math.e / (1 + math.e)})
