"""The addresses of an adapter's matrices, computed once when it is prepared, so that loading it into a slot is fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.kernels.cpu.adapter_codes import b_shape, bytes_of_a
from server.kernels.cpu.bindings import LoraModule
from server.kernels.lora import Shapes

LORA_MODULE = np.dtype(LoraModule)


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """Where the kernels find an adapter. It does not own the tensors.

    Attributes:
        shapes: Path and shape of each module.
        modules: `LORA_MODULE` [modules], in the order of `shapes`.
        formats: Whether modules are int8; both values if they differ.
    """

    shapes: Shapes
    modules: np.ndarray
    formats: frozenset[bool]


def adapter_layout(weights: LoraWeights) -> AdapterLayout:
    """The layout of an adapter in bf16 (A [rank, in] row-major, B [out, rank] column-major) or in int8.

    Raises:
        ValueError: The adapter was not prepared for the native kernels.
    """
    modules = []
    for path, update in weights.modules.items():
        a, b, units, rank = update.A, update.B, update.units, update.rank
        out, width = update.shape
        dtype = torch.bfloat16 if units is None else torch.uint8
        expected_a = (rank, width) if units is None else (bytes_of_a(rank, width),)
        expected_b = (out, rank) if units is None else b_shape(rank, out)
        fits = a.dtype == b.dtype == dtype and a.shape == expected_a and b.shape == expected_b
        if not (fits and a.is_contiguous() and (b.t() if units is None else b).is_contiguous()):
            raise ValueError(f"the update of {path} was not prepared for the native kernels")
        modules.append((0 if units is None else units.data_ptr(), a.data_ptr(), b.data_ptr(), rank, update.scale))
    shapes = tuple((path, update.shape) for path, update in weights.modules.items())
    formats = frozenset(update.units is not None for update in weights.modules.values())
    return AdapterLayout(shapes, np.array(modules, LORA_MODULE), formats)
