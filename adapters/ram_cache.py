"""`RamCache`: the adapters that are in memory, each once, within a budget of bytes.

Owns loading (every version once, however many ask), eviction, and the count of what is held. Does not know names,
leases or folders: it is given `load(digest)`. What `fetch` hands out are views: each shares its tensors with the one
copy here and pins it for as long as the view's `modules` live, so whoever uses the tensors keeps the view or its
modules. An engine that fails and starts again cannot leave a pin behind.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from adapters.errors import AdapterError, NoRoom, UnknownAdapter
from adapters.lru import LRU
from adapters.weights import SHORT_DIGEST, LoraWeights, LowRank

log = logging.getLogger(__name__)

PRESSURE_SECONDS = 0.05
"""How often it is asked again for bytes that views hold: what is in use now is idle a little later."""

LOAD_SECONDS = 60.0
"""How long a person waits for an adapter to be loaded, pinned or not; requests have deadlines of their own."""

FITS_SECONDS = 0.2
"""How often it is asked meanwhile whether it can be loaded at all."""

Fetched = Future[tuple[LoraWeights, ...]]


@dataclass(eq=False)
class _Want:
    """One `fetch` on its way: waiting for room, then for the versions in `missing`."""

    digests: tuple[str, ...]
    future: Fetched
    missing: set[str] = field(default_factory=set)


class RamCache:
    """Versions in memory by digest; thread-safe, and its lock is never held during a load or a callback.

    `load(digest)` reads one version, on a worker thread; UnknownAdapter, of one that was deleted meanwhile, is no
    failure. `size(digest)` is what it will take in bytes, as far as known; the truth replaces it after the first load.
    `evict_last(digest)` is asked under the lock and must not block. `on_load(digest, outcome, seconds)` hears of each
    load ("ok" or "failed"), `on_evict(digest)` of each eviction, and `pressure(bytes)` is called, again and again,
    while a fetch waits for bytes that views hold.
    """

    def __init__(
        self,
        capacity: int,
        *,
        load: Callable[[str], LoraWeights],
        size: Callable[[str], int],
        evict_last: Callable[[str], bool] = lambda digest: False,
        on_load: Callable[[str, str, float], None] = lambda digest, outcome, seconds: None,
        on_evict: Callable[[str], None] = lambda digest: None,
        pressure: Callable[[int], None] = lambda nbytes: None,
        workers: int = 2,
    ) -> None:
        self.capacity = capacity
        self._read = load
        self._expected = size
        self._evict_last = evict_last
        self._on_load = on_load
        self._on_evict = on_evict
        self._pressure = pressure
        self._lock = threading.Lock()
        self._lru: LRU[str] = LRU(capacity, self._evicted)
        self._weights: dict[str, LoraWeights] = {}
        self._loaded_at: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        self._loading: dict[str, list[_Want]] = {}
        self._waiting: deque[_Want] = deque()
        self._unwanted: set[str] = set()
        self._returned: deque[str] = deque()
        self._effects: deque[Callable[[], None]] = deque()
        self._closed = False
        self._short = False
        """Whether somebody waits for room that views hold."""
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="loramux-load")
        # SimpleQueue.put is the one queue operation that is safe in a finalizer, wherever that may run.
        self._bell: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._bell_thread: threading.Thread | None = None

    def fetch(self, digests: Sequence[str]) -> Fetched:
        """All of `digests` (distinct), in their order, or none: the future fails with the reason of the first failure.

        Never blocks. Cancelling the future gives back what it holds; once it is done it keeps the views alive, as any
        future does its result. It fails with NoRoom at once if the versions together are over the budget. Waiting
        fetches are served in the order they came, except that one which needs no room waits behind none.
        """
        want = _Want(tuple(digests), Future())
        assert len(set(digests)) == len(digests), "a version is asked for twice in one fetch"
        if not digests:
            want.future.set_result(())
            return want.future
        with self._turn():
            total = sum(self.size(digest) for digest in digests)
            if self._closed:
                want.future.cancel()
            elif total > self.capacity:
                want.future.set_exception(_no_room(total, self.capacity))
            else:
                self._unwanted.difference_update(digests)
                self._waiting.append(want)
        if not want.future.done():
            # Weak, since a future keeps its callbacks: the cycle would keep the views until the collector comes by.
            still = weakref.ref(want)
            want.future.add_done_callback(lambda future: self._forget(still()) if future.cancelled() else None)
        return want.future

    def offer(self, weights: LoraWeights) -> bool:
        """Keep `weights` if there is room for them without evicting anything. Answers whether they are in memory."""
        with self._turn():
            digest = weights.digest
            self._sizes[digest] = weights.nbytes
            if digest not in self._lru and not self._closed and self._lru.add(digest, weights.nbytes):
                self._weights[digest] = weights
                self._loaded_at[digest] = time.time()
            return digest in self._weights

    def discard(self, digest: str) -> None:
        """Free one version: now, or as soon as its last view is gone, unless it is fetched again before."""
        with self._turn():
            if self._lru.pins(digest):
                self._unwanted.add(digest)
                return
            if digest in self._lru:
                self._remove(digest)
            self._sizes.pop(digest, None)

    def size(self, digest: str) -> int:
        """Bytes that `digest` takes in memory, or will, as far as known."""
        known = self._sizes.get(digest)
        return self._expected(digest) if known is None else known

    def check_room(self, digests: Collection[str], pinned: Collection[str]) -> None:
        """Raises NoRoom if `digests`, those of a mix, cannot be in memory together beside what is `pinned`."""
        need = sum(map(self.size, digests))
        kept = sum(map(self.size, set(pinned).difference(digests)))
        if need + kept > self.capacity:
            beside = f", {kept:,} of which are pinned" if kept else ""
            raise NoRoom(
                f"the mix takes {need:,} bytes in RAM; there are {self.capacity:,} (--adapter-ram){beside}", "adapters"
            )

    def loaded_at(self, digest: str) -> float | None:
        """When it came into memory, in seconds since the epoch; None if it is not there."""
        return self._loaded_at.get(digest)

    def resident(self) -> dict[str, int]:
        """Bytes of each version in memory."""
        with self._turn():
            return {digest: self._lru.cost(digest) for digest in self._weights}

    @property
    def used(self) -> int:
        """Bytes in memory, and bytes promised to loads that run."""
        with self._turn():
            return self._lru.used

    @property
    def held(self) -> int:
        """Bytes of versions that cannot be evicted now: views of them live, or they load."""
        with self._turn():
            return self._lru.pinned

    def close(self) -> None:
        """Cancel what waits, finish what loads, and end the threads. Views that are out stay valid."""
        with self._turn():
            self._closed = True
            outstanding = list(self._waiting)
            for wants in self._loading.values():
                outstanding += wants
        for want in outstanding:
            want.future.cancel()
        self._workers.shutdown(wait=True, cancel_futures=True)
        if self._bell_thread is not None:
            self._bell.put(False)
            self._bell_thread.join()

    # Everything below runs with the lock held, except where it says otherwise.

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Take the lock; count the views that died before and serve who waits after; then tell, without the lock."""
        with self._lock:
            self._take_back()
            yield
            self._serve()
        self._tell()

    def _tell(self) -> None:
        """Run what must not run under the lock: futures and callbacks. Without the lock."""
        while self._effects:
            try:
                effect = self._effects.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                effect()
            except Exception:  # a fault of whoever is told, which must not keep others waiting
                log.exception("telling of an adapter in memory failed")

    def _take_back(self) -> None:
        while self._returned:
            self._let_go((self._returned.popleft(),))

    def _serve(self) -> None:
        if self._closed:
            return
        short = False
        for want in tuple(self._waiting):
            costs = {digest: self.size(digest) for digest in want.digests}
            if (total := sum(costs.values())) > self.capacity:  # one has turned out to be larger than was thought
                self._waiting.remove(want)
                self._refuse(want, _no_room(total, self.capacity))
                continue
            if short and any(digest not in self._lru for digest in costs):
                continue
            if not self._lru.reserve(costs, self._evict_last):
                short = True
                lacking = self._lru.used + sum(c for d, c in costs.items() if d not in self._lru) - self.capacity
                self._effects.append(lambda lacking=lacking: self._pressure(lacking))  # type: ignore[misc]
                continue
            self._waiting.remove(want)
            want.missing = {digest for digest in costs if digest not in self._weights}
            for digest in want.missing:
                if digest in self._loading:
                    self._loading[digest].append(want)
                else:
                    self._loading[digest] = [want]
                    self._workers.submit(self._load, digest)
            if not want.missing:
                self._deliver(want)
        if short and not self._short:
            self._listen()
            self._bell.put(True)
        self._short = short  # at once: the bell's thread looks at it without the lock

    def _load(self, digest: str) -> None:
        """One load, on a worker. Without the lock."""
        began = time.monotonic()
        weights: LoraWeights | None = None
        error: Exception | None = None
        try:
            weights = self._read(digest)
        except BaseException as failure:  # a panic of a library is no Exception, and whoever waits has to hear of it
            if isinstance(failure, UnknownAdapter):
                log.debug("%s", failure)
            elif isinstance(failure, AdapterError):
                log.error("an adapter cannot be loaded: %s", failure)
            else:
                log.exception("loading %s failed", digest[:SHORT_DIGEST])
            error = _bare(failure if isinstance(failure, Exception) else RuntimeError(str(failure)))
        seconds = time.monotonic() - began
        with self._turn():
            wants = self._loading.pop(digest)
            if weights is not None:
                if digest in self._lru:  # else it may have been discarded, and no size of it be of use any more
                    self._sizes[digest] = weights.nbytes
                error = self._settle(digest, weights, wants)
            if error is not None:
                for want in wants:
                    self._fail(want, error)
                if digest in self._lru and not self._lru.pins(digest):
                    self._remove(digest)
            if not isinstance(error, UnknownAdapter):
                outcome = "failed" if error else "ok"
                self._effects.append(lambda: self._on_load(digest, outcome, seconds))

    def _settle(self, digest: str, weights: LoraWeights, wants: list[_Want]) -> Exception | None:
        """Take in what was loaded, at its true size. Answers why not, if it could never fit."""
        if digest not in self._lru:  # evicted while it loaded, since nobody wanted it any more
            return None
        if not self._lru.resize(digest, weights.nbytes, self._evict_last):
            if weights.nbytes > self.capacity:
                return _no_room(weights.nbytes, self.capacity)
            # It is larger than was thought. Give back all that its askers hold, so that they wait holding nothing.
            for want in reversed(wants):
                self._withdraw(want)
                self._waiting.appendleft(want)
            if digest in self._lru and not self._lru.pins(digest):
                self._remove(digest)
            return None
        self._weights[digest] = weights
        self._loaded_at[digest] = time.time()
        for want in wants:
            want.missing.discard(digest)
            if not want.missing:
                self._deliver(want)
        if digest in self._unwanted and not self._lru.pins(digest):
            self._remove(digest)
        return None

    def _deliver(self, want: _Want) -> None:
        """Turn the pins of `want` into views, each of which returns its pin when it dies."""
        self._listen()
        views = tuple(self._view(digest) for digest in want.digests)

        def tell() -> None:
            if want.future.set_running_or_notify_cancel():
                want.future.set_result(views)

        self._effects.append(tell)

    def _view(self, digest: str) -> LoraWeights:
        weights = self._weights[digest]
        modules = _Modules(weights.modules)
        weakref.finalize(modules, self._return, digest).atexit = False
        return replace(weights, modules=modules)

    def _return(self, digest: str) -> None:
        """A view died. This runs anywhere, even in a thread that has the lock, so it only leaves a note."""
        self._returned.append(digest)
        self._bell.put(True)

    def _listen(self) -> None:
        """From now on somebody serves who waits, when a view dies and nobody else comes by."""
        if self._bell_thread is None:
            self._bell_thread = threading.Thread(target=self._hear, name="loramux-ram", daemon=True)
            self._bell_thread.start()

    def _hear(self) -> None:
        """The bell's thread. While somebody waits for room, it asks for it again and again. Without the lock."""
        open_ = True
        while open_:
            with suppress(queue.Empty):
                open_ = self._bell.get(timeout=PRESSURE_SECONDS if self._short else None)
            with self._turn():
                pass

    def _forget(self, want: _Want | None) -> None:
        """`want` was cancelled. Without the lock."""
        with self._turn():
            if want is None:
                return
            if want in self._waiting:
                self._waiting.remove(want)
            elif want.missing:
                self._withdraw(want)

    def _fail(self, want: _Want, error: Exception) -> None:
        self._withdraw(want)
        self._refuse(want, error)

    def _refuse(self, want: _Want, error: Exception) -> None:
        """Of one that holds nothing."""

        def tell() -> None:
            if want.future.set_running_or_notify_cancel():
                want.future.set_exception(error)

        self._effects.append(tell)

    def _withdraw(self, want: _Want) -> None:
        """Take `want` out of the loads that it waits for and give back its pins."""
        for digest in want.missing:
            wants = self._loading.get(digest, [])
            if want in wants:
                wants.remove(want)
        want.missing = set()
        self._let_go(want.digests)

    def _let_go(self, digests: Sequence[str]) -> None:
        self._lru.free(digests)
        for digest in digests:
            if digest in self._unwanted and not self._lru.pins(digest):
                self._remove(digest)

    def _remove(self, digest: str) -> None:
        self._lru.remove(digest)
        self._weights.pop(digest, None)
        self._loaded_at.pop(digest, None)
        if digest in self._unwanted:
            self._unwanted.discard(digest)
            self._sizes.pop(digest, None)

    def _evicted(self, digest: str) -> None:
        self._loaded_at.pop(digest, None)
        self._unwanted.discard(digest)
        if self._weights.pop(digest, None) is not None:
            self._effects.append(lambda: self._on_evict(digest))


