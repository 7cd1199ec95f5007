"""`AdapterInfo`: one adapter as people see it, as the JSON of the API. Does not know where its parts come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.store import VersionRecord
from adapters.weights import Version


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter at one moment: `records` of its versions, the one it has first."""

    name: str
    records: tuple[VersionRecord, ...]
    leases: Counter[str]
    """By digest; versions that have lost the name already are among them."""
    pinned: bool
    failure: str | None
    """Why the last load of its version failed, if it did."""

    def summary(self, *, nbytes: int, tier: str, loaded_at: float | None, tasks: list[str]) -> dict[str, Any]:
        """One entry of the list of adapters. Times are seconds since the epoch, `bytes` what it takes in memory."""
        record, metadata = self.records[0], self.records[0].metadata_of(self.name)
        return {
            "name": self.name,
            "version": Version(self.name, record.digest).label,
            "ranks": record.ranks,
            "targets": record.targets,
            "bytes": nbytes,
            "tier": tier,
            "leases": self.leases.total(),
            "loaded_at": loaded_at,
            "base": metadata.get("base"),
            "pinned": self.pinned,
            "tasks": tasks,
        }

    def details(self, size: Callable[[str], int], bases: Sequence[str], faults: Sequence[str]) -> dict[str, Any]:
        """What the answer about one adapter has beyond the summary. `bases` are the names of the one that is served,
        `faults` what is wrong beside the adapter itself.
        """
        metadata = self.records[0].metadata_of(self.name)
        notes = [*metadata.get("notes", ())]
        made_on = metadata.get("base")
        notes += of_another_base(made_on, bases)
        if self.failure:
            notes.append(f"the last load failed: {self.failure}")
        notes += faults
        return {
            "versions": [
                {
                    "version": Version(self.name, record.digest).label,
                    "digest": record.digest,
                    "current": record is self.records[0],
                    "leases": self.leases[record.digest],
                    "bytes": size(record.digest),
                    "created_at": record.created_at,
                }
                for record in self.records
            ],
            "honoured": [*metadata.get("honoured", ())],
            "harmless": [*metadata.get("harmless", ())],
            "notes": notes,
            "card": metadata.get("card"),
        }


def of_another_base(made_on: str | None, bases: Sequence[str]) -> list[str]:
    """The note on an adapter that names another base than the one with these names, if it does.

    Where the hub's name is among them, another hub's name is compared with that: models of other training may be called
    like the short one.
    """
    ids = [base for base in bases if "/" in base]
    names = ids if ids and made_on is not None and "/" in made_on else bases
    if not names or not made_on or _last(made_on) in map(_last, names):
        return []
    return [f"it names {made_on!r} as its base; served is {bases[0]!r}, whose layers it fits"]


def _last(base: str) -> str:
    """A base's name without the folder or organisation before it, to compare."""
    return base.rstrip("/").rpartition("/")[2].lower()
