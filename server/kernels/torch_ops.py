"""The backend of torch's CPU ops, for machines without the native kernels.

int4 uses `aten::_weight_int4pack_mm_for_cpu`, which takes scales and offsets in bf16: they are rounded when a matrix is
packed, and `dequantize` returns the rounded weights. Other schemes dequantize blocks of rows.
"""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from adapters.weights import LoraWeights
from server.kernels.lora import Segments, matmul, slow_in
from server.kernels.packed_format import TILE, dequantize_stored, group_values, unpack_nibbles
from server.kernels.recompress import recompress
from server.kernels.reference import prepared, stored_rows
from server.kernels.weight import STORED, Weight

INT4PACK = "int4pack-2"
GROUPS = (32, 64, 128, 256)
"""Group sizes that torch's 4-bit product supports."""
PACKED_ROWS = 96
"""Most rows for which the 4-bit product is faster than dequantizing blocks (measured with AVX-512 and AVX2)."""
SCALAR_ROWS = 3
"""The same without AVX2, where torch's 4-bit product is a scalar loop (measured)."""
BLOCK_BYTES = 2**22
"""Bytes of float32 weights that are dequantized at a time: few enough to stay in the cache."""


class WorkBuffers(threading.local):
    """Reusable buffers per thread. Page faults of new memory take three times as long as a product."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """An uninitialized tensor, valid until the next call with the same name and dtype."""
        size, buffer = math.prod(shape), self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


def layout() -> str:
    """Layout name with everything that the packing depends on: torch's version, CPU capability and machine."""
    torch_version = ".".join(torch.__version__.split(".")[:2])
    return f"{INT4PACK}-{_capability().lower()}-{_tile_rows()}-{platform.machine().lower()}-torch{torch_version}"


