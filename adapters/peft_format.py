"""Reads and writes LoRA adapters as PEFT does: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Owns which files are opened and how, tensor names and the checks on tensors. Nothing is unpickled, no file is read
before its size is known, and no link is followed out of the folder. What the config means is in `peft_config`.
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
from adapters.errors import BaseMismatch, InvalidAdapter, StoreFailed, UnsupportedAdapter, reason, unreadable
from adapters.format_hints import COPY_FILES, foreign, leads_out, no_config, no_tensors, not_safetensors
from adapters.peft_config import LoraConfig
from adapters.strict_json import once
from adapters.weights import LoraWeights, LowRank, all_finite, all_finite_in, not_finite, with_digest

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
TASK_FILE = "task.json"
REQUIRED, OPTIONAL = (CONFIG_FILE, TENSOR_FILE), (TASK_FILE, CARD_FILE)
"""The files of an adapter's folder."""

MAX_CONFIG_BYTES = 4 << 20
MAX_TENSOR_BYTES = 8 << 30
MAX_SIDE_BYTES = 1 << 20
MAX_DEPTH = 64
"""Levels of JSON. What tells of an adapter is walked by several readers that call themselves."""
HEADER_SLACK = 16 << 20
"""What a safetensors header and alignment may take over the tensors themselves."""
METADATA_KEY = "loramux"
"""The entry of a safetensors header that holds what we know of how the adapter was made, as JSON."""
MADE = ("quantization", "training", "composition", "pruning", "auto_lora")
"""The metadata in it."""

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
RENAMES = (("base_model.model.", ""), (".base_layer.", "."), (".default.", "."))
"""What other writers put into tensor names: a leading prefix, and segments anywhere."""
TRAINING_ONLY = (".lora_velora_embed", ".lora_monteclora_sampler.")
"""Parts of the names of tensors that PEFT saves and reads in training alone."""
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
FIRST_WRAPPER = "module"
"""What DataParallel, DDP and DeepSpeed put before all other parts of a name."""
OTHER_HEADS = {"v_head", "score", "classifier"}
"""Parts of the names of heads that are put onto a language model or in the place of its own."""


def read_folder(
    path: Path,
    *,
    name: str,
    max_rank: int = 64,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    stored: bool = False,
) -> LoraWeights:
    """The adapter in a PEFT folder. `shapes` maps the base's linear layers to (out, in); without it none is checked.
    One that is `stored` was taken once, and is read by the rules of then.

    Metadata: `honoured` and `harmless` config keys, `notes`, `base` (the name it gives), `card` (README.md), `task`
    (task.json), and those of `MADE` (if this package wrote it). Raises InvalidAdapter (UnsupportedAdapter for what is a
    LoRA and not served) or BaseMismatch; the message names the key or the tensor. StoreFailed where it is the machine.
    """
    if not path.is_dir():
        raise InvalidAdapter(f"{path.name!r} is no folder")
    config = _read_file(path, CONFIG_FILE, MAX_CONFIG_BYTES)
    if config is None:
        raise InvalidAdapter(f"{CONFIG_FILE} is missing{no_config(path, CONFIG_FILE)}", CONFIG_FILE)
    parsed = peft_config.parse(_json_object(config, CONFIG_FILE), stored)
    hint = f", which no adapter of rank {max_rank} (--max-rank) reaches" if shapes is not None else ""
    limit = _tensor_limit(shapes, max_rank)
    tensors = _read_file(path, TENSOR_FILE, limit, hint, lambda stream: _check_declared(stream, parsed, shapes))
    if tensors is None:
        if os.path.lexists(path / PICKLE_FILE):
            raise UnsupportedAdapter(
                f"{PICKLE_FILE} is a pickle, which can run code when it is read, and is refused; "
                f"save the adapter as {TENSOR_FILE} (save_pretrained does so by default)",
                PICKLE_FILE,
            )
        raise InvalidAdapter(f"{TENSOR_FILE} is missing{no_tensors(path)}", TENSOR_FILE)
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
    """The adapter in the contents of a tensor file that is not too large."""
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
    if not _finite_as_it_lies(data, found) and (bad := not_finite(result)) is not None:
        raise InvalidAdapter(f"{bad[0]}.lora_{bad[1]} has values that are not finite (NaN or infinity)", bad[0])
    made = _json_object(header[METADATA_KEY].encode(), TENSOR_FILE) if METADATA_KEY in header else {}
    metadata = {
        "honoured": list(parsed.honoured),
        "harmless": list(parsed.harmless),
        "notes": list(parsed.notes),
        "base": parsed.base,
        "card": None,
        "task": None,
        **{key: made.get(key) for key in MADE},
    }
    return with_digest(name, result, metadata)


def _tensor_limit(shapes: Mapping[str, tuple[int, int]] | None, max_rank: int) -> int:
    """Bytes that the tensors of the largest adapter that could be served may take."""
    if shapes is None:
        return MAX_TENSOR_BYTES
    return sum(4 * max_rank * (out + into) for out, into in shapes.values()) + HEADER_SLACK


