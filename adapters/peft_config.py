"""Interprets PEFT's `adapter_config.json` (PEFT 0.21): which modules it adapts, with which ranks and scales.

Every key is honoured, harmless, or refused by name. The tests compare with PEFT, which is not imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from adapters import patterns
from adapters.errors import BaseMismatch, InvalidAdapter, UnsupportedAdapter, shortened

MAX_LIST = 16_384
"""Most entries of a list or pattern table; more than any model has linear layers."""
MAX_RANK = 1 << 20
"""Highest rank that is parsed. `--max-rank` is the limit for serving."""
ALL_LINEAR = "all-linear"

HONOURED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules "
    "layers_to_transform layers_pattern".split()
)

HARMLESS: Mapping[str, str] = {
    "lora_dropout": "acts in training only",
    "inference_mode": "acts in training only",
    "peft_version": "names the writer of the file",
    "revision": "names the base's revision",
    "task_type": "picks a class in PEFT",
    "auto_mapping": "picks a class in PEFT",
    "base_model_name_or_path": "names the base; its shapes are checked",
    "fan_in_fan_out": "acts on Conv1D layers only, and no served base has any",
    "init_lora_weights": "sets the first values of A and B, which training has replaced",
    "eva_config": "is used by init_lora_weights 'eva' only",
    "loftq_config": "is used by init_lora_weights 'loftq' only",
    "corda_config": "is used by init_lora_weights 'corda' only",
    "lora_ga_config": "is used by init_lora_weights 'lora_ga' only",
    "velora_config": "changes the backward pass only",
    "monteclora_config": "samples in training only; the learned mean is B A",
    "qalora_group_size": "is used with use_qalora only",
    "megatron_core": "is used with megatron_config only",
    "ensure_weight_tying": "acts on heads and embeddings, whose tensors are refused",
}

REFUSED: Mapping[str, str] = {
    "bias": 'a trained bias is not a low-rank update; if none was trained, set "none"',
    "use_dora": "DoRA rescales the base's columns, which is not a sum of B A x; retrain without it",
    "lora_bias": "a bias on B is not a low-rank update; retrain without it",
    "modules_to_save": "it replaces whole modules of the base; retrain without it",
    "trainable_token_indices": "it replaces rows of the embedding; retrain without it",
    "alora_invocation_tokens": "an activated LoRA starts in the middle of a sequence; retrain without it",
    "target_parameters": "it adapts parameters that are not linear layers; retrain with target_modules only",
    "layer_replication": "it changes the base's layers; retrain without it, on the served base",
    "use_qalora": "QA-LoRA pools its inputs before A; retrain without it",
    "use_bdlora": "block-diagonal factors are not served; retrain without it",
    "arrow_config": "Arrow selects adapters per token; retrain without it",
    "kasa_config": "KaSA truncates the base's weights; retrain without it",
    "megatron_config": "Megatron's parallel layers are not served; retrain without it",
}

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
"""Values of otherwise refused keys that have no effect, besides null, false and empty values."""

ON_WHEN_EMPTY = frozenset({"arrow_config", "kasa_config", "use_bdlora"})
"""Keys for which PEFT reads an empty object as the defaults."""

STORED: Mapping[str, tuple[Any, ...]] = {
    **NEUTRAL,
    **dict.fromkeys(ON_WHEN_EMPTY, ({},)),
    "bias": ("none", "all", "lora_only", None, False, "", [], {}),
}
"""The same for stored adapters, which were accepted by older rules; their tensors show that nothing was trained."""

SAFE_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false"})
BASE_CHANGING_INITS = re.compile(r"(pissa(_niter_\d+)?|olora|loftq|corda|lora_ga)")

HEADS = re.compile(r"(.*\.)?(lm_head|embed_tokens|wte|word_embeddings|embed_out)")
"""Output heads and embeddings. LoRA on them is refused."""
BASE_HEADS = ("model.embed_tokens", "lm_head")
"""The heads of the served bases."""


@dataclass(frozen=True)
class LoraConfig:
    """The parsed config.

    Attributes:
        r, alpha, rslora, rank_pattern, alpha_pattern: as in PEFT; patterns are in file order.
        target_modules, exclude_modules: a set of names, a pattern, or "all-linear".
        layers, layers_pattern: layers_to_transform (None is all) and layers_pattern.
        partial: whether adapted modules may have no tensors (EVA).
        base: the name of the base that it was trained on.
        honoured, harmless: the keys that were present.
        notes: remarks for users.
    """

    r: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    partial: bool = False
    base: str | None = None
    honoured: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def parse(raw: object, stored: bool = False) -> LoraConfig:
    """Parse a decoded adapter_config.json. Raises UnsupportedAdapter or InvalidAdapter, naming the key.

    `stored` configs were accepted by an older version and are parsed by its rules.
    """
    if not isinstance(raw, dict):
        raise InvalidAdapter("adapter_config.json must hold an object: PEFT's LoraConfig", "adapter_config.json")
    config: dict[str, Any] = raw
    kind = config.get("peft_type")
    if kind is None:
        mlx = ", but one of mlx-lm: convert the adapter to PEFT's format" if "lora_parameters" in config else ""
        raise InvalidAdapter(f"peft_type is missing: this is not an adapter_config.json of PEFT{mlx}", "peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"peft_type {kind!r} is not served; only LORA is", "peft_type")
    honoured, harmless = _sort_keys(config, STORED if stored else NEUTRAL)
    notes = []
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is ignored, as PEFT does on plain linear layers")
    targets = _targets(config.get("target_modules"), "target_modules")
    layers = _layers(config.get("layers_to_transform"))
    layers_pattern = _layers_pattern(config.get("layers_pattern"))
    if isinstance(targets, str) and (layers is not None or layers_pattern):
        key = "layers_pattern" if layers is None else "layers_to_transform"
        raise InvalidAdapter(f"{key} cannot be used when target_modules is a pattern (PEFT refuses it too)", key)
    if layers_pattern and config.get("layers_to_transform") is None:
        raise InvalidAdapter("layers_pattern needs layers_to_transform (PEFT refuses it too)", "layers_pattern")
    if not targets:
        raise InvalidAdapter("target_modules is missing or empty; name the adapted modules", "target_modules")
    excluded = config.get("exclude_modules")
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        r=_rank(config.get("r", 8), "r"),
        alpha=_number(config.get("lora_alpha", 8), "lora_alpha"),
        rslora=_flag(config.get("use_rslora"), "use_rslora"),
        rank_pattern=_table(config.get("rank_pattern"), "rank_pattern", _rank),
        alpha_pattern=_table(config.get("alpha_pattern"), "alpha_pattern", _number),
        target_modules=targets,
        exclude_modules=_targets(excluded, "exclude_modules") if excluded else frozenset(),
        layers=layers,
        layers_pattern=layers_pattern,
        # EVA gives some modules rank 0 and saves no tensors for them; PEFT may still name them in target_modules.
        partial=config.get("init_lora_weights") == "eva",
        base=shortened(base) if isinstance(base, str) and base else None,
        honoured=tuple(honoured),
        harmless=tuple(shortened(key) for key in harmless),
        notes=tuple(notes),
    )


def _sort_keys(config: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> tuple[list[str], list[str]]:
    """Return the honoured and the harmless keys, sorted; refuse all others."""
    honoured: list[str] = []
    harmless: list[str] = []
    for key in sorted(config):
        value = config[key]
        if key in HONOURED:
            (harmless if _is_empty(value) else honoured).append(key)
        elif key == "init_lora_weights":
            _check_init(value)
            harmless.append(key)
        elif key in HARMLESS or any(_same(value, v) for v in neutral.get(key, ())):
            harmless.append(key)
        elif _is_empty(value) and key != "bias" and not (key in ON_WHEN_EMPTY and value == {}):  # PEFT refuses it
            harmless.append(key)
        else:
            shown = repr(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            reason = REFUSED.get(key, "the key is unknown; remove it if the adapter does not need it")
            raise UnsupportedAdapter(f"{key} = {shown} is not served: {reason}", key)
    return honoured, harmless


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default


def _is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _check_init(value: object) -> None:
    name = str(value).lower()
    if value is None or name in SAFE_INITS:
        return
    if BASE_CHANGING_INITS.fullmatch(name):
        raise UnsupportedAdapter(
            f"init_lora_weights = {value!r} is not served: it changes the base's weights, and the adapter only works "
            "on the changed ones; convert it with save_pretrained(..., path_initial_model_for_weight_conversion)",
            "init_lora_weights",
        )
    raise UnsupportedAdapter(
        f"init_lora_weights = {str(value)[:80]!r} is unknown; it may change the base's weights", "init_lora_weights"
    )


def _rank(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidAdapter(f"{key}: a rank must be a positive integer, not {repr(value)[:80]}", key)
    if value > MAX_RANK:
        raise InvalidAdapter(f"{key}: a rank of {str(value)[:80]} is out of range", key)
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or not math.isfinite(value):
        raise InvalidAdapter(f"{key} must be a finite number, not {repr(value)[:80]}", key)
    return float(value)


def _flag(value: object, key: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidAdapter(f"{key} must be true or false, not {repr(value)[:80]}", key)
    return bool(value)


def _table(value: object, key: str, read: Callable[[object, str], Any]) -> tuple[tuple[str, Any], ...]:
    """Parse a pattern table. The first entry that matches a module counts."""
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_LIST:
        raise InvalidAdapter(f"{key} must be an object of at most {MAX_LIST} entries", key)
    return tuple((pattern, read(number, f"{key}[{pattern[:80]!r}]")) for pattern, number in value.items())


def _targets(value: object, key: str) -> str | frozenset[str]:
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR and key == "target_modules" else value
    if not isinstance(value, list) or len(value) > MAX_LIST or not all(isinstance(v, str) and v for v in value):
        raise InvalidAdapter(f"{key} must be a pattern or a list of at most {MAX_LIST} names", key)
    return frozenset(value)


def _layers(value: object) -> frozenset[int] | None:
    """Return the adapted layers; None (also for an empty list) is all of them."""
    key = "layers_to_transform"
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > MAX_LIST or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise InvalidAdapter(f"{key} must be an integer or a list of at most {MAX_LIST} integers", key)
    return frozenset(numbers) or None


def _layers_pattern(value: object) -> tuple[str, ...]:
    key = "layers_pattern"
    if value is None or value == "":
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > 64 or not all(isinstance(v, str) for v in found):
        raise InvalidAdapter(f"{key} must be a name or a list of names", key)
    return tuple(found)


def select(config: LoraConfig, names: Sequence[str]) -> list[str]:
    """Return the module names that the config adapts, in order, by PEFT's rules.

    As in PEFT, a target that is a whole module path is adapted whatever layers_to_transform is.

    Raises:
        InvalidAdapter: a pattern is invalid or too slow.
        UnsupportedAdapter: a target list includes a head of the base.
    """
    if isinstance(config.target_modules, frozenset) and (heads := _adapted(config, BASE_HEADS)):
        raise head_error(heads[0], "target_modules")
    return _adapted(config, names)


def head_error(module: str, key: str) -> UnsupportedAdapter:
    """Return the error for LoRA on an output head or embedding, found at the config key or tensor `key`."""
    named = ", or remove it from there if it has no tensors" if key == "target_modules" else ""
    return UnsupportedAdapter(
        f"LoRA on an output head or embedding ({module!r}) is not served: retrain without that target{named}", key
    )


def _adapted(config: LoraConfig, names: Sequence[str]) -> list[str]:
    hits = _hits(config.target_modules, names, "target_modules")
    targeted = [name for name, hit in zip(names, hits, strict=True) if hit]
    if not targeted:
        return []
    excluded = _hits(config.exclude_modules, targeted, "exclude_modules")
    chosen = [name for name, hit in zip(targeted, excluded, strict=True) if not hit]
    if config.layers is None or isinstance(config.target_modules, str):
        return chosen
    layer_of = _layer_numbers(config.layers_pattern, chosen)
    return [n for n in chosen if n in config.target_modules or layer_of[n] in config.layers]


def _hits(wanted: str | frozenset[str], names: Sequence[str], key: str) -> list[bool]:
    if isinstance(wanted, str):
        if key == "target_modules" and wanted == ALL_LINEAR:
            return [HEADS.fullmatch(name) is None for name in names]
        return patterns.full_matches(wanted, names, key)
    return [any(suffix in wanted for suffix in _suffixes(name)) for name in names]


@lru_cache(maxsize=8192)
def _suffixes(name: str) -> tuple[str, ...]:
    """Return the name and its suffixes after each dot: a.b.c, b.c, c."""
    parts = name.split(".")
    return tuple(".".join(parts[i:]) for i in range(len(parts)))


def _layer_numbers(layers_pattern: tuple[str, ...], names: Sequence[str]) -> dict[str, int | None]:
    """Return each name's layer number: the first one after a part that matches layers_pattern (default any)."""
    if layers_pattern:
        return dict(zip(names, patterns.layer_numbers(layers_pattern, names, "layers_pattern"), strict=True))
    # PEFT's default pattern requires a prefix before the layer list, so the number is at least the third part.
    return {n: next((int(p) for p in n.split(".")[2:-1] if p.isdecimal()), None) for n in names}


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return the scale of an update: alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def ranks_and_scales(config: LoraConfig, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return each module's (rank, scale)."""
    rank_at = patterns.first_suffix_match([p for p, _ in config.rank_pattern], names, "rank_pattern")
    alpha_at = patterns.first_suffix_match([p for p, _ in config.alpha_pattern], names, "alpha_pattern")
    result = {}
    for name, i, j in zip(names, rank_at, alpha_at, strict=True):
        rank = config.r if i is None else config.rank_pattern[i][1]
        alpha = config.alpha if j is None else config.alpha_pattern[j][1]
        result[name] = (rank, scale_of(alpha, rank, config.rslora))
    return result


def check_names(config: LoraConfig, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise BaseMismatch if a module in `names` is not in the base (`known`)."""
    have = set(known)
    missing = [name for name in names if name not in have]
    if missing:
        trained_on = f" It was trained on {config.base!r}." if config.base else ""
        raise BaseMismatch(
            f"the adapter has {len(missing)} modules that this base does not have, for example {missing[0]!r}."
            f"{trained_on}"
        )
