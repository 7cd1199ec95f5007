"""Inference: what is submitted, when leases are released, and what is recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adapters.weights import Version
from server.engine.request import Delivery, Request, Sampling
from server.errors import DeadlineExceeded, InvalidRequest, NotFinite, NotReady, QueueFull, UnknownName
from server.metrics import RequestRecord
from server.tasks.admission import Admission
from server.tasks.definitions import FixedRoute, Task
from server.tasks.generation import Caller, Generation
from server.tasks.inference import Inference
from server.tasks.resolve import Target

STATUS = {QueueFull: 429, NotFinite: 500, InvalidRequest: 400, DeadlineExceeded: 504, NotReady: 503, UnknownName: 404}
CLIENT, JOB = Caller("key", arrived=1.0), Caller("key", client=False, arrived=1.0)
TASK = Task("mood", "{input}", FixedRoute())


class Bench:
    """Inference over an engine that keeps requests, with leases that are counted. Each key may run one call."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.leases = 0
        self.records: list[RequestRecord] = []
        self.ended: list[Generation] = []
        self.capacity = 99
        self.checked_mixes: list[Any] = []
        engine: Any = SimpleNamespace(check_call=self._check, submit=self._submit, cancel=self.cancelled.append)
        delivery: Any = SimpleNamespace(post=lambda receiver, item: receiver(item))
        metrics: Any = SimpleNamespace(record=self.records.append)
        leases: Any = SimpleNamespace(lease=self.lease, check_room=self.checked_mixes.append)
        self.inference = Inference(engine, leases, metrics, delivery, lambda error: STATUS[type(error)])
        self.inference.admission = Admission(per_key=1)
        self.inference.on_ended = self.ended.append

    def lease(self, choice: Any) -> Any:
        def release() -> None:
            self.leases -= 1

        self.leases += 1
        versions = [(Version(name.partition("@")[0], name[0] * 64), weight) for name, weight in choice]
        mix = SimpleNamespace(digests=[version.digest for version, _ in versions])
        return SimpleNamespace(versions=versions, mix=mix, release=release, clone=lambda: self.lease(choice))

    def _check(self, requests: int, tokens: int) -> None:
        if self.capacity < 0:
            raise QueueFull("full", retry_after=1.0)

    def _submit(self, request: Request) -> None:
        if len(self.submitted) >= self.capacity:
            raise QueueFull("full", retry_after=1.0)
        self.submitted.append(request)

    def start(
        self, sequences: int = 1, caller: Caller = CLIENT, target: Target | None = None, **options: Any
    ) -> Generation:
        target = target or Target(None, [("a", 1.0)])
        prompts = [[i, i] for i in range(1, sequences + 1)]
        return self.inference.start(target, prompts, [Sampling()] * sequences, caller, **options)

    def end(self, index: int, reason: str = "length", error: Exception | None = None) -> None:
        request = self.submitted[index]
        request.output.append(7)
        request.deliver(Delivery("x", (7,), finish_reason=reason, error=error))

    @property
    def statuses(self) -> list[str]:
        return [record.status for record in self.records]

    def key_is_busy(self) -> bool:
        try:
            self.inference.check(Target(None, [], held=self.lease([])), CLIENT)
        except QueueFull:
            return True
        finally:
            self.leases -= 1
        return False


def test_a_call_that_the_engine_refuses_leaves_its_place() -> None:
    bench = Bench()
    bench.capacity = -1
    for _ in range(2):
        with pytest.raises(QueueFull, match="full"):
            bench.start()
    assert [(record.status, record.adapters) for record in bench.records] == [("429", ("a",))] * 2


def test_a_call_refused_after_some_sequences_ends_when_those_have_ended() -> None:
    bench = Bench()
    bench.capacity = 2
    with pytest.raises(QueueFull):
        bench.start(3)
    assert bench.cancelled == [request.id for request in bench.submitted] and len(bench.cancelled) == 2
    bench.end(0, "cancelled")
    assert bench.leases == 1 and bench.key_is_busy() and bench.statuses == ["429"]
    bench.end(1, "cancelled")
    assert (bench.leases, bench.statuses, bench.ended, bench.inference.live) == (0, ["429"], [], set())
    bench.capacity = 0
    for _ in range(2):
        with pytest.raises(QueueFull, match="full"):
            bench.start()
    assert bench.leases == 0 and not bench.key_is_busy() and bench.statuses == ["429"] * 3


def test_requests_of_clients_are_aborted_and_those_of_jobs_go_on() -> None:
    bench = Bench()
    bench.start()
    bench.start(caller=JOB)
    bench.inference.abort_client_requests()
    assert bench.cancelled == [bench.submitted[0].id]
    with pytest.raises(NotReady, match="shutting down") as error:
        bench.start()
    assert error.value.retry_after and bench.leases == 2 and bench.statuses == ["503"]
    bench.start(caller=JOB)
    assert len(bench.submitted) == 3


