"""`load_base`: quantizes and packs a model tensor by tensor, or maps the packed file of an earlier start."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters.weights import LoraWeights, LowRank
from server.errors import BadModel
from server.kernels import Backend
from server.kernels.threads import run_in_thread
from server.kernels.weight import Weight
from server.model.checkpoint import Checkpoint, open_checkpoint
from server.model.config import ModelConfig
from server.model.file_digest import Digests
from server.model.packed_file import Packed, PackedWriter, open_packed, packed_path
from server.model.quantization import Quantization, bits
from server.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the name of the operation, the number of parameters done, and of all."""


@dataclass(frozen=True)
class Base:
    """The resident base model.

    Attributes:
        id: SHA-256 over the source's digest and the quantization.
        weights: Module path ("model.embed_tokens", "model.layers.0.self_attn.q_proj", and "lm_head" unless tied) ->
            matrix as packed by `backend`. May lie in a mapped file.
        tensors: Name ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias") -> float32 norm or bias.
        quantization: scheme, group, double and table_bits.
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
        """The adapter in the form that the backend keeps in RAM. Raises InvalidAdapter."""
        return self.backend.prepare(weights, self.quantization["scheme"])

    def sizes(self) -> Callable[[Mapping[str, tuple[int, int, int]]], int | None]:
        """A function from module path -> (rank, out, in) to the bytes that such an adapter takes after `prepare`.

        It returns None for an adapter that does not fit this base. Sizes are measured on zeros and cached.
        """
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
        return replace(self, weights=weights, tensors={name: t.to(device) for name, t in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and tensors, mapped or not."""
        return sum(w.nbytes for w in self.weights.values()) + sum(t.nbytes for t in self.tensors.values())

    @property
    def bits(self) -> float:
        """Bits per parameter of the linears, including scales."""
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
    """Load a base model.

    Args:
        source: A Hugging Face folder, a folder written by `quantize_folder`, or a GGUF file.
        cache_dir: Where the packed form is written and mapped, so that the next start and training processes share
            it. None, or a directory that cannot be written, keeps the base in memory.

    Raises:
        BadModel: the source cannot be served.
        BadSetting: a quantization setting is invalid.
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
        packed = None  # written by a version that read these files differently
    if packed is None and cache_dir is not None:
        packed = _pack_to_cache(checkpoint, settings, backend, cache_dir, key, digests, progress)
    if packed is None:
        packed = _pack_in_memory(checkpoint, settings, backend, progress)
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


def _pack_to_cache(
    checkpoint: Checkpoint,
    settings: Quantization,
    backend: Backend,
    directory: Path,
    key: Mapping[str, Any],
    digests: Digests,
    progress: Progress | None,
) -> Packed | None:
    """Pack into the cache and map it; None if the cache cannot be written."""
    path, opened = packed_path(directory, key), len(checkpoint.notes)
    try:
        counter = ParameterCounter("loading", checkpoint.config, progress)
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


def _pack_in_memory(
    checkpoint: Checkpoint, settings: Quantization, backend: Backend, progress: Progress | None
) -> Packed:
    counter = ParameterCounter("loading", checkpoint.config, progress)
    weights = {}
    for module, weight in checkpoint.weights(settings):
        weights[module] = backend.pack(weight)
        counter.add(weight)
    tensors = dict(checkpoint.tensors())
    return Packed(weights, tensors, tuple(checkpoint.notes))


class ParameterCounter:
    """Reports the number of parameters that are done."""

    def __init__(self, operation: str, config: ModelConfig, progress: Progress | None) -> None:
        shapes = config.linear_shapes() | config.table_shapes()
        self._operation, self._progress = operation, progress
        self._done, self._total = 0, sum(rows * columns for rows, columns in shapes.values())

    def add(self, weight: Weight) -> None:
        self._done += weight.shape[0] * weight.shape[1]
        if self._progress is not None:
            self._progress(self._operation, self._done, self._total)


def check_vocabulary(vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Raises BadModel if the tokenizer has more tokens than the model's embedding table has rows."""
    if vocabulary.size > config.vocab_size:
        last = vocabulary.size - 1
        raise BadModel(
            f"the tokenizer has tokens up to {last} ({vocabulary.tokenizer.id_to_token(last)!r}), but the embedding "
            f"table has only {config.vocab_size} rows; remove the surplus tokens from the tokenizer's files"
        )
