"""`ModelConfig`: what a decoder must know of its model, read from a `config.json` (from GGUF metadata: `gguf_config`).

Owns the list of architectures that are served and the refusal, by name, of every other and of every setting that
would change the answers without being implemented. Does not know tensors, files or quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from server.errors import BadModel
from server.model.values import above_zero, cut, real, told, whole

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Class name in `config.json` -> model type."""

MAX_LAYERS = 4096
"""No model has as many, and names are made of all of them before any file is looked at."""
MAX_POSITIONS = 2**31 - 1
"""The lengths of contexts have 32 bits in kernels."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched; the names and meanings are those of Transformers.

    `dynamic` only differs from `default` beyond `max_position_embeddings`, which is where our context ends, since
    frequencies that move with the length of a sequence would make a token's keys depend on what comes after it.
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
    """The shape of a decoder of the Llama family, under the names of Transformers.

    `attention_bias` is the bias of q, k and v, `output_bias` that of o_proj, `mlp_bias` that of gate, up and down.
    `qk_norm` is an RMSNorm over each head of q and k (weights q_norm and k_norm, [head_dim]) before RoPE.
    `no_rope_layers` has one entry a layer, 1 where RoPE is applied and 0 where it is not, as Transformers has it; ask
    `has_rope`. `sliding_window` is set when a layer attends to that many last tokens only.
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
        """Tokens that can be served exactly: a sliding window, which is not implemented, ends the context."""
        return self._stretched if self.sliding_window is None else min(self._stretched, self.sliding_window)

    @property
    def _stretched(self) -> int:
        """The model's context. Where people switch YaRN on, `max_position_embeddings` stays what it was without."""
        scaling, told = self.rope_scaling, self.max_position_embeddings
        if scaling.type != "yarn":
            return told
        return max(told, int((scaling.original_max_position_embeddings or told) * scaling.factor))

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should be told about how this model is served."""
        if self.context_length < self._stretched:
            return (
                f"the context ends at {self.context_length} tokens, the model's sliding window, "
                f"instead of {self._stretched}",
            )
        return ()

    @property
    def kv_values(self) -> int:
        """Numbers that the keys and values of one token are, over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def has_rope(self, layer: int) -> bool:
        return not self.no_rope_layers or bool(self.no_rope_layers[layer])

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear inside the layers, in the order of a step."""
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
        shapes: dict[str, tuple[int, ...]] = {}
        biased = {
            "self_attn.q_proj": self.attention_bias,
            "self_attn.k_proj": self.attention_bias,
            "self_attn.v_proj": self.attention_bias,
            "self_attn.o_proj": self.output_bias,
            "mlp.gate_proj": self.mlp_bias,
            "mlp.up_proj": self.mlp_bias,
            "mlp.down_proj": self.mlp_bias,
        }
        for path, (out, _) in self.linear_shapes().items():
            if biased[path.split(".", 3)[3]]:
                shapes[f"{path}.bias"] = (out,)
        for i in range(self.num_hidden_layers):
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[f"model.layers.{i}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"model.layers.{i}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        return shapes


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face folder, from the content of its `config.json`.

    Reads both spellings of RoPE: `rope_theta` with `rope_scaling`, and the `rope_parameters` of Transformers 5.
    Raises BadModel for another architecture and for a setting that is not served.
    """
    architecture = _architecture(config)
    kind = ARCHITECTURES[architecture]
    _refuse_unserved(config)
    layers = whole(config, "num_hidden_layers", most=MAX_LAYERS)
    heads = whole(config, "num_attention_heads")
    hidden = whole(config, "hidden_size")
    window = _sliding_window(config, kind, layers)
    max_positions = whole(config, "max_position_embeddings")
    theta, scaling = _rope(config, kind, max_positions)
    bias = _truth(config, "attention_bias", False) and kind not in ("mistral", "qwen2")
    return checked(
        ModelConfig(
            architecture=architecture,
            vocab_size=whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole(config, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=whole(config, "num_key_value_heads", default=8 if kind == "mistral" else heads),
            head_dim=whole(config, "head_dim", default=128 if kind == "qwen3" else hidden // heads),
            max_position_embeddings=max_positions,
            rms_norm_eps=above_zero(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_truth(config, "tie_word_embeddings", kind == "smollm3"),
            attention_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=_truth(config, "mlp_bias", False) and kind in ("llama", "smollm3"),
            qk_norm=kind == "qwen3",
            no_rope_layers=no_rope_layers(config, layers) if kind == "smollm3" else (),
            sliding_window=window,
        )
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json` from which `from_hf`, and Transformers, read the same model.

    Raises BadModel, naming what differs, for a model that none can describe: a GGUF file tells by its tensors what a
    `config.json` tells by its architecture.
    """
    scaling = config.rope_scaling
    defaults = RopeScaling()
    rope: dict[str, Any] = {"rope_type": scaling.type, "rope_theta": config.rope_theta}
    for name in RopeScaling.__dataclass_fields__:
        value = getattr(scaling, name)
        if name != "type" and value is not None and (name == "factor" or value != getattr(defaults, name)):
            rope[name] = value
    if scaling.type == "default":
        del rope["factor"]
    content: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "pad_token_id": None,  # SmolLM3's default is beyond a small vocabulary
    }
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "mlp_bias",
    )  # fmt: skip
    content |= {name: getattr(config, name) for name in same}
    content["attention_bias"] = config.attention_bias
    if config.no_rope_layers:
        content["no_rope_layers"] = list(config.no_rope_layers)
    if config.sliding_window is not None:
        content |= {"sliding_window": config.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
    elif config.model_type == "mistral":
        content["sliding_window"] = None
    again = from_hf(content)
    if lost := [field.name for field in fields(config) if getattr(again, field.name) != getattr(config, field.name)]:
        raise BadModel(
            f"no config.json can describe this model: for {config.architecture} there are no words for its "
            f"{', '.join(lost)}; serve its file as it is"
        )
    return content


def _architecture(config: Mapping[str, Any]) -> str:
    given = config.get("architectures") or []
    named = [str(name) for name in (given if isinstance(given, list) else [given])]
    if not named:
        by_type = {kind: name for name, kind in ARCHITECTURES.items()}
        named = [by_type.get(str(config.get("model_type")), str(config.get("model_type")))]
    for name in named:
        if name in ARCHITECTURES:
            kind = config.get("model_type")
            if kind is not None and kind != ARCHITECTURES[name]:  # which Transformers goes by
                raise BadModel(
                    f"config.json says two things: architectures {name}, whose model_type is {ARCHITECTURES[name]!r}, "
                    f"and model_type {cut(repr(kind))}; leave the one that is meant"
                )
            return name
    raise BadModel(f"the architecture {cut(', '.join(named))} is not served; served are {', '.join(ARCHITECTURES)}")


def _truth(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; without one `default`, and false for null. Raises BadModel."""
    return bool(told(config, key, bool, "true or false")) if key in config else default


def _refuse_unserved(config: Mapping[str, Any]) -> None:
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "another library") if isinstance(quantized, Mapping) else quantized
        raise BadModel(
            f"this checkpoint is already quantized ({cut(method)}); give the original weights or a GGUF file"
        )
    if config.get("per_layer_config"):
        raise BadModel("models whose layers differ in their settings are not served (per_layer_config)")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BadModel(f"the activation {cut(repr(activation))} is not served, only silu (hidden_act)")
    if config.get("is_encoder_decoder"):
        raise BadModel("encoder-decoder models are not served")
    if told(config, "is_causal", bool, "true or false") is False:
        raise BadModel("models whose tokens see those after them are not served (is_causal)")


_WINDOW = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}
"""The sliding window of a `config.json` that leaves it out, by model type; null is none."""


def _sliding_window(config: Mapping[str, Any], kind: str, layers: int) -> int | None:
    """The window, if any layer has one."""
    if kind == "llama":
        return None
    types = told(config, "layer_types", list, "a list of names") if kind != "mistral" else None
    unknown = {str(name) for name in types or ()} - {"full_attention", "sliding_attention"}
    if unknown:
        raise BadModel(f"layers of type {cut(', '.join(sorted(unknown)))} are not served (layer_types)")
    asked = kind == "mistral" or _truth(config, "use_sliding_window", False)
    if not asked and not (kind == "smollm3" and types is not None):  # whose layers have it without being asked
        return None
    if config.get("sliding_window", _WINDOW.get(kind)) is None:
        return None
    window = whole(config, "sliding_window", _WINDOW.get(kind))
    if types is not None:
        return window if "sliding_attention" in types else None
    if kind in ("qwen2", "qwen3") and whole(config, "max_window_layers", 28, least=0) >= layers:
        return None
    return window


def no_rope_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """1 for each layer with RoPE and 0 for the others, as listed or by their interval. Raises BadModel."""
    listed = told(config, "no_rope_layers", list, "a list of 0 and 1")
    if listed is None:
        interval = whole(config, "no_rope_layer_interval", 4)
        return tuple(int((i + 1) % interval != 0) for i in range(layers))
    if len(listed) < layers:
        raise BadModel(f"no_rope_layers has {len(listed)} entries for {layers} layers")
    return tuple(int(bool(flag)) for flag in listed[:layers])


def _rope(config: Mapping[str, Any], kind: str, max_positions: int) -> tuple[float, RopeScaling]:
    """Base period and scaling, from either spelling. Where both are there, they must say the same."""
    spelled = [dict(told(config, key, Mapping, "an object with a rope_type") or {}) for key in _SPELLINGS]
    found = [_spelled_rope(given, config, kind, max_positions) for given in spelled if given]
    if len(found) == 2 and found[0] != found[1]:
        # Transformers takes rope_scaling alone then, without the rope_theta in the other.
        raise BadModel(f"{' and '.join(_SPELLINGS)} say different things; leave the one in config.json that is meant")
    return found[0] if found else _spelled_rope({}, config, kind, max_positions)


_SPELLINGS = ("rope_scaling", "rope_parameters")


def _spelled_rope(
    parameters: dict[str, Any], config: Mapping[str, Any], kind: str, max_positions: int
) -> tuple[float, RopeScaling]:
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise BadModel(f"RoPE that differs between layers is not served ({cut(', '.join(sorted(nested)))})")
    theta = _either(parameters, config, "rope_theta", 2000000.0 if kind == "smollm3" else 10000.0)
    rotary = _either(parameters, config, "partial_rotary_factor", 1.0)
    if rotary != 1.0:
        raise BadModel(f"RoPE on a part of each head is not served (partial_rotary_factor {rotary})")
    name = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return theta, scaling_of(str(name), parameters, max_positions)


def _either(parameters: dict[str, Any], config: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0 that is taken out of `parameters`, or else is in `config`."""
    found = [value for value in (parameters.pop(key, None), config.get(key)) if value is not None]
    return above_zero({key: found[0]}, key, default) if found else default


_ZERO_IS_NONE = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def scaling_of(name: str, parameters: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """The RoPE scaling of that name with these parameters, null ones left out. Raises BadModel."""
    if name not in ROPE_TYPES:
        raise BadModel(f"the RoPE scaling {cut(repr(name))} is not served; served are {', '.join(ROPE_TYPES)}")
    if name == "default":
        return RopeScaling()
    allowed = set(RopeScaling.__dataclass_fields__)
    # 0 is as if there were none, where Transformers has it so.
    given = {
        k: v for k, v in parameters.items() if v is not None and not (k in _ZERO_IS_NONE and real({k: v}, k, 1.0) == 0)
    }
    surplus = sorted(set(given) - allowed)
    if surplus:
        raise BadModel(f"the RoPE scaling {name} has parameters that are not served: {cut(', '.join(surplus))}")
    needed = {"factor"} | ({"low_freq_factor", "high_freq_factor"} if name == "llama3" else set())
    missing = sorted(needed - set(given))
    if missing:
        raise BadModel(f"the RoPE scaling {name} lacks {', '.join(missing)}")
    if name in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", max_positions)
    for key in given:
        if key == "original_max_position_embeddings":
            given[key] = whole(given, key)
        elif key != "truncate":
            given[key] = above_zero(given, key, 0.0, of=f"the RoPE scaling {name}")
    given["truncate"] = _truth(parameters, "truncate", True)
    return RopeScaling(type=name, **given)


def checked(config: ModelConfig) -> ModelConfig:
    """The same. Raises BadModel for numbers that no decoder can be made of."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadModel(
            f"{config.num_attention_heads} attention heads cannot share {config.num_key_value_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise BadModel(f"RoPE needs an even head_dim, not {config.head_dim}")
    scaling = config.rope_scaling
    if scaling.type == "yarn" and config.rope_theta <= 1.0:
        raise BadModel(f"the RoPE scaling yarn needs a rope_theta above 1, not {config.rope_theta}")
    if scaling.type == "yarn" and not all(1e-6 <= beta <= 1e6 for beta in (scaling.beta_fast, scaling.beta_slow)):
        raise BadModel(
            "the RoPE scaling yarn needs a beta_fast and a beta_slow between 1e-6 and 1e6, not "
            f"{scaling.beta_fast} and {scaling.beta_slow}"
        )
    original = scaling.original_max_position_embeddings or 0
    if scaling.type == "yarn" and original > MAX_POSITIONS / max(scaling.factor, 1.0):
        raise BadModel(
            f"the RoPE scaling yarn stretches {cut(original)} tokens {scaling.factor} times, "
            f"and the longest context is {MAX_POSITIONS}"
        )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.type == "llama3" and low is not None and high is not None and high <= low:
        raise BadModel(f"the RoPE scaling llama3 needs a high_freq_factor above its low_freq_factor {low}, not {high}")
    return config
