"""The cliff goes over its edge: more adapters than there is room for, and requests enough to ask for all of them.

And what counts as served is what was answered whole.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.weights import LoraWeights, LowRank, Mix
from benchmarks import gpu_load
from server.engine.adapter_slots import AdapterMemory
from tests.server.engine.conftest import LateRunner
from tests.waiting import SECONDS

COST = 80 << 20


def test_the_cliff_asks_for_more_than_is_resident(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[tuple[int, AdapterMemory, list[int], list[int]]] = []

    class Kept:
        def __init__(self, bench: Any, count: int, kind: Any) -> None:
            self.buffers, self.count = [None], count

    def run(bench: Any, kept: Kept, room: AdapterMemory, warming: list[int], asked: list[int]) -> gpu_load.Run:
        runs.append((kept.count, room, warming, asked))
        return gpu_load.Run(100.0, 9, 7)

    monkeypatch.setattr(gpu_load, "_Kept", Kept)
    monkeypatch.setattr(gpu_load, "_run", run)
    told: list[tuple[str, dict[str, Any]]] = []
    runner = SimpleNamespace(room=AdapterMemory(20 << 30, lambda weights: COST))
    bench = SimpleNamespace(
        check=False, is_late=False, rows=32, kinds=[None], runner=runner, pictures=tmp_path,
        adapters=lambda kind: [None],
        tell=lambda name, value, **more: told.append((name, more)),
    )  # fmt: skip
    gpu_load.cliff(bench)

    resident = {room.nbytes // COST for _, room, _, _ in runs}
    assert resident == {gpu_load.RESIDENT}
    counts = [max(warming) + 1 for *_, warming, _ in runs]
    assert min(counts) < gpu_load.RESIDENT < max(counts) <= runs[0][0]
    for count, (_, _, warming, asked) in zip(counts, runs, strict=True):
        assert set(warming) == set(range(count)) and set(asked) <= set(range(count))
        assert len(asked) >= 3 * count and len(set(asked)) > 0.9 * count
    assert sum(len(warming) + len(asked) for *_, warming, asked in runs) < 1600, "so that it takes a minute"
    assert [more["evictions"] for _, more in told] == [7] * len(runs)
    drawn = tmp_path / "cliff.svg"
    assert drawn.read_text() == gpu_load.picture([(count, 100.0) for count in counts], gpu_load.RESIDENT)
    drawn.unlink()

    bench.is_late = True
    gpu_load.cliff(bench)
    assert len(runs) == len(counts), "what would come too late is left out"
    assert not drawn.exists()
    assert [more for _, more in told[len(runs) :]] == [{"met": False}], "and that is told"


class Kept:
    """Two adapters that are loaded as soon as they are asked for."""

    def __init__(self) -> None:
        ones = torch.ones(1, 4)
        self.digests = [f"{i:064x}" for i in range(2)]
        self.known = {d: LoraWeights(d[-4:], d, {"linear": LowRank(ones, ones.T, 1.0)}) for d in self.digests}

    def fetch(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        future: Future[tuple[LoraWeights, ...]] = Future()
        future.set_result(tuple(self.known[digest] for digest in mix.digests))
        return future


def bench_of(runner: LateRunner) -> Any:
    return SimpleNamespace(
        check=True, rows=2, runner=runner, made=True, blocks=64, config=SimpleNamespace(vocab_size=runner.vocab)
    )


def served(runner: LateRunner, warming: Sequence[int] = (0, 1), room: int = 2, bench: Any = None) -> gpu_load.Run:
    kept: Any = Kept()
    room_of = AdapterMemory(room, lambda weights: 1)
    return gpu_load._run(bench or bench_of(runner), kept, room_of, list(warming), [0, 1, 1, 0, 1])


def test_a_run_counts_the_tokens_that_came() -> None:
    run = served(LateRunner(20))
    assert run.rate > 0 and run.evictions == run.copies == 0


def test_a_run_counts_what_came_to_the_device() -> None:
    """Of the adapters that it asks for and that were not there."""
    run = served(LateRunner(20), warming=[0])
    assert run.copies == 1 and run.evictions == 0
    run = served(LateRunner(20), warming=[0], room=1)
    assert run.copies == run.evictions >= 1


def test_load_goes_there_and_back_and_says_what_stands_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is faster in the second half of the time makes no ratio."""
    counts: list[int] = []

    def run(bench: Any, kept: Any, room: AdapterMemory, warming: list[int], asked: list[int]) -> gpu_load.Run:
        counts.append(5 if max(asked) < 5 else 1000)
        return gpu_load.Run(100.0 * len(counts), 3, 2)

    monkeypatch.setattr(gpu_load, "_Kept", lambda bench, count, kind: SimpleNamespace(buffers=[None] * 16))
    monkeypatch.setattr(gpu_load, "_run", run)
    told: dict[str, Any] = {}
    bench = SimpleNamespace(
        check=False, is_late=False, rows=32, kinds=["a kind"], runner=SimpleNamespace(room=None),
        step_bytes=lambda rows, distinct, kind: 1 + distinct,
        tell=lambda name, value, *claim, **more: told.update({name: (value, *claim, more)}),
    )  # fmt: skip
    gpu_load.load(bench)
    assert counts == [5, 1000, 1000, 5]
    assert told["1000 adapters in RAM (copies of 16 buffers) against 5, a kind"][:3] == (1.0, 0.95, True)
    value, more = told["1000 adapters in RAM (copies of 16 buffers) of a kind, power law 0.6: tokens/s"]
    assert value == 250 and more["copies"] == 3 and more["evictions"] == 2 and 200 < more["distinct"] < 400
    assert told["5 adapters in RAM of a kind, power law 0.6: tokens/s"][1]["distinct"] == 5

    bench.is_late = True
    gpu_load.load(bench)
    assert counts[4:] == [5, 1000], "once each is enough where time is short"


