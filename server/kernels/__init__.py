"""Kernels: the arithmetic of a step, in several backends of one shape. Know integers and offsets, not names.

`reference` is plain torch in float32 and the oracle of all others; `aten` uses torch's own 4-bit and bf16 ops;
`native` is the C++ library of `kernels/cpu`; `cuda` is Triton. One is picked, once, when the base is loaded.
"""

from __future__ import annotations

from typing import Protocol

import torch

from adapters.weights import LoraWeights
from server.kernels.weight import Weight


class Backend(Protocol):
    """What loading needs of a backend, whatever runs its steps.

    `name` is "reference", "aten", "native" or "cuda"; `layout` names its packed layouts, version and ISA included,
    so that a cached packed base is never read by another; `dtype` is that of activations and of the KV cache.
    """

    name: str
    layout: str
    dtype: torch.dtype

    def pack(self, stored: Weight) -> Weight:
        """The resident form of a matrix in the `stored` layout; may share its tensors."""

    def dequantize(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` as float32, equal to those of the stored form."""

    def prepare(self, weights: LoraWeights) -> LoraWeights:
        """The adapter in this backend's kernel layout (dtype and strides): the one copy that is kept in RAM."""
