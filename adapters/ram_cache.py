"""`RamCache`: adapter weights in RAM within a byte budget, each version loaded once.

`fetch` returns views. A view shares its tensors with the cached copy and pins it for as long as the view's `modules`
are alive, so a crashed engine cannot leave a pin behind.
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
"""Interval at which `pressure` is called while a fetch waits for room."""
LOAD_SECONDS = 60.0
"""How long pin and prefetch wait for a load."""
FITS_SECONDS = 0.2
"""Interval at which they check that the load can still succeed."""

Fetched = Future[tuple[LoraWeights, ...]]


@dataclass(eq=False)
class _Fetch:
    """A pending `fetch`: first it waits for room, then for the versions in `missing`."""

    digests: tuple[str, ...]
    future: Fetched
    missing: set[str] = field(default_factory=set)


class RamCache:
    """Versions in RAM by digest. Thread-safe; the lock is not held during loads and callbacks.

    Args:
        capacity: the budget in bytes.
        load: reads one version, on a worker thread. UnknownAdapter (deleted meanwhile) does not count as a failure.
        size: the expected bytes of a version; corrected after its first load.
        evict_last: versions that are evicted after all others. Called with the lock held.
        on_load: called after each load with the digest, "ok" or "failed", and seconds.
        on_evict: called after each eviction.
        pressure: called repeatedly with a byte count while a fetch waits for room that views hold.
        workers: load threads.
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
        self._expected_size = size
        self._evict_last = evict_last
        self._on_load = on_load
        self._on_evict = on_evict
        self._pressure = pressure
        self._lock = threading.Lock()
        self._lru: LRU[str] = LRU(capacity, self._evicted)
        self._weights: dict[str, LoraWeights] = {}
        self._loaded_at: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        self._kept: frozenset[str] = frozenset()
        self._loading: dict[str, list[_Fetch]] = {}
        self._waiting: deque[_Fetch] = deque()
        self._discarded: set[str] = set()
        """Versions to free when their last view dies."""
        self._dead_views: deque[str] = deque()
        self._callbacks: deque[Callable[[], None]] = deque()
        """Called after the lock is released."""
        self._closed = False
        self._starved = False
        """Whether a fetch waits for room that views hold."""
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="loramux-load")
        # A finalizer can run at any point, even with the lock held: SimpleQueue.put is reentrant.
        self._wakeups: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._waker: threading.Thread | None = None

    def fetch(self, digests: Sequence[str]) -> Fetched:
        """Load all versions, or none. Never blocks.

        Fetches are served in order, but one that needs no room does not wait. Cancel the future to give up.

        Args:
            digests: distinct digests.

        Returns:
            A future of views in the order of `digests`. It fails with the first load error, or with NoRoom if the
            versions exceed the budget.
        """
        fetch = _Fetch(tuple(digests), Future())
        assert len(set(digests)) == len(digests), "a version is fetched twice"
        if not digests:
            fetch.future.set_result(())
            return fetch.future
        with self._locked():
            total = sum(self.size(digest) for digest in digests)
            if self._closed:
                fetch.future.cancel()
            elif total > self.capacity:
                fetch.future.set_exception(_no_room(total, self.capacity))
            else:
                self._discarded.difference_update(digests)
                self._waiting.append(fetch)
        if not fetch.future.done():
            # Weak: a future keeps its callbacks, and the cycle would keep the views alive until garbage collection.
            weak = weakref.ref(fetch)
            fetch.future.add_done_callback(lambda future: self._cancelled(weak()) if future.cancelled() else None)
        return fetch.future

    def offer(self, weights: LoraWeights) -> bool:
        """Keep `weights` if they fit without an eviction. Returns whether the version is in RAM."""
        with self._locked():
            digest = weights.digest
            self._sizes[digest] = weights.nbytes
            if digest not in self._lru and not self._closed and self._lru.add(digest, weights.nbytes):
                self._weights[digest] = weights
                self._loaded_at[digest] = time.time()
            return digest in self._weights

    def discard(self, digest: str) -> None:
        """Free a version now or when its last view dies, unless it is fetched again before."""
        with self._locked():
            if self._lru.pins(digest):
                self._discarded.add(digest)
                return
            if digest in self._lru:
                self._remove(digest)
            self._sizes.pop(digest, None)

    def keep(self, digests: Collection[str]) -> None:
        """Set the versions that are never evicted once they are loaded (pinned adapters)."""
        with self._locked():
            self._kept = frozenset(digests)

    def size(self, digest: str) -> int:
        """Return the bytes that a version takes in RAM, as far as known."""
        known = self._sizes.get(digest)
        return self._expected_size(digest) if known is None else known

    def check_room(self, digests: Collection[str]) -> None:
        """Raise NoRoom if the versions of a mix do not fit in RAM together beside the pinned ones."""
        need = sum(map(self.size, digests))
        pinned = sum(map(self.size, self._kept.difference(digests)))
        if need + pinned > self.capacity:
            beside = f", of which pinned adapters take {pinned:,}" if pinned else ""
            raise NoRoom(
                f"the mix takes {need:,} bytes in RAM; the budget is {self.capacity:,} (--adapter-ram){beside}",
                "adapters",
            )

    def loaded_at(self, digest: str) -> float | None:
        """Return when the version was loaded, in seconds since the epoch; None if it is not in RAM."""
        return self._loaded_at.get(digest)

    def resident(self) -> dict[str, int]:
        """Return the bytes of each version in RAM."""
        with self._locked():
            return {digest: self._lru.cost(digest) for digest in self._weights}

    @property
    def used(self) -> int:
        """Bytes in RAM, including those reserved for running loads."""
        with self._locked():
            return self._lru.used

    @property
    def held(self) -> int:
        """Bytes of versions that have live views or are being loaded."""
        with self._locked():
            return self._lru.pinned

    def close(self) -> None:
        """Cancel waiting fetches, finish running loads and stop the threads. Existing views stay valid."""
        with self._locked():
            self._closed = True
            pending = list(self._waiting)
            for fetches in self._loading.values():
                pending += fetches
        for fetch in pending:
            fetch.future.cancel()
        self._workers.shutdown(wait=True, cancel_futures=True)
        if self._waker is not None:
            self._wakeups.put(False)
            self._waker.join()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; unpin dead views before, serve waiting fetches after, then run callbacks without the lock."""
        with self._lock:
            while self._dead_views:
                self._unpin((self._dead_views.popleft(),))
            yield
            self._serve()
        self._run_callbacks()

    def _run_callbacks(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                callback()
            except Exception:
                log.exception("a callback of the adapter cache failed")

    # The methods below are called with the lock held, unless they say otherwise.

    def _serve(self) -> None:
        """Reserve room for waiting fetches and start their loads."""
        if self._closed:
            return
        starved = False
        for fetch in tuple(self._waiting):
            costs = {digest: self.size(digest) for digest in fetch.digests}
            if (total := sum(costs.values())) > self.capacity:  # a version is larger than expected
                self._waiting.remove(fetch)
                self._reject(fetch, _no_room(total, self.capacity))
                continue
            if starved and any(digest not in self._lru for digest in costs):
                continue
            if not self._lru.reserve(costs, self._evict_last, self._kept):
                starved = True
                lacking = self._lru.used + sum(c for d, c in costs.items() if d not in self._lru) - self.capacity
                self._callbacks.append(lambda lacking=lacking: self._pressure(lacking))  # type: ignore[misc]
                continue
            self._waiting.remove(fetch)
            self._start_loads(fetch)
        if starved and not self._starved:
            self._start_waker()
            self._wakeups.put(True)
        self._starved = starved

    def _start_loads(self, fetch: _Fetch) -> None:
        fetch.missing = {digest for digest in fetch.digests if digest not in self._weights}
        for digest in fetch.missing:
            if digest in self._loading:
                self._loading[digest].append(fetch)
            else:
                self._loading[digest] = [fetch]
                self._workers.submit(self._load, digest)
        if not fetch.missing:
            self._deliver(fetch)

    def _load(self, digest: str) -> None:
        """Load one version. Runs on a worker, without the lock."""
        start = time.monotonic()
        weights: LoraWeights | None = None
        error: Exception | None = None
        try:
            weights = self._read(digest)
        except BaseException as failure:  # a panic of a Rust library is not an Exception
            if isinstance(failure, UnknownAdapter):
                log.debug("%s", failure)
            elif isinstance(failure, AdapterError):
                log.error("an adapter cannot be loaded: %s", failure)
            else:
                log.exception("loading %s failed", digest[:SHORT_DIGEST])
            error = _without_frames(failure if isinstance(failure, Exception) else RuntimeError(str(failure)))
        seconds = time.monotonic() - start
        with self._locked():
            fetches = self._loading.pop(digest)
            if weights is not None:
                if digest in self._lru:
                    self._sizes[digest] = weights.nbytes
                error = self._insert(digest, weights, fetches)
            if error is not None:
                for fetch in fetches:
                    self._release(fetch)
                    self._reject(fetch, error)
                if digest in self._lru and not self._lru.pins(digest):
                    self._remove(digest)
            if not isinstance(error, UnknownAdapter):
                outcome = "failed" if error else "ok"
                self._callbacks.append(lambda: self._on_load(digest, outcome, seconds))

    def _insert(self, digest: str, weights: LoraWeights, fetches: list[_Fetch]) -> Exception | None:
        """Insert a loaded version at its true size. Returns NoRoom if it can never fit."""
        if digest not in self._lru:  # all its fetches were cancelled, and it was evicted
            return None
        if not self._lru.resize(digest, weights.nbytes, self._evict_last, self._kept):
            if weights.nbytes > self.capacity:
                return _no_room(weights.nbytes, self.capacity)
            for fetch in reversed(fetches):  # larger than expected: queue again, holding nothing
                self._release(fetch)
                self._waiting.appendleft(fetch)
            if digest in self._lru and not self._lru.pins(digest):
                self._remove(digest)
            return None
        self._weights[digest] = weights
        self._loaded_at[digest] = time.time()
        for fetch in fetches:
            fetch.missing.discard(digest)
            if not fetch.missing:
                self._deliver(fetch)
        if digest in self._discarded and not self._lru.pins(digest):
            self._remove(digest)
        return None

    def _deliver(self, fetch: _Fetch) -> None:
        """Convert the fetch's pins into views; each returns its pin when it dies."""
        self._start_waker()
        views = tuple(self._view(digest) for digest in fetch.digests)

        def deliver() -> None:
            if fetch.future.set_running_or_notify_cancel():
                fetch.future.set_result(views)

        self._callbacks.append(deliver)

    def _view(self, digest: str) -> LoraWeights:
        weights = self._weights[digest]
        modules = _Modules(weights.modules)
        weakref.finalize(modules, self._view_died, digest).atexit = False
        return replace(weights, modules=modules)

    def _view_died(self, digest: str) -> None:
        """Finalizer of a view: runs on any thread, with or without the lock."""
        self._dead_views.append(digest)
        self._wakeups.put(True)

    def _start_waker(self) -> None:
        if self._waker is None:
            self._waker = threading.Thread(target=self._wake_loop, name="loramux-ram", daemon=True)
            self._waker.start()

    def _wake_loop(self) -> None:
        """Serve waiting fetches when a view dies, and repeatedly while one waits for room. Without the lock."""
        running = True
        while running:
            with suppress(queue.Empty):
                running = self._wakeups.get(timeout=PRESSURE_SECONDS if self._starved else None)
            with self._locked():
                pass

    def _cancelled(self, fetch: _Fetch | None) -> None:
        """A fetch was cancelled. Without the lock."""
        with self._locked():
            if fetch is None:
                return
            if fetch in self._waiting:
                self._waiting.remove(fetch)
            elif fetch.missing:
                self._release(fetch)

    def _reject(self, fetch: _Fetch, error: Exception) -> None:
        def reject() -> None:
            if fetch.future.set_running_or_notify_cancel():
                fetch.future.set_exception(error)

        self._callbacks.append(reject)

    def _release(self, fetch: _Fetch) -> None:
        """Remove the fetch from running loads and unpin its versions."""
        for digest in fetch.missing:
            fetches = self._loading.get(digest, [])
            if fetch in fetches:
                fetches.remove(fetch)
        fetch.missing = set()
        self._unpin(fetch.digests)

    def _unpin(self, digests: Sequence[str]) -> None:
        self._lru.free(digests)
        for digest in digests:
            if digest in self._discarded and not self._lru.pins(digest):
                self._remove(digest)

    def _remove(self, digest: str) -> None:
        self._lru.remove(digest)
        self._weights.pop(digest, None)
        self._loaded_at.pop(digest, None)
        if digest in self._discarded:
            self._discarded.discard(digest)
            self._sizes.pop(digest, None)

    def _evicted(self, digest: str) -> None:
        self._loaded_at.pop(digest, None)
        self._discarded.discard(digest)
        if self._weights.pop(digest, None) is not None:
            self._callbacks.append(lambda: self._on_evict(digest))


class _Modules(dict[str, LowRank]):
    """The modules of one view; a dict subclass so that it can have a finalizer."""


def _no_room(nbytes: int, capacity: int) -> NoRoom:
    return NoRoom(f"the adapters take {nbytes:,} bytes in RAM; the budget is {capacity:,} (--adapter-ram)")


def _without_frames(error: Exception) -> Exception:
    """Return the error without its traceback, which would keep tensors alive."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


async def wait_loaded(
    fetched: Fetched, check: Callable[[], None] = lambda: None, seconds: float = LOAD_SECONDS
) -> tuple[LoraWeights, ...]:
    """Await a fetch, and cancel it after `seconds`.

    `check` is called repeatedly meanwhile; its error ends the wait. (`asyncio.wrap_future` would keep the views in a
    reference cycle.)

    Raises:
        NoRoom: not loaded in time.
        AdapterError: the load failed.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    fetched.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    end = loop.time() + seconds
    try:
        while not done.is_set():
            check()
            if loop.time() >= end:
                raise NoRoom(f"not loaded within {seconds:g} seconds: adapters in use leave no room in RAM")
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(end, loop.time() + FITS_SECONDS)):
                    await done.wait()
    finally:
        fetched.cancel()
    return fetched.result()
