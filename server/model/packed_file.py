"""The packed cache: one file with a base's resident form, mapped by the server and by training processes.

A packed file is disposable. Its name is a digest of its key (the source's digest, the quantization, the backend's
layout). It is written atomically, verified when it is opened, and rebuilt if anything is wrong with it.

Format, little-endian: 64 bytes of head (magic, offset, length and SHA-256 of the index), then the tensors, each at a
multiple of 64 bytes, then the index, a JSON object.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from server.kernels.huge_pages import mapped
from server.kernels.weight import Weight
from server.model.file_digest import Digests

log = logging.getLogger(__name__)

MAGIC = b"loramux1"
ALIGNMENT = 64
_ABANDONED = 24 * 3600.0  # seconds without a write, after which a temporary file is removed
_UNUSED = 30 * 24 * 3600.0  # seconds without a use, after which a packed file is removed
_HEAD = struct.Struct("<8sQQ32s")
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """The content of a packed file. The tensors are views of the mapped file and must not be written."""

    weights: Mapping[str, Weight]
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def packed_path(directory: Path, key: Mapping[str, Any]) -> Path:
    """The path of the packed file for `key`."""
    return directory / f"base-{hashlib.sha256(_canonical(key)).hexdigest()[:32]}.packed"


class PackedWriter:
    """Writes a packed file tensor by tensor. It appears at its path with `finish`.

    A context manager: leaving it without `finish` removes what was written. Raises OSError.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, dict(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(path.parent, "base-*.tmp", _ABANDONED)
        handle, self._temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        self._file: BinaryIO = os.fdopen(handle, "w+b")
        self._digest = hashlib.sha256()
        self._file.write(bytes(ALIGNMENT))
        self._at = ALIGNMENT
        self._weights: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            with suppress(OSError):  # on a full disk, flushing fails again
                self._file.close()
            Path(self._temporary).unlink(missing_ok=True)

    def add_weight(self, path: str, weight: Weight) -> None:
        self._weights[path] = {
            "scheme": weight.scheme,
            "layout": weight.layout,
            "shape": list(weight.shape),
            "group": weight.group,
            "tensors": {name: self._write(tensor) for name, tensor in weight.tensors.items()},
        }

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = self._write(tensor)

    def finish(self, notes: tuple[str, ...] = ()) -> None:
        """Write the index, sync, and move the file to its path. Removes packed files unused for 30 days."""
        index = _canonical(
            {
                "key": self._key,
                "weights": self._weights,
                "tensors": self._tensors,
                "notes": list(notes),
                "data": self._digest.hexdigest(),
            }
        )
        self._file.write(index)
        self._file.seek(0)
        self._file.write(_HEAD.pack(MAGIC, self._at, len(index), hashlib.sha256(index).digest()))
        self._file.flush()
        os.fsync(self._file.fileno())
        # Drop the written pages from the page cache: mapping reads them again as huge pages.
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        os.replace(self._temporary, self._path)
        _remove_old(self._path.parent, "base-*.packed", _UNUSED)

    def _write(self, tensor: torch.Tensor) -> list[Any]:
        """Append a tensor; returns its index entry: dtype, shape and offset."""
        tensor = tensor.detach().contiguous().cpu()
        offset = self._at
        if tensor.numel():
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            padding = b"\0" * (-len(data) % ALIGNMENT)
            for block in (data, padding):
                self._file.write(block)
                self._digest.update(block)
                self._at += len(block)
        return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset]


def open_packed(path: Path, key: Mapping[str, Any], digests: Digests) -> Packed | None:
    """Map the packed file; None if there is none. A damaged file, or one of another key, is removed.

    The tensors' digest is verified once for each stamp of the file.
    """
    if not path.is_file():
        return None
    try:
        return _mapped(path, key, digests)
    except PermissionError as error:
        log.warning("the packed cache %s cannot be read and is rebuilt: %s", path.name, error)
    except (OSError, ValueError, KeyError, TypeError, struct.error, RuntimeError) as error:
        log.warning("the packed cache %s is damaged and is rebuilt: %s", path.name, error)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def _remove_old(directory: Path, pattern: str, seconds: float) -> None:
    for path in directory.glob(pattern):
        with suppress(OSError):
            stat = path.stat()
            if time.time() - max(stat.st_atime, stat.st_mtime) > seconds:
                path.unlink()
                log.info("removed %s, which was not used for %d days", path.name, seconds // 86400)


def _mapped(path: Path, key: Mapping[str, Any], digests: Digests) -> Packed:
    storage = mapped(path).untyped_storage()  # before reading, which would load small pages
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, end, length, digest = _HEAD.unpack(file.read(_HEAD.size))
        if magic != MAGIC or end + length != size:
            raise ValueError("its head or its length is wrong")
        file.seek(end)
        text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("the digest of its index is wrong")
    index = json.loads(text)
    if _canonical(index["key"]) != _canonical(key):
        raise ValueError("it belongs to another model")
    if digests.of(path, ALIGNMENT, end) != index["data"]:
        raise ValueError("the digest of its tensors is wrong")

    def view(entry: list[Any]) -> torch.Tensor:
        dtype, shape = _DTYPES[entry[0]], torch.Size(entry[1])
        offset = int(entry[2]) // dtype.itemsize
        strides = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)

    weights = {
        name: Weight(
            entry["scheme"],
            entry["layout"],
            (entry["shape"][0], entry["shape"][1]),
            entry["group"],
            {part: view(tensor) for part, tensor in entry["tensors"].items()},
        )
        for name, entry in index["weights"].items()
    }
    tensors = {name: view(entry) for name, entry in index["tensors"].items()}
    return Packed(weights, tensors, tuple(index["notes"]))


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
