"""Reads and writes PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

Safe for untrusted folders: nothing is unpickled, file sizes are limited, and links may not lead out of the folder.
`peft_config` interprets the config.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from adapters import peft_config
from adapters.atomic_files import replace_file
from adapters.errors import BaseMismatch, InvalidAdapter, StoreFailed, UnsupportedAdapter, error_text, unreadable
from adapters.format_hints import (
    COPY_FILES,
    file_content_hint,
    missing_config_hint,
    missing_tensors_hint,
    outside_error,
    tensor_name_hint,
)
from adapters.peft_config import LoraConfig
from adapters.strict_json import unique_keys
from adapters.weights import LoraWeights, LowRank, all_finite, all_finite_in, not_finite, with_digest

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
TASK_FILE = "task.json"
REQUIRED, OPTIONAL = (CONFIG_FILE, TENSOR_FILE), (TASK_FILE, CARD_FILE)
"""The files of an adapter folder."""

MAX_CONFIG_BYTES = 4 << 20
MAX_TENSOR_BYTES = 8 << 30
MAX_SIDE_BYTES = 1 << 20
MAX_DEPTH = 64
"""Most levels of nested JSON: several recursive readers process it."""
HEADER_SLACK = 16 << 20
"""Bytes for the safetensors header and alignment."""
METADATA_KEY = "loramux"
"""The safetensors header entry with our metadata, as JSON."""
SAVED_METADATA = ("quantization", "training", "composition", "pruning", "auto_lora")
"""The metadata keys in it."""

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
RENAMES = (("base_model.model.", ""), (".base_layer.", "."), (".default.", "."))
"""Parts of tensor names that are removed: a prefix, then segments anywhere."""
TRAINING_ONLY = (".lora_velora_embed", ".lora_monteclora_sampler.")
"""Tensors that PEFT saves for training only."""
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Name parts that training wrappers insert."""
FIRST_WRAPPER = "module"
"""The first name part under DataParallel, DDP and DeepSpeed."""
OTHER_HEADS = {"v_head", "score", "classifier"}
"""Name parts of value and classification heads."""


def read_folder(
    path: Path,
    *,
    name: str,
    max_rank: int = 64,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    stored: bool = False,
) -> LoraWeights:
    """Read and check a PEFT folder.

    Args:
        path: the folder.
        name: the adapter's name.
        max_rank: the highest rank that is accepted.
        shapes: the base's linear layers, path -> (out, in); without it, shapes are not checked.
        stored: whether the adapter was accepted before; it is then read by older rules.

    Returns:
        The weights. Metadata: `honoured` and `harmless` config keys, `notes`, `base`, `card` (README.md), `task`
        (task.json), and `SAVED_METADATA`.

    Raises:
        InvalidAdapter, UnsupportedAdapter, BaseMismatch: the message names the key or tensor.
        StoreFailed: a system error.
    """
    if not path.is_dir():
        raise InvalidAdapter(f"{path.name!r} is not a folder")
    config = _read_file(path, CONFIG_FILE, MAX_CONFIG_BYTES)
    if config is None:
        raise InvalidAdapter(f"{CONFIG_FILE} is missing{missing_config_hint(path, CONFIG_FILE)}", CONFIG_FILE)
    parsed = peft_config.parse(_json_object(config, CONFIG_FILE), stored)
    hint = f", which no adapter of rank {max_rank} (--max-rank) needs" if shapes is not None else ""
    limit = _tensor_limit(shapes, max_rank)
    tensors = _read_file(path, TENSOR_FILE, limit, hint, lambda stream: _check_declared(stream, parsed, shapes))
    if tensors is None:
        if os.path.lexists(path / PICKLE_FILE):
            raise UnsupportedAdapter(
                f"{PICKLE_FILE} is a pickle, which can run code when it is read, and is refused; "
                f"save the adapter as {TENSOR_FILE} (save_pretrained does so by default)",
                PICKLE_FILE,
            )
        raise InvalidAdapter(f"{TENSOR_FILE} is missing{missing_tensors_hint(path)}", TENSOR_FILE)
    weights = _weights(parsed, tensors, name, max_rank, shapes)
    card = _read_file(path, CARD_FILE, MAX_SIDE_BYTES)
    task = _read_file(path, TASK_FILE, MAX_SIDE_BYTES)
    side = {
        "card": card.decode("utf-8", "replace") if card is not None else None,
        "task": _json_object(task, TASK_FILE) if task is not None else None,
    }
    return replace(weights, metadata={**weights.metadata, **side})


