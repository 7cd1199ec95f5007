"""The registry: publish, roll back, retire, pin, lease and fetch."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import peft_config
from adapters.catalog_state import CatalogState, VersionRecord
from adapters.errors import (
    AdapterConflict,
    AdapterError,
    BaseMismatch,
    InvalidAdapter,
    InvalidChoice,
    NoRoom,
    StoreFailed,
    UnknownAdapter,
    UnsupportedAdapter,
    VersionMismatch,
)
from adapters.peft_format import read_folder, save
from adapters.protocols import MemoryCatalog, NoSlots, Observer
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LoraWeights, LowRank, Mix, Version, with_digest
from tests.waiting import until

Write = Callable[..., LoraWeights]
Open = Callable[..., Registry]


class Events(Observer):
    def __init__(self) -> None:
        self.loads: list[tuple[str, str]] = []
        self.evictions = 0
        self.changes: list[tuple[str, str | None]] = []

    def on_load(self, name: str, outcome: str, seconds: float) -> None:
        self.loads.append((name, outcome))

    def on_evict(self) -> None:
        self.evictions += 1

    def on_change(self, name: str, version: Version | None) -> None:
        self.changes.append((name, version.label if version else None))


class Device(NoSlots):
    """Slots that keep views until `unload`."""

    def __init__(self) -> None:
        self.views: dict[str, LoraWeights] = {}
        self.asked: list[int] = []

    def holds(self, digest: str) -> bool:
        return digest in self.views

    def unload(self, digest: str) -> None:
        self.views.pop(digest, None)

    def release_idle(self, nbytes: int) -> None:
        self.asked.append(nbytes)
        while self.views and nbytes > 0:
            nbytes -= self.views.pop(next(iter(self.views))).nbytes


class FailingCatalog(MemoryCatalog):
    """A backend that refuses to save while `full`."""

    full = False

    def save(self, state: CatalogState, records: Sequence[VersionRecord] = ()) -> None:
        if self.full:
            raise StoreFailed("the database is full; nothing was changed")
        super().save(state, records)


@pytest.fixture
def catalog() -> FailingCatalog:
    return FailingCatalog()


@pytest.fixture
def open_registry(tmp_path: Path, tiny_shapes: dict[str, tuple[int, int]], catalog: FailingCatalog) -> Iterator[Open]:
    """`open_registry(**options)`: close the registry and open it again over the same store."""
    opened: list[Registry] = []

    def make(**options: Any) -> Registry:
        for before in opened:
            before.close()
        store = AdapterStore(tmp_path / "store", catalog)
        opened[:] = [Registry(store, **{"shapes": tiny_shapes, "ram_bytes": 1 << 20, "observer": Events(), **options})]
        return opened[0]

    yield make
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


@pytest.fixture
def folders(tmp_path: Path, write_adapter: Write) -> list[Path]:
    paths = [tmp_path / f"source-{seed}" for seed in range(6)]
    for seed, path in enumerate(paths):
        write_adapter(path, seed, card=f"card {seed}")
    return paths


def digest_of(folder: Path) -> str:
    return read_folder(folder, name="any").digest


def size_of(folder: Path) -> int:
    return read_folder(folder, name="any").nbytes


def fetched(registry: Registry, mix: Mix) -> tuple[LoraWeights, ...]:
    return registry.fetch(mix).result(10)


def stored(registry: Registry) -> set[str]:
    return {path.name for path in (registry._store.root / "versions").iterdir()}


def tiers(registry: Registry) -> dict[str, str]:
    return {each["name"]: each["tier"] for each in registry.list()}


def damage(registry: Registry, digest: str) -> None:
    """Flip a bit of a stored version that is not in RAM."""
    registry._ram.discard(digest)
    path = registry._store.path(digest) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def write_double(folder: Path) -> Path:
    """Write the adapter of `folder` with twice the rank."""
    modules = {
        path: LowRank(torch.cat([m.A, m.A]), torch.cat([m.B, m.B], dim=1), m.scale)
        for path, m in read_folder(folder, name="double").modules.items()
    }
    save(with_digest("double", modules), folder)
    return folder


# Publish


def test_publish_creates_replaces_and_repeats(registry: Registry, folders: list[Path]) -> None:
    first = registry.publish_now("a", folders[0])
    assert first.created and first.first and first.version == Version("a", digest_of(folders[0]))
    assert first.metadata["honoured"] and first.metadata["card"] == "card 0"
    assert not registry.publish_now("a", folders[0], create_only=True).created
    with pytest.raises(AdapterConflict):
        registry.publish_now("a", folders[1], create_only=True)
    assert registry.current("a") == first.version
    open_files = len(os.listdir("/proc/self/fd"))
    second = registry.publish_now("a", folders[1])
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert second.created and not second.first and registry.current("a") == second.version
    assert registry._observer.changes == [("a", first.version.label), ("a", second.version.label)]
    assert registry.exists("a") and not registry.exists("b") and registry.names("api") == ["a"] == registry.names()
    assert registry.names("watch") == [] and registry.is_current("a", second.version.digest)


def test_a_name_inherits_task_and_card(registry: Registry, folders: list[Path]) -> None:
    def inherited() -> tuple[Any, Any]:
        metadata = registry.metadata("a")
        return (metadata["task"] or {}).get("prompt"), metadata["card"]

    for number in (0, 3):
        (folders[number] / "task.json").write_text(json.dumps({"prompt": f"{number} {{input}}"}))
    for number in (1, 2):
        (folders[number] / "README.md").unlink()
    first = registry.publish_now("a", folders[0]).version
    for number in (1, 2):
        assert registry.publish_now("a", folders[number]).created and inherited() == ("0 {input}", "card 0")
    changes = list(registry._observer.changes)
    assert not registry.publish_now("a", folders[2]).created and inherited() == ("0 {input}", "card 0")
    assert registry._observer.changes == changes, "nothing has changed"
    registry.publish_now("a", folders[4])
    assert inherited() == ("0 {input}", "card 4")
    registry.publish_now("a", folders[3])
    assert inherited() == ("3 {input}", "card 3")
    asyncio.run(registry.roll_back("a", digest_of(folders[2])))
    assert inherited() == ("0 {input}", "card 0")
    registry.retire_now("a")
    assert registry.publish_now("a", folders[2]).version != first and inherited() == (None, None)


def test_new_metadata_of_the_same_content_is_a_change(registry: Registry, folders: list[Path]) -> None:
    version = registry.publish_now("a", folders[0]).version
    registry.publish_now("b", folders[0])
    (folders[0] / "README.md").write_text("another")
    assert not registry.publish_now("a", folders[0]).created
    assert registry.metadata("a")["card"] == "another" and registry.metadata("b")["card"] == "card 0"
    assert registry._observer.changes == [("a", version.label), ("b", f"b@{version.digest[:12]}"), ("a", version.label)]


def test_compare_and_set(registry: Registry, folders: list[Path]) -> None:
    for expected in ("*", "a@" + "0" * 12):
        with pytest.raises(VersionMismatch):
            registry.publish_now("a", folders[0], if_match=expected)
    label = registry.publish_now("a", folders[0]).version.label
    for wrong in ("a@" + "0" * 12, label.replace("a@", "b@")):
        with pytest.raises(VersionMismatch, match=label):
            registry.publish_now("a", folders[1], if_match=wrong)
    label = registry.publish_now("a", folders[1], if_match=label).version.label
    registry.publish_now("a", folders[2], if_match=digest_of(folders[1]))
    registry.publish_now("a", folders[3], if_match="*")
    with pytest.raises(VersionMismatch):
        asyncio.run(registry.retire("a", if_match=label))


def test_one_of_several_concurrent_publishes_wins_compare_and_set(registry: Registry, folders: list[Path]) -> None:
    label = registry.publish_now("a", folders[0]).version.label

    async def race() -> list[object]:
        tries = (registry.publish("a", folder, if_match=label) for folder in folders[1:5])
        return await asyncio.gather(*tries, return_exceptions=True)

    results = asyncio.run(race())
    won = [r for r in results if not isinstance(r, Exception)]
    assert len(won) == 1 and all(isinstance(r, VersionMismatch) for r in results if r is not won[0])
    assert stored(registry) == {digest_of(folders[0]), registry.current("a").digest}


@pytest.mark.parametrize("name", ["", "a,b", "../a", "a/b", "é", "-a", ".a", "a" * 65, "base", "other", "none", "mine"])
def test_invalid_and_reserved_names_are_refused(open_registry: Open, folders: list[Path], name: str) -> None:
    with pytest.raises(InvalidAdapter):
        open_registry(reserved=["mine"]).publish_now(name, folders[0])


def test_a_name_reserved_for_the_base_is_served_again_with_another_base(
    open_registry: Open, folders: list[Path]
) -> None:
    version = open_registry().publish_now("mine", folders[0]).version
    second = open_registry(reserved=["mine"])
    assert second.names() == [] and "reserved for the served base" in second.rejected()[0]["reason"]
    with pytest.raises(UnknownAdapter):
        second.current("mine")
    assert open_registry().current("mine") == version


@pytest.mark.parametrize(("key", "value"), [("bias", "all"), ("bias", None), ("kasa_config", {})])
def test_stored_adapters_are_read_by_the_rules_they_were_accepted_by(
    open_registry: Open, folders: list[Path], monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    (folders[0] / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with monkeypatch.context() as older:
        older.setattr("adapters.peft_config.NEUTRAL", peft_config.STORED)
        version = open_registry().publish_now("a", folders[0]).version
    registry = open_registry()
    with registry.lease([("a", 1.0)]) as lease:
        assert [w.digest for w in fetched(registry, lease.mix)] == [version.digest] and registry.rejected() == []
    with pytest.raises(UnsupportedAdapter, match=f"{key} = {value!r} is not served"):
        registry.publish_now("b", folders[0])


def test_bad_content_is_refused_and_changes_nothing(
    open_registry: Open, folders: list[Path], write_adapter: Write, tiny_shapes: Any
) -> None:
    registry = open_registry(max_rank=4)
    registry.publish_now("a", folders[0])
    before, bad = registry.describe("a"), folders[1]
    tensors = bad / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(InvalidAdapter, match="damaged"):
        registry.publish_now("a", bad)
    tensors.unlink()
    with pytest.raises(InvalidAdapter, match="is missing"):
        registry.publish_now("a", bad)
    (bad / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedAdapter, match="pickle"):
        registry.publish_now("a", bad)
    write_adapter(folders[2], 2, rank=5)
    with pytest.raises(InvalidAdapter, match="rank 5"):
        registry.publish_now("a", folders[2])
    with pytest.raises(InvalidAdapter):
        registry.publish_now("a", folders[3] / "nothing")
    assert registry.describe("a") == before and stored(registry) == {digest_of(folders[0])}
    assert not list((registry._store.root / "incoming").iterdir())
    with pytest.raises(BaseMismatch):
        open_registry(shapes=dict.fromkeys(tiny_shapes, (8, 8))).publish_now("b", folders[0])


def test_the_stored_copy_is_served_not_the_source_folder(registry: Registry, folders: list[Path]) -> None:
    version = registry.publish_now("a", folders[0]).version
    with registry.lease([("a", 1.0)]) as lease:
        shutil.rmtree(folders[0])
        registry.publish_now("a", folders[1])
        assert [w.digest for w in fetched(registry, lease.mix)] == [version.digest]


def test_prepared_weights_are_cached_and_measured(open_registry: Open, folders: list[Path]) -> None:
    def prepare(weights: LoraWeights) -> LoraWeights:
        modules = {p: m._replace(A=m.A.bfloat16(), B=m.B.bfloat16()) for p, m in weights.modules.items()}
        return replace(weights, modules=modules)

    registry = open_registry(prepare=prepare)
    registry.publish_now("a", folders[0])
    with registry.lease([("a", 1.0)]) as lease:
        (weights,) = fetched(registry, lease.mix)
    assert registry.describe("a")["bytes"] == weights.nbytes == size_of(folders[0]) // 2


def test_the_folder_limit_is_a_multiple_of_the_ram_budget(open_registry: Open, tmp_path: Path) -> None:
    shapes = {f"m{i}": (1024, 1024) for i in range(4)}
    modules = {path: LowRank(torch.ones(64, 1024), torch.ones(1024, 64), 1.0) for path in shapes}
    save(with_digest("a", modules), tmp_path / "a")
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size

    def prepare(weights: LoraWeights) -> LoraWeights:
        codes = {path: m._replace(A=m.A.to(torch.int8), B=m.B.to(torch.int8)) for path, m in weights.modules.items()}
        return replace(weights, modules=codes)

    registry = open_registry(shapes=shapes, ram_bytes=size // 4 + 1000, prepare=prepare)
    assert registry.publish_now("a", tmp_path / "a").created
    with pytest.raises(NoRoom, match="more than can be served"):
        open_registry(shapes=shapes, ram_bytes=size // 4 - 1000, prepare=prepare).publish_now("b", tmp_path / "a")


# Disk and database errors


@pytest.mark.parametrize("where", ["copy", "catalog"])
def test_a_failed_write_changes_nothing(
    registry: Registry, folders: list[Path], catalog: FailingCatalog, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish_now("a", folders[0])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space", "/secret")

    with monkeypatch.context() as patch:
        if where == "copy":
            patch.setattr("adapters.store._copy", full)
        catalog.full = where == "catalog"
        for name in ("a", "b"):
            with pytest.raises(StoreFailed, match="is full; nothing was changed"):
                registry.publish_now(name, folders[1])
        if where == "catalog":
            with pytest.raises(StoreFailed):
                registry.retire_now("a")
            with pytest.raises(StoreFailed):
                asyncio.run(registry.pin("a"))
    assert registry.names() == ["a"] and registry.current("a").digest == digest_of(folders[0])
    assert stored(registry) == {digest_of(folders[0])} and not registry.describe("a")["pinned"]
    catalog.full = False
    assert registry.publish_now("a", folders[1]).created


def test_a_failing_observer_does_not_keep_memory(open_registry: Open, folders: list[Path]) -> None:
    class Failing(Events):
        def on_change(self, name: str, version: Version | None) -> None:
            if version is None:
                raise ValueError("observer")

    registry = open_registry(observer=Failing())
    device = registry.slots = Device()
    old = registry.publish_now("a", folders[0]).version
    with registry.lease([("a", 1.0)]) as lease:
        device.views[old.digest] = fetched(registry, lease.mix)[0]
    with pytest.raises(ValueError, match="observer"):
        registry.retire_now("a")
    assert registry.names() == [] and not device.views and old.digest not in stored(registry)


async def test_a_damaged_version_is_reported_and_repaired_by_publishing_it_again(
    registry: Registry, folders: list[Path]
) -> None:
    version = (await registry.publish("a", folders[0])).version
    new = (await registry.publish("b", folders[1])).version
    damage(registry, version.digest)
    with registry.lease([("a", 1.0)]) as lease:
        with pytest.raises(StoreFailed, match="changed on disk; publish it again"):
            fetched(registry, lease.mix)
        assert tiers(registry)["a"] == "disk" and "changed on disk" in registry.describe("a")["notes"][-1]
        assert registry.load_failed("a") and registry.load_failed(version.label)
        assert not registry.load_failed("nobody") and not registry.load_failed("b")
        assert registry._observer.loads[-1] == ("a", "failed")
        assert not (await registry.publish("a", folders[0])).created
        assert registry.describe("a")["notes"] == [] and not registry.load_failed("a")
        registry._ram.discard(version.digest)
        assert fetched(registry, lease.mix)[0].digest == version.digest
    with registry.lease([("b", 1.0)]) as lease:
        (view,) = fetched(registry, lease.mix)
        shutil.rmtree(registry._store.path(new.digest))
        assert fetched(registry, lease.mix)[0].digest == new.digest, "it is still in RAM"
        del view
        registry._ram.discard(new.digest)
        with pytest.raises(StoreFailed):
            fetched(registry, lease.mix)


def test_a_missing_current_version_does_not_fall_back_to_an_older_one(
    open_registry: Open, folders: list[Path], catalog: FailingCatalog
) -> None:
    registry = open_registry()
    for folder in folders[:2]:
        registry.publish_now("a", folder)
    first, lost = (digest_of(folder) for folder in folders[:2])
    shutil.rmtree(registry._store.path(lost))
    again = open_registry()
    assert again.names() == [] and "missing from the store" in again.rejected()[0]["reason"]
    assert again.rejected(faults=True) == again.rejected()
    with pytest.raises(UnknownAdapter, match="is missing"):
        again.resolve([("a", 1.0)])
    with pytest.raises(UnknownAdapter, match="no version"):
        again.resolve([(f"a@{lost[:12]}", 1.0)])
    assert again.resolve([(f"a@{first[:12]}", 1.0)])[0][0].digest == first
    catalog.full = True
    with pytest.raises(StoreFailed):
        again.publish_now("b", folders[1])
    catalog.full = False
    again = open_registry()
    assert again.current("a").digest == lost and not again.rejected()
    shutil.rmtree(again._store.path(lost))
    again = open_registry()
    assert asyncio.run(again.roll_back("a", first[:12])).version.digest == first
    assert again.current("a").digest == first == open_registry().current("a").digest


@pytest.mark.parametrize("fails", [True, False])
def test_a_version_deleted_during_its_load_leaves_nothing(
    open_registry: Open, folders: list[Path], caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def read(path: Path, *, stored: bool = False, **how: Any) -> LoraWeights:
        weights = None if stored and fails else read_folder(path, stored=stored, **how)
        if stored:
            started.set()
            assert go_on.wait(60)
        return weights or read_folder(path, stored=stored, **how)

    registry = open_registry(read=read)
    version = registry.publish_now("a", folders[0]).version
    registry._ram.discard(version.digest)
    with registry.lease([("a", 1.0)]) as lease:
        fetch = registry.fetch(lease.mix)
        assert started.wait(60)
        fetch.cancel()
    registry.retire_now("a")
    go_on.set()
    until(lambda: not registry._ram._loading and not registry._ram._callbacks)
    assert not any((registry._ram._sizes, registry._load_errors, registry._store.damaged, registry._store._sizes))
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert ("other", "failed") not in registry._observer.loads


# Leases


def test_a_lease_keeps_the_requested_order_and_the_canonical_mix(registry: Registry, folders: list[Path]) -> None:
    a = registry.publish_now("a", folders[0]).version
    b = registry.publish_now("b", folders[1]).version
    twin = registry.publish_now("twin", folders[0]).version
    lease = registry.lease([("b", 0.5), (f"a@{a.digest[:6].upper()}", 0.25), ("twin", 0.5)])
    assert lease.versions == [(b, 0.5), (a, 0.25), (twin, 0.5)]
    assert lease.mix.entries == tuple(sorted([(a.digest, 0.75), (b.digest, 0.5)]))
    assert [w.digest for w in fetched(registry, lease.mix)] == list(lease.mix.digests)
    assert [d["leases"] for d in registry.list()] == [1, 1, 1]
    lease.release()
    lease.release()
    assert [d["leases"] for d in registry.list()] == [0, 0, 0] and registry.memory()["leases"] == 0
    assert registry.lease([]).mix.entries == ()


def test_a_clone_keeps_versions_of_a_retired_name(registry: Registry, folders: list[Path]) -> None:
    version = registry.publish_now("a", folders[0]).version
    lease = registry.lease([("a", 1.0)])
    registry.retire_now("a")
    clone = lease.clone()
    assert clone.versions == lease.versions == [(version, 1.0)] and clone.mix == lease.mix
    lease.release()
    lease.release()
    assert [w.digest for w in fetched(registry, clone.mix)] == [version.digest] and stored(registry)
    third = clone.clone()
    clone.release()
    assert registry.memory()["leases"] == 1
    third.release()
    assert registry.memory()["leases"] == 0
    for released in (lease, clone, third):
        with pytest.raises(UnknownAdapter, match="released"):
            released.clone()
    registry.publish_now("b", folders[1])
    assert stored(registry) == {digest_of(folders[1])}


def test_invalid_choices_hold_nothing(registry: Registry, folders: list[Path]) -> None:
    a = registry.publish_now("a", folders[0]).version
    for choice, error in [
        ([("x", 1.0)], UnknownAdapter),
        ([("a@000000000000", 1.0)], UnknownAdapter),
        ([("x@" + a.digest, 1.0)], UnknownAdapter),
        ([("", 1.0)], UnknownAdapter),
        ([(f"a@{a.digest[:5]}", 1.0)], InvalidChoice),
        ([("a@", 1.0)], InvalidChoice),
        ([("a", 1.0), (a.label, 1.0)], InvalidChoice),
        ([("a", float("nan"))], InvalidChoice),
        ([("a", 1e308)], InvalidChoice),
    ]:
        for call in (registry.lease, registry.mix):
            with pytest.raises(error):
                call(choice)
    assert registry.memory()["leases"] == 0


def test_a_mix_over_the_budget_is_refused(open_registry: Open, folders: list[Path], write_adapter: Write) -> None:
    registry = open_registry(ram_bytes=2 * size_of(folders[0]))
    for name, folder in zip("abc", folders, strict=False):
        registry.publish_now(name, folder)
    with registry.lease([("a", 1.0), ("b", 1.0)]) as lease:
        assert registry.mix([("b", 1.0), ("a", 1.0)]) == lease.mix
    for call in (registry.lease, registry.mix):
        with pytest.raises(NoRoom, match="the mix takes"):
            call([("a", 1.0), ("b", 1.0), ("c", 1.0)])
    asyncio.run(registry.pin("c"))
    for call in (registry.lease, registry.mix):
        with pytest.raises(NoRoom, match="pinned"):
            call([("a", 1.0), ("b", 1.0)])
    registry.lease([("a", 1.0), ("c", 1.0)]).release()
    write_adapter(folders[3], 3, rank=5)
    with pytest.raises(NoRoom, match="--adapter-ram"):
        registry.publish_now("a", folders[3])
    assert registry.current("a").digest == digest_of(folders[0])


def test_a_request_keeps_its_version_and_the_old_one_is_freed(registry: Registry, folders: list[Path]) -> None:
    device = registry.slots = Device()
    old = registry.publish_now("a", folders[0]).version
    lease = registry.lease([("a", 1.0)])
    new = registry.publish_now("a", folders[1]).version
    assert registry.describe("a")["leases"] == 1 and registry.describe("a")["versions"][1]["leases"] == 1
    registry._ram.discard(old.digest)
    device.views[old.digest] = fetched(registry, lease.mix)[0]
    assert device.views[old.digest].digest == old.digest and old.digest in registry._ram.resident()
    lease.release()
    until(lambda: old.digest not in registry._ram.resident())
    assert not device.views and stored(registry) == {old.digest, new.digest}, "kept for a rollback"
    loads = len(registry._observer.loads)
    for _ in range(3):
        with registry.lease([(old.label, 1.0)]) as lease:
            assert fetched(registry, lease.mix)[0].digest == old.digest
    assert len(registry._observer.loads) == loads + 1, "an exact old version stays in memory"


def test_a_lease_keeps_a_version_that_left_the_history(registry: Registry, folders: list[Path]) -> None:
    old = registry.publish_now("a", folders[0]).version
    lease = registry.lease([("a", 1.0)])
    for folder in folders[1:5]:
        registry.publish_now("a", folder)
    with pytest.raises(UnknownAdapter):
        registry.lease([(old.label, 1.0)])
    assert old.digest in stored(registry) and fetched(registry, lease.mix)[0].digest == old.digest
    lease.release()
    until(lambda: stored(registry) == {digest_of(folder) for folder in folders[2:5]})
    until(lambda: old.digest not in registry._ram.resident())


# Roll back and retire


async def test_roll_back(registry: Registry, folders: list[Path]) -> None:
    versions = [(await registry.publish("a", folder)).version for folder in folders[:3]]
    with pytest.raises(VersionMismatch):
        await registry.roll_back("a", versions[0].label, if_match=versions[1].label)
    back = await registry.roll_back("a", versions[0].label, if_match=versions[2].label)
    assert back.created and back.version == versions[0] and back.metadata["card"] == "card 0"
    assert registry.current("a") == versions[0] and back.description["leases"] == 0
    assert not (await registry.roll_back("a", versions[0].digest[:8])).created
    await registry.publish("a", folders[3])
    kept = [v["digest"] for v in registry.describe("a")["versions"]]
    assert kept == [digest_of(folders[3]), versions[0].digest, versions[2].digest]
    with pytest.raises(UnknownAdapter):
        await registry.roll_back("a", versions[1].label)
    await registry.publish("b", folders[4])
    with pytest.raises(AdapterConflict):
        await registry.roll_back("a", registry.current("b").label)
    with pytest.raises(UnknownAdapter):
        await registry.roll_back("zzz", versions[1].digest)
    damage(registry, versions[2].digest)
    with pytest.raises(StoreFailed, match="publish it again"):
        await registry.roll_back("a", versions[2].label)
    assert registry.current("a").digest == digest_of(folders[3])


async def test_versions_that_tasks_name_are_kept(registry: Registry, folders: list[Path]) -> None:
    first = (await registry.publish("a", folders[0])).version
    registry.referenced_versions = lambda name: [first.digest[:12]]
    versions = [(await registry.publish("a", folder)).version for folder in folders[1:4]]
    await registry.roll_back("a", versions[0].label)
    assert registry.current("a") == versions[0]
    assert registry.resolve([(first.label, 1.0)]) == [(first, 1.0)] and first.digest in stored(registry)


async def test_a_name_retired_during_a_rollback_stays_retired(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (await registry.publish("a", folders[0])).version
    await registry.publish("a", folders[1])
    monkeypatch.setattr(registry._ram, "offer", lambda weights: registry.retire_now("a"))
    with pytest.raises(UnknownAdapter):
        await registry.roll_back("a", old.label)
    assert registry.names() == [] and registry.memory()["leases"] == 0
    until(lambda: not stored(registry))


async def test_retire_frees_memory_and_disk_with_the_last_lease(registry: Registry, folders: list[Path]) -> None:
    device = registry.slots = Device()
    digest = (await registry.publish("a", folders[0])).version.digest
    await registry.publish("b", folders[1])
    lease = registry.lease([("a", 1.0), ("b", 1.0)])
    device.views[digest] = fetched(registry, Mix(((digest, 1.0),)))[0]
    description = await registry.retire("a")
    assert description["leases"] == 1 and description["name"] == "a"
    for call in (lambda: registry.lease([("a", 1.0)]), lambda: registry.describe("a"), lambda: registry.current("a")):
        with pytest.raises(UnknownAdapter):
            call()
    assert registry.names() == ["b"] and len(fetched(registry, lease.mix)) == 2 and digest in stored(registry)
    lease.release()
    until(lambda: stored(registry) == {digest_of(folders[1])} and not device.views)
    until(lambda: set(registry._ram.resident()) == stored(registry))
    assert registry._observer.changes[-1] == ("a", None)
    assert (await registry.publish("a", folders[0], create_only=True)).created, "the name is free"
    registry.tasks = lambda name: ["t"]
    with pytest.raises(AdapterConflict, match="these tasks route to"):
        await registry.retire("a")
    with pytest.raises(UnknownAdapter):
        await registry.retire("zzz")


async def test_a_retired_name_can_be_published_again_before_its_last_lease_ends(
    registry: Registry, folders: list[Path]
) -> None:
    await registry.publish("a", folders[0])
    lease = registry.lease([("a", 1.0)])
    await registry.retire("a")
    await registry.publish("a", folders[0])
    lease.release()
    with registry.lease([("a", 1.0)]) as lease:
        assert fetched(registry, lease.mix)
    await registry.publish("b", folders[1])
    assert digest_of(folders[0]) in stored(registry)


# Pins


async def test_a_pin_survives_publish_and_restart(open_registry: Open, folders: list[Path]) -> None:
    size = size_of(folders[0])
    registry = open_registry(ram_bytes=3 * size)
    for name, folder in zip("abcd", folders, strict=False):
        await registry.publish(name, folder)
    await registry.pin("a")
    assert registry.describe("a")["pinned"]
    await registry.publish("a", folders[4])
    until(lambda: tiers(registry)["a"] == "ram")
    for name in "bcd":
        await registry.prefetch(name)
    assert tiers(registry) == {"a": "ram", "b": "disk", "c": "ram", "d": "ram"}
    again = open_registry(ram_bytes=3 * size)
    again.start()
    until(lambda: tiers(again)["a"] == "ram")
    await again.unpin("a")
    assert not again.describe("a")["pinned"]
    for name in "bcd":
        await again.pin(name)
    assert tiers(again)["a"] == "disk"
    with pytest.raises(NoRoom, match="pinned"):
        await again.publish("c", write_double(folders[5]))
    with pytest.raises(NoRoom):
        await again.pin("a")
    assert (await again.retire("d"))["pinned"]
    await again.pin("a")


async def test_pins_over_a_smaller_budget_leave_room_for_others(open_registry: Open, folders: list[Path]) -> None:
    size = size_of(folders[0])
    registry = open_registry(ram_bytes=3 * size)
    for name, folder in zip("abcd", folders, strict=False):
        await registry.publish(name, folder)
    for name in "abc":
        await registry.pin(name)
    again = open_registry(ram_bytes=2 * size)
    again.start()
    for name in "ab":
        again.lease([(name, 1.0)]).release()
    await again.unpin("b")
    await again.unpin("c")
    again.lease([("d", 1.0)]).release()


@pytest.mark.parametrize("repair", ["request", "publish"])
async def test_a_pin_whose_load_failed_holds_once_the_adapter_is_loaded(
    open_registry: Open, folders: list[Path], repair: str, caplog: pytest.LogCaptureFixture
) -> None:
    size = size_of(folders[0])
    registry = open_registry(ram_bytes=2 * size)
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    await registry.pin("a")
    tensors = registry._store.path(registry.current("a").digest) / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    again = open_registry(ram_bytes=2 * size)
    tensors.write_bytes(whole[:-7])
    again.start()
    until(lambda: "the pinned adapter 'a' is not in memory" in caplog.text)
    if repair == "request":
        tensors.write_bytes(whole)
        await again.prefetch("a")
    else:
        assert not (await again.publish("a", folders[0])).created
    for name in "bc":
        await again.prefetch(name)
    assert tiers(again) == {"a": "ram", "b": "disk", "c": "ram"}


async def test_a_pinned_adapter_needs_no_room_beside_its_own_versions(open_registry: Open, folders: list[Path]) -> None:
    registry = open_registry(ram_bytes=size_of(folders[0]))
    old = (await registry.publish("a", folders[0])).version
    await registry.pin("a")
    new = (await registry.publish("a", folders[1])).version
    await registry.pin("a")
    assert registry.current("a") == new and registry.describe("a")["pinned"]
    with pytest.raises(NoRoom):
        registry.lease([(old.label, 1.0)])
    assert (await registry.roll_back("a", old.digest)).version == old
    assert registry.current("a") == old and registry.describe("a")["pinned"]


async def test_a_version_published_while_a_pin_loads_is_the_pinned_one(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await registry.publish("a", folders[0])
    fetch: Callable[..., Any] = registry.fetch

    def fetch_and_publish(mix: Any) -> Any:
        monkeypatch.undo()
        found = fetch(mix)
        registry.publish_now("a", folders[1])
        return found

    monkeypatch.setattr(registry, "fetch", fetch_and_publish)
    await registry.pin("a")
    until(lambda: digest_of(folders[1]) in registry._ram.resident())
    assert registry._ram._kept == {digest_of(folders[1])}


# Several bases and limits


async def test_versions_for_other_bases_are_kept_and_not_served(
    open_registry: Open, folders: list[Path], tiny_shapes: Any, tmp_path: Path
) -> None:
    wide = dict.fromkeys(tiny_shapes, (8, 8))
    registry = open_registry()
    for folder in folders[:3]:
        await registry.publish("a", folder)
    other = open_registry(shapes=wide)
    assert other.list() == [] and "another base" in other.rejected()[0]["reason"]
    assert other.rejected(faults=True) == []
    with pytest.raises(UnknownAdapter, match="another base"):
        other.lease([("a", 1.0)])
    for seed in range(5):
        torch.manual_seed(seed)
        modules = {path: LowRank(torch.randn(2, 8), torch.randn(8, 2), 2.0) for path in tiny_shapes}
        save(with_digest("a", modules), tmp_path / f"other-{seed}")
        await other.publish("a", tmp_path / f"other-{seed}")
    assert len(other.describe("a")["versions"]) == 3
    again = open_registry()
    assert len(again.describe("a")["versions"]) == 3 and again.current("a").digest == digest_of(folders[2])
    await again.publish("a", folders[3])
    assert [v["digest"] for v in again.describe("a")["versions"]] == [digest_of(folders[i]) for i in (3, 2, 1)]
    assert len(open_registry(shapes=wide).describe("a")["versions"]) == 3


async def test_a_rank_limit_does_not_bring_back_an_older_version(
    open_registry: Open, folders: list[Path], write_adapter: Write
) -> None:
    write_adapter(folders[1], 1, rank=8, card="card 1")
    registry = open_registry(max_rank=8)
    for folder in folders[:2]:
        await registry.publish("a", folder)
    assert open_registry(max_rank=8).current("a").digest == digest_of(folders[1])
    lower = open_registry(max_rank=4)
    assert lower.names() == [] and "rank 8 is over the limit of 4 (--max-rank)" in lower.rejected()[0]["reason"]
    first, large = (digest_of(folder)[:12] for folder in folders[:2])
    for text in ("a", f"a@{large}"):
        with pytest.raises(UnknownAdapter, match="over the limit of 4"):
            lower.resolve([(text, 1.0)])
    assert lower.resolve([(f"a@{first}", 1.0)])[0][0].digest == digest_of(folders[0])
    lower.tasks = lambda name: ["t"]
    with pytest.raises(AdapterConflict, match="these tasks route to"):
        await lower.retire("a")
    write_adapter(folders[2], 2, rank=3)
    (folders[2] / "README.md").unlink(missing_ok=True)
    await lower.publish("a", folders[2])
    assert lower.metadata("a")["card"] == "card 1"
    lowest = open_registry(max_rank=1)
    assert lowest.retire_now("a") == {"name": "a"} and not lowest.rejected() and not stored(lowest)


async def test_a_version_for_a_larger_base_is_not_judged_by_its_rank(
    open_registry: Open, folders: list[Path], tiny_shapes: Any, write_adapter: Write
) -> None:
    write_adapter(folders[1], 1, rank=8)
    fewer = {path: tiny_shapes[path] for path in sorted(tiny_shapes)[:-1]}
    small = read_folder(folders[0], name="a")
    save(with_digest("a", {path: small.modules[path] for path in fewer}), folders[2])
    await open_registry(shapes=fewer, max_rank=4).publish("a", folders[2])
    await open_registry(max_rank=8).publish("a", folders[1])
    again = open_registry(shapes=fewer, max_rank=4)
    assert again.names() == ["a"] and again.current("a").digest == digest_of(folders[2])


# Memory and threads


async def test_a_load_that_waits_for_room_asks_the_slots(open_registry: Open, folders: list[Path]) -> None:
    size = size_of(folders[0])
    registry = open_registry(ram_bytes=2 * size)
    device = registry.slots = Device()
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    with registry.lease([("a", 1.0), ("b", 1.0)]) as lease:
        device.views = {view.digest: view for view in fetched(registry, lease.mix)}
    assert list(tiers(registry).values()) == ["device", "device", "disk"]
    await asyncio.wait_for(registry.prefetch("c"), 10)
    assert device.asked and set(device.asked) == {size}
    assert sorted(tiers(registry).values()) == ["device", "disk", "ram"]
    assert registry.memory() == {"bytes": 2 * size, "budget": 2 * size, "versions": 2, "leases": 0}
    assert sorted(tier for _, tier in registry.sizes()) == ["device", "disk", "ram"]
    assert list(registry.sizes().values()) == [size, size, size] and registry._observer.evictions == 1


async def test_leased_versions_are_evicted_last(open_registry: Open, folders: list[Path]) -> None:
    registry = open_registry(ram_bytes=2 * size_of(folders[0]))
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    with registry.lease([("a", 1.0)]):
        for name in "abc":
            await registry.prefetch(name)
        assert tiers(registry) == {"a": "ram", "b": "disk", "c": "ram"} and registry._observer.evictions == 1


async def test_a_load_that_no_longer_fits_beside_new_pins_is_given_up(open_registry: Open, folders: list[Path]) -> None:
    registry = open_registry(ram_bytes=5 * size_of(folders[0]) // 2)
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    await registry.publish("big", write_double(folders[3]))
    with registry.lease([("a", 1.0), ("b", 1.0)]) as lease:
        held = await asyncio.to_thread(fetched, registry, lease.mix)
        waiting = asyncio.create_task(registry.prefetch("big"))
        await asyncio.sleep(0)
        until(lambda: registry._ram._waiting)
        await registry.pin("a")
        with pytest.raises(NoRoom, match="pinned"):
            await asyncio.wait_for(waiting, 30)
    del held
    await asyncio.wait_for(registry.prefetch("c"), 30)


def test_load_metrics_name_the_adapter_that_has_the_version(open_registry: Open, folders: list[Path]) -> None:
    registry = open_registry()
    for name, folder in (("a", folders[0]), ("a", folders[1]), ("b", folders[0])):
        registry.publish_now(name, folder)
    again = open_registry()
    asyncio.run(again.prefetch("b"))
    assert until(lambda: again._observer.loads) == [("b", "ok")]
    again.retire_now("b")
    assert again.catalog.name_of(digest_of(folders[0])) == "a" and again.catalog.name_of("0" * 64) == "other"


def test_the_event_loop_is_never_blocked(open_registry: Open, folders: list[Path]) -> None:
    gate = threading.Event()

    def slow(path: Path, **options: Any) -> LoraWeights:
        assert gate.wait(10)
        return read_folder(path, **options)

    registry = open_registry(read=slow)

    async def go() -> None:
        publishing = [asyncio.create_task(registry.publish(name, folders[0])) for name in ("a", "b")]
        start = time.perf_counter()
        for _ in range(20):
            await asyncio.sleep(0)
            assert registry.list() == [] and registry.rejected() == [] and registry.memory()["bytes"] == 0
        assert time.perf_counter() - start < 1
        gate.set()
        assert all(published.created for published in await asyncio.gather(*publishing))

    asyncio.run(go())


def test_a_closed_registry_refuses_writes_and_leaves_no_threads(open_registry: Open, folders: list[Path]) -> None:
    before = threading.active_count()
    registry = open_registry()
    registry.publish_now("a", folders[0])
    registry.publish_now("b", folders[1])
    lease = registry.lease([("a", 1.0)])
    view = fetched(registry, lease.mix)
    registry.retire_now("a")
    registry.close()
    with pytest.raises(StoreFailed, match="closed"):
        registry.publish_now("a", folders[0])
    with pytest.raises(StoreFailed, match="closed"):
        asyncio.run(registry.retire("a"))
    lease.release()
    del view
    until(lambda: threading.active_count() <= before)
    assert stored(open_registry()) == {digest_of(folders[1])}, "leftovers are removed at the next start"


@pytest.mark.usefixtures("no_fsync")
def test_concurrent_clients_get_exactly_what_they_leased(registry: Registry, folders: list[Path]) -> None:
    device = registry.slots = Device()
    contents = {digest_of(folder): read_folder(folder, name="x").modules for folder in folders}
    digests = list(contents)
    for name, folder in zip("ab", folders, strict=False):
        registry.publish_now(name, folder)
    stop, failures = threading.Event(), list[BaseException]()

    def client(seed: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            try:
                lease = registry.lease([("a", 1.0), ("b", -0.5)][: 1 + (seed + n) % 2])
            except UnknownAdapter:
                continue
            with lease:
                future = registry.fetch(lease.mix)
                if n % 5 == 0 and future.cancel():
                    continue
                for digest, weights in zip(lease.mix.digests, future.result(10), strict=True):
                    assert weights.digest == digest
                    assert all(torch.equal(m.A, contents[digest][p].A) for p, m in weights.modules.items())

    def publisher(_: int) -> None:
        for n in range(60):
            registry.publish_now("ab"[n % 2], folders[n % len(folders)])
            if n % 7 == 0:
                with suppress(UnknownAdapter):  # the other publisher was faster
                    registry.retire_now("a")
            if n % 11 == 0:
                registry._ram.discard(digests[n % len(digests)])

    def run(call: Callable[[int], None], seed: int) -> None:
        try:
            call(seed)
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=run, args=(client, seed)) for seed in range(6)]
    publishers = [threading.Thread(target=run, args=(publisher, seed)) for seed in range(2)]
    for thread in clients + publishers:
        thread.start()
    for thread in publishers:
        thread.join(60)
    stop.set()
    for thread in clients:
        thread.join(60)
    assert not any(thread.is_alive() for thread in clients + publishers)
    assert not failures and registry.memory()["leases"] == 0 and not device.views
    registry.publish_now("c", folders[0])
    assert stored(registry) == set(registry.catalog.digests)
    gc.collect()
    until(lambda: registry._ram.held == 0)


def test_two_thousand_cycles_leave_nothing_behind(
    tmp_path: Path, folders: list[Path], tiny_shapes: dict[str, tuple[int, int]]
) -> None:
    """Runs in its own process, so that the memory of other tests is not measured."""
    script = Path(__file__).with_name("cycles.py")
    given = {"store": str(tmp_path / "store"), "folders": [str(f) for f in folders], "shapes": tiny_shapes}
    done = subprocess.run(
        [sys.executable, "-W", "error", script, json.dumps(given)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before = found["before"]
    assert found["after"] == before
    assert before["leases"] == before["ram"] == before["stored"] == before["kept"] == 0
    samples = found["memory"]  # every 20 cycles
    grown = statistics.median(samples[-30:]) - statistics.median(samples[10:40])
    assert grown < 2 << 20, f"resident memory grew by {grown} bytes"


def test_load_errors_keep_no_tensors(registry: Registry, folders: list[Path]) -> None:
    def live_tensors() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    version = registry.publish_now("a", folders[0]).version
    registry._ram.discard(version.digest)
    (registry._store.path(version.digest) / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    before = live_tensors()
    with registry.lease([("a", 1.0)]) as lease:
        errors = [registry.fetch(lease.mix).exception(10) for _ in range(5)]
    assert all(isinstance(error, AdapterError) and error.__traceback__ is None for error in errors)
    assert live_tensors() == before
