"""`AdapterLayout`: where the matrices of one adapter lie in memory, as the kernels are told when it gets a slot.

Owns the layout that the kernels read an adapter in. It is found out once, when the adapter is made ready: requests of
many adapters give slots away every few steps, and a step waits meanwhile. Does not know models or slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.kernels.cpu.adapter_codes import bytes_of_a, tiles
from server.kernels.cpu.bindings import LoraSite
from server.kernels.lora import Shapes

SITE = np.dtype(LoraSite)
"""One module: the addresses `units` (0 for bf16), `a` and `b`, then `rank` and `scale`."""


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """`sites` [modules] of `SITE`, in the order of `shapes`. Addresses are those of tensors that it does not own.

    `coded`: whether modules are codes, of all that there are.
    """

    shapes: Shapes
    sites: np.ndarray
    coded: frozenset[bool]


def adapter_layout(weights: LoraWeights) -> AdapterLayout:
    """Those of an adapter that lies as the kernels read it: bf16, A [rank, in] row-major, B [out, rank] column-major,
    or codes as `encoded` makes them.

    Raises ValueError if it does not.
    """
    sites = []
    for path, update in weights.modules.items():
        a, b, units, rank = update.A, update.B, update.units, update.rank
        out, into = update.shape
        dtype = torch.bfloat16 if units is None else torch.uint8
        of_a = (rank, into) if units is None else (bytes_of_a(rank, into),)
        of_b = (out, rank) if units is None else tiles(rank, out)
        fits = a.dtype == b.dtype == dtype and a.shape == of_a and b.shape == of_b
        if not (fits and a.is_contiguous() and (b.t() if units is None else b).is_contiguous()):
            raise ValueError(f"the update of {path} was not prepared for the native kernels")
        sites.append((0 if units is None else units.data_ptr(), a.data_ptr(), b.data_ptr(), rank, update.scale))
    shapes = tuple((path, update.shape) for path, update in weights.modules.items())
    return AdapterLayout(
        shapes, np.array(sites, SITE), frozenset(update.units is not None for update in weights.modules.values())
    )
