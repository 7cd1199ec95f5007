from __future__ import annotations

from typing import Any

import pytest
import transformers

from server.errors import BadModel
from server.model.config import RopeScaling, from_hf, to_hf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 64}
YARN: dict[str, Any] = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def saved(kind: str, **values: Any) -> dict[str, Any]:
    """What Transformers itself writes into config.json."""
    config = getattr(transformers, f"{kind}Config")(
        **{k: v for k, v in LLAMA.items() if k != "architectures"} | {"num_key_value_heads": 2} | values
    )
    return config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_what_transformers_writes_is_read_as_it_means_it(kind: str) -> None:
    values = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    values |= {"sliding_window": None} if kind == "Mistral" else {}
    theirs = saved(kind, **values)
    config = from_hf(theirs)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(config, name) == theirs[name]
    assert config.head_dim == theirs.get("head_dim") or config.head_dim == 16
    assert config.rope_theta == theirs["rope_parameters"]["rope_theta"]
    assert config.rope_scaling == RopeScaling()
    assert config.tie_word_embeddings and config.context_length == 512
    assert (config.attention_bias, config.output_bias) == ((True, False) if kind == "Qwen2" else (False, False))
    assert config.qk_norm is (kind == "Qwen3")
    assert [config.has_rope(i) for i in range(8)] == [kind != "SmolLM3" or i % 4 != 3 for i in range(8)]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
@pytest.mark.parametrize("bias", [False, True])
def test_tensor_names_and_shapes_are_those_of_transformers(kind: str, bias: bool) -> None:
    values: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": None}
    if bias and kind in ("Llama", "Qwen3", "SmolLM3"):
        values["attention_bias"] = True
    if bias and kind in ("Llama", "SmolLM3"):
        values["mlp_bias"] = True
    theirs = saved(kind, **values)
    model_config = getattr(transformers, f"{kind}Config")(**LLAMA | {"num_key_value_heads": 2} | values)
    model = getattr(transformers, f"{kind}ForCausalLM")(model_config)
    config = from_hf(theirs)
    ours: dict[str, tuple[int, ...]] = {f"{p}.weight": s for p, s in config.linear_shapes().items()}
    ours |= {f"{p}.weight": s for p, s in config.table_shapes().items()} | config.tensor_shapes()
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope_type": "dynamic", "factor": 4.0}, RopeScaling("dynamic", 4.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
            RopeScaling("yarn", 4.0, 128, beta_fast=16.0),
        ),
        ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 512)),
        (None, RopeScaling()),
    ],
)
def test_both_spellings_of_rope(old: dict[str, Any] | None, new: RopeScaling) -> None:
    config = from_hf(LLAMA | {"rope_theta": 5000.0, "rope_scaling": old})
    assert (config.rope_theta, config.rope_scaling) == (5000.0, new)
    renamed = {("rope_type" if k == "type" else k): v for k, v in (old or {}).items()}
    assert from_hf(LLAMA | {"rope_parameters": renamed | {"rope_theta": 5000.0}}) == config
    both = {"rope_theta": 5000.0, "rope_scaling": old, "rope_parameters": renamed | {"rope_theta": 5000.0}}
    assert from_hf(LLAMA | both) == config
    assert from_hf(to_hf(config)) == config
    theirs = transformers.LlamaConfig(**to_hf(config))
    assert theirs.rope_parameters["rope_type"] == new.type and theirs.rope_parameters["rope_theta"] == 5000.0


