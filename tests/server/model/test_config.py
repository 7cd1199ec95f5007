"""`from_hf` and `to_hf` against Transformers' own configurations and models."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.errors import BadModel
from server.model.config import RopeScaling, from_hf, to_hf
from server.model.rope import frequencies

KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"]
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA = SHAPE | {"architectures": ["LlamaForCausalLM"]}
QWEN3 = SHAPE | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 64}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def saved(kind: str, **values: Any) -> dict[str, Any]:
    """The config.json that Transformers writes."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE | values)
    return config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_equal_those_of_transformers(kind: str) -> None:
    theirs = saved(kind, rms_norm_eps=1e-5, tie_word_embeddings=True, sliding_window=None)
    config = from_hf(theirs)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(config, name) == theirs[name]
    assert config.head_dim == theirs.get("head_dim", 16)
    assert (config.rope_theta, config.rope_scaling) == (theirs["rope_parameters"]["rope_theta"], RopeScaling())
    assert config.tie_word_embeddings and config.context_length == 512
    assert [config.has_rope(i) for i in range(8)] == [kind != "SmolLM3" or i % 4 != 3 for i in range(8)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_tensor_names_and_shapes_equal_those_of_transformers(kind: str, bias: bool) -> None:
    values: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": None}
    values |= {"attention_bias": bias} if kind in ("Llama", "Qwen3", "SmolLM3") else {}
    values |= {"mlp_bias": bias} if kind in ("Llama", "SmolLM3") else {}
    config = from_hf(saved(kind, **values))
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**to_hf(config)))
    ours: dict[str, tuple[int, ...]] = {f"{p}.weight": s for p, s in config.linear_shapes().items()}
    ours |= {f"{p}.weight": s for p, s in config.table_shapes().items()} | config.tensor_shapes()
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope_type": "dynamic", "factor": 4.0}, RopeScaling("dynamic", 4.0)),
        (LLAMA3 | {"original_max_position_embeddings": 64}, RopeScaling("llama3", 8.0, 64, 1.0, 4.0)),
        (YARN | {"original_max_position_embeddings": 128, "beta_fast": 16.0},
         RopeScaling("yarn", 4.0, 128, beta_fast=16.0)),
        (YARN, RopeScaling("yarn", 4.0, 512)),
        ({}, RopeScaling()),
    ],
)  # fmt: skip
def test_rope_scaling_in_the_old_and_the_new_spelling(given: dict[str, Any], expected: RopeScaling) -> None:
    old = {("type" if key == "rope_type" else key): value for key, value in given.items()}
    config = from_hf(LLAMA | {"rope_theta": 5000.0, "rope_scaling": old or None})
    assert (config.rope_theta, config.rope_scaling) == (5000.0, expected)
    new = {"rope_parameters": given | {"rope_theta": 5000.0}}
    assert from_hf(LLAMA | new) == from_hf(LLAMA | new | {"rope_scaling": old}) == config
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("truncate", [None, False, True, "absent"])
def test_yarn_frequencies_equal_those_of_transformers(truncate: object) -> None:
    scaling = YARN | {"original_max_position_embeddings": 128, "mscale": 0, "rope_theta": 10000.0}
    scaling |= {} if truncate == "absent" else {"truncate": truncate}
    config = from_hf(LLAMA | {"head_dim": 64, "rope_parameters": scaling})
    theirs = transformers.LlamaConfig(**SHAPE, head_dim=64, rope_parameters=dict(scaling))
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    ours, magnitude = frequencies(config)
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-5) and magnitude == pytest.approx(factor)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": 5}, "architecture 5 is not supported"),
        ({"model_type": "granite"}, "contradicts itself"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor .* must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "differ; remove"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_scaling": YARN | {"beta_fast": 1e308}}, "between 1e-6 and 1e6"),
        ({"rope_scaling": YARN | {"factor": 1e8}}, "longer than 2147483647"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor above its low_freq_factor 1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differs between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": "x"}, "rope_theta must be a number"),
        ({"rope_theta": -1}, "rope_theta must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta must be a number"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
        ({"hidden_size": None}, "positive whole number as hidden_size"),
        ({"hidden_size": "6" * 10**6}, "positive whole number as hidden_size"),
        ({"num_hidden_layers": 20_000_000}, "the limit is 4096"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        (QWEN3 | {"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
        (QWEN3 | {"layer_types": 5}, "layer_types"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be at least 1"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}, "not valid|no_rope_layers"),
    ],
)
def test_unsupported_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModel, match=message) as error:
        from_hf(LLAMA | change)
    assert len(error.value.message) < 1100


def test_a_sliding_window_limits_the_context() -> None:
    mistral = from_hf(saved("Mistral", sliding_window=128))
    assert (mistral.context_length, mistral.max_position_embeddings) == (128, 512)
    assert "sliding window" in mistral.notes[0] and from_hf(to_hf(mistral)) == mistral
    assert from_hf(saved("Mistral", sliding_window=4096)).notes == ()
    qwen = {"use_sliding_window": True, "sliding_window": 64}
    assert from_hf(saved("Qwen2", **qwen, max_window_layers=4)).context_length == 64
    assert from_hf(saved("Qwen2", **qwen, max_window_layers=8)).context_length == 512
    assert from_hf(saved("Qwen2", sliding_window=64)).context_length == 512
    layers = {"sliding_window": 64, "layer_types": ["full_attention"] * 7 + ["sliding_attention"]}
    assert from_hf(saved("SmolLM3", **layers)).context_length == 64


def test_yarn_extends_a_context_that_the_config_leaves_unscaled() -> None:
    """Model cards of Qwen tell users to enable YaRN like this."""
    card = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    qwen = {k: v for k, v in saved("Qwen2", max_position_embeddings=32768).items() if k != "rope_parameters"}
    config = from_hf(qwen | {"rope_scaling": card})
    assert (config.context_length, config.max_position_embeddings, config.notes) == (131072, 32768, ())
    assert from_hf(to_hf(config)) == config
    assert from_hf(qwen | {"rope_scaling": card, "max_position_embeddings": 200000}).context_length == 200000
    assert from_hf(qwen | {"rope_scaling": {"type": "linear", "factor": 4.0}}).context_length == 32768


def test_layers_without_rope() -> None:
    config = from_hf(saved("SmolLM3", no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1]))
    assert [config.has_rope(i) for i in range(8)] == [True, False, True, True, False, True, True, True]
    assert from_hf(to_hf(config)) == config
