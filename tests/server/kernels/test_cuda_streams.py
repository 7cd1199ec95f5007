"""Adapter copies and steps on streams that run in any order the events allow."""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from adapters.weights import LoraWeights
from server.engine.backends.cuda import adapter_pool
from server.engine.backends.cuda.adapter_pool import AdapterPool
from server.engine.backends.cuda.runner import StepMemory
from server.kernels.cuda import Cuda
from tests.server.kernels.late import LateDevice
from tests.server.kernels.tiny import adapter, lies_in, llama, uncut

CONFIG = llama(
    vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
)  # fmt: skip
SLOTS = 6


@pytest.fixture(scope="module")
def made() -> list[LoraWeights]:
    """Prepared adapters of several sizes, every other one not splittable."""
    each = [
        Cuda(torch.float32).prepare(adapter(CONFIG, rank, rank, ("q_proj", "o_proj")), "int4") for rank in range(1, 9)
    ]
    return [uncut(weights) if i % 2 else weights for i, weights in enumerate(each)]


def wrong_reads(made: list[LoraWeights], seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many reads by steps found another adapter than the slot's, while adapters are loaded, unloaded and moved."""
    draw = random.Random(seed)
    monkeypatch.setattr(adapter_pool, "PIECE", draw.choice([64, 512, 8 << 20]))
    sizes = [weights.layout.flat.numel() for weights in made]
    room = int(sizes[-1] * draw.choice([2.0, 2.5, 3.0]))
    pool = AdapterPool(CONFIG, room, SLOTS, torch.device("cpu"), torch.float32, True)
    tables = {name: getattr(pool.pool, name).clone() for name in ("offsets", "ranks", "scales")}
    pool.pool = replace(pool.pool, **tables)  # device copies; on the CPU they would alias the host's
    held: dict[int, int] = {}
    wrong: list[int] = []

    def read(slot: int, kind: int) -> None:
        if not lies_in(pool, slot, made[kind]):
            wrong.append(slot)

    with LateDevice(draw, monkeypatch) as device:
        pool._stream = device.copies
        monkeypatch.setattr(pool, "_pinned", torch.clone)
        for _ in range(60):
            if draw.random() < 0.5:
                slots = draw.sample(sorted(held), min(len(held), draw.randint(1, 3)))
                pool.wait_for_copies(slots)
                for slot in slots:
                    device.main.given.append(lambda slot=slot, kind=held[slot]: read(slot, kind))
                pool.record_use(slots)
            else:
                slot, kind = draw.randrange(SLOTS), draw.randrange(len(made))
                held.pop(slot, None)
                pool.unload_adapter(slot)
                while sum(sizes[other] for other in held.values()) + sizes[kind] > pool._size:
                    gone = draw.choice(sorted(held))
                    del held[gone]
                    pool.unload_adapter(gone)
                pool.load_adapter(slot, made[kind])
                held[slot] = kind
            device.go_on(draw.choice([0, 0, 3, 20, 200]))
        device.finish()
    return len(wrong)


@pytest.mark.parametrize("seed", range(40))
def test_steps_read_their_adapters_in_any_order_of_streams(
    made: list[LoraWeights], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong_reads(made, seed, monkeypatch) == 0


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("missing", ["wait_for_copies", "record_use", "_wait_for_readers", "wait_stream", "_unloaded"])
def test_a_missing_wait_is_detected(made: list[LoraWeights], missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    if missing == "wait_stream":
        monkeypatch.setattr("tests.server.kernels.late.LateStream.wait_stream", nothing)
    elif missing == "_unloaded":
        wait = AdapterPool._wait_for_readers

        def of_the_slot_alone(pool: AdapterPool, slot: int) -> None:
            pool._unloaded.clear()
            wait(pool, slot)

        monkeypatch.setattr(AdapterPool, "_wait_for_readers", of_the_slot_alone)
    else:
        monkeypatch.setattr(AdapterPool, missing, nothing)
    assert any(wrong_reads(made, seed, monkeypatch) for seed in range(60))


@pytest.mark.parametrize("waits", [True, False])
def test_step_arrays_are_not_overwritten_before_they_are_copied(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[int] = []
    memory, target = StepMemory(4, torch.device("cpu")), torch.zeros(4, dtype=torch.int32)
    memory._pinned = True
    shape: Any = SimpleNamespace(elements=4)
    if not waits:
        monkeypatch.setattr("tests.server.kernels.late._Recorded.synchronize", nothing)

    def read(step: int) -> None:
        if target.tolist() != [step] * 4:
            wrong.append(step)

    draw = random.Random(1)
    with LateDevice(draw, monkeypatch) as device:
        for step in range(200):
            numbers: Any = SimpleNamespace(write=lambda shape, host, step=step: host.fill(step))
            memory.send(numbers, shape, target)
            device.main.given.append(lambda step=step: read(step))
            device.go_on(draw.choice([0, 0, 1, 4]))
        device.finish()
    assert bool(wrong) != waits
