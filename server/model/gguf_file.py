"""Reads GGUF files (versions 2 and 3, little-endian): the header, tensors, and lossless 4- and 8-bit blocks.

Other block types are dequantized by the `gguf` package. Its own reader is not used: it takes 2 s for the token list.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from server.errors import BadModel
from server.kernels.weight import STORED, Weight

MAGIC = b"GGUF"
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
BLOCK = 32
"""Values in a block of Q4_0, Q4_1 and Q8_0."""

_SIZES = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q8_0: (32, 34)}
_NAMES = {F32: "F32", F16: "F16", BF16: "BF16", Q4_0: "Q4_0", Q4_1: "Q4_1", Q8_0: "Q8_0"}
_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ROWS = 1024  # rows dequantized at a time
_MAX_DEPTH = 8  # of nested arrays


@dataclass(frozen=True)
class TensorInfo:
    """Type, shape (outermost first, as in torch) and position of a tensor."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return _NAMES.get(self.kind) or str(_gguf_type(self.kind).name)


class GgufFile:
    """A GGUF file. The header is read at once, tensors on demand.

    Tensors are read, not mapped: truncating a mapped file would kill the process.

    Attributes:
        metadata: Key -> value; arrays of numbers are numpy arrays, arrays of strings are lists.
        tensors: Name -> TensorInfo.

    Raises:
        BadModel: the file is not GGUF, truncated, or of an unsupported version. Reading tensors may raise it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.metadata, self.tensors = _Header(file, path.name).read()
        except ValueError as error:
            raise BadModel(f"{path.name} is not a complete GGUF file: {error}") from error
        except OSError as error:
            raise BadModel(f"{path.name} cannot be read: {error.strerror or error}") from error

    def rows(self, name: str) -> Rows:
        """The tensor as rows of floats, read on demand."""
        return Rows(self, self.tensors[name])

    def floats(self, name: str) -> torch.Tensor:
        """The whole tensor in its own floating dtype, or dequantized to float32."""
        rows = Rows(self, self.tensors[name])
        return rows[: rows.shape[0]].view(self.tensors[name].shape)

    def stored(self, name: str) -> Weight | None:
        """A matrix of Q4_0, Q4_1 or Q8_0 in the stored layout, without loss.

        None for other tensors, non-finite scales, and Q8_0 codes of -128, which the layout does not have.
        """
        info = self.tensors[name]
        if info.kind not in (Q4_0, Q4_1, Q8_0) or len(info.shape) != 2:
            return None
        rows, columns = info.shape
        shape = (rows, columns)
        raw = self.read_rows(info, 0, rows).view(rows, columns // BLOCK, _SIZES[info.kind][1])
        scale = _halves(raw[..., 0:2])
        if not bool(torch.isfinite(scale).all()):
            return None
        if info.kind == Q8_0:
            codes = raw[..., 2:].contiguous().view(torch.int8).view(rows, columns)
            if int(codes.min()) < -127:
                return None
            return Weight("int8", STORED, shape, BLOCK, {"codes": codes, "scale": scale})
        if info.kind == Q4_1:
            codes, zero = raw[..., 4:], _halves(raw[..., 2:4])
        else:
            codes, zero = raw[..., 2:], scale * -8  # exact: a power of two
        if not bool(torch.isfinite(zero).all()):
            return None
        tensors = {"codes": _interleave(codes).view(rows, columns // 2), "scale": scale, "zero": zero}
        return Weight("int4", STORED, shape, BLOCK, tensors)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Raw bytes of rows start..stop, uint8 [rows, bytes]; a vector is one row."""
        row = info.nbytes // info.shape[0] if len(info.shape) > 1 else info.nbytes
        try:
            data = np.fromfile(self.path, np.uint8, (stop - start) * row, offset=info.offset + start * row)
        except OSError as error:
            raise BadModel(f"{self.path.name} cannot be read: {error.strerror or error}") from error
        if len(data) != (stop - start) * row:
            raise BadModel(f"{self.path.name} was truncated while it was read; start again")
        return torch.from_numpy(data).view(stop - start, row)


