"""`ModelConfig`: the shape of a decoder, read from a Hugging Face `config.json` (GGUF metadata: `gguf_config`).

Architectures and settings that the decoder does not implement are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from server.errors import BadModel

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Class name in `config.json` -> Transformers' model type."""

MAX_LAYERS = 4096
MAX_POSITIONS = 2**31 - 1
"""Kernels count positions in 32 bits."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """RoPE frequency scaling, with the names and meanings of Transformers' `rope_parameters`.

    `dynamic` equals `default`: the two differ only beyond `max_position_embeddings`, where the served context ends.
    """

    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of the Llama family, with the names of Transformers.

    Attributes:
        attention_bias: q, k and v have biases.
        output_bias: o_proj has a bias.
        mlp_bias: gate, up and down have biases.
        qk_norm: RMSNorm over each head of q and k before RoPE (weights q_norm and k_norm, [head_dim]).
        no_rope_layers: one entry a layer, 1 with RoPE and 0 without; empty means RoPE in all layers.
        sliding_window: window in tokens if any layer uses sliding-window attention.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    no_rope_layers: tuple[int, ...] = ()
    sliding_window: int | None = None

    @property
    def model_type(self) -> str:
        return ARCHITECTURES[self.architecture]

    @property
    def context_length(self) -> int:
        """Longest context in tokens. Ends at the sliding window, because only full attention is implemented."""
        return self._full_context if self.sliding_window is None else min(self._full_context, self.sliding_window)

    @property
    def _full_context(self) -> int:
        """The model's context without the window. YaRN configs often leave `max_position_embeddings` unscaled."""
        scaling, positions = self.rope_scaling, self.max_position_embeddings
        if scaling.type != "yarn":
            return positions
        return max(positions, int((scaling.original_max_position_embeddings or positions) * scaling.factor))

    @property
    def notes(self) -> tuple[str, ...]:
        """Limits of serving this model, for the operator."""
        if self.context_length < self._full_context:
            return (
                f"the context ends at {self.context_length} tokens, the model's sliding window, "
                f"instead of {self._full_context}",
            )
        return ()

    @property
    def kv_values(self) -> int:
        """Number of key and value elements that one token takes over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def has_rope(self, layer: int) -> bool:
        return not self.no_rope_layers or bool(self.no_rope_layers[layer])

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear inside the layers, in execution order."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        layer = {
            "self_attn.q_proj": (queries, self.hidden_size),
            "self_attn.k_proj": (keys, self.hidden_size),
            "self_attn.v_proj": (keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        return {
            f"model.layers.{i}.{name}": shape for i in range(self.num_hidden_layers) for name, shape in layer.items()
        }

    def table_shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (vocab, hidden) of the embedding table and, unless tied, of the output table."""
        tables = ("model.embed_tokens",) if self.tie_word_embeddings else ("model.embed_tokens", "lm_head")
        return dict.fromkeys(tables, (self.vocab_size, self.hidden_size))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of the norms and biases."""
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), self.attention_bias) | {"o_proj": self.output_bias}
        shapes: dict[str, tuple[int, ...]] = {
            f"{path}.bias": (out,)
            for path, (out, _) in self.linear_shapes().items()
            if attention.get(path.rsplit(".", 1)[1], self.mlp_bias)
        }
        for i in range(self.num_hidden_layers):
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[f"model.layers.{i}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"model.layers.{i}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        return shapes


def from_hf(content: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a `config.json` with Transformers' own configuration class.

    Raises:
        BadModel: the architecture or a setting is not supported, or Transformers rejects the content.
    """
    architecture = _architecture(content)
    kind = ARCHITECTURES[architecture]
    _refuse_unsupported(content)
    config = _transformers_config(kind, content)
    heads = config.num_attention_heads
    bias = kind in ("llama", "qwen3", "smollm3") and bool(config.attention_bias)
    theta, scaling = _rope(dict(config.rope_parameters), config.max_position_embeddings)
    return validated(
        ModelConfig(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=kind in ("llama", "smollm3") and config.mlp_bias,
            qk_norm=kind == "qwen3",
            no_rope_layers=tuple(map(int, config.no_rope_layers)) if kind == "smollm3" else (),
            sliding_window=_sliding_window(config, kind),
        )
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json` from which `from_hf` and Transformers read the same model.

    Raises:
        BadModel: no `config.json` can describe the model, because its tensors (biases, norms) are not those of the
            architecture. This happens with GGUF files only.
    """
    defaults = RopeScaling()
    rope = {
        name: value
        for name in RopeScaling.__dataclass_fields__
        if name != "type" and (value := getattr(config.rope_scaling, name)) not in (None, getattr(defaults, name))
    }
    if config.rope_scaling.type != "default":
        rope["factor"] = config.rope_scaling.factor
    copied = (*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "mlp_bias")
    content: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": config.rope_scaling.type, "rope_theta": config.rope_theta, **rope},
        "pad_token_id": None,  # the default of SmolLM3 is beyond a small vocabulary
        "attention_bias": config.attention_bias,
        **{name: getattr(config, name) for name in copied},
    }
    if config.no_rope_layers:
        content["no_rope_layers"] = list(config.no_rope_layers)
    if config.sliding_window is not None:
        layer_types = ["sliding_attention"] * config.num_hidden_layers
        content |= {"sliding_window": config.sliding_window, "use_sliding_window": True, "layer_types": layer_types}
    elif config.model_type == "mistral":
        content["sliding_window"] = None
    again = from_hf(content)
    if lost := [field.name for field in fields(config) if getattr(again, field.name) != getattr(config, field.name)]:
        raise BadModel(
            f"a config.json of {config.architecture} cannot describe this model's {', '.join(lost)}; serve the "
            "original file instead"
        )
    return content


def _architecture(content: Mapping[str, Any]) -> str:
    given, kind = content.get("architectures") or [], content.get("model_type")
    named = [str(name) for name in (given if isinstance(given, list) else [given])]
    if not named:
        named = [name for name, known in ARCHITECTURES.items() if known == kind] or [str(kind)]
    name = next((name for name in named if name in ARCHITECTURES), None)
    if name is None:
        supported = ", ".join(ARCHITECTURES)
        raise BadModel(f"the architecture {', '.join(named)[:200]} is not supported; supported are {supported}")
    if kind is not None and kind != ARCHITECTURES[name]:
        raise BadModel(
            f"config.json contradicts itself: architecture {name} has the model_type {ARCHITECTURES[name]!r}, but it "
            f"says {kind!r}; correct one of the two"
        )
    return name


def _refuse_unsupported(content: Mapping[str, Any]) -> None:
    if quantized := content.get("quantization_config"):
        method = quantized.get("quant_method", "another library") if isinstance(quantized, Mapping) else quantized
        raise BadModel(f"this checkpoint is already quantized ({method}); use the original weights or a GGUF file")
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise BadModel(f"the activation {content['hidden_act']!r} is not supported, only silu (hidden_act)")
    for key, refused in (("per_layer_config", True), ("is_encoder_decoder", True), ("is_causal", False)):
        if key in content and bool(content[key]) is refused:
            raise BadModel(f"{key} {content[key]!r} is not supported")
    for key in _SIZES:
        value = content.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadModel(f"config.json needs a positive whole number as {key}, not {value!r}")
    if content["num_hidden_layers"] > MAX_LAYERS:
        raise BadModel(f"num_hidden_layers is {content['num_hidden_layers']}, the limit is {MAX_LAYERS}")


def _transformers_config(kind: str, content: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    values = {key: value for key, value in content.items() if key not in ("model_type", "architectures")}
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    if old and new:  # Transformers would read rope_scaling alone and lose the rope_theta of rope_parameters
        spelled = [
            {"rope_type" if key == "type" else key: value for key, value in given.items() if key != "rope_theta"}
            for given in (dict(old), dict(new))
        ]
        if spelled[0] != spelled[1]:
            raise BadModel("rope_scaling and rope_parameters of config.json differ; remove the wrong one")
        del values["rope_scaling"]
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # validation errors of several libraries without a common base class
        raise BadModel(f"config.json is not valid: {' '.join(str(error).split())}") from error


def _sliding_window(config: Any, kind: str) -> int | None:
    if kind == "llama":
        return None
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := types - {"full_attention", "sliding_attention"}:
        raise BadModel(f"layers of type {', '.join(sorted(unknown))} are not supported (layer_types)")
    window: int | None = config.sliding_window if kind == "mistral" or "sliding_attention" in types else None
    if window is not None and window < 1:
        raise BadModel(f"sliding_window must be at least 1, not {window}")
    return window


def _rope(parameters: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """Base period and scaling from Transformers' `rope_parameters`."""
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise BadModel("RoPE that differs between layers is not supported (rope_parameters)")
    if parameters.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise BadModel("RoPE on a part of each head is not supported (partial_rotary_factor)")
    theta = parameters.pop("rope_theta", 10000.0)
    if not isinstance(theta, int | float) or theta > 1e300:
        raise BadModel(f"rope_theta must be a number, not {theta!r}")
    parameters.pop("type", None)
    return float(theta), rope_scaling(str(parameters.pop("rope_type", "default")), parameters, max_positions)


def rope_scaling(name: str, parameters: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """The RoPE scaling of type `name`. Parameters that are None or 0 take the default.

    Raises:
        BadModel: the type, a parameter or a value is not supported.
    """
    if name not in ROPE_TYPES:
        raise BadModel(f"the RoPE scaling {name!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if name == "default":
        return RopeScaling()
    given = {key: value for key, value in parameters.items() if value is not None and value != 0}
    given["truncate"] = bool(parameters.get("truncate", True))
    if surplus := sorted(set(given) - set(RopeScaling.__dataclass_fields__)):
        raise BadModel(f"the RoPE scaling {name} has parameters that are not supported: {', '.join(surplus)}")
    needed = {"factor"} | ({"low_freq_factor", "high_freq_factor"} if name == "llama3" else set())
    if missing := sorted(needed - set(given)):
        raise BadModel(f"the RoPE scaling {name} lacks {', '.join(missing)}")
    if name in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", max_positions)
    for key, value in given.items():
        if isinstance(value, bool) != (key == "truncate") or not isinstance(value, int | float):
            raise BadModel(f"{key} of the RoPE scaling {name} must be a number, not {value!r}")
    return RopeScaling(type=name, **given)


def validated(config: ModelConfig) -> ModelConfig:
    """Return `config`. Raises BadModel for values that the decoder cannot compute with."""
    scaling = config.rope_scaling
    numbers = {
        field.name: value
        for source in (config, scaling)
        for field in fields(source)
        if isinstance(value := getattr(source, field.name), int | float) and not isinstance(value, bool)
    }
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise BadModel(f"{name} must be a positive number, not {value}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadModel(
            f"{config.num_attention_heads} attention heads cannot share {config.num_key_value_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise BadModel(f"RoPE needs an even head_dim, not {config.head_dim}")
    if config.no_rope_layers and len(config.no_rope_layers) < config.num_hidden_layers:
        raise BadModel(f"no_rope_layers has {len(config.no_rope_layers)} entries for {config.num_hidden_layers} layers")
    betas = (scaling.beta_fast, scaling.beta_slow)
    if scaling.type == "yarn" and (config.rope_theta <= 1.0 or not all(1e-6 <= beta <= 1e6 for beta in betas)):
        raise BadModel("the RoPE scaling yarn needs a rope_theta above 1 and beta values between 1e-6 and 1e6")
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    if original * max(scaling.factor, 1.0) > MAX_POSITIONS or config.max_position_embeddings > MAX_POSITIONS:
        raise BadModel(f"the context is longer than {MAX_POSITIONS} tokens (max_position_embeddings, RoPE factor)")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.type == "llama3" and low is not None and high is not None and high <= low:
        raise BadModel(f"the RoPE scaling llama3 needs a high_freq_factor above its low_freq_factor {low}, not {high}")
    return config
