"""`Validator`: how a folder becomes weights, before it has a name and again whenever a version comes back from disk.

Owns what is checked and in which order. Does not know names' versions, leases or memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterError, InvalidAdapter, StoreFailed, UnknownAdapter
from adapters.format_hints import leads_out
from adapters.peft_format import REQUIRED, open_inside
from adapters.protocols import Reader
from adapters.store import AdapterStore
from adapters.weights import LoraWeights, Version


@dataclass(frozen=True)
class Validator:
    """`shapes` are the base's linears by path, `prepare` turns weights into the layout of the kernels.

    `limit` is the size in bytes of a folder that could never be served.
    """

    store: AdapterStore
    read: Reader
    prepare: Callable[[LoraWeights], LoraWeights]
    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    limit: int

    @contextmanager
    def stage(self, name: str, folder: Path, within: Path | None) -> Iterator[tuple[Path, LoraWeights]]:
        """The store's private copy of `folder` and its weights, read from that copy, so that they stay equal.

        With `within`, links may not lead out of that folder. Raises InvalidAdapter, BaseMismatch, NoRoom, StoreFailed.
        """
        if within is not None and not folder.resolve().is_relative_to(within.resolve()):
            raise InvalidAdapter(leads_out(folder.name), "source")
        missing = [file for file in REQUIRED if not _exists(folder / file, within)]
        if missing:
            self._read(folder, name)  # it has better words for what is there instead, a pickle for instance
            raise InvalidAdapter(f"{missing[0]} is missing")
        with self.store.stage(folder, within=within, limit=self.limit) as staged:
            yield staged, self.prepare(self._read(staged, name))

    def load(self, name: str, digest: str) -> LoraWeights:
        """One version from the store, found to be what it was, as the kernels read it. Raises what `stored` does."""
        return self.prepare(self.stored(name, digest))

    def stored(self, name: str, digest: str) -> LoraWeights:
        """The same as it was published. Raises StoreFailed; what is damaged is replaced when it is published again.

        And UnknownAdapter where it was deleted meanwhile, which is nobody's fault: no request has a lease of it then.
        """
        try:
            weights = self._read(self.store.path(digest), name, stored=True)
            if weights.digest != digest:
                raise InvalidAdapter("its content has changed on disk")
        except (AdapterError, OSError) as error:
            label = Version(name, digest).label
            if digest not in self.store.records:
                raise UnknownAdapter(f"{label} was deleted while it was read", "adapters") from error
            reason = error.message if isinstance(error, AdapterError) else error.strerror or type(error).__name__
            advice = ""
            if isinstance(error, (InvalidAdapter, OSError)):
                self.store.damaged.add(digest)
                advice = "; publish it again"
            raise StoreFailed(f"{label} cannot be read from the store: {reason}{advice}") from error
        return weights

    def misfits(self, digests: Iterable[str], known: Mapping[str, str | None]) -> dict[str, str | None]:
        """Why versions of the store cannot be served here, None for those that can; `known` was found out before."""
        records = self.store.records
        return {
            digest: known[digest] if digest in known else records[digest].misfit(self.shapes, self.max_rank)
            for digest in digests
            if digest in records
        }

    def _read(self, folder: Path, name: str, stored: bool = False) -> LoraWeights:
        return self.read(folder, name=name, max_rank=self.max_rank, shapes=self.shapes, stored=stored)


def _exists(path: Path, within: Path | None) -> bool:
    """Whether there is such a file. Raises InvalidAdapter for one that cannot be read or leads out of `within`."""
    fd = open_inside(path, within)
    if fd is None:
        return False
    os.close(fd)
    return True
