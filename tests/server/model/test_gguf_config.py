"""`from_gguf`: model settings from GGUF metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
BIASES = {f"blk.0.attn_{part}.bias": (64,) for part in "qkv"}
LLAMA3 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)


def scaled(**keys: Any) -> dict[str, Any]:
    return GGUF | {f"llama.rope.{key.replace('__', '.')}": value for key, value in keys.items()}


def test_metadata_and_tensors_give_the_config() -> None:
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
    ("change", "message"),
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.block_count": 1 << 31}, "2147483648 layers"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.attention.head_count_kv": np.array([2, 4], np.uint32)}, "differs between layers"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.freq_base": 0.0}, "rope_theta must be a positive number"),
        ({"llama.rope.scaling.factor": math.nan}, "factor must be a positive number"),
        ({"llama.rope.scaling.factor": "x"}, "factor of the GGUF file must be a number"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon of the GGUF file must be a number"),
        ({"llama.attention.sliding_window": "x"}, "sliding_window of the GGUF file must be a whole number"),
        ({"llama.attention.causal": False}, "attention.causal"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is supported with yarn only"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModel, match=message):
        from_gguf(GGUF | change, TABLE)


@pytest.mark.parametrize("key", ["context_length", "attention.layer_norm_rms_epsilon", "block_count"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(BadModel, match=f"lacks {key}$"):
        from_gguf({name: value for name, value in GGUF.items() if name != f"llama.{key}"}, TABLE)


@pytest.mark.parametrize(
    ("changes", "tensors", "lost"),
    [
        ({}, BIASES, "output_bias"),
        ({}, {"blk.0.attn_q_norm.weight": (16,)}, "qk_norm"),
        ({"llama.attention.sliding_window": 64}, {"blk.0.ffn_down.bias": (64,)}, "mlp_bias"),
    ],
)
def test_to_hf_refuses_what_no_config_json_can_describe(
    changes: dict[str, Any], tensors: dict[str, tuple[int, ...]], lost: str
) -> None:
    with pytest.raises(BadModel, match=lost):
        to_hf(from_gguf(GGUF | changes, TABLE | tensors))
    config = from_gguf(GGUF, TABLE | BIASES | {"blk.0.attn_output.bias": (64,), "blk.0.ffn_down.bias": (64,)})
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"scaling__factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"scaling__factor": 4.0, "scale_linear": 2.0}, RopeScaling("linear", 4.0)),
        ({"scaling__factor": 0.0, "scale_linear": 2.0}, RopeScaling()),
        ({"scaling__type": "linear", "scaling__factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"scaling__type": "none", "scaling__factor": 4.0}, RopeScaling()),
        ({"scaling__type": "yarn", "scale_linear": 4.0}, RopeScaling("yarn", 4.0, 512)),
        ({"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 128},
         RopeScaling("yarn", 4.0, 128)),
    ],
)  # fmt: skip
def test_rope_scaling(keys: dict[str, Any], scaling: RopeScaling) -> None:
    assert from_gguf(scaled(**keys), TABLE).rope_scaling == scaling


def test_yarn_keys_that_are_not_implemented() -> None:
    yarn = scaled(scaling__type="yarn", scaling__factor=4.0)
    factor = from_gguf(yarn | {"llama.rope.scaling.attn_factor": 1.5}, TABLE).rope_scaling.attention_factor
    assert factor == pytest.approx(1.5 * (1 + 0.1 * math.log(4.0))), "GGUF's factor multiplies YaRN's own"
    for key, neutral, other in (("ext_factor", 1.0, 0.0), ("attn_factor", 1.0, 1.5), ("log_multiplier", 0.0, 0.2)):
        name = f"llama.rope.scaling.yarn_{key}"
        assert from_gguf(yarn | {name: neutral}, TABLE) == from_gguf(yarn, TABLE)
        with pytest.raises(BadModel, match=f"not supported with rope.scaling.yarn_{key}"):
            from_gguf(yarn | {name: other}, TABLE)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_divisors(factor: float) -> None:
    scaling = RopeScaling("llama3", factor, 8192, 1.0, 4.0)
    divisors = llama3_divisors(scaling, 500000.0, 16)
    metadata = scaled(freq_base=500000.0)
    assert from_gguf(metadata, TABLE, divisors).rope_scaling == scaling
    for wrong in ([d * 1.1 for d in divisors], [], [math.inf] * 8, [math.nan] * 8, [0.0] * 8):
        with pytest.raises(BadModel, match="rope_freqs"):
            from_gguf(metadata, TABLE, wrong)
    with pytest.raises(BadModel, match=r"rope_freqs\.weight together with the RoPE scaling linear"):
        from_gguf(metadata | {"llama.rope.scaling.factor": 4.0}, TABLE, divisors)


def test_llama3_divisors_equal_those_of_transformers() -> None:
    content = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    content |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(head_dim=128, rope_parameters=content), "cpu")
    ours = [5e5 ** (-2 * i / 128) / d for i, d in enumerate(llama3_divisors(LLAMA3, 5e5, 128))]
    assert theirs.tolist() == pytest.approx(ours, rel=1e-5)
