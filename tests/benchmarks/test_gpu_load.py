"""The cliff goes over its edge: more adapters than there is room for, and requests enough to ask for all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_load
from server.engine.slots import Room

COST = 80 << 20


def test_the_cliff_asks_for_more_than_is_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, Room, list[int], list[int]]] = []

    class Kept:
        def __init__(self, bench: Any, count: int) -> None:
            self.buffers, self.count = [None], count

    def run(bench: Any, kept: Kept, room: Room, warming: list[int], asked: list[int]) -> gpu_load.Run:
        runs.append((kept.count, room, warming, asked))
        return gpu_load.Run(100.0, 7)

    monkeypatch.setattr(gpu_load, "_Kept", Kept)
    monkeypatch.setattr(gpu_load, "_run", run)
    told: list[tuple[str, dict[str, Any]]] = []
    runner = SimpleNamespace(room=Room(20 << 30, lambda weights: COST))
    bench = SimpleNamespace(
        check=False, rows=32, runner=runner, tell=lambda name, value, **more: told.append((name, more))
    )
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