class Rows:
    """A vector or matrix that is dequantized when it is sliced: `rows[a:b]` is float [b - a, in]."""

    def __init__(self, file: GgufFile, info: TensorInfo) -> None:
        self._file, self._info = file, info
        self.shape = info.shape if len(info.shape) > 1 else (1, *info.shape)
        self.dtype = _FLOATS.get(info.kind, torch.float32)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        info = self._info
        if info.kind in _FLOATS:
            return self._file.read_rows(info, start, stop).view(self.dtype)
        from gguf.quants import dequantize

        values = torch.empty((stop - start, self.shape[1]), dtype=torch.float32)
        kind = _gguf_type(info.kind)
        try:
            for first in range(start, stop, _ROWS):
                last = min(first + _ROWS, stop)
                with np.errstate(all="ignore"):  # callers refuse non-finite values
                    block = dequantize(self._file.read_rows(info, first, last).numpy(), kind)
                values[first - start : last - start] = torch.from_numpy(block)
        except NotImplementedError as error:
            raise BadModel(f"tensors of the GGUF type {kind.name} are not supported ({info.name})") from error
        return values


class _Header:
    """Reads a header once, from start to end. Raises BadModel and ValueError."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._size, self._at = os.fstat(file.fileno()).st_size, 0

    def read(self) -> tuple[dict[str, Any], Mapping[str, TensorInfo]]:
        if self._take(4) != MAGIC:
            raise BadModel(f"{self._name} is not a GGUF file")
        version = self._scalar("<I")
        if version not in (2, 3):
            reason = "is big-endian" if version in (2 << 24, 3 << 24) else f"has the GGUF version {version}"
            raise BadModel(f"{self._name} {reason}; little-endian files of versions 2 and 3 are supported")
        tensor_count, key_count = self._scalar("<Q"), self._scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"it has the key {key} twice")
            metadata[key] = self._value(self._scalar("<I"))
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError("general.alignment is not a positive whole number")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in found:
            if name in tensors:
                raise ValueError(f"it has the tensor {name} twice")
            nbytes = _nbytes(name, kind, shape)
            if start + offset + nbytes > self._size:
                raise BadModel(f"{self._name} is truncated: it ends before {name}")
            tensors[name] = TensorInfo(name, kind, shape, start + offset, nbytes)
        return metadata, tensors

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        return name, self._scalar("<I"), shape, self._scalar("<Q")

    def _take(self, size: int) -> bytes:
        data = self._file.read(size) if self._at + size <= self._size else b""
        if len(data) != size:
            raise ValueError("it ends inside its header")
        self._at += size
        return data

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode()

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_form(kind))
        kind, count = self._scalar("<I"), self._scalar("<Q")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind == _ARRAY:
            if depth == _MAX_DEPTH:
                raise ValueError("its arrays are nested too deeply")
            return [self._value(_ARRAY, depth + 1) for _ in range(count)]
        form = np.dtype(_form(kind))
        return np.frombuffer(self._take(count * form.itemsize), form)


def _form(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value has the unknown type {kind}")
    return _SCALARS[kind]


def _nbytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind in _SIZES:
        values, size = _SIZES[kind]
    else:
        from gguf.constants import GGML_QUANT_SIZES

        values, size = GGML_QUANT_SIZES[_gguf_type(kind)]
    if shape[-1] % values or 0 in shape:
        raise ValueError(f"{name} of shape {shape} does not consist of whole blocks of {values}")
    return int(size) * math.prod((*shape[:-1], shape[-1] // int(values)))


def _gguf_type(kind: int) -> Any:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind)
    except ValueError:
        if kind > 255:  # not a type of a newer llama.cpp, but a damaged header
            raise
        raise BadModel(
            f"tensors of the GGUF type number {kind} are not supported; quantize the model to another type, such as "
            "Q4_0, Q4_1 or Q8_0"
        ) from None


def _halves(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2] -> float16 [...]."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


def _interleave(codes: torch.Tensor) -> torch.Tensor:
    """Reorder the 4-bit codes of each byte from ggml's (i, i + 16) to (2i, 2i + 1): uint8 [rows, blocks, 16]."""
    out = torch.empty(codes.shape, dtype=torch.uint8)
    low, high = codes & 15, codes >> 4
    out[..., :8] = low[..., 0::2] | (low[..., 1::2] << 4)
    out[..., 8:] = high[..., 0::2] | (high[..., 1::2] << 4)
    return out