def _weights(
    parsed: LoraConfig, data: bytes, name: str, max_rank: int, shapes: Mapping[str, tuple[int, int]] | None
) -> LoraWeights:
    """Build the adapter from the bytes of its tensor file."""
    found, header = _load(data)
    pairs = _pairs(found, parsed, shapes)
    modules = list(pairs)
    _check_complete(pairs, peft_config.select(parsed, modules if shapes is None else list(shapes)), parsed.partial)
    sizes = peft_config.ranks_and_scales(parsed, modules)
    result = {}
    for module, (a, b) in pairs.items():
        rank, scale = sizes[module]
        _check_pair(module, a, b, rank, max_rank)
        if not abs(scale) < 1e30:
            raise InvalidAdapter(f"lora_alpha gives {module} a scale of {scale:g}, which is out of range", "lora_alpha")
        result[module] = LowRank(a, b, scale)
    if not _all_finite(data, found) and (bad := not_finite(result)) is not None:
        raise InvalidAdapter(f"{bad[0]}.lora_{bad[1]} has values that are not finite (NaN or infinity)", bad[0])
    made = _json_object(header[METADATA_KEY].encode(), TENSOR_FILE) if METADATA_KEY in header else {}
    metadata = {
        "honoured": list(parsed.honoured),
        "harmless": list(parsed.harmless),
        "notes": list(parsed.notes),
        "base": parsed.base,
        "card": None,
        "task": None,
        **{key: made.get(key) for key in SAVED_METADATA},
    }
    return with_digest(name, result, metadata)


def _tensor_limit(shapes: Mapping[str, tuple[int, int]] | None, max_rank: int) -> int:
    """Return the bytes of the largest tensor file that can be served."""
    if shapes is None:
        return MAX_TENSOR_BYTES
    return sum(4 * max_rank * (out + into) for out, into in shapes.values()) + HEADER_SLACK


def _read_file(
    folder: Path, file: str, limit: int, hint: str = "", too_large: Callable[[BinaryIO], None] = lambda stream: None
) -> bytes | None:
    """Read a file of the folder; None if it does not exist. Raises InvalidAdapter, StoreFailed.

    `hint` explains the limit; `too_large` may inspect a file over the limit and raise a better error.
    """
    descriptor = open_inside(folder / file, folder, "its folder")
    if descriptor is None:
        return None
    try:
        with open(descriptor, "rb") as stream:
            size = os.fstat(descriptor).st_size
            if size > limit:
                too_large(stream)
                raise InvalidAdapter(f"{file} has {size:,} bytes, over the limit of {limit:,}{hint}", file)
            data = stream.read(size + 1)  # one more, to notice a file that grows
    except OSError as error:
        raise unreadable(file, error) from error
    if len(data) > size:
        raise InvalidAdapter(f"{file} grew while it was read", file)
    return data


