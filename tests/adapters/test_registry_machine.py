"""The registry against a model, over random sequences of operations, errors and crashes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters.catalog_state import KEPT_VERSIONS, CatalogState, VersionRecord
from adapters.errors import AdapterConflict, AdapterError, NoRoom, StoreFailed, UnknownAdapter, VersionMismatch
from adapters.leases import Lease
from adapters.peft_format import read_folder
from adapters.protocols import MemoryCatalog, NoSlots
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LoraWeights, Version
from tests.waiting import until

Write = Callable[..., LoraWeights]
NAMES = st.sampled_from(["a", "b", "c"])
CONTENTS = st.integers(0, 4)
EXPECTED = st.sampled_from([None, "right", "wrong", "*"])
BUDGET = 3
"""Adapters that fit into RAM."""


class Database(MemoryCatalog):
    full = False

    def save(self, state: CatalogState, records: Sequence[VersionRecord] = ()) -> None:
        if self.full:
            raise StoreFailed("the database is full")
        super().save(state, records)


class IdleSlots(NoSlots):
    """Slots that no request uses."""

    def __init__(self) -> None:
        self.views: dict[str, LoraWeights] = {}

    def holds(self, digest: str) -> bool:
        return digest in self.views

    def unload(self, digest: str) -> None:
        self.views.pop(digest, None)

    def release_idle(self, nbytes: int) -> None:
        self.views.clear()


@dataclass(eq=False)
class Held:
    """A lease, the digests that it must hold, and the process (`run`) that it belongs to."""

    lease: Lease
    digests: set[str]
    run: int
    released: bool = False


class RegistryMachine(RuleBasedStateMachine):
    """The model is the history of each name, the pins and the leases; everything else follows from them."""

    leases: Bundle[Held] = Bundle("leases")
    contents: list[tuple[Path, LoraWeights]]
    shapes: dict[str, tuple[int, int]]

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        self.run = 0
        self.database = Database()
        self.history: dict[str, list[str]] = {}
        self.pinned: set[str] = set()
        self.held: list[Held] = []
        self.size = self.contents[0][1].nbytes
        self.by_digest = {weights.digest: weights for _, weights in self.contents}
        self.open()

    def open(self) -> None:
        store = AdapterStore(self.root / f"store-{self.run}", self.database)
        self.registry = Registry(store, shapes=self.shapes, ram_bytes=BUDGET * self.size)
        self.slots = self.registry.slots = IdleSlots()
        self.registry.start()

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            for held in self.held:
                held.lease.release()
            self.registry.close()
            shutil.rmtree(self.root)

    # Users

    @rule(name=NAMES, content=CONTENTS, create_only=st.booleans(), expect=EXPECTED)
    def publish(self, name: str, content: int, create_only: bool, expect: str | None) -> None:
        folder, weights = self.contents[content]
        history = self.history.get(name, [])
        now = history[0] if history else "f" * 64
        if_match = {"right": Version(name, now).label, "wrong": f"{name}@{'0' * 12}"}.get(expect or "", expect)
        try:
            published = self.registry.publish_now(name, folder, create_only=create_only, if_match=if_match)
        except VersionMismatch:
            assert expect == "wrong" or (expect in ("right", "*") and not history)
        except AdapterConflict:
            assert create_only and history and history[0] != weights.digest
        else:
            assert expect != "wrong" and not (create_only and history and history[0] != weights.digest)
            assert published.created == (history[:1] != [weights.digest])
            self.set_version(name, weights.digest)

    @rule(name=NAMES, content=CONTENTS)
    def publish_with_a_full_database(self, name: str, content: int) -> None:
        self.database.full = True
        with pytest.raises(StoreFailed):
            self.registry.publish_now(name, self.contents[content][0])
        self.database.full = False

    @rule(name=NAMES, which=st.integers(0, KEPT_VERSIONS))
    def roll_back(self, name: str, which: int) -> None:
        history = self.history.get(name, [])
        digest = history[which] if which < len(history) else "e" * 64
        try:
            asyncio.run(self.registry.roll_back(name, digest[:12]))
        except UnknownAdapter:
            assert which >= len(history)
        else:
            self.set_version(name, digest)

    @rule(name=NAMES)
    def retire(self, name: str) -> None:
        try:
            self.registry.retire_now(name)
        except UnknownAdapter:
            assert name not in self.history
            return
        del self.history[name]
        self.pinned.discard(name)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        # Slots are idle, so only pinned versions cannot be evicted.
        would = {self.history[n][0] for n in self.pinned | {name} if n in self.history}
        try:
            asyncio.run(asyncio.wait_for(self.registry.pin(name), 20))
        except UnknownAdapter:
            assert name not in self.history
        except NoRoom:
            assert len(would) > BUDGET
        else:
            assert len(would) <= BUDGET
            self.pinned.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        try:
            asyncio.run(self.registry.unpin(name))
        except UnknownAdapter:
            assert name not in self.history
        self.pinned.discard(name)

    # Requests and engine

    @rule(target=leases, choice=st.lists(st.tuples(NAMES, st.integers(0, 3)), max_size=3, unique_by=lambda c: c[0]))
    def lease(self, choice: list[tuple[str, int]]) -> Held:
        asked, digests = [], []
        for name, which in choice:
            history = self.history.get(name, [])
            if which == 0:
                asked.append((name, 0.5))
                digests += history[:1]
            elif which < len(history):
                asked.append((Version(name, history[which]).label, 0.5))
                digests.append(history[which])
        try:
            lease = self.registry.lease(asked)
        except UnknownAdapter:
            assert any(name not in self.history for name, _ in choice)
            lease, digests = self.registry.lease([]), []
        except NoRoom:
            assert len(set(digests) | self.pins()) > BUDGET
            lease, digests = self.registry.lease([]), []
        assert set(lease.mix.digests) == set(digests)
        assert [version.digest for version, _ in lease.versions] == digests
        held = Held(lease, set(digests), self.run)
        self.held.append(held)
        return held

    @rule(held=leases, cancel=st.booleans(), keep=st.booleans())
    def fetch(self, held: Held, cancel: bool, keep: bool) -> None:
        if held.released or held.run != self.run or len(held.digests | self.pins()) > BUDGET:
            return
        future = self.registry.fetch(held.lease.mix)
        if cancel and future.cancel():
            return
        for digest, weights in zip(held.lease.mix.digests, future.result(20), strict=True):
            self.check(digest, weights)
            if keep:
                self.slots.views[digest] = weights

    @rule(held=consumes(leases))
    def release(self, held: Held) -> None:
        held.lease.release()
        held.lease.release()
        held.released = True

    # Events

    @rule(content=CONTENTS)
    def evict(self, content: int) -> None:
        digest = self.contents[content][1].digest
        self.slots.unload(digest)
        if digest not in self.pins():
            self.registry._ram.discard(digest)

    @rule()
    def crash(self) -> None:
        """The process ends; the files and the database stay as they are at this moment."""
        self.settle()
        shutil.copytree(self.root / f"store-{self.run}", self.root / f"store-{self.run + 1}")
        old, saved = self.registry, self.database.load()
        self.database = Database()
        self.database.save(saved[0], list(saved[1].values()))
        self.run += 1
        self.open()
        for held in self.held:
            held.lease.release()
        old.close()
        self.held.clear()

    @precondition(lambda self: bool(self.history))
    @rule(data=st.data())
    def damage_and_repair(self, data: Any) -> None:
        """A damaged version cannot be loaded until it is published again."""
        name = data.draw(st.sampled_from(sorted(self.history)))
        digest = self.history[name][0]
        if digest in self.pins():
            return
        self.slots.unload(digest)
        self.registry._ram.discard(digest)
        path = self.registry._store.path(digest) / "adapter_model.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-4] + bytes(4) + good[:1])
        with self.registry.lease([(name, 1.0)]) as lease, pytest.raises(AdapterError):
            future = self.registry.fetch(lease.mix)
            future.result(20)
        content = next(folder for folder, weights in self.contents if weights.digest == digest)
        assert not self.registry.publish_now(name, content).created

    # Invariants

    @invariant()
    def names_match_the_model(self) -> None:
        assert {name: self.registry.current(name).digest for name in self.registry.names()} == {
            name: history[0] for name, history in self.history.items()
        }
        for described in self.registry.list():
            name = described["name"]
            full = self.registry.describe(name)
            assert [version["digest"] for version in full["versions"]] == self.history[name]
            assert described["pinned"] == (name in self.pinned)
            assert described["tier"] in ("disk", "ram", "device")

    @invariant()
    def the_disk_has_the_named_and_leased_versions(self) -> None:
        self.settle()
        versions = {path.name for path in (self.root / f"store-{self.run}" / "versions").iterdir()}
        assert versions == self.named() | self.leased()
        assert set(self.registry._store.records) == versions

    @invariant()
    def memory_is_within_the_budget(self) -> None:
        ram = self.registry._ram
        assert ram.used <= ram.capacity
        assert set(ram.resident()) <= self.named() | self.leased()
        leases = sum(len(held.lease.versions) for held in self.live())
        until(lambda: self.registry.memory()["leases"] == leases, "leases of pinned loads are released")

    @invariant()
    def unused_versions_left_the_device(self) -> None:
        gone = set(self.by_digest) - self.named() - self.leased()
        assert not gone & set(self.slots.views)

    def check(self, digest: str, weights: LoraWeights) -> None:
        expected = self.by_digest[digest]
        assert weights.digest == digest
        for path, module in weights.modules.items():
            assert torch.equal(module.A, expected.modules[path].A) and torch.equal(module.B, expected.modules[path].B)

    def settle(self) -> None:
        """Wait for queued writes and running loads."""
        self.registry._writer.submit(lambda: None).result(20)
        until(lambda: not self.registry._ram._loading, "a load never ended")
        until(lambda: self.pins() <= set(self.registry._ram.resident()), "a pinned version was not loaded")

    def set_version(self, name: str, digest: str) -> None:
        rest = [d for d in self.history.get(name, []) if d != digest]
        self.history[name] = [digest, *rest][:KEPT_VERSIONS]

    def live(self) -> list[Held]:
        return [held for held in self.held if not held.released]

    def leased(self) -> set[str]:
        return {digest for held in self.live() for digest in held.digests}

    def named(self) -> set[str]:
        return {digest for history in self.history.values() for digest in history}

    def pins(self) -> set[str]:
        return {self.history[name][0] for name in self.pinned}


@pytest.mark.usefixtures("no_fsync")
def test_any_order_of_events(tmp_path: Path, tiny_shapes: dict[str, tuple[int, int]], write_adapter: Write) -> None:
    contents = []
    for seed in range(5):
        folder = tmp_path / f"content-{seed}"
        write_adapter(folder, seed)
        contents.append((folder, read_folder(folder, name="content")))
    machine = type("Machine", (RegistryMachine,), {"contents": contents, "shapes": tiny_shapes})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
