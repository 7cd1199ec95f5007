"""The registry: names move, leases hold, memory and disk come back."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import peft_config
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
from adapters.protocols import NoSlots, Observer
from adapters.registry import Registry
from adapters.store import AdapterStore, Disk
from adapters.weights import LoraWeights, LowRank, Mix, Version, with_digest
from tests.waiting import until

Write = Callable[..., LoraWeights]
Open = Callable[..., Registry]
ROOM = 1 << 20


class Heard(Observer):
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
    """An engine's slots that keep what they were given until they are told to forget it."""

    def __init__(self) -> None:
        self.kept: dict[str, LoraWeights] = {}
        self.asked: list[int] = []

    def holds(self, digest: str) -> bool:
        return digest in self.kept

    def unload(self, digest: str) -> None:
        self.kept.pop(digest, None)

    def release_idle(self, nbytes: int) -> None:
        self.asked.append(nbytes)
        while self.kept and nbytes > 0:
            nbytes -= self.kept.pop(next(iter(self.kept))).nbytes


@pytest.fixture
def open_registry(tmp_path: Path, tiny_shapes: dict[str, tuple[int, int]]) -> Iterator[Open]:
    """`open_registry(**options)`: a registry over the same folder each time; the one before is closed."""
    opened: list[Registry] = []

    def make(disk: Disk | None = None, **options: Any) -> Registry:
        for before in opened:
            before.close()
        store = AdapterStore(tmp_path / "store", disk=disk)
        opened[:] = [Registry(store, **{"shapes": tiny_shapes, "ram_bytes": ROOM, "observer": Heard(), **options})]
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


def fetched(registry: Registry, mix: Mix) -> tuple[LoraWeights, ...]:
    return registry.fetch(mix).result(10)


def stored(registry: Registry) -> set[str]:
    return {path.name for path in (registry._store.root / "versions").iterdir()}


class Between(Disk):
    """Calls `then` when a journal is written, before its names are everybody's."""

    then: Callable[[], object] = staticmethod(lambda: None)

    def sync(self, folder: Path) -> None:
        super().sync(folder)
        self.then()


def test_names_by_source_are_told_while_one_goes(open_registry: Open, folders: list[Path]) -> None:
    registry, told = open_registry(disk := Between()), list[list[str]]()
    registry.publish_now("a", folders[0])
    disk.then = lambda: told.append(registry.names("api"))
    registry.retire_now("a")
    assert told == [["a"]] and registry.names("api") == []


# Publishing


def test_publish_again_and_other_content(registry: Registry, folders: list[Path]) -> None:
    first = registry.publish_now("a", folders[0])
    assert first.created and first.version == Version("a", digest_of(folders[0]))
    assert first.metadata["honoured"] and first.metadata["card"] == "card 0"
    assert not registry.publish_now("a", folders[0], create_only=True).created
    with pytest.raises(AdapterConflict):
        registry.publish_now("a", folders[1], create_only=True)
    assert registry.current("a") == first.version
    open_files = len(os.listdir("/proc/self/fd"))
    second = registry.publish_now("a", folders[1])
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert second.created and registry.current("a") == second.version
    assert registry._observer.changes == [("a", first.version.label), ("a", second.version.label)]


def test_what_a_publish_does_not_bring_the_name_keeps(registry: Registry, folders: list[Path]) -> None:
    def told() -> tuple[Any, Any]:
        metadata = registry.metadata("a")
        return (metadata["task"] or {}).get("prompt"), metadata["card"]

    for number in (0, 3):
        (folders[number] / "task.json").write_text(json.dumps({"prompt": f"{number} {{input}}"}))
    for number in (1, 2):
        (folders[number] / "README.md").unlink()
    first = registry.publish_now("a", folders[0]).version
    for number in (1, 2):
        assert registry.publish_now("a", folders[number]).created and told() == ("0 {input}", "card 0")
    heard = list(registry._observer.changes)
    assert not registry.publish_now("a", folders[2]).created and told() == ("0 {input}", "card 0")
    assert registry._observer.changes == heard, "nothing has changed"
    registry.publish_now("a", folders[3])
    assert told() == ("3 {input}", "card 3")
    registry.publish_now("a", folders[4])
    assert told() == ("3 {input}", "card 4"), "each by itself"
    asyncio.run(registry.roll_back("a", digest_of(folders[2])))
    assert told() == ("0 {input}", "card 0"), "what that version had"
    registry.retire_now("a")
    assert registry.publish_now("a", folders[2]).version != first and told() == (None, None)


def test_compare_and_set(registry: Registry, folders: list[Path]) -> None:
    for expected in ("*", "a@" + "0" * 12):
        with pytest.raises(VersionMismatch):
            registry.publish_now("a", folders[0], if_match=expected)
    label = registry.publish_now("a", folders[0]).version.label
    with pytest.raises(VersionMismatch, match=label):
        registry.publish_now("a", folders[1], if_match="a@" + "0" * 12)
    with pytest.raises(VersionMismatch):
        registry.publish_now("a", folders[1], if_match=label.replace("a@", "b@"))
    label = registry.publish_now("a", folders[1], if_match=label).version.label
    registry.publish_now("a", folders[2], if_match=digest_of(folders[1]))
    registry.publish_now("a", folders[3], if_match="*")
    with pytest.raises(VersionMismatch):
        asyncio.run(registry.retire("a", if_match=label))


def test_of_two_that_expect_the_same_version_one_wins(registry: Registry, folders: list[Path]) -> None:
    label = registry.publish_now("a", folders[0]).version.label

    async def race() -> list[object]:
        return await asyncio.gather(
            *(registry.publish("a", folder, if_match=label) for folder in folders[1:5]), return_exceptions=True
        )

    results = asyncio.run(race())
    won = [r for r in results if not isinstance(r, Exception)]
    assert len(won) == 1 and all(isinstance(r, VersionMismatch) for r in results if r is not won[0])
    assert stored(registry) == {digest_of(folders[0]), registry.current("a").digest}


@pytest.mark.parametrize("name", ["", "a,b", "../a", "a/b", "é", "-a", ".a", "a" * 65, "base", "other", "none", "mine"])
def test_names_that_nobody_may_have(open_registry: Open, folders: list[Path], name: str) -> None:
    with pytest.raises(InvalidAdapter):
        open_registry(reserved=["mine"]).publish_now(name, folders[0])


