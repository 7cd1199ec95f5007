"""The store: whole versions under their digests, whatever happens at any of its writes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.catalog_state import KEPT, CatalogState, ImportedFolder
from adapters.errors import InvalidAdapter, NoRoom, StoreFailed
from adapters.peft_format import read_folder
from adapters.store import AdapterStore, Disk, VersionRecord
from adapters.weights import LoraWeights

Write = Callable[..., LoraWeights]


class Crash(BaseException):
    """The process ends here."""


class FaultyDisk(Disk):
    """Counts the changes of the disk, and at the n-th raises `fault`: before it, or in the middle where it has one."""

    def __init__(self, at: int = -1, fault: Callable[[], BaseException] = Crash, half: bool = False) -> None:
        self.at, self.fault, self.half, self.count = at, fault, half, 0

    def _due(self) -> bool:
        self.count += 1
        return self.count - 1 == self.at

    def copy(self, source: int, target: Path, limit: int) -> int:
        if self._due():
            if self.half:
                target.write_bytes(os.read(source, 10))
            raise self.fault()
        return super().copy(source, target, limit)

    def write(self, path: Path, content: bytes) -> None:
        if self._due():
            if self.half:
                path.write_bytes(content[: len(content) // 2])
            raise self.fault()
        super().write(path, content)

    def rename(self, source: Path, target: Path) -> None:
        if self._due():
            fault = self.fault()
            if self.half and isinstance(fault, Crash):  # a rename that fails has not happened; after one, all may end
                super().rename(source, target)
            raise fault
        super().rename(source, target)

    def note(self, descriptor: int, content: bytes) -> None:
        if self._due():
            raise self.fault()
        super().note(descriptor, content)

    def sync(self, folder: Path) -> None:
        if self._due():
            raise self.fault()
        super().sync(folder)

    def remove(self, path: Path) -> None:
        if self._due():
            if self.half and path.is_dir():
                for child in list(path.rglob("*"))[-1:]:
                    child.unlink() if child.is_file() else shutil.rmtree(child)
            raise self.fault()
        super().remove(path)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/path")


def publish(store: AdapterStore, name: str, folder: Path, now: float = 1.0) -> str:
    """What the registry does, in short."""
    with store.stage(folder) as staged:
        weights = read_folder(staged, name=name)
        store.adopt(staged, VersionRecord.of(weights, now))
    store.write(store.journal.point(name, weights.digest, "test", now))
    for digest in set(store.records) - store.journal.referenced():
        store.nbytes(digest)
        store.remove(digest)
        assert digest not in store._sizes
    return weights.digest


def check_whole(store: AdapterStore, unnamed: bool = False) -> dict[str, str]:
    """Every name's versions can be read and are what they say; nothing is left over. Answers name -> digest."""
    assert not store.lost
    for name, entry in store.journal.names.items():
        for digest in entry.history:
            assert read_folder(store.path(digest), name=name).digest == digest
            assert store.records[digest].digest == digest
    assert {p.name for p in (store.root / "versions").iterdir()} == set(store.journal.referenced())
    assert not list((store.root / "incoming").iterdir())
    assert {p.name for p in store.root.iterdir()} <= {"versions", "incoming", "names.json", "lock"} | (
        {"unnamed"} if unnamed else set()
    )
    return {name: entry.history[0] for name, entry in store.journal.names.items()}


@pytest.fixture
def folders(tmp_path: Path, write_adapter: Write) -> list[Path]:
    paths = [tmp_path / f"source-{seed}" for seed in range(5)]
    for seed, path in enumerate(paths):
        write_adapter(path, seed, card=f"card {seed}", task={"task": "t", "prompt": "{input}"})
    return paths


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store")
    yield store
    store.close()


