"""`AdapterInfo`: one adapter as the API describes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.catalog_state import VersionRecord
from adapters.weights import Version


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter at one moment.

    Attributes:
        name: the adapter's name.
        records: records of its versions, the current one first.
        leases: lease count by digest, including versions that the name no longer has.
        pinned: whether it is kept in RAM.
        load_error: why the last load of the current version failed, if it did.
    """

    name: str
    records: tuple[VersionRecord, ...]
    leases: Counter[str]
    pinned: bool
    load_error: str | None

    def summary(self, *, nbytes: int, tier: str, loaded_at: float | None, tasks: list[str]) -> dict[str, Any]:
        """Return the entry for the list of adapters. Times are seconds since the epoch, sizes bytes in memory."""
        record = self.records[0]
        return {
            "name": self.name,
            "version": Version(self.name, record.digest).label,
            "ranks": record.ranks,
            "targets": record.targets,
            "bytes": nbytes,
            "tier": tier,
            "leases": self.leases.total(),
            "loaded_at": loaded_at,
            "base": record.metadata_of(self.name).get("base"),
            "pinned": self.pinned,
            "tasks": tasks,
        }

    def details(self, size: Callable[[str], int], bases: Sequence[str], task_errors: Sequence[str]) -> dict[str, Any]:
        """Return what the full description has beyond the summary.

        Args:
            size: returns the bytes of a version in memory.
            bases: the names of the served base.
            task_errors: what is wrong with the adapter's task.json.
        """
        metadata = self.records[0].metadata_of(self.name)
        notes = [*metadata.get("notes", ()), *base_notes(metadata.get("base"), bases)]
        if self.load_error:
            notes.append(f"the last load failed: {self.load_error}")
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
            "notes": [*notes, *task_errors],
            "card": metadata.get("card"),
        }


def base_notes(trained_on: str | None, bases: Sequence[str]) -> list[str]:
    """Return a note if the adapter names another base than the served one, whose names are `bases`.

    Hub ids ("org/name") are compared with hub ids, if the served base has one; otherwise the last parts are compared.
    """
    ids = [base for base in bases if "/" in base]
    names = ids if ids and trained_on is not None and "/" in trained_on else bases
    if not names or not trained_on or _short_name(trained_on) in map(_short_name, names):
        return []
    return [f"it names {trained_on!r} as its base; the served base is {bases[0]!r}, and its layers fit"]


def _short_name(base: str) -> str:
    return base.rstrip("/").rpartition("/")[2].lower()
