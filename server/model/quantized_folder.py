"""`quantize_folder`: writes a model, quantized, as a folder that `load_base` reads without quantizing again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from server.errors import BadSetting, Conflict
from server.model.checkpoint import MANIFEST, MANIFEST_FORMAT, Checkpoint, open_checkpoint
from server.model.config import to_hf
from server.model.loader import ParameterCounter, Progress, check_vocabulary
from server.model.quantization import Quantization
from server.model.vocabulary import write_folder, write_json

_SHARD = 1 << 29  # bytes of a file, and so of the memory in use


def quantize_folder(
    source: Path,
    target: Path,
    *,
    quantization: str = "int4",
    group_size: int | None = None,
    double_quant: bool = False,
    table_bits: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `source` into the new folder `target`, which appears once it is complete.

    Returns:
        The quantization (scheme, group, double, table_bits) with `bytes` and `bits` per parameter of the linears.

    Raises:
        BadModel: the source cannot be served.
        BadSetting: a setting is invalid, or the target cannot be written.
        Conflict: the target exists.
    """
    with _write_errors(target):
        if target.exists():
            raise Conflict(f"{target} exists already; choose another folder or remove it", "target")
    checkpoint = open_checkpoint(source)
    settings = checkpoint.effective(Quantization(quantization, group_size, double_quant, table_bits))
    config = to_hf(checkpoint.config)
    vocabulary = checkpoint.vocabulary()
    check_vocabulary(vocabulary, checkpoint.config)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with _write_errors(target):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)
            summary = _write_shards(checkpoint, settings, partial, progress)
            write_json(partial / "config.json", config)
            write_folder(vocabulary, partial)
            checkpoint.check_unchanged()
            os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return summary


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Turn errors of writing into BadSetting. Errors of reading are BadModel already."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadSetting(f"{target} cannot be written: {reason}", "target") from error
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises plain Exceptions for I/O errors
            raise
        raise BadSetting(f"{target} cannot be written: {error}", "target") from error


def _write_shards(
    checkpoint: Checkpoint, settings: Quantization, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    files: list[str] = []
    entries: dict[str, Any] = {}
    pending: dict[str, torch.Tensor] = {}
    total = linears = linear_parameters = 0

    def flush() -> None:
        files.append(f"weights-{len(files) + 1:05d}.safetensors")
        save_file(pending, folder / files[-1])
        (folder / files[-1]).chmod(folder.stat().st_mode & 0o666)  # the library makes them private
        pending.clear()

    def add(tensors: Mapping[str, torch.Tensor]) -> None:
        size = sum(t.nbytes for t in tensors.values())
        if pending and sum(t.nbytes for t in pending.values()) + size > _SHARD:
            flush()
        pending.update({name: t.contiguous() for name, t in tensors.items()})

    counter = ParameterCounter("quantizing", checkpoint.config, progress)
    for path, weight in checkpoint.weights(settings):
        entries[path] = {
            "scheme": weight.scheme,
            "shape": list(weight.shape),
            "group": weight.group,
            "tensors": sorted(weight.tensors),
        }
        add({f"{path}.{part}": tensor for part, tensor in weight.tensors.items()})
        total += weight.nbytes
        if path in checkpoint.config.linear_shapes():
            linears += weight.nbytes
            linear_parameters += weight.shape[0] * weight.shape[1]
        counter.add(weight)
    for name, tensor in checkpoint.tensors():
        add({name: tensor.clone()})  # float32 tensors are views of the source's mapped files
        total += tensor.nbytes
    flush()
    described = {
        "scheme": settings.scheme,
        "group": settings.group,
        "double_quant": settings.double_quant,
        "table_bits": settings.table_bits,
    }
    manifest = {"format": MANIFEST_FORMAT, "quantization": described, "files": files, "weights": entries}
    write_json(folder / MANIFEST, {**manifest, "notes": checkpoint.notes})
    return {**settings.describe(), "bytes": total, "bits": 8 * linears / linear_parameters}