def test_put_and_read_back(store: AdapterStore, folders: list[Path]) -> None:
    digest = publish(store, "a", folders[0])
    shutil.rmtree(folders[0])
    weights = read_folder(store.path(digest), name="a")
    assert weights.digest == digest
    assert weights.metadata["card"] == "card 0" and weights.metadata["task"]["prompt"] == "{input}"
    record = store.records[digest]
    assert record.ranks == [2] and record.targets == ["q_proj", "v_proj"] and record.nbytes == weights.nbytes
    store.close()
    assert store.nbytes(weights.digest) == weights.nbytes and store.nbytes("f" * 64) == 0
    store.close()
    elsewhere = AdapterStore(store.root, size=lambda modules: 7 * len(modules))
    assert elsewhere.nbytes(weights.digest) == 7 * len(record.modules), "what it takes here"
    elsewhere.close()
    with_again = AdapterStore(store.root)
    assert check_whole(with_again) == {"a": digest}
    assert with_again.records[digest] == record
    with_again.close()


def test_keeps_the_last_three_of_a_name(store: AdapterStore, folders: list[Path]) -> None:
    digests = [publish(store, "a", folder) for folder in folders]
    assert store.journal.names["a"].history == tuple(digests[: -KEPT - 1 : -1])
    assert check_whole(store) == {"a": digests[-1]}


def test_a_version_with_two_names_stays_until_both_are_gone(store: AdapterStore, folders: list[Path]) -> None:
    digest = publish(store, "a", folders[0])
    assert publish(store, "b", folders[0]) == digest
    store.write(store.journal.retire("a"))
    assert store.journal.referenced() == {digest}
    assert check_whole(store) == {"b": digest}


def test_equal_content_renews_the_card_and_the_task(store: AdapterStore, folders: list[Path]) -> None:
    digest = publish(store, "a", folders[0])
    (folders[0] / "README.md").write_text("new card")
    (folders[0] / "task.json").unlink()
    assert publish(store, "a", folders[0], now=2.0) == digest
    assert store.records[digest].metadata["card"] == "new card"
    assert store.records[digest].created_at == 1.0
    weights = read_folder(store.path(digest), name="a")
    assert weights.metadata["card"] == "new card" and weights.metadata["task"] is None


def test_a_damaged_version_is_replaced_by_equal_content(store: AdapterStore, folders: list[Path]) -> None:
    digest = publish(store, "a", folders[0])
    (store.path(digest) / "adapter_model.safetensors").write_bytes(b"rot")
    store.damaged.add(digest)
    publish(store, "a", folders[0])
    assert check_whole(store) == {"a": digest} and not store.damaged


def test_one_process_at_a_time(store: AdapterStore) -> None:
    with pytest.raises(StoreFailed, match="in use by another process"):
        AdapterStore(store.root)
    store.close()
    store.close()
    AdapterStore(store.root).close()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "version {} is missing from the store"),
        ("file", "a file of version {} is missing from the store"),
        ("record", "the record of version {} cannot be read"),
        ("record of another", "the record of version {} cannot be read"),
    ],
)
def test_a_lost_version_is_told_and_can_be_put_again(
    store: AdapterStore, folders: list[Path], kind: str, told: str, caplog: Any
) -> None:
    digest, other = publish(store, "a", folders[0]), publish(store, "b", folders[1])
    store.close()
    if kind == "missing":
        shutil.rmtree(store.path(digest))
    elif kind == "file":
        (store.path(digest) / "adapter_config.json").unlink()
    elif kind == "record":
        (store.path(digest) / "record.json").write_text("{")
    else:
        shutil.copy(store.path(other) / "record.json", store.path(digest) / "record.json")
    again = AdapterStore(store.root)
    assert set(again.lost) == {digest} and set(again.records) == {other}
    assert again.lost[digest].startswith(told.format(digest[:12])) and again.lost[digest] in caplog.text
    assert again.lost[digest].endswith("; publish it again, or roll back to another")
    publish(again, "a", folders[0])
    assert check_whole(again) == {"a": digest, "b": other}
    again.close()


