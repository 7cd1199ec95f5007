"""`Validator`: reads and checks an adapter folder, before it is published and each time a version is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterError, InvalidAdapter, StoreFailed, UnknownAdapter
from adapters.format_hints import outside_error
from adapters.peft_format import REQUIRED, open_inside
from adapters.protocols import Reader
from adapters.store import AdapterStore
from adapters.weights import LoraWeights, Version


@dataclass(frozen=True)
class Validator:
    """Reads adapters for one base.

    Attributes:
        store: where versions are copied to and read from.
        read: reads a PEFT folder.
        prepare: converts weights to the layout of the kernels.
        shapes: the base's linear layers, path -> (out, in).
        max_rank: the highest rank that is served.
        limit: bytes of a folder that is too large to be served.
    """

    store: AdapterStore
    read: Reader
    prepare: Callable[[LoraWeights], LoraWeights]
    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    limit: int

    @contextmanager
    def stage(self, name: str, folder: Path, within: Path | None) -> Iterator[tuple[Path, LoraWeights]]:
        """Copy `folder` into the store's staging area and read the copy.

        With `within`, links may not lead out of that folder. Raises InvalidAdapter, BaseMismatch, NoRoom, StoreFailed.
        """
        if within is not None and not folder.resolve().is_relative_to(within.resolve()):
            raise InvalidAdapter(outside_error(folder.name), "source")
        missing = [file for file in REQUIRED if not _exists(folder / file, within)]
        if missing:
            self._read(folder, name)  # raises with a hint at what the folder holds instead
            raise InvalidAdapter(f"{missing[0]} is missing")
        with self.store.stage(folder, within=within, limit=self.limit) as staged:
            yield staged, self.prepare(self._read(staged, name))

    def load(self, name: str, digest: str) -> LoraWeights:
        """Read a stored version and prepare it for the kernels. Raises as `read_stored`."""
        return self.prepare(self.read_stored(name, digest))

    def read_stored(self, name: str, digest: str) -> LoraWeights:
        """Read a stored version as it was published, and verify its digest.

        Raises:
            StoreFailed: it cannot be read, or its content has changed on disk.
            UnknownAdapter: it was deleted during the read.
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

    def incompatibilities(self, digests: Iterable[str], known: Mapping[str, str | None]) -> dict[str, str | None]:
        """Return why stored versions cannot be served here, None for those that can. `known` are earlier results."""
        records = self.store.records
        return {
            digest: known[digest] if digest in known else records[digest].incompatibility(self.shapes, self.max_rank)
            for digest in digests
            if digest in records
        }

    def _read(self, folder: Path, name: str, stored: bool = False) -> LoraWeights:
        return self.read(folder, name=name, max_rank=self.max_rank, shapes=self.shapes, stored=stored)


def _exists(path: Path, within: Path | None) -> bool:
    """Return whether the file exists. Raises InvalidAdapter if it cannot be read or leads out of `within`."""
    fd = open_inside(path, within)
    if fd is None:
        return False
    os.close(fd)
    return True
