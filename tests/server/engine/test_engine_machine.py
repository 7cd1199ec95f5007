"""State machines: in any order of events, everything reserved is freed, and each request ends once."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from adapters.weights import LoraWeights, Mix
from server.engine.adapter_slots import AdapterMemory, AdapterSlots
from server.engine.kv_cache import KVCache, next_hash, root_hash
from server.engine.request import State

SMALL = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


class KVMachine(RuleBasedStateMachine):
    """Sequences are added and freed. A model knows the contents of each block."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCache(12, 2)
        self.content: dict[int, tuple[Any, ...]] = {}
        self.users: dict[int, int] = {}

    @rule(target=held, mix=st.sampled_from("AB"), tokens=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=10))
    def add(self, mix: str, tokens: list[int]) -> Any:
        key, keys = root_hash("base", Mix(((mix, 1.0),)), ""), []
        for i in range(len(tokens) // 2):
            key = next_hash(key, tokens[2 * i : 2 * i + 2])
            keys.append(key)
        found = self.kv.match_prefix(keys)
        for i, block in enumerate(found):
            assert self.content[block] == (mix, *tokens[: 2 * i + 2])
        need = self.kv.blocks_for(len(tokens)) - len(found)
        before = self.kv.available
        fresh = self.kv.allocate(need)
        assert (fresh is None) == (need > before)
        if fresh is None:
            self.kv.free(found)
            return multiple()
        blocks = found + fresh
        for i, block in enumerate(blocks):
            assert block not in fresh or not self.users.get(block)
            self.users[block] = self.users.get(block, 0) + 1
            if block in fresh:
                self.content[block] = (mix, *tokens[: 2 * i + 2])
            if i < len(keys):
                self.kv.register(block, keys[i])
        return blocks

    @rule(blocks=consumes(held), trusted=st.booleans())
    def free(self, blocks: list[int], trusted: bool) -> None:
        if not trusted:
            self.kv.unregister(blocks)
        self.kv.free(blocks)
        for block in blocks:
            self.users[block] -= 1

    @rule()
    def clear(self) -> None:
        self.kv.clear()
        assert self.kv.counts["cached"] == 0

    @invariant()
    def all_blocks_are_accounted_for(self) -> None:
        counts = self.kv.counts
        assert sum(counts.values()) == 12
        assert counts["used"] == sum(n > 0 for n in self.users.values())
        assert len(set(self.kv._free) | set(self.kv._cached)) == self.kv.available


class SlotsMachine(RuleBasedStateMachine):
    """Mixes are reserved and released. A model counts the users of each adapter."""

    room: AdapterMemory | None = None
    held = Bundle("held")
    names = st.sampled_from([f"{i:x}" * 64 for i in range(6)])

    def __init__(self) -> None:
        super().__init__()
        self.placed: dict[int, str] = {}
        self.fail = False
        self.holders: dict[str, int] = {}
        self.slots = AdapterSlots(4, self.load_adapter, self.unload_adapter, self.room)

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        if self.fail:
            raise MemoryError
        assert slot not in self.placed and 0 <= slot < 4
        self.placed[slot] = weights.digest

    def unload_adapter(self, slot: int) -> None:
        self.placed.pop(slot, None)

    @rule(target=held, digests=st.sets(names, max_size=4), fail=st.booleans())
    def reserve(self, digests: set[str], fail: bool) -> Any:
        mix = Mix(tuple((d, 0.5) for d in sorted(digests)))
        weights = [LoraWeights("n", d, {}) for d in mix.digests]
        before = dict(self.placed)
        self.fail = fail
        others = {d for d, n in self.holders.items() if n and d not in digests}
        try:
            got = self.slots.reserve(mix, weights)
        except MemoryError:
            assert fail
            assert {d for d, n in self.holders.items() if n} <= set(self.placed.values())
            return multiple()
        if got is None:
            assert len(others) + len(digests) > 4 and self.placed == before
            return multiple()
        assert len(others) + len(digests) <= 4
        assert [(self.placed[slot], weight) for slot, weight in got] == list(mix)
        for digest in digests:
            self.holders[digest] = self.holders.get(digest, 0) + 1
        return mix

    @rule(digests=st.sets(names, min_size=1, max_size=4), keep=st.sets(names, max_size=2), fail=st.booleans())
    def prefetch(self, digests: set[str], keep: set[str], fail: bool) -> None:
        mix = Mix(tuple((d, 0.5) for d in sorted(digests)))
        before = set(self.placed.values())
        self.fail = fail
        try:
            self.slots.prefetch(mix, [LoraWeights("n", d, {}) for d in mix.digests], keep)
        except MemoryError:
            assert fail
        assert before & keep <= set(self.placed.values()) <= before | digests

    @rule(mix=consumes(held))
    def free(self, mix: Mix) -> None:
        self.slots.release(mix)
        for digest in mix.digests:
            self.holders[digest] -= 1

    @rule(digest=names)
    def unload(self, digest: str) -> None:
        self.slots.unload(digest)
        assert self.slots.holds(digest) == bool(self.holders.get(digest))

    @rule(nbytes=st.integers(0, 3))
    def release_idle(self, nbytes: int) -> None:
        self.slots.release_idle(nbytes)

    @invariant()
    def reserved_adapters_have_slots(self) -> None:
        assert set(self.placed.values()) == set(self.slots.resident)
        assert {d for d, n in self.holders.items() if n} <= set(self.placed.values())
        assert self.slots.in_use == sum(n > 0 for n in self.holders.values())


def test_kv_cache_machine() -> None:
    run_state_machine_as_test(KVMachine, settings=SMALL)


class RoomMachine(SlotsMachine):
    """With adapters that cost bytes of a memory that the number of slots does not divide."""

    room = AdapterMemory(101, lambda weights: 1 + int(weights.digest[0], 16))


@pytest.mark.parametrize("machine", [SlotsMachine, RoomMachine])
def test_slots_machine(machine: type[SlotsMachine]) -> None:
    run_state_machine_as_test(machine, settings=SMALL)


def engine_machine(bench: Any, tools: Any, **options: Any) -> type[RuleBasedStateMachine]:
    class EngineMachine(RuleBasedStateMachine):
        """Requests of all kinds, loads that end in any order or fail, cancellations, failed steps."""

        def __init__(self) -> None:
            super().__init__()
            self.fetch = tools.Fetcher(ready={"a0", "a1", "a2"})
            self.bench = bench(
                fetch=self.fetch, blocks=16, max_batch=3, max_slots=3, max_step_tokens=8, max_queue=6, age_limit=0.0,
                **options,
            )  # fmt: skip
            self.all: list[Any] = []

        @rule(
            seed=st.integers(0, 3),
            length=st.integers(2, 24),
            answer=st.integers(1, 20),
            names=st.sets(st.sampled_from([f"a{i}" for i in range(5)]), max_size=3),
            priority=st.integers(0, 1),
            key=st.sampled_from("xyz"),
            scored=st.integers(0, 3),
            soon=st.booleans(),
        )
        def submit(
            self, seed: int, length: int, answer: int, names: set[str], priority: int, key: str, scored: int, soon: bool
        ) -> None:
            from server.errors import QueueFull

            tokens = [3 + (seed + i * i) % 40 for i in range(length)]
            try:
                heard = self.bench.submit(
                    tokens,
                    mix=tools.mix_of(*names),
                    max_tokens=answer,
                    priority=priority,
                    fair_key=key,
                    scored=min(scored, length - 1),
                    deadline=time.monotonic() + (0.01 if soon else 100.0),
                )
            except QueueFull:
                return
            self.all.append(heard)

        @rule()
        def step(self) -> None:
            self.bench.engine.step()

        @rule(index=st.integers(0, 30))
        def cancel(self, index: int) -> None:
            if self.all:
                heard = self.all[index % len(self.all)]
                self.bench.engine.cancel(heard.request.id)
                self.bench.engine.step()
                assert heard.reason is not None

        @rule(index=st.integers(0, 30), fails=st.booleans())
        def load_ends(self, index: int, fails: bool) -> None:
            if self.fetch.pending:
                self.fetch.finish(index % len(self.fetch.pending), RuntimeError("bad file") if fails else None)

        @rule(name=st.sampled_from(["a0", "a3"]))
        def unload(self, name: str) -> None:
            self.bench.engine.unload(tools.digest_of(name))

        @rule()
        def fault(self) -> None:
            def explode(batch: Any) -> None:
                raise RuntimeError("kernel")

            self.bench.runner.before = explode
            try:
                self.bench.engine.step()
            except RuntimeError as error:
                self.bench.engine._recover(error)
            self.bench.runner.before = lambda batch: None

        @invariant()
        def counts_agree(self) -> None:
            scheduler = self.bench.engine._scheduler
            assert len(scheduler.running) <= 3
            assert scheduler.kv.counts["used"] == len({b for r in scheduler.running for b in r.blocks})
            assert self.bench.engine._slots.in_use == len({d for r in scheduler.running for d in r.mix.digests})
            assert all(r.state is State.RUNNING for r in scheduler.running)
            assert all(r.num_hashed_blocks == r.computed // scheduler.kv.block_size for r in scheduler.running)
            assert all(r.state in (State.QUEUED, State.LOADING) for r in scheduler.waiting)
            assert set(self.bench.engine._live.values()) == {*scheduler.running, *scheduler.waiting}

        def teardown(self) -> None:
            for _ in range(500):
                while self.fetch.pending:
                    self.fetch.finish()
                if not self.bench.engine.step() and all(h.reason for h in self.all):
                    break
            for heard in self.all:
                assert heard.reason is not None, "a request starves"
                if heard.reason == "length":
                    assert heard.tokens == tools.solo(heard, self.bench.runner.vocab)
                if heard.reason == "error":
                    assert heard.error is not None
                    assert "could not be loaded" not in str(heard.error), "an error of the engine"
            self.bench.check_empty()

    return EngineMachine


@pytest.mark.parametrize("room", [None, AdapterMemory(101, lambda weights: 20)], ids=["in RAM", "copied"])
@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
def test_engine_machine(
    bench: Any, tools: Any, overlapped: bool, room: AdapterMemory | None, caplog: pytest.LogCaptureFixture
) -> None:
    run_state_machine_as_test(engine_machine(bench, tools, overlapped=overlapped, adapter_memory=room), settings=SMALL)
