"""Torch's own CPU kernels: bf16 activations, the 4-bit product for int4, blocks of dequantized rows for the rest.

Owns the layout `int4pack` and the choice between products. What serves where the native kernels cannot be built.

`aten::_weight_int4pack_mm_for_cpu` wants scales and offsets in bf16: they are rounded when a matrix is packed, and
`dequantize` gives what is left after that rounding. Everything else is exact.
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
from server.kernels.lora import Segments, slow_in, times
from server.kernels.packed_format import TILE, dequantize_stored, group_values, unpack_nibbles
from server.kernels.recompress import recompress
from server.kernels.reference import prepared, stored_rows
from server.kernels.weight import STORED, Weight

INT4PACK = "int4pack-2"
GROUPS = (32, 64, 128, 256)
"""Group sizes that torch's 4-bit product takes."""
PACKED_ROWS = 96
"""Rows of x up to which the 4-bit product is faster than dequantizing blocks and multiplying these, in bf16 or, where
that is slow, in float32 (measured with AVX-512 and with AVX2)."""
PLAIN_ROWS = 3
"""The same where torch's 4-bit product is a plain loop for each row, as it has vector instructions for AVX2 and AVX-512
alone (measured)."""
BLOCK_BYTES = 2**22
"""Bytes of dequantized weights, in float32, at a time: larger ones leave the cache, smaller ones cost more calls."""


class Work(threading.local):
    """Memory for blocks of weights that is used again, by each thread its own.

    A fresh tensor of megabytes is fresh pages, and their faults take three times as long as a table's product.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor of that shape with anything in it, valid until the next call for the same name and dtype."""
        size, buffer = math.prod(shape), self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


def layout() -> str:
    """The layout of matrices with all that it goes by, so that what another machine or another torch has packed is not
    taken for one's own."""
    torch_version = ".".join(torch.__version__.split(".")[:2])
    return f"{INT4PACK}-{_capability().lower()}-{_tile_rows()}-{platform.machine().lower()}-torch{torch_version}"


class Aten:
    """The backend of torch's own ops. Adapters are bf16."""

    name = "aten"
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.layout = layout()
        self._work = Work()

    def pack(self, stored: Weight) -> Weight:
        out, width = stored.shape
        if stored.scheme != "int4" or stored.group not in GROUPS or out % 16 or width % stored.group:
            return stored
        codes = unpack_nibbles(stored.tensors["codes"]).int()
        tensors = {"codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 8)}
        del codes
        if stored.double_quantized:
            # Kept as small as they are stored, groups before rows, and widened at each use.
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
            return self._added(weight, x, update)
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
        # Turned once: a few thousand numbers of a block would be turned by one thread. A copy even of one row.
        return products.t().clone(memory_format=torch.contiguous_format)

    def _added(self, weight: Weight, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """`linear` with an update: torch's 4-bit product, which rounds to bf16 by itself, is left aside."""
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
            site = run.site(path)
            if site is not None:
                rows = y[run.start : run.stop]
                rows.copy_(times(run.shrunk(site.shrink, x)[:, site.columns], site.B, to=rows))
        for segment in segments.long:
            for slot, weight in segment.mix:
                update = segments.table[slot].modules.get(path)
                if update is None:
                    continue
                rows, into = y[segment.start : segment.stop], x[segment.start : segment.stop]
                if slow_in(x.dtype):
                    v = into.float() @ update.A.float().t()
                    rows.copy_(rows.float().addmm_(v, update.B.float().t(), alpha=weight * update.scale))
                else:
                    v = into @ update.A.t()
                    rows.addmm_(v, update.B.t(), alpha=weight * update.scale)


def _capability() -> str:
    """The instructions that torch's own kernels were compiled for, of those that are here."""
    return torch.backends.cpu.get_cpu_capability()


def _packed_rows() -> int:
    return PACKED_ROWS if _capability() in ("AVX2", "AVX512") else PLAIN_ROWS


def _rows_times(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """rows x^T [n, T] of float32 or bf16 rows [n, in]: by oneDNN where torch has it, whatever the dtype.

    For float32, `torch.mm` goes to MKL, which takes twice as long at a few rows of x: 5.5 ms instead of 2.9 for a
    table of 49,152 rows and 16 of x, in blocks.
    """
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        products: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, x, None, "none", [], "")
        return products
    return torch.mm(rows, x.t())


def _scales(weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """bf16 [in/group, rows, 2]: scale and offset as torch has them, w = (code - 8) * scale + offset.

    Of rows `start`, a multiple of 16, to `stop`.
    """
    stop = weight.shape[0] if stop is None else stop
    if "scales" in weight.tensors:
        return weight.tensors["scales"][:, start:stop]
    if weight.layout == STORED:
        scale, zero = (group_values(weight.tensors, name, start, stop).t() for name in ("scale", "zero"))
    else:
        scale, zero = (_widened(weight, name, start, stop) for name in ("scale", "zero"))
    both = torch.empty((*scale.shape, 2), dtype=torch.bfloat16)
    both[..., 0] = scale
    both[..., 1] = zero.float().add_(scale, alpha=8)
    return both


def _widened(weight: Weight, name: str, start: int, stop: int) -> torch.Tensor:
    """Double-quantized scales or zeros of rows of the layout `int4pack` as float16 [in/group, stop - start]."""
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
    """Ranges of rows whose dequantized form is about BLOCK_BYTES. They start at tiles."""
    out, width = weight.shape
    step = max(64, BLOCK_BYTES // (4 * width) // 64 * 64)
    for start in range(0, out, step):
        yield start, min(start + step, out)


def _columns(weight: Weight, start: int, stop: int, dtype: torch.dtype, work: Work) -> torch.Tensor:
    """Rows `start` to `stop` of the layout `int4pack`, transposed: [in, stop - start], in `work`'s memory.

    `start` is a multiple of the tile. Each value is rounded to `dtype` once; in float32 it is exact.
    """
    tile = _tile_rows()
    out = work("columns", dtype, weight.shape[1], stop - start)
    whole = (stop - start) // tile * tile
    if whole:
        _tiles(out[:, :whole], weight, start, tile, work)
    if start + whole < stop:  # torch packs what is left in one narrower tile
        last = min(start + whole + tile, weight.shape[0]) - start - whole
        narrow = work("narrow", dtype, weight.shape[1], last)
        _tiles(narrow, weight, start + whole, last, work)
        out[:, whole:] = narrow[:, : stop - start - whole]
    return out


def _tiles(out: torch.Tensor, weight: Weight, start: int, tile: int, work: Work) -> None:
    """Write rows from `start` on, which are packed in tiles of `tile` rows, to the columns of `out` [in, rows]."""
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
    """Rows that torch packs together: 64 with AVX-512, 32 with AVX2. Found by packing one code."""
    probe = torch.zeros(256, 32, dtype=torch.int32)
    probe[0, 1] = 1
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 8).view(-1)
    return 2 * int(packed.nonzero()[0])


@lru_cache
def _tile_order(rows: int) -> torch.Tensor | None:
    """Where each of a tile's rows is among its low nibbles followed by its high ones; None where they are in order.

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
