"""Kernels: the arithmetic of a step, in several backends of one shape. Know integers and offsets, not names.

`reference` is plain torch in float32 and the oracle of all others; `aten` uses torch's own 4-bit and bf16 ops;
`native` is the C++ library of `kernels/cpu`; `cuda` is Triton. One is picked, once, when the base is loaded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from adapters.weights import LoraWeights
from server.errors import BadSetting
from server.kernels.weight import Weight

if TYPE_CHECKING:
    from server.kernels.lora import Segments

CHOICES = ("auto", "native", "aten", "reference", "cuda")
"""What `--kernels` may say."""

log = logging.getLogger(__name__)


class Backend(Protocol):
    """What the base and its decoder need of a backend, whatever runs its steps.

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

    def prepare(self, weights: LoraWeights, scheme: str) -> LoraWeights:
        """The adapter in this backend's kernel layout, beside linears of that scheme: the one copy that is kept in RAM.

        Raises InvalidAdapter if a value is not finite in it.
        """

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] times the transposed matrix: [T, out] of x's dtype (bfloat16 or float32). Keeps no graph.

        `update` [T, out] is added before the result is rounded.
        """

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (int64 [T]) of the matrix as float32 [T, in]."""


@runtime_checkable
class StepBackend(Backend, Protocol):
    """A backend whose steps the Python decoder runs: it adds the low-rank updates too."""

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, path: str, segments: Segments) -> None:
        """Add to y [T, out], in place, what the adapters of each row make of x [T, in] in the module `path`."""


def choose(name: str = "auto", device: str = "auto") -> Backend:
    """The backend of that name on that device; `auto` is what serves fastest here.

    That is the GPU where one can be used, then the native kernels where they were built and run, else torch's own ops.
    Kernels that are named run on the CPU, unless they are `cuda`. Raises BadSetting for an unknown name, and for what
    is asked for and cannot run here, with the reason.
    """
    if name not in CHOICES:
        raise BadSetting(f"kernels {name!r} are not known; known are {', '.join(CHOICES)}", "kernels")
    if name not in ("auto", "cuda") and device == "cuda":
        raise BadSetting(f"the {name} kernels run on a CPU; leave --kernels or --device out", "kernels")
    if name == "cuda" and device == "cpu":
        raise BadSetting("the cuda kernels do not run on a CPU; leave --kernels or --device out", "kernels")
    if device != "cpu" and name in ("auto", "cuda"):
        from server.kernels import cuda

        reason = cuda.unavailable()
        if reason is None:
            return cuda.Cuda()
        if name == "cuda" or device == "cuda":
            raise BadSetting(
                f"the CUDA kernels cannot run here: {reason}; without --device cuda the CPU serves", "device"
            )
    if name in ("auto", "native"):
        from server.kernels import cpu

        reason = cpu.unavailable()
        if reason is None:
            return cpu.Native()
        if name == "native":
            raise BadSetting(f"the native kernels cannot run here: {reason}", "kernels")
        log.info("the native kernels cannot run here (%s); torch's own ops serve", reason)
    if name == "reference":
        from server.kernels.reference import Reference

        return Reference()
    from server.kernels.aten import Aten

    return Aten()
