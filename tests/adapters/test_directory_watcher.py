"""The watched directory and the library: what is taken in, when, and what is told of the rest."""

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

from adapters.directory_watcher import DirectoryWatcher, scan_library, signature_of, watched_folder_state
from adapters.errors import InvalidAdapter, StoreFailed
from adapters.peft_format import read_folder
from adapters.protocols import Observer
from adapters.registry import Registry
from adapters.store import AdapterStore, Disk
from adapters.weights import LoraWeights
from tests.waiting import until

Write = Callable[..., LoraWeights]


class Scene:
    """A registry that can be opened again, a watched directory, and a clock that is turned by hand."""

    def __init__(self, root: Path, shapes: Any, write: Write) -> None:
        self.root, self.shapes, self.write = root, shapes, write
        self.directory = root / "adapters"
        self.now = 100.0
        self.registry: Registry | None = None
        self.directory.mkdir()
        self.restart()

    def restart(self, disk: Disk | None = None, **options: Any) -> None:
        if self.registry is not None:
            self.registry.close()
        store = AdapterStore(self.root / "store", disk=disk)
        self.registry = Registry(store, **{"shapes": self.shapes, "ram_bytes": 1 << 20, **options})
        self.watch = DirectoryWatcher(self.registry, self.directory, clock=lambda: self.now)

    def put(self, name: str, seed: int, **extras: Any) -> str:
        return self.write(self.directory / name, seed, **extras).digest

    def look(self, times: int = 1, seconds: float = 1.0) -> dict[str, str]:
        """Poll, `seconds` apart; answers name -> digest."""
        for _ in range(times):
            self.watch.poll()
            self.now += seconds
        return self.served()

    def served(self) -> dict[str, str]:
        assert self.registry is not None
        return {name: self.registry.current(name).digest for name in self.registry.names()}

    def rejected(self) -> dict[str, str]:
        assert self.registry is not None
        return {entry["path"]: entry["reason"] for entry in self.registry.rejected()}


@pytest.fixture
def scene(tmp_path: Path, tiny_shapes: Any, write_adapter: Write) -> Iterator[Scene]:
    scene = Scene(tmp_path, tiny_shapes, write_adapter)
    yield scene
    scene.registry.close()


def age(folder: Path) -> None:
    """Let the folder's files be old, as far as a test can: their change time is always now."""
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def test_a_folder_is_read_when_it_has_been_still(scene: Scene) -> None:
    a = scene.put("a", 1)
    assert scene.look(seconds=0.5) == {}
    assert scene.look(seconds=0.5) == {}
    assert scene.look() == {"a": a}


def test_an_adapter_in_the_directory_itself_is_told(scene: Scene) -> None:
    scene.put("a", 1)
    for path in (scene.directory / "a").iterdir():
        shutil.copy(path, scene.directory)
    assert list(scene.look(2)) == ["a"]
    assert "move the adapter's files into a folder" in scene.rejected()["."]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (scene.directory / name).unlink()
    scene.look()
    assert scene.rejected() == {} and list(scene.served()) == ["a"]


def test_one_whose_tensors_are_still_written_under_another_name_is_waited_for(scene: Scene) -> None:
    """As rsync does it: the new config is in its place at once."""
    old = scene.put("a", 1)
    scene.look(2)
    new = scene.write(scene.root / "new", 2).digest
    folder = scene.directory / "a"
    shutil.copy(scene.root / "new" / "adapter_config.json", folder)
    growing, tensors = folder / ".adapter_model.safetensors.Xb3aQz", scene.root / "new" / "adapter_model.safetensors"
    for size in range(40):
        growing.write_bytes(tensors.read_bytes()[:size])
        assert scene.look() == {"a": old}
    growing.write_bytes(tensors.read_bytes())
    growing.rename(folder / "adapter_model.safetensors")
    assert scene.look(2) == {"a": new} and len(scene.registry.describe("a")["versions"]) == 2


def test_what_else_changes_in_a_folder_does_not_keep_it_from_being_read(scene: Scene) -> None:
    """As the log of a training, or what a file system leaves of a file that somebody has open."""
    new = scene.put("a", 1)
    for size in range(3):
        for name in ("train.log", ".nfs0001", ".swap"):
            (scene.directory / "a" / name).write_bytes(bytes(size))
        found = scene.look()
    assert found == {"a": new}