def test_every_sequence_has_the_terms_of_its_call() -> None:
    bench = Bench()
    caller, constraints = Caller("key", deadline=99.0, priority=3), ["one", "two"]
    target = Target(TASK, [("a", 1.0), ("b", 0.5)])
    generation = bench.start(2, caller, target, scored=(1, 2), constraints=constraints)
    assert bench.inference.live == {generation}
    for i, request in enumerate(bench.submitted):
        assert (request.tenant, request.priority, request.deadline, request.fair_key) == ("key", 3, 99.0, "mood")
        assert (request.prompt, request.scored, request.constraint) == ((i + 1, i + 1), i + 1, constraints[i])
        request.check_fits()
        assert bench.checked_mixes.pop() is request.mix
        assert request.mix is not None and list(request.mix.digests) == ["a" * 64, "b" * 64]
        bench.end(i)
    assert not bench.inference.live and bench.ended == [generation] and generation.status == "200"


@pytest.mark.parametrize(
    ("target", "fair_key"),
    [
        (Target(TASK, [("a", 1.0)], custom_mix=True), "mood"),
        (Target(None, [("a", 1.0)], custom_mix=True), "mixes of key"),
        (Target(None, [("a", 1.0), ("b", 1.0)]), f"{'a' * 64}+{'b' * 64}"),
    ],
)
def test_the_queue_is_fair_between_tasks_mixes_and_tenants(target: Target, fair_key: str) -> None:
    bench = Bench()
    bench.start(target=target)
    assert bench.submitted[0].fair_key == fair_key


def test_a_lease_of_the_caller_decides_the_versions() -> None:
    bench = Bench()
    held = bench.lease([("old", 1.0)])
    generation = bench.start(target=Target(None, [("a", 1.0)], held=held))
    assert [version.name for version, _ in generation.versions] == ["old"] and bench.leases == 2
    bench.end(0)
    assert bench.leases == 1 and bench.records[0].adapters == ("old",)


LATE, FULL = DeadlineExceeded("late"), QueueFull("displaced")


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize(
    ("reason", "errors", "status"),
    [
        ("length", (None, None), "200"),
        ("cancelled", (None, None), "cancelled"),
        ("error", (LATE, FULL), "504"),
        ("error", (FULL, LATE), "429"),
    ],
)
def test_the_end_of_a_call_is_recorded(client: bool, reason: str, errors: Any, status: str) -> None:
    """Calls of jobs are recorded if they succeed; one that was displaced is tried again. They have no limit."""
    bench = Bench()
    if not client:
        bench.inference.admission.enter("key", None)
    target = Target(None, [("a", 1.0), ("b", 0.0)], custom_mix=True)
    generation = bench.start(2, CLIENT if client else JOB, target)
    for i in range(2):
        bench.submitted[i].submitted, bench.submitted[i].finished = 5.0 + i, 7.0 + i
        bench.end(i, reason, errors[i])
    retried = not client and FULL in errors
    assert generation.status == ("" if retried else status) and len(bench.ended) == (not retried)
    assert bench.statuses == ([status] if client or status == "200" else []) and bench.leases == 0
    for record in bench.records:
        assert (record.submitted, record.finished) == (1.0 if client else 5.0, 8.0)
        assert (record.latency, record.custom_mix, record.adapters) == (client, True, ("a",))
    assert bench.key_is_busy() is not client


async def test_the_first_error_cancels_the_other_sequences() -> None:
    bench = Bench()
    generation = bench.start(3)
    bench.end(0)
    bench.end(1, "error", DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded):
        async for _ in generation.steps():
            pass
    assert bench.cancelled == [bench.submitted[2].id]


@pytest.mark.parametrize(
    ("choice", "expected", "status"),
    [([("a", 3.0), ("b", 0.0)], InvalidRequest, "400"), ([("b", 0.0)], NotFinite, "500")],
)
def test_an_overflow_is_the_fault_of_the_adapters_if_there_are_any(choice: Any, expected: type, status: str) -> None:
    bench = Bench()
    generation = bench.start(target=Target(None, choice))
    bench.end(0, "error", NotFinite("not finite"))
    [reply] = generation.replies
    assert type(reply.error) is expected and generation.status == status
    if status == "400":
        assert "overflow with a@" in str(reply.error) and "b@" not in str(reply.error)


def test_calls_that_never_ran_are_recorded_without_unknown_names() -> None:
    bench = Bench()
    known = Target(TASK, [("a@012345", 1.0), ("a", 2.0), ("b", 0.0)], custom_mix=True)
    for target, error in ((known, InvalidRequest("x")), (known, UnknownName("x")), (None, InvalidRequest("x"))):
        bench.inference.record_rejection(target, error, CLIENT)
    bench.inference.record_disconnect(known, CLIENT)
    bench.inference.record_rejection(known, InvalidRequest("x"), JOB)
    assert [(r.status, r.known, r.task, r.adapters, r.custom_mix) for r in bench.records] == [
        ("400", True, "mood", ("a",), True),
        ("404", False, "mood", ("a",), True),
        ("400", False, None, (), False),
        ("cancelled", True, "mood", ("a",), True),
    ]
