"""The layout of a prepared adapter, computed once, so that loading it into a slot is fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.kernels.lora import Shapes

LINE = 64
"""Alignment in bytes of matrices, scales, adapters, and parts of adapters on the device."""


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """Where the matrices of an adapter lie in its memory.

    Attributes:
        flat: All of the adapter's memory.
        shapes: Path and shape of each module.
        begins: Offsets of each module's A, B and scales in elements, int64 [modules, 3].
        cuts: Offsets at which the memory may be split, ascending, with its end.
        ranks: int32 [modules].
        scales: float32 [modules].
    """

    flat: torch.Tensor
    shapes: Shapes
    begins: np.ndarray
    cuts: np.ndarray
    ranks: np.ndarray
    scales: np.ndarray


def adapter_layout(weights: LoraWeights, dtype: torch.dtype) -> AdapterLayout:
    """The layout of an adapter in one piece of memory of `dtype`: A [rank, in] row-major, B [out, rank] column-major.

    Raises:
        ValueError: The adapter was not prepared for the CUDA kernels.
    """
    first = next((update.A for update in weights.modules.values()), torch.empty(0, dtype=dtype))
    flat = torch.empty(0, dtype=first.dtype).set_(first.untyped_storage())
    base, size = flat.data_ptr(), flat.element_size()
    begins = np.zeros((len(weights.modules), 3), np.int64)
    for i, (path, (a, b, _, units, _)) in enumerate(weights.modules.items()):
        within = a.data_ptr() - size * a.storage_offset() == base == b.data_ptr() - size * b.storage_offset()
        if not (within and a.dtype == b.dtype == dtype and a.is_contiguous() and b.t().is_contiguous()):
            raise ValueError(f"the update of {path} was not prepared for the CUDA kernels")
        begins[i] = a.storage_offset(), b.storage_offset(), 0 if units is None else (units.data_ptr() - base) // size
    cuts = np.union1d(begins, [0, flat.numel()])
    if (cuts * size % LINE).any():
        raise ValueError(f"the matrices of {weights.name!r} were not prepared for the CUDA kernels")
    updates = weights.modules.values()
    return AdapterLayout(
        flat,
        tuple((path, update.shape) for path, update in weights.modules.items()),
        begins,
        cuts,
        np.array([update.rank for update in updates], np.int32),
        np.array([update.scale for update in updates], np.float32),
    )
