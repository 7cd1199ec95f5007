"""A training run on disk, to go on from: one safetensors file, replaced by a rename, so a kill leaves a whole one.

So is an adapter that is made on the way, of which the rest of a run is to be the continuation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from adapters.durable import replace_file
from adapters.errors import AdapterError, StoreFailed
from adapters.weights import LoraWeights, LowRank, sealed

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """`key` says which run it is of, `progress` where it is (JSON values), `tensors` its state."""

    key: str
    progress: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def write_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Replaces the folder's checkpoint. Raises StoreFailed, and then the old one is still there."""
    header = {"key": state.key, "progress": json.dumps(dict(state.progress))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, safetensors.torch.save(dict(state.tensors), metadata=header))
    except OSError as error:
        raise StoreFailed(f"the checkpoint could not be written: {error.strerror}") from error


def read_checkpoint(folder: Path, key: str, whole: Path | None = None) -> Checkpoint | None:
    """The folder's checkpoint, None if there is none. Raises StoreFailed if it is damaged, AdapterError if it is of
    another run. `whole` is the folder that such a run is removed with, if that is another.
    """
    path = folder / FILE
    shown = Path(*(whole or folder).parts[-3:])  # where it is, without the whole of the machine's path
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress = json.loads(header["progress"])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
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
    return sealed(found.progress["name"], modules, found.progress["metadata"])
