"""Builds the arrays of a step for the CUDA kernels as one piece of memory, copied to the device at once.

Decode steps are padded to buckets of sequences and lanes, so that one CUDA graph serves all steps of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from server.engine.backends.cuda.device_model import DeviceStep
from server.engine.batch import Batch
from server.kernels.cuda.attention import QUERIES
from server.kernels.cuda.lora import LANES, Lanes
from server.kernels.lora import SlotWeights

Ints = npt.NDArray[np.int32]

LANE_BUCKETS = tuple(LANES * 4**i for i in range(6))
"""Buckets of lanes per tile (the summed ranks of its adapters)."""
ROW_LANE_BUCKETS = LANE_BUCKETS[:4]
"""Buckets for tiles of one row."""
DECODES_BESIDE_PREFILLS = 8
"""Decoded rows per tile in a step with prefills."""
MAX_REPEATED_LANES = 512
"""Lanes of all one-row tiles together up to which adapters may be read repeatedly. Not tuned yet."""


def batch_buckets(most: int) -> list[int]:
    """Buckets of sequences: powers of two to 16, then multiples of 8 up to `most`."""
    return [b for b in (1, 2, 4, 8, 16) if b < most] + list(range(24, most, 8)) + [most]


@dataclass(frozen=True)
class GraphShape:
    """Sizes of a step's arrays. Equal shapes have equal offsets in memory."""

    rows: int
    sequences: int
    blocks: int
    logits: int
    singles: int
    prefills: int
    tiles: int
    tile_rows: int
    width: int
    """Lanes per tile, 0 without adapters."""
    adapter_count: int

    def parts(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """(name, offset, shape) of each array."""
        sizes: dict[str, tuple[int, ...]] = {
            "tokens": (self.rows,),
            "positions": (self.rows,),
            "sequence": (self.rows,),
            "blocks": (self.sequences, self.blocks),
            "context": (self.sequences,),
            "single_rows": (self.singles,),
            "single_sequences": (self.singles,),
            "prefills": (self.prefills, 4),
            "logit_rows": (self.logits,),
            "tiles": (self.tiles, 4),
            "slot": (self.tiles * self.width,),
            "index": (self.tiles * self.width,),
            "adapter": (self.tiles * self.width,),
            "weights": (self.sequences, self.adapter_count),
        }
        start = 0
        for name, shape in sizes.items():
            yield name, start, shape
            start += -(-math.prod(shape) // 32) * 32  # arrays are aligned to 128 bytes

    @property
    def elements(self) -> int:
        *_, (_, start, shape) = self.parts()
        return max(start + math.prod(shape), 1)

    def bucket(self, batches: Sequence[int], blocks: int) -> GraphShape | None:
        """The bucket for this step; None unless all rows are decoded with logits and a bucket fits."""
        if not self.rows == self.sequences == self.singles == self.logits:
            return None
        size = next((b for b in batches if b >= self.rows), None)
        width = next((w for w in (0, *LANE_BUCKETS) if w >= self.width), None)
        if size is None or width is None or self.blocks > blocks:
            return None
        shape = GraphShape.single_rows(size, blocks, width, each=self.tile_rows == 1)
        return shape if self.adapter_count <= shape.adapter_count else None

    @classmethod
    def single_rows(cls, size: int, blocks: int, width: int, each: bool) -> GraphShape:
        """The bucket of `size` decoded rows with up to `width` lanes per tile; `each`: one row per tile."""
        rows = 1 if each else tile_rows(size)
        tiles = -(-size // rows)
        return cls(size, size, blocks, size, size, 0, tiles, rows, width, min(width * tiles, 16 * size))


@dataclass(frozen=True)
class DeviceBatch:
    """A step's arrays by the names of `GraphShape`, and its shape before padding."""

    shape: GraphShape
    arrays: dict[str, Ints | npt.NDArray[np.float32]]

    def write(self, shape: GraphShape, memory: Ints) -> None:
        """Write the arrays into `memory` in the layout of `shape`, padded with rows of position -1."""
        for name, start, size in shape.parts():
            target = memory[start : start + math.prod(size)].reshape(size)
            target.fill(-1 if name in ("tokens", "positions") else 0)
            if name in ("sequence", "single_rows", "single_sequences") and size != self.arrays[name].shape:
                target[:] = np.arange(size[0])
            source = self.arrays[name]
            if name in ("slot", "index", "adapter"):  # lanes of a tile begin at multiples of the width
                source, target = source.reshape(-1, max(self.shape.width, 1)), target.reshape(-1, max(shape.width, 1))
                if shape.width == 0:
                    continue
            if name == "weights":
                target = target.view(np.float32)
            target[tuple(slice(n) for n in source.shape)] = source
            if name == "tiles" and len(source):
                target[: len(source), 2] = np.arange(len(source)) * shape.width


def tile_rows(rows: int) -> int:
    """Rows per tile in a step with `rows` rows."""
    return 16 if rows <= 16 else 32 if rows <= 64 else 64


def build_batch(batch: Batch, ranks: Sequence[int]) -> DeviceBatch:
    """Build the arrays of a step. `ranks` is the largest rank of each slot's adapter."""
    starts, contexts = batch.row_start, batch.context
    counts = np.diff(starts)
    used = tuple((slot, ranks[slot]) for slot in sorted({slot for mix in batch.mixes for slot, _ in mix}))
    size, rows, table, weights = _lanes(batch.mixes, tuple(counts.tolist()), used)
    width = table.shape[2]
    singles = np.flatnonzero(counts == 1).astype(np.int32)
    prefills = [
        (s, starts[s] + i, min(QUERIES, counts[s] - i), contexts[s] - counts[s] + i)
        for s in np.flatnonzero(counts > 1)
        for i in range(0, counts[s], QUERIES)
    ]
    arrays: dict[str, Ints | npt.NDArray[np.float32]] = {
        "tokens": batch.tokens.astype(np.int32),
        "positions": batch.positions.astype(np.int32),
        "sequence": np.repeat(np.arange(batch.sequences, dtype=np.int32), counts),
        "blocks": np.maximum(batch.blocks, 0),
        "context": contexts,
        "single_rows": starts[singles],
        "single_sequences": singles,
        "prefills": np.array(prefills, np.int32).reshape(-1, 4),
        "logit_rows": batch.logit_rows.astype(np.int32),
        "tiles": rows,
        "slot": table[0].reshape(-1),
        "index": table[1].reshape(-1),
        "adapter": table[2].reshape(-1),
        "weights": weights,
    }
    shape = GraphShape(
        batch.rows, batch.sequences, batch.blocks.shape[1], len(batch.logit_rows), len(singles), len(prefills),
        len(rows), size, width, weights.shape[1],
    )  # fmt: skip
    return DeviceBatch(shape, arrays)


@lru_cache(maxsize=4)
def _lanes(
    mixes: tuple[SlotWeights, ...], counts: tuple[int, ...], ranks: tuple[tuple[int, int], ...]
) -> tuple[int, Ints, Ints, npt.NDArray[np.float32]]:
    """Tile rows, tiles [tiles, 4], lanes (slot, index, column) [3, tiles, width] and weights [S, columns].

    Cached, because successive steps mostly have the same mixes. `ranks` are (slot, rank), ascending.
    """
    size = 1 if _one_row_tiles(mixes, counts, ranks) else tile_rows(sum(counts))
    tiles = list(_tiles(counts, size))
    rank_of = dict(ranks)
    lanes = [
        [(slot, r) for slot in sorted({s for mix in mixes[a:b] for s, _ in mix}) for r in range(rank_of[slot])]
        for a, b, _, _ in tiles
    ]
    width = -(-max(map(len, lanes), default=0) // LANES) * LANES
    adapter_index = {slot: index for index, (slot, _) in enumerate(ranks)}
    table = np.zeros((3, len(tiles), width), np.int32)
    for t, pairs in enumerate(lanes):
        if pairs:
            table[0, t, : len(pairs)], table[1, t, : len(pairs)] = zip(*pairs, strict=True)
            table[2, t, : len(pairs)] = [adapter_index[slot] for slot, _ in pairs]
    weights = np.zeros((len(mixes), len(ranks) if width else 0), np.float32)
    if width:
        for s, mix in enumerate(mixes):
            for slot, weight in mix:
                weights[s, adapter_index[slot]] += weight
    rows = [(row, n, t * width, len(lanes[t])) for t, (_, _, row, n) in enumerate(tiles)]
    return size, np.array(rows, np.int32).reshape(-1, 4), table, weights


def _one_row_tiles(mixes: tuple[SlotWeights, ...], counts: tuple[int, ...], ranks: tuple[tuple[int, int], ...]) -> bool:
    """Whether tiles have one row: if all rows are decoded and adapters are few, small or not shared."""
    rank_of = dict(ranks)
    own = [sum(rank_of[slot] for slot in {slot for slot, _ in mix}) for mix in mixes]
    few = sum(own) <= max(MAX_REPEATED_LANES, 2 * sum(rank_of.values()))
    return max(counts, default=0) == 1 and 0 < max(own) <= ROW_LANE_BUCKETS[-1] and few


def device_step(shape: GraphShape, memory: torch.Tensor) -> DeviceStep:
    """Views of a step's arrays in the int32 memory that `DeviceBatch.write` filled."""
    parts = {
        name: memory[start : start + math.prod(size)].view(size) if math.prod(size) else memory[:0].view(size)
        for name, start, size in shape.parts()
    }
    lanes = Lanes(
        parts["tiles"],
        parts["slot"],
        parts["index"],
        parts["adapter"],
        parts["sequence"],
        parts["weights"].view(torch.float32),
        shape.width,
        shape.tile_rows,
    )
    return DeviceStep(
        parts["tokens"],
        parts["positions"],
        parts["sequence"],
        parts["blocks"],
        parts["context"],
        (parts["single_rows"], parts["single_sequences"]) if shape.singles else None,
        parts["prefills"] if shape.prefills else None,
        parts["logit_rows"],
        lanes,
        shape.width > 0,
    )


def _tiles(counts: Sequence[int], size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first sequence, last + 1, first row, rows) of each tile. Few decoded rows share a tile beside prefills."""
    together = size if max(counts, default=1) == 1 else min(size, DECODES_BESIDE_PREFILLS)
    s = row = 0
    while s < len(counts):
        if counts[s] != 1:
            for i in range(0, counts[s], size):
                yield s, s + 1, row + i, min(size, counts[s] - i)
            row += counts[s]
            s += 1
            continue
        end = s
        while end < len(counts) and counts[end] == 1 and end - s < together:
            end += 1
        yield s, end, row, end - s
        row += end - s
        s = end
