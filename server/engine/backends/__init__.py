"""One package per backend (`torch`, `cpu`, `cuda`), each with a `Runner` for the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.backends.protocol import HostRunner
    from server.model.decoder import Source


def make_runner(base: Source, max_slots: int, threads: int) -> HostRunner:
    """Return the CPU runner that fits the base model's backend.

    Args:
        base: The loaded base model.
        max_slots: Number of adapter slots.
        threads: Number of threads that compute a step.
    """
    if base.backend.name == "native":
        from server.engine.backends.cpu.runner import NativeRunner

        runner: HostRunner = NativeRunner(base, max_slots, threads)
        return runner
    from server.engine.backends.torch.runner import TorchRunner

    return TorchRunner(base, max_slots, threads)