def test_an_unreadable_journal_is_an_error_and_nothing_is_deleted(store: AdapterStore, folders: list[Path]) -> None:
    digest = publish(store, "a", folders[0])
    store.close()
    good = (store.root / "names.json").read_text()
    for text in ("{", "[]", '{"format": 99}', good.replace(digest, "../../etc")):
        (store.root / "names.json").write_text(text)
        with pytest.raises(StoreFailed, match=r"names\.json"):
            AdapterStore(store.root)
    (store.root / "names.json").write_text(good)
    again = AdapterStore(store.root)
    assert check_whole(again) == {"a": digest}
    again.close()


def script(store: AdapterStore, folders: list[Path]) -> Iterator[dict[str, str]]:
    """A life of changes; yields, before each and at the end, the names as they must then be."""
    names: dict[str, str] = {}
    yield names
    for name, folder in [("a", 0), ("b", 1), ("a", 2), ("a", 0), ("a", 3), ("a", 4), ("b", 0)]:
        names = {**names, name: publish(store, name, folders[folder])}
        yield names
    (folders[4] / "README.md").write_text("another card")
    publish(store, "a", folders[4])
    yield names
    store.write(store.journal.retire("a"))
    for digest in set(store.records) - store.journal.referenced():
        store.remove(digest)
    yield {"b": names["b"]}


def dry_run(folders: list[Path], root: Path) -> tuple[int, list[dict[str, str]]]:
    """How many writes the script makes, and the states that it goes through."""
    disk = FaultyDisk()
    store = AdapterStore(root, disk=disk)
    states = list(script(store, folders))
    store.close()
    return disk.count, states


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("half", [False, True])
def test_a_crash_at_any_write_leaves_a_readable_store(tmp_path: Path, folders: list[Path], half: bool) -> None:
    count, states = dry_run(folders, tmp_path / "dry")
    assert count > 60
    for at in range(count):
        root = tmp_path / f"crash-{at}"
        reached = 0
        store = None
        with pytest.raises(Crash):
            store = AdapterStore(root, disk=FaultyDisk(at, half=half))
            for _ in script(store, folders):
                reached += 1
        if store is not None:
            store.close()
        again = AdapterStore(root)
        # The step that crashed has happened or has not: no other state is possible.
        assert check_whole(again) in states[max(reached - 1, 0) : reached + 1]
        publish(again, "c", folders[1])
        check_whole(again)
        again.close()
        shutil.rmtree(root)


@pytest.mark.usefixtures("no_fsync")
def test_a_full_disk_at_any_write_changes_nothing_that_is_seen(tmp_path: Path, folders: list[Path]) -> None:
    count, states = dry_run(folders, tmp_path / "dry")
    opening = FaultyDisk()
    AdapterStore(tmp_path / "opening", disk=opening).close()
    failures = 0
    for at in range(opening.count, count):
        root = tmp_path / f"full-{at}"
        store = AdapterStore(root, disk=FaultyDisk(at, full, half=True))
        reached = 0
        try:
            for _ in script(store, folders):
                reached += 1
        except StoreFailed as error:
            failures += 1
            assert "the disk is full" in error.message and "secret" not in error.message
            found = {name: entry.history[0] for name, entry in store.journal.names.items()}
            assert found in states[reached - 1 : reached + 1]
        else:
            assert reached == len(states)
        for name, entry in store.journal.names.items():
            for digest in entry.history:
                assert read_folder(store.path(digest), name=name).digest == digest
        digest = publish(store, "c", folders[1])  # the store goes on
        store.close()
        again = AdapterStore(root)
        assert check_whole(again)["c"] == digest
        again.close()
        shutil.rmtree(root)
    assert failures > count // 2


