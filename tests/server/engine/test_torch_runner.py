"""TorchRunner: storage, slots and memory figures. tests/server/model/test_decoder.py tests the results."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from adapters.weights import LoraWeights
from server.engine.backends import make_runner
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch

if TYPE_CHECKING:
    from server.model.loader import Base


def step(*mixes: tuple[tuple[int, float], ...]) -> Batch:
    """The first token of each sequence, each in its own block."""
    count = len(mixes)
    return Batch(
        tokens=np.arange(count) + 5,
        positions=np.zeros(count, np.int64),
        row_start=np.arange(count + 1, dtype=np.int32),
        context=np.ones(count, np.int32),
        blocks=np.arange(count, dtype=np.int32)[:, None],
        logit_rows=np.arange(count),
        mixes=mixes,
    )


def test_memory_figures(tiny_base: Base, tiny_runner: TorchRunner) -> None:
    held = tiny_runner.nbytes()
    assert held["base"] == tiny_base.nbytes
    assert tiny_runner.block_bytes(16) == 2 * 2 * 2 * 16 * 16 * 4  # layers, k and v, heads, tokens, dimensions, bytes
    assert (held["kv_cache"], held["activations"]) == (0, 0)  # unwritten pages take no memory
    tiny_runner.run(step((), (), ()))
    held = tiny_runner.nbytes()
    assert held["kv_cache"] == 3 * tiny_runner.block_bytes(16)
    assert held["activations"] > 0
    tiny_runner.allocate(8, 32)
    assert tiny_runner.nbytes()["kv_cache"] == 0


def test_unloading_adapters_frees_them_and_restores_the_base(
    tiny_runner: TorchRunner, tiny_adapter: Callable[..., LoraWeights]
) -> None:
    before = tiny_runner.run(step((), ())).rows
    for slot in range(3):
        tiny_runner.load_adapter(slot, tiny_adapter(slot, rank=2 + slot))
    mixed = tiny_runner.run(step(((0, 1.0), (2, 0.5)), ((1, -1.0),))).rows
    assert not torch.allclose(mixed[0], before[0], atol=1e-3)
    again = tiny_adapter(9)
    gone = weakref.ref(again)
    tiny_runner.load_adapter(1, again)
    tiny_runner.run(step(((1, 1.0),), ((0, 1.0),)))
    del again
    for slot in range(3):
        tiny_runner.unload_adapter(slot)
    gc.collect()
    assert gone() is None
    assert torch.equal(tiny_runner.run(step((), ())).rows, before)


def test_the_number_of_slots_is_limited(tiny_base: Base, tiny_adapter: Callable[..., LoraWeights]) -> None:
    runner = make_runner(tiny_base, max_slots=1, threads=1)
    runner.load_adapter(0, tiny_adapter(0))
    with pytest.raises(IndexError):
        runner.load_adapter(1, tiny_adapter(1))
    with pytest.raises(ValueError, match="at least one thread"):
        make_runner(tiny_base, max_slots=1, threads=0)
