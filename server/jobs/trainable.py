"""`Trainable`: a loaded base as the `Model` of `adapters.training`: a second tree over the same weights.

Owns how sequences go through the decoder with gradients: one after the other without padding, and what all of them
begin with only once. The tree that serves, if there is one, is another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adapters import layers
from adapters.data import Tokens
from adapters.layers import LoraSpec
from adapters.training import evaluate_loss
from adapters.weights import LoraWeights
from server.jobs.loan import device_of
from server.kernels import Backend, processor
from server.kernels.aten import Aten
from server.kernels.weight import STORED, Weight
from server.model.attention import Context, PackedAttention, grouped_attention
from server.model.decoder import Decoder
from server.model.loader import Base

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHORT = 160
"""Own tokens of a sequence up to which it is attended to in one call with others, whose scores are kept for the way
back; longer ones go through the fused kernel one by one, which keeps no scores."""
PADDING = 1.5
"""Rows that sequences in one call may have, padded, over their own: more cost more than a further call."""
KEPT_VALUES = 256 << 20
"""A base whose linears have no more than this keeps them dequantized while it trains: in 512 MiB of bfloat16."""


class Trainable:
    """A decoder for training over `base`. `compute_dtype` is that of the products ("auto": bfloat16 where the device
    multiplies in it, else float32, which takes a third of the time there); the stream they add to is float32.

    The linears of a small base are dequantized once and kept (`kept` values at most, in the compute dtype), and where
    these leave room in as much bfloat16, the output table; those of a larger one multiply as they serve and are
    dequantized for each step back, so that the codes alone are resident.
    """

    def __init__(
        self, base: Base, compute_dtype: str = "auto", kept: int = KEPT_VALUES, share_prefix: bool = True
    ) -> None:
        dtype = DTYPES.get(compute_dtype) or fastest_on(device_of(base))
        decoder = Decoder(base, dtype)
        self.tree: nn.Module = decoder
        self.blocks: Sequence[nn.Module] = list(decoder.model.layers)
        self.metadata: Mapping[str, Any] = {
            "base": base.name,
            "quantization": {**base.quantization, "base_id": base.id, "kernels": base.backend.name},
            "compute_dtype": NAMES[dtype],
        }
        self.nbytes = base.nbytes
        paths = list(base.shapes())
        if sum(map(math.prod, base.shapes().values())) <= kept:
            for path in paths:
                parent, _, last = path.rpartition(".")
                dense = _Dense(base.weights[path], base.tensors.get(f"{path}.bias"), base.backend, dtype)
                setattr(decoder.get_submodule(parent), last, dense)
                self.nbytes += dense.weight.nbytes
        head = decoder.lm_head
        left = kept - sum(m.weight.numel() for m in decoder.modules() if isinstance(m, _Dense))
        # The stored layout stays exact; kernels that quantize activations would do so to what the loss comes from.
        head_dtype = torch.float32 if head.weight.layout == STORED else dtype
        if math.prod(head.weight.shape) * head_dtype.itemsize <= left * torch.bfloat16.itemsize:
            dense = _Head(head.weight, head.bias, base.backend, head_dtype)
            decoder.lm_head = dense  # type: ignore[assignment]
            self.nbytes += dense.weight.nbytes
        elif head.weight.layout == STORED:
            # The same values, dequantized block by block: the whole table in float32 would be most of the memory.
            head.backend = Aten()
        self._share_prefix = share_prefix
        self._embed, self._logits = decoder.embed, decoder.logits

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """int64 [T] of sequences one after the other -> their last states, float32 [T, hidden].

        What all sequences begin with is computed once: its states are the same in each, since the decoder is causal,
        and so is their gradient's sum.
        """
        shared = shared_prefix(ids, lengths) if self._share_prefix else 0
        if max(lengths) - shared > SHORT:
            shared = 0  # the fused kernel takes whole sequences
        own = [length - shared for length in lengths]
        more = filling(shared + sum(own))
        tails = PrefixAttention(shared, [*own, more] if more else own)
        if not shared:
            states: torch.Tensor = self.tree(self._embed(F.pad(ids, (0, more))), Context(tails.positions, tails))
            return states[: len(ids)]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        rest = torch.cat([torch.arange(s + shared, e) for s, e in zip(starts, starts[1:], strict=False)])
        once = F.pad(torch.cat((ids[:shared], ids[rest])), (0, more))
        computed = self.tree(self._embed(once), Context(tails.positions, tails))
        # Rows of the whole sequences, taken from the computed ones: the prefix's again and again.
        rows = torch.arange(shared).repeat(len(lengths), 1)
        place = shared
        parts = []
        for row, length in zip(rows, lengths, strict=True):
            parts += [row, torch.arange(place, place + length - shared)]
            place += length - shared
        return computed.index_select(0, torch.cat(parts))  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [L, hidden] -> float32 [L, vocab]."""
        return self._logits(hidden)