def _read_file(
    folder: Path, file: str, limit: int, hint: str = "", too_large: Callable[[BinaryIO], None] = lambda stream: None
) -> bytes | None:
    """The bytes of a file of the folder, or None if there is none. Raises InvalidAdapter for anything odd about it,
    StoreFailed where it is the machine that cannot open it now.

    `hint` says where the limit comes from; `too_large` may look at a file over it and raise for a better reason.
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
            data = stream.read(size + 1)  # no more room than is needed, and notice what grows
    except OSError as error:
        raise unreadable(file, error) from error
    if len(data) > size:
        raise InvalidAdapter(f"{file} grew while it was read", file)
    return data


def open_inside(path: Path, within: Path | None, where: str = "the adapter directory") -> int | None:
    """A descriptor on the regular file `path`, for reading; None if there is no such file.

    With `within`, which people know as `where`, links are followed only as far as they stay in that folder. Raises
    InvalidAdapter, StoreFailed.
    """
    try:
        real = path.resolve(strict=True)
        if within is not None and not real.is_relative_to(within.resolve()):
            raise InvalidAdapter(leads_out(path.name, where), path.name)
        # Not blocking, so that a pipe by that name cannot hold a thread; not following, should the path have changed.
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
    """An object of JSON, in which no key is twice and every text is one: an escape can name half of a surrogate pair,
    which no answer that tells of the adapter could hold. Raises InvalidAdapter.
    """
    try:
        value = json.loads(data, object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidAdapter(f"{file} holds half of a surrogate pair, which is no text", file) from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{file} is no valid JSON: {error}", file) from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{file} must hold an object", file)
    if _deeper(value, MAX_DEPTH):
        raise InvalidAdapter(f"{file} is nested more than {MAX_DEPTH} levels deep", file)
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether an object of JSON is nested deeper than that."""
    inside = [value]
    for _ in range(levels):
        inside = [x for v in inside for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return any(isinstance(v, dict | list) for v in inside)


def _load(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the free entries of its header. Raises InvalidAdapter."""
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        why = not_safetensors(data) or str(error)
        raise InvalidAdapter(f"{TENSOR_FILE} is damaged or no safetensors file: {why}", TENSOR_FILE) from error
    return tensors, header


def _finite_as_it_lies(data: bytes, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all values of a safetensors file are finite, which hundreds of small tensors take long to tell.

    False also where it cannot be told from the whole.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    start = 8 + int.from_bytes(data[:8], "little")
    return len(dtypes) == 1 and dtypes <= DTYPES and all_finite_in(memoryview(data)[start:], dtypes.pop())


def _check_declared(stream: BinaryIO, parsed: LoraConfig, shapes: Mapping[str, tuple[int, int]] | None) -> None:
    """Raises what the header alone of a safetensors file gives reason for; silent about a header that is damaged."""
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
    """A tensor's name without what other writers put into it (`RENAMES`)."""
    prefix, replacement = RENAMES[0]
    if key.startswith(prefix):
        key = replacement + key.removeprefix(prefix)
    for part, replacement in RENAMES[1:]:
        key = key.replace(part, replacement)
    return key


def _pairs(
    tensors: Mapping[str, torch.Tensor], parsed: LoraConfig, shapes: Mapping[str, tuple[int, int]] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path -> (A, B), sorted. Raises for tensors that belong to no pair, and for pairs of another base."""
    halves = _halves(tensors)
    pairs = {module: (tensors[half["lora_A"]], tensors[half["lora_B"]]) for module, half in sorted(halves.items())}
    if shapes is not None:
        peft_config.check_names(parsed, list(pairs), list(shapes))
        _check_shapes(pairs, shapes, parsed.base)
    return pairs


def _halves(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module path -> lora_A and lora_B -> the tensor's key, by the names alone. Raises for what is no pair."""
    names = {key: normalised(key) for key in sorted(keys)}
    for key, name in names.items():  # first, for the tables that are saved beside them are no fault of their own
        if (head := _head_of(key, name)) is not None:
            raise peft_config.on_a_head(head, key)
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
    """The output head or embedding that a tensor is a LoRA of, or that it is the adapted base's copy of; else None."""
    module, found, _ = name.partition(".lora_")
    if not found and ".base_layer." in key:
        module, found, _ = name.rpartition(".")
    return module if found and peft_config.HEADS.fullmatch(module) else None


def _check_unwrapped(key: str, name: str) -> None:
    """Raises InvalidAdapter for a name that holds a part which something around the model has put there."""
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
            f"{TENSOR_FILE}: {key} has {found[0]!r} in its name, from {found[1]}: unwrap the model before it is saved",
            key,
        )


def _refuse_tensor(key: str, name: str) -> None:
    """Raises for a tensor that is no half of a low-rank pair, by what its name says."""
    reasons = {
        "lora_magnitude_vector": "DoRA rescales the base's columns, which is no sum of B A x; retrain without use_dora",
        "lora_embedding_": "LoRA on embeddings is not served; retrain without that target",
        "lora_B.bias": "lora_bias is not served; retrain without it",
    }
    for part, why in reasons.items():
        if part in name:
            raise UnsupportedAdapter(f"{TENSOR_FILE}: {key} is not served: {why}", key)
    if not OTHER_HEADS.isdisjoint(name.split(".")):
        raise UnsupportedAdapter(
            f"{TENSOR_FILE}: {key} is not served: it is a classifier's or value head, no language model's; leave it "
            "out if training alone had use of it, and retrain with task_type CAUSAL_LM if not",
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
            f"{TENSOR_FILE}: {key} is not served: a trained bias is no low-rank update; retrain with bias='none'", key
        )
    why = told if (told := foreign(name)) is not None else "keep to what save_pretrained writes"
    raise InvalidAdapter(f"{TENSOR_FILE}: {key} belongs to no pair of lora_A and lora_B; {why}", key)


def _check_complete(pairs: Mapping[str, object], expected: list[str], partial: bool) -> None:
    """Raises InvalidAdapter if the tensors are not those of exactly the modules that the config adapts, or of some of
    them if it is `partial`.
    """
    wanted = set(expected)
    surplus = [module for module in pairs if module not in wanted]
    if surplus:
        raise InvalidAdapter(
            f"{TENSOR_FILE} has tensors for {len(surplus)} modules that the config does not adapt, "
            f"{surplus[0]!r} among them",
            surplus[0],
        )
    missing = [module for module in expected if module not in pairs]
    if missing and not partial:
        raise InvalidAdapter(
            f"{TENSOR_FILE} lacks the tensors of {len(missing)} modules that the config adapts, "
            f"{missing[0]!r} among them; save the whole adapter again, or name them in exclude_modules if they were "
            "not trained",
            missing[0],
        )


def _check_shapes(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], shapes: Mapping[str, tuple[int, int]], base: str | None
) -> None:
    """Raises BaseMismatch for matrices of other sizes than the base's: told first, for its other layers differ too."""
    for module, (a, b) in pairs.items():
        if a.ndim == b.ndim == 2 and a.numel() and b.numel() and (b.shape[0], a.shape[1]) != tuple(shapes[module]):
            made_on = f" It was made on {base!r}." if base else ""
            raise BaseMismatch(
                f"the adapter was made for another base: {module} is {list(shapes[module])} here (out, in), "
                f"{[b.shape[0], a.shape[1]]} there.{made_on}"
            )


def _check_pair(module: str, a: torch.Tensor, b: torch.Tensor, rank: int, max_rank: int) -> None:
    """Raises for tensors of a wrong dtype, shape or rank, for a rank over the limit, and for empty ones."""
    for kind, tensor in (("lora_A", a), ("lora_B", b)):
        if tensor.dtype not in DTYPES:
            raise UnsupportedAdapter(
                f"{module}.{kind} is {str(tensor.dtype).removeprefix('torch.')}, not float32, bfloat16 or float16; "
                "cast it to one of these and save again",
                module,
            )
        if tensor.ndim != 2:
            raise InvalidAdapter(
                f"{module}.{kind} has the shape {list(tensor.shape)}; it must be a matrix{_gather(tensor)}", module
            )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise InvalidAdapter(
            f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, but the config gives the rank {rank}"
            f"{_gather(a, b)}",
            module,
        )
    if rank > max_rank:
        raise InvalidAdapter(f"{module} has the rank {rank}, over the limit of {max_rank} (--max-rank)", module)
    if 0 in (b.shape[0], a.shape[1]):
        raise InvalidAdapter(
            f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: empty{_gather(a, b)}", module
        )


def _gather(*tensors: torch.Tensor) -> str:
    """Advice on tensors of which one is empty, as those are that other processes held when they were saved."""
    if all(tensor.numel() for tensor in tensors):
        return ""
    return "; an empty shard of ZeRO-3 or FSDP: gather the parameters before saving"


def to_bytes(
    weights: LoraWeights,
    *,
    dtype: torch.dtype | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[bytes, bytes]:
    """The contents of the two files, which `peft` and `read_folder` read back to the same version (unless `dtype` is
    given and another than the tensors').

    The commonest rank and alpha are `r` and `lora_alpha`, others go into the patterns under whole module paths.
    With `shapes`, target_modules are the short names if those mean the same modules on that base. Raises InvalidAdapter
    for values that are not finite, or not any more in `dtype`: nobody could read them back.
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
    made = {k: weights.metadata[k] for k in MADE if weights.metadata.get(k) is not None}
    header = {"format": "pt"} | ({METADATA_KEY: json.dumps(made, sort_keys=True)} if made else {})
    return json.dumps(config, indent=1).encode() + b"\n", safetensors.torch.save(tensors, metadata=header)


def _alpha(scale: float, rank: int) -> int | float:
    """The alpha by which alpha / rank is `scale` again, to a double's last bit or so."""
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
    """Writes a PEFT folder (see `to_bytes`), with README.md and task.json if they are given or in the metadata.

    Files are replaced one by one, the config last, each by a rename. Raises InvalidAdapter as `to_bytes`
    does, before anything is written, and StoreFailed.
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
        raise StoreFailed(f"the adapter could not be written: {reason(error)}") from error
