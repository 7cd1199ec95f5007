"""Several safetensors files of one model as a mapping of tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from server.errors import BadModel
from server.model.quantization import check_finite
from server.model.vocabulary import read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPARED = 1 << 22  # values of two tables that are compared at a time


class SafetensorsFiles:
    """The named files in a folder. Their headers are read at once, their tensors on demand.

    Attributes:
        files: Their paths.
        shapes: Tensor name -> shape.

    Raises:
        BadModel: a file is missing or broken, or a tensor is in two of them.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            if Path(name).name != name or len(name) > 255 or not (folder / name).is_file():
                raise BadModel(f"the model names the file {name!r}, which is not in its folder")
        self.files = [folder / name for name in names]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, Path] = {}
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():
                    if name in self._owner:
                        raise BadModel(f"{name} is in both {self._owner[name].name} and {path.name}")
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._owner[name] = path

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices have the same values, whatever their dtypes."""
        shape = self.shapes[one]
        if shape != self.shapes[other] or len(shape) != 2:
            return False
        step = max(1, _COMPARED // max(1, shape[1]))
        with _opened(self._owner[one]) as first, _opened(self._owner[other]) as second:
            a, b = first.get_slice(one), second.get_slice(other)
            parts = (slice(start, start + step) for start in range(0, shape[0], step))
            pairs = ((a[part], b[part]) for part in parts)
            return all(torch.equal(*((x, y) if x.dtype == y.dtype else (x.float(), y.float()))) for x, y in pairs)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the existing ones of `names`, as views of the mapped files, file after file."""
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():
                    if name in names:
                        yield name, file.get_tensor(name)

    def floats(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """`read` in float32. Raises BadModel for other types than floats and for non-finite values."""
        for name, tensor in self.read(names):
            check_float(name, tensor)
            check_finite(name, tensor)
            yield name, tensor.float()


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Raises BadModel unless the tensor is of floats."""
    if tensor.dtype not in FLOATS:
        raise BadModel(f"{name} has the type {tensor.dtype}, which is not supported; use 16- or 32-bit floats")


def weight_files(folder: Path) -> tuple[list[str], Path | None]:
    """Names of the files with a folder's weights, and the index if it names them.

    As in Transformers, `model.safetensors` wins over an index. Raises BadModel.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], None
    index = read_json(folder / WEIGHTS_INDEX)
    if index:
        named = index.get("weight_map", {})
        if not isinstance(named, dict):
            raise BadModel(f"{WEIGHTS_INDEX} has no weight_map from tensors to files")
        return sorted({str(name) for name in named.values()}), folder / WEIGHTS_INDEX
    if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise BadModel("the model folder has pickles, which can run code, and no safetensors; convert it first")
    raise BadModel("the model folder has no model.safetensors")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        path.open("rb").close()  # for the system's error: the library reports every file as missing
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
