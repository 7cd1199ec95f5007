"""Reads a `ModelConfig` from the metadata of a GGUF file.

Transformers' own mapping takes 2.9 s for a 100 MB file, because it reads the whole token list; this one needs no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from server.errors import BadModel
from server.model.config import MAX_LAYERS, ModelConfig, RopeScaling, rope_scaling, validated
from server.model.rope import llama3_frequencies

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""`general.architecture` of a GGUF file -> class name. Mistral models are written as `llama`."""

_NEUTRAL = {"yarn_ext_factor": (1.0, -1.0), "yarn_attn_factor": (1.0,), "yarn_log_multiplier": (0.0,)}
"""YaRN keys that are not implemented, with the values that mean "not used"."""
_NO_DEFAULT = object()


def from_gguf(
    metadata: Mapping[str, Any],
    tensor_shapes: Mapping[str, Sequence[int]],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """The config of a GGUF file.

    Args:
        metadata: The file's key-value pairs.
        tensor_shapes: Tensor name -> shape. They tell whether there are biases and an output table.
        rope_factors: Content of `rope_freqs.weight`, where Llama 3 files keep their RoPE scaling.

    Raises:
        BadModel: the architecture or a setting is not supported, or a value is missing or wrong.
    """
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        supported = ", ".join(sorted(GGUF_ARCHITECTURES))
        raise BadModel(f"the GGUF architecture {arch!r} is not supported; supported are {supported}")
    values = _Values({key[len(arch) + 1 :]: v for key, v in metadata.items() if key.startswith(f"{arch}.")})
    if values.whole("expert_count", 0):
        raise BadModel("mixture-of-experts models are not supported")
    if values.get("attention.causal") is False:
        raise BadModel("bidirectional models are not supported (attention.causal)")
    layers, heads, hidden = (values.whole(key) for key in ("block_count", "attention.head_count", "embedding_length"))
    if not 0 < layers <= MAX_LAYERS or heads < 1:
        raise BadModel(f"a model of {layers} layers with {heads} heads is not supported")
    head_dim = values.whole("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.whole(key, head_dim) != head_dim:
            raise BadModel(f"{key} {values.whole(key)} is not supported, only the size of a head ({head_dim})")
    if "token_embd.weight" not in tensor_shapes:
        raise BadModel("the GGUF file has no tensor token_embd.weight")
    window = values.whole("attention.sliding_window", 0) or None
    theta, positions = values.number("rope.freq_base", 10000.0), values.whole("context_length")
    return validated(
        ModelConfig(
            architecture="MistralForCausalLM" if window and arch == "llama" else GGUF_ARCHITECTURES[arch],
            vocab_size=int(tensor_shapes["token_embd.weight"][0]),
            hidden_size=hidden,
            intermediate_size=values.whole("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=values.whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=_rope_scaling(values, theta, head_dim, positions, rope_factors),
            tie_word_embeddings="output.weight" not in tensor_shapes,
            attention_bias="blk.0.attn_q.bias" in tensor_shapes,
            output_bias="blk.0.attn_output.bias" in tensor_shapes,
            mlp_bias="blk.0.ffn_down.bias" in tensor_shapes,
            qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
            no_rope_layers=tuple(int(i % 4 != 3) for i in range(layers)) if arch == "smollm3" else (),
            sliding_window=window,
        )
    )


class _Values(dict[str, Any]):
    """The keys of one architecture, with its prefix removed."""

    def _scalar(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _NO_DEFAULT:
            raise BadModel(f"the GGUF file lacks {key}")
        if isinstance(value, np.ndarray | list):  # GGUF may have one entry a layer
            listed = list(value)
            if not listed or any(other != listed[0] for other in listed):
                raise BadModel(f"{key} differs between layers, which is not supported")
            value = listed[0].item() if isinstance(listed[0], np.generic) else listed[0]
        return value

    def whole(self, key: str, default: Any = _NO_DEFAULT) -> int:
        value = self._scalar(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BadModel(f"{key} of the GGUF file must be a whole number, not {value!r}")
        return value

    def number(self, key: str, default: Any = _NO_DEFAULT) -> float:
        value = self._scalar(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadModel(f"{key} of the GGUF file must be a number, not {value!r}")
        return float(value)


def _rope_scaling(
    values: _Values, theta: float, head_dim: int, positions: int, rope_factors: Sequence[float] | None
) -> RopeScaling:
    name = str(values.get("rope.scaling.type", "linear"))
    # A factor of 0 means none; scale_linear is the spelling of before 2023-11.
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 0.0)) or 1.0
    attention = values.number("rope.scaling.attn_factor", 1.0)
    if name != "yarn" and attention != 1.0:
        raise BadModel(f"rope.scaling.attn_factor is supported with yarn only, not with {name}")
    for key, neutral in _NEUTRAL.items():
        if name == "yarn" and values.number(f"rope.scaling.{key}", neutral[0]) not in neutral:
            raise BadModel(f"the RoPE scaling yarn is not supported with rope.scaling.{key}")
    scaling = RopeScaling()
    if name != "none" and (name, factor) != ("linear", 1.0):
        # GGUF's factor multiplies YaRN's own magnitude, Transformers' replaces it.
        own = None if attention == 1.0 else attention * (1.0 + 0.1 * math.log(max(factor, 1.0)))
        parameters = {
            "factor": factor,
            "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
            "attention_factor": own,
            "beta_fast": values.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": values.get("rope.scaling.yarn_beta_slow"),
        }
        scaling = rope_scaling(name, parameters, positions)
    if rope_factors is None:
        return scaling
    if scaling.factor != 1.0 or scaling.attention_factor is not None:
        raise BadModel(f"rope_freqs.weight together with the RoPE scaling {name} is not supported")
    return _llama3_scaling(rope_factors, theta, head_dim)


def _llama3_scaling(factors: Sequence[float], theta: float, head_dim: int) -> RopeScaling:
    """The `llama3` scaling that divides the frequencies by `factors`.

    GGUF keeps only these divisors. All published models share three of the four parameters, so the fourth is the
    largest divisor. Raises BadModel if that does not reproduce `factors`.
    """
    scaling = RopeScaling("llama3", float(max(factors, default=1.0)), 8192, 1.0, 4.0)
    if len(factors) == head_dim // 2 and 0 < scaling.factor < math.inf:
        expected = llama3_divisors(scaling, theta, head_dim)
        if all(math.isclose(one, other, rel_tol=1e-3) for one, other in zip(expected, factors, strict=True)):
            return scaling
    raise BadModel("rope_freqs.weight of the GGUF file is not that of a Llama 3 scaling; no other is supported")


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """The divisor of each rotary frequency, [head_dim / 2] (Llama 3.1's `apply_scaling`)."""
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    divisors: list[float] = (plain / llama3_frequencies(plain, scaling)).tolist()
    return divisors