def test_a_name_that_another_base_has_taken_waits_until_that_goes(open_registry: Open, folders: list[Path]) -> None:
    """As an adapter is merged, and the whole model served under its name."""
    first = open_registry()
    version = first.publish_now("mine", folders[0]).version
    first.close()
    second = open_registry(reserved=["mine"])
    assert second.names() == [] and "reserved: the base that is served has it" in second.rejected()[0]["reason"]
    with pytest.raises(UnknownAdapter):
        second.current("mine")
    second.close()
    assert open_registry().current("mine") == version


def test_whoever_hears_of_a_change_and_fails_keeps_nothing_from_being_freed(
    open_registry: Open, folders: list[Path]
) -> None:
    class Failing(Heard):
        fails = False

        def on_change(self, name: str, version: Version | None) -> None:
            if self.fails:
                raise ValueError("a fault of its own")

    observer = Failing()
    registry = open_registry(observer=observer)
    registry.slots = device = Device()
    old = registry.publish_now("a", folders[0]).version
    device.kept[old.digest] = None  # type: ignore[assignment]
    observer.fails = True
    with pytest.raises(ValueError, match="a fault of its own"):
        registry.retire_now("a")
    assert registry.names() == [] and not device.kept and old.digest not in stored(registry) and not registry._drains


