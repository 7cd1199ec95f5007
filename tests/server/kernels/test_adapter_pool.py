"""`AdapterPool`: allocation, splitting and compaction, and the events that order copies and steps."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from adapters.weights import LoraWeights
from server.engine.backends.cuda import adapter_pool
from server.engine.backends.cuda.adapter_pool import AdapterPool
from server.errors import NoCapacity
from server.kernels.cuda import Cuda
from tests.server.kernels.tiny import adapter, lies_in, llama, uncut

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CONFIG = llama(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
)  # fmt: skip


def prepared(rank: int, *targets: str, scheme: str = "int4") -> LoraWeights:
    return Cuda(FLOAT).prepare(adapter(CONFIG, rank, rank, targets), scheme)


def size_of(weights: LoraWeights) -> int:
    """In elements of the pool."""
    return int(weights.layout.flat.numel())  # type: ignore[attr-defined]


def bytes_of(weights: LoraWeights) -> int:
    return size_of(weights) * weights.layout.flat.element_size()  # type: ignore[attr-defined]


def count_compactions(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows by one with every compaction."""
    calls: list[None] = []
    compact = pool._compact
    monkeypatch.setattr(pool, "_compact", lambda: calls.append(None) or compact())
    return calls


@pytest.mark.parametrize(("scheme", "piece"), [("int4", 100), ("none", 8 << 20)])
def test_adapters_that_must_not_be_split_fit_to_the_byte(
    scheme: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_pool, "PIECE", piece)
    weights = {rank: uncut(prepared(rank, "q_proj", scheme=scheme)) for rank in (1, 2, 3, 4)}
    pool = AdapterPool(CONFIG, sum(bytes_of(weights[r]) for r in (1, 2, 3)), 6, DEVICE, FLOAT, scheme != "none")
    compactions = count_compactions(pool, monkeypatch)
    for slot, rank in ((0, 1), (1, 2), (2, 3)):
        pool.load_adapter(slot, weights[rank])
    with pytest.raises(NoCapacity, match="adapter-device-memory"):
        pool.load_adapter(3, weights[1])
    pool.unload_adapter(0)
    pool.unload_adapter(2)

    def no_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(pool, "_pinned", no_memory)
        pool.load_adapter(4, weights[4])
    pool.load_adapter(4, weights[4])  # fits both gaps together, but neither alone
    assert len(compactions) == 2  # the first one failed
    pool.wait_for_copies(range(6))
    assert lies_in(pool, 1, weights[2]) and lies_in(pool, 4, weights[4])
    with pytest.raises(ValueError, match="was not prepared"):
        pool.load_adapter(5, adapter(CONFIG, 9, 1))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "none"])