def test_where_the_config_alone_is_new_the_tensors_are_waited_for(scene: Scene) -> None:
    """Not for long, as somebody may have changed that file alone; new tensors alone are taken in as ever."""
    old = scene.put("a", 1)
    scene.look(2)
    scene.write(scene.root / "new", 2)
    config, tensors = (scene.root / "new" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    new = read_folder(scene.root / "new", name="a").digest
    shutil.copy(config, scene.directory / "a")
    assert scene.look(5) == {"a": old}
    assert scene.look()["a"] not in (old, new)
    shutil.copy(tensors, scene.directory / "a")
    assert scene.look(2) == {"a": new}


def test_a_folder_that_is_renamed_into_its_place_is_taken_in_at_once(scene: Scene) -> None:
    scene.put("a", 1)
    scene.look(2)
    new = scene.put(".new", 2)
    time.sleep(1.05)
    (scene.directory / "a").rename(scene.directory / ".old")
    scene.look()
    (scene.directory / ".new").rename(scene.directory / "a")
    assert scene.look() == {"a": new}


def test_a_folder_that_may_not_be_listed_is_known_by_its_files(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    a, scan = scene.put("a", 1), os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert scene.look(2) == {"a": a}


def test_a_folder_in_which_a_file_goes_as_it_is_looked_at_is_looked_at_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = scene.put("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.directory_watcher._files", lambda *_, **__: os.stat(scene.root / "nothing"))
        assert scene.look(3) == {} and scene.rejected() == {}
    assert scene.look(2) == {"a": a}


def test_what_is_no_folder_but_may_hold_an_adapter_is_told(scene: Scene) -> None:
    a = scene.put("a", 1)
    for name in ("formal.zip", "Formal.TAR.GZ", "old.tgz", "formal.safetensors", "a.zip", ".b.zip", "notes.txt", "zip"):
        (scene.directory / name).write_bytes(b"x")
    assert scene.look(2) == {"a": a}
    told = scene.rejected()
    assert set(told) == {"formal.zip", "Formal.TAR.GZ", "old.tgz", "formal.safetensors"}, "a.zip was unpacked"
    assert told["formal.zip"] == "it is an archive: unpack it into a folder of its own, whose name is the adapter's"
    assert "adapter_config.json, into a folder" in told["formal.safetensors"]
    for name in told:
        (scene.directory / name).unlink()
    scene.look()
    assert scene.rejected() == {}


def test_both_files_of_an_adapter_in_the_directory_itself_are_told_as_one(scene: Scene) -> None:
    scene.write(scene.directory, 1)
    scene.look(2)
    assert set(scene.rejected()) == {"."}


def test_a_folder_that_keeps_changing_is_waited_for(scene: Scene) -> None:
    for seed in range(5):
        a = scene.put("a", seed)
        assert scene.look(seconds=0.9) == {}
    assert scene.look(2) == {"a": a}


def test_files_left_alone_for_a_second_are_read_at_once(scene: Scene) -> None:
    a = scene.put("a", 1)
    time.sleep(1.05)
    assert scene.look() == {"a": a}


def test_half_a_folder_is_told_and_then_completed(scene: Scene) -> None:
    a = scene.put("a", 1)
    whole = (scene.directory / "a" / "adapter_model.safetensors").read_bytes()
    (scene.directory / "a" / "adapter_model.safetensors").unlink()
    assert scene.look(3) == {}
    assert scene.rejected() == {"a": "adapter_model.safetensors is missing"}
    since = scene.registry.rejected()[0]["since"]
    (scene.directory / "a" / "adapter_model.safetensors").write_bytes(whole[:-50])
    assert scene.look(3) == {} and "damaged" in scene.rejected()["a"]
    assert scene.registry.rejected()[0]["since"] >= since
    (scene.directory / "a" / "adapter_model.safetensors").write_bytes(whole)
    assert scene.look(3) == {"a": a} and scene.rejected() == {}


def test_changed_content_is_a_new_version_and_a_bad_change_leaves_the_old(scene: Scene) -> None:
    first = scene.put("a", 1)
    scene.look(2)
    second = scene.put("a", 2)
    assert scene.look(2) == {"a": second}
    assert [v["digest"] for v in scene.registry.describe("a")["versions"]] == [second, first]
    (scene.directory / "a" / "adapter_config.json").write_text("{")
    assert scene.look(33) == {"a": second} and "JSON" in scene.rejected()["a"]


def test_a_rejected_folder_is_read_again_only_when_it_has_changed(scene: Scene, tiny_shapes: Any) -> None:
    reads: list[str] = []

    def refuse(path: Path, *, name: str, **options: Any) -> LoraWeights:
        reads.append(name)
        raise InvalidAdapter("no")

    scene.restart(read=refuse)
    scene.put("a", 1)
    scene.look(10)
    assert reads == ["a"]
    scene.put("a", 2)
    scene.look(10)
    assert reads == ["a", "a"]


class FullDisk(Disk):
    full = False

    def copy(self, source: int, target: Path, limit: int) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().copy(source, target, limit)


def test_want_of_room_is_tried_again_unasked(scene: Scene) -> None:
    disk = FullDisk()
    scene.restart(disk)
    disk.full = True
    a = scene.put("a", 1)
    assert scene.look(3) == {} and "the disk is full" in scene.rejected()["a"]
    disk.full = False
    assert scene.look(5) == {}
    assert scene.look(40) == {"a": a} and scene.rejected() == {}


def test_want_of_open_files_is_no_fault_of_the_folder(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be refused until it changes; and whoever may look would read where the store is."""
    opened, a = os.open, scene.put("a", 1)

    def short(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).endswith("adapter_config.json") and flags & os.O_NOFOLLOW:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", short)
    assert scene.look(3) == {}
    assert scene.rejected() == {"a": "adapter_config.json cannot be read: Too many open files"}
    monkeypatch.undo()
    assert scene.look(40) == {"a": a} and scene.rejected() == {}


def test_names_that_nobody_may_have(scene: Scene) -> None:
    for name in ("a,b", "base", "-x", "with space", "é"):
        scene.put(name, 1)
    scene.put(".hidden", 1)
    scene.put(os.fsdecode(b"\xff"), 1)
    (scene.directory / "only, a folder").mkdir()
    (scene.directory / "file").write_text("x")
    assert scene.look(3) == {}
    assert set(scene.rejected()) == {"a,b", "base", "-x", "with space", "é", "\N{REPLACEMENT CHARACTER}"}


def test_links_out_of_the_directory_are_refused(scene: Scene, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    scene.write(outside, 1)
    (scene.directory / "folder").symlink_to(outside)
    (scene.directory / "files").mkdir()
    for path in outside.iterdir():
        (scene.directory / "files" / path.name).symlink_to(path)
    a = scene.put("a", 2)
    (scene.directory / "twin").symlink_to("a")
    assert scene.look(3) == {"a": a, "twin": a}
    assert set(scene.rejected()) == {"folder", "files"}
    assert all("leads out of the adapter directory" in reason for reason in scene.rejected().values())
    assert str(tmp_path) not in str(scene.registry.rejected())
    (scene.directory / "files" / "adapter_config.json").unlink()
    (scene.directory / "files" / "adapter_model.safetensors").unlink()
    (scene.directory / "folder").unlink()
    scene.look(1)
    assert scene.rejected() == {}


def test_odd_folders_keep_no_other_from_being_served(scene: Scene) -> None:
    a = scene.put("a", 1)
    (scene.directory / "a" / "README.md").write_bytes("# café".encode("latin-1"))
    shutil.copytree(scene.directory / "a", scene.directory / "b")
    scene.put("deep", 2)
    (scene.directory / "deep" / "task.json").write_text('{"prompt": ' + "[" * 700 + "]" * 700 + "}")
    (scene.directory / "loop").symlink_to("loop")
    (scene.directory / "looped").mkdir()
    (scene.directory / "looped" / "adapter_config.json").symlink_to("adapter_config.json")
    z = scene.put("z", 3)
    assert scene.look(3) == {"a": a, "b": a, "z": z}
    many = "Too many levels of symbolic links"
    told = scene.rejected()
    looped = told.pop("looped").removeprefix("adapter_config.json cannot be read: ")
    assert looped in ("it is a link to itself", many), "without a path, as Python 3.11 has it and as later ones do"
    assert told == {"deep": "task.json is nested more than 64 levels deep", "loop": f"cannot be read: {many}"}
    shutil.rmtree(scene.directory / "looped")
    (scene.directory / "loop").unlink()
    scene.look()
    assert set(scene.rejected()) == {"deep"}


def test_a_folder_that_may_not_be_entered_any_more_is_served_on(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = scene.put("a", 1), scene.put("b", 2)
    assert scene.look(2) == {"a": a, "b": b}
    (scene.directory / "lost+found").mkdir()
    lstat = os.lstat

    def forbidden(path: Any, **options: Any) -> os.stat_result:
        if os.path.basename(os.path.dirname(path)) in ("a", "c", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return lstat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", forbidden)
        scene.put("c", 3)
        assert scene.look(6) == {"a": a, "b": b}
        told = "adapter_config.json cannot be read: Permission denied"
        assert scene.rejected() == {"a": told, "c": told}
    assert set(scene.look(2)) == {"a", "b", "c"} and scene.rejected() == {}
    away = scene.directory / ".away"
    for _ in range(2):
        (scene.directory / "a").rename(away)
        assert set(scene.look()) == {"a", "b", "c"}, "for a moment, as a share that comes and goes is"
        away.rename(scene.directory / "a")
        with monkeypatch.context() as patch:
            patch.setattr(os, "lstat", forbidden)
            scene.look(6)
    shutil.rmtree(scene.directory / "a")
    assert set(scene.look(6)) == {"b", "c"}


def fail_on(scene: Scene, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the publishing of one name end by a fault of our own."""
    publish = scene.registry.publish_now

    def fails(name: str, *rest: Any, **options: Any) -> Any:
        if name == bad:
            raise RuntimeError("a fault")
        return publish(name, *rest, **options)

    monkeypatch.setattr(scene.registry, "publish_now", fails)


def test_a_fault_of_our_own_costs_one_folder_and_is_tried_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digests = {name: scene.put(name, i) for i, name in enumerate("abc")}
    fail_on(scene, "b", monkeypatch)
    assert scene.look(4) == {name: digests[name] for name in "ac"}
    assert scene.rejected() == {"b": "the server failed on it; its log says how"}
    assert len([r for r in caplog.records if "b cannot be taken in" in r.message]) == 1, "not at every look"
    monkeypatch.undo()
    scene.look()
    assert scene.look(1, seconds=40) == {name: digests[name] for name in "ac"}
    assert scene.look() == digests and scene.rejected() == {}


@pytest.mark.parametrize("below", ["formal", "checkpoint-10", "run/formal", "run/checkpoint-10"])
def test_an_adapter_one_or_two_levels_down_is_told_of(scene: Scene, below: str) -> None:
    a = scene.put("a", 1)
    shutil.copytree(scene.directory / "a", scene.directory / "named" / below)
    shutil.copytree(scene.directory / "a", scene.directory / "deep" / "er" / "still" / "down")
    shutil.copytree(scene.directory / "a", scene.directory / "hidden" / ".cache")
    shutil.copytree(scene.directory / "a", scene.directory / "hidden" / "run" / ".cache")
    (scene.directory / "named" / "README.md").write_text("# A card")
    (scene.directory / "empty" / "folder").mkdir(parents=True)
    assert scene.look() == {} and scene.rejected() == {}, "it may be copied still"
    assert scene.look(3) == {"a": a}
    assert set(scene.rejected()) == {"named"}
    reason = scene.rejected()["named"]
    assert "adapter_config.json is missing" in reason
    assert f"move the files of {below!r} up" in reason and f"register named/{below}" in reason
    since = scene.registry.rejected()[0]["since"]
    scene.look(3)
    assert scene.registry.rejected()[0]["since"] == since
    for path in (scene.directory / "named" / below).iterdir():
        path.rename(scene.directory / "named" / path.name)
    assert scene.look(3) == {"a": a, "named": a} and scene.rejected() == {}


def test_a_merged_model_is_told_of_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    a = scene.put("a", 1)
    merged, notes = scene.directory / "merged", scene.directory / "notes"
    for folder in (merged, notes):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (merged / "model-00001-of-00002.safetensors").write_bytes(b"part")
    assert scene.look() == {} and scene.rejected() == {}, "it may be copied still"
    assert scene.look(3) == {"a": a}
    assert set(scene.rejected()) == {"merged"}
    reason = scene.rejected()["merged"]
    assert "adapter_config.json is missing: this is a whole model" in reason and "--model serves it" in reason
    assert caplog.text.count("'merged' is not served") == 1
    for path in (scene.directory / "a").iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    assert scene.look(3) == {"a": a, "merged": a} and scene.rejected() == {}
    for path in merged.glob("adapter_*"):
        path.unlink()
    assert scene.look(8) == {"a": a} and set(scene.rejected()) == {"merged"}
    shutil.rmtree(merged)
    assert scene.look(2) == {"a": a} and scene.rejected() == {}


@pytest.mark.parametrize("run", ["", "run/"])
def test_of_several_checkpoints_the_last_is_named(scene: Scene, run: str) -> None:
    a = scene.put("a", 1)
    for steps in (500, 1000, 1500):
        shutil.copytree(scene.directory / "a", scene.directory / "trainer" / f"{run}checkpoint-{steps}")
    scene.look()
    assert scene.look(3) == {"a": a}
    assert f"but '{run}checkpoint-1500' in it has one" in scene.rejected()["trainer"]


def test_of_the_checkpoints_of_several_runs_none_is_the_last(scene: Scene) -> None:
    scene.put("a", 1)
    for run in ("one", "other"):
        shutil.copytree(scene.directory / "a", scene.directory / "trainer" / run / "checkpoint-10")
    scene.look()
    scene.look(3)
    assert "but 2 folders in it have one, 'one/checkpoint-10' among them" in scene.rejected()["trainer"]


def test_a_folder_of_many_folders_is_looked_into_within_a_bound(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at every second, for as long as it lies there."""
    for name in range(4):
        for below in range(4):
            (scene.directory / "photos" / f"{name}" / f"{below}").mkdir(parents=True)
    seen: list[str] = []
    monkeypatch.setattr("adapters.format_hints.MAX_ENTRIES", 5)
    monkeypatch.setattr(os.path, "isfile", lambda path: bool(seen.append(path)))
    scene.look()
    assert len(seen) == 9, "four, and five of theirs"


def test_a_folder_that_may_not_be_looked_into_hides_nothing_beside_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.put("a", 1)
    shutil.copytree(scene.directory / "a", scene.directory / "b" / "run" / "formal")
    closed = scene.directory / "b" / "closed"
    closed.mkdir()
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, "no", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    scene.look()
    scene.look(3)
    assert "'run/formal' in it has one" in scene.rejected()["b"]


def test_a_folder_whose_own_files_are_copied_last_is_waited_for(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    target = scene.directory / "b" / "checkpoint-10"
    target.mkdir(parents=True)
    for path in sorted((scene.directory / "a").iterdir()):
        (target / path.name).write_bytes(path.read_bytes())
        assert scene.look(seconds=0.9) == {"a": a} and scene.rejected() == {}
    for part in ("optimizer.pt", "optimizer.pt", "optimizer.pt", "scheduler.pt"):
        with open(target / part, "ab") as file:
            file.write(b"part")
        assert scene.look(seconds=0.9) == {"a": a} and scene.rejected() == {}
    for path in (scene.directory / "a").iterdir():
        (target.parent / path.name).write_bytes(path.read_bytes())
    assert scene.look(2) == {"a": a, "b": a} and scene.rejected() == {}


def test_what_is_told_of_a_nested_adapter_goes_with_it(scene: Scene, tmp_path: Path) -> None:
    scene.write(scene.directory / "named" / "formal", 1)
    scene.write(tmp_path / "outside", 1)
    (scene.directory / "links").mkdir()
    (scene.directory / "links" / "out").symlink_to(tmp_path / "outside")
    (scene.directory / "named" / "loop").symlink_to("loop")
    (scene.directory / "named" / "a link").symlink_to(tmp_path / "outside")
    scene.look(3)
    assert set(scene.rejected()) == {"named"}
    shutil.rmtree(scene.directory / "named" / "formal")
    scene.look()
    assert scene.rejected() == {}


def test_files_that_moved_down_take_their_adapter_with_them(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    (scene.directory / "a" / "formal").mkdir()
    for path in list((scene.directory / "a").glob("adapter_*")):
        path.rename(scene.directory / "a" / "formal" / path.name)
    assert scene.look(3) == {"a": a}, "they may be about to be written anew"
    assert scene.look(4) == {} and set(scene.rejected()) == {"a"}


def test_a_removed_folder_takes_its_adapter_with_it(scene: Scene) -> None:
    scene.put("a", 1)
    b = scene.put("b", 2)
    scene.look(2)
    shutil.rmtree(scene.directory / "a")
    assert set(scene.look(3)) == {"a", "b"}, "it may be about to be written anew"
    assert scene.look(1) == {"b": b}
    a = scene.put("a", 1)
    assert scene.look(2) == {"a": a, "b": b}, "put back, it is served again"


def test_a_folder_that_is_replaced_is_never_away(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    for path in (scene.directory / "a").iterdir():
        path.unlink()
    assert scene.look(1) == {"a": a}
    a = scene.put("a", 2)
    assert scene.look(2) == {"a": a}
    for path in (scene.directory / "a").iterdir():
        path.unlink()
    assert scene.look(3) == {"a": a}, "for as long as one that was never away before"
    assert scene.look(1) == {}, "an empty folder is a removed one"


def test_deleted_through_the_api_it_stays_deleted_until_its_content_changes(scene: Scene) -> None:
    scene.put("a", 1)
    scene.look(2)
    asyncio.run(scene.registry.retire("a"))
    assert scene.look(5) == {}
    age(scene.directory / "a")
    assert scene.look(5) == {}, "touched is not changed"
    taken = scene.registry.imported_folder("watch/a")
    assert taken is not None and taken.signature == signature_of(scene.directory / "a", None), "and not read again"
    scene.restart()
    assert scene.look(5) == {}
    (scene.directory / "a" / "README.md").write_text("a new card")
    assert scene.look(5) == {}
    a = scene.put("a", 2)
    assert scene.look(5) == {"a": a}


def test_published_from_its_folder_and_deleted_before_a_look_it_stays_deleted(scene: Scene) -> None:
    a, folder = scene.put("a", 1), scene.directory / "a"

    def publish() -> str:
        taken = watched_folder_state("a", folder.resolve(), scene.directory)
        return scene.registry.publish_now("a", folder, within=scene.directory, imported=taken).version.digest

    assert publish() == a
    asyncio.run(scene.registry.retire("a"))
    scene.restart()
    assert scene.look(5) == {}
    assert publish() == a and scene.look(5) == {"a": a}, "asked for, it is served again"
    shutil.rmtree(folder)
    assert scene.look(5) == {"a": a}, "nor does it go with the folder"
    asyncio.run(scene.registry.retire("a"))
    a = scene.put("a", 2)
    assert scene.look(5) == {"a": a}


def test_only_a_folder_that_the_watch_gives_the_name_to_is_remembered(scene: Scene, tmp_path: Path) -> None:
    scene.put("a", 1)
    root = scene.directory.resolve()
    assert watched_folder_state("a", root / "a", scene.directory) == ("watch/a", signature_of(root / "a", None))
    assert watched_folder_state("b", root / "a", scene.directory) is None
    assert watched_folder_state("a", root / "below" / "a", scene.directory) is None
    assert watched_folder_state("a", tmp_path / "a", tmp_path / "fetched") is None
    (tmp_path / "link").symlink_to(scene.directory)
    assert watched_folder_state("a", root / "a", tmp_path / "link") is not None


def test_what_the_api_put_over_a_folder_stays(scene: Scene, tmp_path: Path) -> None:
    scene.put("a", 1)
    scene.look(2)
    scene.write(tmp_path / "other", 2)
    other = scene.registry.publish_now("a", tmp_path / "other").version.digest
    scene.restart()
    assert scene.look(5) == {"a": other}
    shutil.rmtree(scene.directory / "a")
    assert scene.look(6) == {"a": other}, "nor does it go with the folder"
    a = scene.put("a", 1)
    assert scene.look(3) == {"a": a}


def test_what_a_folder_was_put_over_is_served_again(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own = scene.write(tmp_path / "own", 1).digest
    scene.registry.publish_now("a", tmp_path / "own")
    for seed in range(2, 6):  # it is kept for that, beyond the last three
        assert scene.put("a", seed) == scene.look(2)["a"]
    asyncio.run(scene.registry.pin("a"))
    scene.restart()
    scene.look(2)
    shutil.rmtree(scene.directory / "a")
    assert scene.look(5) == {"a": own} and "again what was published before" in caplog.text
    assert scene.registry.describe("a")["pinned"], "the name is, whatever it has"
    asyncio.run(scene.registry.unpin("a"))
    asyncio.run(scene.registry.retire("a"))
    scene.put("a", 3)
    assert "a" in scene.look(3)
    shutil.rmtree(scene.directory / "a")
    assert scene.look(5) == {}, "what was deleted stays so"


@pytest.mark.parametrize("folder_first", [False, True])
def test_what_was_published_does_not_go_with_a_folder_of_the_same_content(
    scene: Scene, tmp_path: Path, folder_first: bool
) -> None:
    own = scene.write(tmp_path / "own", 1).digest
    if not folder_first:
        scene.registry.publish_now("a", tmp_path / "own")
    scene.put("a", 1)
    assert scene.look(3) == {"a": own}
    if folder_first:
        assert not scene.registry.publish_now("a", tmp_path / "own").created
    shutil.rmtree(scene.directory / "a")
    assert scene.look(6) == {"a": own}


def test_what_was_rolled_back_to_is_what_a_folder_is_over(scene: Scene, tmp_path: Path) -> None:
    first, second = (scene.write(tmp_path / f"own{seed}", seed).digest for seed in (1, 2))
    for seed in (1, 2):
        scene.registry.publish_now("a", tmp_path / f"own{seed}")
    folder = scene.put("a", 3)
    scene.look(2)
    for version in (first, folder):  # and back to the folder's own
        asyncio.run(scene.registry.roll_back("a", version))
    scene.restart()
    scene.look(2)
    shutil.rmtree(scene.directory / "a")
    assert scene.look(6) == {"a": first}
    assert [v["digest"] for v in scene.registry.describe("a")["versions"]] == [first, second], "and nothing is lost"


def test_a_new_card_or_task_is_told_without_a_new_version(scene: Scene) -> None:
    heard: list[str] = []
    observer = Observer()
    observer.on_change = lambda name, version: heard.append(name)  # type: ignore[method-assign]
    scene.restart(observer=observer)
    a = scene.put("a", 1, task={"prompt": "old {input}"})
    scene.look(2)
    assert heard == ["a"]
    (scene.directory / "a" / "task.json").write_text('{"prompt": "new {input}"}')
    assert scene.look(2) == {"a": a}
    assert scene.registry.metadata("a")["task"] == {"prompt": "new {input}"}
    assert len(scene.registry.describe("a")["versions"]) == 1
    assert heard == ["a", "a"], "whoever reads tasks from it hears of that"
    age(scene.directory / "a")
    scene.look(3)
    assert heard == ["a", "a"]


def test_a_folder_without_a_task_keeps_the_one_of_its_name_and_one_that_lost_its_own_has_dropped_it(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def task() -> Any:
        return scene.registry.metadata("a")["task"]

    caplog.set_level(logging.INFO)
    scene.write(tmp_path / "sent", 1, task={"prompt": "sent {input}"})
    scene.registry.publish_now("a", tmp_path / "sent")
    scene.put("a", 2)
    scene.look(2)
    assert task() == {"prompt": "sent {input}"}
    scene.put("a", 3)
    scene.look(2)
    assert task() == {"prompt": "sent {input}"}
    scene.put("a", 4, task={"prompt": "own {input}"})
    scene.look(2)
    assert task() == {"prompt": "own {input}"}
    assert "any more" not in caplog.text
    (scene.directory / "a" / "task.json").unlink()
    a = scene.put("a", 5)
    assert scene.look(2) == {"a": a} and task() is None
    assert "the folder of a has no task.json any more" in caplog.text
    scene.put("a", 5, task={"prompt": "own {input}"})
    scene.look(2)
    (scene.directory / "a" / "task.json").unlink()
    assert scene.look(2) == {"a": a} and task() is None, "without other weights too"


def test_unchanged_folders_are_not_read_again_after_a_restart(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    scene.restart(read=None)
    assert scene.look(3) == {"a": a}


def test_a_lost_version_comes_back_from_its_folder(scene: Scene) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    scene.registry.close()
    shutil.rmtree(scene.root / "store" / "versions" / a)
    scene.restart()
    assert scene.served() == {}
    assert scene.look(2) == {"a": a} and scene.rejected() == {}


def test_a_directory_that_is_away_is_no_deletion(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    scene.directory.rename(scene.root / "elsewhere")
    caplog.set_level(logging.INFO)
    assert scene.look(10) == {"a": a}
    assert sum("not there any more" in record.message for record in caplog.records) == 1
    (scene.root / "elsewhere").rename(scene.directory)
    assert scene.look(10) == {"a": a}


def test_a_mount_that_goes_is_no_deletion(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It leaves the empty directory that it was mounted on."""
    caplog.set_level(logging.INFO)
    names = [f"a{i:02d}" for i in range(12)]
    for name in names:
        scene.put(name, 1)
    assert sorted(scene.look(2)) == names
    monkeypatch.setattr("adapters.directory_watcher._device", lambda directory: 7)
    for name in names:
        (scene.directory / name).rename(scene.root / name)
    assert sorted(scene.look(6)) == names
    told = [r.message for r in caplog.records if "gone" in r.message]
    assert len(told) == 11 and told[0].startswith("a00 is") and told[-1].startswith("2 more are")
    (scene.root / "a00").rename(scene.directory / "a00")
    scene.look(2)
    shutil.rmtree(scene.directory / "a00")
    assert sorted(scene.look(5)) == names[1:], "what was seen there and is removed goes"


def test_a_directory_that_does_not_exist_yet_is_no_matter(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.directory.rmdir()
    caplog.set_level(logging.INFO)
    assert scene.look(2) == {} and not caplog.records
    scene.directory.mkdir()
    a = scene.put("a", 1)
    assert scene.look(2) == {"a": a}


def test_a_folder_removed_while_the_server_was_down_is_served_on(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    a = scene.put("a", 1)
    scene.look(2)
    shutil.rmtree(scene.directory / "a")
    scene.restart()
    caplog.set_level(logging.INFO)
    assert scene.look(10) == {"a": a}
    assert [r.message for r in caplog.records] == ["a is served from the store; its folder is gone"]


def test_what_is_deleted_when_its_folder_is_gone_is_forgotten(scene: Scene) -> None:
    scene.put("a", 1)
    b = scene.put("b", 2)
    scene.look(2)
    shutil.rmtree(scene.directory / "a")
    scene.restart()
    assert set(scene.look(10)) == {"a", "b"} and scene.registry.imported_folder("watch/a") is not None
    asyncio.run(scene.registry.retire("a"))
    assert scene.look(5) == {"b": b}
    assert scene.registry.imported_folder("watch/a") is None and scene.registry.imported_folder("watch/b") is not None


def test_what_is_deleted_while_nothing_at_all_is_there_stays_so(scene: Scene) -> None:
    """As where the file system of the folders is not mounted yet."""
    scene.put("a", 1)
    b = scene.put("b", 2)
    scene.look(2)
    for name in "ab":
        (scene.directory / name).rename(scene.root / name)
    scene.restart()
    scene.look(2)
    asyncio.run(scene.registry.retire("a"))
    assert scene.look(10) == {"b": b}
    for name in "ab":
        (scene.root / name).rename(scene.directory / name)
    assert scene.look(5) == {"b": b}


def test_the_thread_looks_and_ends(scene: Scene) -> None:
    a = scene.put("a", 1)
    watch = DirectoryWatcher(scene.registry, scene.directory, interval=0.01, still=0.02)
    watch.start()
    until(lambda: scene.served() == {"a": a})
    watch.stop()
    scene.put("b", 2)
    assert scene.served() == {"a": a}


def test_its_end_waits_for_one_folder_and_not_for_all(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends has seconds. What was not come to is not taken for gone."""
    served = [scene.put(f"a{n}", n) for n in range(4)]
    scene.look(2)
    for n in range(4):
        scene.put(f"a{n}", 10 + n)
    assert scene.registry is not None
    publish = scene.registry.publish_now

    def asked_to_end(*what: Any, **how: Any) -> Any:
        scene.watch.stop()
        return publish(*what, **how)

    monkeypatch.setattr(scene.registry, "publish_now", asked_to_end)
    now = scene.look(2)
    assert now["a0"] != served[0] and [now[f"a{n}"] for n in range(1, 4)] == served[1:]


def test_looks_that_take_long_are_rarer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """By processor time, of which they take a fiftieth at most."""
    watch, waits, used = (
        DirectoryWatcher(scene.registry, scene.directory, interval=1.0),
        [],
        iter([0.0, 0.01, 5.0, 5.5, 6.0, 6.1]),
    )
    monkeypatch.setattr(time, "thread_time", lambda: next(used))
    monkeypatch.setattr(watch._stop, "wait", lambda seconds: waits.append(seconds) or len(waits) == 4)
    watch._run()
    assert waits == [1.0, 1.0, pytest.approx(25.0), pytest.approx(5.0)]


def test_what_is_read_makes_no_look_rarer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hundred new adapters would have kept the next change waiting for a minute."""
    scene.put("a", 1)
    watch, waits, used = DirectoryWatcher(scene.registry, scene.directory, still=0.0), [], [0.0]
    publish = scene.registry.publish_now

    def read(*given: Any, **options: Any) -> Any:
        used[0] += 9.0
        return publish(*given, **options)

    monkeypatch.setattr(scene.registry, "publish_now", read)
    monkeypatch.setattr(time, "thread_time", lambda: used[0])
    monkeypatch.setattr(watch._stop, "wait", lambda seconds: waits.append(seconds) or len(waits) == 2)
    watch._run()
    assert list(scene.served()) == ["a"] and waits == [1.0, 1.0]


def test_looking_follows_no_links_where_there_are_none(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take most of the time of a look, and a thousand folders are looked at every second."""
    digests = {name: scene.put(name, seed) for seed, name in enumerate("abc")}
    assert scene.look(2) == digests
    monkeypatch.setattr(Path, "resolve", None)
    assert scene.look() == digests and scene.rejected() == {}


# The library


def test_the_library_is_registered_once_and_skipped_where_it_does_not_fit(
    scene: Scene, caplog: pytest.LogCaptureFixture, write_adapter: Write
) -> None:
    library = scene.root / "library"
    good = write_adapter(library / "good", 1).digest
    write_adapter(library / "wide", 2, rank=99)
    (library / "__pycache__").mkdir()
    (library / "empty").mkdir()
    (library / "__init__.py").write_text("")
    caplog.set_level(logging.INFO)
    assert scan_library(scene.registry, library) == ["good"]
    assert scene.served() == {"good": good}
    assert [r.message for r in caplog.records if "library" in r.message] == [
        next(r.message for r in caplog.records if "wide is skipped" in r.message)
    ]
    scene.restart(read=None)
    assert scan_library(scene.registry, library / "nothing") == []
    shutil.rmtree(library / "wide")
    assert scan_library(scene.registry, library) == ["good"], "nothing is read again"


def test_the_library_never_takes_a_name_back(scene: Scene, write_adapter: Write) -> None:
    library, other = scene.root / "library", scene.root / "other"
    write_adapter(library / "a", 1)
    write_adapter(library / "b", 2)
    write_adapter(other, 3)
    mine = scene.registry.publish_now("a", other).version.digest
    assert scan_library(scene.registry, library) == ["b"]
    assert scene.served()["a"] == mine
    scene.registry.retire_now("b")
    assert scan_library(scene.registry, library) == [] and "b" not in scene.served()
    newer = write_adapter(library / "b", 4).digest
    assert scan_library(scene.registry, library) == ["b"], "changed content comes back"
    newest = write_adapter(library / "b", 5).digest
    assert newest != newer
    assert scan_library(scene.registry, library) == ["b"] and scene.served()["b"] == newest
    mine = scene.registry.publish_now("b", other).version.digest
    write_adapter(library / "b", 6)
    assert scan_library(scene.registry, library) == [] and scene.served()["b"] == mine


def test_a_folder_that_was_put_over_the_librarys_gives_it_back(
    scene: Scene, write_adapter: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    library = scene.root / "library"
    shipped = write_adapter(library / "a", 1, task={"prompt": "shipped {input}"}).digest

    def restart() -> None:
        scene.restart()
        scene.watch = DirectoryWatcher(scene.registry, scene.directory, library=library, clock=lambda: scene.now)

    def task() -> str:
        return scene.registry.metadata("a")["task"]["prompt"]

    restart()
    assert scan_library(scene.registry, library) == ["a"]
    for seed in range(2, 7):
        own = scene.put("a", seed, task={"prompt": "own {input}"})
        assert scene.look(2) == {"a": own} and task() == "own {input}"
    assert scan_library(scene.registry, library) == []
    shutil.rmtree(scene.directory / "a")
    assert scene.look(5) == {"a": shipped} and task() == "shipped {input}"
    assert "a is the library's again" in caplog.text and "retired" not in caplog.text
    assert [v["digest"] for v in scene.registry.describe("a")["versions"]] == [shipped]
    restart()
    assert scan_library(scene.registry, library) == ["a"] and scene.look(2) == {"a": shipped}
    scene.put("a", 1, task={"prompt": "own {input}"})
    assert scene.look(2) == {"a": shipped} and task() == "own {input}"
    shutil.rmtree(scene.directory / "a")
    assert scene.look(5) == {"a": shipped} and task() == "shipped {input}", "where only the task was another"
    scene.registry.retire_now("a")
    scene.put("a", 2)
    scene.look(2)
    shutil.rmtree(scene.directory / "a")
    assert scene.look(5) == {} and scan_library(scene.registry, library) == [], "what was deleted stays so"


def test_a_pinned_folder_without_room_is_tried_again_when_there_is_some(scene: Scene) -> None:
    small, other = scene.put("a", 1), scene.put("b", 2)
    scene.restart(ram_bytes=2000)
    assert scene.look(2) == {"a": small, "b": other}
    for name in ("a", "b"):
        asyncio.run(scene.registry.pin(name))
    large = scene.put("a", 3, rank=12)
    assert scene.look(40) == {"a": small, "b": other} and "beside what is pinned" in scene.rejected()["a"]
    asyncio.run(scene.registry.unpin("b"))
    assert scene.look(40) == {"a": large, "b": other} and scene.rejected() == {}


def test_a_removed_folder_that_could_not_be_retired_is_at_the_next_look(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    a = scene.put("a", 1)
    assert scene.look(2) == {"a": a}
    shutil.rmtree(scene.directory / "a")

    def full(*_: str) -> bool:
        raise StoreFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(scene.registry, "remove_folder", full)
        assert scene.look(6) == {"a": a} and "a was removed, but is not retired: the disk is full" in caplog.text
    assert scene.look(6) == {}


def test_a_file_that_becomes_a_link_out_after_it_was_looked_at_is_not_read(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def swapped(folder: Path, within: Path | None) -> Any:
        signature = signature_of(folder, within)
        (folder / "adapter_model.safetensors").replace(tmp_path / "outside")
        (folder / "adapter_model.safetensors").symlink_to(tmp_path / "outside")
        return signature

    scene.put("a", 1)
    scene.watch = DirectoryWatcher(scene.registry, scene.directory, still=0.0)
    monkeypatch.setattr("adapters.directory_watcher.signature_of", swapped)
    assert scene.look() == {} and "leads out of the adapter directory" in scene.rejected()["a"]


def test_a_copy_that_keeps_the_times_of_its_files_is_waited_for(scene: Scene) -> None:
    """By their change time, which no copy can keep."""
    a = scene.put("a", 1)
    age(scene.directory / "a")
    scene.watch = DirectoryWatcher(scene.registry, scene.directory, still=3600.0, clock=lambda: scene.now)
    assert scene.look() == {}
    scene.now += 3600.0
    assert scene.look() == {"a": a}


def test_the_state_of_a_linked_folder_is_told_within_the_directory_alone(scene: Scene, tmp_path: Path) -> None:
    scene.write(tmp_path / "outside", 1)
    (scene.directory / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidAdapter, match="leads out of the adapter directory"):
        signature_of(scene.directory / "a", scene.directory)


def test_a_directory_that_cannot_be_read_is_no_deletion(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a share whose server is away."""
    caplog.set_level(logging.INFO)
    a = scene.put("a", 1)
    scene.look(2)

    def stale(path: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", stale)
        assert scene.look(6) == {"a": a}
    told = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert told == [f"the adapter directory {scene.directory} cannot be read: Stale file handle"]
    assert scene.look(6) == {"a": a}


def test_a_look_that_fails_is_not_the_last(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch, waits, looks = DirectoryWatcher(scene.registry, scene.directory), list[float](), list[str]()

    def poll() -> None:
        looks.append("one")
        raise RuntimeError("a fault")

    monkeypatch.setattr(watch, "poll", poll)
    monkeypatch.setattr(watch._stop, "wait", lambda seconds: waits.append(seconds) or len(waits) == 4)
    watch._run()
    assert len(looks) == 3 and caplog.text.count("looking at the adapter directory failed") == 3


def test_a_folder_is_as_old_as_the_file_that_changed_last(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that lies there for long says nothing of tensors that are being written."""
    a, now = scene.put("a", 1), time.time_ns() + int(3600e9)
    config, tensors = ("adapter_config.json", 1, 1, 1, 1), ("adapter_model.safetensors", 1, now, now, 2)
    monkeypatch.setattr("adapters.directory_watcher.signature_of", lambda folder, within: (config, tensors))
    assert scene.look() == {}
    assert scene.look() == {"a": a}


def test_a_fault_of_our_own_costs_one_adapter_of_the_library(
    scene: Scene, write_adapter: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("bad", "good")):
        write_adapter(scene.root / "library" / name, seed)
    fail_on(scene, "bad", monkeypatch)
    assert scan_library(scene.registry, scene.root / "library") == ["good"] == list(scene.served())
    assert "the library's bad is skipped" in caplog.text


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_whole_model_is_told_of_whatever_its_weights_are_in(scene: Scene, weights: str) -> None:
    folder = scene.directory / "merged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(b"part")
    scene.look(3)
    assert "this is a whole model" in scene.rejected()["merged"]