class TorchOps:
    """The `aten` backend. Adapters are bf16."""

    name = "aten"
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.layout = layout()
        self._work = WorkBuffers()

    def pack(self, stored: Weight) -> Weight:
        out, width = stored.shape
        if stored.scheme != "int4" or stored.group not in GROUPS or out % 16 or width % stored.group:
            return stored
        codes = unpack_nibbles(stored.tensors["codes"]).int()
        tensors = {"codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 8)}
        del codes
        if stored.double_quantized:
            # Kept double-quantized, groups before rows, and decoded at each use.
            tensors |= {name: tensor.t().contiguous() for name, tensor in stored.tensors.items() if name != "codes"}
        else:
            tensors["scales"] = _scales(stored)
        return Weight("int4", INT4PACK, stored.shape, stored.group, tensors)

    def dequantize(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if weight.layout == STORED:
            return dequantize_stored(weight, start, stop)
        stop = weight.shape[0] if stop is None else min(stop, weight.shape[0])
        first = start // _tile_rows() * _tile_rows()
        return (
            _columns(weight, first, stop, torch.float32, self._work)[:, start - first :]
            .t()
            .clone(memory_format=torch.contiguous_format)
        )

    def prepare(self, weights: LoraWeights, scheme: str) -> LoraWeights:
        return prepared(recompress(weights), self.dtype)

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        if update is not None:
            return self._linear_with_update(weight, x, update)
        if weight.layout == INT4PACK:
            if x.dtype == torch.bfloat16 and x.shape[0] <= _packed_rows():
                y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x, weight.tensors["codes"], weight.group, _scales(weight)
                )
                return y
        elif weight.scheme == "none" and weight.tensors["codes"].dtype == x.dtype and not slow_in(x.dtype):
            return F.linear(x, weight.tensors["codes"])
        if weight.layout == INT4PACK:
            wide = x.float() if slow_in(x.dtype) else x
            y = torch.empty(x.shape[0], weight.shape[0], dtype=wide.dtype)
            for start, stop in _blocks(weight):
                torch.mm(wide, _columns(weight, start, stop, wide.dtype, self._work), out=y[:, start:stop])
            return y.to(x.dtype)
        products = self._work("products", x.dtype, weight.shape[0], x.shape[0])
        x = x.float() if slow_in(x.dtype) else x
        for start, stop in _blocks(weight):
            out = self._work("rows", torch.float32, stop - start, weight.shape[1])
            products[start:stop] = _rows_times(dequantize_stored(weight, start, stop, out=out).to(x.dtype), x)
        # Transposed once for all blocks: a single block is so small that torch would use one thread.
        return products.t().clone(memory_format=torch.contiguous_format)

    def _linear_with_update(self, weight: Weight, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """`linear` with an update, without torch's 4-bit product, which would round to bf16 first."""
        if slow_in(x.dtype) or (weight.layout != INT4PACK and weight.scheme != "none"):
            return self.linear(weight, x.float()).add_(update).to(x.dtype)
        if weight.layout != INT4PACK:
            return torch.addmm(update, x, weight.tensors["codes"].to(x.dtype).t())
        y = update.clone()
        for start, stop in _blocks(weight):
            y[:, start:stop].addmm_(x, _columns(weight, start, stop, x.dtype, self._work))
        return y

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        if weight.layout == STORED:
            return stored_rows(weight, ids)
        rows = [self.dequantize(weight, i, i + 1) for i in ids.tolist()]
        return torch.cat(rows) if rows else torch.empty(0, weight.shape[1])

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, path: str, segments: Segments) -> None:
        for run in segments.runs:
            module = run.module(path)
            if module is not None:
                rows = y[run.start : run.stop]
                rows.copy_(matmul(run.shrunk(module.shrink, x)[:, module.columns], module.B, add_to=rows))
        for segment in segments.long:
            for slot, weight in segment.mix:
                update = segments.table[slot].modules.get(path)
                if update is None:
                    continue
                rows, inputs = y[segment.start : segment.stop], x[segment.start : segment.stop]
                if slow_in(x.dtype):
                    v = inputs.float() @ update.A.float().t()
                    rows.copy_(rows.float().addmm_(v, update.B.float().t(), alpha=weight * update.scale))
                else:
                    v = inputs @ update.A.t()
                    rows.addmm_(v, update.B.t(), alpha=weight * update.scale)


def _capability() -> str:
    """The instruction set that torch's kernels use here."""
    return torch.backends.cpu.get_cpu_capability()


def _packed_rows() -> int:
    return PACKED_ROWS if _capability() in ("AVX2", "AVX512") else SCALAR_ROWS


def _rows_times(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """rows x^T [n, T] of float32 or bf16 rows [n, in], with oneDNN if torch has it.

    `torch.mm` uses MKL for float32, which takes twice as long with few rows of x (5.5 ms instead of 2.9 ms for a table
    of 49,152 rows and 16 rows of x).
    """
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        products: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, x, None, "none", [], "")
        return products
    return torch.mm(rows, x.t())


def _scales(weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """bf16 [in/group, rows, 2]: scale and offset in torch's form, w = (code - 8) * scale + offset.

    `start` is a multiple of 16.
    """
    stop = weight.shape[0] if stop is None else stop
    if "scales" in weight.tensors:
        return weight.tensors["scales"][:, start:stop]
    if weight.layout == STORED:
        scale, zero = (group_values(weight.tensors, name, start, stop).t() for name in ("scale", "zero"))
    else:
        scale, zero = (_decoded(weight, name, start, stop) for name in ("scale", "zero"))
    both = torch.empty((*scale.shape, 2), dtype=torch.bfloat16)
    both[..., 0] = scale
    both[..., 1] = zero.float().add_(scale, alpha=8)
    return both


def _decoded(weight: Weight, name: str, start: int, stop: int) -> torch.Tensor:
    """Decoded double-quantized scales or zeros as float16 [in/group, stop - start]."""
    codes = weight.tensors[f"{name}_codes"][:, start:stop]
    groups, rows = codes.shape
    tiles = slice(start // TILE, -(-stop // TILE))
    step, base = (
        weight.tensors[f"{name}_{part}"][:, tiles]
        .repeat_interleave(TILE, 1)[:, :rows]
        .repeat_interleave(TILE, 0)[:groups]
        for part in ("step", "base")
    )
    return codes.float().mul_(step).add_(base).half()


def _blocks(weight: Weight) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about BLOCK_BYTES, aligned to tiles."""
    out, width = weight.shape
    step = max(64, BLOCK_BYTES // (4 * width) // 64 * 64)
    for start in range(0, out, step):
        yield start, min(start + step, out)


def _columns(weight: Weight, start: int, stop: int, dtype: torch.dtype, work: WorkBuffers) -> torch.Tensor:
    """Dequantize rows `start` to `stop` of the layout `int4pack`, transposed: [in, stop - start] in a work buffer.

    `start` is a multiple of the tile.
    """
    tile = _tile_rows()
    out = work("columns", dtype, weight.shape[1], stop - start)
    whole = (stop - start) // tile * tile
    if whole:
        _tiles(out[:, :whole], weight, start, tile, work)
    if start + whole < stop:  # torch packs the remaining rows as one narrower tile
        last = min(start + whole + tile, weight.shape[0]) - start - whole
        narrow = work("narrow", dtype, weight.shape[1], last)
        _tiles(narrow, weight, start + whole, last, work)
        out[:, whole:] = narrow[:, : stop - start - whole]
    return out


def _tiles(out: torch.Tensor, weight: Weight, start: int, tile: int, work: WorkBuffers) -> None:
    """Dequantize rows from `start` on, packed in tiles of `tile` rows, into the columns of `out` [in, rows]."""
    (width, rows), group = out.shape, weight.group
    packed = weight.tensors["codes"].view(-1)[start * width // 2 : (start + rows) * width // 2]
    packed = packed.view(-1, width, tile // 2)
    levels = work("levels", torch.float32, len(packed), width, tile)
    nibbles = work("nibbles", torch.uint8, *packed.shape)
    levels[..., : tile // 2] = torch.bitwise_and(packed, 15, out=nibbles)
    levels[..., tile // 2 :] = torch.bitwise_right_shift(packed, 4, out=nibbles)
    order = _tile_order(tile)
    if order is not None:
        levels = levels[..., order]
    scales = _scales(weight, start, start + rows).float()
    scales = scales.view(-1, len(packed), tile, 2).permute(3, 1, 0, 2).contiguous()
    grouped = levels.view(len(packed), -1, group, tile)
    grouped.sub_(8).mul_(scales[0][:, :, None]).add_(scales[1][:, :, None])
    out.view(width, len(packed), tile).copy_(levels.transpose(0, 1))


@lru_cache
def _tile_rows() -> int:
    """Rows of a tile: 64 with AVX-512, 32 with AVX2. Found by packing one code."""
    probe = torch.zeros(256, 32, dtype=torch.int32)
    probe[0, 1] = 1
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 8).view(-1)
    return 2 * int(packed.nonzero()[0])


@lru_cache
def _tile_order(rows: int) -> torch.Tensor | None:
    """Position of each row of a tile among its low nibbles followed by its high ones; None if they are in order.

    Found by packing row numbers.
    """
    number = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, 32)
    digits = []
    for digit in (number % 16, number // 16):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 8).view(-1)
        packed = packed[: rows // 2]  # column 0
        digits.append(torch.cat((packed & 15, packed >> 4)).long())
    found = digits[0] + 16 * digits[1]
    return None if torch.equal(found, torch.arange(rows)) else found.argsort()
