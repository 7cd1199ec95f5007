"""The interfaces between the registry and its surroundings: reader, catalog backend, device slots, observer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.catalog_state import CatalogState, VersionRecord
from adapters.weights import LoraWeights, Version

Description = dict[str, Any]
"""An adapter as JSON, as the API returns it."""


class Reader(Protocol):
    """Reads a PEFT folder; `peft_format.read_folder` is the implementation."""

    def __call__(
        self,
        path: Path,
        *,
        name: str,
        max_rank: int,
        shapes: Mapping[str, tuple[int, int]] | None,
        stored: bool = False,
    ) -> LoraWeights: ...


class CatalogBackend(Protocol):
    """Persists the catalog."""

    def load(self) -> tuple[CatalogState, Mapping[str, VersionRecord]]:
        """Return the saved state and the records of its versions, by digest. Raises StoreFailed."""
        ...

    def save(self, state: CatalogState, records: Sequence[VersionRecord] = ()) -> None:
        """Replace the saved state in one transaction.

        `records` are added or updated. Records of versions that `state` does not name are deleted. Raises StoreFailed;
        the saved state is then unchanged.
        """
        ...


class MemoryCatalog:
    """A `CatalogBackend` in memory, for tests and offline use."""

    def __init__(self) -> None:
        self._state = CatalogState()
        self._records: dict[str, VersionRecord] = {}

    def load(self) -> tuple[CatalogState, Mapping[str, VersionRecord]]:
        return self._state, dict(self._records)

    def save(self, state: CatalogState, records: Sequence[VersionRecord] = ()) -> None:
        merged = self._records | {record.digest: record for record in records}
        self._records = {digest: record for digest, record in merged.items() if digest in state.digests}
        self._state = state


class Observer:
    """Receives events for metrics. Methods are called on any thread, without a lock, and must return quickly."""

    def on_load(self, name: str, outcome: str, seconds: float) -> None:
        """A version of `name` was loaded into RAM: `outcome` is "ok" or "failed"."""

    def on_evict(self) -> None:
        """A version was evicted from RAM."""

    def on_change(self, name: str, version: Version | None) -> None:
        """`name` has a new version or new metadata, or was removed (None)."""


class Slots(Protocol):
    """The adapter slots of the device. Methods are called on any thread and must not block."""

    def holds(self, digest: str) -> bool:
        """Return whether the version has a slot."""
        ...

    def unload(self, digest: str) -> None:
        """Clear the version's slot as soon as no running request uses it."""

    def release_idle(self, nbytes: int) -> None:
        """Clear slots that no running request uses, until about `nbytes` of RAM are released."""


class NoSlots:
    """`Slots` of a registry without an engine."""

    def holds(self, digest: str) -> bool:
        return False

    def unload(self, digest: str) -> None:
        pass

    def release_idle(self, nbytes: int) -> None:
        pass


@dataclass(frozen=True)
class Published:
    """The result of a publish or rollback.

    Attributes:
        version: the current version.
        created: false if the name had this content already.
        first: true if the name had no version before.
        metadata: metadata of the version (task, card, notes, ...).
        description: the adapter as JSON, at that moment.
    """

    version: Version
    created: bool
    first: bool
    metadata: Mapping[str, Any]
    description: Description
