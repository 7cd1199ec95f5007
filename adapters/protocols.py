"""What the registry is given (a reader, slots, an observer) and what it answers.

Owns no behaviour: the shapes of the registry's surroundings, so that each can be written without the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.weights import LoraWeights, Version

Description = dict[str, Any]
"""What is told about an adapter, as JSON."""


class Reader(Protocol):
    """`peft_format.read_folder`: a folder becomes weights, or an error says by name what is wrong with it."""

    def __call__(
        self,
        path: Path,
        *,
        name: str,
        max_rank: int,
        shapes: Mapping[str, tuple[int, int]] | None,
        stored: bool = False,
    ) -> LoraWeights: ...


class Observer:
    """Hears what happens, for metrics. The methods are called on any thread, without a lock, and must be quick."""

    def on_load(self, name: str, outcome: str, seconds: float) -> None:
        """A version of `name` was read into RAM: `outcome` is "ok" or "failed"."""

    def on_evict(self) -> None:
        """A version left RAM because its room was needed."""

    def on_change(self, name: str, version: Version | None) -> None:
        """`name` has another version now, or the same one with another card or task, or None: it is gone."""


class Slots(Protocol):
    """What the registry asks of whoever keeps adapters on the device. Called on any thread; none may block."""

    def holds(self, digest: str) -> bool:
        """Whether the version has a slot now."""

    def unload(self, digest: str) -> None:
        """Clear the version's slot as soon as no running request uses it."""

    def release_idle(self, nbytes: int) -> None:
        """Clear slots that no running request uses until about `nbytes` of their adapters are let go."""


class NoSlots:
    """The slots of a registry without an engine."""

    def holds(self, digest: str) -> bool:
        return False

    def unload(self, digest: str) -> None:
        pass

    def release_idle(self, nbytes: int) -> None:
        pass


@dataclass(frozen=True)
class Published:
    """`created` is false if the name had this very content already, `first` true if it had none. `metadata` is the
    reader's account of it, and `description` what the adapter was at that moment: it may be gone by the time that
    somebody is told.
    """

    version: Version
    created: bool
    first: bool
    metadata: Mapping[str, Any]
    description: Description


@dataclass(frozen=True)
class Retired:
    """What an adapter was at its end. `drained` is done when its last lease is gone and its disk is freed."""

    description: Description
    drained: Future[None]
