"""`Decoder`: the decoder of the Llama family (Llama, Mistral, SmolLM2/3, Qwen2/2.5/3) with Transformers' module names.

It is the reference for the native runners and the forward pass of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from server.kernels import Backend
from server.kernels.weight import Weight
from server.model.attention import Context
from server.model.config import ModelConfig
from server.model.linear import Linear
from server.model.rope import angles, frequencies

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of a step's positions, [T, 1, head_dim] each."""


class Source(Protocol):
    """A loaded `Base`, or anything with its weights."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def weights(self) -> Mapping[str, Weight]: ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and tensors."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, returned in `dtype`."""

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight.float()
        self.eps = eps
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(self.dtype)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Apply RoPE to x [T, heads, d]. Element i pairs with i + d/2, so the sine of the first half is negative."""
    cos, sin = rotary
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Self-attention: q, k and v projections, RoPE if the layer has it, and the output projection."""

    def __init__(self, base: Source, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        config, path = base.config, f"model.layers.{layer}.self_attn"
        self.layer = layer
        self.head_dim = config.head_dim
        self.has_rope = config.has_rope(layer)
        self.q_proj = _linear(base, f"{path}.q_proj")
        self.k_proj = _linear(base, f"{path}.k_proj")
        self.v_proj = _linear(base, f"{path}.v_proj")
        self.o_proj = _linear(base, f"{path}.o_proj")
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(base.tensors[f"{path}.q_norm.weight"], config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(base.tensors[f"{path}.k_norm.weight"], config.rms_norm_eps, dtype)

    def projected(
        self, x: torch.Tensor, rotary: Rotary, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> q [T, heads, d], k and v [T, kv_heads, d], after RoPE."""
        q, k = self.q_proj(x, context), self.k_proj(x, context)
        v = self.v_proj(x, context).view(len(x), -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.view(len(x), -1, self.head_dim)).flatten(1)
            k = self.k_norm(k.view(len(x), -1, self.head_dim)).flatten(1)
        heads = q.shape[1] // self.head_dim
        both = torch.cat((q, k), -1).view(len(x), -1, self.head_dim)  # rotated together
        if self.has_rope:
            both = rotate(both, rotary)
        return both[:, :heads], both[:, heads:], v

    def forward(self, x: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        seen = context.attention.attend(self.layer, *self.projected(x, rotary, context))
        return self.o_proj(seen, context)  # type: ignore[no-any-return]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """The SwiGLU feed-forward network."""

    def __init__(self, base: Source, layer: int) -> None:
        super().__init__()
        path = f"model.layers.{layer}.mlp"
        self.gate_proj = _linear(base, f"{path}.gate_proj")
        self.up_proj = _linear(base, f"{path}.up_proj")
        self.down_proj = _linear(base, f"{path}.down_proj")

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        hidden = swiglu(self.gate_proj(x, context), self.up_proj(x, context))
        return self.down_proj(hidden, context)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A pre-norm decoder layer. The residual stream is float32."""

    def __init__(self, base: Source, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        config, path = base.config, f"model.layers.{layer}"
        self.self_attn = Attention(base, layer, dtype)
        self.mlp = MLP(base, layer)
        self.input_layernorm = RMSNorm(base.tensors[f"{path}.input_layernorm.weight"], config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(
            base.tensors[f"{path}.post_attention_layernorm.weight"], config.rms_norm_eps, dtype
        )

    def forward(self, stream: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        stream = stream + self.self_attn(self.input_layernorm(stream), rotary, context)
        return stream + self.mlp(self.post_attention_layernorm(stream), context)  # type: ignore[no-any-return]


class Table(nn.Module):
    """The embedding table: ids int64 [T] -> float32 [T, hidden]."""

    def __init__(self, weight: Weight, backend: Backend) -> None:
        super().__init__()
        self.weight = weight
        self.backend = backend

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.backend.embed(self.weight, ids)


class Stack(nn.Module):
    """Embedding table, layers and final norm; `model` in Transformers' names."""

    def __init__(self, base: Source, dtype: torch.dtype) -> None:
        super().__init__()
        config = base.config
        self.dtype = dtype
        self.embed_tokens = Table(base.weights["model.embed_tokens"], base.backend)
        self.layers = nn.ModuleList(Layer(base, i, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(base.tensors["model.norm.weight"], config.rms_norm_eps, torch.float32)
        self.frequencies, self.rope_factor = frequencies(config)

    def forward(self, embeddings: torch.Tensor, context: Context) -> torch.Tensor:
        cos, sin = angles(self.frequencies, self.rope_factor, context.positions)
        rotary = (
            torch.cat((cos, cos), -1).to(self.dtype)[:, None],
            torch.cat((-sin, sin), -1).to(self.dtype)[:, None],
        )
        stream = embeddings
        for layer in self.layers:
            stream = layer(stream, rotary, context)
        return self.norm(stream)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A causal language model over a base's packed weights, which it shares and never changes.

    Training builds its own `Decoder` over the same weights and replaces `Linear`s by LoRALinears.

    Args:
        base: The weights.
        dtype: Of activations between kernels; the backend's own by default. Residual stream, norms and logits are
            float32.
    """

    def __init__(self, base: Source, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = Stack(base, dtype or base.backend.dtype)
        table = base.weights["model.embed_tokens" if base.config.tie_word_embeddings else "lm_head"]
        self.lm_head = Linear("lm_head", table, None, base.backend)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [T] -> embeddings float32 [T, hidden]."""
        return self.model.embed_tokens(ids)  # type: ignore[no-any-return]

    def forward(self, embeddings: torch.Tensor, context: Context) -> torch.Tensor:
        """Embeddings float32 [T, hidden] -> final hidden states after the norm, float32 [T, hidden]."""
        return self.model(embeddings, context)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states float32 [L, hidden] -> logits float32 [L, vocab]."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]


def _linear(base: Source, path: str) -> Linear:
    return Linear(path, base.weights[path], base.tensors.get(f"{path}.bias"), base.backend)
