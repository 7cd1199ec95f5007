"""`Base`: the one model that stays resident, and the ways to get it: loaded, from its cache, or quantized to a folder.

Owns the order of work (read a tensor, quantize, pack, let go), so that memory never holds much more than the result.
What a tensor is called is checkpoint.py's, what a code means quantization.py's, how it is packed the backend's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.weights import LoraWeights, LowRank
from server.errors import BadModel, BadSetting, Conflict, ServerError
from server.kernels import Backend
from server.kernels.threads import run_in_thread
from server.kernels.weight import Weight
from server.model.checkpoint import MANIFEST, MANIFEST_FORMAT, Checkpoint, open_checkpoint
from server.model.config import ModelConfig, to_hf
from server.model.file_digest import Digests
from server.model.packed_file import Packed, PackedWriter, open_packed, packed_path
from server.model.quantization import Quantization, bits
from server.model.vocabulary import Vocabulary, write_folder, write_json

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many parameters are done, and of how many."""

_OWN = fcntl.LOCK_EX | fcntl.LOCK_NB
_SHARD = 1 << 29  # bytes of a file that `quantize_folder` writes, and so of its memory


@dataclass(frozen=True)
class Base:
    """The resident model. `id` is a SHA-256 over the source's digest and the quantization.

    `weights` maps module paths ("model.embed_tokens", "model.layers.0.self_attn.q_proj", and "lm_head" unless it is
    tied) to matrices as `backend` packed them; `tensors` maps names ("model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.bias", "model.norm.weight") to float32. Both may lie in a mapped file.
    `quantization` has scheme, group, double and table_bits.
    """

    name: str
    id: str
    config: ModelConfig
    weights: Mapping[str, Weight]
    tensors: Mapping[str, torch.Tensor]
    vocabulary: Vocabulary
    backend: Backend
    notes: tuple[str, ...]
    quantization: Mapping[str, Any]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear that a LoRA may target."""
        return self.config.linear_shapes()

    def prepare(self, weights: LoraWeights) -> LoraWeights:
        """The adapter as its backend keeps it in RAM beside this base. Raises InvalidAdapter, as the backend does."""
        return self.backend.prepare(weights, self.quantization["scheme"])

    def sizes(self) -> Callable[[Mapping[str, tuple[int, int, int]]], int | None]:
        """What answers how many bytes an adapter takes as `prepare` makes it, by path -> (rank, out, in); None if it is
        not this base's. Each update takes what one of zeros does."""
        shapes, known = self.shapes(), dict[tuple[int, int, int], int]()

        def size(modules: Mapping[str, tuple[int, int, int]]) -> int | None:
            for path, update in modules.items():
                rank, *shape = update
                if shapes.get(path) != tuple(shape):
                    return None
                if update not in known:
                    zeros = LowRank(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank), 1.0)
                    known[update] = self.prepare(LoraWeights("", "", {path: zeros})).nbytes
            return sum(known[update] for update in modules.values())

        return size

    def to(self, device: torch.device) -> Base:
        """The same base with its weights and tensors on a device."""
        weights = {
            path: replace(weight, tensors={name: tensor.to(device) for name, tensor in weight.tensors.items()})
            for path, weight in self.weights.items()
        }
        return replace(
            self, weights=weights, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()}
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and tensors, wherever they lie."""
        return sum(w.nbytes for w in self.weights.values()) + sum(t.nbytes for t in self.tensors.values())

    @property
    def bits(self) -> float:
        """Bits a parameter of the linears, scales counted."""
        return bits(self.weights[path] for path in self.shapes())


def load_base(
    source: Path,
    *,
    name: str,
    backend: Backend,
    quantization: str = "int4",
    group_size: int | None = None,
    double_quant: bool = False,
    table_bits: int = 8,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Base:
    """The base at `source`: a Hugging Face folder, a folder written by `quantize_folder`, or a GGUF file.

    With a `cache_dir` the packed form is written there, tensor by tensor, and mapped: the next start, and a training
    process, map the same bytes. Without one, or where it cannot be written, it is kept in memory. Raises BadModel,
    which names what is wrong, and BadSetting.
    """
    wanted = Quantization(quantization, group_size, double_quant, table_bits)
    return run_in_thread(lambda: _load(source, name, backend, wanted, cache_dir, progress))


def _load(
    source: Path, name: str, backend: Backend, wanted: Quantization, cache_dir: Path | None, progress: Progress | None
) -> Base:
    checkpoint = open_checkpoint(source)
    settings = checkpoint.effective(wanted)
    vocabulary = checkpoint.vocabulary()
    check_vocabulary(vocabulary, checkpoint.config)
    opened = tuple(checkpoint.notes)
    digests = Digests(cache_dir)
    source_digest = checkpoint.digest(digests)
    key = {"source": source_digest, "quantization": settings.describe(), "layout": backend.layout}
    packed = None if cache_dir is None else open_packed(packed_path(cache_dir, key), key, digests)
    matrices = checkpoint.config.linear_shapes() | checkpoint.config.table_shapes()
    if packed is not None and packed.weights.keys() != matrices.keys():
        packed = None  # an earlier version took these files for another model
    if packed is None and cache_dir is not None:
        packed = _cached(checkpoint, settings, backend, cache_dir, key, digests, progress)
    if packed is None:
        packed = _in_memory(checkpoint, settings, backend, progress)
    checkpoint.check_unchanged()
    identity = json.dumps([source_digest, settings.describe()], sort_keys=True)
    return Base(
        name=name,
        id=hashlib.sha256(identity.encode()).hexdigest(),
        config=checkpoint.config,
        weights=packed.weights,
        tensors=packed.tensors,
        vocabulary=vocabulary,
        backend=backend,
        notes=tuple(dict.fromkeys((*opened, *packed.notes, *checkpoint.config.notes))),
        quantization=settings.describe(),
    )


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
    """Write `source`, quantized, as a folder that `load_base` reads without quantizing again.

    The folder appears under its name when it is whole; memory holds one file of at most half a gigabyte (or one
    matrix) at a time. Returns the manifest's `quantization`, with `bytes` and `bits`. Raises BadModel, BadSetting, also
    if the target cannot be written, and Conflict if it exists.
    """
    with _writing(target):
        exists = target.exists()
    if exists:
        raise Conflict(f"{target} exists already; give another place or remove it first", "target")
    checkpoint = open_checkpoint(source)
    settings = checkpoint.effective(Quantization(quantization, group_size, double_quant, table_bits))
    described = to_hf(checkpoint.config)
    vocabulary = checkpoint.vocabulary()
    check_vocabulary(vocabulary, checkpoint.config)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with _writing(target):
        _remove_abandoned(target)
        partial.mkdir(parents=True)  # what is there now is another's, and stays
    try:
        with _writing(target), _opened(partial) as folder:
            with suppress(OSError):  # where there are no locks, nothing is taken for abandoned
                fcntl.flock(folder, _OWN)
            summary = _write_shards(checkpoint, settings, partial, progress)
            write_json(partial / "config.json", described)
            write_folder(vocabulary, partial)
            checkpoint.check_unchanged()
            os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return summary


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove what runs for the same target have left that were killed: a lock ends with its process."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9]+\.partial")
    for left in target.parent.glob("*.partial"):
        if ours.fullmatch(left.name):
            with suppress(OSError), _opened(left) as folder:
                fcntl.flock(folder, _OWN)
                shutil.rmtree(left)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """The disk's refusals become BadSetting, which names the folder and the reason: what is read has told its own."""
    try:
        yield
    except ServerError:
        raise
    except Exception as error:  # safetensors and tokenizers give the system's number in their message alone
        told = re.search(r"\(os error (\d+)\)", str(error))
        if not isinstance(error, OSError) and told is None:
            raise
        reason = os.strerror(int(told[1])) if told else getattr(error, "strerror", None) or str(error)
        raise BadSetting(f"{target} cannot be written: {reason}", "target") from error


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
        (folder / files[-1]).chmod(folder.stat().st_mode & 0o666)  # the library's are their writer's alone
        pending.clear()

    def add(tensors: Mapping[str, torch.Tensor]) -> None:
        size = sum(t.nbytes for t in tensors.values())
        if pending and sum(t.nbytes for t in pending.values()) + size > _SHARD:
            flush()
        pending.update({name: t.contiguous() for name, t in tensors.items()})

    counter = _Counter("quantizing", checkpoint.config, progress)
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
        add({name: tensor.clone()})  # float32 tensors of the source are views of its files
        total += tensor.nbytes
    flush()
    described = {
        "scheme": settings.scheme,
        "group": settings.group,
        "double_quant": settings.double_quant,
        "table_bits": settings.table_bits,
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "quantization": described,
        "files": files,
        "weights": entries,
        "notes": checkpoint.notes,
    }
    write_json(folder / MANIFEST, manifest)
    return {**settings.describe(), "bytes": total, "bits": 8 * linears / linear_parameters}


