"""Shares the base's matrices on a GPU with a training process through CUDA IPC, without a copy.

The owner may change or free the memory. The other process maps it for as long as it runs and only reads it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from server.kernels.weight import Weight

ALIGNMENT = 256
"""Alignment of every tensor in bytes."""
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.int32, torch.float16, torch.float32)}
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


def required_bytes(weights: Mapping[str, Weight]) -> int:
    """Bytes that hold all quantized matrices, with alignment."""
    return sum(w.nbytes + ALIGNMENT * len(w.tensors) for w in weights.values() if w.scheme != "none")


class SharedBuffer:
    """A buffer of `nbytes` bytes on a device, filled with matrices one after the other."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def add(self, weight: Weight) -> Weight:
        """Copy a quantized matrix into the buffer."""
        tensors = {}
        for name, tensor in weight.tensors.items():
            at = self._used
            view = self.memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensors[name] = view.copy_(tensor)
            self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return Weight(weight.scheme, weight.layout, weight.shape, weight.group, tensors)


def export(weights: Mapping[str, Weight], memory: torch.Tensor) -> dict[str, Any]:
    """Describe matrices in a buffer's memory for `open_shared`, as JSON.

    Raises:
        OSError: The driver cannot share the memory.
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


def open_shared(described: Mapping[str, Any], device: torch.device) -> dict[str, Weight]:
    """Map the matrices that another process exported. Raises OSError if they cannot be mapped."""
    device = torch.empty(0, device=device).device  # with its index, which torch compares
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
    """The driver's library. The calling thread needs a CUDA context, which any use of the device by torch creates."""
    return ctypes.CDLL("libcuda.so.1")


def _exported(memory: torch.Tensor) -> dict[str, Any]:
    """IPC handle of the allocation that contains `memory`, and the offset in it."""
    driver, place = _driver(), memory.data_ptr()
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    _check(
        "cuMemGetAddressRange",
        driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(place)),
    )
    _check("cuIpcGetMemHandle", driver.cuIpcGetMemHandle(ctypes.byref(handle), base))
    return {"handle": bytes(handle.reserved).hex(), "offset": place - base.value, "size": size.value}


def _mapped(exported: Mapping[str, Any], device: torch.device) -> tuple[torch.UntypedStorage, int]:
    """Map an allocation. Returns it and the offset of the buffer."""
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
        raise OSError(f"{call} failed with error {status}")
