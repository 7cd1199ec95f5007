"""Matrices in one piece of memory that another process maps: with a driver that hands out a CPU's memory."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import torch

from server.kernels.cuda import packing, shared
from server.kernels.weight import Weight
from server.model.quantization import quantize

CPU = torch.device("cpu")


class Driver:
    """Handles are numbers of allocations; `status` is what every call answers."""

    def __init__(self, memory: torch.Tensor, before: int) -> None:
        self.base, self.size, self.status = memory.data_ptr() - before, memory.nbytes + before, 0

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, place: Any) -> int:
        assert self.base <= place.value < self.base + self.size
        base._obj.value, size._obj.value = self.base, self.size
        return self.status

    def cuIpcGetMemHandle(self, handle: Any, base: Any) -> int:
        ctypes.memmove(handle, bytes([7, 0, 9]) + base.value.to_bytes(8, "little"), 11)
        return self.status

    def cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: Any) -> int:
        assert bytes(handle.reserved)[:3] == bytes([7, 0, 9]) and flags.value == 1
        pointer._obj.value = int.from_bytes(bytes(handle.reserved)[3:11], "little")
        return self.status


def weights() -> dict[str, Weight]:
    kinds = {"a": ("int4", 64, True), "b": ("int4", 64, True), "c": ("nf4", 64, False), "d": ("int8", 32, False)}
    draw = torch.Generator().manual_seed(3)
    return {path: packing.pack(quantize(torch.randn(48, 256, generator=draw), *kind)) for path, kind in kinds.items()}


def test_what_is_mapped_is_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole matrices, and those that were joined; the piece begins within an allocation of which it is not all."""
    exact = weights()
    allocation = torch.zeros(4096 + shared.room(exact), dtype=torch.uint8)
    piece = shared.Piece(shared.room(exact), CPU)
    piece.memory = allocation[4096:]
    joined = piece.keep(packing.side_by_side([exact["a"], exact["b"]], CPU))
    parts = {"a": packing.part(joined, 0, 48), "b": packing.part(joined, 48, 96)}
    parts |= {path: piece.keep(exact[path]) for path in "cd"}
    assert piece._used <= shared.room(exact)
    monkeypatch.setattr(shared, "_driver", lambda: Driver(piece.memory, 4096))
    told = json.loads(json.dumps(shared.told(parts, piece.memory)))
    assert told["memory"]["offset"] == 4096
    found = shared.opened(told, CPU)
    assert set(found) == set(exact)
    for path, weight in found.items():
        assert torch.equal(packing.dequantize(weight), packing.dequantize(exact[path]))
        assert all(t.untyped_storage().data_ptr() == allocation.data_ptr() for t in weight.tensors.values())


def test_a_driver_that_does_not_share_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    driver = Driver(memory, 0)
    monkeypatch.setattr(shared, "_driver", lambda: driver)
    told = shared.told({}, memory)
    driver.status = 801
    with pytest.raises(OSError, match="cuMemGetAddressRange answers 801"):
        shared.told({}, memory)
    with pytest.raises(OSError, match="cuIpcOpenMemHandle answers 801"):
        shared.opened(told, CPU)
