"""The store: content-addressed versions and the saved catalog, through crashes and disk errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import store as store_module
from adapters.catalog_state import KEPT_VERSIONS, CatalogState, VersionRecord
from adapters.errors import InvalidAdapter, NoRoom, StoreFailed
from adapters.peft_format import read_folder
from adapters.protocols import MemoryCatalog
from adapters.store import AdapterStore
from adapters.weights import LoraWeights

Write = Callable[..., LoraWeights]
TENSORS = "adapter_model.safetensors"


class Crash(BaseException):
    """The process ends here."""


class Faults:
    """Counts the writes of a store, and raises `fault` before or after the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.after = 0, -1, False
        self.fault: Callable[[], BaseException] = Crash
        faults = self

        class Backend(MemoryCatalog):
            def save(self, state: CatalogState, records: Sequence[VersionRecord] = ()) -> None:
                try:
                    faults.call(super().save, state, records)
                except OSError as error:
                    raise StoreFailed("the disk is full; nothing was changed") from error

        self.backend = Backend
        for owner, name in ((store_module, "_copy"), (store_module, "sync_folder"), (os, "rename")):
            real = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args, real=real: self.call(real, *args))
        real_rmtree = shutil.rmtree
        monkeypatch.setattr(shutil, "rmtree", lambda path, **options: self.call(real_rmtree, path, **options))

    def call(self, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.count += 1
        due = self.count - 1 == self.at
        if due and not self.after:
            raise self.fault()
        result = real(*args, **options)
        if due:
            raise self.fault()
        return result


def publish(store: AdapterStore, name: str, folder: Path, now: float = 1.0) -> str:
    """Publish and delete unused versions, as the registry does."""
    with store.stage(folder) as staged:
        weights = read_folder(staged, name=name)
        state = store.state.set_version(name, weights.digest, "test", now)
        store.publish(staged, VersionRecord.of(weights, now), state)
    remove_unused(store)
    return weights.digest


def remove_unused(store: AdapterStore) -> None:
    for digest in set(store.records) - store.state.digests:
        store.remove(digest)


def check_whole(store: AdapterStore) -> dict[str, str]:
    """Check that every named version is intact and nothing else is stored. Returns the current digests."""
    assert not store.missing and set(store.records) == store.state.digests
    for name, entry in store.state.names.items():
        for digest in entry.history:
            assert read_folder(store.path(digest), name=name).digest == digest == store.records[digest].digest
    assert {p.name for p in (store.root / "versions").iterdir()} == set(store.state.digests)
    assert not list((store.root / "incoming").iterdir())
    assert {p.name for p in store.root.iterdir()} == {"versions", "incoming", "lock"}
    return {name: entry.history[0] for name, entry in store.state.names.items()}


@pytest.fixture
def folders(tmp_path: Path, write_adapter: Write) -> list[Path]:
    paths = [tmp_path / f"source-{seed}" for seed in range(5)]
    for seed, path in enumerate(paths):
        write_adapter(path, seed, card=f"card {seed}", task={"task": "t", "prompt": "{input}"})
    return paths


@pytest.fixture
def backend() -> MemoryCatalog:
    return MemoryCatalog()


@pytest.fixture
def store(tmp_path: Path, backend: MemoryCatalog) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store", backend)
    yield store
    store.close()


def test_a_published_version_is_read_back_after_reopening(
    store: AdapterStore, backend: MemoryCatalog, folders: list[Path]
) -> None:
    digest = publish(store, "a", folders[0])
    shutil.rmtree(folders[0])
    weights = read_folder(store.path(digest), name="a")
    record = store.records[digest]
    assert weights.digest == digest and {p.name for p in store.path(digest).iterdir()} == {
        "adapter_config.json",
        TENSORS,
    }
    assert record.metadata_of("a")["card"] == "card 0" and record.metadata_of("a")["task"]["prompt"] == "{input}"
    assert record.ranks == [2] and record.targets == ["q_proj", "v_proj"]
    assert store.nbytes(digest) == record.nbytes == weights.nbytes and store.nbytes("f" * 64) == 0
    with pytest.raises(StoreFailed, match="in use by another process"):
        AdapterStore(store.root)
    store.close()
    store.close()
    again = AdapterStore(store.root, backend, size=lambda modules: 7 * len(modules))
    assert check_whole(again) == {"a": digest} and again.records[digest] == record
    assert again.nbytes(digest) == 7 * len(record.modules)
    again.close()


def test_the_last_versions_of_each_name_are_kept(store: AdapterStore, folders: list[Path]) -> None:
    digests = [publish(store, "a", folder) for folder in folders]
    assert store.state.names["a"].history == tuple(digests[: -KEPT_VERSIONS - 1 : -1])
    assert publish(store, "b", folders[4]) == digests[4]
    store.save(store.state.remove_name("a"))
    remove_unused(store)
    assert check_whole(store) == {"b": digests[4]}


def test_names_with_equal_content_have_their_own_card_and_task(
    store: AdapterStore, backend: MemoryCatalog, folders: list[Path]
) -> None:
    digest = publish(store, "a", folders[0])
    before = store.records[digest].metadata_of("a")
    (folders[0] / "task.json").unlink()
    (folders[0] / "README.md").write_text("of b")
    assert publish(store, "b", folders[0], now=2.0) == digest
    store.close()
    again = AdapterStore(store.root, backend)
    record = again.records[digest]
    assert record.metadata_of("a") == before and record.created_at == 1.0
    assert record.metadata_of("b")["task"] is None and record.metadata_of("b")["card"] == "of b"
    assert record.metadata_of("c") == record.metadata_of("b"), "the last publish is the default"
    again.save(again.state.remove_name("a"))
    publish(again, "b", folders[0])
    assert set(again.records[digest].metadata_by_name) == {"b"}
    again.close()


def test_a_damaged_or_missing_version_is_replaced_by_equal_content(
    store: AdapterStore, backend: MemoryCatalog, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    digest, other = publish(store, "a", folders[0]), publish(store, "b", folders[1])
    (store.path(digest) / TENSORS).write_bytes(b"damage")
    store.damaged.add(digest)
    publish(store, "a", folders[0])
    assert check_whole(store) == {"a": digest, "b": other} and not store.damaged
    store.close()
    (store.path(digest) / "adapter_config.json").unlink()
    again = AdapterStore(store.root, backend)
    assert set(again.missing) == {digest} and set(again.records) == {other}
    assert "is missing from the store; publish it again" in again.missing[digest] and digest[:12] in caplog.text
    publish(again, "a", folders[0])
    assert check_whole(again) == {"a": digest, "b": other}
    again.damaged.add(digest)
    again.save(again.state.remove_name("a"))
    again.remove(digest)
    assert not again.damaged
    again.close()


def test_an_empty_catalog_does_not_delete_versions(
    store: AdapterStore, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    digest = publish(store, "a", folders[0])
    store.close()
    again = AdapterStore(store.root, MemoryCatalog())
    assert not again.state.names and "the catalog is empty; 1 stored versions are kept" in caplog.text
    assert read_folder(again.path(digest), name="a").digest == digest
    publish(again, "b", folders[1])
    again.close()


def history(store: AdapterStore, folders: list[Path]) -> Iterator[dict[str, str]]:
    """Publish and remove versions; yields the names before each step and at the end."""
    names: dict[str, str] = {}
    yield names
    for name, folder in [("a", 0), ("b", 1), ("a", 2), ("a", 0), ("a", 3), ("a", 4), ("b", 0)]:
        names = {**names, name: publish(store, name, folders[folder])}
        yield names
    store.save(store.state.remove_name("a"))
    remove_unused(store)
    yield {"b": names["b"]}


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_loses_no_published_version(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    faults = Faults(monkeypatch)
    store = AdapterStore(tmp_path / "whole", faults.backend())
    states, count = list(history(store, folders)), faults.count
    store.close()
    assert count > 60
    for at in range(count):
        root, backend = tmp_path / f"crash-{at}", faults.backend()
        faults.count, faults.at, faults.after = 0, at, after
        store, reached = AdapterStore(root, backend), 0
        with pytest.raises(Crash):
            for _ in history(store, folders):
                reached += 1
        faults.at = -1
        store.close()
        again = AdapterStore(root, backend)
        names = {name: entry.history[0] for name, entry in again.state.names.items()}
        assert names in states[max(reached - 1, 0) : reached + 1], "the step has happened or not"
        publish(again, "c", folders[1])
        if not names:  # versions are kept while the catalog is empty
            again.close()
            again = AdapterStore(root, backend)
        assert check_whole(again) == {**names, "c": again.state.names["c"].history[0]}
        again.close()
        shutil.rmtree(root)


@pytest.mark.usefixtures("no_fsync")
def test_a_full_disk_at_any_write_changes_nothing(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch)
    store = AdapterStore(tmp_path / "whole", faults.backend())
    states, count = list(history(store, folders)), faults.count
    store.close()
    failures = 0
    for at in range(count):
        root, backend = tmp_path / f"full-{at}", faults.backend()
        faults.fault = lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/path")
        faults.count, faults.at = 0, at
        store, reached = AdapterStore(root, backend), 0
        try:
            for _ in history(store, folders):
                reached += 1
        except StoreFailed as error:
            failures += 1
            assert "the disk is full; nothing was changed" in error.message and "secret" not in error.message
        except OSError:
            assert faults.count == at + 1, "removing the staging folder is best effort"
        faults.at = -1
        names = {name: entry.history[0] for name, entry in store.state.names.items()}
        assert names in states[max(reached - 1, 0) : reached + 1]
        for name, digest in names.items():
            assert read_folder(store.path(digest), name=name).digest == digest
        publish(store, "c", folders[1])
        store.close()
    assert failures > count // 2


def test_files_are_synced_before_they_are_renamed_into_place(
    store: AdapterStore, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    rename = os.rename

    def checked(source: Path, target: Path) -> None:
        assert {source, *source.rglob("*")} <= synced
        synced.discard(target.parent)
        rename(source, target)

    monkeypatch.setattr("os.fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr("os.rename", checked)
    publish(store, "a", folders[0])
    assert store.root / "versions" in synced


def test_files_that_are_not_regular_are_refused(store: AdapterStore, folders: list[Path], tmp_path: Path) -> None:
    target = folders[0] / TENSORS
    open_files = len(os.listdir("/proc/self/fd"))
    for make, reason in [
        (lambda: os.mkfifo(target), "not a regular file"),
        (lambda: target.mkdir(), "not a regular file"),
        (lambda: target.symlink_to(tmp_path / "nothing"), "link to nothing: copy the files themselves"),
        (lambda: target.symlink_to(target), "cannot be read|link"),
        (lambda: target.symlink_to("/dev/zero"), "not a regular file"),
    ]:
        target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink()
        make()
        with pytest.raises(InvalidAdapter, match=reason) as refused, store.stage(folders[0]):
            pass
        assert str(tmp_path) not in refused.value.message
    assert not list((store.root / "incoming").iterdir()) and len(os.listdir("/proc/self/fd")) == open_files


def test_links_may_not_lead_out_of_the_given_folder(store: AdapterStore, folders: list[Path], tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    for name in ("bad", "good"):
        (inside / name).mkdir(parents=True)
    shutil.copytree(folders[0], inside / "blobs")
    for name in os.listdir(folders[0]):
        (inside / "bad" / name).symlink_to(folders[0] / name)
        (inside / "good" / name).symlink_to(f"../blobs/{name}")
    with pytest.raises(InvalidAdapter, match="leads out of the adapter directory: copy the files themselves"):
        with store.stage(inside / "bad", within=inside):
            pass
    (tmp_path / "link").symlink_to(inside)
    for folder, within in ((inside / "good", inside), (inside / "bad", None), (tmp_path / "link/good", inside)):
        with store.stage(folder, within=within) as staged:
            assert read_folder(staged, name="a").digest == read_folder(folders[0], name="a").digest


def test_the_size_limit_holds_for_large_and_for_growing_files(
    store: AdapterStore, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folders[0] / TENSORS).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(NoRoom, match="is over 9,"), store.stage(folders[0], limit=10_000):
        pass
    (folders[0] / TENSORS).write_bytes(bytes(10_000))
    fstat, small = os.fstat, os.stat_result([0o100644, 1, 1, 1, 0, 0, 10, 0, 0, 0])
    monkeypatch.setattr("adapters.store.os.fstat", lambda fd: small if fstat(fd).st_size == 10_000 else fstat(fd))
    with pytest.raises(NoRoom, match="is over"), store.stage(folders[0], limit=8_000):
        pass
    assert not list((store.root / "incoming").iterdir())


@pytest.mark.parametrize("how", ["written", "config"])
def test_files_that_change_during_the_copy_are_refused(
    store: AdapterStore, folders: list[Path], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = store_module._copy

    def slow(source: int, target: Path, limit: int) -> int:
        size = copy(source, target, limit)
        if target.name == TENSORS:
            changed = folders[0] / (TENSORS if how == "written" else "adapter_config.json")
            changed.write_bytes(changed.read_bytes() + b" ")
        return size

    monkeypatch.setattr(store_module, "_copy", slow)
    with pytest.raises(InvalidAdapter, match="changed while it was copied"), store.stage(folders[0]):
        raise AssertionError("the copy is inconsistent")
    assert not list((store.root / "incoming").iterdir())


def test_a_record_says_why_a_version_does_not_fit_a_base(folders: list[Path], tiny_shapes: dict[str, Any]) -> None:
    record = VersionRecord.of(read_folder(folders[0], name="a"), 0.0)
    path = next(iter(tiny_shapes))
    assert record.incompatibility(tiny_shapes, 2) is None
    assert "over the limit" in (record.incompatibility(tiny_shapes, 1) or "")
    assert "has no" in (record.incompatibility({p: s for p, s in tiny_shapes.items() if p != path}, 64) or "")
    assert "is [8, 4] in the base" in (record.incompatibility({**tiny_shapes, path: (8, 4)}, 64) or "")


def test_the_memory_catalog_drops_records_that_no_name_has(folders: list[Path]) -> None:
    record = VersionRecord.of(read_folder(folders[0], name="a"), 0.0)
    catalog = MemoryCatalog()
    state = CatalogState().set_version("a", record.digest, "test", 1.0)
    catalog.save(state, [record])
    assert catalog.load() == (state, {record.digest: record})
    catalog.save(CatalogState())
    assert catalog.load() == (CatalogState(), {}) and json.dumps(record.metadata)
