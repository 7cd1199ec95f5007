"""`Registry`: which adapters there are, which version each name has, who uses them, and what is in memory.

Owns the life of a version, from publish to its last lease. Does not touch the device and reads no folder itself:
`read` does, from the store's private copy, before anything gets a name. Requests hold leases, which fix identity and
take no memory; the engine asks for the tensors of a mix with `fetch` when its turn has come.

Writes happen one after another on one thread: first the disk, then the names. The lock guards a few dictionaries and
is never held during a read, a write or a load.
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
from adapters.catalog_state import LIBRARY, WATCH, CatalogState, FolderSignature, ImportedFolder
from adapters.errors import AdapterConflict, AdapterError, NoRoom, StoreFailed, UnknownAdapter
from adapters.leases import Lease, Leases
from adapters.peft_format import read_folder
from adapters.protocols import Description, NoSlots, Observer, Published, Reader, Retired, Slots
from adapters.ram_cache import Fetched, RamCache, loaded
from adapters.schemas import AdapterInfo
from adapters.store import AdapterStore, VersionRecord, carry_over
from adapters.validation import Validator
from adapters.weights import RESERVED, SHORT_DIGEST, Choice, LoraWeights, Mix, Version, canonical_mix

log = logging.getLogger(__name__)

T = TypeVar("T")
Descriptions = list[Description]
Folder = tuple[str, FolderSignature] | None
"""A watched folder's key in the journal, and the state of its files."""

FOLDER_FACTOR = 4
"""A folder on disk may be this much larger than the budget in RAM: fp32 there, 8 bits here."""


