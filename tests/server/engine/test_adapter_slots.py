"""Adapter slots, in RAM and with memory of their own: all adapters of a mix or none."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.weights import LoraWeights
from server.engine.adapter_slots import AdapterMemory, AdapterSlots
from server.engine.request import State
from server.errors import EngineFailed, NoCapacity


def make_slots(count: int = 4, memory: AdapterMemory | None = None, refused: str = "") -> AdapterSlots:
    def load(slot: int, weights: LoraWeights) -> None:
        if weights.name == refused:
            raise ValueError("the base has no such linear")

    return AdapterSlots(count, load, lambda slot: None, memory)


@pytest.fixture
def slots() -> AdapterSlots:
    """Four slots with 100 bytes. An adapter costs ten times the number in its name."""
    return make_slots(memory=AdapterMemory(100, lambda weights: 10 * int(weights.name[1:])))


def weights_of(tools: Any, *names: str) -> list[LoraWeights]:
    return [LoraWeights(name, tools.digest_of(name), {}) for name in sorted(names, key=tools.digest_of)]


def use(slots: AdapterSlots, tools: Any, *names: str) -> bool:
    """Reserve a mix. Returns whether there was room."""
    return slots.reserve(tools.mix_of(*names), weights_of(tools, *names)) is not None


def test_unused_adapters_are_evicted_for_memory(slots: AdapterSlots, tools: Any) -> None:
    four, five, six = (tools.mix_of(name) for name in ("a4", "a5", "a6"))
    assert use(slots, tools, "a4") and use(slots, tools, "a5")
    assert not use(slots, tools, "a6"), "both are in use"
    slots.release(four)
    assert not use(slots, tools, "a6"), "40 of 60 bytes are free"
    slots.release(five)
    assert use(slots, tools, "a6") and slots.has(six) and slots.in_use == 1
    assert slots.resident == [tools.digest_of("a6")] and slots.evictions == 2
    slots.release(six)
    slots.unload(tools.digest_of("a6"))
    assert slots.evictions == 2 and slots.resident == []


def test_a_mix_larger_than_the_memory_is_refused(slots: AdapterSlots, tools: Any) -> None:
    with pytest.raises(NoCapacity, match="130 bytes of GPU memory, and the limit is 100"):
        use(slots, tools, "a6", "a7")
    assert slots.in_use == 0 and slots.resident == []
    assert use(slots, tools, "a4", "a6"), "all of the memory may be used"


def test_release_idle_empties_unused_slots_that_hold_ram(tools: Any) -> None:
    slots = make_slots()
    for name in ("a1", "a2", "a3", "a4"):
        slots.reserve(tools.mix_of(name), [tools.adapter(name)])
    for name in ("a2", "a3", "a4"):
        slots.release(tools.mix_of(name))
    each = tools.adapter("a1").nbytes
    slots.release_idle(each)
    assert slots.resident == [tools.digest_of(name) for name in ("a1", "a3", "a4")] and slots.evictions == 1
    slots.release_idle(each + 1)
    assert slots.resident == [tools.digest_of("a1")] and slots.evictions == 3
    copies = make_slots(memory=AdapterMemory(100, lambda weights: 10))
    copies.prefetch(tools.mix_of("a1"), weights_of(tools, "a1"), ())
    copies.release_idle(1)
    assert copies.has(tools.mix_of("a1"))


@pytest.mark.parametrize("nbytes", [100, 101, 1021])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8])
def test_as_many_small_adapters_fit_as_there_are_slots(tools: Any, count: int, nbytes: int) -> None:
    slots = make_slots(count, AdapterMemory(nbytes, lambda weights: 1))
    names = [f"a{i}" for i in range(count)]
    assert use(slots, tools, *names) and not use(slots, tools, "b")
    slots.release(tools.mix_of(*names))
    assert use(slots, tools, "b") and len(slots.resident) == count


def test_prefetch_uses_room_that_nobody_needs(slots: AdapterSlots, tools: Any) -> None:
    four, five, six = (tools.mix_of(name) for name in ("a4", "a5", "a6"))
    assert use(slots, tools, "a5")
    slots.prefetch(six, weights_of(tools, "a6"), ())
    slots.release(five)
    slots.prefetch(six, weights_of(tools, "a6"), {tools.digest_of(name) for name in ("a5", "a6")})
    assert slots.resident == [tools.digest_of("a5")], "60 bytes are not free, and a5 is kept"
    slots.prefetch(six, weights_of(tools, "a6"), {tools.digest_of("a6")})
    assert slots.has(six) and not slots.has(five) and slots.in_use == 0 and slots.evictions == 1
    slots.unload(tools.digest_of("a6"))
    slots.prefetch(four, weights_of(tools, "a4"), ())
    assert slots.reserve(four, None) is not None and slots.in_use == 1


@pytest.mark.parametrize("memory", [None, AdapterMemory(100, lambda weights: 10)])
def test_an_adapter_that_the_runner_refuses_gets_no_slot(tools: Any, memory: AdapterMemory | None) -> None:
    slots = make_slots(2, memory, refused="a1")
    with pytest.raises(ValueError, match="no such linear"):
        slots.prefetch(tools.mix_of("a1"), weights_of(tools, "a1"), ())
    with pytest.raises(ValueError, match="no such linear"):
        use(slots, tools, "a1", "a2")
    assert slots.resident == [] and slots.in_use == 0
    assert use(slots, tools, "a2", "a3")


def test_unload_waits_for_the_last_request_and_happens_once(tools: Any) -> None:
    slots, mix = make_slots(), tools.mix_of("a1")
    use(slots, tools, "a1")
    slots.unload(tools.digest_of("a1"))
    assert slots.has(mix)
    slots.release(mix)
    assert not slots.has(mix)
    use(slots, tools, "a1")
    slots.release(mix)
    assert slots.has(mix)


# -- with the engine


def test_adapters_of_waiting_requests_are_copied_ahead(bench: Any, tools: Any) -> None:
    b = bench(max_batch=1, adapter_memory=AdapterMemory(100, lambda weights: 10))
    heard = [b.submit([5, 6, 7], mix=tools.mix_of(f"a{i}")) for i in range(3)]
    for _ in range(2):
        b.engine.step()
    assert heard[0].tokens and not heard[1].tokens
    assert all(b.engine.holds(tools.digest_of(f"a{i}")) for i in range(3))
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    b.check_empty()


def test_adapters_are_copied_ahead_for_a_request_that_waits_for_blocks(bench: Any, tools: Any) -> None:
    b = bench(adapter_memory=AdapterMemory(100, lambda weights: 10), blocks=8)
    running = b.submit([5, 6] * 10, max_tokens=4)
    b.engine.step()
    waiting = b.submit([5, 6, 7, 8] * 3, mix=tools.mix_of("a2"), max_tokens=2)
    b.engine.step()
    assert waiting.request.state is State.QUEUED and b.engine.holds(tools.digest_of("a2"))
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (running, waiting))


@pytest.mark.parametrize("max_batch", [1, 4])
def test_mixes_that_cannot_be_placed_end_alone(bench: Any, tools: Any, max_batch: int) -> None:
    """Too large for the memory, or refused by the runner; found at admission or while copied ahead."""
    cost = {"a2": 95}
    b = bench(max_batch=max_batch, adapter_memory=AdapterMemory(100, lambda weights: cost.get(weights.name, 10)))
    b.runner.on_place = lambda weights: (_ for _ in ()).throw(ValueError("no place")) if weights.name == "a3" else None
    first, large, refused, last = (
        b.submit([5, 6, 7], mix=tools.mix_of(*names)) for names in (("a1",), ("a1", "a2"), ("a3",), ("a4",))
    )
    b.settle()
    assert isinstance(large.error, NoCapacity) and "--adapter-device-memory" in str(large.error)
    assert large.error.__traceback__ is None, "its frames would keep the weights"
    assert isinstance(refused.error, EngineFailed)
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (first, last))
    assert b.engine.stats()["failures"] == 0
    b.check_empty()


def test_running_requests_do_not_wait_for_the_copy_of_an_adapter(bench: Any, tools: Any) -> None:
    """The step in which an adapter is copied does not use it."""
    b = bench(adapter_memory=AdapterMemory(20, lambda weights: 10), max_slots=2, max_step_tokens=16)
    placed: list[str] = []
    b.runner.on_place = lambda weights: placed.append(weights.name)
    running = b.submit([5, 6, 7], mix=tools.mix_of("a2"), max_tokens=20)
    b.engine.step()
    assert placed == ["a2"] and running.tokens, "alone it starts at once"
    first, second = (b.submit([5, 6, n], mix=tools.mix_of("a3")) for n in (8, 9))
    base = b.submit([5, 6, 10])
    b.engine.step()
    assert placed == ["a2", "a3"] and base.tokens and not first.tokens and not second.tokens
    b.engine.step()
    assert first.tokens and second.tokens
    b.settle()
    long = b.submit([5, 6] * 40)
    b.engine.step()
    other = b.submit([5, 6, 8], mix=tools.mix_of("a4"))
    b.engine.step()
    assert long.request.computed == 32 and not other.tokens, "a long prompt does not wait either"
    b.settle()
    for heard in (running, first, second, base, long, other):
        assert heard.tokens == tools.solo(heard, b.runner.vocab)
    b.check_empty()


@pytest.mark.parametrize("overlapped", [False, True])
def test_more_adapters_than_memory_are_copied_once_per_admission(bench: Any, tools: Any, overlapped: bool) -> None:
    memory = AdapterMemory(40, lambda weights: 10)
    b = bench(adapter_memory=memory, max_slots=4, max_batch=3, overlapped=overlapped)
    placed: list[str] = []
    b.runner.on_place = lambda weights: placed.append(weights.name)
    heard = [
        b.submit([5, 6, n], mix=tools.mix_of(f"a{n % 12}"), max_tokens=2 + n % 5, fair_key=f"a{n % 12}")
        for n in range(60)
    ]
    b.settle()
    assert all(each.tokens == tools.solo(each, b.runner.vocab) for each in heard)
    assert len(placed) <= len(heard) and len(b.runner.steps) < 3 * len(heard)
    b.check_empty()