def _cached(
    checkpoint: Checkpoint,
    settings: Quantization,
    backend: Backend,
    directory: Path,
    key: Mapping[str, Any],
    digests: Digests,
    progress: Progress | None,
) -> Packed | None:
    """Pack into the cache and map it; None, with a log line, where it cannot be written.

    Only what reading the weights tells is noted there: what opening the source does is told at each start.
    """
    path, opened = packed_path(directory, key), len(checkpoint.notes)
    try:
        counter = _Counter("loading", checkpoint.config, progress)
        with PackedWriter(path, key) as writer:
            for module, weight in checkpoint.weights(settings):
                writer.add_weight(module, backend.pack(weight))
                counter.add(weight)
            for name, tensor in checkpoint.tensors():
                writer.add_tensor(name, tensor)
            checkpoint.check_unchanged()
            writer.finish(tuple(checkpoint.notes[opened:]))
        return open_packed(path, key, digests)
    except OSError as error:
        log.warning("the packed cache cannot be written, the base is kept in memory: %s", error)
        return None


def _in_memory(checkpoint: Checkpoint, settings: Quantization, backend: Backend, progress: Progress | None) -> Packed:
    counter = _Counter("loading", checkpoint.config, progress)
    weights = {}
    for module, weight in checkpoint.weights(settings):
        weights[module] = backend.pack(weight)
        counter.add(weight)
    tensors = dict(checkpoint.tensors())
    return Packed(weights, tensors, tuple(checkpoint.notes))


class _Counter:
    """Parameters that are done, told to whoever shows progress."""

    def __init__(self, what: str, config: ModelConfig, progress: Progress | None) -> None:
        shapes = config.linear_shapes() | config.table_shapes()
        self._what, self._progress = what, progress
        self._done, self._total = 0, sum(rows * columns for rows, columns in shapes.values())

    def add(self, weight: Weight) -> None:
        self._done += weight.shape[0] * weight.shape[1]
        if self._progress is not None:
            self._progress(self._what, self._done, self._total)


def check_vocabulary(vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Raises BadModel for a token that the model's table has no row for."""
    if vocabulary.size > config.vocab_size:
        raise BadModel(
            f"the tokenizer has tokens up to {vocabulary.size - 1} "
            f"({vocabulary.tokenizer.id_to_token(vocabulary.size - 1)!r}), the model's table ends before "
            f"{config.vocab_size}; take those that it lacks out of the tokenizer's files, or give the model whose "
            "table was resized for them"
        )
