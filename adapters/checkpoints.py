"""Checkpoints of training runs: one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from adapters.atomic_files import replace_file
from adapters.errors import AdapterError, StoreFailed, error_text
from adapters.weights import LoraWeights, LowRank, with_digest

FILE = "checkpoint.safetensors"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
"""Dtypes that a checkpoint can contain, by safetensors' names."""


@dataclass(frozen=True)
class Checkpoint:
    """`key` identifies the run, `progress` (JSON values) and `tensors` are its state."""

    key: str
    progress: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def write_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Replace the folder's checkpoint. Raises StoreFailed; the old one is then still there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, *_parts(state))
    except OSError as error:
        raise StoreFailed(f"the checkpoint could not be written: {error_text(error)}") from error


def _parts(state: Checkpoint) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file. `safetensors.torch.save` would copy all tensors in memory first."""
    metadata = {"key": state.key, "progress": json.dumps(dict(state.progress))}
    header: dict[str, Any] = {"__metadata__": metadata}
    tensors = sorted(state.tensors.items(), key=lambda entry: -entry[1].itemsize)  # aligned to its item size
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read_checkpoint(folder: Path, key: str, run_folder: Path | None = None) -> Checkpoint | None:
    """The folder's checkpoint; None if there is none.

    Args:
        run_folder: the folder that the error for another run names, if it is not `folder`.

    Raises:
        StoreFailed: the checkpoint is damaged or cannot be read.
        AdapterError: it is of another run.
    """
    path = folder / FILE
    shown = Path(*(run_folder or folder).parts[-3:])  # without the full path of the machine
    try:
        if not path.exists():
            return None
        path.open("rb").close()  # raises the reason; safetensors would say that it is missing
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress = json.loads(header["progress"])
    except OSError as error:
        raise StoreFailed(f"the checkpoint in {shown} cannot be read: {error_text(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StoreFailed(f"the checkpoint in {shown} is damaged ({error}); remove it to start again") from error
    if header.get("key") != key:
        raise AdapterError(
            f"the checkpoint in {shown} is of another run (other data, settings or initial weights); "
            "remove that folder to start again, or choose another one"
        )
    return Checkpoint(key, progress, tensors)


def write_adapter(folder: Path, key: str, weights: LoraWeights) -> None:
    """Write an adapter as the folder's checkpoint. Its metadata are JSON values. Raises StoreFailed."""
    tensors = {f"A {path}": m.A for path, m in weights.modules.items()}
    tensors |= {f"B {path}": m.B for path, m in weights.modules.items()}
    scales = {path: m.scale for path, m in weights.modules.items()}
    progress = {"name": weights.name, "scales": scales, "metadata": dict(weights.metadata)}
    write_checkpoint(folder, Checkpoint(key, progress, tensors))


def read_adapter(folder: Path, key: str, run_folder: Path | None = None) -> LoraWeights | None:
    """The adapter that `write_adapter` wrote, bit for bit; None if there is none. Raises as `read_checkpoint`."""
    found = read_checkpoint(folder, key, run_folder)
    if found is None:
        return None
    modules = {
        path: LowRank(found.tensors[f"A {path}"], found.tensors[f"B {path}"], scale)
        for path, scale in found.progress["scales"].items()
    }
    return with_digest(found.progress["name"], modules, found.progress["metadata"])
