from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from server.kernels.huge_pages import HUGE
from server.kernels.packed_format import dequantize_stored
from server.model.file_digest import Digests, sha256
from server.model.packed_file import ALIGNMENT, PackedWriter, open_packed, packed_path
from server.model.quantization import quantize

KEY = {"source": "abc", "layout": "stored-1"}


def matrix() -> torch.Tensor:
    return torch.randn(20, 128, generator=torch.Generator().manual_seed(0))


def write(directory: Path) -> Path:
    path = packed_path(directory, KEY)
    with PackedWriter(path, KEY) as writer:
        writer.add_weight("a.q_proj", quantize(matrix(), "int4", 64, double_quant=True))
        writer.add_weight("table", quantize(matrix(), "none"))
        writer.add_tensor("norm.weight", torch.arange(5.0))
        writer.add_tensor("odd", matrix().t())
        writer.add_tensor("empty", torch.empty(0))
        writer.finish(("a note",))
    return path


def settle(path: Path) -> None:
    """Make the file old enough for its digest to be remembered."""
    os.utime(path, (time.time() - 10, time.time() - 10))


def test_what_is_written_is_mapped_aligned_and_equal(tmp_path: Path) -> None:
    path = write(tmp_path)
    packed = open_packed(path, KEY, Digests(tmp_path))
    assert packed is not None and packed.notes == ("a note",)
    expected = quantize(matrix(), "int4", 64, double_quant=True)
    weight = packed.weights["a.q_proj"]
    assert (weight.scheme, weight.layout, weight.shape, weight.group) == ("int4", "stored", (20, 128), 64)
    assert weight.tensors.keys() == expected.tensors.keys()
    assert torch.equal(dequantize_stored(weight), dequantize_stored(expected))
    assert torch.equal(packed.tensors["norm.weight"], torch.arange(5.0))
    assert torch.equal(packed.tensors["odd"], matrix().t()) and packed.tensors["odd"].is_contiguous()
    assert packed.tensors["empty"].numel() == 0
    tensors = [*packed.tensors.values(), *(t for w in packed.weights.values() for t in w.tensors.values())]
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in tensors if t.numel())


