"""`LRU`: reservations, pins and eviction, also against a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.lru import LRU


def test_reserve_is_all_or_nothing() -> None:
    evicted: list[str] = []
    lru: LRU[str] = LRU(10, evicted.append)
    assert lru.reserve({"a": 4, "b": 4})
    assert not lru.reserve({"a": 4, "c": 3})
    assert lru.pins("a") == 1 and lru.pins("c") == 0 and "c" not in lru and lru.used == 8 and not evicted


def test_least_recently_used_goes_first_and_pinned_never() -> None:
    evicted: list[str] = []
    lru: LRU[str] = LRU(3, evicted.append)
    for key in "abc":
        assert lru.reserve({key: 1})
    lru.free("acb")
    assert lru.reserve({"a": 1}) and list(lru) == ["c", "b", "a"]
    lru.free("a")
    assert lru.reserve({"d": 1})
    assert evicted == ["c"]
    assert lru.reserve({"b": 1})
    assert not lru.reserve({"e": 2})
    assert lru.reserve({"e": 1})
    assert evicted == ["c", "a"]


def test_reserved_keys_are_not_evicted_for_each_other() -> None:
    lru: LRU[str] = LRU(2)
    assert lru.add("a", 1) and lru.add("b", 1)
    assert not lru.reserve({"a": 1, "b": 1, "c": 1})
    assert lru.reserve({"a": 1, "c": 1})
    assert "b" not in lru


def test_evict_last_and_keep() -> None:
    evicted: list[str] = []
    lru: LRU[str] = LRU(3, evicted.append)
    for key in "abc":
        assert lru.add(key, 1)
    assert lru.reserve({"d": 2}, evict_last=lambda key: key == "a")
    assert evicted == ["b", "c"]
    lru.free("d")
    assert not lru.reserve({"e": 2}, keep={"d"}) and lru.reserve({"e": 1}, keep={"d"}) and evicted[2:] == ["a"]
    assert not lru.resize("e", 2, keep={"d"}) and lru.resize("e", 2) and evicted[3:] == ["d"]


def test_make_room_spares_pinned_and_kept_keys() -> None:
    evicted: list[str] = []
    lru: LRU[str] = LRU(6, evicted.append)
    assert lru.reserve({"a": 2})
    assert lru.add("b", 1) and lru.add("c", 1) and lru.add("d", 1)
    assert lru.make_room(1, ()) and not evicted
    assert not lru.make_room(4, {"c"}) and not evicted
    assert lru.make_room(2, {"b"}) and evicted == ["c"] and list(lru) == ["a", "b", "d"]
    assert lru.make_room(4, ()) and evicted == ["c", "b", "d"] and lru.used == 2
    assert not lru.make_room(5, ())


def test_add_never_evicts_and_resize_may() -> None:
    lru: LRU[str] = LRU(4)
    assert lru.add("a", 2) and lru.add("b", 2) and not lru.add("c", 1)
    assert lru.add("b", 2) and lru.used == 4
    assert lru.resize("a", 4) and "b" not in lru
    assert not lru.resize("a", 5) and lru.cost("a") == 4
    assert lru.resize("a", 1) and lru.used == 1


def test_misuse_is_caught() -> None:
    lru: LRU[str] = LRU(2)
    assert lru.reserve({"a": 1})
    with pytest.raises(AssertionError, match="pinned"):
        lru.remove("a")
    lru.free("a")
    with pytest.raises(AssertionError, match="more often"):
        lru.free("a")


KEYS = st.integers(0, 7)


@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.sampled_from(["reserve", "free", "add"]), st.sets(KEYS, min_size=1, max_size=3))),
)
def test_the_capacity_holds_for_any_calls(capacity: int, calls: list[tuple[str, set[int]]]) -> None:
    held: set[int] = set()
    lru: LRU[int] = LRU(capacity, held.discard)
    pins: dict[int, int] = {}
    for call, keys in calls:
        before = (set(lru), lru.used)
        if call == "reserve":
            if lru.reserve({k: k + 1 for k in keys}):
                held |= keys
                for k in keys:
                    pins[k] = pins.get(k, 0) + 1
            else:
                assert (set(lru), lru.used) == before
                others = sum(k + 1 for k, n in pins.items() if n and k not in keys)
                assert others + sum(k + 1 for k in keys) > capacity
        elif call == "free":
            freed = {k for k in keys if pins.get(k)}
            lru.free(freed)
            for k in freed:
                pins[k] -= 1
        else:
            for k in keys:
                if lru.add(k, k + 1):
                    held.add(k)
        assert set(lru) == held
        assert lru.used == sum(k + 1 for k in held) <= max(capacity, 0)
        assert all(k in lru and lru.pins(k) == n for k, n in pins.items() if n)


def test_resize_respects_evict_last() -> None:
    evicted: list[str] = []
    lru: LRU[str] = LRU(3, evicted.append)
    assert lru.add("a", 1) and lru.add("b", 1) and lru.add("c", 1)
    assert lru.resize("c", 2, evict_last=lambda key: key == "a")
    assert evicted == ["b"]
