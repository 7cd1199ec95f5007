"""The watched directory and the library: what is imported, when, and what is rejected."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import directory_watcher
from adapters.directory_watcher import DirectoryWatcher, scan_library, signature_of, watched_folder_state
from adapters.errors import InvalidAdapter, StoreFailed
from adapters.protocols import MemoryCatalog, Observer
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LoraWeights
from tests.waiting import until

Write = Callable[..., LoraWeights]


class Scene:
    """A watched directory, a registry that can be reopened, and a clock that the test sets."""

    def __init__(self, root: Path, shapes: Any, write: Write) -> None:
        self.root, self.shapes, self.write = root, shapes, write
        self.directory, self.library = root / "adapters", root / "library"
        self.catalog = MemoryCatalog()
        self.now = 100.0
        self.registry: Registry = None  # type: ignore[assignment]
        self.directory.mkdir()
        self.restart()

    def restart(self, **options: Any) -> None:
        if self.registry is not None:
            self.registry.close()
        store = AdapterStore(self.root / "store", self.catalog)
        self.registry = Registry(store, **{"shapes": self.shapes, "ram_bytes": 1 << 20, **options})
        self.watcher = DirectoryWatcher(self.registry, self.directory, library=self.library, clock=lambda: self.now)

    def put(self, name: str, seed: int, **extras: Any) -> str:
        return self.write(self.directory / name, seed, **extras).digest

    def publish(self, name: str, seed: int, **extras: Any) -> str:
        """Publish through the API."""
        folder = self.root / f"published-{seed}"
        self.write(folder, seed, **extras)
        return self.registry.publish_now(name, folder).version.digest

    def remove(self, name: str) -> None:
        shutil.rmtree(self.directory / name)

    def scan(self, times: int = 2) -> dict[str, str]:
        """Scan once per second; returns the served digests by name."""
        for _ in range(times):
            self.watcher.scan()
            self.now += 1.0
        return self.served()

    def served(self) -> dict[str, str]:
        return {name: self.registry.current(name).digest for name in self.registry.names()}

    def rejected(self) -> dict[str, str]:
        return {entry["path"]: entry["reason"] for entry in self.registry.rejected()}


@pytest.fixture
def scene(tmp_path: Path, tiny_shapes: Any, write_adapter: Write) -> Iterator[Scene]:
    scene = Scene(tmp_path, tiny_shapes, write_adapter)
    yield scene
    scene.registry.close()


# When a folder is imported


def test_a_folder_is_imported_once_it_is_unchanged_for_a_second(scene: Scene) -> None:
    a = scene.put("a", 1)
    assert scene.scan(1) == {}
    for seed in range(2, 6):
        a = scene.put("a", seed)
        assert scene.scan(1) == {}
    assert scene.scan(1) == {"a": a}
    new = scene.put("a", 9)
    assert scene.scan(1) == {"a": a} and scene.scan(1) == {"a": new}


def test_files_that_are_old_are_imported_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    a = scene.put("a", 1)
    future = time.time_ns() + 2 * 10**9
    monkeypatch.setattr(directory_watcher.time, "time_ns", lambda: future)
    assert scene.scan(1) == {"a": a}


def test_any_event_in_a_folder_delays_its_import(scene: Scene) -> None:
    a = scene.put("a", 1)
    for _ in range(3):  # such as a temporary file that is being copied there
        assert not scene.watcher._note_events([str(scene.directory / "a" / ".adapter_model.safetensors.x1")])
        assert scene.scan(1) == {}
    assert scene.scan(1) == {"a": a}
    assert scene.watcher._note_events([str(scene.directory / "file.zip")])
    assert not scene.watcher._note_events([str(scene.directory / ".hidden" / "x")])


def test_a_new_config_alone_waits_for_its_tensors(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.scan()
    config = scene.directory / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    assert scene.scan(5) == {"a": a}
    assert scene.scan(1) != {"a": a}


def test_an_incomplete_folder_is_rejected_and_then_completed(scene: Scene) -> None:
    scene.put("a", 1)
    tensors = scene.directory / "a" / "adapter_model.safetensors"
    data = tensors.read_bytes()
    tensors.unlink()
    assert scene.scan() == {} and "adapter_model.safetensors is missing" in scene.rejected()["a"]
    tensors.write_bytes(data[:-8])
    assert scene.scan() == {} and "damaged" in scene.rejected()["a"]
    tensors.write_bytes(data)
    assert set(scene.scan()) == {"a"} and scene.rejected() == {}
    a = scene.served()["a"]
    tensors.write_bytes(data[:-8])
    assert scene.scan() == {"a": a} and "damaged" in scene.rejected()["a"], "the old version is served"


def test_rejected_and_imported_folders_are_read_once(scene: Scene) -> None:
    reads = []

    def refuse(path: Path, *, name: str, **options: Any) -> LoraWeights:
        reads.append(name)
        raise InvalidAdapter("no")

    a = scene.put("a", 1)
    scene.scan()
    scene.put("b", 2)
    scene.restart(read=refuse)
    assert scene.scan(40) == {"a": a} and reads == ["b"] and scene.rejected() == {"b": "no"}
    scene.put("b", 3)
    scene.scan()
    assert reads == ["b", "b"]
    scene.remove("b")
    scene.scan()
    assert scene.rejected() == {}


def test_a_lack_of_room_or_files_is_retried(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    a = scene.put("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.store._copy", full)
        assert scene.scan() == {} and "the disk is full" in scene.rejected()["a"]
    assert scene.scan(10) == {}
    assert scene.scan(30) == {"a": a} and scene.rejected() == {}
    scene.restart(ram_bytes=2000)
    b = scene.put("b", 2)
    scene.scan()
    for name in ("a", "b"):
        asyncio.run(scene.registry.pin(name))
    large = scene.put("a", 3, rank=12)
    assert scene.scan(40) == {"a": a, "b": b} and "beside the other pinned adapters" in scene.rejected()["a"]
    asyncio.run(scene.registry.unpin("b"))
    assert scene.scan(40) == {"a": large, "b": b} and scene.rejected() == {}


def test_an_unexpected_error_costs_one_folder_and_is_retried(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = scene.put("a", 1), scene.put("b", 2)
    publish = scene.registry.publish_now

    def fail(name: str, *rest: Any, **options: Any) -> Any:
        if name == "a":
            raise RuntimeError("bug")
        return publish(name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scene.registry, "publish_now", fail)
        assert scene.scan() == {"b": b}
    assert "the server failed to read it" in scene.rejected()["a"] and "bug" in caplog.text
    assert scene.scan(40) == {"a": a, "b": b}


# What is rejected


def test_invalid_names_links_out_and_odd_entries_are_rejected(scene: Scene) -> None:
    a = scene.put("a", 1)
    for name in ("-bad", "base", "spa ce"):
        scene.put(name, 2)
    scene.put(".hidden", 3)
    (scene.directory / "lost+found").mkdir()
    scene.write(scene.root / "outside", 4)
    (scene.directory / "out").symlink_to(scene.root / "outside")
    (scene.directory / "file").mkdir()
    for file in (scene.root / "outside").iterdir():
        (scene.directory / "file" / file.name).symlink_to(file)
    (scene.directory / "broken").symlink_to(scene.root / "nothing")
    (scene.directory / "loop").symlink_to(scene.directory / "loop")
    (scene.directory / "pipe").mkdir()
    os.mkfifo(scene.directory / "pipe" / "adapter_config.json")
    (scene.directory / "inside").symlink_to(scene.directory / "a")
    assert scene.scan(3) == {"a": a, "inside": a}
    rejected = scene.rejected()
    assert {"-bad", "base", "spa ce", "out", "file", "loop", "pipe"} <= set(rejected)
    assert all("leads out of the adapter directory" in rejected[name] for name in ("out", "file"))
    assert "not a regular file" in rejected["pipe"] and "reserved" in rejected["base"]
    assert str(scene.root) not in str(rejected)
    assert signature_of(scene.directory / "a", scene.directory) and not signature_of(scene.root / "no", None)


@pytest.mark.parametrize("below", ["formal", "checkpoint-10", "run/formal", "run/checkpoint-10"])
def test_an_adapter_in_a_subfolder_is_rejected_with_advice(scene: Scene, below: str) -> None:
    a = scene.put("a", 1)
    shutil.copytree(scene.directory / "a", scene.directory / "named" / below)
    shutil.copytree(scene.directory / "a", scene.directory / "deep" / "er" / "still" / "down")
    shutil.copytree(scene.directory / "a", scene.directory / "hidden" / ".cache")
    (scene.directory / "empty" / "folder").mkdir(parents=True)
    assert scene.scan(1) == {} and scene.rejected() == {}
    assert scene.scan(3) == {"a": a} and set(scene.rejected()) == {"named"}
    reason = scene.rejected()["named"]
    assert "adapter_config.json is missing" in reason
    assert f"move the files of {below!r} up" in reason and f"register named/{below}" in reason
    since = scene.registry.rejected()[0]["since"]
    scene.scan(3)
    assert scene.registry.rejected()[0]["since"] == since
    for path in (scene.directory / "named" / below).iterdir():
        path.rename(scene.directory / "named" / path.name)
    assert scene.scan(3) == {"a": a, "named": a} and scene.rejected() == {}


def test_the_last_checkpoint_is_advised_and_none_of_several_runs(scene: Scene) -> None:
    scene.put("a", 1)
    for path in ("one/checkpoint-500", "one/checkpoint-1500", "two/x/checkpoint-10", "two/y/checkpoint-10"):
        shutil.copytree(scene.directory / "a", scene.directory / path)
    scene.scan(3)
    assert "but 'checkpoint-1500' in it has one" in scene.rejected()["one"]
    assert "but 2 subfolders have one, for example 'x/checkpoint-10'" in scene.rejected()["two"]


def test_a_whole_model_is_rejected_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    merged, notes = scene.directory / "merged", scene.directory / "notes"
    for folder in (merged, notes):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (merged / "model-00001-of-00002.safetensors").write_bytes(b"part")
    assert scene.scan(1) == {} and scene.rejected() == {}
    scene.scan(3)
    assert set(scene.rejected()) == {"merged"} and "serve it with --model" in scene.rejected()["merged"]
    assert caplog.text.count("'merged' is not served") == 1
    shutil.rmtree(merged)
    assert scene.scan() == {} and scene.rejected() == {}


def test_adapters_outside_a_folder_are_rejected_with_advice(scene: Scene) -> None:
    a = scene.put("a", 1)
    for name in ("b.safetensors", "c.tar.gz", "a.zip", "notes.txt"):
        (scene.directory / name).write_bytes(b"")
    assert scene.scan(3) == {"a": a} and set(scene.rejected()) == {"b.safetensors", "c.tar.gz"}
    for path in (scene.directory / "a").iterdir():
        shutil.copy(path, scene.directory)
    scene.scan(1)
    assert set(scene.rejected()) == {".", "b.safetensors", "c.tar.gz"}
    assert "adapter_config.json is in the adapter directory itself" in scene.rejected()["."]
    for path in scene.directory.iterdir():
        if path.is_file():
            path.unlink()
    assert scene.scan(1) == {"a": a} and scene.rejected() == {}


# Removed folders and the API


def test_a_removed_folder_retires_its_adapter_after_some_seconds(scene: Scene) -> None:
    scene.put("a", 1)
    b = scene.put("b", 2)
    scene.scan()
    scene.remove("a")
    assert set(scene.scan(3)) == {"a", "b"}, "it may be replaced"
    assert scene.scan(1) == {"b": b}
    a = scene.put("a", 1)
    assert scene.scan() == {"a": a, "b": b}
    for path in (scene.directory / "a").iterdir():
        path.unlink()
    assert scene.scan(1) == {"a": a, "b": b}
    a = scene.put("a", 3)
    assert scene.scan() == {"a": a, "b": b}, "a folder that is replaced is never retired"
    for name in "ab":
        scene.remove(name)
    assert scene.scan(5) == {}


def test_a_removal_that_fails_is_retried(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: str) -> bool:
        raise StoreFailed("the disk is full")

    a = scene.put("a", 1)
    scene.scan()
    scene.remove("a")
    with monkeypatch.context() as patch:
        patch.setattr(scene.registry, "remove_folder", full)
        assert scene.scan(6) == {"a": a} and "not retired: the disk is full" in caplog.text
    assert scene.scan(6) == {}


def test_an_adapter_deleted_through_the_api_stays_deleted_until_its_content_changes(scene: Scene) -> None:
    scene.put("a", 1)
    scene.scan()
    asyncio.run(scene.registry.retire("a"))
    assert scene.scan(5) == {}
    for file in (scene.directory / "a").iterdir():
        os.utime(file, (1, 1))
    assert scene.scan(5) == {}
    imported = scene.registry.imported_folder("watch/a")
    assert imported is not None and imported.signature == signature_of(scene.directory / "a", None)
    scene.restart()
    (scene.directory / "a" / "README.md").write_text("a new card")
    assert scene.scan(5) == {}
    assert scene.scan(1) == {} and scene.put("a", 2) == scene.scan(5)["a"]


def test_a_folder_published_by_the_api_is_remembered_as_imported(scene: Scene, tmp_path: Path) -> None:
    a, root = scene.put("a", 1), scene.directory.resolve()
    state = watched_folder_state("a", root / "a", scene.directory)
    assert state == ("watch/a", signature_of(root / "a", None))
    (tmp_path / "link").symlink_to(scene.directory)
    assert watched_folder_state("a", root / "a", tmp_path / "link") == state
    for name, folder in (("b", root / "a"), ("a", root / "below" / "a")):
        assert watched_folder_state(name, folder, scene.directory) is None
    scene.registry.publish_now("a", root / "a", within=scene.directory, imported=state)
    asyncio.run(scene.registry.retire("a"))
    scene.restart()
    assert scene.scan(5) == {}
    scene.registry.publish_now("a", root / "a", within=scene.directory, imported=state)
    assert scene.scan(5) == {"a": a}
    scene.remove("a")
    assert scene.scan(5) == {"a": a}, "what the API published stays"


def test_content_published_over_a_folder_stays(scene: Scene) -> None:
    scene.put("a", 1)
    scene.scan()
    other = scene.publish("a", 2)
    scene.restart()
    assert scene.scan(5) == {"a": other}
    scene.remove("a")
    assert scene.scan(6) == {"a": other}
    a = scene.put("a", 1)
    assert scene.scan(3) == {"a": a}


def test_a_removed_folder_restores_the_version_that_it_replaced(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    own = scene.publish("a", 1)
    for seed in range(2, 6):  # the replaced version is kept beyond the last three
        assert scene.put("a", seed) == scene.scan()["a"]
    asyncio.run(scene.registry.pin("a"))
    scene.restart()
    scene.scan()
    scene.remove("a")
    assert scene.scan(5) == {"a": own} and "the version that it replaced is served again" in caplog.text
    assert scene.registry.describe("a")["pinned"]
    scene.registry.retire_now("a")
    scene.put("a", 3)
    assert "a" in scene.scan(3)
    scene.remove("a")
    assert scene.scan(5) == {}


def test_a_rollback_below_a_folder_is_what_its_removal_restores(scene: Scene) -> None:
    first, second = scene.publish("a", 1), scene.publish("a", 2)
    folder = scene.put("a", 3)
    scene.scan()
    for version in (first, folder):
        asyncio.run(scene.registry.roll_back("a", version))
    scene.restart()
    scene.scan()
    scene.remove("a")
    assert scene.scan(6) == {"a": first}
    assert [v["digest"] for v in scene.registry.describe("a")["versions"]] == [first, second]


@pytest.mark.parametrize("folder_first", [False, True])
def test_content_that_was_also_published_stays_when_its_folder_is_removed(scene: Scene, folder_first: bool) -> None:
    if not folder_first:
        scene.publish("a", 1)
    own = scene.put("a", 1)
    assert scene.scan(3) == {"a": own}
    if folder_first:
        scene.publish("a", 1)
    scene.remove("a")
    assert scene.scan(6) == {"a": own}


def test_a_new_card_or_task_is_a_change_without_a_new_version(scene: Scene) -> None:
    changes: list[str] = []
    observer = Observer()
    observer.on_change = lambda name, version: changes.append(name)  # type: ignore[method-assign]
    scene.restart(observer=observer)
    a = scene.put("a", 1, task={"prompt": "old {input}"})
    scene.scan()
    (scene.directory / "a" / "task.json").write_text('{"prompt": "new {input}"}')
    assert scene.scan() == {"a": a} and scene.registry.metadata("a")["task"] == {"prompt": "new {input}"}
    assert len(scene.registry.describe("a")["versions"]) == 1 and changes == ["a", "a"]
    scene.scan(3)
    assert changes == ["a", "a"]


def test_a_task_is_inherited_unless_the_folder_lost_its_task_file(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def task() -> Any:
        return (scene.registry.metadata("a")["task"] or {}).get("prompt")

    scene.publish("a", 1, task={"prompt": "sent {input}"})
    for seed in (2, 3):
        scene.put("a", seed)
        scene.scan()
        assert task() == "sent {input}"
    scene.put("a", 4, task={"prompt": "own {input}"})
    scene.scan()
    assert task() == "own {input}" and "was removed from the folder" not in caplog.text
    for seed in (5, 5):
        (scene.directory / "a" / "task.json").unlink()
        a = scene.put("a", seed)
        assert scene.scan() == {"a": a} and task() is None
        assert "task.json was removed from the folder of a" in caplog.text
        scene.put("a", 5, task={"prompt": "own {input}"})
        scene.scan()


def test_a_missing_version_is_imported_from_its_folder_again(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.scan()
    scene.registry.close()
    shutil.rmtree(scene.root / "store" / "versions" / a)
    scene.restart()
    assert scene.served() == {}
    assert scene.scan() == {"a": a} and scene.rejected() == {}


# The directory itself


def test_a_directory_that_is_away_or_replaced_removes_nothing(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.scan()
    scene.directory.rename(scene.root / "elsewhere")
    assert scene.scan(10) == {"a": a}
    scene.directory.mkdir()  # such as the empty directory that something was mounted on
    assert scene.scan(10) == {"a": a}
    scene.directory.rmdir()
    (scene.root / "elsewhere").rename(scene.directory)
    assert scene.scan(10) == {"a": a}
    scene.remove("a")
    assert scene.scan(5) == {}


def test_a_directory_that_cannot_be_read_removes_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = scene.put("a", 1)
    scene.scan()

    def stale(path: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(directory_watcher.os, "scandir", stale)
        assert scene.scan(10) == {"a": a} and "cannot be read: Stale file handle" in caplog.text
    lstat = Path.lstat

    def forbidden(path: Path) -> os.stat_result:
        if path.parent.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", forbidden)
    assert scene.scan(10) == {"a": a} and "Permission denied" in scene.rejected()["a"]


def test_an_adapter_whose_folder_went_while_the_server_was_down_is_served(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = scene.put("a", 1), scene.put("b", 2)
    scene.scan()
    (scene.directory / "a").rename(scene.root / "a")
    scene.restart()
    caplog.set_level(logging.INFO)
    assert scene.scan(10) == {"a": a, "b": b}
    assert [r.message for r in caplog.records] == ["served from the store, without a folder: a"]
    asyncio.run(scene.registry.retire("a"))
    assert scene.scan(5) == {"b": b} and scene.registry.imported_folder("watch/a") is None
    (scene.root / "a").rename(scene.directory / "a")
    assert scene.scan(5) == {"a": a, "b": b}, "deleted and put back"


# The thread


@pytest.mark.parametrize("force_polling", [False, True])
def test_the_thread_imports_changes_and_stops_quickly(
    scene: Scene, force_polling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_watcher, "STILL_SECONDS", 0.1)
    monkeypatch.setattr(directory_watcher, "REMOVED_SECONDS", 0.1)
    scene.directory.rmdir()
    watcher = DirectoryWatcher(scene.registry, scene.directory, force_polling=force_polling)
    watcher.start()
    scene.directory.mkdir()
    a = scene.put("a", 1)
    until(lambda: scene.served() == {"a": a})
    b = scene.put("b", 2)
    until(lambda: scene.served() == {"a": a, "b": b})
    scene.remove("a")
    until(lambda: scene.served() == {"b": b})
    shutil.rmtree(scene.directory)
    scene.directory.mkdir()
    c = scene.put("c", 3)
    until(lambda: scene.served().get("c") == c)
    start = time.monotonic()
    watcher.stop()
    assert time.monotonic() - start < 1
    scene.put("d", 4)
    assert "d" not in scene.served()


def test_the_thread_survives_an_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory_watcher, "STILL_SECONDS", 0.05)
    scan, failures = scene.watcher.scan, []

    def fail_once() -> None:
        if not failures:
            failures.append(1)
            raise BaseException("panic")
        scan()

    monkeypatch.setattr(scene.watcher, "scan", fail_once)
    scene.watcher._clock = time.monotonic
    scene.watcher.start()
    a = scene.put("a", 1)
    until(lambda: scene.served() == {"a": a})
    scene.watcher.stop()
    assert "watching the adapter directory failed" in caplog.text


def test_stopping_does_not_wait_for_all_folders(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        scene.put(f"a{n}", n)
    scene.watcher.scan()
    scene.now += 1
    publish = scene.registry.publish_now

    def stop_and_publish(*args: Any, **options: Any) -> Any:
        scene.watcher.stop()
        return publish(*args, **options)

    monkeypatch.setattr(scene.registry, "publish_now", stop_and_publish)
    assert list(scene.scan(1)) == ["a0"]


# The library


def test_the_library_is_imported_once_and_skips_what_does_not_fit(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    good = scene.write(scene.library / "good", 1).digest
    scene.write(scene.library / "wide", 2, rank=99)
    (scene.library / "__pycache__").mkdir()
    (scene.library / "empty").mkdir()
    (scene.library / "__init__.py").write_text("")
    caplog.set_level(logging.INFO)
    assert scan_library(scene.registry, scene.library) == ["good"] and scene.served() == {"good": good}
    assert ["wide is skipped" in r.message for r in caplog.records if "library" in r.message] == [True]
    scene.restart(read=None)
    assert scan_library(scene.registry, scene.library / "nothing") == []
    shutil.rmtree(scene.library / "wide")
    assert scan_library(scene.registry, scene.library) == ["good"], "nothing is read again"


def test_the_library_never_takes_a_name_from_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        scene.write(scene.library / name, seed)
    own = scene.publish("a", 3)
    assert scan_library(scene.registry, scene.library) == ["b"] and scene.served()["a"] == own
    scene.registry.retire_now("b")
    assert scan_library(scene.registry, scene.library) == [] and "b" not in scene.served()
    for seed in (4, 5):
        newer = scene.write(scene.library / "b", seed).digest
        assert scan_library(scene.registry, scene.library) == ["b"] and scene.served()["b"] == newer
    own = scene.publish("b", 3)
    scene.write(scene.library / "b", 6)
    assert scan_library(scene.registry, scene.library) == [] and scene.served()["b"] == own

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("bug")

    scene.write(scene.library / "c", 7)
    monkeypatch.setattr(scene.registry, "publish_now", fail)
    assert scan_library(scene.registry, scene.library) == []


def test_a_folder_that_replaced_the_librarys_adapter_restores_it(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def task() -> str:
        return scene.registry.metadata("a")["task"]["prompt"]

    caplog.set_level(logging.INFO)
    shipped = scene.write(scene.library / "a", 1, task={"prompt": "shipped {input}"}).digest
    assert scan_library(scene.registry, scene.library) == ["a"]
    for seed in range(2, 7):
        own = scene.put("a", seed, task={"prompt": "own {input}"})
        assert scene.scan() == {"a": own} and task() == "own {input}"
    assert scan_library(scene.registry, scene.library) == []
    scene.remove("a")
    assert scene.scan(5) == {"a": shipped} and task() == "shipped {input}"
    assert "the library's adapter is served again" in caplog.text and "retired" not in caplog.text
    assert [v["digest"] for v in scene.registry.describe("a")["versions"]] == [shipped]
    scene.restart()
    assert scan_library(scene.registry, scene.library) == ["a"] and scene.scan() == {"a": shipped}
    scene.put("a", 1, task={"prompt": "own {input}"})
    assert scene.scan() == {"a": shipped} and task() == "own {input}"
    scene.remove("a")
    assert scene.scan(5) == {"a": shipped} and task() == "shipped {input}", "where only the task differed"
    scene.registry.retire_now("a")
    scene.put("a", 2)
    scene.scan()
    scene.remove("a")
    assert scene.scan(5) == {} and scan_library(scene.registry, scene.library) == []
