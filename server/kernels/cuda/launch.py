"""Launch options and programmatic dependent launch (CUDA C++ programming guide).

On GPUs from capability 9.0 on, a kernel's programs start while the previous kernel still runs, which hides launch
latency. Every program waits for the end of the previous kernel before it reads or writes memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

OVERLAPPING = (9, 0)
"""The first compute capability with programmatic dependent launch."""


@triton.jit
def wait_for_previous_kernel():
    """First statement of every kernel: wait for the previous kernel. No effect in the interpreter or without dependent
    launch.

    The next kernel may start only then, so at most two kernels share the GPU.
    """
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_l2(pointers):
    """Prefetch lines of 128 bytes into L2, one per pointer. Constant data only, if before the wait."""
    if cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@lru_cache(maxsize=1)
def options() -> dict[str, Any]:
    """Options of every launch. The same dict each time.

    Fused multiply-add is off, because double-quantized scales are defined by two roundings. Kernels use tl.fma where
    they want it.
    """
    overlaps = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OVERLAPPING
    return {"enable_fp_fusion": False, **({"launch_pdl": True} if overlaps else {})}


def disable_dependent_launch() -> bool:
    """Turn dependent launch off. Returns whether it was on."""
    return bool(options().pop("launch_pdl", False))
