"""The packed cache file: round trip, damage, and cleanup."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from server.kernels.packed_format import dequantize_stored
from server.model.file_digest import Digests
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


def test_tensors_are_mapped_aligned_and_equal(tmp_path: Path) -> None:
    write(tmp_path)
    packed = open_packed(packed_path(tmp_path, KEY), KEY, Digests(tmp_path))
    assert packed is not None and packed.notes == ("a note",)
    expected = quantize(matrix(), "int4", 64, double_quant=True)
    weight = packed.weights["a.q_proj"]
    assert (weight.scheme, weight.layout, weight.shape, weight.group) == ("int4", "stored", (20, 128), 64)
    assert torch.equal(dequantize_stored(weight), dequantize_stored(expected))
    assert torch.equal(packed.tensors["norm.weight"], torch.arange(5.0))
    assert torch.equal(packed.tensors["odd"], matrix().t()) and packed.tensors["odd"].is_contiguous()
    assert packed.tensors["empty"].numel() == 0
    tensors = [*packed.tensors.values(), *(t for w in packed.weights.values() for t in w.tensors.values())]
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in tensors if t.numel())


def test_writing_to_a_tensor_or_deleting_the_file_harms_nobody(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.read_bytes()
    packed = open_packed(path, KEY, Digests(tmp_path))
    assert packed is not None and str(path) in Path("/proc/self/maps").read_text()
    packed.tensors["norm.weight"].zero_()
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(packed.tensors["odd"], matrix().t())


@pytest.mark.parametrize("where", ["magic", "head", "tensors", "index", "note", "cut", "grown", "empty", "key"])
def test_a_damaged_file_is_removed_and_logged(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path)
    assert open_packed(path, KEY, Digests(tmp_path)) is not None  # caches its digest
    data, key = bytearray(path.read_bytes()), dict(KEY)
    if where in ("magic", "head", "tensors", "index"):
        data[{"magic": 0, "head": 9, "tensors": 200, "index": len(data) - 30}[where]] ^= 1
    elif where == "note":
        data = data.replace(b"a note", b"a vote")
    elif where == "cut":
        del data[-100:]
    elif where == "grown":
        data += b"\0"
    elif where == "empty":
        data.clear()
    else:
        key["source"] = "other"
    path.write_bytes(data)
    assert open_packed(path, key, Digests(tmp_path)) is None
    assert not path.exists() and "is rebuilt" in caplog.text
    assert open_packed(path, key, Digests(tmp_path)) is None, "and a missing one is none"


def test_an_unfinished_file_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PackedWriter(packed_path(tmp_path, KEY), KEY) as writer:
        writer.add_tensor("x", torch.ones(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_old_files_are_removed(tmp_path: Path) -> None:
    days = 24 * 3600
    names = {"base-old.packed": 31, "base-recent.packed": 29, "base-x.tmp": 2, "base-y.tmp": 0, "other.packed": 99}
    for name, age in names.items():
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age * days,) * 2)
    path = write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "base-recent.packed", "base-y.tmp", "other.packed"}