def open_inside(path: Path, within: Path | None, where: str = "the adapter directory") -> int | None:
    """Open a regular file for reading and return its descriptor; None if it does not exist.

    With `within`, links may not lead out of that folder, which the message calls `where`. Raises InvalidAdapter,
    StoreFailed.
    """
    try:
        real = path.resolve(strict=True)
        if within is not None and not real.is_relative_to(within.resolve()):
            raise InvalidAdapter(outside_error(path.name, where), path.name)
        # O_NONBLOCK: a pipe must not block the thread. O_NOFOLLOW: the path may have changed meanwhile.
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise InvalidAdapter(f"{path.name} is a link to nothing{COPY_FILES}", path.name) from None
        return None
    except (OSError, RuntimeError) as error:
        raise unreadable(path.name, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidAdapter(f"{path.name} is not a regular file", path.name)
    return fd


def _json_object(data: bytes, file: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, lone surrogates or deep nesting. Raises InvalidAdapter."""
    try:
        value = json.loads(data, object_pairs_hook=unique_keys)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidAdapter(f"{file} holds half of a surrogate pair, which is not valid text", file) from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{file} is not valid JSON: {error}", file) from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{file} must hold an object", file)
    if _is_deeper(value, MAX_DEPTH):
        raise InvalidAdapter(f"{file} is nested more than {MAX_DEPTH} levels deep", file)
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a JSON value is nested deeper than `levels`."""
    inside = [value]
    for _ in range(levels):
        inside = [x for v in inside for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return any(isinstance(v, dict | list) for v in inside)


def _load(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its metadata. Raises InvalidAdapter."""
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        why = file_content_hint(data) or str(error)
        raise InvalidAdapter(f"{TENSOR_FILE} is damaged or not a safetensors file: {why}", TENSOR_FILE) from error
    return tensors, header


def _all_finite(data: bytes, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Check the whole buffer at once, which is faster than hundreds of small tensors.

    False if a value is not finite, or if the tensors have several dtypes.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    start = 8 + int.from_bytes(data[:8], "little")
    return len(dtypes) == 1 and dtypes <= DTYPES and all_finite_in(memoryview(data)[start:], dtypes.pop())


def _check_declared(stream: BinaryIO, parsed: LoraConfig, shapes: Mapping[str, tuple[int, int]] | None) -> None:
    """Raise errors that the header of a safetensors file shows. A damaged header is ignored."""
    length = int.from_bytes(stream.read(8), "little")
    if length > HEADER_SLACK:
        return
    try:
        header = json.loads(stream.read(length))
        declared = {
            key: torch.empty(entry["shape"], device="meta") for key, entry in header.items() if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError, OverflowError):
        return
    _pairs(declared, parsed, shapes)


def normalised(key: str) -> str:
    """Return a tensor's name without the parts in `RENAMES`."""
    prefix, replacement = RENAMES[0]
    if key.startswith(prefix):
        key = replacement + key.removeprefix(prefix)
    for part, replacement in RENAMES[1:]:
        key = key.replace(part, replacement)
    return key


def _pairs(
    tensors: Mapping[str, torch.Tensor], parsed: LoraConfig, shapes: Mapping[str, tuple[int, int]] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return module path -> (A, B), sorted. Raises for other tensors, and for modules that the base does not have."""
    halves = _halves(tensors)
    pairs = {module: (tensors[half["lora_A"]], tensors[half["lora_B"]]) for module, half in sorted(halves.items())}
    if shapes is not None:
        peft_config.check_names(parsed, list(pairs), list(shapes))
        _check_shapes(pairs, shapes, parsed.base)
    return pairs


def _halves(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return module path -> "lora_A" / "lora_B" -> tensor key. Raises for tensors that are not such pairs."""
    names = {key: normalised(key) for key in sorted(keys)}
    for key, name in names.items():  # first: PEFT saves the embedding beside a LoRA on it
        if (head := _head_of(key, name)) is not None:
            raise peft_config.head_error(head, key)
    halves: dict[str, dict[str, str]] = {}
    for key, name in names.items():
        _check_unwrapped(key, name)
        for kind in ("lora_A", "lora_B"):
            module = name.removesuffix(f".{kind}.weight")
            if module and module != name:
                if kind in halves.setdefault(module, {}):
                    raise InvalidAdapter(f"{TENSOR_FILE}: {name} is there twice, once as {key}", key)
                halves[module][kind] = key
                break
        else:
            if not any(part in name for part in TRAINING_ONLY):
                _refuse_tensor(key, name)
    if not halves:
        raise InvalidAdapter(f"{TENSOR_FILE} holds no LoRA tensors", TENSOR_FILE)
    for module, half in halves.items():
        for kind in ("lora_A", "lora_B"):
            if kind not in half:
                raise InvalidAdapter(f"{TENSOR_FILE}: {module}.{kind}.weight is missing", module)
    return halves


def _head_of(key: str, name: str) -> str | None:
    """Return the head or embedding that a tensor adapts or copies, or None."""
    module, found, _ = name.partition(".lora_")
    if not found and ".base_layer." in key:
        module, found, _ = name.rpartition(".")
    return module if found and peft_config.HEADS.fullmatch(module) else None


def _check_unwrapped(key: str, name: str) -> None:
    """Raise InvalidAdapter for a name with a part that a training wrapper inserted."""
    if name.startswith(RENAMES[0][0]):
        raise InvalidAdapter(
            f"{TENSOR_FILE}: {key} is wrapped by PEFT twice: merge_and_unload the first adapter, or unwrap the model, "
            "before training",
            key,
        )
    parts = name.split(".")
    found = next(((part, WRAPPERS[part]) for part in parts if part in WRAPPERS), None)
    if found is None and parts[0] == FIRST_WRAPPER:
        found = (FIRST_WRAPPER, "DataParallel, DDP or DeepSpeed")
    if found is not None:
        raise InvalidAdapter(
            f"{TENSOR_FILE}: {key} has {found[0]!r} in its name, from {found[1]}: unwrap the model before saving",
            key,
        )


def _refuse_tensor(key: str, name: str) -> None:
    """Raise for a tensor that is not a lora_A or lora_B weight, with a reason from its name."""
    reasons = {
        "lora_magnitude_vector": "DoRA rescales the base's columns: it is not a sum of B A x; retrain without it",
        "lora_embedding_": "LoRA on embeddings is not served; retrain without that target",
        "lora_B.bias": "lora_bias is not served; retrain without it",
    }
    for part, why in reasons.items():
        if part in name:
            raise UnsupportedAdapter(f"{TENSOR_FILE}: {key} is not served: {why}", key)
    if not OTHER_HEADS.isdisjoint(name.split(".")):
        raise UnsupportedAdapter(
            f"{TENSOR_FILE}: {key} is not served: it is a classification or value head; leave it out if only "
            "training used it, else retrain with task_type CAUSAL_LM",
            key,
        )
    module, _, last = name.rpartition(".")
    if peft_config.HEADS.fullmatch(module) or "modules_to_save" in name:
        raise UnsupportedAdapter(
            f"{TENSOR_FILE}: {key} is not served: it replaces a whole module of the base; if it is the base's own, "
            "save with save_embedding_layers=False, and if it was trained or resized, retrain without it",
            key,
        )
    if last == "bias":
        raise UnsupportedAdapter(
            f"{TENSOR_FILE}: {key} is not served: a trained bias is not a low-rank update; retrain with bias='none'",
            key,
        )
    why = tensor_name_hint(name) or "save the adapter with save_pretrained"
    raise InvalidAdapter(f"{TENSOR_FILE}: {key} is not a lora_A or lora_B weight; {why}", key)


def _check_complete(pairs: Mapping[str, object], expected: list[str], partial: bool) -> None:
    """Raise InvalidAdapter unless the tensors match the modules that the config adapts (some, if `partial`)."""
    wanted = set(expected)
    surplus = [module for module in pairs if module not in wanted]
    if surplus:
        raise InvalidAdapter(
            f"{TENSOR_FILE} has tensors for {len(surplus)} modules that the config does not adapt, "
            f"for example {surplus[0]!r}",
            surplus[0],
        )
    missing = [module for module in expected if module not in pairs]
    if missing and not partial:
        raise InvalidAdapter(
            f"{TENSOR_FILE} lacks the tensors of {len(missing)} modules that the config adapts, "
            f"for example {missing[0]!r}; save the whole adapter again, or name them in exclude_modules if they were "
            "not trained",
            missing[0],
        )


def _check_shapes(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], shapes: Mapping[str, tuple[int, int]], base: str | None
) -> None:
    """Raise BaseMismatch for matrices whose sizes differ from the base's."""
    for module, (a, b) in pairs.items():
        if a.ndim == b.ndim == 2 and a.numel() and b.numel() and (b.shape[0], a.shape[1]) != tuple(shapes[module]):
            trained_on = f" It was trained on {base!r}." if base else ""
            raise BaseMismatch(
                f"the adapter was made for another base: {module} is {list(shapes[module])} (out, in) in the base and "
                f"{[b.shape[0], a.shape[1]]} in the adapter.{trained_on}"
            )


def _check_pair(module: str, a: torch.Tensor, b: torch.Tensor, rank: int, max_rank: int) -> None:
    """Raise for a wrong dtype, shape or rank, a rank over the limit, and empty tensors."""
    for kind, tensor in (("lora_A", a), ("lora_B", b)):
        if tensor.dtype not in DTYPES:
            raise UnsupportedAdapter(
                f"{module}.{kind} is {str(tensor.dtype).removeprefix('torch.')}, not float32, bfloat16 or float16; "
                "cast it to one of these and save again",
                module,
            )
        if tensor.ndim != 2:
            raise InvalidAdapter(
                f"{module}.{kind} has the shape {list(tensor.shape)}; it must be a matrix{_gather_hint(tensor)}", module
            )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise InvalidAdapter(
            f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, but the config gives the rank {rank}"
            f"{_gather_hint(a, b)}",
            module,
        )
    if rank > max_rank:
        raise InvalidAdapter(f"{module} has the rank {rank}, over the limit of {max_rank} (--max-rank)", module)
    if 0 in (b.shape[0], a.shape[1]):
        raise InvalidAdapter(
            f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: empty{_gather_hint(a, b)}", module
        )


def _gather_hint(*tensors: torch.Tensor) -> str:
    """Return advice if a tensor is empty, as shards of other processes are."""
    if all(tensor.numel() for tensor in tensors):
        return ""
    return "; an empty shard of ZeRO-3 or FSDP: gather the parameters before saving"


def to_bytes(
    weights: LoraWeights,
    *,
    dtype: torch.dtype | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[bytes, bytes]:
    """Return the contents of config and tensor file. `peft` and `read_folder` read them back as the same version.

    The most common rank and alpha become `r` and `lora_alpha`; others go into the patterns.

    Args:
        weights: the adapter.
        dtype: converts the tensors, which changes the version.
        shapes: the base's linear layers; target_modules are then short names, if they mean the same modules.

    Raises:
        InvalidAdapter: a value is not finite (in `dtype`).
    """
    modules = weights.modules
    alphas = {path: _alpha(m.scale, m.rank) for path, m in modules.items()}
    r = Counter(m.rank for m in modules.values()).most_common(1)[0][0]
    alpha = Counter(a for path, a in alphas.items() if modules[path].rank == r).most_common(1)[0][0]
    short = set(weights.targets)
    whole = shapes is not None and {p for p in shapes if p.rsplit(".", 1)[-1] in short} == set(modules)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": weights.metadata.get("base"),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "target_modules": sorted(short) if whole else sorted(modules),
        "rank_pattern": {path: m.rank for path, m in modules.items() if m.rank != r},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
    }
    tensors = {}
    for path, m in modules.items():
        for kind, tensor in (("lora_A", m.A), ("lora_B", m.B)):
            key = f"base_model.model.{path}.{kind}.weight"
            tensors[key] = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
            if not all_finite(tensors[key]):
                raise InvalidAdapter(f"{path}.{kind} would have values that are not finite (NaN or infinity)", path)
    made = {k: weights.metadata[k] for k in SAVED_METADATA if weights.metadata.get(k) is not None}
    header = {"format": "pt"} | ({METADATA_KEY: json.dumps(made, sort_keys=True)} if made else {})
    return json.dumps(config, indent=1).encode() + b"\n", safetensors.torch.save(tensors, metadata=header)


def _alpha(scale: float, rank: int) -> int | float:
    """Return the alpha for which alpha / rank is `scale`, an integer if exact."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def save(
    weights: LoraWeights,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    card: str | None = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT folder (see `to_bytes`), with README.md and task.json if given or in the metadata.

    Each file is replaced atomically, the config last. Raises InvalidAdapter before anything is written, StoreFailed.
    """
    config, tensors = to_bytes(weights, dtype=dtype, shapes=shapes)
    card = card if card is not None else weights.metadata.get("card")
    task = task if task is not None else weights.metadata.get("task")
    files = {TENSOR_FILE: tensors}
    if card is not None:
        files[CARD_FILE] = card.encode()
    if task is not None:
        files[TASK_FILE] = (json.dumps(task, indent=1, ensure_ascii=False) + "\n").encode()
    files[CONFIG_FILE] = config
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            replace_file(path / file, data)
    except OSError as error:
        raise StoreFailed(f"the adapter could not be written: {error_text(error)}") from error
