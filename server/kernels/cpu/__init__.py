"""The native CPU backend: C++ kernels for AMX, AVX512-VNNI and AVX2, built with the package and loaded with ctypes.

This module has the products that the Python decoder (training) uses. Whole steps are in engine/backends/cpu/runner.py.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from adapters.weights import LoraWeights
from server.kernels.adapter_memory import in_one_piece
from server.kernels.cpu import bindings, packing
from server.kernels.cpu.adapter_codes import encoded
from server.kernels.cpu.adapter_layout import adapter_layout
from server.kernels.recompress import recompress
from server.kernels.weight import Weight


def unavailable() -> str | None:
    """Why the native kernels cannot run on this machine, or None if they can."""
    try:
        reason = bindings.library().loramux_unsupported()
    except OSError as e:
        return str(e)
    return None if reason is None else str(reason.decode())


def instructions() -> str:
    """The instruction sets of the loaded kernels. Raises OSError if none can be loaded."""
    return str(bindings.library().loramux_instructions().decode())


def unused_tensors() -> tuple[str, ...]:
    """Tensors of a packed matrix that this processor's kernels do not read. Raises OSError like `instructions`."""
    return () if "AMX" in instructions() else packing.AMX_TENSORS


_pools: list[bindings.ThreadPool] = []
_pools_lock = threading.Lock()


def shared_pool() -> bindings.ThreadPool:
    """The thread pool for products outside a runner, with torch's number of threads at the first call."""
    with _pools_lock:
        if not _pools:
            _pools.append(bindings.ThreadPool(torch.get_num_threads()))
    return _pools[0]


class Native:
    """The backend of the C++ kernels, with a bf16 KV cache and a float32 residual stream.

    Activations are quantized: to int8 with a scale per 16 inputs, or to 15 bits per row with AMX. Adapters are int8 for
    a quantized base and bf16 for a bf16 base.
    """

    name = "native"
    layout = packing.LAYOUT
    dtype = torch.bfloat16

    def pack(self, stored: Weight) -> Weight:
        return packing.pack(stored)

    def dequantize(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return packing.dequantize(weight, start, stop)

    def prepare(self, weights: LoraWeights, scheme: str) -> LoraWeights:
        weights = recompress(weights)
        prepared = in_one_piece(weights, self.dtype) if scheme == "none" else encoded(weights)
        return replace(prepared, layout=adapter_layout(prepared))

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.detach().float().contiguous()
        y = torch.empty(rows.shape[0], weight.shape[0])
        if not bindings.library().loramux_linear(
            shared_pool().handle, packing.matrix(weight), rows.data_ptr(), rows.shape[0], y.data_ptr()
        ):
            raise MemoryError(f"not enough memory for a product of {rows.shape[0]} rows")
        return (y if update is None else y.add_(update)).to(x.dtype)

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.long().contiguous()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < weight.shape[0]:
            raise IndexError(f"an id is not below {weight.shape[0]}")
        out = torch.empty(ids.numel(), weight.shape[1])
        bindings.library().loramux_embed(packing.matrix(weight), ids.data_ptr(), ids.numel(), out.data_ptr())
        return out
