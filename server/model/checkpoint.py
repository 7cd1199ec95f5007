"""`Checkpoint`: the source of a base model, which yields its tensors one at a time under Transformers' names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from server.errors import BadModel
from server.kernels.weight import Weight
from server.model.config import ModelConfig
from server.model.file_digest import Digests, stamps
from server.model.quantization import Quantization, Rows, quantize, quantize_table
from server.model.vocabulary import Vocabulary

MANIFEST = "loramux.json"
MANIFEST_FORMAT = 1
_LISTED = 5  # names that an error lists


class Checkpoint(ABC):
    """A folder or file with a model.

    Attributes:
        config: The model's shape.
        notes: Remarks for the operator. Reading weights may add more.
    """

    config: ModelConfig
    notes: list[str]

    def __init__(self, source: Path) -> None:
        self.source, self._stamps = source, stamps(source)

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that define the model; the digest covers them."""

    @abstractmethod
    def effective(self, asked: Quantization) -> Quantization:
        """The quantization that loading produces, which may be the source's own."""

    @abstractmethod
    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        """Yield every linear and table by its module path, in the stored layout. Raises BadModel."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every norm and bias by its name, float32. Raises BadModel."""

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Load the tokenizer. Raises BadModel."""

    def digest(self, digests: Digests) -> str:
        """SHA-256 over all `files`."""
        return digests.of_all(self.source, self.files())

    def check_unchanged(self) -> None:
        """Raises BadModel if one of `files` changed since the checkpoint was opened."""
        now = stamps(self.source)
        if any(self._stamps.get(path) != now.get(path) for path in self.files()):
            raise BadModel(f"{self.source.name} changed while it was read; start again")


def open_checkpoint(source: Path) -> Checkpoint:
    """Open a Hugging Face folder, a quantized folder, or a GGUF file (also the only one in a folder).

    Raises:
        BadModel: there is no readable model at `source`.
    """
    from server.model.folder_checkpoint import FolderCheckpoint, QuantizedFolder
    from server.model.gguf_checkpoint import GgufCheckpoint

    if source.is_dir():
        if (source / MANIFEST).is_file():
            return QuantizedFolder(source)
        if (source / "config.json").is_file():
            return FolderCheckpoint(source)
        files = sorted(source.glob("*.gguf"))
        if len(files) == 1:
            return GgufCheckpoint(files[0])
        raise BadModel(f"{source.name} has neither a config.json nor exactly one GGUF file", "model")
    if source.is_file():
        if source.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise BadModel(f"{source.name} is a pickle, which can run code; use safetensors or a GGUF file", "model")
        return GgufCheckpoint(source)
    raise BadModel(f"there is no model at {source}", "model")


def quantize_matrix(rows: Rows, quantization: Quantization, path: str, *, table: bool) -> Weight:
    """Quantize a linear or, with `table`, an embedding or output table."""
    if not table:
        return quantize(rows, quantization.scheme, quantization.linear_group, quantization.double_quant, path)
    if quantization.scheme == "none":
        return quantize(rows, "none", name=path)
    return quantize_table(rows, quantization.table_bits, path)


def check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises BadModel, naming the tensors, unless `found` are exactly those of `config`."""
    expected: dict[str, tuple[int, ...]] = {
        f"{path}.weight": shape for path, shape in (config.linear_shapes() | config.table_shapes()).items()
    }
    expected |= config.tensor_shapes()
    check_names(set(expected), set(found))
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise BadModel(f"{name} has the shape {list(found[name])}, but the model's config says {list(shape)}")


def check_names(expected: set[str], found: set[str]) -> None:
    """Raises BadModel, naming the differences, unless both are equal."""
    if missing := expected - found:
        raise BadModel(f"the model lacks {_some(missing)}")
    if surplus := found - expected:
        raise BadModel(f"the model has tensors that its config does not: {_some(surplus)}")


def _some(names: Collection[str]) -> str:
    listed = [name[:80] for name in sorted(names)]
    return ", ".join(listed[:_LISTED]) + (f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else "")
