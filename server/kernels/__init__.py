"""Kernels: the arithmetic of a step, as interchangeable backends.

- `reference`: plain torch in float32, which the tests compare all others with
- `aten`: torch's 4-bit and bf16 ops
- `native`: C++ for CPUs
- `cuda`: Triton for GPUs
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
"""Values of `--kernels`."""

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Packs weights and multiplies with them.

    Attributes:
        name: "reference", "aten", "native" or "cuda".
        layout: Name of the packed layout with its version and instruction set. A packed base is only reused by a
            backend with the same layout.
        dtype: Dtype of activations and of the KV cache.
    """

    name: str
    layout: str
    dtype: torch.dtype

    def pack(self, stored: Weight) -> Weight:
        """Convert a matrix from the `stored` layout. The result may share its tensors."""

    def dequantize(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` as float32, equal to those of the stored form."""

    def prepare(self, weights: LoraWeights, scheme: str) -> LoraWeights:
        """Convert an adapter to the layout of the kernels, for linears of that scheme.

        Raises:
            InvalidAdapter: A value is not finite after the conversion.
        """

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply with the transposed matrix, without autograd.

        Args:
            weight: A packed matrix [out, in].
            x: Rows [T, in], bfloat16 or float32.
            update: Added before the result is rounded, [T, out].

        Returns:
            [T, out] in the dtype of x.
        """

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (int64 [T]) of the matrix as float32 [T, in]."""


@runtime_checkable
class StepBackend(Backend, Protocol):
    """A backend that also adds LoRA updates, so that the Python decoder can run steps with it."""

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, path: str, segments: Segments) -> None:
        """Add the LoRA updates of the module `path` for rows x [T, in] to y [T, out], in place."""


def choose(name: str = "auto", device: str = "auto") -> Backend:
    """The backend of that name on that device.

    `auto` prefers the GPU, then the native kernels, then torch's ops. Named kernels other than `cuda` run on the CPU.

    Raises:
        BadSetting: The name is unknown, or the backend cannot run here.
    """
    if name not in CHOICES:
        raise BadSetting(f"unknown kernels {name!r}; choose one of {', '.join(CHOICES)}", "kernels")
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
                f"the CUDA kernels cannot run here: {reason}; leave --device cuda out to use the CPU", "device"
            )
    if name in ("auto", "native"):
        from server.kernels import cpu

        reason = cpu.unavailable()
        if reason is None:
            return cpu.Native()
        if name == "native":
            raise BadSetting(f"the native kernels cannot run here: {reason}", "kernels")
        log.info("the native kernels cannot run here (%s); using torch's ops", reason)
    if name == "reference":
        from server.kernels.reference import Reference

        return Reference()
    from server.kernels.torch_ops import TorchOps

    return TorchOps()
