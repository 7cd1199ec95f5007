"""AdapterSlots on a device with memory of its own: adapters by their bytes, all of a mix or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.weights import LoraWeights
from server.engine.adapter_slots import AdapterMemory, AdapterSlots
from server.errors import EngineFailed, NoCapacity


@pytest.fixture
def slots() -> AdapterSlots:
    """AdapterMemory for 100 bytes in four slots; an adapter costs ten times the number in its name."""
    return AdapterSlots(
        4, lambda slot, weights: None, lambda slot: None, AdapterMemory(100, lambda w: 10 * int(w.name[1:]))
    )


def weights_of(tools: Any, *names: str) -> list[LoraWeights]:
    return [LoraWeights(name, tools.digest_of(name), {}) for name in sorted(names, key=tools.digest_of)]


def test_what_is_idle_goes_when_bytes_are_needed(slots: AdapterSlots, tools: Any) -> None:
    four, five, six = (tools.mix_of(name) for name in ("a4", "a5", "a6"))
    for name, mix in (("a4", four), ("a5", five)):
        assert slots.reserve(mix, weights_of(tools, name)) is not None
    assert slots.reserve(six, weights_of(tools, "a6")) is None, "both are in use"
    slots.release(four)
    assert slots.reserve(six, weights_of(tools, "a6")) is None, "40 of 60 bytes could be had"
    slots.release(five)
    assert slots.reserve(six, weights_of(tools, "a6")) is not None
    assert slots.has(six) and slots.in_use == 1
    assert slots.resident == [tools.digest_of("a6")] and slots.evictions == 2
    slots.release(six)
    slots.unload(tools.digest_of("a6"))
    assert slots.evictions == 2, "what has gone by itself has made no room"


def test_a_mix_that_could_never_fit_is_refused(slots: AdapterSlots, tools: Any) -> None:
    mix = tools.mix_of("a6", "a7")
    with pytest.raises(NoCapacity, match="130 bytes of GPU memory, and the limit is 100"):
        slots.reserve(mix, weights_of(tools, "a6", "a7"))
    assert slots.in_use == 0 and slots.resident == []
    assert slots.reserve(tools.mix_of("a4", "a6"), weights_of(tools, "a4", "a6")) is not None, "all of it may be taken"


def test_so_many_idle_slots_are_emptied_as_bytes_are_needed(tools: Any) -> None:
    slots = AdapterSlots(4, lambda slot, weights: None, lambda slot: None)
    for name in ("a1", "a2", "a3", "a4"):
        slots.reserve(tools.mix_of(name), [tools.adapter(name)])
    for name in ("a2", "a3", "a4"):
        slots.release(tools.mix_of(name))
    each = tools.adapter("a1").nbytes
    slots.release_idle(each)
    assert slots.resident == [tools.digest_of(name) for name in ("a1", "a3", "a4")] and slots.evictions == 1
    slots.release_idle(each + 1)
    assert slots.resident == [tools.digest_of("a1")] and slots.evictions == 3


def test_small_adapters_never_outnumber_the_slots(slots: AdapterSlots, tools: Any) -> None:
    for name in ("a1", "a2", "a0", "a3", "a1"):
        mix = tools.mix_of(name)
        slots.reserve(mix, None if slots.has(mix) else weights_of(tools, name))
        slots.release(mix)
    assert len(slots.resident) <= 4


def test_what_is_offered_takes_room_that_nobody_holds_or_waits_for(slots: AdapterSlots, tools: Any) -> None:
    four, five, six = (tools.mix_of(name) for name in ("a4", "a5", "a6"))
    assert slots.reserve(five, weights_of(tools, "a5")) is not None
    slots.prefetch(six, weights_of(tools, "a6"), ())
    slots.release(five)
    slots.prefetch(six, weights_of(tools, "a6"), {tools.digest_of(name) for name in ("a5", "a6")})
    assert slots.resident == [tools.digest_of("a5")], "60 bytes are not free, and who is needed as soon does not go"
    slots.prefetch(six, weights_of(tools, "a6"), {tools.digest_of("a6")})
    assert slots.has(six) and not slots.has(five) and slots.in_use == 0 and slots.evictions == 1
    slots.unload(tools.digest_of("a6"))
    slots.prefetch(four, weights_of(tools, "a4"), ())
    assert slots.has(four) and slots.in_use == 0
    assert slots.reserve(four, None) is not None and slots.in_use == 1


def test_what_cannot_be_copied_ahead_has_no_slot(tools: Any) -> None:
    def place(slot: int, weights: LoraWeights) -> None:
        raise ValueError("the base has no such linear")

    slots = AdapterSlots(4, place, lambda slot: None, AdapterMemory(100, lambda w: 10))
    with pytest.raises(ValueError, match="no such linear"):
        slots.prefetch(tools.mix_of("a4"), weights_of(tools, "a4"), ())
    assert not slots.has(tools.mix_of("a4")) and slots.resident == []


def test_adapters_of_waiting_requests_are_copied_while_others_run(bench: Any, tools: Any) -> None:
    made = bench(max_batch=1, adapter_memory=AdapterMemory(100, lambda weights: 10))
    first, second = (made.submit([5, 6, 7], mix=tools.mix_of(name)) for name in ("a1", "a2"))
    for _ in range(2):
        made.engine.step()
    assert first.tokens and not second.tokens
    assert made.engine.holds(tools.digest_of("a2"))
    made.settle()
    assert second.tokens == tools.solo(second, made.runner.vocab)
    made.check_empty()


def test_what_cannot_be_copied_ahead_ends_its_own_request_alone(bench: Any, tools: Any) -> None:
    made = bench(max_batch=1, adapter_memory=AdapterMemory(100, lambda weights: 95 if weights.name == "a2" else 10))

    def broken(weights: LoraWeights) -> None:
        if weights.name == "a3":
            raise ValueError("no place")

    made.runner.on_place = broken
    served, large, odd, last = (
        made.submit([5, 6, 7], mix=tools.mix_of(*names)) for names in (("a1",), ("a1", "a2"), ("a3",), ("a4",))
    )
    made.settle()
    assert isinstance(large.error, NoCapacity) and isinstance(odd.error, EngineFailed)
    for request in (served, last):
        assert request.tokens == tools.solo(request, made.runner.vocab)
    made.check_empty()


def test_a_mix_over_the_devices_room_ends_with_what_is_missing(bench: Any, tools: Any) -> None:
    made = bench(adapter_memory=AdapterMemory(100, lambda weights: 60))
    refused, served = made.submit([5, 6], mix=tools.mix_of("a1", "a2")), made.submit([5, 6], mix=tools.mix_of("a3"))
    made.settle()
    assert isinstance(refused.error, NoCapacity) and "--adapter-device-memory" in str(refused.error)
    assert refused.error.__traceback__ is None, "its frames would keep the adapters in RAM for as long as it is kept"
    assert served.tokens == tools.solo(served, made.runner.vocab)
    made.check_empty()


def test_what_is_wrong_with_a_waiting_mix_harms_none_that_runs(bench: Any, tools: Any) -> None:
    """Found while its adapters are copied ahead of it: too large for the device, or refused by the runner."""

    def refuse(weights: LoraWeights) -> None:
        if weights.name == "a4":
            raise ValueError("the base has no such linear")

    made = bench(max_batch=1, adapter_memory=AdapterMemory(100, lambda weights: 60))
    made.runner.on_place = refuse
    runs = made.submit([5, 6], mix=tools.mix_of("a3"))
    made.engine.step()
    large, bad = (made.submit([5, 6], mix=tools.mix_of(*names)) for names in (("a1", "a2"), ("a4",)))
    last = made.submit([5, 6], mix=tools.mix_of("a5"))
    made.settle()
    assert isinstance(large.error, NoCapacity) and isinstance(bad.error, EngineFailed)
    for heard in (runs, last):
        assert heard.tokens == tools.solo(heard, made.runner.vocab)
    assert made.engine.stats()["failures"] == 0
    made.check_empty()


def test_nobody_who_runs_waits_for_the_copy_of_an_adapter_that_comes(bench: Any, tools: Any) -> None:
    """The step in which it is copied is not yet one that uses it, whoever asks for it."""
    made = bench(adapter_memory=AdapterMemory(20, lambda weights: 10), max_slots=2)
    placed: list[str] = []
    made.runner.on_place = lambda weights: placed.append(weights.name)
    gone = made.submit([5, 6, 7], mix=tools.mix_of("a1"))
    made.settle()
    runs = made.submit([5, 6, 7], mix=tools.mix_of("a2"), max_tokens=20)
    made.engine.step()
    assert placed == ["a1", "a2"] and runs.tokens, "alone it is computed at once"
    first, second = (made.submit([5, 6, n], mix=tools.mix_of("a3")) for n in (8, 9))
    base = made.submit([5, 6, 10])
    made.engine.step()
    assert placed == ["a1", "a2", "a3"] and base.tokens and not first.tokens and not second.tokens
    made.engine.step()
    assert first.tokens and second.tokens
    made.settle()
    for heard in (gone, runs, first, second, base):
        assert heard.tokens == tools.solo(heard, made.runner.vocab)
    made.check_empty()


@pytest.mark.parametrize("overlapped", [False, True])
def test_more_adapters_than_room_are_copied_once_for_each_that_enters(bench: Any, tools: Any, overlapped: bool) -> None:
    made = bench(adapter_memory=AdapterMemory(40, lambda weights: 10), max_slots=4, max_batch=3, overlapped=overlapped)
    placed: list[str] = []
    used: list[set[int]] = []
    made.runner.on_place = lambda weights: placed.append(weights.name)
    made.runner.before = lambda batch: used.append({slot for mix in batch.mixes for slot, _ in mix})
    heard = [
        made.submit([5, 6, n], mix=tools.mix_of(f"a{n % 12}"), max_tokens=2 + n % 5, fair_key=f"a{n % 12}")
        for n in range(60)
    ]
    made.settle()
    assert all(each.tokens == tools.solo(each, made.runner.vocab) for each in heard)
    assert len(placed) <= len(heard) and len(used) < 3 * len(heard)
    made.check_empty()


def test_so_many_small_adapters_as_there_are_slots_and_no_more(tools: Any) -> None:
    slots = AdapterSlots(2, lambda slot, weights: None, lambda slot: None, AdapterMemory(100, lambda weights: 1))
    for name in ("a1", "a2", "a3"):
        assert slots.reserve(tools.mix_of(name), weights_of(tools, name)) is not None
        slots.release(tools.mix_of(name))
    assert slots.resident == [tools.digest_of("a2"), tools.digest_of("a3")]


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8])
def test_a_mix_of_as_many_small_adapters_as_there_are_slots_fits(tools: Any, count: int) -> None:
    """Whatever the bytes, which the slots need not divide."""
    for nbytes in (100, 101, 1021):
        slots = AdapterSlots(
            count, lambda slot, weights: None, lambda slot: None, AdapterMemory(nbytes, lambda weights: 1)
        )
        names = [f"a{i}" for i in range(count)]
        assert slots.reserve(tools.mix_of(*names), weights_of(tools, *names)) is not None
        assert slots.reserve(tools.mix_of("b"), weights_of(tools, "b")) is None


def test_adapters_are_copied_ahead_of_who_waits_for_blocks(bench: Any, tools: Any) -> None:
    made = bench(adapter_memory=AdapterMemory(100, lambda weights: 10), blocks=8)
    runs = made.submit([5, 6] * 10, max_tokens=4)
    made.engine.step()
    waits = made.submit([5, 6, 7, 8] * 3, mix=tools.mix_of("a2"), max_tokens=2)
    made.engine.step()
    assert waits.request.state is tools.State.QUEUED and made.engine.holds(tools.digest_of("a2"))
    made.settle()
    for heard in (runs, waits):
        assert heard.tokens == tools.solo(heard, made.runner.vocab)
    made.check_empty()


def test_the_slot_of_what_cannot_be_placed_is_another_s(tools: Any) -> None:
    def place(slot: int, weights: LoraWeights) -> None:
        if weights.name == "a1":
            raise ValueError("the base has no such linear")

    cleared: list[int] = []
    slots = AdapterSlots(1, place, cleared.append)
    with pytest.raises(ValueError, match="no such linear"):
        slots.reserve(tools.mix_of("a1"), weights_of(tools, "a1"))
    assert cleared == [0] and slots.reserve(tools.mix_of("a2"), weights_of(tools, "a2")) == ((0, 1.0),)


def test_what_is_forgotten_goes_with_its_last_request_and_is_like_any_other_after(tools: Any) -> None:
    slots, mix = AdapterSlots(2, lambda slot, weights: None, lambda slot: None), tools.mix_of("a1")
    slots.reserve(mix, weights_of(tools, "a1"))
    slots.unload(tools.digest_of("a1"))
    assert slots.has(mix)
    slots.release(mix)
    assert not slots.has(mix)
    slots.reserve(mix, weights_of(tools, "a1"))
    slots.release(mix)
    assert slots.has(mix), "it was wanted again"


def test_idle_slots_are_emptied_for_ram_where_they_hold_it_alone(tools: Any) -> None:
    mix, weights = tools.mix_of("a1"), weights_of(tools, "a1")
    in_ram = AdapterSlots(2, lambda slot, weights: None, lambda slot: None)
    in_ram.prefetch(mix, weights, ())
    in_ram.release_idle(1)
    assert not in_ram.has(mix)
    copied = AdapterSlots(2, lambda slot, weights: None, lambda slot: None, AdapterMemory(100, lambda weights: 10))
    copied.prefetch(mix, weights, ())
    copied.release_idle(1)
    assert copied.has(mix)


def test_a_long_prompt_does_not_wait_for_the_copy_of_an_adapter_that_comes(bench: Any, tools: Any) -> None:
    made = bench(adapter_memory=AdapterMemory(20, lambda weights: 10), max_slots=2, max_step_tokens=16)
    long = made.submit([5, 6] * 40)
    made.engine.step()
    other = made.submit([5, 6, 8], mix=tools.mix_of("a1"))
    made.engine.step()
    assert long.request.computed == 32 and not other.tokens
    made.engine.step()
    assert other.tokens
    made.settle()
    made.check_empty()


def test_adapters_of_more_than_one_that_waits_are_copied_ahead(bench: Any, tools: Any) -> None:
    made = bench(max_batch=1, adapter_memory=AdapterMemory(100, lambda weights: 10))
    for i in range(3):
        made.submit([5, 6, 7], mix=tools.mix_of(f"a{i}"))
    for _ in range(2):
        made.engine.step()
    assert made.engine.stats()["waiting"] == 2
    assert all(made.engine.holds(tools.digest_of(f"a{i}")) for i in range(3))
    made.settle()
    made.check_empty()