def fastest_on(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for products in it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = processor.multiplies_bf16()
    return torch.bfloat16 if has else torch.float32


def filling(rows: int) -> int:
    """How many rows are computed for nothing beside `rows`, as a sequence of their own: up to 15, or an eighth.

    oneDNN makes and keeps kernels for every number of rows that it meets, 8 to 16 MB in all, so it is shown few.
    """
    step = 1 << max(4, (rows - 1).bit_length() - 4)
    return -rows % step


def shared_prefix(ids: torch.Tensor, lengths: Sequence[int]) -> int:
    """How many tokens all of several sequences begin with; each keeps at least one of its own. 0 for a single one."""
    if len(lengths) < 2:
        return 0
    parts = torch.split(ids, list(lengths))
    least = min(lengths) - 1
    heads = torch.stack([part[:least] for part in parts])
    differ = (heads != heads[0]).any(0).nonzero()
    return int(differ[0]) if len(differ) else least


class PrefixAttention:
    """Causal attention of sequences that share their first tokens: rows are the prefix, then each one's own tail.

    Tails of like length that follow each other are attended to in one call. One of over `SHORT` tokens is alone, and
    goes through the fused kernel where there is no prefix.
    """

    def __init__(self, shared: int, tails: Sequence[int]) -> None:
        self.positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + n) for n in tails)])
        groups = alike(tails)
        self._sizes = [shared, *map(sum, groups)]
        self._groups: list[PackedAttention | _Tails] = [
            PackedAttention(group) if not shared and group[0] > SHORT else _Tails(shared, group) for group in groups
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `server.model.attention.Attention`."""
        (first_q, first_k, first_v), *rest = zip(*(x.split_with_sizes(self._sizes) for x in (q, k, v)), strict=True)
        parts = [grouped_attention(first_q, first_k, first_v, causal=True)] if self._sizes[0] else []
        for group, (own_q, own_k, own_v) in zip(self._groups, rest, strict=True):
            if isinstance(group, PackedAttention):
                parts.append(group.attend(layer, own_q, own_k, own_v))
            else:
                parts.append(group.attend(own_q, own_k, own_v, first_k, first_v))
        return torch.cat(parts)


def alike(tails: Sequence[int]) -> list[list[int]]:
    """Lengths in runs that lose little by being padded to their longest; one over `SHORT` is alone."""
    groups: list[list[int]] = []
    for length in tails:
        last = [*groups[-1], length] if groups else []
        if last and max(last) <= SHORT and max(last) * len(last) <= PADDING * sum(last):
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


class _Tails:
    """Tails that are attended to in one call, padded to the longest, which costs scores and nothing else."""

    def __init__(self, shared: int, tails: Sequence[int]) -> None:
        count, width = len(tails), max(tails)
        lengths = torch.tensor(tails)[:, None]
        column = torch.arange(width)
        self._real = (column < lengths).flatten().nonzero().flatten()
        first = lengths.cumsum(0) - lengths
        # Where each place of the padded tails is among the rows; what is behind a tail's end reads its first row.
        self._rows = (first + torch.where(column < lengths, column, 0)).flatten()
        seen = column[None, :] <= column[:, None]
        mask = torch.zeros(width, shared + width)
        mask[:, shared:].masked_fill_(~seen, float("-inf"))
        self._size, self._mask = (count, width), mask

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_k: torch.Tensor, first_v: torch.Tensor
    ) -> torch.Tensor:
        """q [T, heads, d] of the tails, k and v [T, kv_heads, d], those of the prefix [shared, kv_heads, d]."""
        count, width = self._size
        heads, d = q.shape[1:]
        kv_heads = k.shape[1]
        group = heads // kv_heads

        def padded(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            """[T, kv_heads, d] -> [count * kv_heads, shared + width, d]: the prefix before each tail."""
            tail = _Padded.apply(x, self._rows, self._real).view(count, width, kv_heads, d)  # type: ignore[no-untyped-call]
            whole = torch.cat((first.expand(count, -1, -1, -1), tail), 1)
            return whole.transpose(1, 2).flatten(0, 1)

        queries: torch.Tensor = _Padded.apply(q, self._rows, self._real)  # type: ignore[no-untyped-call]
        queries = queries.view(count, width, kv_heads, group, d).permute(0, 2, 3, 1, 4)
        # Plain products: for many short sequences these are several times faster, both ways, than the fused kernel.
        scores = torch.bmm(queries.reshape(count * kv_heads, group * width, d), padded(k, first_k).mT)
        scores = scores.view(count * kv_heads, group, width, -1).mul(d**-0.5) + self._mask.to(q.dtype)
        seen = torch.bmm(scores.softmax(-1).flatten(1, 2), padded(v, first_v)).view(count, kv_heads, group, width, d)
        tails: torch.Tensor = _Unpadded.apply(seen.permute(0, 3, 1, 2, 4).reshape(count * width, heads * d), self._real)  # type: ignore[no-untyped-call]
        return tails


class _Padded(torch.autograd.Function):
    """`x[rows]`: the tails, padded. What pads is seen by nobody and has no gradient, so that no sum is needed back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        ctx.real = real
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0].index_select(0, ctx.real), None, None


class _Unpadded(torch.autograd.Function):
    """`x[real]`, each row of which is taken once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        ctx.real, ctx.rows = real, len(x)
        return x.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0]
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, ctx.real, grad), None


class _Dense(nn.Linear):
    """A linear of the base in the compute dtype, frozen: exactly the dequantized codes, rounded once.

    Full fine-tuning, which is there for comparison, makes the weight a float32 one; the product stays in x's dtype.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None, backend: Backend, dtype: torch.dtype) -> None:
        out, into = weight.shape
        super().__init__(into, out, bias=False, device="meta", dtype=dtype)
        self.weight = nn.Parameter(backend.dequantize(weight).to(dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class _Head(_Dense):
    """The output table: the states that it is given are float32, and the product is in the table's dtype."""

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def loss_of(model: Trainable, weights: LoraWeights, examples: Tokens) -> float:
    """Mean nats a learned token that `weights` have on `examples`."""
    every = dict.fromkeys(layers.linears(model.tree), 0) | {path: m.rank for path, m in weights.modules.items()}
    found = layers.inject(model.tree, LoraSpec(rank=max(weights.ranks), rank_of=every))
    try:
        layers.load(found, weights)
        return evaluate_loss(model, examples)[0]
    finally:
        layers.eject(model.tree)
