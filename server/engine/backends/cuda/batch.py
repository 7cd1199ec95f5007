"""A step's numbers for the CUDA kernels: built on the CPU as one piece of memory that goes to the device in one copy.

Owns the tiles, the lanes and the buckets. A step in which every sequence has one row and wants its logits is padded
to a bucket of sequences and of lanes, so that one CUDA graph runs all steps of a bucket.
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

WIDTHS = tuple(LANES * 4**i for i in range(6))
"""Buckets of a tile's lanes: the summed ranks of its adapters."""
ROW_WIDTHS = WIDTHS[:4]
"""Those of tiles of one row."""
BESIDE_PROMPTS = 8
"""Rows that decode in one tile, in a step that reads prompts too."""
OWN_LANES = 512
"""Lanes that rows may have of their own, all together, before it counts that some are the same. Not measured yet."""


def batch_buckets(most: int) -> list[int]:
    """The buckets of sequences: powers of two to 16, then every eighth up to `most`."""
    return [b for b in (1, 2, 4, 8, 16) if b < most] + list(range(24, most, 8)) + [most]


@dataclass(frozen=True)
class GraphShape:
    """Sizes of a step's arrays. Equal shapes have equal addresses within one piece of memory."""

    rows: int
    sequences: int
    blocks: int
    logits: int
    singles: int
    prefills: int
    tiles: int
    tile_rows: int
    width: int
    """Lanes of a tile, 0 if the step has no adapters."""
    places: int

    def parts(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """(name, first element, shape) of every array."""
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
            "place": (self.tiles * self.width,),
            "weights": (self.sequences, self.places),
        }
        start = 0
        for name, shape in sizes.items():
            yield name, start, shape
            start += -(-math.prod(shape) // 32) * 32  # every array begins at a whole line of 128 bytes

    @property
    def elements(self) -> int:
        *_, (_, start, shape) = self.parts()
        return max(start + math.prod(shape), 1)

    def bucket(self, batches: Sequence[int], blocks: int) -> GraphShape | None:
        """The shape of the bucket that this step fits in; None if it is no step of single rows or fits in none."""
        if not self.rows == self.sequences == self.singles == self.logits:
            return None
        size = next((b for b in batches if b >= self.rows), None)
        width = next((w for w in (0, *WIDTHS) if w >= self.width), None)
        if size is None or width is None or self.blocks > blocks:
            return None
        shape = GraphShape.single_rows(size, blocks, width, each=self.tile_rows == 1)
        return shape if self.places <= shape.places else None

    @classmethod
    def single_rows(cls, size: int, blocks: int, width: int, each: bool) -> GraphShape:
        """The bucket of `size` single rows with tiles of up to `width` lanes, `each` row a tile by itself or not."""
        rows = 1 if each else tile_rows(size)
        tiles = -(-size // rows)
        return cls(size, size, blocks, size, size, 0, tiles, rows, width, min(width * tiles, 16 * size))


@dataclass(frozen=True)
class DeviceBatch:
    """A step's arrays at their true sizes, by the names of `GraphShape`, and that shape."""

    shape: GraphShape
    arrays: dict[str, Ints | npt.NDArray[np.float32]]

    def write(self, shape: GraphShape, memory: Ints) -> None:
        """Put the arrays into `memory` as `shape` lays them out, padded with rows and sequences that are not there."""
        for name, start, size in shape.parts():
            target = memory[start : start + math.prod(size)].reshape(size)
            target.fill(-1 if name in ("tokens", "positions") else 0)
            if name in ("sequence", "single_rows", "single_sequences") and size != self.arrays[name].shape:
                target[:] = np.arange(size[0])
            source = self.arrays[name]
            if name in ("slot", "index", "place"):  # each tile's lanes begin at a multiple of the width
                source, target = source.reshape(-1, max(self.shape.width, 1)), target.reshape(-1, max(shape.width, 1))
                if shape.width == 0:
                    continue
            if name == "weights":
                target = target.view(np.float32)
            target[tuple(slice(n) for n in source.shape)] = source
            if name == "tiles" and len(source):
                target[: len(source), 2] = np.arange(len(source)) * shape.width


def tile_rows(rows: int) -> int:
    """Rows of a tile in a step with so many, where tiles have more than one."""
    return 16 if rows <= 16 else 32 if rows <= 64 else 64


def describe(batch: Batch, ranks: Sequence[int]) -> DeviceBatch:
    """The numbers of a step. `ranks` is the largest rank of each slot's adapter."""
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
        "place": table[2].reshape(-1),
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
    """The rows of a tile, the tiles [tiles, 4], their lanes' (slot, index, place) [3, tiles, width], and the weights
    [S, places].

    Most steps have the mixes of the one before. `ranks` are (slot, rank), ascending.
    """
    size = 1 if _each_by_itself(mixes, counts, ranks) else tile_rows(sum(counts))
    tiles = list(_tiles(counts, size))
    rank_of = dict(ranks)
    lanes = [
        [(slot, r) for slot in sorted({s for mix in mixes[a:b] for s, _ in mix}) for r in range(rank_of[slot])]
        for a, b, _, _ in tiles
    ]
    width = -(-max(map(len, lanes), default=0) // LANES) * LANES
    place_of = {slot: place for place, (slot, _) in enumerate(ranks)}
    table = np.zeros((3, len(tiles), width), np.int32)
    for t, pairs in enumerate(lanes):
        if pairs:
            table[0, t, : len(pairs)], table[1, t, : len(pairs)] = zip(*pairs, strict=True)
            table[2, t, : len(pairs)] = [place_of[slot] for slot, _ in pairs]
    weights = np.zeros((len(mixes), len(ranks) if width else 0), np.float32)
    if width:
        for s, mix in enumerate(mixes):
            for slot, weight in mix:
                weights[s, place_of[slot]] += weight
    rows = [(row, n, t * width, len(lanes[t])) for t, (_, _, row, n) in enumerate(tiles)]
    return size, np.array(rows, np.int32).reshape(-1, 4), table, weights


def _each_by_itself(
    mixes: tuple[SlotWeights, ...], counts: tuple[int, ...], ranks: tuple[tuple[int, int], ...]
) -> bool:
    """Whether each row is to be a tile: if rows are single, and few adapters, or small ones, are used by several."""
    rank_of = dict(ranks)
    own = [sum(rank_of[slot] for slot in {slot for slot, _ in mix}) for mix in mixes]
    few = sum(own) <= max(OWN_LANES, 2 * sum(rank_of.values()))
    return max(counts, default=0) == 1 and 0 < max(own) <= ROW_WIDTHS[-1] and few


def on_device(shape: GraphShape, memory: torch.Tensor) -> DeviceStep:
    """The views of a step's numbers in the int32 memory that `DeviceBatch.write` filled, wherever it has been
    copied."""
    parts = {
        name: memory[start : start + math.prod(size)].view(size) if math.prod(size) else memory[:0].view(size)
        for name, start, size in shape.parts()
    }
    lanes = Lanes(
        parts["tiles"],
        parts["slot"],
        parts["index"],
        parts["place"],
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
    """(first sequence, last + 1, first row, rows) of each tile: neighbours of one row share it, beside prompts few of
    them, as each goes through the lanes of all."""
    together = size if max(counts, default=1) == 1 else min(size, BESIDE_PROMPTS)
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
