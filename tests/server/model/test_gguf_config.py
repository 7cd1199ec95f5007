"""What the metadata of a GGUF file says of its model, and what is refused of it by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import transformers

from server.errors import BadModel
from server.model.config import RopeScaling, from_hf, to_hf
from server.model.gguf_config import from_gguf, llama3_divisors

GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TABLE = {"token_embd.weight": (100, 64)}


def test_gguf_metadata() -> None:
    config = from_gguf(GGUF, TABLE)
    assert config.architecture == "LlamaForCausalLM" and config.vocab_size == 100
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (2, 16, 10000.0)
    assert config.tie_word_embeddings and not config.attention_bias
    listed = {"llama.attention.head_count_kv": np.array([2, 2], np.uint32), "llama.expert_count": np.zeros(2, np.int32)}
    assert from_gguf(GGUF | listed, TABLE) == config
    qwen = {key.replace("llama", "qwen2"): value for key, value in GGUF.items()} | {"general.architecture": "qwen2"}
    more = from_gguf(qwen, TABLE | {"blk.0.attn_q.bias": (64,), "output.weight": (100, 64)})
    assert more.architecture == "Qwen2ForCausalLM" and more.attention_bias and not more.output_bias
    assert not more.tie_word_embeddings
    smol = {key.replace("llama", "smollm3"): value for key, value in GGUF.items()}
    smol |= {"general.architecture": "smollm3", "smollm3.block_count": 8}
    assert from_gguf(smol, TABLE).no_rope_layers == (1, 1, 1, 0, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.block_count": 1 << 31}, "block_count is 2147483648, and the most that is read is 4096"),
        ({"llama.rope.dimension_count": 8}, "RoPE on 8 of 16"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.attention.head_count_kv": np.array([2, 4], np.uint32)}, "differs between layers"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.freq_base": 0.0}, "no positive number"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon must be a number"),
        ({"llama.attention.sliding_window": "x"}, "sliding_window is 'x'"),
        ({"llama.attention.value_length": np.array([16, 8], np.uint32)}, "differs between layers"),
        ({"llama.attention.causal": False}, "attention.causal"),
        ({"general.architecture": "x" * 10**6}, "^the GGUF architecture 'x{80}' is not served"),
        ({"llama.expert_count": np.array([0, 2], np.uint32)}, "expert_count differs between layers"),
    ],
)
def test_gguf_that_is_not_served(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        from_gguf(GGUF | change, TABLE)


BIASES = {f"blk.0.attn_{part}.bias": (64,) for part in "qkv"}


@pytest.mark.parametrize(
    ("changes", "tensors", "said"),
    [
        ({}, BIASES, "LlamaForCausalLM there are no words for its output_bias"),
        ({}, {"blk.0.attn_q_norm.weight": (16,)}, "qk_norm"),
        ({"llama.attention.sliding_window": 64}, {"blk.0.ffn_down.bias": (64,)}, "MistralForCausalLM.*mlp_bias"),
    ],
)
def test_what_no_config_json_can_say_is_not_written(
    changes: dict[str, Any], tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    config = from_gguf(GGUF | changes, TABLE | tensors)
    with pytest.raises(BadModel, match=said):
        to_hf(config)
    both = {"blk.0.attn_output.bias": (64,), "blk.0.ffn_down.bias": (64,)}
    assert from_hf(to_hf(from_gguf(GGUF, TABLE | BIASES | both))) == from_gguf(GGUF, TABLE | BIASES | both)


def test_gguf_rope_scaling() -> None:
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
    }
    assert from_gguf(GGUF | yarn, TABLE).rope_scaling == RopeScaling("yarn", 4.0, 128)
    assert from_gguf(GGUF | yarn | {"llama.rope.scaling.factor": 16.0}, TABLE).context_length == 2048
    told = from_gguf(GGUF | yarn | {"llama.rope.scaling.attn_factor": 1.0}, TABLE).rope_scaling.attention_factor
    assert told == pytest.approx(1 + 0.1 * math.log(4.0)), "it multiplies YaRN's own"
    none = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}
    assert from_gguf(GGUF | none, TABLE).rope_scaling == RopeScaling()
    for key in ("factor", "attn_factor"):
        with pytest.raises(BadModel, match=f"{key} must be a number"):
            from_gguf(GGUF | yarn | {f"llama.rope.scaling.{key}": "x"}, TABLE)
    for factor in (-1.0, math.inf, math.nan):
        with pytest.raises(BadModel, match="no positive number"):
            from_gguf(GGUF | none | {"llama.rope.scaling.factor": factor}, TABLE)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert from_gguf(GGUF | linear, TABLE).rope_scaling == RopeScaling("linear", 2.0)
    for scaling in (linear, {}):
        with pytest.raises(BadModel, match="attn_factor is served with yarn alone"):
            from_gguf(GGUF | scaling | {"llama.rope.scaling.attn_factor": 1.5}, TABLE)
    for key, neutral, other in (("ext_factor", 1.0, 0.0), ("attn_factor", 1.0, 1.5), ("log_multiplier", 0.0, 0.2)):
        name = f"llama.rope.scaling.yarn_{key}"
        assert from_gguf(GGUF | yarn | {name: neutral}, TABLE).rope_scaling == RopeScaling("yarn", 4.0, 128)
        assert from_gguf(GGUF | linear | {name: other}, TABLE).rope_scaling == RopeScaling("linear", 2.0)
        with pytest.raises(BadModel, match=f"yarn is not served with rope.scaling.yarn_{key}"):
            from_gguf(GGUF | yarn | {name: other}, TABLE)


@pytest.mark.parametrize(
    ("told", "scaling"),
    [
        ({"scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, RopeScaling("linear", 4.0)),
        ({"scaling.factor": 0.0, "scale_linear": 2.0}, RopeScaling()),
        ({"scaling.type": "linear", "scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"scaling.type": "yarn", "scale_linear": 4.0}, RopeScaling("yarn", 4.0, 512)),
        ({"scaling.type": "none", "scaling.factor": 4.0}, RopeScaling()),
        ({"scaling.type": "none", "scale_linear": 4.0}, RopeScaling()),
        ({"scaling.original_context_length": 64}, RopeScaling()),
    ],
)
def test_gguf_scales_linearly_unless_it_says_otherwise(told: dict[str, Any], scaling: RopeScaling) -> None:
    """By the factor, or else by what it was called before 2023-11, as llama.cpp has it."""
    assert from_gguf(GGUF | {f"llama.rope.{key}": value for key, value in told.items()}, TABLE).rope_scaling == scaling


def test_divisors_beside_another_scaling_are_refused() -> None:
    """llama.cpp applies both, for which there are no words here."""
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    divisors = llama3_divisors(scaling, 10000.0, 16)

    def read(**told: Any) -> RopeScaling:
        metadata = {f"llama.rope.scaling.{key}": value for key, value in told.items()}
        return from_gguf(GGUF | metadata, TABLE, divisors).rope_scaling

    none = ({"type": "none"}, {"type": "none", "factor": 4.0}, {"type": "linear"}, {"factor": 1.0}, {"factor": 0.0})
    for neutral in none:
        assert read(**neutral) == scaling
    assert read(type="yarn", factor=1.0) == scaling
    for other in ({"type": "linear"}, {"type": "yarn"}, {}):
        with pytest.raises(BadModel, match=f"rope_freqs.weight beside .* {other.get('type', 'linear')} is not served"):
            read(factor=4.0, **other)
    with pytest.raises(BadModel, match="rope_freqs.weight beside the RoPE scaling yarn is not served"):
        read(type="yarn", factor=1.0, attn_factor=1.5)


@pytest.mark.parametrize("key", ["context_length", "attention.layer_norm_rms_epsilon"])
def test_gguf_without_what_llama_cpp_needs_too(key: str) -> None:
    with pytest.raises(BadModel, match=f"^the model's config lacks {key}$"):
        from_gguf({name: value for name, value in GGUF.items() if name != f"llama.{key}"}, TABLE)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_in_the_divisors_that_gguf_keeps(factor: float) -> None:
    scaling = RopeScaling("llama3", factor, 8192, 1.0, 4.0)
    divisors = llama3_divisors(scaling, 500000.0, 16)
    metadata = GGUF | {"llama.rope.freq_base": 500000.0}
    assert from_gguf(metadata, TABLE, divisors).rope_scaling == scaling
    for wrong in ([d * 1.1 for d in divisors], [], [math.inf] * 8, [math.nan] * 8, [0.0] * 8):
        with pytest.raises(BadModel, match="rope_freqs"):
            from_gguf(metadata, TABLE, wrong)


def test_llama3_divisors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    config = dataclasses.replace(from_gguf(GGUF, TABLE), head_dim=128, rope_theta=5e5, rope_scaling=scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**to_hf(config)), device="cpu")
    plain = [5e5 ** (-2 * i / 128) for i in range(64)]
    ours = [f / d for f, d in zip(plain, llama3_divisors(config.rope_scaling, 5e5, 128), strict=True)]
    assert theirs.tolist() == pytest.approx(ours, rel=1e-5)
