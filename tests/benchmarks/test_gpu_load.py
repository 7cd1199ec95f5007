"""The cliff goes over its edge: more adapters than there is room for, and requests enough to ask for all of them.

And what counts as served is what was answered whole.
"""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.weights import LoraWeights, LowRank, Mix
from benchmarks import gpu_load
from server.engine.slots import Room
from tests.server.engine.conftest import LateRunner

COST = 80 << 20


def test_the_cliff_asks_for_more_than_is_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, Room, list[int], list[int]]] = []

    class Kept:
        def __init__(self, bench: Any, count: int, kind: Any) -> None:
            self.buffers, self.count = [None], count

    def run(bench: Any, kept: Kept, room: Room, warming: list[int], asked: list[int]) -> gpu_load.Run:
        runs.append((kept.count, room, warming, asked))
        return gpu_load.Run(100.0, 7)

    monkeypatch.setattr(gpu_load, "_Kept", Kept)
    monkeypatch.setattr(gpu_load, "_run", run)
    told: list[tuple[str, dict[str, Any]]] = []
    runner = SimpleNamespace(room=Room(20 << 30, lambda weights: COST))
    bench = SimpleNamespace(
        check=False, is_late=False, rows=32, kinds=[None], runner=runner,
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
    assert sum(len(warming) + len(asked) for *_, warming, asked in runs) < 2500, "so that it takes a minute or two"
    assert [more["evictions"] for _, more in told] == [7] * len(runs)

    bench.is_late = True
    gpu_load.cliff(bench)
    assert len(runs) == len(counts), "what would come too late is left out"
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


def served(runner: LateRunner) -> gpu_load.Run:
    bench: Any = SimpleNamespace(
        check=True, rows=2, runner=runner, blocks=64, config=SimpleNamespace(vocab_size=runner.vocab)
    )
    kept: Any = Kept()
    return gpu_load._run(bench, kept, Room(2, lambda weights: 1), [0, 1], [0, 1, 1, 0, 1])


def test_a_run_counts_the_tokens_that_came() -> None:
    run = served(LateRunner(20))
    assert run.rate > 0 and run.evictions == 0


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
    with pytest.raises(RuntimeError, match="0 of 2 answers have come"):
        served(LateRunner(20))
