"""Roofline costs, timed steps, and the in-process engine."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from adapters.peft_format import read_folder
from benchmarks import roofline, steps
from benchmarks.local_engine import LocalEngine
from benchmarks.synthetic import write_adapter
from server.engine.batch import Batch, Logits
from server.kernels import cpu
from server.kernels.cpu import packing
from server.model.quantization import quantize

if TYPE_CHECKING:
    from server.engine.request import Request
    from server.model.loader import Base


def test_cost_of_a_step(tiny_base: Base, tmp_path: Path) -> None:
    """`tiny_base` has two layers of hidden size 64 and 128, 4 heads of 16 and 2 KV heads, and 272 tokens."""
    shapes = tiny_base.shapes()
    paths = [write_adapter(tmp_path / f"r{rank}", shapes, rank=rank, seed=rank) for rank in (3, 5)]
    a, b = (tiny_base.prepare(read_folder(path, name=path.name, shapes=shapes)) for path in paths)
    cost = roofline.decode_cost(tiny_base, [20, 30, 7], [[a], [a, b], []])
    linears = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    table = 272 * 64
    per_rank = 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64)
    kv_per_token = 2 * 2 * 2 * 16
    weights = sum(w.nbytes for w in tiny_base.weights.values())
    assert weights >= 2 * (linears + table)
    assert cost.nbytes == weights + 4 * per_rank * (3 + 5) + 2 * kv_per_token * (20 + 30 + 7)
    attention = 2 * 2 * 4 * 16 * (20 + 30 + 7)
    assert cost.ops == 2 * (3 * (linears + table) + per_rank * (3 + 3 + 5) + attention)


@pytest.mark.parametrize(("instructions", "read"), [("AMX-INT8, AVX512-VNNI", True), ("AVX512-VNNI", False)])
def test_tensors_for_amx_count_only_with_amx(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch, instructions: str, read: bool
) -> None:
    monkeypatch.setattr(cpu, "instructions", lambda: instructions)
    generator = torch.Generator().manual_seed(0)
    stored = {path: torch.randn(w.shape, generator=generator) for path, w in tiny_base.weights.items()}
    weights = {path: packing.pack(quantize(w, "int4", group=32, name=path)) for path, w in stored.items()}
    amx_only = sum(w.tensors[name].nbytes for w in weights.values() for name in ("inverse_scale", "nonnegative_scales"))
    cost = roofline.decode_cost(replace(tiny_base, weights=weights, backend=cpu.Native()), [], [])
    assert cost.nbytes == sum(w.nbytes for w in weights.values()) - (0 if read else amx_only)


def test_prefill_writes_all_keys_and_values_that_a_step_reads() -> None:
    shape = steps.Shape("x", ((),) * 3, context=40)
    read = steps.decode_batch(shape, 100)
    written = set()
    for batch in steps.prompt_batches(shape, 100):
        assert len(batch.tokens) == batch.row_start[-1] == batch.context[0] == 40
        written |= {(batch.blocks[0][at // 16], at % 16) for at in batch.positions.tolist()}
    assert written == {(read.blocks[s][at // 16], at % 16) for s in range(3) for at in range(read.context[s])}


def test_overheads_compare_the_right_steps() -> None:
    shapes = steps.standard_shapes((8, 16) * 8, (16, 17, 18, 19), 20)
    assert [len(shape.mixes) for shape in shapes] == [1, 1, 16, 16, 16, 16, 16]
    assert shapes[6].mixes[0] == tuple((slot, 0.25) for slot in (16, 17, 18, 19))
    seconds = dict(zip((shape.name for shape in shapes), (2.0, 2.5, 10.0, 11.0, 13.0, 20.0, 21.0), strict=True))
    cost = roofline.Cost(1.0, 1.0)
    ratios = steps.overheads([steps.StepTime(name, taken, 0.5, cost) for name, taken in seconds.items()])
    assert list(ratios.values()) == pytest.approx([1.25, 1.1, 1.3, 1.05])


def test_local_engine_decodes_all_requests_together(tiny_base: Base, tmp_path: Path) -> None:
    count, shapes = 70, tiny_base.shapes()  # more than the default batch
    paths = [write_adapter(tmp_path / f"a{i}", shapes, rank=1, seed=i) for i in range(count)]
    rows: list[int] = []
    requests: list[Request] = []
    all_submitted = threading.Event()
    with LocalEngine(tiny_base, paths, threads=1, max_batch=count, max_step_tokens=4 * count) as engine:
        run, submit = engine.runner.run, engine.engine.submit

        def submitted(request: Request) -> None:
            submit(request)
            requests.append(request)
            if len(requests) == count:
                all_submitted.set()

        def counted(batch: Batch) -> Logits:
            assert all_submitted.wait(60)
            rows.append(len(batch.logit_rows))
            return run(batch)

        engine.engine.submit = submitted  # type: ignore[method-assign]
        engine.runner.run = counted  # type: ignore[method-assign]
        engine.rates([[5, 6, 7, i % 100] for i in range(count)], [engine.mix([(i, 1.0)]) for i in range(count)], 3)
    assert max(rows) == count
