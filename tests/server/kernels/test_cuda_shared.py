"""Sharing matrices with another process, with a fake CUDA driver, and on a GPU with the real one."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from server.kernels.cuda import packing, shared_memory
from server.kernels.weight import Weight
from server.model.quantization import quantize

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[3]
MAPS = """
import hashlib, json, sys
import torch
from server.kernels.cuda import packing, shared_memory
device = torch.device("cuda", torch.cuda.current_device())
torch.zeros(1, device=device)
try:
    found = shared_memory.open_shared(json.load(sys.stdin), device)
except OSError as error:
    sys.exit(f"not shared: {error}")
exact = {path: packing.dequantize(weight).cpu().numpy().tobytes() for path, weight in found.items()}
print(json.dumps({path: hashlib.sha256(values).hexdigest() for path, values in exact.items()}))
"""
"""A process that maps exported matrices and prints their digests."""


class Driver:
    """A fake driver. Every call returns `status`."""

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


def test_opened_matrices_equal_the_exported_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single and concatenated matrices, in a buffer that is a part of its allocation."""
    exact = weights()
    allocation = torch.zeros(4096 + shared_memory.required_bytes(exact), dtype=torch.uint8)
    piece = shared_memory.SharedBuffer(shared_memory.required_bytes(exact), CPU)
    piece.memory = allocation[4096:]
    joined = piece.add(packing.concatenate([exact["a"], exact["b"]], CPU))
    parts = {"a": packing.slice_outputs(joined, 0, 48), "b": packing.slice_outputs(joined, 48, 96)}
    parts |= {path: piece.add(exact[path]) for path in "cd"}
    assert piece._used <= shared_memory.required_bytes(exact)
    monkeypatch.setattr(shared_memory, "_driver", lambda: Driver(piece.memory, 4096))
    described = json.loads(json.dumps(shared_memory.export(parts, piece.memory)))
    assert described["memory"]["offset"] == 4096
    found = shared_memory.open_shared(described, CPU)
    assert set(found) == set(exact)
    for path, weight in found.items():
        assert torch.equal(packing.dequantize(weight), packing.dequantize(exact[path]))
        assert all(t.untyped_storage().data_ptr() == allocation.data_ptr() for t in weight.tensors.values())


def test_errors_of_the_driver_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    driver = Driver(memory, 0)
    monkeypatch.setattr(shared_memory, "_driver", lambda: driver)
    described = shared_memory.export({}, memory)
    driver.status = 801
    with pytest.raises(OSError, match="cuMemGetAddressRange failed with error 801"):
        shared_memory.export({}, memory)
    with pytest.raises(OSError, match="cuIpcOpenMemHandle failed with error 801"):
        shared_memory.open_shared(described, CPU)


@pytest.mark.gpu
def test_another_process_maps_the_matrices_of_a_gpu() -> None:
    """With the real driver."""
    exact = weights()
    piece = shared_memory.SharedBuffer(shared_memory.required_bytes(exact), torch.device("cuda"))
    kept = {path: piece.add(weight) for path, weight in exact.items()}
    try:
        described = shared_memory.export(kept, piece.memory)
    except OSError as error:
        pytest.skip(f"the driver shares no memory here: {error}")
    torch.cuda.synchronize()
    done = subprocess.run(
        [sys.executable, "-c", MAPS],
        input=json.dumps(described),
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "not shared: " in done.stderr:
        pytest.skip(done.stderr[-500:])
    assert done.returncode == 0, done.stderr[-2000:]
    values = {path: packing.dequantize(weight).numpy().tobytes() for path, weight in exact.items()}
    assert json.loads(done.stdout) == {path: hashlib.sha256(each).hexdigest() for path, each in values.items()}
