"""A training run on disk, to go on from: one safetensors file, replaced by a rename, so a kill leaves a whole one.

So is an adapter that is made on the way, of which the rest of a run is to be the continuation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from adapters.atomic_files import replace_file
from adapters.errors import AdapterError, StoreFailed, reason
from adapters.weights import LoraWeights, LowRank, with_digest

FILE = "checkpoint.safetensors"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
"""What a checkpoint may hold, by safetensors' names."""


@dataclass(frozen=True)
class Checkpoint:
    """`key` says which run it is of, `progress` where it is (JSON values), `tensors` its state."""

    key: str
    progress: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def write_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Replaces the folder's checkpoint. Raises StoreFailed, and then the old one is still there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, *_parts(state))
    except OSError as error:
        raise StoreFailed(f"the checkpoint could not be written: {reason(error)}") from error


def _parts(state: Checkpoint) -> Iterator[bytes | memoryview]:
    """A safetensors file, whose tensors are written from where they lie: `safetensors.torch.save` has them twice in
    memory, which may be as much as the whole run takes otherwise.
    """
    metadata = {"key": state.key, "progress": json.dumps(dict(state.progress))}
    header: dict[str, Any] = {"__metadata__": metadata}
    tensors = sorted(state.tensors.items(), key=lambda entry: -entry[1].itemsize)  # each at a multiple of its size
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read_checkpoint(folder: Path, key: str, whole: Path | None = None) -> Checkpoint | None:
    """The folder's checkpoint, None if there is none. Raises StoreFailed if it is damaged or cannot be read now,
    AdapterError if it is of another run. `whole` is the folder that such a run is removed with, if that is another.
    """
    path = folder / FILE
    shown = Path(*(whole or folder).parts[-3:])  # where it is, without the whole of the machine's path
    try:
        if not path.exists():
            return None
        path.open("rb").close()  # which says why it cannot be opened; safetensors takes it for missing
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress = json.loads(header["progress"])
    except OSError as error:  # the machine's fault, or that of its rights: hours of training may be whole
        raise StoreFailed(f"the checkpoint in {shown} cannot be read: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StoreFailed(f"the checkpoint in {shown} is damaged ({error}); remove it to begin anew") from error
    if header.get("key") != key:
        raise AdapterError(
            f"the checkpoint in {shown} is of another run: other data, settings or start; remove that folder to begin "
            "anew, or give another"
        )
    return Checkpoint(key, progress, tensors)


def write_adapter(folder: Path, key: str, weights: LoraWeights) -> None:
    """Replaces the folder's checkpoint by an adapter, with metadata of JSON values. Raises StoreFailed."""
    tensors = {f"A {path}": m.A for path, m in weights.modules.items()}
    tensors |= {f"B {path}": m.B for path, m in weights.modules.items()}
    scales = {path: m.scale for path, m in weights.modules.items()}
    progress = {"name": weights.name, "scales": scales, "metadata": dict(weights.metadata)}
    write_checkpoint(folder, Checkpoint(key, progress, tensors))


def read_adapter(folder: Path, key: str, whole: Path | None = None) -> LoraWeights | None:
    """What `write_adapter` has left in the folder, bit for bit. Raises as `read_checkpoint`."""
    found = read_checkpoint(folder, key, whole)
    if found is None:
        return None
    modules = {
        path: LowRank(found.tensors[f"A {path}"], found.tensors[f"B {path}"], scale)
        for path, scale in found.progress["scales"].items()
    }
    return with_digest(found.progress["name"], modules, found.progress["metadata"])