LONG = "x" * 10**6


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": [LONG]},
        {"hidden_size": LONG},
        {"rope_theta": LONG},
        {"hidden_act": LONG},
        {"layer_types": LONG, "architectures": ["Qwen3ForCausalLM"]},
        {"quantization_config": LONG},
        {"rope_scaling": {"type": LONG, "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, LONG: 1}},
        {"rope_scaling": {LONG: {}}},
    ],
)
def test_errors_echo_the_beginning_of_what_is_long(change: dict[str, Any]) -> None:
    with pytest.raises(BadModel) as e:
        from_hf(LLAMA | change)
    assert "x" * 70 in e.value.message and len(e.value.message) < 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not served"),
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 20_000_000}, "num_hidden_layers is 20000000, and the most that is read is 4096"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"head_dim": 15}, "head_dim"),
        # Values of another type than they have anywhere:
        ({"architectures": 5}, "architecture 5 is not served"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not served"),
        ({"hidden_size": ["64"]}, "hidden_size is '64'"),
        ({"hidden_size": []}, "hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number, not None"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0.0, which is no positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"rope_theta": "x"}, "rope_theta must be a number, not 'x'"),
        ({"rope_theta": -1}, "rope_theta -1.0, which is no positive number"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor must be a number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "no positive number"),
        ({"quantization_config": "gptq"}, r"already quantized \(gptq\)"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "x"}, "sliding_window is 'x'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        (QWEN3 | {"max_window_layers": "x"}, "max_window_layers is 'x', not a whole number of at least 0"),
        (QWEN3 | {"layer_types": 5}, "layer_types is 5, not a list"),
        (QWEN3 | {"layer_types": [{}]}, "not served"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": 3}, "no_rope_layers is 3, not a list"),
        # As a README has it added to what Transformers 5 saved, which reads it without that rope_theta:
        (YARN | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling and rope_parameters"),
        (YARN | {"rope_parameters": YARN["rope_scaling"] | {"rope_theta": 5e5}}, "say different things"),
        ({"is_causal": False}, "is_causal"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"attention_bias": "false"}, "attention_bias is 'false', not true or false"),
        ({"mlp_bias": 0}, "mlp_bias is 0, not true or false"),
        (QWEN3 | {"use_sliding_window": "false"}, "use_sliding_window is 'false', not true or false"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
        ({"model_type": "granite"}, "LlamaForCausalLM, whose model_type is 'llama', and model_type 'granite'"),
        # Numbers of which no rotation can be made:
        (YARN | {"rope_theta": 1}, "rope_theta above 1"),
        ({"rope_scaling": YARN["rope_scaling"] | {"attention_factor": "1"}}, "attention_factor must be a number"),
        ({"rope_scaling": YARN["rope_scaling"] | {"beta_fast": "x"}}, "beta_fast must be a number"),
        ({"rope_scaling": YARN["rope_scaling"] | {"truncate": "no"}}, "truncate is 'no', not true or false"),
        ({"rope_scaling": YARN["rope_scaling"] | {"beta_fast": [0]}}, r"beta_fast must be a number, not \[0\]"),
        (
            {"rope_scaling": YARN["rope_scaling"] | {"beta_fast": 1e308}},
            "beta_fast and a beta_slow between 1e-6 and 1e6",
        ),
        ({"rope_scaling": YARN["rope_scaling"] | {"beta_slow": 1e-308}}, "not 32.0 and 1e-308"),
        (YARN | {"original_max_position_embeddings": "x"}, "original_max_position_embeddings is 'x'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor above its low_freq_factor 1.0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor 0.0, which is no positive number"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        from_hf(LLAMA | change)


def test_a_sliding_window_ends_the_context_and_says_so() -> None:
    mistral = from_hf(saved("Mistral", sliding_window=128))
    assert (mistral.context_length, mistral.max_position_embeddings) == (128, 512)
    assert "sliding window" in mistral.notes[0]
    assert from_hf(to_hf(mistral)) == mistral
    assert from_hf(saved("Mistral", sliding_window=4096)).notes == ()
    qwen = {"use_sliding_window": True, "sliding_window": 64}
    assert from_hf(saved("Qwen2", **qwen, max_window_layers=4)).context_length == 64
    assert from_hf(saved("Qwen2", **qwen, max_window_layers=8)).context_length == 512
    assert from_hf(saved("Qwen2", sliding_window=64)).context_length == 512
    for kind in ("Qwen2", "Qwen3", "SmolLM3"):
        for asked in (qwen, {}):
            unknown = {"architectures": [f"{kind}ForCausalLM"], "layer_types": ["chunked_attention"] * 8}
            with pytest.raises(BadModel, match="chunked_attention"):
                from_hf(LLAMA | asked | unknown)


def test_yarn_stretches_the_context_of_a_config_that_leaves_it_as_it_was() -> None:
    """As Qwen's model cards have people switch it on."""
    card = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    qwen = saved("Qwen2", max_position_embeddings=32768)
    told = {name: value for name, value in qwen.items() if name != "rope_parameters"} | {"rope_scaling": card}
    long = from_hf(told)
    assert (long.context_length, long.max_position_embeddings, long.notes) == (131072, 32768, ())
    assert from_hf(to_hf(long)) == long
    assert from_hf(told | {"max_position_embeddings": 131072}).context_length == 131072
    assert from_hf(told | {"max_position_embeddings": 200000}).context_length == 200000
    assert from_hf(told | {"rope_scaling": card | {"factor": 2.5}}).context_length == 81920
    for other in (LLAMA3 | {"original_max_position_embeddings": 8192}, {"type": "linear", "factor": 4.0}):
        assert from_hf(told | {"rope_scaling": other}).context_length == 32768
    window = {"use_sliding_window": True, "sliding_window": 65536, "layer_types": ["sliding_attention"] * 8}
    assert from_hf(told | window).context_length == 65536
    assert from_hf(told | window).notes == (
        "the context ends at 65536 tokens, the model's sliding window, instead of 131072",
    )


@pytest.mark.parametrize(
    "stretched",
    [
        {"factor": 1e5},
        {"factor": 1e308},
        {"original_max_position_embeddings": 10**400},
        {"original_max_position_embeddings": 10**400, "factor": 1e-300},
    ],
)
def test_a_context_that_no_position_can_count_is_refused(stretched: dict[str, Any]) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | stretched
    with pytest.raises(BadModel, match="the RoPE scaling yarn .*2147483647"):
        from_hf(LLAMA | {"rope_scaling": scaling})


def test_a_window_that_smollm3_has_by_its_layers_alone() -> None:
    layers = {"sliding_window": 64, "layer_types": ["full_attention"] * 7 + ["sliding_attention"]}
    told = transformers.SmolLM3Config(num_hidden_layers=8, **layers)
    assert told.sliding_window == 64 and not told.use_sliding_window and told.layer_types[-1] == "sliding_attention"
    assert from_hf(saved("SmolLM3", **layers)).context_length == 64
    assert from_hf(saved("SmolLM3", sliding_window=64, layer_types=["full_attention"] * 8)).context_length == 512
    assert from_hf(saved("SmolLM3", sliding_window=64)).context_length == 512


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_a_sliding_window_that_is_left_out_is_not_one_that_is_null(kind: str) -> None:
    changes = {"max_position_embeddings": 32768, "use_sliding_window": True, "max_window_layers": 0}
    left_out = LLAMA | changes | {"architectures": [f"{kind}ForCausalLM"], "num_key_value_heads": 2}
    told = {name: value for name, value in left_out.items() if name != "architectures"}
    assert getattr(transformers, f"{kind}Config")(**told).sliding_window == 4096
    assert from_hf(left_out).context_length == from_hf(left_out).sliding_window == 4096
    assert "sliding window" in from_hf(left_out).notes[0]
    null = from_hf(left_out | {"sliding_window": None})
    assert null.sliding_window is None and null.context_length == 32768
    if kind != "Mistral":
        assert from_hf(left_out | {"use_sliding_window": False}).context_length == 32768
        assert from_hf(left_out | {"max_window_layers": 8}).context_length == 32768


@pytest.mark.parametrize("truncate", [None, False, True, "left out"])
def test_yarn_truncates_as_transformers_does(truncate: object) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from server.model.rope import frequencies

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0}
    scaling |= {} if truncate == "left out" else {"truncate": truncate}
    config = from_hf(LLAMA | {"head_dim": 64, "rope_parameters": scaling | {"rope_theta": 10000.0}})
    assert config.rope_scaling.truncate is (truncate in (True, "left out"))
    named = {k: v for k, v in LLAMA.items() if k != "architectures"}
    theirs = transformers.LlamaConfig(**named, head_dim=64, rope_parameters=scaling | {"rope_theta": 10000.0})
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    ours, magnitude = frequencies(config)
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-5) and magnitude == pytest.approx(factor)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_transformers_makes_a_model_of_what_is_written(kind: str) -> None:
    """SmolLM3 has a padding token beyond a small vocabulary, unless it is told that there is none."""
    config = from_hf(saved(kind, pad_token_id=None, sliding_window=None))
    written = getattr(transformers, f"{kind}Config")(**to_hf(config))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(written)
    assert theirs.config.vocab_size == 100 and theirs.config.pad_token_id is None


def test_layers_without_rope() -> None:
    config = from_hf(saved("SmolLM3", no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1]))
    assert [config.has_rope(i) for i in range(8)] == [True, False, True, True, False, True, True, True]
    assert from_hf(to_hf(config)) == config
    with pytest.raises(BadModel, match="no_rope_layers"):
        from_hf(LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]})
