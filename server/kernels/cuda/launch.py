"""How kernels are launched, one on the heels of the other, and what each does first.

On GPUs that can, a kernel's programs take their places while those of the kernel before still run, so that a step's
hundreds of launches do not wait for the device each time (programmatic dependent launch, CUDA C++ programming guide).
What makes that right: before it reads or writes anything, every program of every kernel waits until the kernel before
has ended and all that it wrote can be seen. That one has waited likewise, so whatever was launched earlier has ended.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

OVERLAPPING = (9, 0)
"""The first compute capability that launches a kernel before the one ahead has ended."""


@triton.jit
def begin():
    """What every kernel does first, in all its programs. In the interpreter, and where kernels do not overlap, none.

    What comes next is let in only now, so that no more than two kernels share the places.
    """
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ask_for(places):
    """Before `begin`: have lines of 128 bytes brought into the second cache, one a pointer, of what no step writes."""
    if cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@lru_cache(maxsize=1)
def options() -> dict[str, Any]:
    """What every launch is given, beside a kernel's own. The same object each time.

    Sums and products are rounded one by one, as the stored form says; where a fused one is meant, tl.fma says so.
    """
    overlaps = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OVERLAPPING
    return {"enable_fp_fusion": False, **({"launch_pdl": True} if overlaps else {})}


def keep_apart() -> bool:
    """From here on a kernel is launched once the one ahead has ended, on any GPU. Answers whether it was otherwise."""
    return bool(options().pop("launch_pdl", False))
