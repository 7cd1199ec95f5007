"""`Trainable`: a loaded base as the `Model` of `adapters.training`: a second tree over the same weights.

Owns how sequences go through the decoder with gradients: one after the other without padding, and what all of them
begin with only once. The tree that serves, if there is one, is another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adapters import layers, memory
from adapters.data import Tokens
from adapters.layers import LoraSpec
from adapters.training import evaluate_loss
from adapters.weights import LoraWeights
from server.jobs import prefix_attention
from server.jobs.again import made_again
from server.jobs.loan import device_of
from server.jobs.prefix_attention import PrefixAttention
from server.kernels import Backend, processor
from server.kernels.aten import Aten
from server.kernels.weight import STORED, Weight
from server.model.attention import Context
from server.model.decoder import Decoder, Layer, Rotary, swiglu
from server.model.loader import Base

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
        decoder.model.layers = nn.ModuleList(_Frugal(base, i, dtype) for i in range(base.config.num_hidden_layers))
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
        memory.trim()  # of what dequantizing has left in pieces
        self._share_prefix = share_prefix
        self._embed, self._logits = decoder.embed, decoder.logits

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """int64 [T] of sequences one after the other -> their last states, float32 [T, hidden].

        What all sequences begin with is computed once: its states are the same in each, since the decoder is causal,
        and so is their gradient's sum.
        """
        shared = shared_prefix(ids, lengths) if self._share_prefix else 0
        if max(lengths) - shared > prefix_attention.SHORT:
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


class _Frugal(Layer):
    """A layer that keeps for the way back what its products make and the stream alone: norms, attention and SwiGLU cost
    little beside these, and are computed once more there. The same values, in less than half of the memory.
    """

    def forward(self, stream: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        with made_again(self.input_layernorm, stream) as normed:
            heads = attention.projected(normed, rotary, context)
        with made_again(partial(context.attention.attend, attention.layer), *heads) as seen:
            stream = stream + attention.o_proj(seen, context)
        with made_again(self.post_attention_layernorm, stream) as normed:
            gate, up = mlp.gate_proj(normed, context), mlp.up_proj(normed, context)
        with made_again(swiglu, gate, up) as hidden:
            return stream + mlp.down_proj(hidden, context)  # type: ignore[no-any-return]


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