def test_the_bytes_are_the_files_and_are_not_written_to(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.read_bytes()
    packed = open_packed(path, KEY, Digests(tmp_path))
    assert packed is not None
    packed.tensors["norm.weight"].zero_()
    assert path.read_bytes() == before
    maps = Path("/proc/self/maps").read_text()
    assert str(path) in maps
    path.unlink()  # the cache may be deleted at any time, also under a running server
    assert torch.equal(packed.tensors["odd"], matrix().t())


def test_what_was_written_leaves_memory_once_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    synced, advised = os.fsync, os.posix_fadvise

    def fsync(file: int) -> None:
        synced(file)
        told.append(("on the disk", os.fstat(file).st_ino))

    def advise(file: int, offset: int, length: int, advice: int) -> None:
        advised(file, offset, length, advice)
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # all of it
        told.append(("not needed", os.fstat(file).st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    path = packed_path(tmp_path, KEY)
    with PackedWriter(path, KEY) as writer:
        writer.add_tensor("some", torch.arange(HUGE // 4, dtype=torch.int32))
        writer.finish()
    inode = path.stat().st_ino
    assert [what for what, of in told if of == inode] == ["on the disk", "not needed"]
    packed = open_packed(path, KEY, Digests(None))
    assert packed is not None and torch.equal(packed.tensors["some"], torch.arange(HUGE // 4, dtype=torch.int32))


def test_a_file_system_that_syncs_no_folder_has_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    write(tmp_path)
    assert open_packed(packed_path(tmp_path, KEY), KEY, Digests(None)) is not None


def test_a_system_that_takes_no_advice_has_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    write(tmp_path)
    assert open_packed(packed_path(tmp_path, KEY), KEY, Digests(None)) is not None


@pytest.mark.parametrize("where", ["magic", "head", "tensors", "index", "note", "cut", "grown", "empty"])
def test_a_damaged_file_is_removed_with_a_line(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path)
    settle(path)
    assert open_packed(path, KEY, Digests(tmp_path)) is not None  # remembered as verified
    data = bytearray(path.read_bytes())
    if where in ("head", "tensors", "index"):
        data[{"head": 9, "tensors": 200, "index": len(data) - 30}[where]] ^= 1
    elif where == "magic":
        data[0] ^= 1
    elif where == "note":  # what the index says is JSON still, and of the same key
        data = data.replace(b"a note", b"a vote")
    elif where == "cut":
        del data[-100:]
    elif where == "grown":
        data += b"x"
    else:
        data.clear()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert open_packed(path, KEY, Digests(tmp_path)) is None
    assert "damaged" in caplog.text and not path.exists()
    assert open_packed(path, KEY, Digests(tmp_path)) is None


@pytest.mark.parametrize("damaged", [True, False])
def test_what_cannot_be_read_or_removed_is_made_again(
    tmp_path: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another user, or on a disk that is mounted to be read."""
    path = write(tmp_path)
    if damaged:
        path.write_bytes(b"")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    if not damaged:
        monkeypatch.setattr("server.model.packed_file.mapped", refused)
    assert open_packed(path, KEY, Digests(None)) is None
    assert ("is damaged" if damaged else "cannot be read") in caplog.text


def test_a_file_of_another_key_is_not_taken(tmp_path: Path) -> None:
    path = write(tmp_path)
    other = packed_path(tmp_path, KEY | {"layout": "stored-2"})
    assert other != path
    path.rename(other)
    assert open_packed(other, KEY | {"layout": "stored-2"}, Digests(None)) is None


def test_nothing_is_left_of_a_write_that_did_not_finish(tmp_path: Path) -> None:
    path = packed_path(tmp_path, KEY)
    with pytest.raises(RuntimeError), PackedWriter(path, KEY) as writer:
        writer.add_tensor("x", torch.ones(3))
        raise RuntimeError
    with PackedWriter(path, KEY) as writer:
        writer.add_tensor("x", torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_disk_ends_within_what_is_not_written_yet(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_100, hard))
    try:
        with pytest.raises(OSError, match="too large"), PackedWriter(packed_path(tmp_path, KEY), KEY) as writer:
            writer.add_tensor("codes", torch.zeros(1_000_000, dtype=torch.uint8))
            writer.add_tensor("norm", torch.zeros(576))
            writer.add_tensor("more", torch.zeros(1_000_000, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_start(tmp_path: Path) -> None:
    packed = write(tmp_path)
    left, young = tmp_path / "base-1.tmp", tmp_path / "base-2.tmp"

    def leave() -> None:
        for path, age in ((left, 90), (young, 30)):
            path.write_bytes(b"x")
            os.utime(path, (time.time() - age, time.time() - age))

    for start in (lambda: open_packed(packed, KEY, Digests(None)), lambda: write(tmp_path)):
        leave()
        start()
        assert not left.exists() and young.exists()


def test_what_another_process_writes_stays_however_long_it_has_not(tmp_path: Path) -> None:
    packed, other = write(tmp_path), KEY | {"layout": "stored-2"}
    with PackedWriter(packed_path(tmp_path, other), other) as writer:
        (mine,) = tmp_path.glob("base-*.tmp")
        os.utime(mine, (time.time() - 86400, time.time() - 86400))
        assert open_packed(packed, KEY, Digests(None)) is not None
        writer.finish()
    assert packed_path(tmp_path, other).exists()


def test_what_nobody_has_opened_for_thirty_days_goes_with_the_next_write(tmp_path: Path) -> None:
    long_ago = time.time() - 31 * 86400
    used, unused = write(tmp_path), tmp_path / "base-2.packed"
    unused.write_bytes(b"x")
    for path in (used, unused):
        os.utime(path, (long_ago, long_ago))
    assert open_packed(used, KEY, Digests(None)) is not None
    assert used.stat().st_mtime == pytest.approx(long_ago), "when it was written is what the digests go by"
    other = KEY | {"layout": "stored-2"}
    with PackedWriter(packed_path(tmp_path, other), other) as writer:
        writer.finish()
    assert used.exists() and not unused.exists()


def test_what_cannot_be_removed_is_no_fault_of_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "base-1.packed").symlink_to("nothing")
    (tmp_path / "base-2.packed").mkdir()
    os.utime(tmp_path / "base-2.packed", (0, 0))
    assert write(tmp_path).stat().st_size > 0


@pytest.mark.parametrize(("opened", "written"), [(29, 31), (31, 29)])
def test_what_was_opened_or_written_within_thirty_days_stays(tmp_path: Path, opened: int, written: int) -> None:
    other, now = tmp_path / "base-2.packed", time.time()
    other.write_bytes(b"x")
    os.utime(other, (now - opened * 86400, now - written * 86400))
    write(tmp_path)
    assert other.exists()


def test_that_a_file_is_opened_is_noted_where_the_disk_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, noted, begun = write(tmp_path), list[tuple[Path, tuple[int, int]]](), time.time_ns()
    os.utime(path, (10**9, 10**9))  # what is of just now is not remembered, and left as it is
    monkeypatch.setattr(os, "utime", lambda path, ns: noted.append((path, ns)))
    assert open_packed(path, KEY, Digests(tmp_path)) is not None
    ((of, (opened, written)),) = noted
    assert of == path and begun <= opened <= time.time_ns() and written == path.stat().st_mtime_ns


def test_a_file_on_a_disk_that_is_read_only_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = write(tmp_path), list[object]()
    os.utime(path, (10**9, 10**9))

    def refused(*of: object, **__: object) -> None:
        asked.extend(of)
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert open_packed(path, KEY, Digests(tmp_path)) is not None and path.exists() and asked == [path]


def test_where_there_are_no_locks_files_are_written_and_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "base-1.tmp"
    left.write_bytes(b"x")
    os.utime(left, (time.time() - 86400, time.time() - 86400))

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert open_packed(write(tmp_path), KEY, Digests(None)) is not None and left.exists()


def test_a_key_is_the_same_in_whatever_order_it_is_told(tmp_path: Path) -> None:
    turned = dict(reversed(KEY.items()))
    assert list(turned) != list(KEY) and packed_path(tmp_path, turned) == packed_path(tmp_path, KEY)
    assert open_packed(write(tmp_path), turned, Digests(None)) is not None


def test_digests_are_remembered_until_size_or_time_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"one")
    settle(path)
    expected = sha256(path)
    assert Digests(tmp_path).of(path) == expected
    read: list[Path] = []
    monkeypatch.setattr("server.model.file_digest.sha256", lambda p, *a: read.append(p) or sha256(p, *a))
    assert Digests(tmp_path).of(path) == expected and read == []
    path.write_bytes(b"two")
    assert Digests(tmp_path).of(path) != expected and read == [path]
    assert Digests(tmp_path).of(path) == sha256(path) and len(read) == 2  # too young to be remembered
    (tmp_path / "digests.json").write_text("{broken")
    assert Digests(tmp_path).of(path) == sha256(path)


def test_a_cache_that_may_not_be_looked_into_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, say."""

    def denied(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "model.bin"
    path.write_bytes(b"one")
    for name in ("is_file", "read_text"):
        monkeypatch.setattr(Path, name, denied)
    assert Digests(tmp_path / "cache").of(path) == sha256(path)
    assert open_packed(tmp_path / "cache" / "base-x.packed", {}, Digests(None)) is None


def test_digests_that_cannot_be_remembered_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"one")
    settle(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    assert Digests(tmp_path).of(path) == sha256(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_of_several_files_knows_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    digests = Digests(None)
    both = digests.of_all(tmp_path, [tmp_path / "a", tmp_path / "b"])
    assert both == digests.of_all(tmp_path, [tmp_path / "b", tmp_path / "a"])
    (tmp_path / "a").rename(tmp_path / "c")
    assert both != digests.of_all(tmp_path, [tmp_path / "c", tmp_path / "b"])
