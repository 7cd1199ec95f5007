"""`from_gguf`: a `ModelConfig` from the metadata of a GGUF file.

Owns the architectures that are served from such files, and what their keys mean under the names of Transformers. Does
not know tensors' contents, but for the divisors that stand for Llama 3's scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from server.errors import BadModel
from server.model.config import MAX_LAYERS, ModelConfig, RopeScaling, checked, no_rope_layers, scaling_of
from server.model.rope import llama3
from server.model.values import above_zero, cut, real, told, whole

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""`general.architecture` in a GGUF file -> class name. Mistral models are written as `llama`."""


def from_gguf(
    metadata: Mapping[str, Any],
    tensor_shapes: Mapping[str, Sequence[int]],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """The config of a GGUF file.

    `tensor_shapes` maps the file's tensor names to [out, in] shapes; whether there are biases and an output table
    is read from them. `rope_factors` is the content of `rope_freqs.weight`, where Llama 3 keeps its RoPE scaling.
    Raises BadModel for another architecture and for a setting that is not served.
    """
    arch = str(metadata.get("general.architecture"))
    if arch not in GGUF_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        raise BadModel(f"the GGUF architecture {cut(arch)!r} is not served; served are {known}")
    values = {key[len(arch) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    if whole(values, "expert_count", 0, least=0):
        raise BadModel("mixtures of experts are not served")
    if told(values, "attention.causal", bool, "true or false") is False:
        raise BadModel("models whose tokens see those after them are not served (attention.causal)")
    layers = whole(values, "block_count", most=MAX_LAYERS)
    heads = whole(values, "attention.head_count")
    hidden = whole(values, "embedding_length")
    head_dim = whole(values, "attention.key_length", default=hidden // heads)
    if whole(values, "attention.value_length", head_dim) != head_dim:
        raise BadModel("values of another size than keys are not served (attention.value_length)")
    if (rotary := whole(values, "rope.dimension_count", head_dim)) != head_dim:
        raise BadModel(f"RoPE on {rotary} of {head_dim} dimensions of a head is not served")
    max_positions = whole(values, "context_length")
    if "token_embd.weight" not in tensor_shapes:
        raise BadModel("the GGUF file has no tensor token_embd.weight")
    architecture = GGUF_ARCHITECTURES[arch]
    window = whole(values, "attention.sliding_window", 0, least=0) or None
    if window is not None and arch == "llama":
        architecture = "MistralForCausalLM"
    interval = {"no_rope_layer_interval": 4}  # llama.cpp fixes it for this architecture, the file does not say
    theta = above_zero(values, "rope.freq_base", 10000.0)
    return checked(
        ModelConfig(
            architecture=architecture,
            vocab_size=int(tensor_shapes["token_embd.weight"][0]),
            hidden_size=hidden,
            intermediate_size=whole(values, "feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=whole(values, "attention.head_count_kv", default=heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=above_zero(values, "attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=_gguf_rope(values, theta, head_dim, max_positions, rope_factors),
            tie_word_embeddings="output.weight" not in tensor_shapes,
            attention_bias="blk.0.attn_q.bias" in tensor_shapes,
            output_bias="blk.0.attn_output.bias" in tensor_shapes,
            mlp_bias="blk.0.ffn_down.bias" in tensor_shapes,
            qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
            no_rope_layers=no_rope_layers(interval, layers) if arch == "smollm3" else (),
            sliding_window=window,
        )
    )


_UNSERVED_YARN = (
    ("rope.scaling.yarn_ext_factor", (1.0, -1.0)),
    ("rope.scaling.yarn_attn_factor", (1.0,)),
    ("rope.scaling.yarn_log_multiplier", (0.0,)),
)
"""Keys of a GGUF file that would change the answers, and what they say where they do not: the first, or nothing."""


def _gguf_rope(
    values: Mapping[str, Any], theta: float, head_dim: int, max_positions: int, factors: Sequence[float] | None
) -> RopeScaling:
    name = str(values.get("rope.scaling.type", "linear"))
    # 0 is how GGUF's own writer says none; the other key is the spelling before 2023-11.
    factor = real(values, "rope.scaling.factor", real(values, "rope.scale_linear", 0.0)) or 1.0
    if name != "yarn" and real(values, "rope.scaling.attn_factor", 1.0) != 1.0:
        raise BadModel(f"rope.scaling.attn_factor is served with yarn alone, not with {cut(name)}")
    for key, neutral in _UNSERVED_YARN if name == "yarn" else ():
        if real(values, key, neutral[0]) not in neutral:
            raise BadModel(f"the RoPE scaling yarn is not served with {key}")
    scaling = RopeScaling()
    if name != "none" and (name, factor) != ("linear", 1.0):
        scaling = _told_scaling(name, factor, values, max_positions)
    if factors is None:
        return scaling
    if scaling.factor != 1.0 or scaling.attention_factor not in (None, 1.0):
        raise BadModel(f"rope_freqs.weight beside the RoPE scaling {name} is not served")
    return _llama3_from_factors(factors, theta, head_dim)


def _told_scaling(name: str, factor: float, values: Mapping[str, Any], max_positions: int) -> RopeScaling:
    magnitude = None
    if "rope.scaling.attn_factor" in values:  # multiplies YaRN's own, where Transformers' stands instead of it
        magnitude = real(values, "rope.scaling.attn_factor", 1.0) * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    parameters = {
        "factor": factor,
        "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
        "attention_factor": magnitude,
        "beta_fast": values.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": values.get("rope.scaling.yarn_beta_slow"),
    }
    return scaling_of(name, parameters, max_positions)


def _llama3_from_factors(factors: Sequence[float], theta: float, head_dim: int) -> RopeScaling:
    """The parameters of a llama3 scaling that gives these divisors of the frequencies.

    GGUF keeps only the divisors. All published models of this kind share three of the four parameters, so the one
    that differs is the largest divisor; whatever does not reproduce the tensor is refused.
    """
    scaling = RopeScaling("llama3", float(max(factors, default=1.0)), 8192, 1.0, 4.0)
    sound = len(factors) == head_dim // 2 and 0 < scaling.factor < math.inf
    if not sound or not all(map(_close, llama3_divisors(scaling, theta, head_dim), factors)):
        raise BadModel("the GGUF file's rope_freqs.weight are not those of a Llama 3 scaling, no other is served")
    return scaling


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """What each rotary frequency is divided by, [head_dim / 2] (Llama 3.1's `apply_scaling`)."""
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    divisors: list[float] = (plain / llama3(plain, scaling)).tolist()
    return divisors