def test_random_loads_and_unloads_keep_every_adapter_intact(
    scheme: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are split, or the pool is compacted if they must not be. Free and used ranges cover the pool."""
    rng = random.Random(7)
    weights = [prepared(rank, scheme=scheme) for rank in (1, 2, 3, 5, 8, 13)]
    if not split:
        weights = [uncut(each) for each in weights]
    sizes = list(map(size_of, weights))
    pool = AdapterPool(CONFIG, 3 * bytes_of(weights[-1]), 16, DEVICE, FLOAT, scheme != "none")
    compactions = count_compactions(pool, monkeypatch)
    loaded: dict[int, int] = {}
    parts = refused = 0
    for _ in range(120):
        slot, kind = rng.randrange(16), rng.randrange(len(weights))
        loaded.pop(slot, None)
        if sum(sizes[k] for k in loaded.values()) + sizes[kind] > 3 * sizes[-1]:
            refused += 1
            with pytest.raises(NoCapacity, match="adapter-device-memory"):
                pool.load_adapter(slot, weights[kind])
        else:
            pool.load_adapter(slot, weights[kind])
            loaded[slot] = kind
            parts = max(parts, len(pool._parts[slot]))
        pool.wait_for_copies(range(16))
        assert sorted(pool._parts) == sorted(loaded)
        ranges = sorted([*pool._free, *((p.start, p.length) for each in pool._parts.values() for p in each)])
        assert [start for start, _ in ranges] == [0, *accumulate(length for _, length in ranges)][:-1]
        assert sum(ranges[-1]) == pool._size and all(length for _, length in ranges)
        assert all(lies_in(pool, slot, weights[kind]) for slot, kind in loaded.items())
    assert refused and (parts > 1) == split and (compactions or split)


def test_compaction_marks_moved_adapters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = prepared(2), prepared(4)
    pool = AdapterPool(CONFIG, 3 * size_of(small) + size_of(large), 8, DEVICE, FLOAT, True)
    for slot in range(4):
        pool.load_adapter(slot, small)
    pool.unload_adapter(1)
    pool.wait_for_copies(range(8))
    copied: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def copying(*slots: int) -> Iterator[None]:
        copied.append(slots)
        yield

    monkeypatch.setattr(pool, "_copying", copying)
    lengths = [length for _, length in pool._free]
    assert sum(lengths) >= size_of(large) > max(lengths)
    pool.load_adapter(1, uncut(large))
    assert [sorted(slots) for slots in copied] == [[2, 3], [1]]
    assert all(lies_in(pool, slot, small) for slot in (0, 2, 3)) and lies_in(pool, 1, large)


def test_a_part_of_the_pool_stays_free() -> None:
    pool = AdapterPool(CONFIG, 1 << 20, 8, DEVICE, FLOAT, True)
    assert pool.room.nbytes == (1 << 20) - (1 << 20) // adapter_pool.SPARE
    weights = prepared(3)
    assert pool.cost(weights) == size_of(weights)


class Event:
    """Replaces a CUDA event; `recorded` lists all of them."""

    recorded: list[Event] = []

    def __init__(self) -> None:
        self.done = False

    def record(self) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return self.done


CURRENT = object()
"""Replaces the current stream."""


@pytest.fixture
def fake_streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[AdapterPool], list[Any]]:
    """Gives a pool a fake copy stream; returns the list of what that stream waits for."""
    monkeypatch.setattr(Event, "recorded", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: CURRENT)

    def install(pool: AdapterPool) -> list[Any]:
        waits: list[Any] = []
        monkeypatch.setattr(pool, "_stream", SimpleNamespace(wait_event=waits.append, wait_stream=waits.append))
        monkeypatch.setattr(pool, "_pinned", torch.clone)
        return waits

    return install


def test_a_copy_waits_for_steps_that_read_its_slot_or_memory(
    fake_streams: Callable[[AdapterPool], list[Any]],
) -> None:
    weights = [Cuda(FLOAT).prepare(adapter(CONFIG, seed, 2, ("q_proj",)), "int4") for seed in range(5)]
    pool = AdapterPool(CONFIG, 3 * bytes_of(weights[0]), 6, DEVICE, FLOAT, True)
    waits = fake_streams(pool)
    for slot in range(3):
        pool.load_adapter(slot, weights[slot])
    assert waits == []  # no step has read anything
    Event.recorded.clear()
    for slots in ([0], [1, 2], []):
        pool.record_use(slots)
    first, second = Event.recorded
    pool.unload_adapter(0)
    pool.load_adapter(3, weights[3])  # in the memory of slot 0
    assert waits == [first]
    waits.clear()
    pool.unload_adapter(3)
    pool.load_adapter(0, weights[4])  # in that memory again, and in a slot whose tables were read
    assert waits == [first]
    waits.clear()
    pool.unload_adapter(2)
    second.done = True
    pool.load_adapter(4, weights[3])
    assert waits == []  # that step is done


def test_split_adapters_wait_for_all_readers_and_compaction_for_every_step(
    fake_streams: Callable[[AdapterPool], list[Any]],
) -> None:
    small, large = prepared(2), prepared(4)
    pool = AdapterPool(CONFIG, 6 * size_of(small), 8, DEVICE, FLOAT, True)
    waits = fake_streams(pool)
    for slot in range(6):
        pool.load_adapter(slot, small)
    Event.recorded.clear()
    for slot in range(6):
        pool.record_use([slot])
    events = list(Event.recorded)
    for slot in (0, 2, 4):
        pool.unload_adapter(slot)
    pool.load_adapter(7, large)
    parts = [part.start // size_of(small) for part in pool._parts[7]]
    assert parts == [0, 2, 4][: len(parts)] and len(parts) > 1 and lies_in(pool, 7, large)
    assert set(waits) == {events[part] for part in parts}

    Event.recorded.clear()
    pool.record_use([7])
    (read,) = Event.recorded
    pool.unload_adapter(7)
    for slot in (0, 2):
        waits.clear()
        pool.load_adapter(slot, small)
        assert set(waits) == {events[slot], read}
    waits.clear()
    pool.unload_adapter(0)
    pool.load_adapter(0, uncut(large))
    assert waits[0] is CURRENT and all(lies_in(pool, slot, small) for slot in (1, 2, 3, 5))
