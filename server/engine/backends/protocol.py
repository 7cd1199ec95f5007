"""`Runner`: the interface between the engine and a backend that executes the model."""

from __future__ import annotations

from typing import Protocol

from adapters.weights import LoraWeights
from server.engine.batch import Batch, Logits
from server.engine.sampler import DeviceSampler


class Runner(Protocol):
    """One model on one device. Not thread-safe: only the engine's thread calls it."""

    @property
    def draw(self) -> DeviceSampler | None:
        """Samples tokens on the device that has the logits. None if the backend has no sampler."""

    def allocate(self, blocks: int, block_size: int) -> None:
        """Allocate the KV cache: `blocks` blocks of `block_size` tokens. Old contents are lost."""

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Load an adapter into a slot. Backends that share the host's memory do not copy the weights."""

    def unload_adapter(self, slot: int) -> None:
        """Empty a slot and drop all references to its weights."""

    def run(self, batch: Batch) -> Logits:
        """Execute one step: write keys and values into the KV blocks and return the logits."""

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one KV block of `block_size` tokens."""

    def nbytes(self) -> dict[str, int]:
        """Return the bytes in use by kind.

        Kinds are `base`, `kv_cache` (blocks used at least once), `activations` (work buffers and copies of active
        adapters) and, on a GPU, `slots` (memory reserved for adapters).
        """


class HostRunner(Runner, Protocol):
    """A runner that computes in the host's memory."""

    def work_bytes(self, tokens: int) -> int:
        """Estimate the work memory of a step, in bytes, for sequences of up to `tokens` tokens."""
