"""`Admission`: decides which waiting request may run next, and reserves everything that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from adapters.weights import LoraWeights
from server.engine.adapter_loader import AdapterLoader
from server.engine.adapter_slots import AdapterSlots
from server.engine.kv_cache import BlockHash, KVCache, next_hash
from server.engine.policies import Aging, PendingPrefixes, RamPressure
from server.engine.queue import FairQueue
from server.engine.request import Request, State

PREFETCH_REQUESTS = 8
"""Number of waiting requests whose adapters are copied to a GPU in advance."""


class Admission:
    """Reserves KV blocks and adapter slots for waiting requests, all or nothing.

    Requests are tried in queue order. A request whose adapters are loading, or that finds no room, does not hold up the
    others until `Aging` applies, because a slow load or a large mix would otherwise delay everybody.

    Args:
        waiting: The scheduler's waiting queue.
        running: The scheduler's running list.
        age_limit: Seconds of waiting for room that give a request precedence.
        root: Returns the prefix cache's root hash of a request.
    """

    def __init__(
        self,
        kv: KVCache,
        slots: AdapterSlots,
        loader: AdapterLoader,
        waiting: FairQueue,
        running: list[Request],
        age_limit: float,
        root: Callable[[Request], BlockHash],
    ) -> None:
        self.aging = Aging(age_limit)
        self.ram_pressure = RamPressure(age_limit)
        self.pending_prefixes = PendingPrefixes()
        self.retry = False
        """Whether anything has arrived or been freed since no waiting request could be admitted."""
        self._kv = kv
        self._slots = slots
        self._loader = loader
        self._waiting = waiting
        self._running = running
        self._root = root

    def candidates(self, now: float, ram_urgent: bool) -> Iterator[Request]:
        """Yield waiting requests of the best priority in queue order, after one that is starving.

        Args:
            ram_urgent: Whether to skip requests that would keep adapters in RAM. See `RamPressure`.
        """
        for request in self._in_order(now):
            if not ram_urgent or self._needs_no_ram(request) or self._loader.has_weights(request):
                yield request

    def reserve(self, request: Request, room: Callable[[int], int], now: float) -> list[str] | None:
        """Reserve KV blocks and adapter slots for a request, and reuse cached blocks of its prompt.

        Args:
            room: Returns how many tokens a prompt at a given depth may have in this step.

        Returns:
            The digests of adapters that were placed in slots for it, or None if the request has to wait.
        """
        is_loaded, weights = self._weights(request, now)
        if not is_loaded:
            return None
        found: list[int] = []
        hashes = request.block_hashes
        if self._kv.has_prefix_cache:
            most = request.first_logit // self._kv.block_size
            hashes = self._hashes(request, request.required // self._kv.block_size)
            found = self._kv.match_prefix(hashes[1 : most + 1])
            if len(found) < most and hashes[len(found) + 1] in self.pending_prefixes:
                self._kv.free(found)
                return None
        if room(len(found) * self._kv.block_size) <= 0:
            self._kv.free(found)
            self.retry = True  # the next step has room again
            return None
        new_adapters = [digest for digest in request.mix.digests if not self._slots.holds(digest)]
        if not self._reserve_all(request, weights, found):
            self.aging.block(request, now)
            return None
        if self._kv.has_prefix_cache:
            self.pending_prefixes.add(request, hashes[len(found) + 1 :])
        return new_adapters

    def _reserve_all(self, request: Request, weights: Sequence[LoraWeights] | None, found: list[int]) -> bool:
        """Reserve the missing KV blocks and all adapter slots, or free the blocks `found` and return False."""
        need = self._kv.blocks_for(request.required) - len(found)
        slots = None
        try:
            # One block more for each running request, which may need it soon.
            if need + len(self._running) <= self._kv.available:
                slots = self._slots.reserve(request.mix, weights)
        finally:
            if slots is None:
                self._kv.free(found)
        if slots is None:
            return False
        blocks = self._kv.allocate(need)
        assert blocks is not None, "availability was checked before"
        request.slots = slots
        request.blocks.extend(found + blocks)
        request.num_hashed_blocks = len(found)
        request.computed = len(found) * self._kv.block_size
        return True

    def release(self, request: Request) -> None:
        """Free everything that a running request holds."""
        self._remove_pending(request, request.num_hashed_blocks, len(request.block_hashes) - 1)
        self._kv.free(request.blocks)
        self._slots.release(request.mix)
        del request.blocks[:]
        request.slots = ()
        request.computed = request.num_hashed_blocks = 0
        request.scores.clear()

    def stop_waiting(self, request: Request) -> None:
        """Release the load and the age of a request that no longer waits."""
        if self._loader.release(request):
            self.retry = True  # a load that was refused before may start now
        self.aging.remove(request)

    def register_full_blocks(self, request: Request) -> None:
        """Register the blocks that a running request has filled in the prefix cache."""
        full = request.computed // self._kv.block_size
        hashes = self._hashes(request, full)
        for i in range(request.num_hashed_blocks, full):
            self._kv.register(request.blocks[i], hashes[i + 1])
        self._remove_pending(request, request.num_hashed_blocks, full)
        request.num_hashed_blocks = full

    def is_ram_urgent(self, now: float) -> bool:
        """Whether a load of the best waiting priority has lacked RAM for too long. See `RamPressure`."""
        return self.ram_pressure.is_urgent(now, lambda: self._loader.longest_wait(self._waiting.best_priority, now))

    def copy_ahead(self, now: float) -> list[tuple[Request, Exception]]:
        """Load and copy to the GPU the adapters of the next requests in the queue, while others run.

        Returns:
            The requests whose adapters cannot be placed, with the errors.
        """
        failed: list[tuple[Request, Exception]] = []
        following = list(itertools.islice(self._waiting.in_order(), PREFETCH_REQUESTS))
        wanted = {digest for request in following for digest in request.mix.digests}
        for request in following:
            _, weights = self._weights(request, now)
            if weights is not None:
                try:
                    self._slots.prefetch(request.mix, weights, wanted)
                except Exception as e:
                    failed.append((request, e))
        return failed

    def _in_order(self, now: float) -> Iterator[Request]:
        starving = self.aging.starving(self._waiting, lambda request: self._weights(request, now)[0], now)
        if starving is not None:
            yield starving
            if starving.state in (State.QUEUED, State.LOADING):
                return
        for request in self._waiting.in_order():
            if request.priority > self._waiting.best_priority:
                return
            if request is not starving:
                yield request

    def _weights(self, request: Request, now: float) -> tuple[bool, Sequence[LoraWeights] | None]:
        """Return whether the request's adapters are loaded, and their weights if they have no slots. Starts loads."""
        if self._slots.has(request.mix):
            return True, None
        weights = self._loader.get(request, now)
        return weights is not None, weights

    def _needs_no_ram(self, request: Request) -> bool:
        """Whether the request runs on the base alone, or on adapters that are copied to a GPU."""
        return not request.mix or (not self._slots.use_ram and self._slots.has(request.mix))

    def _hashes(self, request: Request, count: int) -> list[BlockHash]:
        """Return the root hash and the hashes of at least the first `count` blocks."""
        hashes, size = request.block_hashes, self._kv.block_size
        if not hashes:
            hashes.append(self._root(request))
        for i in range(len(hashes) - 1, count):
            hashes.append(next_hash(hashes[-1], request.slice(i * size, (i + 1) * size)))
        return hashes

    def _remove_pending(self, request: Request, start: int, stop: int) -> None:
        """Blocks `start` to `stop` of the request are computed, or never will be."""
        if self.pending_prefixes.remove(request, request.block_hashes[start + 1 : stop + 1]):
            self.retry = True
