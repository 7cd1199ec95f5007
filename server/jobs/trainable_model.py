"""`TrainableModel`: a loaded base as the `Model` of `adapters.training`: a second tree over the same weights.

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

from adapters import layers, memory
from adapters.data import Tokens
from adapters.layers import LoraSpec
from adapters.training import evaluate_loss
from adapters.weights import LoraWeights
from server.jobs import prefix_attention
from server.jobs.checkpointed_layers import Asked, checkpointed_layers
from server.jobs.gpu_share import device_of
from server.jobs.prefix_attention import PrefixAttention
from server.kernels import Backend, cpu_info
from server.kernels.torch_ops import TorchOps
from server.kernels.weight import STORED, Weight
from server.model.attention import Context
from server.model.decoder import Decoder
from server.model.loader import Base

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
KEPT_VALUES = 256 << 20
"""A base whose linears have no more than this keeps them dequantized while it trains: in 512 MiB of bfloat16."""


class TrainableModel:
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
        decoder.model.layers = checkpointed_layers(base, dtype)
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
            head.backend = TorchOps()
        memory.trim()  # of what dequantizing has left in pieces
        self._share_prefix = share_prefix
        self._filling = filling if dtype == torch.bfloat16 else few_odd_rows
        self._embed, self._logits = decoder.embed, decoder.logits

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int], rows: torch.Tensor | None = None) -> torch.Tensor:
        """int64 [T] of sequences one after the other -> their last states, float32 [T, hidden], or those of `rows`.

        What all sequences begin with is computed once: its states are the same in each, since the decoder is causal,
        and so is their gradient's sum. What only the last states of rows that nobody asks for need is not computed.
        """
        shared = shared_prefix(ids, lengths) if self._share_prefix else 0
        if max(lengths) - shared > prefix_attention.SHORT:
            shared = 0  # the fused kernel takes whole sequences
        own = [length - shared for length in lengths]
        # Of each row of the sequences, which of the computed ones it is: the prefix's are there once.
        first, places = torch.arange(shared), torch.arange(shared, shared + sum(own)).split_with_sizes(own)
        computed = torch.cat([part for tail in places for part in (first, tail)])
        asked = computed if rows is None else computed[rows]
        count = shared + sum(own)
        once = ids.new_empty(count).index_copy_(0, computed, ids)
        more = self._filling(count)
        attention = PrefixAttention(shared, own, more)
        few = F.pad(asked, (0, self._filling(len(asked)))) if len(asked) < count else None
        context = Asked(attention.positions, attention, asked=few)
        states: torch.Tensor = self.tree(self._embed(F.pad(once, (0, more))), context)
        return states.index_select(0, asked) if few is None else states[: len(asked)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [L, hidden] -> float32 [L, vocab]."""
        return self._logits(hidden)


def fastest_on(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for products in it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = cpu_info.multiplies_bf16()
    return torch.bfloat16 if has else torch.float32


def filling(rows: int) -> int:
    """How many rows are computed for nothing beside `rows`, which see nothing: up to 15, or an eighth.

    oneDNN makes and keeps kernels for every number of rows that it meets, 8 to 16 MB in all, so it is shown few.
    """
    step = 1 << max(4, (rows - 1).bit_length() - 4)
    return -rows % step


def few_odd_rows(rows: int) -> int:
    """How many rows are computed for nothing beside `rows` in float32, whose kernels know no number of rows."""
    return -rows % 8


def shared_prefix(ids: torch.Tensor, lengths: Sequence[int]) -> int:
    """How many tokens all of several sequences begin with; each keeps at least one of its own. 0 for a single one."""
    if len(lengths) < 2:
        return 0
    parts = torch.split(ids, list(lengths))
    least = min(lengths) - 1
    heads = torch.stack([part[:least] for part in parts])
    differ = (heads != heads[0]).any(0).nonzero()
    return int(differ[0]) if len(differ) else least


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


def loss_of(model: TrainableModel, weights: LoraWeights, examples: Tokens) -> float:
    """Mean nats a learned token that `weights` have on `examples`."""
    every = dict.fromkeys(layers.linears(model.tree), 0) | {path: m.rank for path, m in weights.modules.items()}
    found = layers.inject(model.tree, LoraSpec(rank=max(weights.ranks), rank_of=every))
    try:
        layers.load(found, weights)
        return evaluate_loss(model, examples)[0]
    finally:
        layers.eject(model.tree)
