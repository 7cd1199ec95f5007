"""`Registry`: publish, roll back, retire, pin, prefetch, lease, fetch, list and describe adapters.

Requests hold leases, which fix versions and take no memory. The engine calls `fetch` for the weights of a mix when it
is about to run. Writes run one after another on one thread: first the store, then the catalog snapshot. The lock
guards a few dictionaries and is never held during I/O.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from adapters.catalog import Catalog, Rejections, check_name
from adapters.catalog_state import LIBRARY, WATCH, CatalogState, FolderSignature, ImportedFolder, VersionRecord
from adapters.errors import AdapterConflict, AdapterError, NoRoom, StoreFailed
from adapters.leases import Lease, Leases
from adapters.peft_format import read_folder
from adapters.protocols import Description, NoSlots, Observer, Published, Reader, Slots
from adapters.ram_cache import Fetched, RamCache, wait_loaded
from adapters.schemas import AdapterInfo
from adapters.store import AdapterStore, inherit_metadata
from adapters.validation import Validator
from adapters.weights import RESERVED, SHORT_DIGEST, Choice, LoraWeights, Mix, Version, canonical_mix

log = logging.getLogger(__name__)

T = TypeVar("T")
Descriptions = list[Description]
Names = list[str]
Versions = list[tuple[Version, float]]
FolderState = tuple[str, FolderSignature] | None
"""Catalog key of an imported folder, and the state of its files."""

FOLDER_FACTOR = 4
"""A folder may be this many times larger than the RAM budget: float32 on disk, 8 bits in RAM."""


class Registry:
    """Adapters by name over an `AdapterStore` and a RAM budget. Thread-safe.

    Args:
        store: the opened store; closed by `close`.
        shapes: the base's linear layers, path -> (out, in). Stored versions that do not fit are not served.
        ram_bytes: budget for adapters in RAM.
        prepare: converts weights to the layout of the kernels.
        read: reads a PEFT folder.
        max_rank: the highest rank that is served.
        max_mix: the most adapters in a mix.
        reserved: names that no adapter may have.
        tasks: returns the tasks that use an adapter.
        observer: receives events for metrics.
        workers: load threads.

    Attributes:
        slots: the device slots; set by the engine.
        tasks: see above.
        task_errors: returns what is wrong with an adapter's task.json.
        referenced_versions: returns digest prefixes of an adapter's versions that tasks name; these versions are kept.
        bases: names of the served base; an adapter that names another base gets a note.
        rejections: folders that are not served.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        shapes: Mapping[str, tuple[int, int]],
        ram_bytes: int,
        prepare: Callable[[LoraWeights], LoraWeights] = lambda weights: weights,
        read: Reader = read_folder,
        max_rank: int = 64,
        max_mix: int = 8,
        reserved: Collection[str] = (),
        tasks: Callable[[str], list[str]] = lambda name: [],
        observer: Observer | None = None,
        workers: int = 2,
    ) -> None:
        self.slots: Slots = NoSlots()
        self.tasks = tasks
        self.task_errors: Callable[[str], Sequence[str]] = lambda name: ()
        self.referenced_versions: Callable[[str], Collection[str]] = lambda name: ()
        self.bases: Sequence[str] = ()
        self.rejections = Rejections()
        self._store = store
        limit = max(FOLDER_FACTOR * ram_bytes, 1 << 20)
        self._validator = Validator(store, read, prepare, shapes, max_rank, limit)
        self._max_mix = max_mix
        self._reserved = RESERVED | set(reserved)
        self._observer = observer or Observer()
        self._lock = threading.Lock()
        self._catalog = Catalog()
        self._leases = Leases()
        self._draining: set[str] = set()
        """Replaced or retired versions that are still leased; freed from RAM with their last lease."""
        self._load_errors: dict[str, str] = {}
        self._incompatible: dict[str, str | None] = {}
        self._ram = RamCache(
            ram_bytes,
            load=self._load,
            size=store.nbytes,
            evict_last=lambda digest: digest in self._leases,
            on_load=lambda digest, outcome, seconds: self._observer.on_load(
                self._catalog.name_of(digest), outcome, seconds
            ),
            on_evict=lambda digest: self._observer.on_evict(),
            pressure=lambda nbytes: self.slots.release_idle(nbytes),
            workers=workers,
        )
        self._publishers = ThreadPoolExecutor(2, thread_name_prefix="loramux-publish")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="loramux-store")
        self._writer.submit(self._apply, store.state).result()

    def start(self) -> None:
        """Load the pinned adapters."""
        for name in self._pinned_names():
            self._load_pinned(name)

    def close(self) -> None:
        """Finish running writes, stop the threads and close the store. Leases may be released later."""
        self._publishers.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self._ram.close()
        self._store.close()

    # Requests and engine

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]:
        """Return the current versions of `choice`, in order. Raises UnknownAdapter, InvalidChoice."""
        return [(self._catalog.find(text), weight) for text, weight in choice]

    def mix(self, choice: Choice) -> Mix:
        """Return the canonical mix of `choice` without leasing it.

        Raises UnknownAdapter, InvalidChoice, and NoRoom if it exceeds the RAM budget.
        """
        mix = canonical_mix(self.resolve(choice), self._max_mix)
        self.check_room(mix)
        return mix

    def lease(self, choice: Choice) -> Lease:
        """Fix and hold the versions of `choice`. Reads nothing and takes no memory. Raises as `mix`."""
        with self._lock:
            versions = self.resolve(choice)
            mix = canonical_mix(versions, self._max_mix)
            self._ram.check_room(mix.digests)
            return self._hold(mix, versions)

    def check_room(self, mix: Mix) -> None:
        """Raise NoRoom if the mix does not fit in RAM beside the pinned adapters."""
        self._ram.check_room(mix.digests)

    def fetch(self, mix: Mix) -> Fetched:
        """Load the weights of a leased mix, in order, all or none. Never blocks.

        The results are views: keep them (or their `modules`) while the tensors are used. Cancel the future to give up.
        """
        return self._ram.fetch(mix.digests)

    # Queries

    @property
    def catalog(self) -> Catalog:
        """An immutable snapshot of all names."""
        return self._catalog

    def names(self, source: str | None = None) -> list[str]:
        """Return the served names, sorted; with `source`, only those that this source published."""
        return self._catalog.names(source)

    def exists(self, name: str) -> bool:
        """Return whether the name has a version, served or not."""
        return name in self._catalog.sources

    def current(self, name: str) -> Version:
        """Return the current version of a name. Raises UnknownAdapter."""
        return self._catalog.current_version(name)

    def is_current(self, name: str, digest: str) -> bool:
        """Return whether `name` is served with this content."""
        return self._catalog.current.get(name) == digest

    def load_failed(self, text: str) -> bool:
        """Return whether the last load of "name" or "name@digest" failed; false if there is no such version."""
        try:
            return self._catalog.find(text).digest in self._load_errors
        except AdapterError:
            return False

    def metadata(self, name: str) -> Mapping[str, Any]:
        """Return the metadata of the current version (task, card, honoured, ...). Raises UnknownAdapter."""
        with self._lock:
            return self._store.records[self._catalog.current_version(name).digest].metadata_of(name)

    def read_version(self, version: Version) -> LoraWeights:
        """Read a stored version from disk. Raises StoreFailed, UnknownAdapter."""
        return self._validator.read_stored(version.name, version.digest)

    def list(self) -> Descriptions:
        """Return a summary of each adapter, sorted by name."""
        with self._lock:
            infos = [self._info(name) for name in self.names()]
        return [self._summary(info) for info in infos]

    def describe(self, name: str) -> Description:
        """Return the full description of an adapter with its versions. Raises UnknownAdapter."""
        with self._lock:
            self._catalog.current_version(name)
            info = self._info(name)
        return {**self._summary(info), **info.details(self._ram.size, self.bases, self.task_errors(name))}

    def rejected(self, faults: bool = False) -> Descriptions:
        """Return folders and names that are not served as {path, reason, since}; with `faults`, only faulty ones."""
        entries = sorted([*self.rejections.entries(), *self._catalog.rejected.values()], key=lambda r: r.path)
        return [{"path": r.path, "reason": r.reason, "since": r.since} for r in entries if r.fault or not faults]

    def memory(self) -> dict[str, int]:
        """Return `bytes` in RAM, their `budget`, the number of `versions` in RAM, and the number of `leases`."""
        used, versions = self._ram.used, len(self._ram.resident())
        return {"bytes": used, "budget": self._ram.capacity, "versions": versions, "leases": len(self._leases)}

    def sizes(self) -> dict[tuple[str, str], int]:
        """Return bytes by (name, tier), where tier is "device", "ram" or "disk"."""
        return {(name, self._tier(d)): self._ram.size(d) for name, d in self._catalog.current.items()}

    def check_publish(self, name: str, if_match: str | None = None) -> None:
        """Check a name before its content is available. Raises InvalidAdapter, VersionMismatch."""
        check_name(name, self._reserved)
        self._catalog.check_match(name, if_match)

    def imported_folder(self, key: str) -> ImportedFolder | None:
        """Return what a folder held when it was last imported; None if its version is missing from the store."""
        folder = self._store.state.folders.get(key)
        return None if folder is None or folder.digest in self._store.missing else folder

    def imported_folders(self, source: str) -> Names:
        """Return the names of all folders that were imported from `source`."""
        prefix = f"{source}/"
        return [key.removeprefix(prefix) for key in sorted(self._store.state.folders) if key.startswith(prefix)]

    # Changes

    async def publish(self, name: str, folder: Path, **options: Any) -> Published:
        """Run `publish_now` on a thread."""
        return await self._on_thread(self._publishers, lambda: self.publish_now(name, folder, **options))

    def publish_now(
        self,
        name: str,
        folder: Path,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        source: str = "api",
        within: Path | None = None,
        imported: FolderState = None,
    ) -> Published:
        """Copy, check and store a PEFT folder, and make it the current version of `name`.

        Args:
            name: the adapter.
            folder: a PEFT folder.
            create_only: raise AdapterConflict if the name has other content.
            if_match: the version that the name must have: a label, a digest, or "*" for any.
            source: who publishes.
            within: links may not lead out of this folder.
            imported: the watched folder and the state of its files, saved in the same transaction. If the folder's
                content is unchanged since its last import, the name is left as it is.

        Raises:
            InvalidAdapter, BaseMismatch, NoRoom, AdapterConflict, VersionMismatch, StoreFailed: nothing has changed.
        """
        self.check_publish(name, if_match)
        with self._validator.stage(name, folder, within) as (staged, weights):
            self._check_fit(name, weights.nbytes)
            return self.run_exclusive(lambda: self._publish(staged, weights, create_only, if_match, source, imported))

    async def roll_back(self, name: str, version: str, if_match: str | None = None) -> Published:
        """Make a kept version current again: "name@digest", or at least six digits of the digest.

        The version is loaded first. Raises UnknownAdapter, InvalidChoice, AdapterConflict, VersionMismatch, NoRoom,
        StoreFailed.
        """
        return await self._on_thread(self._publishers, lambda: self._load_and_roll_back(name, version, if_match))

    async def retire(self, name: str, if_match: str | None = None) -> Description:
        """Run `retire_now` on a thread, if no task routes to the name. Raises AdapterConflict, VersionMismatch."""
        return await self._on_thread(self._writer, lambda: self._retire_unused(name, if_match))

    def retire_now(self, name: str) -> Description:
        """Remove the name and return its last description. Memory and disk are freed with the last lease.

        Raises UnknownAdapter, StoreFailed.
        """
        return self.run_exclusive(lambda: self._retire(name))

    def remove_folder(self, name: str, key: str) -> bool:
        """Forget a watched folder that was removed, and undo what it published if that is still current.

        The version that it replaced, if any, is served again. Returns whether the name has changed. Raises StoreFailed.
        """
        return self.run_exclusive(lambda: self._remove_folder(name, key))

    def run_exclusive(self, call: Callable[[], T]) -> T:
        """Run `call` on the writer thread: no name changes meanwhile. Raises StoreFailed if the registry is closed."""
        return self._submit(self._writer, call).result()

    async def pin(self, name: str) -> None:
        """Load the adapter and keep its current version in RAM. Raises as `prefetch`, and NoRoom beside other pins."""
        with self.lease([(self.current(name).name, 1.0)]) as lease:
            views = await wait_loaded(self.fetch(lease.mix), lambda: self.check_room(lease.mix))
            await self._on_thread(self._writer, lambda: self._set_pinned(name, True))
            del views  # held until then, so that the version was not evicted

    async def unpin(self, name: str) -> None:
        """Let the adapter be evicted again. Raises UnknownAdapter, StoreFailed."""
        await self._on_thread(self._writer, lambda: self._set_pinned(name, False))

    async def prefetch(self, name: str) -> None:
        """Load the adapter into RAM. Raises UnknownAdapter, NoRoom, StoreFailed."""
        with self.lease([(self.current(name).name, 1.0)]) as lease:
            await wait_loaded(self.fetch(lease.mix), lambda: self.check_room(lease.mix))

    # On a publisher thread

    def _load_and_roll_back(self, name: str, version: str, if_match: str | None) -> Published:
        found = self._catalog.find(version if "@" in version else f"{name}@{version}")
        if found.name != name:
            raise AdapterConflict(f"{version[:96]!r} is a version of another adapter", "version")
        self._check_fit(name, self._ram.size(found.digest))
        with self._lock:
            lease = self._hold(Mix(((found.digest, 1.0),)), [(found, 1.0)])
        with lease:  # frees the memory if the name is retired meanwhile
            self._ram.offer(self._load(found.digest))
        return self.run_exclusive(lambda: self._roll_back(found, if_match))

    # On the writer thread

    def _publish(
        self,
        staged: Path,
        weights: LoraWeights,
        create_only: bool,
        if_match: str | None,
        source: str,
        imported: FolderState,
    ) -> Published:
        name, digest = weights.name, weights.digest
        self._catalog.check_match(name, if_match)
        self._check_fit(name, weights.nbytes)
        history = self._catalog.histories.get(name, ())
        same = history[:1] == (digest,)
        if create_only and history and not same:
            raise AdapterConflict(f"{name!r} has other content; use PUT to replace it", "name")
        state, removed = self._store.state, set[str]()
        if imported is not None:
            key, signature = imported
            state = state.set_folder(key, ImportedFolder(digest, signature))
            before = self.imported_folder(key) if source in (WATCH, LIBRARY) else None
            if before is not None and before.digest == digest and not same:
                self._store.save(state)
                return Published(weights.version, False, False, weights.metadata, self._describe(name))
            removed = before.removed_files(signature) if before else set()
        if newest := self._catalog.newest.get(name):
            weights = inherit_metadata(weights, self._store.records[newest], removed)
        state = state.set_version(name, digest, source, time.time(), self._versions_to_keep(name))
        changed = self._store.publish(staged, VersionRecord.of(weights, time.time()), state)
        self._ram.offer(weights)
        with self._lock:
            self._load_errors.pop(digest, None)
        self._apply(state)
        if changed and same:
            self._observer.on_change(name, weights.version)
        return Published(weights.version, not same, not history, weights.metadata, self._describe(name))

    def _roll_back(self, version: Version, if_match: str | None) -> Published:
        name, digest = version.name, version.digest
        self._catalog.check_match(name, if_match)
        self._catalog.find(f"{name}@{digest}")  # it may have been retired during the load
        self._check_fit(name, self._ram.size(digest))
        same = self.is_current(name, digest)
        if not same:
            state = self._store.state
            source = state.names[name].source
            self._save(state.set_version(name, digest, source, time.time(), self._versions_to_keep(name)))
        return Published(version, not same, False, self.metadata(name), self._describe(name))

    def _retire_unused(self, name: str, if_match: str | None) -> Description:
        self._catalog.check_unused(name, self.tasks(name))
        self._catalog.check_match(name, if_match)
        return self._retire(name)

    def _retire(self, name: str) -> Description:
        if name not in self._catalog.histories and name not in self._catalog.rejected:
            raise self._catalog.unknown(name)
        description = self._describe(name)
        self._save(self._store.state.remove_name(name))
        return description

    def _remove_folder(self, name: str, key: str) -> bool:
        folder, state = self.imported_folder(key), self._store.state.set_folder(key, None)
        published = (
            folder is not None and self.is_current(name, folder.digest) and state.names[name].source in (WATCH, LIBRARY)
        )
        self._save(state.undo_folder(name, time.time()) if published else state)
        return published

    def _set_pinned(self, name: str, pinned: bool) -> None:
        digest = self._catalog.current_version(name).digest
        if pinned:
            self._check_fit(name, self._ram.size(digest), pinned=True)
        self._save(self._store.state.set_pinned(name, pinned))
        if pinned and self._ram.loaded_at(digest) is None:  # published since it was loaded
            self._load_pinned(name)

    def _save(self, state: CatalogState) -> None:
        self._store.save(state)
        self._apply(state)

    def _apply(self, state: CatalogState) -> None:
        """Replace the catalog snapshot by the saved state, and free what it no longer names."""
        self._incompatible = self._validator.incompatibilities(state.digests, self._incompatible)
        catalog = Catalog.build(state, self._store.missing, self._incompatible.get, self._reserved)
        with self._lock:
            before, after = self._catalog.current, catalog.current
            self._catalog = catalog
            self._draining = (self._draining | set(before.values())) - set(after.values())
            idle = {digest for digest in self._draining if digest not in self._leases}
            self._draining -= idle
        self._ram.keep(self._pinned_digests())
        self._free_memory(idle)
        self._delete_unused()
        moved = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
        for name in moved:
            if before and name in after and state.names[name].pinned and self._ram.loaded_at(after[name]) is None:
                self._load_pinned(name)
        for name in moved:
            self._observer.on_change(name, Version(name, after[name]) if name in after else None)

    def _delete_unused(self) -> None:
        """Delete the versions that have neither a name nor a lease."""
        with self._lock:
            unused = {d for d in set(self._store.records) - self._catalog.digests if d not in self._leases}
        self._free_memory(unused)
        for digest in unused:
            try:
                self._store.remove(digest)
            except StoreFailed as error:  # it is removed when the store is opened next
                log.warning("version %s stays on disk for now: %s", digest[:SHORT_DIGEST], error.message)
        with self._lock:
            self._load_errors = {d: reason for d, reason in self._load_errors.items() if d in self._store.records}

    # On any thread

    def _hold(self, mix: Mix, versions: Versions) -> Lease:
        self._leases.add(version for version, _ in versions)
        self._draining.difference_update(mix.digests)
        return Lease(mix, versions, self._release)

    def _release(self, lease: Lease) -> None:
        with self._lock:
            free = self._leases.remove(version for version, _ in lease.versions)
            unnamed = free - self._catalog.digests
            idle = unnamed | (free & self._draining)
            self._draining -= idle
        self._free_memory(idle)
        if unnamed:
            try:
                self._writer.submit(self._delete_unused)
            except RuntimeError:  # the registry is closed; they are removed when the store is opened next
                log.debug("%d versions are left for the next start", len(unnamed))

    def _free_memory(self, digests: Iterable[str]) -> None:
        """Free RAM and device slots of versions. Without the lock."""
        for digest in digests:
            self._ram.discard(digest)
            self.slots.unload(digest)

    def _load(self, digest: str) -> LoraWeights:
        """Read one version from the store and record an error. Blocks."""
        try:
            weights = self._validator.load(self._catalog.name_of(digest), digest)
        except StoreFailed as error:
            with self._lock:
                if digest in self._store.records:
                    self._load_errors[digest] = error.message
            raise
        with self._lock:
            self._load_errors.pop(digest, None)
        return weights

    def _load_pinned(self, name: str) -> None:
        """Start to load a pinned adapter; log an error."""
        try:
            lease = self.lease([(name, 1.0)])
        except AdapterError as error:
            log.warning("the pinned adapter %r is not in memory: %s", name, error)
            return

        def loaded(fetched: Fetched) -> None:
            if not fetched.cancelled() and fetched.exception() is not None:
                log.warning("the pinned adapter %r is not in memory: %s", name, fetched.exception())
            lease.release()

        self.fetch(lease.mix).add_done_callback(loaded)

    def _check_fit(self, name: str, nbytes: int, pinned: bool = False) -> None:
        """Raise NoRoom if `name` at `nbytes` exceeds the RAM budget; for a pinned name, less the other pinned ones."""
        entry = self._store.state.names.get(name)
        others = self._pinned_digests(besides=name) if pinned or (entry and entry.pinned) else ()
        room = self._ram.capacity - sum(self._ram.size(digest) for digest in others)
        if nbytes > room:
            beside = " beside the other pinned adapters" if others else ""
            raise NoRoom(f"{name!r} takes {nbytes:,} bytes in RAM; {room:,} are available{beside} (--adapter-ram)")

    def _pinned_names(self) -> Names:
        names = self._store.state.names
        return [name for name in self._catalog.names() if name in names and names[name].pinned]

    def _pinned_digests(self, besides: str | None = None) -> set[str]:
        """Return the current digests of the pinned names, in order of name, as far as they fit in the budget."""
        digests: set[str] = set()
        room = self._ram.capacity
        for name in self._pinned_names():
            digest = self._catalog.current.get(name)
            if name != besides and digest and digest not in digests and self._ram.size(digest) <= room:
                digests.add(digest)
                room -= self._ram.size(digest)
        return digests

    def _versions_to_keep(self, name: str) -> tuple[str, ...]:
        """Return digest prefixes of versions that stay although they are not among the last ones."""
        return (*self.referenced_versions(name), *self._catalog.other_bases.get(name, ()))

    def _info(self, name: str) -> AdapterInfo:
        """Collect the state of a served adapter. With the lock."""
        history = self._catalog.histories[name]
        records = tuple(self._store.records[digest] for digest in history)
        entry = self._store.state.names.get(name)
        pinned = entry is not None and entry.pinned
        return AdapterInfo(name, records, self._leases.of(name), pinned, self._load_errors.get(history[0]))

    def _summary(self, info: AdapterInfo) -> Description:
        digest = info.records[0].digest
        return info.summary(
            nbytes=self._ram.size(digest),
            tier=self._tier(digest),
            loaded_at=self._ram.loaded_at(digest),
            tasks=self.tasks(info.name),
        )

    def _describe(self, name: str) -> Description:
        """Describe a name that may not be served. On the writer thread."""
        return self.describe(name) if name in self._catalog.histories else {"name": name}

    def _tier(self, digest: str) -> str:
        if self.slots.holds(digest):
            return "device"
        return "disk" if self._ram.loaded_at(digest) is None else "ram"

    async def _on_thread(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._submit(executor, call))

    def _submit(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> Future[T]:
        try:
            return executor.submit(call)
        except RuntimeError as error:
            raise StoreFailed("the registry is closed") from error
