"""The packed cache: one file that holds a base's resident form, mapped by whoever serves or trains on it.

Owns the file format. It is disposable: keyed by the source's digest, the quantization and the backend's layout, it is
written atomically, verified when it is opened, and made again when anything is wrong with it. When one is written,
those that nobody has opened for thirty days are removed; what a writer that was killed has left goes with the next
start. Does not know models.

Format, all little-endian: 64 bytes of head (magic, offset, length and SHA-256 of the index), then the tensors, each
at a multiple of 64 bytes, then the index, a JSON object.
"""

from __future__ import annotations

import fcntl
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
_ABANDONED = 60.0  # seconds without a write, where nobody holds the file either
_UNUSED = 30 * 24 * 3600.0  # seconds
_HEAD = struct.Struct("<8sQQ32s")
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """What a packed file holds. The tensors lie in the file's pages: read-only by convention, shared, not copied."""

    weights: Mapping[str, Weight]
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def packed_path(directory: Path, key: Mapping[str, Any]) -> Path:
    """Where the packed file for `key` lies, or would."""
    return directory / f"base-{hashlib.sha256(_canonical(key)).hexdigest()[:32]}.packed"


class PackedWriter:
    """Writes a packed file tensor by tensor; nothing is seen under its name until `finish`.

    Used as a context manager: leaving it without `finish` removes what was written. Raises OSError.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, dict(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        handle, self._temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        self._file: BinaryIO = os.fdopen(handle, "w+b")
        with suppress(OSError):  # where there are no locks, nothing is taken for abandoned
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._digest = hashlib.sha256()
        self._file.write(bytes(ALIGNMENT))
        self._at = ALIGNMENT
        self._weights: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}

    def __enter__(self) -> PackedWriter:
        return self

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
        """Write the index and give the file its name, once all of it is on the disk."""
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
        # What was written lies in memory in small pages and would stay there: whoever maps it reads huge ones.
        with suppress(OSError, AttributeError):  # where nobody takes advice
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        os.replace(self._temporary, self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # not every file system syncs folders; a file whose name is lost is made again
                os.fsync(directory)
        finally:
            os.close(directory)
        self._remove_unused()

    def _remove_unused(self) -> None:
        """Remove the packed files of other sources, settings and layouts that have not been opened for long."""
        for other in self._path.parent.glob("base-*.packed"):
            with suppress(OSError):  # another's file, or one that somebody else removes: this one is written
                stat = other.stat()
                if other != self._path and time.time() - max(stat.st_atime, stat.st_mtime) > _UNUSED:
                    other.unlink()
                    log.info("the packed cache %s had not been used for 30 days and is removed", other.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            with suppress(OSError):  # on a full disk what is not written yet does not fit either
                self._file.close()
            Path(self._temporary).unlink(missing_ok=True)

    def _write(self, tensor: torch.Tensor) -> list[Any]:
        """Append a tensor; returns its dtype, shape and offset, for the index."""
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
    """The packed file, mapped; None if there is none. One that is damaged, of another key or another user is removed,
    where that is allowed, with a line.

    The bytes are verified once for each stamp of the file, but for what noting this use changes of it.
    """
    _remove_abandoned(path.parent)
    try:
        if not path.is_file():
            return None
        packed = _mapped(path, key, digests)
        with suppress(OSError):  # on a read-only disk nobody removes it either
            digests.note_use(path)
        return packed
    except PermissionError as error:  # another user's
        log.warning("the packed cache %s cannot be read and is made again: %s", path.name, error)
    except (OSError, ValueError, KeyError, TypeError, struct.error, RuntimeError) as error:
        log.warning("the packed cache %s is damaged and is made again: %s", path.name, error)
    with suppress(OSError):  # what cannot be removed is replaced, or nothing is written there at all
        path.unlink(missing_ok=True)
    return None


def _remove_abandoned(directory: Path) -> None:
    """Remove what processes have left that were killed while they wrote; nothing where there are no locks to tell."""
    for abandoned in directory.glob("base-*.tmp"):
        with suppress(OSError), abandoned.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                abandoned.unlink(missing_ok=True)


def _mapped(path: Path, key: Mapping[str, Any], digests: Digests) -> Packed:
    storage = mapped(path).untyped_storage()  # first: otherwise the bytes are read in small pages
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, end, length, digest = _HEAD.unpack(file.read(_HEAD.size))
        if magic != MAGIC or end + length != size:
            raise ValueError("its length is not what its head says")
        file.seek(end)
        text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("its index does not have the digest that its head says")
    index = json.loads(text)
    if _canonical(index["key"]) != _canonical(key):
        raise ValueError("it was made of something else")
    if digests.of(path, ALIGNMENT, end) != index["data"]:
        raise ValueError("its tensors do not have the digest that its index says")

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