class Registry:
    """Catalog, versions and leases over a `AdapterStore` and a budget of RAM; thread-safe.

    `shapes` are the base's linears by path; stored versions that do not fit them are set aside and listed as rejected.
    `prepare` turns weights into the layout of the kernels. `reserved` are names that nobody may take (the base's own).
    `tasks(name)` tells which tasks use an adapter, for its description, `faults(name)` what is wrong with the task that
    it brought, `referenced_versions(name)` the version prefixes that tasks name: those versions are kept. They,
    `slots` and `bases`, the names that the base goes by, may be set later: an adapter that names another has a note.
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
        self.validator = Validator(
            store, read, prepare, shapes, max_rank, limit=max(FOLDER_FACTOR * ram_bytes, 1 << 20)
        )
        self._max_mix = max_mix
        self._reserved = RESERVED | set(reserved)
        self._observer = observer or Observer()
        self._lock = threading.Lock()
        self._names = Catalog()
        self._leases = Leases()
        self._draining: set[str] = set()
        """No name has them any more, and they leave memory with their last lease."""
        self._drains: list[tuple[frozenset[str], Future[None]]] = []
        """Of each retirement that waits, what it frees, and who hears of it."""
        self._pins: dict[str, LoraWeights | None] = {}
        """Of each pinned name, the view that keeps its version in RAM; None while it loads."""
        self._failures: dict[str, str] = {}
        """Why the last load of a version failed."""
        self._misfits: dict[str, str | None] = {}
        """Why a version cannot be served on this base, or None; of those that have a name."""
        self._ram = RamCache(
            ram_bytes,
            load=self._load,
            size=store.nbytes,
            evict_last=lambda digest: digest in self._leases,
            on_load=self._loaded,
            on_evict=lambda digest: self._observer.on_evict(),
            pressure=lambda nbytes: self.slots.release_idle(nbytes),
            workers=workers,
        )
        self._publishers = ThreadPoolExecutor(2, thread_name_prefix="loramux-publish")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="loramux-store")
        self._writer.submit(self._serve, store.journal).result()

    def start(self) -> None:
        """Load what is pinned."""
        for name, entry in self._store.journal.names.items():
            if entry.pinned and name in self._names.histories:
                with self._lock:
                    self._pins[name] = None
                self._hold_pin(name)

    def close(self) -> None:
        """Finish the writes that run, stop the threads, close the store. Leases may still be released."""
        self._publishers.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self._ram.close()
        with self._lock:
            self._pins.clear()
        self._store.close()

    # What requests and the engine need

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]:
        """The versions that `choice` means now, in its order. Raises UnknownAdapter, InvalidChoice."""
        return [(self._names.find(text), weight) for text, weight in choice]

    def mix(self, choice: Choice) -> Mix:
        """The mix that `choice` means now; nothing holds it. Raises UnknownAdapter, InvalidChoice, and NoRoom for what
        could never be in RAM together.
        """
        mix = canonical_mix(self.resolve(choice), self._max_mix)
        self.check_room(mix)
        return mix

    def lease(self, choice: Choice, instead: str | None = None) -> Lease:
        """Fix the versions of `choice` and hold them, in one step. Takes no memory and reads nothing. They need no room
        beside the version that the name `instead` has.

        Raises what `mix` does.
        """
        with self._lock:
            versions = self.resolve(choice)
            mix = canonical_mix(versions, self._max_mix)
            self._ram.check_room(mix.digests, self._pinned_digests(besides=instead))
            self._leases.hold(version for version, _ in versions)
            self._draining.difference_update(mix.digests)
        return Lease(mix, versions, self._release)

    def check_room(self, mix: Mix) -> None:
        """Raises NoRoom if the mix cannot be in RAM together beside what is pinned by now."""
        with self._lock:
            self._ram.check_room(mix.digests, self._pinned_digests())

    def fetch(self, mix: Mix) -> Fetched:
        """The weights of a leased mix, in its order, all or none, when they are in RAM. Never blocks.

        Every result is a view: keep it (or its `modules`) for as long as its tensors are used, and drop it after.
        Cancel the future if it is not wanted any more.
        """
        return self._ram.fetch(mix.digests)

    # What people ask

    def names(self, source: str | None = None) -> list[str]:
        """The adapters that are served, sorted; with `source` those alone that this source has put there."""
        return self._names.served(source)

    @property
    def catalog(self) -> Catalog:
        """An immutable snapshot of all names."""
        return self._names

    def read_version(self, version: Version) -> LoraWeights:
        """Read a stored version from disk. Raises StoreFailed, UnknownAdapter."""
        return self.validator.stored(version.name, version.digest)

    def exists(self, name: str) -> bool:
        """Whether the name has a version at all, though it may not be served here."""
        return name in self._names.sources

    def current(self, name: str) -> Version:
        """The version that `name` has. Raises UnknownAdapter."""
        return self._names.named(name)

    def is_current(self, name: str, digest: str) -> bool:
        """Whether `name` is served and has this content now."""
        return self._names.current.get(name) == digest

    def load_failed(self, text: str) -> bool:
        """Whether the version that "name" or "name@digest" means could not be read when it was last loaded; no such
        version does not fail."""
        try:
            return self._names.find(text).digest in self._failures
        except AdapterError:
            return False

    def metadata(self, name: str) -> Mapping[str, Any]:
        """What the reader told of the current version (`task`, `card`, `honoured`, ...). Raises UnknownAdapter."""
        with self._lock:
            return self._store.records[self._names.named(name).digest].metadata_of(name)

    def list(self) -> Descriptions:
        """A short description of each adapter, by name."""
        with self._lock:
            seen = [self._look(name) for name in self.names()]
        return [self._summary(sight) for sight in seen]

    def describe(self, name: str) -> Description:
        """All that is told about one adapter, with its versions. Raises UnknownAdapter."""
        with self._lock:
            self._names.named(name)
            sight = self._look(name)
        return {**self._summary(sight), **sight.details(self._ram.size, self.bases, self.task_errors(name))}

    def rejected(self, faults: bool = False) -> Descriptions:
        """The folders and stored adapters that are not served, or the faulty ones alone: `{path, reason, since}`."""
        entries = sorted([*self.rejections.entries(), *self._names.aside.values()], key=lambda r: r.path)
        return [{"path": r.path, "reason": r.reason, "since": r.since} for r in entries if r.fault or not faults]

    def memory(self) -> dict[str, int]:
        """`bytes` in RAM and their `budget`; how many `versions` are there, how many `leases` are out."""
        used, versions = self._ram.used, len(self._ram.resident())
        return {"bytes": used, "budget": self._ram.capacity, "versions": versions, "leases": len(self._leases)}

    def sizes(self) -> dict[tuple[str, str], int]:
        """Bytes of the adapters by (name, tier): "device" for those with a slot, "disk" for those not in memory."""
        return {(name, self._tier(d)): self._ram.size(d) for name, d in self._names.current.items()}

    def check_publish(self, name: str, if_match: str | None = None) -> None:
        """Raises what `publish` would say of the name alone, before there is any content: InvalidAdapter,
        VersionMismatch.
        """
        check_name(name, self._reserved)
        self._names.expect(name, if_match)

    # What changes names

    async def publish(self, name: str, folder: Path, **options: Any) -> Published:
        """`publish_now` off the event loop."""
        return await self._off(self._publishers, lambda: self.publish_now(name, folder, **options))

    def publish_now(
        self,
        name: str,
        folder: Path,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        source: str = "api",
        within: Path | None = None,
        imported: Folder = None,
    ) -> Published:
        """Give `name` the content of a PEFT folder, after it was copied, read and found good.

        `create_only`: other content under a name in use raises AdapterConflict. `if_match`: the version that the name
        must have (a label, a digest, or "*" for any), or VersionMismatch. `within`: links may not lead out of it.
        `imported`: the watched folder that it is and the state of its files, to be remembered in the same write; if its
        content is what it was and nobody asks for it, the name is left as it has become since. Raises InvalidAdapter,
        BaseMismatch, NoRoom, StoreFailed; nothing has changed then.
        """
        self.check_publish(name, if_match)
        with self.validator.stage(name, folder, within) as (staged, weights):
            self._check_fit(name, weights.nbytes)
            return self.run_exclusive(lambda: self._commit(staged, weights, create_only, if_match, source, imported))

    async def roll_back(self, name: str, version: str, if_match: str | None = None) -> Published:
        """Give `name` one of its kept versions again: "name@digest" or the digest, six digits of it or more.

        It is read first. Raises UnknownAdapter, InvalidChoice for a digest that is too short or fits several versions,
        VersionMismatch, NoRoom, StoreFailed.
        """
        return await self._off(self._publishers, lambda: self._roll_back(name, version, if_match))

    async def retire(self, name: str, if_match: str | None = None) -> Retired:
        """`retire_now` off the event loop, if no task routes to it. Raises AdapterConflict, VersionMismatch."""
        return await self._off(self._writer, lambda: self._retire_unused(name, if_match))

    def retire_now(self, name: str) -> Retired:
        """Take the name away at once; memory and disk are freed when the last lease is gone.

        Raises UnknownAdapter, StoreFailed.
        """
        return self.run_exclusive(lambda: self._retire(name))

    def run_exclusive(self, call: Callable[[], T]) -> T:
        """What `call` answers, on the writer's thread: no name changes until it has returned. Raises StoreFailed."""
        return self._submit(self._writer, call).result()

    async def pin(self, name: str) -> None:
        """Load the adapter and keep whichever version it has in RAM. Raises as `prefetch`, and NoRoom beside others."""
        with self.lease([(self.current(name).name, 1.0)]) as lease:
            (view,) = await loaded(self.fetch(lease.mix), lambda: self.check_room(lease.mix))
            await self._off(self._writer, lambda: self._pin(name, view))

    async def unpin(self, name: str) -> None:
        """Let the adapter be evicted again. Raises UnknownAdapter, StoreFailed."""
        await self._off(self._writer, lambda: self._unpin(name))

    async def prefetch(self, name: str) -> None:
        """Load the adapter into RAM. Raises UnknownAdapter, NoRoom, and why it could not be read."""
        with self.lease([(self.current(name).name, 1.0)]) as lease:
            await loaded(self.fetch(lease.mix), lambda: self.check_room(lease.mix))

    # What a watch needs

    def imported_folder(self, folder: str) -> ImportedFolder | None:
        """What a folder held when it was last taken in, but for what the store has lost since."""
        taken = self._store.journal.taken.get(folder)
        return None if taken is None or taken.digest in self._store.lost else taken

    def remove_folder(self, name: str, folder: str) -> bool:
        """Forget a watched folder that is gone, and take from `name` what it brought, if that is its content still.

        The version that it was put over, if there is one, is served again. Answers whether anything was taken. Raises
        StoreFailed.
        """
        return self.run_exclusive(lambda: self._withdraw(name, folder))

    # On a thread that publishes

    def _roll_back(self, name: str, version: str, if_match: str | None) -> Published:
        text = version if "@" in version else f"{name}@{version}"
        with self.lease([(text, 1.0)], instead=name) as lease:
            ((found, _),) = lease.versions
            if found.name != name:
                raise AdapterConflict(f"{text[:96]!r} is a version of another adapter", "version")
            self._ram.offer(self._load(found.digest))
        return self.run_exclusive(lambda: self._move(found, if_match))

    # On the writer's thread

    def _commit(
        self, staged: Path, weights: LoraWeights, create_only: bool, if_match: str | None, source: str, imported: Folder
    ) -> Published:
        version = weights.version
        name, digest = version.name, version.digest
        self._names.expect(name, if_match)
        self._check_fit(name, weights.nbytes)
        history = self._names.histories.get(name, ())
        same = history[:1] == (digest,)
        if create_only and history and not same:
            raise AdapterConflict(f"{name!r} is in use by other content; put the new content to replace it", "name")
        journal, dropped = self._store.journal, set[str]()
        if imported is not None:
            journal = journal.take(imported[0], ImportedFolder(digest, imported[1]))
            if source in (WATCH, LIBRARY) and (before := self.imported_folder(imported[0])) is not None:
                if before.digest == digest and not same:
                    self._store.write(journal)
                    return Published(version, False, False, weights.metadata, self._sketch(name))
                dropped = before.without(imported[1])
        if last := self._names.newest.get(name):
            weights = carry_over(weights, self._store.records[last], dropped)
        fresh = digest not in self._store.records and digest not in self._store.journal.referenced()
        if self._store.adopt(staged, VersionRecord.of(weights, time.time())) and same:
            self._observer.on_change(name, version)  # whatever becomes of the rest
        journal = journal.point(
            name, digest, source, time.time(), self._names.kept(name, self.referenced_versions(name))
        )
        try:
            if journal is not self._store.journal:
                self._store.write(journal)
        except StoreFailed:
            if fresh:
                self._store.remove(digest)
            raise
        self._ram.offer(weights)
        with self._lock:
            self._failures.pop(digest, None)
        self._serve(journal)
        self._hold_late_pins()
        return Published(version, not same, not history, weights.metadata, self._sketch(name))

    def _move(self, version: Version, if_match: str | None) -> Published:
        name, digest = version.name, version.digest
        self._names.expect(name, if_match)
        self._names.find(f"{name}@{digest}")  # it may have been retired while it was read
        self._check_fit(name, self._ram.size(digest))
        same = self._names.current.get(name) == digest
        if not same:
            journal, stay = self._store.journal, self._names.kept(name, self.referenced_versions(name))
            journal = journal.point(name, digest, journal.names[name].source, time.time(), stay)
            self._store.write(journal)
            self._serve(journal)
        return Published(version, not same, False, self.metadata(name), self._sketch(name))

    def _retire_unused(self, name: str, if_match: str | None) -> Retired:
        self._names.expect_unused(name, self.tasks(name))
        self._names.expect(name, if_match)
        return self._retire(name)

    def _retire(self, name: str, journal: CatalogState | None = None) -> Retired:
        """`journal` is what is written, if it is not to be without the name."""
        if name not in self._names.histories and name not in self._names.aside:
            raise self._names.unknown(name)
        description = self._sketch(name)
        before, after = self._store.journal, journal or self._store.journal.retire(name)
        self._store.write(after)
        done: Future[None] = Future()
        self._drains.append((before.referenced() - after.referenced(), done))
        self._serve(after)
        return Retired(description, done)

    def _withdraw(self, name: str, folder: str) -> bool:
        taken, journal = self.imported_folder(folder), self._store.journal.take(folder, None)
        brought = (
            taken is not None and self.is_current(name, taken.digest) and journal.names[name].source in (WATCH, LIBRARY)
        )
        if brought:
            self._retire(name, journal=journal.withdraw(name, time.time()))
        else:
            self._store.write(journal)
        return brought

    def _sketch(self, name: str) -> Description:
        """What is told of a name that need not be served. No other write comes between."""
        return self.describe(name) if name in self._names.histories else {"name": name}

    def _pin(self, name: str, view: LoraWeights) -> None:
        digest = self._names.named(name).digest
        self._check_fit(name, self._ram.size(digest), pinned=True)
        self._store.write(self._store.journal.pin(name, True))
        with self._lock:
            self._pins[name] = view if view.digest == digest else None
        if view.digest != digest:
            self._hold_pin(name)

    def _unpin(self, name: str) -> None:
        self._names.named(name)
        self._store.write(self._store.journal.pin(name, False))
        with self._lock:
            self._pins.pop(name, None)

    def _serve(self, journal: CatalogState) -> None:
        """Make what was written true for everybody: one switch of all names, then whatever follows from it."""
        self._misfits = self.validator.misfits(journal.referenced(), self._misfits)
        names = Catalog.of(journal, self._store.lost, self._misfits.get, self._reserved)
        with self._lock:
            before, after = self._names.current, names.current
            self._names = names
            self._draining = (self._draining | set(before.values())) - set(after.values())
            idle = {digest for digest in self._draining if digest not in self._leases}
            self._draining -= idle
            moved = {name for name in {**before, **after} if before.get(name) != after.get(name)}
            repinned = [name for name in moved if name in self._pins and name in after]
            for name in moved & set(self._pins):
                del self._pins[name]
            self._pins.update(dict.fromkeys(repinned))
        self._let_go(idle)
        self._collect()
        for name in repinned:
            self._hold_pin(name)
        for name in sorted(moved):
            self._observer.on_change(name, Version(name, after[name]) if name in after else None)

    def _collect(self) -> None:
        """Delete the versions that have neither a name nor a lease, and tell those who wait for that."""
        with self._lock:
            free = {d for d in set(self._store.records) - self._names.referenced if d not in self._leases}
        self._let_go(free)
        for digest in free:
            try:
                self._store.remove(digest)
            except StoreFailed as error:  # it is swept when the store is opened next
                log.warning("version %s stays on disk for now: %s", digest[:SHORT_DIGEST], error.message)
        with self._lock:  # after all that may have been reading them
            self._failures = {d: reason for d, reason in self._failures.items() if d in self._store.records}
        remaining = set(self._store.records) - self._names.referenced
        for digests, done in [(digests, done) for digests, done in self._drains if not digests & remaining]:
            self._drains.remove((digests, done))
            done.set_result(None)

    # On any thread

    def _release(self, lease: Lease) -> None:
        with self._lock:
            left = self._leases.give_back(version for version, _ in lease.versions)
            unnamed = left - self._names.referenced
            idle = unnamed | (left & self._draining)
            self._draining -= idle
        self._let_go(idle)
        if unnamed:
            try:
                self._writer.submit(self._collect)
            except RuntimeError:  # closed; they are swept when the store is opened next
                log.debug("%d versions are left for the next start", len(unnamed))

    def _let_go(self, digests: Iterable[str]) -> None:
        """Free the memory of versions that nobody needs. Without the lock."""
        for digest in digests:
            self._ram.discard(digest)
            self.slots.unload(digest)

    def _hold_pin(self, name: str) -> None:
        """Load the current version of a pinned name, and keep it if it is that still."""
        try:
            lease = self.lease([(name, 1.0)])
        except AdapterError as error:  # retired meanwhile, or the budget is smaller than at the last start
            return self._pin_failed(name, error)

        def keep(fetched: Fetched) -> None:
            if not fetched.cancelled() and fetched.exception() is None:
                (view,) = fetched.result()
                with self._lock:
                    if name in self._pins and self._names.current.get(name) == view.digest:
                        self._pins[name] = view
            elif not fetched.cancelled():
                self._pin_failed(name, fetched.exception())
            lease.release()

        self.fetch(lease.mix).add_done_callback(keep)

    def _pin_failed(self, name: str, error: BaseException | None) -> None:
        log.warning("the pinned adapter %r is not in memory: %s", name, error)
        with self._lock:
            if isinstance(error, NoRoom | UnknownAdapter) and self._pins.get(name) is None:
                self._pins.pop(name, None)  # it takes no room from the others

    def _loaded(self, digest: str, outcome: str, seconds: float) -> None:
        self._observer.on_load(self._names.of_content(digest), outcome, seconds)
        self._hold_late_pins()

    def _hold_late_pins(self) -> None:
        """Keep the pinned versions that could not be loaded when they were to be, and are in memory now."""
        with self._lock:
            late = [(name, self._names.current.get(name)) for name, view in self._pins.items() if view is None]
        for name in [name for name, digest in late if digest and self._ram.loaded_at(digest) is not None]:
            self._hold_pin(name)

    def _load(self, digest: str) -> LoraWeights:
        """Read one version from the store, and remember why if it failed. On a thread that may block."""
        try:
            weights = self.validator.load(self._names.of_content(digest), digest)
        except StoreFailed as error:
            with self._lock:
                if digest in self._store.records:
                    self._failures[digest] = error.message
            raise
        with self._lock:
            self._failures.pop(digest, None)
        return weights

    def _check_fit(self, name: str, nbytes: int, pinned: bool = False) -> None:
        """Raises NoRoom if `name` at `nbytes` could never be in RAM, or is (to be) pinned and other pins leave less."""
        with self._lock:
            others = self._pinned_digests(besides=name) if pinned or name in self._pins else set()
        room = self._ram.capacity - sum(self._ram.size(digest) for digest in others)
        if nbytes > room:
            beside = " beside what is pinned" if others else ""
            raise NoRoom(f"{name!r} takes {nbytes:,} bytes in RAM; {room:,} are there for it{beside} (--adapter-ram)")

    def _pinned_digests(self, besides: str | None = None) -> set[str]:
        return {self._names.current[name] for name in self._pins if name != besides and name in self._names.current}

    def _look(self, name: str) -> AdapterInfo:
        """What is known of one adapter at one moment. With the lock."""
        history = self._names.histories[name]
        records = tuple(self._store.records[digest] for digest in history)
        pinned = (entry := self._store.journal.names.get(name)) is not None and entry.pinned
        return AdapterInfo(name, records, self._leases.of(name), pinned, self._failures.get(history[0]))

    def _summary(self, sight: AdapterInfo) -> Description:
        digest = sight.records[0].digest
        return sight.summary(
            nbytes=self._ram.size(digest),
            tier=self._tier(digest),
            loaded_at=self._ram.loaded_at(digest),
            tasks=self.tasks(sight.name),
        )

    def _tier(self, digest: str) -> str:
        if self.slots.holds(digest):
            return "device"
        return "disk" if self._ram.loaded_at(digest) is None else "ram"

    async def _off(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        """Await `call` on a thread, so that the event loop is free."""
        return await asyncio.wrap_future(self._submit(executor, call))

    def _submit(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> Future[T]:
        try:
            return executor.submit(call)
        except RuntimeError as error:
            raise StoreFailed("the registry is closed") from error
