"""Training on weights that the server shares: the same adapter as on a copy, and a copy where sharing fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.backends.cuda.memory import CONTEXT, training_memory
from server.jobs.errors import JobError
from server.jobs.fine_tune import fine_tune
from server.jobs.gpu_share import place_base
from server.jobs.worker_messages import WorkerSpec
from server.kernels.cuda import Cuda, packing, shared_memory
from server.model.loader import Base, load_base
from tests.server.jobs.conftest import CONFIG

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared memory of these tests is a CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cuda_base(tiny_folder: Path) -> Base:
    """The tiny base in the layout of the CUDA kernels."""
    return load_base(tiny_folder, name="tiny", backend=Cuda(torch.float32), group_size=32)


def share_of(base: Base, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A share with all weights, without a driver."""
    piece = shared_memory.SharedBuffer(shared_memory.required_bytes(base.weights), CPU)
    kept = {path: piece.add(w) for path, w in base.weights.items() if w.scheme != "none"}
    assert len(kept) > 10
    monkeypatch.setattr(shared_memory, "_exported", lambda memory: {"piece": 1})
    monkeypatch.setattr(shared_memory, "_mapped", lambda exported, device: (piece.memory.untyped_storage(), 0))
    return {"memory": 1 << 30, "base": shared_memory.export(kept, piece.memory)}


def test_training_on_shared_weights_gives_the_same_adapter(
    spec: WorkerSpec, cuda_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[dict[str, Any]] = []
    digests = []
    for share in (None, share_of(cuda_base, monkeypatch)):
        folder = tmp_path / f"{share is None}"
        folder.mkdir()
        once = replace(spec, gpu_share=share, config=replace(CONFIG, epochs=1))
        result = fine_tune(once, cuda_base, folder, messages.append, lambda: False)
        digests.append(result.digest)
        assert result.metadata["training"]["config"]["activation_checkpointing"]
    assert digests[0] == digests[1] and not any(message["kind"] == "note" for message in messages)


def test_weights_that_cannot_be_shared_are_copied(cuda_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    share = share_of(cuda_base, monkeypatch)

    def refuse(exported: Any, device: Any) -> Any:
        raise OSError("cuIpcOpenMemHandle answers 801")

    messages: list[dict[str, Any]] = []
    monkeypatch.setattr(shared_memory, "_mapped", refuse)
    for base in (share["base"], None):
        placed = place_base(cuda_base, share | {"base": base}, CPU, messages.append)
        path = "model.layers.0.mlp.up_proj"
        assert torch.equal(packing.dequantize(placed.weights[path]), packing.dequantize(cuda_base.weights[path]))
    [message] = messages
    assert "answers 801" in message["message"] and "its own copy" in message["message"]
    with pytest.raises(JobError, match="lower --gpu-memory"):
        place_base(cuda_base, share | {"memory": 0}, CPU, messages.append)


@pytest.mark.parametrize(("free", "taken", "left"), [(20, 50, 10), (8, 61, 8), (8, 50, 0)])
def test_training_leaves_the_server_the_memory_that_it_has_not_taken_yet(free: int, taken: int, left: int) -> None:
    gb = 1 << 30
    assert training_memory(free * gb, 60 * gb, taken * gb) == max(0, left * gb - CONTEXT)
