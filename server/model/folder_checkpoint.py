"""Checkpoints in folders: Hugging Face folders, and folders that `loramux quantize` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from server.errors import BadModel
from server.kernels.packed_format import stored_parts
from server.kernels.weight import STORED, Weight
from server.model.checkpoint import (
    MANIFEST,
    MANIFEST_FORMAT,
    Checkpoint,
    check_names,
    check_shapes,
    quantize_matrix,
)
from server.model.config import from_hf
from server.model.quantization import GROUPS, Quantization, check_finite
from server.model.safetensors_files import (
    FLOATS,
    WEIGHTS,
    WEIGHTS_INDEX,
    SafetensorsFiles,
    check_float,
    weight_files,
)
from server.model.vocabulary import Vocabulary, from_folder, read_json

_CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", MANIFEST,
)  # fmt: skip
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json, tokenizer.json, one or more safetensors files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = from_hf(read_json(folder / "config.json"))
        self.notes: list[str] = []
        names, self._index = weight_files(folder)
        if self._index is None and (folder / WEIGHTS_INDEX).is_file():
            self.notes.append(f"{WEIGHTS} is read; {WEIGHTS_INDEX} beside it, and the files that it names, are not")
        self._shards = SafetensorsFiles(folder, names)
        self._embedding = self._tie()
        shapes = {name: shape for name, shape in self._shards.shapes.items() if not self._ignored(name)}
        if self._embedding == _HEAD:
            shapes[_EMBEDDING] = self._shards.shapes[_HEAD]
        check_shapes(shapes, self.config)

    def files(self) -> list[Path]:
        index = [] if self._index is None else [self._index]
        return _with_config_files(self.source, [*self._shards.files, *index])

    def vocabulary(self) -> Vocabulary:
        return from_folder(self.source)

    def effective(self, asked: Quantization) -> Quantization:
        return asked if asked.scheme == "none" else replace(asked, group=asked.linear_group)

    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        # Tables first: they are the largest, and nothing else is in memory yet.
        for table, paths in ((True, self.config.table_shapes()), (False, self.config.linear_shapes())):
            by_name = {self._embedding if path == "model.embed_tokens" else f"{path}.weight": path for path in paths}
            for name, tensor in self._shards.read(by_name):
                check_float(name, tensor)
                yield by_name[name], quantize_matrix(tensor, quantization, by_name[name], table=table)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._shards.floats(self.config.tensor_shapes())

    def _tie(self) -> str:
        """The name under which the embedding table is stored. Unties the config if the output table differs.

        As in Transformers, the stored tensors decide, not `tie_word_embeddings`: merging can leave two different
        tables under a config that ties them.
        """
        stored = self._shards.shapes.keys() & {_EMBEDDING, _HEAD}
        if not self.config.tie_word_embeddings or _HEAD not in stored:
            return _EMBEDDING
        if _EMBEDDING not in stored:
            return _HEAD
        if not self._shards.equal(_EMBEDDING, _HEAD):
            self.config = replace(self.config, tie_word_embeddings=False)
            self.notes.append(f"config.json ties {_HEAD} to {_EMBEDDING}, but the two differ: both are used")
        return _EMBEDDING

    def _ignored(self, name: str) -> bool:
        """Tensors that some checkpoints have and no model uses."""
        return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and self.config.tie_word_embeddings)


class QuantizedFolder(Checkpoint):
    """A folder written by `quantize_folder`. Its tensors are used as they are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != MANIFEST_FORMAT:
            raise BadModel(f"{MANIFEST} has the format {manifest.get('format')!r}; supported is {MANIFEST_FORMAT}")
        self.config = from_hf(read_json(folder / "config.json"))
        try:
            self._weights: dict[str, dict[str, Any]] = manifest["weights"]
            self._quantization = Quantization(**manifest["quantization"])
            self.notes = [str(note) for note in manifest["notes"]]
            self._shards = SafetensorsFiles(folder, [str(name) for name in manifest["files"]])
            shapes = {f"{path}.weight": tuple(entry["shape"]) for path, entry in self._weights.items()}
            for entry in self._weights.values():
                _check_entry(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadModel(f"{MANIFEST} is damaged: {error!r}") from error
        norms = {name: shape for name, shape in self._shards.shapes.items() if name in self.config.tensor_shapes()}
        check_shapes(shapes | norms, self.config)
        needed = [f"{path}.{part}" for path, entry in self._weights.items() for part in entry["tensors"]]
        check_names({*needed, *norms}, set(self._shards.shapes))

    def files(self) -> list[Path]:
        return _with_config_files(self.source, self._shards.files)

    def vocabulary(self) -> Vocabulary:
        return from_folder(self.source)

    def effective(self, asked: Quantization) -> Quantization:
        if asked not in (self._quantization, replace(self._quantization, group=None)):
            note = f"the folder is already quantized ({self._quantization.label}); this quantization is used"
            if note not in self.notes:
                self.notes.append(note)
        return self._quantization

    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        owners = {f"{path}.{part}": (path, part) for path, entry in self._weights.items() for part in entry["tensors"]}
        for name, tensor in self._shards.read(owners):
            if tensor.is_floating_point():
                check_finite(name, tensor)
            path, part = owners[name]
            gathered, entry = parts.setdefault(path, {}), self._weights[path]
            gathered[part] = tensor
            if len(gathered) == len(entry["tensors"]):
                yield path, _stored_weight(path, entry, parts.pop(path))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._shards.floats(self.config.tensor_shapes())


def _check_entry(entry: Mapping[str, Any]) -> None:
    rows, columns = entry["shape"]
    if entry["scheme"] not in ("int4", "nf4", "int8", "none") or "codes" not in entry["tensors"]:
        raise ValueError(f"unknown scheme {entry['scheme']!r} of {entry['tensors']}")
    if entry["scheme"] != "none" and (entry["group"] not in GROUPS or columns % entry["group"]):
        raise ValueError(f"groups of {entry['group']} do not divide {columns}")


def _stored_weight(path: str, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Weight:
    """A matrix of a quantized folder.

    Raises BadModel unless its parts have exactly the right dtypes and shapes: kernels read them by raw pointers.
    """
    scheme, (rows, columns), group = entry["scheme"], entry["shape"], entry["group"]
    weight = Weight(scheme, STORED, (rows, columns), columns if scheme == "none" else group, tensors)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if scheme == "none":
        valid = found.keys() == {"codes"} and tensors["codes"].dtype in FLOATS and found["codes"][1] == weight.shape
    else:
        valid = found == stored_parts(scheme, weight.shape, group, weight.double_quantized)
    if not valid:
        raise BadModel(f"{path} of the quantized folder is not a matrix of {rows} by {columns} in {scheme}")
    return weight


def _with_config_files(folder: Path, files: Sequence[Path]) -> list[Path]:
    return [*files, *(folder / name for name in _CONFIG_FILES if (folder / name).is_file())]