@pytest.mark.parametrize(("key", "value"), [("bias", "all"), ("bias", None), ("kasa_config", {})])
def test_what_was_taken_by_other_rules_is_read_by_those(
    open_registry: Open, folders: list[Path], monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    """`bias` said more than there is, or nothing, once, and an empty table was none; what was published then is served
    on, and refused when it comes anew."""
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    (folders[0] / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with monkeypatch.context() as then:
        then.setattr("adapters.peft_config.NEUTRAL", peft_config.STORED)
        first = open_registry()
        version = first.publish_now("a", folders[0]).version
        first.close()
    registry = open_registry()
    with registry.lease([("a", 1.0)]) as lease:
        [weights] = registry.fetch(lease.mix).result(30)
        assert weights.digest == version.digest and registry.rejected() == []
        del weights
    with pytest.raises(UnsupportedAdapter, match=f"{key} = {value!r} is not served"):
        registry.publish_now("b", folders[0])


def test_bad_content_is_refused_and_changes_nothing(
    open_registry: Open, folders: list[Path], write_adapter: Write
) -> None:
    registry = open_registry(max_rank=4)
    registry.publish_now("a", folders[0])
    before, bad = registry.describe("a"), folders[1]
    tensors = (bad / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(tensors[:-8])
    with pytest.raises(InvalidAdapter, match="damaged"):
        registry.publish_now("a", bad)
    (bad / "adapter_model.safetensors").unlink()
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
    assert registry.describe("a") == before
    assert stored(registry) == {digest_of(folders[0])}
    assert not list((registry._store.root / "incoming").iterdir())


def test_another_bases_adapter_is_refused(open_registry: Open, folders: list[Path], tiny_shapes: Any) -> None:
    registry = open_registry(shapes=dict.fromkeys(tiny_shapes, (8, 8)))
    with pytest.raises(BaseMismatch):
        registry.publish_now("a", folders[0])


def test_stored_adapters_of_another_base_are_set_aside_until_it_is_back(
    open_registry: Open, folders: list[Path], tiny_shapes: Any
) -> None:
    registry = open_registry()
    registry.publish_now("a", folders[0])
    other = open_registry(shapes=dict.fromkeys(tiny_shapes, (8, 8)))
    assert other.list() == [] and "another base" in other.rejected()[0]["reason"]
    assert other.rejected(faults=True) == [], "one store can serve several bases"
    with pytest.raises(UnknownAdapter, match="another base"):
        other.lease([("a", 1.0)])
    again = open_registry()
    assert again.names() == ["a"] and again.rejected() == []
    lower = open_registry(max_rank=1)
    assert "--max-rank" in lower.rejected()[0]["reason"]
    assert asyncio.run(lower.retire("a")).description == {"name": "a"}
    assert not lower.rejected() and not stored(lower)


class FullDisk(Disk):
    def __init__(self) -> None:
        self.full: set[str] = set()

    def copy(self, source: int, target: Path, limit: int) -> int:
        if "copy" in self.full:
            raise OSError(errno.ENOSPC, "no space", str(target))
        return super().copy(source, target, limit)

    def write(self, path: Path, content: bytes) -> None:
        if path.name.split(".")[0] in self.full:
            raise OSError(errno.ENOSPC, "no space", str(path))
        super().write(path, content)


def test_another_card_is_told_of_though_the_disk_is_full_by_then(open_registry: Open, folders: list[Path]) -> None:
    disk = FullDisk()
    registry = open_registry(disk=disk)
    version = registry.publish_now("a", folders[0], source="watch", imported=("watch/a", ())).version
    (folders[0] / "README.md").write_text("another")
    disk.full = {"names"}
    taken = ("watch/a", (("README.md", 1, 2, 3, 4),))
    with pytest.raises(StoreFailed):
        registry.publish_now("a", folders[0], source="watch", imported=taken)
    disk.full = set()
    registry.publish_now("a", folders[0], source="watch", imported=taken)
    assert registry.metadata("a")["card"] == "another"
    assert registry._observer.changes == [("a", version.label)] * 2, "who reads its task hears of it once"


@pytest.mark.parametrize("where", ["copy", "record", "names"])
def test_a_full_disk_fails_the_one_who_publishes(open_registry: Open, folders: list[Path], where: str) -> None:
    disk = FullDisk()
    registry = open_registry(disk=disk)
    registry.publish_now("a", folders[0])
    disk.full = {where}
    for name in ("a", "b"):
        with pytest.raises(StoreFailed, match="the disk is full; nothing was changed"):
            registry.publish_now(name, folders[1])
    assert registry.names() == ["a"] and registry.current("a").digest == digest_of(folders[0])
    assert stored(registry) == {digest_of(folders[0])}
    if where == "names":
        with pytest.raises(StoreFailed):
            registry.retire_now("a")
        with pytest.raises(StoreFailed):
            asyncio.run(registry.pin("a"))
        assert not registry.describe("a")["pinned"]
    with registry.lease([("a", 1.0)]) as lease:
        assert fetched(registry, lease.mix)
    disk.full = set()
    assert registry.publish_now("a", folders[1]).created


def test_over_the_budget_is_refused_and_the_old_version_serves_on(
    open_registry: Open, folders: list[Path], write_adapter: Write
) -> None:
    size = read_folder(folders[0], name="a").nbytes
    registry = open_registry(ram_bytes=size)
    version = registry.publish_now("a", folders[0]).version
    write_adapter(folders[1], 1, rank=3)
    with pytest.raises(NoRoom, match="--adapter-ram"):
        registry.publish_now("a", folders[1])
    assert registry.current("a") == version and stored(registry) == {version.digest}


def test_the_copy_is_what_counts_not_the_folder(registry: Registry, folders: list[Path]) -> None:
    version = registry.publish_now("a", folders[0]).version
    with registry.lease([("a", 1.0)]) as lease:
        shutil.rmtree(folders[0])
        registry.publish_now("a", folders[1])
        (weights,) = fetched(registry, lease.mix)
        assert weights.digest == version.digest


def test_prepared_once_and_served_in_that_form(open_registry: Open, folders: list[Path]) -> None:
    def prepare(weights: LoraWeights) -> LoraWeights:
        half = torch.bfloat16
        modules = {path: m._replace(A=m.A.to(half), B=m.B.to(half)) for path, m in weights.modules.items()}
        return LoraWeights(weights.name, weights.digest, modules, weights.metadata)

    registry = open_registry(prepare=prepare)
    registry.publish_now("a", folders[0])
    with registry.lease([("a", 1.0)]) as lease:
        (weights,) = fetched(registry, lease.mix)
    assert registry.describe("a")["bytes"] == weights.nbytes == read_folder(folders[0], name="a").nbytes // 2


# Leases


def test_lease_keeps_the_order_asked_and_the_mix_its_canonical_form(registry: Registry, folders: list[Path]) -> None:
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
    assert [d["leases"] for d in registry.list()] == [0, 0, 0] and len(registry._leases) == 0
    assert registry.lease([]).mix.entries == ()


def test_a_lease_can_be_had_again_when_the_name_is_gone(registry: Registry, folders: list[Path]) -> None:
    version = registry.publish_now("a", folders[0]).version
    lease = registry.lease([("a", 1.0)])
    registry.retire_now("a")
    again = lease.clone()
    assert again.versions == lease.versions == [(version, 1.0)] and again.mix == lease.mix
    lease.release()
    lease.release()
    assert [w.digest for w in fetched(registry, again.mix)] == [version.digest] and stored(registry)
    third = again.clone()
    again.release()
    assert len(registry._leases) == 1
    third.release()
    assert len(registry._leases) == 0
    for one in (lease, again, third):
        with pytest.raises(UnknownAdapter, match="given back"):
            one.clone()
    registry.publish_now("b", folders[1])
    assert stored(registry) == {digest_of(folders[1])}


def test_choices_that_mean_nothing(registry: Registry, folders: list[Path]) -> None:
    a = registry.publish_now("a", folders[0]).version
    for choice, error in [
        ([("x", 1.0)], UnknownAdapter),
        ([("a@000000000000", 1.0)], UnknownAdapter),
        ([("x@" + a.digest, 1.0)], UnknownAdapter),
        ([(f"a@{a.digest[:5]}", 1.0)], InvalidChoice),
        ([("a@", 1.0)], InvalidChoice),
        ([("a", 1.0), (a.label, 1.0)], InvalidChoice),
        ([("a", float("nan"))], InvalidChoice),
        ([("a", 1e308)], InvalidChoice),
        ([("", 1.0)], UnknownAdapter),
    ]:
        for asked in (registry.lease, registry.mix):
            with pytest.raises(error):
                asked(choice)
    assert len(registry._leases) == 0


def test_a_mix_that_can_never_fit_is_refused_at_once(open_registry: Open, folders: list[Path]) -> None:
    size = read_folder(folders[0], name="a").nbytes
    registry = open_registry(ram_bytes=2 * size)
    for name, folder in zip("abc", folders, strict=False):
        registry.publish_now(name, folder)
    with registry.lease([("a", 1.0), ("b", 1.0)]) as lease:
        assert registry.mix([("b", 1.0), ("a", 1.0)]) == lease.mix
    assert len(registry._leases) == 0
    for asked in (registry.lease, registry.mix):
        with pytest.raises(NoRoom, match="the mix takes"):
            asked([("a", 1.0), ("b", 1.0), ("c", 1.0)])
    asyncio.run(registry.pin("c"))
    for asked in (registry.lease, registry.mix):
        with pytest.raises(NoRoom, match="pinned"):
            asked([("a", 1.0), ("b", 1.0)])
    registry.lease([("a", 1.0), ("c", 1.0)]).release()


def test_a_request_keeps_its_version_and_the_old_one_really_goes(registry: Registry, folders: list[Path]) -> None:
    device = registry.slots = Device()
    old = registry.publish_now("a", folders[0]).version
    lease = registry.lease([("a", 1.0)])
    device.kept[old.digest] = fetched(registry, lease.mix)[0]
    new = registry.publish_now("a", folders[1]).version
    assert registry.describe("a")["leases"] == 1 and registry.describe("a")["versions"][1]["leases"] == 1
    registry._ram.discard(old.digest)  # as if it had been evicted
    device.kept.clear()
    assert fetched(registry, lease.mix)[0].digest == old.digest, "it is read again"
    device.kept[old.digest] = fetched(registry, lease.mix)[0]
    assert old.digest in registry._ram.resident()
    lease.release()
    until(lambda: old.digest not in registry._ram.resident())
    assert not device.kept
    assert stored(registry) == {old.digest, new.digest}, "kept on disk, to roll back to"
    with registry.lease([("a", 1.0)]) as lease:
        assert lease.versions == [(new, 1.0)]


def test_an_exact_old_version_can_be_asked_for(registry: Registry, folders: list[Path]) -> None:
    old = registry.publish_now("a", folders[0]).version
    registry.publish_now("a", folders[1])
    for _ in range(3):
        with registry.lease([(old.label, 1.0)]) as lease:
            assert fetched(registry, lease.mix)[0].digest == old.digest
    assert registry._observer.loads == [("a", "ok")], "and stays in memory while people ask for it"


def test_a_lease_keeps_a_version_that_lost_its_place_among_the_last_three(
    registry: Registry, folders: list[Path]
) -> None:
    old = registry.publish_now("a", folders[0]).version
    lease = registry.lease([("a", 1.0)])
    for folder in folders[1:5]:
        registry.publish_now("a", folder)
    with pytest.raises(UnknownAdapter):
        registry.lease([(old.label, 1.0)])
    assert old.digest in stored(registry)
    assert fetched(registry, lease.mix)[0].digest == old.digest
    lease.release()
    until(lambda: old.digest not in stored(registry))
    assert stored(registry) == {digest_of(folder) for folder in folders[2:5]}
    until(lambda: old.digest not in registry._ram.resident())


# Rolling back, retiring, pinning


async def test_roll_back(registry: Registry, folders: list[Path]) -> None:
    versions = [(await registry.publish("a", folder)).version for folder in folders[:3]]
    with pytest.raises(VersionMismatch):
        await registry.roll_back("a", versions[0].label, if_match=versions[1].label)
    back = await registry.roll_back("a", versions[0].label, if_match=versions[2].label)
    assert back.created and back.version == versions[0] and back.metadata["card"] == "card 0"
    assert registry.current("a") == versions[0]
    assert back.description == {**registry.describe("a"), **back.description} and back.description["leases"] == 0
    assert not (await registry.roll_back("a", versions[0].digest[:8])).created
    await registry.publish("a", folders[3])
    kept = [v["version"] for v in registry.describe("a")["versions"]]
    assert kept == [Version("a", digest_of(folders[3])).label, versions[0].label, versions[2].label]
    with pytest.raises(UnknownAdapter):
        await registry.roll_back("a", versions[1].label)
    await registry.publish("b", folders[4])
    with pytest.raises(AdapterConflict):
        await registry.roll_back("a", registry.current("b").label)
    with pytest.raises(UnknownAdapter):
        await registry.roll_back("zzz", versions[1].digest)


async def test_rolling_back_keeps_the_version_that_a_task_names(registry: Registry, folders: list[Path]) -> None:
    first = (await registry.publish("a", folders[0])).version
    registry.referenced_versions = lambda name: [first.digest[:12]]
    versions = [(await registry.publish("a", folder)).version for folder in folders[1:4]]
    await registry.roll_back("a", versions[0].label)
    assert registry.current("a") == versions[0]
    assert registry.resolve([(first.label, 1.0)]) == [(first, 1.0)] and first.digest in stored(registry)


async def test_nobody_rolls_back_to_what_cannot_be_read(registry: Registry, folders: list[Path]) -> None:
    old = (await registry.publish("a", folders[0])).version
    new = (await registry.publish("a", folders[1])).version
    registry._ram.discard(old.digest)
    flip(registry._store.path(old.digest) / "adapter_model.safetensors")
    with pytest.raises(StoreFailed, match="publish it again"):
        await registry.roll_back("a", old.label)
    assert registry.current("a") == new


async def test_retire_drains(registry: Registry, folders: list[Path]) -> None:
    device = registry.slots = Device()
    digest = (await registry.publish("a", folders[0])).version.digest
    await registry.publish("b", folders[1])
    lease = registry.lease([("a", 1.0), ("b", 1.0)])
    device.kept[digest] = fetched(registry, Mix(((digest, 1.0),)))[0]
    retired = await registry.retire("a")
    assert retired.description["leases"] == 1 and retired.description["name"] == "a"
    for ask in (lambda: registry.lease([("a", 1.0)]), lambda: registry.describe("a"), lambda: registry.current("a")):
        with pytest.raises(UnknownAdapter):
            ask()
    assert registry.names() == ["b"] and not retired.drained.done()
    assert len(fetched(registry, lease.mix)) == 2, "who holds it can still read it"
    lease.release()
    await asyncio.wait_for(asyncio.wrap_future(retired.drained), 10)
    assert stored(registry) == {digest_of(folders[1])} and not device.kept
    until(lambda: set(registry._ram.resident()) == stored(registry))
    assert registry._observer.changes[-1] == ("a", None)
    assert (await registry.publish("a", folders[0], create_only=True)).created, "the name is free"
    with pytest.raises(UnknownAdapter):
        await registry.retire("zzz")


async def test_a_name_can_come_back_while_its_content_drains(registry: Registry, folders: list[Path]) -> None:
    await registry.publish("a", folders[0])
    lease = registry.lease([("a", 1.0)])
    retired = await registry.retire("a")
    await registry.publish("a", folders[0])
    lease.release()
    with registry.lease([("a", 1.0)]) as lease:
        assert fetched(registry, lease.mix)
    await registry.publish("b", folders[1])  # the writer has come by
    assert retired.drained.done() and digest_of(folders[0]) in stored(registry)


async def test_pins_hold_across_publish_and_restart(open_registry: Open, folders: list[Path]) -> None:
    size = read_folder(folders[0], name="a").nbytes
    registry = open_registry(ram_bytes=3 * size)
    for name, folder in zip("abcd", folders, strict=False):
        await registry.publish(name, folder)
    await registry.pin("a")
    assert registry.describe("a")["pinned"]
    for name in "bcd":
        await registry.prefetch(name)
    assert registry.describe("a")["tier"] == "ram" and registry.describe("b")["tier"] == "disk"
    await registry.publish("a", folders[4])
    until(lambda: registry._pins["a"] is not None)
    for name in "bcd":
        await registry.prefetch(name)
    assert registry.describe("a")["tier"] == "ram"
    until(lambda: registry._ram.held == size)
    again = open_registry(ram_bytes=3 * size)
    again.start()
    until(lambda: again.describe("a")["tier"] == "ram")
    await again.unpin("a")
    assert not again.describe("a")["pinned"]
    for name in "bcd":
        await again.prefetch(name)
    assert again.describe("a")["tier"] == "disk"
    for name in "bcd":
        await again.pin(name)
    with pytest.raises(NoRoom):
        await again.publish("c", write_wide(folders[5]))
    with pytest.raises(NoRoom):
        await again.pin("a")
    assert (await again.retire("d")).description["pinned"]
    await again.pin("a")


async def three_pinned(open_registry: Open, folders: list[Path]) -> int:
    """Four adapters of one size, which is answered, the first three pinned in RAM that has just room for these."""
    size = read_folder(folders[0], name="a").nbytes
    registry = open_registry(ram_bytes=3 * size)
    for name, folder in zip("abcd", folders, strict=False):
        await registry.publish(name, folder)
    for name in "abc":
        await registry.pin(name)
    return size


async def test_a_pin_that_a_smaller_budget_has_no_room_for_takes_none_from_others(
    open_registry: Open, folders: list[Path]
) -> None:
    size = await three_pinned(open_registry, folders)
    again = open_registry(ram_bytes=2 * size)
    again.start()
    for name in "ab":
        with again.lease([(name, 1.0)]) as lease:
            assert len(lease.mix) == 1
    await again.unpin("b")
    with again.lease([("d", 1.0)]) as lease:
        assert len(lease.mix) == 1


async def test_a_pin_that_turns_out_to_have_no_room_takes_none_from_others(
    open_registry: Open, folders: list[Path]
) -> None:
    size = await three_pinned(open_registry, folders)
    again = open_registry(ram_bytes=3 * size)
    again._ram._expected = lambda digest: size
    read = again._ram._read
    again._ram._read = lambda digest: _larger(read(digest))
    again.start()
    until(lambda: not again._pins and len(again._leases) == 0)
    with again.lease([("d", 1.0)]) as lease:
        assert len(lease.mix) == 1


def _larger(weights: LoraWeights) -> LoraWeights:
    """The same, of four times the bytes."""
    modules = {path: LowRank(m.A.repeat(4, 1), m.B.repeat(1, 4), m.scale) for path, m in weights.modules.items()}
    return replace(weights, modules=modules)


async def test_what_happens_to_a_version_is_told_of_the_name_that_has_it(
    open_registry: Open, folders: list[Path]
) -> None:
    """`a` had the content before `b`, and has gone on."""
    registry = open_registry()
    for name, folder in (("a", folders[0]), ("a", folders[1]), ("b", folders[0])):
        await registry.publish(name, folder)
    again = open_registry()
    again.start()
    await again.prefetch("b")
    assert until(lambda: again._observer.loads) == [("b", "ok")]
    await again.retire("b")
    assert again._names.of_content(digest_of(folders[0])) == "a"


async def test_a_limit_does_not_bring_back_an_older_version(
    open_registry: Open, folders: list[Path], write_adapter: Write
) -> None:
    registry = open_registry()
    write_adapter(folders[1], 1, rank=8, card="card 1")
    for folder in folders[:2]:
        await registry.publish("a", folder)
    lower = open_registry(max_rank=4)
    assert lower.names() == [] and "rank 8 is over the limit of 4" in lower.rejected()[0]["reason"]
    first, large = (digest_of(folder)[:12] for folder in folders[:2])
    for text in ("a", f"a@{large}"):
        with pytest.raises(UnknownAdapter, match="over the limit of 4"):
            lower.resolve([(text, 1.0)])
    assert lower.resolve([(f"a@{first}", 1.0)])[0][0].digest == digest_of(folders[0]), "who names it has it"
    with pytest.raises(UnknownAdapter, match="no version"):
        lower.resolve([("a@123456123456", 1.0)])
    assert open_registry().current("a").digest == digest_of(folders[1])
    lower = open_registry(max_rank=4)
    lower.tasks = lambda name: ["t"]
    with pytest.raises(AdapterConflict, match="these tasks route to"):
        await lower.retire("a")
    write_adapter(folders[2], 2, rank=3)
    (folders[2] / "README.md").unlink(missing_ok=True)
    await lower.publish("a", folders[2])
    assert lower.metadata("a")["card"] == "card 1", "a name keeps what its last version told"


async def test_an_adapter_of_a_larger_base_is_not_set_aside_for_its_rank(
    open_registry: Open, folders: list[Path], tiny_shapes: Any, write_adapter: Write
) -> None:
    write_adapter(folders[1], 1, rank=8)
    paths = sorted(tiny_shapes)
    fewer = {path: tiny_shapes[path] for path in paths[:-1]}
    small = read_folder(folders[0], name="a")
    save(with_digest("a", {path: small.modules[path] for path in fewer}), folders[2])
    await open_registry(shapes=fewer, max_rank=4).publish("a", folders[2])
    await open_registry(max_rank=8).publish("a", folders[1])
    again = open_registry(shapes=fewer, max_rank=4)
    assert again.names() == ["a"] and again.current("a").digest == digest_of(folders[2])


async def test_publishing_on_one_base_leaves_the_versions_of_another(
    open_registry: Open, folders: list[Path], tiny_shapes: Any, tmp_path: Path
) -> None:
    registry = open_registry()
    for folder in folders[:3]:
        await registry.publish("a", folder)
    other = open_registry(shapes=dict.fromkeys(tiny_shapes, (8, 8)))
    for seed in range(5):
        torch.manual_seed(seed)
        modules = {path: LowRank(torch.randn(2, 8), torch.randn(8, 2), 2.0) for path in tiny_shapes}
        save(with_digest("a", modules), tmp_path / f"other-{seed}")
        await other.publish("a", tmp_path / f"other-{seed}")
    assert len(other.describe("a")["versions"]) == 3
    again = open_registry()
    assert len(again.describe("a")["versions"]) == 3
    # What was published last is the other base's, and this one's last is served: it is passed over, not fallen back to.
    assert again.current("a").digest == digest_of(folders[2])
    await again.publish("a", folders[3])
    assert [v["digest"] for v in again.describe("a")["versions"]] == [digest_of(folders[i]) for i in (3, 2, 1)]
    assert len(open_registry(shapes=dict.fromkeys(tiny_shapes, (8, 8))).describe("a")["versions"]) == 3


async def test_a_name_whose_last_version_is_lost_is_rolled_back_to_what_is_left(
    open_registry: Open, folders: list[Path]
) -> None:
    registry = open_registry()
    for folder in folders[:2]:
        await registry.publish("a", folder)
    shutil.rmtree(registry._store.path(digest_of(folders[1])))
    again, first = open_registry(), digest_of(folders[0])
    assert again.names() == []
    with pytest.raises(UnknownAdapter, match="is missing"):
        again.resolve([("a", 1.0)])
    assert again.resolve([(f"a@{first[:12]}", 1.0)])[0][0].digest == first
    with pytest.raises(UnknownAdapter, match="no version"):
        again.resolve([(f"a@{digest_of(folders[1])[:12]}", 1.0)])
    assert (await again.roll_back("a", first[:12])).version.digest == first
    assert again.current("a").digest == first and open_registry().current("a").digest == first


async def test_a_pin_whose_load_failed_for_once_holds_later(open_registry: Open, folders: list[Path]) -> None:
    """What lacked memory for a moment may have it then."""
    registry = open_registry()
    await registry.publish("a", folders[0])
    await registry.pin("a")
    again = open_registry()
    read, failed = again._ram._read, []

    def fails_once(digest: str) -> LoraWeights:
        if not failed:
            failed.append(digest)
            raise MemoryError
        return read(digest)

    again._ram._read = fails_once
    again.start()
    until(lambda: failed and len(again._leases) == 0)
    await again.prefetch("a")
    assert until(lambda: again._pins["a"]).digest == digest_of(folders[0])


@pytest.mark.parametrize("heal", ["request", "publish"])
async def test_a_pin_whose_load_failed_holds_once_it_is_in_memory(
    open_registry: Open, folders: list[Path], heal: str, caplog: pytest.LogCaptureFixture
) -> None:
    size = read_folder(folders[0], name="a").nbytes
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
    if heal == "request":
        tensors.write_bytes(whole)
        await again.prefetch("a")
    else:
        assert not (await again.publish("a", folders[0])).created
    for name in "bc":
        await again.prefetch(name)
    assert again.describe("a")["tier"] == "ram" and again.describe("b")["tier"] == "disk"


def write_wide(folder: Path) -> Path:
    """The adapter in `folder`, at twice its size."""
    from adapters.peft_format import save
    from adapters.weights import LowRank, with_digest

    weights = read_folder(folder, name="wide")
    modules = {
        p: LowRank(torch.cat([m.A, m.A]), torch.cat([m.B, m.B], dim=1), m.scale) for p, m in weights.modules.items()
    }
    save(with_digest("wide", modules), folder)
    return folder


# Memory


async def test_waiting_for_room_asks_the_slots_for_it(open_registry: Open, folders: list[Path]) -> None:
    size = read_folder(folders[0], name="a").nbytes
    registry = open_registry(ram_bytes=2 * size)
    device = registry.slots = Device()
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    with registry.lease([("a", 1.0), ("b", 1.0)]) as lease:
        for view in fetched(registry, lease.mix):
            device.kept[view.digest] = view
        del view
    assert [d["tier"] for d in registry.list()] == ["device", "device", "disk"]
    await asyncio.wait_for(registry.prefetch("c"), 10)
    assert device.asked and set(device.asked) == {size}
    assert sorted(d["tier"] for d in registry.list()) == ["device", "disk", "ram"]
    assert registry.memory() == {"bytes": 2 * size, "budget": 2 * size, "versions": 2, "leases": 0}
    assert sorted(tier for _, tier in registry.sizes()) == ["device", "disk", "ram"]
    assert list(registry.sizes().values()) == [size, size, size]
    assert registry._observer.evictions == 1


async def test_what_is_leased_leaves_memory_after_what_is_not(open_registry: Open, folders: list[Path]) -> None:
    """Though nobody has read it for longer: who holds it will."""
    registry = open_registry(ram_bytes=2 * read_folder(folders[0], name="a").nbytes)
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    with registry.lease([("a", 1.0)]):
        for name in "abc":
            await registry.prefetch(name)
        assert {d["name"]: d["tier"] for d in registry.list()} == {"a": "ram", "b": "disk", "c": "ram"}
        assert registry._observer.evictions == 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


async def test_rot_on_disk_is_told_and_healed_by_publishing_again(registry: Registry, folders: list[Path]) -> None:
    version = (await registry.publish("a", folders[0])).version
    registry._ram.discard(version.digest)
    flip(registry._store.path(version.digest) / "adapter_model.safetensors")
    with registry.lease([("a", 1.0)]) as lease:
        with pytest.raises(StoreFailed, match="changed on disk; publish it again"):
            fetched(registry, lease.mix)
        assert registry.describe("a")["tier"] == "disk"
        assert "changed on disk" in registry.describe("a")["notes"][-1]
        assert registry._observer.loads[-1] == ("a", "failed")
        assert not (await registry.publish("a", folders[0])).created
        registry._ram.discard(version.digest)
        assert fetched(registry, lease.mix)[0].digest == version.digest
        assert registry.describe("a")["notes"] == []


async def test_files_gone_while_served(registry: Registry, folders: list[Path]) -> None:
    version = (await registry.publish("a", folders[0])).version
    await registry.publish("b", folders[1])
    lease = registry.lease([("a", 1.0)])
    (view,) = fetched(registry, lease.mix)
    shutil.rmtree(registry._store.path(version.digest))
    assert fetched(registry, lease.mix)[0].digest == version.digest, "what is in memory serves on"
    registry._ram.discard(version.digest)
    del view
    with pytest.raises(StoreFailed):
        fetched(registry, lease.mix)
    with registry.lease([("b", 1.0)]) as other:
        assert fetched(registry, other.mix), "and nobody else is harmed"
    lease.release()


@pytest.mark.parametrize("fails", [True, False])
def test_of_a_version_that_goes_while_it_is_read_for_nobody_nothing_is_left(
    open_registry: Open, folders: list[Path], caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def read(path: Path, *, stored: bool = False, **how: Any) -> LoraWeights:
        weights = None if stored and fails else read_folder(path, stored=stored, **how)
        if stored:
            begun.set()
            assert go_on.wait(60)
        return weights or read_folder(path, stored=stored, **how)

    registry = open_registry(read=read)
    version = registry.publish_now("a", folders[0]).version
    registry._ram.discard(version.digest)
    with registry.lease([("a", 1.0)]) as lease:
        fetch = registry.fetch(lease.mix)
        assert begun.wait(60)
        fetch.cancel()
    registry.retire_now("a").drained.result(60)
    go_on.set()
    until(lambda: not registry._ram._loading and not registry._ram._effects)
    kept = registry._ram._sizes, registry._failures, registry._store.damaged, registry._store._sizes
    assert not any(kept), kept
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert ("other", "failed") not in registry._observer.loads


def test_a_lost_current_version_does_not_fall_back_to_an_older(open_registry: Open, folders: list[Path]) -> None:
    registry = open_registry()
    registry.publish_now("a", folders[0])
    digest = registry.publish_now("a", folders[1]).version.digest
    registry.close()
    shutil.rmtree(registry._store.path(digest))
    again = open_registry()
    assert again.names() == [] and "missing from the store" in again.rejected()[0]["reason"]
    assert again.rejected(faults=True) == again.rejected()
    again.publish_now("a", folders[1])
    assert again.current("a").digest == digest and not again.rejected()


def test_the_event_loop_is_never_blocked(open_registry: Open, folders: list[Path]) -> None:
    gate = threading.Event()

    def slow(path: Path, **options: Any) -> LoraWeights:
        assert gate.wait(10)
        return read_folder(path, **options)

    registry = open_registry(read=slow)

    async def go() -> None:
        publishing = [asyncio.create_task(registry.publish(name, folders[0])) for name in ("a", "b")]
        began = time.perf_counter()
        for _ in range(20):
            await asyncio.sleep(0)
            assert registry.list() == [] and registry.rejected() == [] and registry.memory()["bytes"] == 0
        assert time.perf_counter() - began < 1
        gate.set()
        assert all(published.created for published in await asyncio.gather(*publishing))

    asyncio.run(go())


def test_closing_refuses_and_leaves_nothing_running(open_registry: Open, folders: list[Path]) -> None:
    before = threading.active_count()
    registry = open_registry()
    registry.publish_now("a", folders[0])
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
    assert stored(open_registry()) == set(), "what the closed one could not delete is swept"


@pytest.mark.usefixtures("no_fsync")
def test_many_clients_and_publishers_at_once(registry: Registry, folders: list[Path]) -> None:
    """Whatever is published meanwhile, a request is served by exactly what it leased."""
    device = registry.slots = Device()
    digests = [digest_of(folder) for folder in folders]
    seeds = {digest: read_folder(folder, name="x").modules for digest, folder in zip(digests, folders, strict=True)}
    registry.publish_now("a", folders[0])
    registry.publish_now("b", folders[1])
    stop, failures = threading.Event(), []

    def client(seed: int) -> None:
        try:
            n = 0
            while not stop.is_set():
                n += 1
                choice = [("a", 1.0), ("b", -0.5)][: 1 + (seed + n) % 2]
                try:
                    lease = registry.lease(choice)
                except UnknownAdapter:
                    continue
                with lease:
                    future = registry.fetch(lease.mix)
                    if n % 5 == 0 and future.cancel():
                        continue
                    for digest, weights in zip(lease.mix.digests, future.result(10), strict=True):
                        assert weights.digest == digest
                        for path, module in weights.modules.items():
                            assert torch.equal(module.A, seeds[digest][path].A)
        except BaseException as error:
            failures.append(error)

    def publisher() -> None:
        try:
            for n in range(60):
                registry.publish_now("ab"[n % 2], folders[n % len(folders)])
                if n % 7 == 0:
                    with suppress(UnknownAdapter):  # the other publisher was quicker
                        registry.retire_now("a")
                if n % 11 == 0:
                    registry._ram.discard(digests[n % len(digests)])
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    publishers = [threading.Thread(target=publisher) for _ in range(2)]
    for thread in clients + publishers:
        thread.start()
    for thread in publishers:
        thread.join(60)
    stop.set()
    for thread in clients:
        thread.join(60)
    assert not any(thread.is_alive() for thread in clients + publishers)
    assert not failures and len(registry._leases) == 0 and not device.kept
    registry.publish_now("c", folders[0])
    assert stored(registry) == set(registry._store.journal.referenced())
    gc.collect()
    until(lambda: registry._ram.held == 0)


# Cycles


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)


def test_two_thousand_cycles_leave_nothing_behind(
    tmp_path: Path, folders: list[Path], tiny_shapes: dict[str, tuple[int, int]]
) -> None:
    """Load and unload 2,000 times, publishing and retiring as it goes: everything is back at the start.

    In a process of its own, where nothing else has fragmented the memory that is measured.
    """
    script = Path(__file__).with_name("cycles.py")
    given = {"store": str(tmp_path / "store"), "folders": [str(f) for f in folders], "shapes": tiny_shapes}
    made = subprocess.run(
        [sys.executable, "-W", "error", script, json.dumps(given)], capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["after"] == found["before"]
    assert (
        found["before"]["leases"] == found["before"]["ram"] == found["before"]["stored"] == found["before"]["kept"] == 0
    )
    memory = found["memory"]  # a sample every 20 cycles
    grown = statistics.median(memory[-30:]) - statistics.median(memory[10:40])
    assert grown < 2 << 20, f"resident memory grew by {grown} bytes"


def test_errors_keep_no_tensors(registry: Registry, folders: list[Path]) -> None:
    """A failed load's error is kept and told to many; the frames that raised it are not."""
    version = registry.publish_now("a", folders[0]).version
    registry._ram.discard(version.digest)
    (registry._store.path(version.digest) / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    before = live_tensors()
    with registry.lease([("a", 1.0)]) as lease:
        errors = [registry.fetch(lease.mix).exception(10) for _ in range(5)]
    assert all(isinstance(error, AdapterError) and error.__traceback__ is None for error in errors)
    assert live_tensors() == before


async def test_what_can_be_loaded_no_more_holds_nobody_up(open_registry: Open, folders: list[Path]) -> None:
    """As others have been pinned while it waited for room."""
    size = read_folder(folders[0], name="a").nbytes
    registry = open_registry(ram_bytes=5 * size // 2)
    for name, folder in zip("abc", folders, strict=False):
        await registry.publish(name, folder)
    await registry.publish("big", write_wide(folders[3]))
    assert registry._ram.size(registry.current("big").digest) == 2 * size
    with registry.lease([("a", 1.0), ("b", 1.0)]) as lease:
        held = await asyncio.to_thread(lambda: registry.fetch(lease.mix).result(60))
        waiting = asyncio.create_task(registry.prefetch("big"))
        await asyncio.sleep(0)
        until(lambda: registry._ram._waiting)
        await registry.pin("a")
        with pytest.raises(NoRoom, match="pinned"):
            await asyncio.wait_for(waiting, 30)
    del held
    await asyncio.wait_for(registry.prefetch("c"), 30)


class NoNames(Disk):
    """Refuses the journal, while it is `full`."""

    full = False

    def write(self, path: Path, content: bytes) -> None:
        if self.full and path.name == "names.new":
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(path, content)


async def test_a_lost_version_that_comes_back_with_a_publish_that_fails_stays(
    open_registry: Open, folders: list[Path]
) -> None:
    lost = (await open_registry().publish("a", folders[0])).version
    shutil.rmtree(open_registry()._store.path(lost.digest))
    again = open_registry(disk := NoNames())
    disk.full = True
    with pytest.raises(StoreFailed, match="the disk is full"):
        await again.publish("b", folders[0])
    assert open_registry().current("a") == lost


async def test_what_was_said_of_a_damaged_version_ends_when_it_is_published_again(
    registry: Registry, folders: list[Path]
) -> None:
    version = (await registry.publish("a", folders[0])).version
    registry._ram.discard(version.digest)
    flip(registry._store.path(version.digest) / "adapter_model.safetensors")
    with pytest.raises(StoreFailed):
        await registry.prefetch("a")
    assert "changed on disk" in registry.describe("a")["notes"][-1]
    assert registry.load_failed("a") and registry.load_failed(f"a@{version.digest[:12]}")
    assert not registry.load_failed("nobody")
    await registry.publish("a", folders[0])
    assert registry.describe("a")["notes"] == [] and not registry.load_failed("a")


async def test_a_pin_that_could_not_be_loaded_holds_once_its_content_is_published(
    open_registry: Open, folders: list[Path]
) -> None:
    registry = open_registry()
    version = (await registry.publish("a", folders[0])).version
    await registry.pin("a")
    registry = open_registry()
    flip(registry._store.path(version.digest) / "adapter_model.safetensors")
    with pytest.raises(StoreFailed):
        await registry.prefetch("a")
    registry._pins["a"] = None  # as after a start
    await registry.publish("a", folders[0])
    assert registry._pins["a"] is not None


async def test_a_name_that_is_retired_while_its_old_version_is_read_is_not_rolled_back(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (await registry.publish("a", folders[0])).version
    await registry.publish("a", folders[1])

    def retired(weights: LoraWeights) -> None:
        registry.retire_now("a")

    monkeypatch.setattr(registry._ram, "offer", retired)
    with pytest.raises(UnknownAdapter):
        await registry.roll_back("a", old.label)
    assert registry.names() == []


async def test_what_drains_waits_for_its_own_requests_alone(registry: Registry, folders: list[Path]) -> None:
    await registry.publish("a", folders[0])
    await registry.publish("b", folders[1])
    mine, others = registry.lease([("a", 1.0)]), registry.lease([("b", 1.0)])
    first = await registry.retire("a")
    await registry.retire("b")
    mine.release()
    await registry.publish("c", folders[2])  # the writer has come by
    assert first.drained.done()
    others.release()


async def test_what_is_published_while_a_pin_is_loaded_is_what_it_holds(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await registry.publish("a", folders[0])
    fetch: Callable[..., Any] = registry.fetch

    def overtaken(mix: Any) -> Any:
        monkeypatch.undo()
        found = fetch(mix)
        registry.publish_now("a", folders[1])
        return found

    monkeypatch.setattr(registry, "fetch", overtaken)
    await registry.pin("a")
    held = registry._pins["a"]
    assert held is not None and held.digest == digest_of(folders[1])


def held_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Future[tuple[LoraWeights, ...]]:
    """What a further load for the pin of `a` waits for."""
    late: Future[tuple[LoraWeights, ...]] = Future()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "fetch", lambda mix: late)
        registry._hold_pin("a")
    return late


@pytest.mark.parametrize("meanwhile", ["published", "unpinned"])
async def test_a_pin_that_is_loaded_too_late_holds_nothing(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    old = (await registry.publish("a", folders[0])).version
    await registry.pin("a")
    late = held_again(registry, monkeypatch)
    if meanwhile == "published":
        new = (await registry.publish("a", folders[1])).version
    else:
        await registry.unpin("a")
    late.set_result((registry._load(old.digest),))
    held = {name: view.digest for name, view in registry._pins.items() if view is not None}
    assert held == ({"a": new.digest} if meanwhile == "published" else {}) and len(registry._leases) == 0


async def test_a_pin_that_holds_is_not_lost_to_an_attempt_that_fails_late(
    registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = (await registry.publish("a", folders[0])).version
    await registry.pin("a")
    late = held_again(registry, monkeypatch)
    late.set_exception(NoRoom("no room"))
    held = registry._pins["a"]
    assert held is not None and held.digest == version.digest


async def test_a_pinned_adapter_makes_room_for_its_own_next_version(open_registry: Open, folders: list[Path]) -> None:
    registry = open_registry(ram_bytes=read_folder(folders[0], name="a").nbytes)
    await registry.publish("a", folders[0])
    await registry.pin("a")
    new = (await registry.publish("a", folders[1])).version
    await registry.pin("a")
    assert registry.current("a") == new and registry.describe("a")["pinned"]


async def test_a_pinned_adapter_makes_room_for_the_version_that_it_goes_back_to(
    open_registry: Open, folders: list[Path]
) -> None:
    registry = open_registry(ram_bytes=read_folder(folders[0], name="a").nbytes)
    old = (await registry.publish("a", folders[0])).version
    await registry.publish("a", folders[1])
    await registry.pin("a")
    with pytest.raises(NoRoom):
        registry.lease([(old.label, 1.0)])
    assert (await registry.roll_back("a", old.digest)).version == old
    assert registry.current("a") == old and registry.describe("a")["pinned"]


async def test_the_largest_rank_that_is_served_is_served_after_a_restart_too(
    open_registry: Open, folders: list[Path], write_adapter: Write
) -> None:
    write_adapter(folders[0], 0, rank=4)
    version = (await open_registry(max_rank=4).publish("a", folders[0])).version
    again = open_registry(max_rank=4)
    assert again.current("a") == version and again.rejected() == []


def test_what_is_smaller_in_memory_than_on_the_disk_is_measured_there(open_registry: Open, tmp_path: Path) -> None:
    """Files have 32 bits where a base's own kernels take 8."""
    shapes = {f"m{i}": (1024, 1024) for i in range(4)}
    modules = {path: LowRank(torch.ones(64, 1024), torch.ones(1024, 64), 1.0) for path in shapes}
    save(with_digest("a", modules), tmp_path / "a")
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert size > 1 << 20, "of what is less the limit is another"

    def prepare(weights: LoraWeights) -> LoraWeights:
        codes = {path: m._replace(A=m.A.to(torch.int8), B=m.B.to(torch.int8)) for path, m in weights.modules.items()}
        return replace(weights, modules=codes)

    registry = open_registry(shapes=shapes, ram_bytes=size // 4 + 1000, prepare=prepare)
    assert registry.publish_now("a", tmp_path / "a").created
    with pytest.raises(NoRoom, match="more than could ever be served"):
        open_registry(shapes=shapes, ram_bytes=size // 5, prepare=prepare).publish_now("b", tmp_path / "a")
