"""The context of a decoder step, and attention over paged KV blocks (serving) or packed sequences (training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F

from server.kernels.lora import Segments


class Attention(Protocol):
    """Causal attention of a step's tokens, each within its own sequence."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend, and store k and v in the KV cache if there is one.

        Args:
            q: Queries after RoPE, [T, heads, d]; k and v: [T, kv_heads, d].

        Returns:
            [T, heads * d].
        """


@dataclass(frozen=True)
class Context:
    """A step: positions int64 [T], the attention over its sequences, and the adapters of its tokens (serving)."""

    positions: torch.Tensor
    attention: Attention
    segments: Segments | None = None


def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """Grouped-query attention of one sequence: q [n, heads, d], k and v [c, kv_heads, d] -> [n, heads * d].

    KV heads are the batch dimension, so that the query heads of a group share keys without a copy.
    """
    n, heads, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    queries = q.view(n, kv_heads, group, d).permute(1, 2, 0, 3)
    keys = k.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)
    values = v.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
    return out.permute(2, 0, 1, 3).reshape(n, heads * d)


class PackedAttention:
    """Attention over concatenated sequences without padding or KV cache, for training.

    Args:
        lengths: Lengths of the sequences, in the order of the tokens; their sum is T.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T]; each sequence starts at 0."""
        return torch.cat([torch.arange(n) for n in self.lengths])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ends = list(accumulate(self.lengths))
        spans = [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]
        return torch.cat([grouped_attention(q[rows], k[rows], v[rows], causal=True) for rows in spans])


@dataclass(frozen=True)
class _Prefill:
    """A sequence with several new tokens. `mask` is [n, c], or None if the causal mask suffices."""

    rows: slice
    blocks: torch.Tensor
    context: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Decode:
    """S sequences of similar lengths with one new token each: rows [S], blocks [S * B], mask [S, 1, 1, c]."""

    rows: torch.Tensor | slice
    blocks: torch.Tensor
    mask: torch.Tensor


class PagedAttention:
    """Attention over a paged KV cache, for prefill chunks and single tokens in the same step. No gradients.

    A block is zeroed when its first token is written, so that stale values (even NaN) are never multiplied.

    Args:
        storage: [layers, blocks + 1, block_size, 2, kv_heads, d]. The last block stays zero and pads shorter sequences.
        positions: int64 [T].
        row_start: First token of each sequence in the step, and T at the end: [S + 1].
        context: Length of each sequence including its new tokens: [S].
        blocks: Block table [S, B]; -1 is unused.
    """

    def __init__(
        self,
        storage: torch.Tensor,
        positions: torch.Tensor,
        row_start: torch.Tensor,
        context: torch.Tensor,
        blocks: torch.Tensor,
    ) -> None:
        self._storage = storage
        size = storage.shape[2]
        starts, contexts = row_start.tolist(), context.tolist()
        sequence = torch.repeat_interleave(torch.arange(len(contexts)), row_start.diff().long())
        owned = blocks.long()[sequence, positions // size]
        offsets = positions % size
        self._rows = owned * size + offsets
        begun = owned[offsets == 0]
        if len(begun):
            storage.index_fill_(1, begun, 0)
        table = torch.where(blocks < 0, storage.shape[1] - 1, blocks).long()
        self._prefills: list[_Prefill] = []
        by_length: dict[int, list[int]] = {}
        for s, length in enumerate(contexts):
            n = starts[s + 1] - starts[s]
            used = -(-length // size)
            if n == 1:
                by_length.setdefault((used - 1).bit_length(), []).append(s)
            elif n > 1:
                self._prefills.append(
                    self._prefill(slice(starts[s], starts[s + 1]), table[s, :used], length, storage.dtype)
                )
        self._decodes = [self._decode(members, starts, contexts, table, size) for members in by_length.values()]

    @staticmethod
    def _prefill(rows: slice, blocks: torch.Tensor, length: int, dtype: torch.dtype) -> _Prefill:
        n = rows.stop - rows.start
        if n == length:
            return _Prefill(rows, blocks, length, None)
        ahead = torch.arange(length) > torch.arange(length - n, length)[:, None]
        return _Prefill(rows, blocks, length, torch.zeros(n, length, dtype=dtype).masked_fill_(ahead, float("-inf")))

    def _decode(
        self, members: list[int], starts: list[int], contexts: list[int], table: torch.Tensor, size: int
    ) -> _Decode:
        lengths = torch.tensor([contexts[s] for s in members])
        width = -(-int(lengths.max()) // size)
        first, last = starts[members[0]], starts[members[-1]] + 1
        rows: torch.Tensor | slice = slice(first, last)
        if last - first != len(members):
            rows = torch.tensor([starts[s] for s in members])
        mask = torch.zeros(len(members), 1, 1, width * size, dtype=self._storage.dtype)
        mask.masked_fill_((torch.arange(width * size) >= lengths[:, None])[:, None, None], float("-inf"))
        return _Decode(rows, table[members, :width].flatten(), mask)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = self._storage[layer]
        cache.view(-1, 2, *k.shape[1:]).index_copy_(0, self._rows, torch.stack((k, v), 1))
        heads, d = q.shape[1:]
        kv_heads = k.shape[1]
        out = torch.empty(q.shape[0], heads * d, dtype=q.dtype)
        for p in self._prefills:
            if p.mask is None:
                keys, values = k[p.rows], v[p.rows]
            else:
                keys, values = cache.index_select(0, p.blocks).flatten(0, 1)[: p.context].unbind(1)
            out[p.rows] = grouped_attention(q[p.rows], keys, values, mask=p.mask, causal=p.mask is None)
        for g in self._decodes:
            count = g.mask.shape[0]
            held = cache.index_select(0, g.blocks).view(count, -1, 2, kv_heads, d).permute(2, 0, 3, 1, 4)
            queries = q[g.rows].view(count, kv_heads, heads // kv_heads, d)
            seen = F.scaled_dot_product_attention(queries, held[0], held[1], attn_mask=g.mask)
            out[g.rows] = seen.view(count, heads * d)
        return out
