"""A training run on disk: what a checkpoint takes while it is written, and why one cannot be read."""

from __future__ import annotations

import os
import resource
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import torch

from adapters.checkpoints import FILE, Checkpoint, read_checkpoint, write_checkpoint
from adapters.errors import StoreFailed


def test_writing_a_checkpoint_does_not_copy_tensors(tmp_path: Path) -> None:
    """A run that has just room for itself would end at its first checkpoint otherwise."""
    state = Checkpoint("key", {"step": 1}, {"values": torch.ones(1 << 20), "steps": torch.tensor(1)})
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, state)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "turned": torch.randn(5, 3).T,
        "steps": torch.tensor(7),
        "half": torch.randn(2, 1).half(),
        "none": torch.zeros(0, 4),
    }
    write_checkpoint(tmp_path, Checkpoint("key", {"step": 1}, tensors))
    found = read_checkpoint(tmp_path, "key")
    assert found is not None and found.progress == {"step": 1}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / FILE, framework="pt") as file:
        assert set(file.keys()) == set(tensors)


def test_an_unreadable_checkpoint_is_not_reported_as_damaged(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint("key", {"step": 1}, {"values": torch.ones(4)}))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(next_one := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, limits[1]))
    try:
        with pytest.raises(StoreFailed, match="cannot be read: Too many open files$") as told:
            read_checkpoint(tmp_path, "key")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(tmp_path) not in told.value.message
    assert read_checkpoint(tmp_path, "key") is not None