def test_what_is_no_regular_file_is_refused(store: AdapterStore, folders: list[Path], tmp_path: Path) -> None:
    target = folders[0] / "adapter_model.safetensors"
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
    assert not list((store.root / "incoming").iterdir())
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_nothing_gets_its_name_before_it_is_synced(
    store: AdapterStore, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    rename = os.rename

    def named(source: Path, target: Path) -> None:
        assert {source, *source.rglob("*")} <= synced
        synced.discard(target.parent)
        rename(source, target)

    monkeypatch.setattr("os.fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr("os.rename", named)
    publish(store, "a", folders[0])
    assert {store.root, store.root / "versions"} <= synced, "and the names are, after that"


def test_another_card_is_durable_in_the_folder_of_its_version(
    store: AdapterStore, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(store, "a", folders[0])
    (folders[0] / "README.md").write_text("another card")
    done: list[tuple[str, Path]] = []
    rename = os.rename
    monkeypatch.setattr("os.fsync", lambda fd: done.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")))))
    monkeypatch.setattr("os.rename", lambda source, to: (done.append(("name", to.parent)), rename(source, to)))
    publish(store, "a", folders[0])
    of_version = [what for what, folder in done if folder == store.path(digest)]
    assert of_version[:1] == ["name"] and of_version[-1] == "sync", "its names are, after the last of them"


def test_a_directory_that_is_a_link_itself_is_no_way_out(
    store: AdapterStore, folders: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "adapters").symlink_to(folders[0].parent)
    with store.stage(tmp_path / "adapters" / folders[0].name, within=tmp_path / "adapters") as staged:
        assert read_folder(staged, name="a").digest == read_folder(folders[0], name="a").digest


def test_links_may_not_lead_out(store: AdapterStore, folders: list[Path], tmp_path: Path) -> None:
    jail = tmp_path / "jail"
    (jail / "bad").mkdir(parents=True)
    (jail / "good").mkdir()
    shutil.copytree(folders[0], jail / "blobs")
    for name in os.listdir(folders[0]):
        (jail / "bad" / name).symlink_to(folders[0] / name)
        (jail / "good" / name).symlink_to(f"../blobs/{name}")
    with pytest.raises(InvalidAdapter, match="leads out of the adapter directory: copy the files themselves"):
        with store.stage(jail / "bad", within=jail):
            pass
    with store.stage(jail / "good", within=jail) as staged:
        read_folder(staged, name="good")
    with store.stage(jail / "bad") as staged:  # a trusted caller's, a hub's cache for instance
        read_folder(staged, name="good")


def test_an_endless_file_ends(store: AdapterStore, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = folders[0] / "adapter_model.safetensors"
    file.write_bytes(bytes(10_000))
    told = os.fstat
    small = os.stat_result([0o100644, 1, 1, 1, 0, 0, 10, 0, 0, 0])
    monkeypatch.setattr("adapters.store.os.fstat", lambda fd: small if told(fd).st_size == 10_000 else told(fd))
    with pytest.raises(NoRoom, match="over"), store.stage(folders[0], limit=8_000):
        pass
    assert not list((store.root / "incoming").iterdir())


def test_nothing_is_written_of_a_file_that_is_too_large_as_it_lies(
    store: AdapterStore, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch tries every half minute, and the limit is of gigabytes."""
    with (folders[0] / "adapter_model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    opened: list[Path] = []

    def noted(path: Path, mode: str) -> Any:
        opened.append(path)
        return open(path, mode)

    monkeypatch.setattr("adapters.store.open", noted, raising=False)
    with pytest.raises(NoRoom, match="is over 9,"), store.stage(folders[0], limit=10_000):
        pass
    assert [path.name for path in opened] == ["adapter_config.json"]


def test_a_stored_version_of_another_base_says_so(folders: list[Path], tiny_shapes: dict[str, Any]) -> None:
    record = VersionRecord.of(read_folder(folders[0], name="a"), 0.0)
    path = next(iter(tiny_shapes))
    assert record.misfit(tiny_shapes, 64) is None
    assert "over the limit" in (record.misfit(tiny_shapes, 1) or "")
    assert "has no" in (record.misfit({p: s for p, s in tiny_shapes.items() if p != path}, 64) or "")
    assert "is [8, 4] here" in (record.misfit({**tiny_shapes, path: (8, 4)}, 64) or "")


def test_journal_round_trip_and_rules() -> None:
    a, b, c, d = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
    journal = (
        CatalogState().point("x", a, "api", 1.0).pin("x", True).point("x", b, "watch", 2.0).point("x", c, "api", 3.0)
    )
    journal = journal.take("watch/x", ImportedFolder(c, (("task.json", 1, 2, 3, 4),)))
    assert CatalogState.from_json(json.loads(json.dumps(journal.to_json()))) == journal
    assert journal.names["x"].pinned
    assert journal.point("x", a, "api", 4.0).names["x"].history == (a, c, b), "rolled back: the old one is first again"
    assert journal.point("x", d, "api", 4.0).names["x"].history == (d, c, b)
    assert "x" not in journal.retire("x").names and journal.retire("x").taken == journal.taken
    assert not journal.take("watch/x", None).taken


@pytest.mark.parametrize(
    ("damage", "told"), [({"format": 2}, "format 2 is not known"), ({"names": {"x": {"history": []}}}, "64 hex digits")]
)
def test_names_of_a_later_form_or_without_a_version_are_refused(store: AdapterStore, damage: Any, told: str) -> None:
    fields = CatalogState().point("x", "a" * 64, "api", 1.0).to_json()
    if "names" in damage:
        damage = {"names": {"x": {**fields["names"]["x"], **damage["names"]["x"]}}}
    store.close()
    (store.root / "names.json").write_text(json.dumps({**fields, **damage}))
    with pytest.raises(StoreFailed, match=rf"names\.json .*{told}"):
        AdapterStore(store.root)


@pytest.mark.parametrize("below", ["f" * 64, "f", 1, ["b"]])
def test_a_name_that_was_put_over_none_of_its_versions_is_damage(store: AdapterStore, below: Any) -> None:
    journal = CatalogState().point("x", "a" * 64, "api", 1.0).point("x", "b" * 64, "watch", 2.0)
    store.close()
    fields = journal.to_json()
    assert fields["names"]["x"]["below"] == "a" * 64
    fields["names"]["x"]["below"] = below
    (store.root / "names.json").write_text(json.dumps(fields))
    with pytest.raises(StoreFailed, match=r"names.json .* none of its versions.*; put a good copy back"):
        AdapterStore(store.root)


@pytest.mark.parametrize(
    "damage",
    [
        {"modules": None},
        {"modules": []},
        {"nbytes": "1"},
        {"told": []},
        {"told": {"a": 1}},
        {"metadata": None},
        [],
        None,
    ],
)
def test_a_damaged_record_costs_its_adapter_alone(store: AdapterStore, folders: list[Path], damage: Any) -> None:
    digest, other = publish(store, "a", folders[0]), publish(store, "b", folders[1])
    store.close()
    file = store.path(digest) / "record.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, **damage} if isinstance(damage, dict) else damage))
    with closing(AdapterStore(store.root)) as again:
        assert "cannot be read" in again.lost[digest] and set(again.records) == {other}
    file.unlink()
    file.mkdir()
    with closing(AdapterStore(store.root)) as again:
        assert "Is a directory" in again.lost[digest] and publish(again, "a", folders[0]) == digest
        assert set(again.records) == {digest, other} and not again.lost


def test_what_a_later_version_tells_of_one_is_let_be(store: AdapterStore, folders: list[Path]) -> None:
    """Else going back to this one would lose all that it has served."""
    digest = publish(store, "a", folders[0])
    store.close()
    file = store.path(digest) / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": [1]}))
    with closing(AdapterStore(store.root)) as again:
        assert set(again.records) == {digest} and not again.lost


PUBLISHER = """
import sys
from pathlib import Path
from adapters.peft_format import read_folder
from adapters.registry import Registry
from adapters.store import AdapterStore

root, folders = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]
shapes = {p: (m.B.shape[0], m.A.shape[1]) for p, m in read_folder(folders[0], name="a").modules.items()}
registry = Registry(AdapterStore(root), shapes=shapes, ram_bytes=1 << 20)
for n in range(10**6):
    registry.publish_now("ab"[n % 2], folders[n % len(folders)])
    if n % 5 == 4:
        registry.retire_now("a")
    print(n, flush=True)
"""


def test_kill_minus_nine_while_registering(tmp_path: Path, folders: list[Path]) -> None:
    """The real thing, at moments that nobody chose."""
    root = tmp_path / "store"
    for run in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(root), *map(str, folders)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == 20 + 7 * run:
                    break
            time.sleep(0.003 * run)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        store = AdapterStore(root)
        assert set(check_whole(store)) & {"a", "b"}
        publish(store, "c", folders[0])
        store.close()


def test_names_of_equal_content_have_a_card_and_a_task_each(store: AdapterStore, folders: list[Path]) -> None:
    digest = publish(store, "a", folders[0])
    before = store.records[digest].metadata_of("a")
    assert before["task"] is not None and before["card"] == "card 0"
    (folders[0] / "task.json").unlink()
    (folders[0] / "README.md").write_text("of b")
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    (folders[0] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "of/b"}))
    assert publish(store, "b", folders[0]) == digest
    store.close()
    again = AdapterStore(store.root)
    record = again.records[digest]
    assert record.metadata_of("a") == before
    assert [record.metadata_of("b")[key] for key in ("task", "card", "base")] == [None, "of b", "of/b"]
    again.write(again.journal.retire("a"))
    publish(again, "b", folders[0])
    assert set(again.records[digest].told) == {"b"}, "what names had that are gone is not kept"
    again.close()


def test_what_was_told_of_a_version_before_names_had_their_own_is_every_names(
    store: AdapterStore, folders: list[Path]
) -> None:
    digest = publish(store, "a", folders[0])
    store.close()
    file = store.path(digest) / "record.json"
    fields = json.loads(file.read_text())
    del fields["told"]
    file.write_text(json.dumps(fields))
    again = AdapterStore(store.root)
    assert again.records[digest].metadata_of("a")["card"] == "card 0"
    (folders[0] / "README.md").write_text("of b")
    publish(again, "b", folders[0])
    assert again.records[digest].metadata_of("a")["card"] == "card 0"
    again.close()


def test_a_version_whose_folder_went_while_it_was_served_can_be_put_again(
    store: AdapterStore, folders: list[Path]
) -> None:
    digest = publish(store, "a", folders[0])
    shutil.rmtree(store.path(digest))
    assert publish(store, "a", folders[0]) == digest
    assert check_whole(store) == {"a": digest}


def test_names_that_somebody_takes_away_cost_no_version(store: AdapterStore, folders: list[Path], caplog: Any) -> None:
    """As the server says what to do about a damaged file."""
    digests = {publish(store, "a", folders[0]), publish(store, "b", folders[1])}
    store.close()
    (store.root / "names.json").unlink()
    (store.path(min(digests)) / "record.json").write_text("damaged too")
    again = AdapterStore(store.root)
    assert not again.journal.names and {p.name for p in (store.root / "unnamed").iterdir()} == digests
    assert "kept in" in caplog.text
    assert all((store.root / "unnamed" / d / "adapter_model.safetensors").exists() for d in digests)
    third = publish(again, "c", folders[2])
    again.close()
    assert check_whole(AdapterStore(store.root), unnamed=True) == {"c": third}


def test_names_that_are_put_back_have_their_versions_again(
    store: AdapterStore, folders: list[Path], caplog: Any
) -> None:
    digests = {"a": publish(store, "a", folders[0]), "b": publish(store, "b", folders[1])}
    store.close()
    names = (store.root / "names.json").read_bytes()
    (store.root / "names.json").unlink()
    AdapterStore(store.root).close()
    (store.root / "names.json").write_bytes(names)
    again = AdapterStore(store.root)
    assert check_whole(again, unnamed=True) == digests and caplog.text.count("has a name again") == 2
    assert not list((store.root / "unnamed").iterdir())
    again.close()


@pytest.mark.parametrize("ago", [0.0, 3600.0])
def test_an_older_copy_of_the_names_is_known_whatever_the_clocks_were(
    store: AdapterStore, folders: list[Path], ago: float
) -> None:
    """The version after it is of a clock that was not set yet, and the copy may be put back at once."""
    names, kept = store.root / "names.json", publish(store, "a", folders[0])
    older = json.loads(names.read_bytes())
    newer = publish(store, "b", folders[1], now=1.0)
    store.close()
    newest = names.read_bytes()
    names.write_text(json.dumps({**older, "written": older["written"] - ago}))
    with closing(AdapterStore(store.root)) as again:
        assert check_whole(again, unnamed=True) == {"a": kept}
        assert [p.name for p in (store.root / "unnamed").iterdir()] == [newer]
    names.write_bytes(newest)
    with closing(AdapterStore(store.root)) as again:
        assert check_whole(again, unnamed=True) == {"a": kept, "b": newer}
    names.write_text(json.dumps(older))
    with closing(AdapterStore(store.root)) as again:
        third = publish(again, "c", folders[2])
    (store.root / "versions" / ("f" * 64)).mkdir()  # from that on it is the last again, and what a crash leaves goes
    with closing(AdapterStore(store.root)) as again:
        assert check_whole(again, unnamed=True) == {"a": kept, "c": third}
        assert [p.name for p in (store.root / "unnamed").iterdir()] == [newer]


def test_an_older_copy_of_the_store_costs_no_version_that_came_after_it(
    store: AdapterStore, folders: list[Path]
) -> None:
    """It has brought what the lock tells along, and was put over the versions that are there."""
    hour_ago = time.time() - 3600
    kept, retired = publish(store, "a", folders[0], hour_ago - 60), publish(store, "r", folders[2], hour_ago - 30)
    names = store.journal.retire("r").to_json()
    newer = publish(store, "b", folders[1], hour_ago + 60)
    store.close()
    (store.root / "names.json").write_text(json.dumps({**names, "written": hour_ago, "writes": store._writes}))
    again = AdapterStore(store.root)
    assert check_whole(again, unnamed=True) == {"a": kept}
    assert [p.name for p in (store.root / "unnamed").iterdir()] == [newer] != [retired], "that was deleted before"
    again.close()


def test_names_that_do_not_tell_when_they_were_written_are_the_last(store: AdapterStore, folders: list[Path]) -> None:
    """Those of versions before; what a crash has left beside them goes."""
    kept, left = publish(store, "a", folders[0]), publish(store, "r", folders[2])
    names = store.journal.retire("r").to_json()
    store.close()
    (store.root / "names.json").write_text(json.dumps(names))
    (store.root / "lock").write_bytes(b"")
    again = AdapterStore(store.root)
    assert check_whole(again) == {"a": kept} and not again.path(left).exists()
    again.close()


def test_an_older_copy_of_the_names_costs_no_version_whose_record_is_damaged(
    store: AdapterStore, folders: list[Path]
) -> None:
    """When it was made is not known, so it may have come after the copy."""
    names = store.journal.to_json()
    newer = publish(store, "a", folders[0])
    store.close()
    (store.path(newer) / "record.json").write_text("{")
    told = {"written": time.time() - 3600, "writes": store._writes}
    (store.root / "names.json").write_text(json.dumps({**names, **told}))
    AdapterStore(store.root).close()
    assert [path.name for path in (store.root / "unnamed").iterdir()] == [newer]


def test_so_it_does_if_the_clock_was_set_back_since(store: AdapterStore, folders: list[Path]) -> None:
    """When the copy was made tells nothing of what came after it then, and what came before is kept as well."""
    kept, retired = publish(store, "a", folders[0]), publish(store, "r", folders[2])
    names = store.journal.retire("r").to_json()
    newer = publish(store, "b", folders[1])
    store.close()
    told = {"written": time.time() + 3600, "writes": store._writes}
    (store.root / "names.json").write_text(json.dumps({**names, **told}))
    again = AdapterStore(store.root)
    assert check_whole(again, unnamed=True) == {"a": kept}
    assert {p.name for p in (store.root / "unnamed").iterdir()} == {newer, retired}
    again.close()


def test_names_that_are_taken_away_once_more_cost_no_start(store: AdapterStore, folders: list[Path]) -> None:
    """What was set aside the first time has been published again since, and is set aside again."""
    digest = publish(store, "a", folders[0])
    store.close()
    (store.root / "names.json").unlink()
    with closing(AdapterStore(store.root)) as again:
        assert publish(again, "a", folders[0]) == digest
    with closing(AdapterStore(store.root)) as again:
        assert check_whole(again, unnamed=True) == {"a": digest}
    (store.root / "names.json").unlink()
    with closing(AdapterStore(store.root)) as again:
        assert not again.journal.names and [p.name for p in (store.root / "unnamed").iterdir()] == [digest]
        assert read_folder(store.root / "unnamed" / digest, name="a").digest == digest


@pytest.mark.parametrize("how", ["written to", "replaced", "the other file"])
def test_what_changes_while_it_is_copied_is_not_taken(store: AdapterStore, folders: list[Path], how: str) -> None:
    tensors, config = (folders[0] / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    copy = store._disk.copy

    def slowly(source: int, target: Path, limit: int) -> int:
        size = copy(source, target, limit)
        if target.name == tensors.name:
            if how == "written to":
                with tensors.open("r+b") as file:
                    file.write(b"x")
            elif how == "replaced":
                shutil.copy(folders[1] / tensors.name, tensors.with_suffix(".new"))
                tensors.with_suffix(".new").replace(tensors)
            else:
                config.write_text("{}")
        return size

    store._disk.copy = slowly  # type: ignore[method-assign]
    with pytest.raises(InvalidAdapter, match="has changed while it was copied"), store.stage(folders[0]):
        raise AssertionError("it is a mixture")
    assert not list((store.root / "incoming").iterdir())
    store._disk.copy = copy  # type: ignore[method-assign]


def test_a_crash_while_versions_are_set_aside_costs_none(
    store: AdapterStore, folders: list[Path], tmp_path: Path
) -> None:
    digests = {publish(store, "a", folders[0]), publish(store, "b", folders[1])}
    store.close()
    (store.root / "names.json").unlink()
    for at in range(3):
        root = tmp_path / f"crash-{at}"
        shutil.copytree(store.root, root)
        with pytest.raises(Crash):
            AdapterStore(root, disk=FaultyDisk(at))
        AdapterStore(root).close()
        assert {path.name for path in (root / "unnamed").iterdir()} == digests


def test_names_that_could_not_be_written_leave_nothing_behind(store: AdapterStore, folders: list[Path]) -> None:
    publish(store, "a", folders[0])
    store._disk = FaultyDisk(0, full, half=True)
    with pytest.raises(StoreFailed, match="the disk is full"):
        store.write(store.journal.retire("a"))
    assert {path.name for path in store.root.iterdir()} == {"versions", "incoming", "names.json", "lock"}


def test_what_a_record_is_asked_for_at_each_look_is_worked_out_once(tmp_path: Path, write_adapter: Any) -> None:
    record = VersionRecord.of(write_adapter(tmp_path / "a", rank=3), 0.0)
    assert (record.ranks, record.targets) == ([3], ["q_proj", "v_proj"])
    assert record.ranks is record.ranks and record.targets is record.targets


def test_a_version_that_is_deleted_is_not_damaged_any_more(tmp_path: Path, write_adapter: Any) -> None:
    store = AdapterStore(tmp_path / "store")
    digest = publish(store, "a", write_adapter(tmp_path / "a") and tmp_path / "a")
    store.damaged.add(digest)
    store.write(store.journal.retire("a"))
    store.remove(digest)
    assert not store.damaged
    store.close()