class _Modules(dict[str, LowRank]):
    """The modules of one view, told apart from every other view's, so that their death can be noticed."""


def _no_room(nbytes: int, capacity: int) -> NoRoom:
    return NoRoom(f"{nbytes:,} bytes of adapters can never fit the {capacity:,} bytes for them in RAM (--adapter-ram)")


def _bare(error: Exception) -> Exception:
    """The error without the frames that raised it, which would keep tensors alive for as long as it is kept."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


async def loaded(
    fetched: Fetched, fits: Callable[[], None] = lambda: None, seconds: float = LOAD_SECONDS
) -> tuple[LoraWeights, ...]:
    """Await a fetch for so long at most. Raises its error, NoRoom if it has to wait longer, and what `fits` raises,
    which is asked again and again: others may have been pinned meanwhile, and a fetch that never fits holds others up.

    `asyncio.wrap_future` would keep the views in a cycle until the collector comes by.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    fetched.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    end = loop.time() + seconds
    try:
        while not done.is_set():
            fits()
            if loop.time() >= end:
                raise NoRoom(f"not loaded within {seconds:g} seconds: the adapters in use leave no room in RAM")
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(end, loop.time() + FITS_SECONDS)):
                    await done.wait()
    finally:
        fetched.cancel()
    return fetched.result()
