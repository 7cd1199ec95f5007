"""A base's matrices in one piece of a GPU's memory, which another process maps: it trains on them without a copy.

Owns where each tensor lies in the piece and the driver's calls between processes (CUDA IPC). Needs no Triton. The piece
is its maker's alone to change or free, and is mapped for as long as the other process runs; nobody writes to it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from server.kernels.weight import Weight

ALIGNMENT = 256
"""Bytes that every tensor begins at a multiple of."""
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.int32, torch.float16, torch.float32)}
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


def room(weights: Mapping[str, Weight]) -> int:
    """Bytes that hold all quantized matrices, however they are joined."""
    return sum(w.nbytes + ALIGNMENT * len(w.tensors) for w in weights.values() if w.scheme != "none")


class Piece:
    """`nbytes` bytes on a device, into which matrices are copied one after the other."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def keep(self, weight: Weight) -> Weight:
        """The same quantized matrix, in this memory."""
        tensors = {}
        for name, tensor in weight.tensors.items():
            at = self._used
            view = self.memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensors[name] = view.copy_(tensor)
            self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return Weight(weight.scheme, weight.layout, weight.shape, weight.group, tensors)


def told(weights: Mapping[str, Weight], memory: torch.Tensor) -> dict[str, Any]:
    """Where matrices lie in a piece's memory, whole ones or parts, and how to map it: as JSON.

    Raises OSError where the driver does not share it.
    """
    begin = memory.data_ptr()
    return {
        "memory": _exported(memory),
        "weights": {
            path: {
                "scheme": weight.scheme,
                "layout": weight.layout,
                "shape": list(weight.shape),
                "group": weight.group,
                "tensors": {
                    name: [str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride()), t.data_ptr() - begin]
                    for name, t in weight.tensors.items()
                },
            }
            for path, weight in weights.items()
        },
    }


def opened(described: Mapping[str, Any], device: torch.device) -> dict[str, Weight]:
    """The matrices that another process has told of, in its memory. Raises OSError if it cannot be mapped."""
    device = torch.empty(0, device=device).device  # with its number, by which torch compares storages' devices
    memory, begin = _mapped(described["memory"], device)

    def view(entry: list[Any]) -> torch.Tensor:
        dtype = _DTYPES[entry[0]]
        return torch.empty(0, dtype=dtype, device=device).set_(
            memory, (begin + entry[3]) // dtype.itemsize, torch.Size(entry[1]), tuple(entry[2])
        )

    return {
        path: Weight(
            entry["scheme"],
            entry["layout"],
            (entry["shape"][0], entry["shape"][1]),
            entry["group"],
            {name: view(tensor) for name, tensor in entry["tensors"].items()},
        )
        for path, entry in described["weights"].items()
    }


class _Handle(ctypes.Structure):
    """`CUipcMemHandle`."""

    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


def _driver() -> Any:
    """The driver's library. The calling thread must have a context: any use of the device by torch makes one."""
    return ctypes.CDLL("libcuda.so.1")


def _exported(memory: torch.Tensor) -> dict[str, Any]:
    """A handle of the allocation that `memory` lies in, and where in it: torch's allocator may have put more there."""
    driver, place = _driver(), memory.data_ptr()
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    _check(
        "cuMemGetAddressRange",
        driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(place)),
    )
    _check("cuIpcGetMemHandle", driver.cuIpcGetMemHandle(ctypes.byref(handle), base))
    return {"handle": bytes(handle.reserved).hex(), "offset": place - base.value, "size": size.value}


def _mapped(exported: Mapping[str, Any], device: torch.device) -> tuple[torch.UntypedStorage, int]:
    """The whole allocation, and where in it the piece begins."""
    handle = _Handle.from_buffer_copy(bytes.fromhex(exported["handle"]))
    pointer = ctypes.c_uint64()
    _check(
        "cuIpcOpenMemHandle",
        _driver().cuIpcOpenMemHandle_v2(ctypes.byref(pointer), handle, ctypes.c_uint(_LAZY_PEER_ACCESS)),
    )
    storage: Any = torch._C._construct_storage_from_data_pointer(pointer.value or 0, device, exported["size"])
    return storage, int(exported["offset"])


def _check(call: str, status: int) -> None:
    if status:
        raise OSError(f"{call} answers {status}")
