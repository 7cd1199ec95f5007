"""The native backend: C++ kernels for AVX512-VNNI or AVX2, built with the package and loaded with ctypes.

Owns whether they can run here, and the products that the Python decoder (training) asks of them; a whole step is
engine/native_runner.py's. 4-bit and 8-bit weights meet activations quantized to int8 per row and quarter of a span
of 64, or, in a processor's matrix unit, to 15 bits per row.
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
    """Why the native kernels cannot run on this machine, or None where they can."""
    try:
        reason = bindings.library().loramux_missing()
    except OSError as e:
        return str(e)
    return None if reason is None else str(reason.decode())


def instructions() -> str:
    """What the kernels that run here are compiled for. Raises OSError where there are none."""
    return str(bindings.library().loramux_instructions().decode())


def unread() -> tuple[str, ...]:
    """Tensors of a packed matrix that steps on this processor do not read. Raises as `instructions`."""
    return () if "AMX" in instructions() else packing.OF_UNIT


_pools: list[bindings.Pool] = []
_making = threading.Lock()


def shared_pool() -> bindings.Pool:
    """The threads of products that no runner asks for, as many as torch's own when the first is asked for."""
    with _making:
        if not _pools:
            _pools.append(bindings.Pool(torch.get_num_threads()))
    return _pools[0]


class Native:
    """The backend of the C++ kernels. The KV cache is bf16, the residual stream float32.

    Adapters are int8 codes beside a base in codes, and bf16 beside one that is.
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
        kept = in_one_piece(weights, self.dtype) if scheme == "none" else encoded(weights)
        return replace(kept, layout=adapter_layout(kept))

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.detach().float().contiguous()
        y = torch.empty(rows.shape[0], weight.shape[0])
        if not bindings.library().loramux_linear(
            shared_pool().handle, packing.matrix(weight), rows.data_ptr(), rows.shape[0], y.data_ptr()
        ):
            raise MemoryError(f"no memory for a product of {rows.shape[0]} rows")
        return (y if update is None else y.add_(update)).to(x.dtype)

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        wanted = ids.long().contiguous()
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < weight.shape[0]:
            raise IndexError(f"a row is not below {weight.shape[0]}")
        out = torch.empty(wanted.numel(), weight.shape[1])
        bindings.library().loramux_rows(packing.matrix(weight), wanted.data_ptr(), wanted.numel(), out.data_ptr())
        return out
