"""`TrainableModel`: a loaded base as a model for `adapters.training`, in a module tree apart from the serving one."""

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
from server.jobs.checkpointed_layers import SelectedContext, checkpointed_layers
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
MAX_DENSE_VALUES = 256 << 20
"""A base with at most this many linear weights keeps them dequantized while it trains: 512 MiB in bfloat16."""


class TrainableModel:
    """A decoder for training.

    Args:
        base: The base. The linear weights of a small base are dequantized once. Those of a larger base stay quantized
            and are dequantized for each backward pass.
        compute_dtype: Of the GEMMs. "auto" is bfloat16 where the device multiplies in it, else float32. The residual
            stream is float32.
        max_dense: Number of weights to keep dequantized. What the linears leave is used for the output table.
        share_prefix: Compute the common first tokens of a batch once.
    """

    def __init__(
        self,
        base: Base,
        compute_dtype: str = "auto",
        max_dense: int = MAX_DENSE_VALUES,
        share_prefix: bool = True,
    ) -> None:
        dtype = DTYPES.get(compute_dtype) or fastest_dtype(device_of(base))
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
        if sum(map(math.prod, base.shapes().values())) <= max_dense:
            for path in base.shapes():
                parent, _, last = path.rpartition(".")
                dense = _Dense(base.weights[path], base.tensors.get(f"{path}.bias"), base.backend, dtype)
                setattr(decoder.get_submodule(parent), last, dense)
                self.nbytes += dense.weight.nbytes
        left = max_dense - sum(m.weight.numel() for m in decoder.modules() if isinstance(m, _Dense))
        self._place_head(decoder, base, dtype, left)
        memory.trim()  # after dequantizing
        self._share_prefix = share_prefix
        self._padding = bucket_padding if dtype == torch.bfloat16 else small_padding
        self._embed, self._logits = decoder.embed, decoder.logits

    def _place_head(self, decoder: Decoder, base: Base, dtype: torch.dtype, left: int) -> None:
        """Dequantize the output table if `left` values in bfloat16 have room for it."""
        head = decoder.lm_head
        # A table in its stored layout stays float32: kernels that quantize activations would change the loss.
        head_dtype = torch.float32 if head.weight.layout == STORED else dtype
        if math.prod(head.weight.shape) * head_dtype.itemsize <= left * torch.bfloat16.itemsize:
            dense = _Head(head.weight, head.bias, base.backend, head_dtype)
            decoder.lm_head = dense  # type: ignore[assignment]
            self.nbytes += dense.weight.nbytes
        elif head.weight.layout == STORED:
            head.backend = TorchOps()  # same values, dequantized block by block to save memory

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int], rows: torch.Tensor | None = None) -> torch.Tensor:
        """The last hidden states of a batch.

        The common first tokens of all sequences are computed once: in a causal decoder their states are the same, and
        their gradients add up.

        Args:
            ids: int64 [T], the sequences one after the other.
            lengths: Their lengths.
            rows: int64 [L], the rows whose states are needed; None for all. The last layer skips the others.

        Returns:
            float32 [T, hidden] or [L, hidden].
        """
        shared = shared_prefix(ids, lengths) if self._share_prefix else 0
        if max(lengths) - shared > prefix_attention.MAX_BATCHED:
            shared = 0  # the fused kernel takes whole sequences
        tails = [length - shared for length in lengths]
        # The computed row of each row of the sequences. The prefix is computed once.
        prefix, own = torch.arange(shared), torch.arange(shared, shared + sum(tails)).split_with_sizes(tails)
        computed = torch.cat([part for tail in own for part in (prefix, tail)])
        selected = computed if rows is None else computed[rows]
        count = shared + sum(tails)
        distinct = ids.new_empty(count).index_copy_(0, computed, ids)
        padding = self._padding(count)
        attention = PrefixAttention(shared, tails, padding)
        fewer = len(selected) < count
        few = F.pad(selected, (0, self._padding(len(selected)))) if fewer else None
        context = SelectedContext(attention.positions, attention, selected=few)
        states: torch.Tensor = self.tree(self._embed(F.pad(distinct, (0, padding))), context)
        return states.index_select(0, selected) if few is None else states[: len(selected)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [L, hidden] -> float32 [L, vocab]."""
        return self._logits(hidden)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device has instructions to multiply in it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = cpu_info.multiplies_bf16()
    return torch.bfloat16 if has else torch.float32


def bucket_padding(rows: int) -> int:
    """Rows to add in bfloat16: up to 15 or an eighth.

    oneDNN compiles and keeps kernels, 8 to 16 MB in all, for every number of rows, so there must be few numbers.
    """
    step = 1 << max(4, (rows - 1).bit_length() - 4)
    return -rows % step


def small_padding(rows: int) -> int:
    """Rows to add in float32, whose kernels do not depend on the number of rows."""
    return -rows % 8


def shared_prefix(ids: torch.Tensor, lengths: Sequence[int]) -> int:
    """Number of first tokens that all sequences share. Each keeps at least one token of its own. 0 for one sequence."""
    if len(lengths) < 2:
        return 0
    parts = torch.split(ids, list(lengths))
    least = min(lengths) - 1
    heads = torch.stack([part[:least] for part in parts])
    differ = (heads != heads[0]).any(0).nonzero()
    return int(differ[0]) if len(differ) else least


class _Dense(nn.Linear):
    """A frozen linear with the dequantized weight, rounded once to the compute dtype.

    Full fine-tuning, used for comparison, replaces the weight with a float32 one. The GEMM stays in x's dtype.
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
    """The output table. It takes float32 states and multiplies in its own dtype."""

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def loss_of(model: TrainableModel, weights: LoraWeights, examples: Tokens) -> float:
    """The mean loss of an adapter, in nats per learned token."""
    ranks = dict.fromkeys(layers.linears(model.tree), 0) | {path: m.rank for path, m in weights.modules.items()}
    found = layers.inject(model.tree, LoraSpec(rank=max(weights.ranks), rank_of=ranks))
    try:
        layers.load(found, weights)
        return evaluate_loss(model, examples)[0]
    finally:
        layers.eject(model.tree)