def test_load_tells_each_run_as_it_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is cut off in the second leaves the first."""
    runs = iter([gpu_load.Run(123.4, 3, 2)])
    monkeypatch.setattr(gpu_load, "_Kept", lambda bench, count, kind: SimpleNamespace(buffers=[None] * 16))
    monkeypatch.setattr(gpu_load, "_run", lambda *_: next(runs))
    bench = SimpleNamespace(
        check=False, is_late=False, rows=32, kinds=["a kind"], runner=SimpleNamespace(room=None)
    )  # fmt: skip
    with pytest.raises(StopIteration):
        gpu_load.load(bench)
    assert capsys.readouterr().out == "  5 adapters in RAM of a kind: 123 tokens/s\n"


def test_a_run_whose_steps_fail_has_no_rate() -> None:
    """All its requests end at once, which is no throughput."""

    def fails(batch: Any) -> None:
        if len(runner.steps) > 6:
            raise RuntimeError("an illegal address")

    runner = LateRunner(20)
    runner.before = fails
    with pytest.raises(RuntimeError, match="an answer has ended by 'error'"):
        served(runner)


def test_a_run_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that never comes, say."""
    monkeypatch.setattr(gpu_load, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(Kept, "fetch", lambda self, mix: Future())
    runner = LateRunner(20)
    bench = bench_of(runner)
    with pytest.raises(RuntimeError, match="0 of 2 answers have come"):
        served(runner, bench=bench)
    assert bench.made


def test_a_step_that_hangs_keeps_others_from_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread is still in it, and it is one thread's at a time."""
    monkeypatch.setattr(gpu_load, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr("server.engine.engine.STUCK_SECONDS", 0.05)
    runner, goes_on = LateRunner(20), threading.Event()
    runner.before = lambda batch: goes_on.wait(SECONDS) and None
    bench = bench_of(runner)
    try:
        with pytest.raises(RuntimeError, match="0 of 2 answers have come"):
            served(runner, bench=bench)
        assert not bench.made
    finally:
        goes_on.set()
