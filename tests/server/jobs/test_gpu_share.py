"""Training on matrices that a server lends: the same adapter as on a copy, and its own copy where nothing is lent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.training import TrainingConfig
from server.engine.backends.cuda.memory import CONTEXT, left_for_training
from server.jobs.errors import JobError
from server.jobs.fine_tune import fine_tune
from server.jobs.gpu_share import take
from server.jobs.worker_messages import BaseSource, WorkerSpec
from server.kernels.cuda import Cuda, packing, shared_memory
from server.model.loader import Base, load_base

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _trained_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a GPU: what is lent here lies in a CPU's memory, and sums are made in one order there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cuda_base(tiny_folder: Path) -> Base:
    """The tiny base in 4 bits, as the CUDA kernels have it."""
    return load_base(tiny_folder, name="tiny", backend=Cuda(torch.float32), group_size=32)


def lent(base: Base, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All of it in one piece, without a driver in between."""
    piece = shared_memory.Piece(shared_memory.room(base.weights), CPU)
    kept = {path: piece.keep(w) for path, w in base.weights.items() if w.scheme != "none"}
    assert len(kept) > 10
    monkeypatch.setattr(shared_memory, "_exported", lambda memory: {"piece": 1})
    monkeypatch.setattr(shared_memory, "_mapped", lambda exported, device: (piece.memory.untyped_storage(), 0))
    return {"memory": 1 << 30, "base": shared_memory.told(kept, piece.memory)}


def test_training_on_what_is_lent_gives_the_same_adapter(
    cuda_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tmp_path / "content"
    content.write_text("".join(f'{{"input": "the {i}", "output": "good"}}\n' for i in range(8)))
    origin = BaseSource(tmp_path, "tiny", "cuda", "int4", 32, False, 8, tmp_path, "0" * 64)
    config = TrainingConfig(epochs=1, batch_size=4, lora_rank=2, target_modules=("q_proj",), compute_dtype="float32")
    spec = WorkerSpec(
        base=origin, name="x", config=config, data=content, data_name="d.jsonl", template={}, threads=1, max_rank=64
    )
    told: list[dict[str, Any]] = []
    digests = []
    for loan in (None, lent(cuda_base, monkeypatch)):
        folder = tmp_path / f"{loan is None}"
        folder.mkdir()
        made = fine_tune(replace(spec, loan=loan), cuda_base, folder, told.append, lambda: False)
        digests.append(made.digest)
        assert made.metadata["training"]["config"]["activation_checkpointing"]
    assert digests[0] == digests[1] and not any(line["kind"] == "note" for line in told)


def test_what_is_not_shared_is_copied_and_said(cuda_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    loan = lent(cuda_base, monkeypatch)

    def refuse(exported: Any, device: Any) -> Any:
        raise OSError("cuIpcOpenMemHandle answers 801")

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(shared_memory, "_mapped", refuse)
    for base in (loan["base"], None):
        placed = take(cuda_base, loan | {"base": base}, CPU, told.append)
        path = "model.layers.0.mlp.up_proj"
        assert torch.equal(packing.dequantize(placed.weights[path]), packing.dequantize(cuda_base.weights[path]))
    [line] = told
    assert "answers 801" in line["message"] and "a copy of its own" in line["message"]
    with pytest.raises(JobError, match="lower --gpu-memory"):
        take(cuda_base, loan | {"memory": 0}, CPU, told.append)


def test_serving_keeps_what_it_has_not_taken_yet() -> None:
    gb = 1 << 30
    assert left_for_training(free=20 * gb, total=60 * gb, taken=50 * gb) == 10 * gb - CONTEXT
    assert left_for_training(free=8 * gb, total=60 * gb, taken=61 * gb) == 8 * gb - CONTEXT
    assert left_for_training(free=8 * gb, total=60 * gb, taken=50 * gb) == 0
