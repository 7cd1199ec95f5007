"""The CUDA backend: Triton kernels for one GPU.

This module has the products that the Python decoder (training) uses. Whole steps are in engine/backends/cuda/runner.py.
Without a GPU, Triton's interpreter runs the same kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from adapters.weights import LoraWeights
from server.errors import install_command
from server.kernels.adapter_memory import in_one_piece
from server.kernels.cuda import adapter_codes, packing
from server.kernels.cuda.adapter_layout import adapter_layout
from server.kernels.packed_format import TILE
from server.kernels.recompress import recompress
from server.kernels.weight import Weight

CAPABILITY = (8, 0)
"""The oldest compute capability with bf16 tensor cores."""

NEWEST_PART = "language/target_info.py"
"""A file that Triton has from version 3.5 on, which the kernels need."""

BLOCK_BYTES = 160 << 20
"""Bytes of a matrix that a product dequantizes at a time: a bf16 linear of a 7B model fits."""


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None if they can."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        return f"triton is not installed ({install_command('cuda')})"
    if not any((Path(place) / NEWEST_PART).exists() for place in triton.submodule_search_locations or ()):
        return f"triton is older than 3.5, as torch before 2.9 brings it ({install_command('cuda')})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Triton needs Python's headers, which are missing (install python3-dev)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; check with nvidia-smi that there is one, and the driver's version"
    if not _finds_compiler():
        return "Triton needs a C compiler and finds none (CC, gcc or clang)"
    try:
        found = torch.cuda.get_device_capability()
    except RuntimeError as error:  # it is full, busy, or faulty
        return f"the GPU does not respond: {str(error).splitlines()[0]}"
    if found < CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}, but {CAPABILITY[0]}.{CAPABILITY[1]} is required"
    return None


def _finds_compiler() -> bool:
    """Whether Triton finds a C compiler. It looks at CC first."""
    from triton import knobs

    return any(map(shutil.which, [knobs.build.cc] if knobs.build.cc else ["gcc", "clang"]))


class Cuda:
    """The backend of the Triton kernels, with a bf16 KV cache and a float32 residual stream.

    Adapters are int8 for a quantized base and 16-bit for a 16-bit base. Weights are packed on the CPU, so that the
    packed base can be stored in a file; the runner copies them to the GPU.
    """

    name = "cuda"
    layout = packing.LAYOUT

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def pack(self, stored: Weight) -> Weight:
        return packing.pack(stored)

    def dequantize(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if not _is_on_gpu(weight) or start % TILE:
            return packing.dequantize(weight, start, stop)
        from server.kernels.cuda.matmul import dequantized

        stop = weight.shape[0] if stop is None else min(stop, weight.shape[0])
        return dequantized(packing.slice_outputs(weight, start, stop), torch.float32)

    def prepare(self, weights: LoraWeights, scheme: str) -> LoraWeights:
        pinned, weights = torch.cuda.is_available(), recompress(weights)
        if scheme == "none":
            kept = in_one_piece(weights, self.dtype, pinned)
        else:
            kept = adapter_codes.encoded(weights, pinned)
        return replace(kept, layout=adapter_layout(kept, self.dtype if scheme == "none" else torch.int8))

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        """x times the transposed matrix. On a GPU at most BLOCK_BYTES are dequantized at a time, because a large output
        table would take gigabytes."""
        if not _is_on_gpu(weight):
            return _product(x, packing.dequantize(weight).to(x.dtype), update)
        from server.kernels.cuda.matmul import dequantized

        outputs, inputs = weight.shape
        step = max(TILE, BLOCK_BYTES // (inputs * x.element_size()) // TILE * TILE)
        if outputs <= step:
            return _product(x, dequantized(weight, x.dtype), update)
        y = x.new_empty(*x.shape[:-1], outputs)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            part = None if update is None else update[..., start:stop]
            y[..., start:stop] = _product(x, dequantized(packing.slice_outputs(weight, start, stop), x.dtype), part)
        return y

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return packing.gather_rows(weight, ids)


def _product(x: torch.Tensor, weight: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight) if update is None else torch.addmm(update, x, weight.T)


def _is_on_gpu(weight: Weight) -> bool:
    """Whether a matrix is quantized and on a GPU."""
    return weight.scheme != "none" and weight.tensors["words"].is_cuda
