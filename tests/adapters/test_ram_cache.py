"""The RAM cache: one load per version, all or nothing, within the budget, freed with the last view."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest
import torch

from adapters.errors import InvalidAdapter, NoRoom
from adapters.ram_cache import Fetched, RamCache, wait_loaded
from adapters.weights import LoraWeights, LowRank
from tests.waiting import SECONDS, until

SIZE = 8 * 4 * 2


def weights_of(digest: str, into: int = 8) -> LoraWeights:
    value = float(ord(digest[0]))
    return LoraWeights(digest, digest, {"m": LowRank(torch.full((1, into), value), torch.full((into, 1), value), 1.0)})


class Source:
    """Counts loads, delays them, and makes them fail; records callbacks."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, BaseException] = {}
        self.sizes: dict[str, int] = {}
        self.outcomes: list[tuple[str, str]] = []
        self.evicted: list[str] = []
        self.pressure: list[int] = []
        self.leased: set[str] = set()

    def load(self, digest: str) -> LoraWeights:
        self.loads[digest] += 1
        if digest in self.gates:
            assert self.gates[digest].wait(60)
        if digest in self.errors:
            raise self.errors[digest]
        return weights_of(digest, self.sizes.get(digest, 8))

    def hold(self, digest: str) -> threading.Event:
        return self.gates.setdefault(digest, threading.Event())


@pytest.fixture
def source() -> Source:
    return Source()


MakeRam = Callable[[int], RamCache]


@pytest.fixture
def make_ram(source: Source) -> Iterator[MakeRam]:
    rams: list[RamCache] = []

    def make(count: int) -> RamCache:
        rams.append(
            RamCache(
                count * SIZE,
                load=source.load,
                size=lambda digest: SIZE,
                evict_last=lambda digest: digest in source.leased,
                on_load=lambda digest, outcome, seconds: source.outcomes.append((digest, outcome)),
                on_evict=source.evicted.append,
                pressure=lambda nbytes: source.pressure.append(nbytes),
            )
        )
        return rams[-1]

    yield make
    for gate in source.gates.values():
        gate.set()
    for ram in rams:
        ram.close()


def got(future: Fetched) -> tuple[LoraWeights, ...]:
    return future.result(SECONDS)


def test_views_are_in_the_requested_order_and_share_tensors(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(4)
    b, a = got(ram.fetch(["b", "a"]))
    (again,) = got(ram.fetch(["a"]))
    assert (a.digest, b.digest) == ("a", "b")
    assert again.modules["m"].A.data_ptr() == a.modules["m"].A.data_ptr()
    assert got(ram.fetch([])) == ()
    assert source.loads == {"a": 1, "b": 1} and sorted(source.outcomes) == [("a", "ok"), ("b", "ok")]
    assert ram.used == ram.held == 2 * SIZE


def test_concurrent_fetches_share_one_load(make_ram: MakeRam, source: Source) -> None:
    ram, gate = make_ram(4), source.hold("a")
    futures = [ram.fetch(["a"]) for _ in range(20)]
    threads = [threading.Thread(target=lambda: futures.append(ram.fetch(["a", "b"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.set()
    assert all(got(future)[0].digest == "a" for future in futures)
    assert source.loads == {"a": 1, "b": 1}


def test_a_view_pins_its_version_until_it_dies(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(2)
    views = list(got(ram.fetch(["a"]))) + list(got(ram.fetch(["b"])))
    waiting = ram.fetch(["c"])
    assert source.pressure and set(source.pressure) == {SIZE} and not waiting.done()
    modules = views[0].modules
    del views[0]
    assert ram.held == 2 * SIZE
    del modules
    assert got(waiting)[0].digest == "c"
    assert source.evicted == ["a"] and ram.loaded_at("a") is None and ram.loaded_at("c") is not None


def test_pressure_is_called_repeatedly_until_there_is_room(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(1)
    views = list(got(ram.fetch(["a"])))
    source.pressure = Reluctant(views)
    assert got(ram.fetch(["b"]))[0].digest == "b"
    assert source.pressure == [SIZE] * 5
    busy = got(ram.fetch(["c"]))
    began, calls = time.monotonic(), len(source.pressure)
    waiting = ram.fetch(["d"])
    time.sleep(0.2)
    more = len(source.pressure) - calls
    assert 0 < more <= 40 * (time.monotonic() - began)
    del busy
    got(waiting)


def test_the_starved_flag_stays_set_while_a_fetch_waits(source: Source) -> None:
    """The waker thread reads it without the lock."""
    seen: list[bool] = []
    ram = RamCache(SIZE, load=source.load, size=lambda digest: bool(seen.append(ram._starved)) or SIZE)
    held = got(ram.fetch(["a"]))
    waiting = ram.fetch(["b"])
    seen.clear()
    assert ram.used == SIZE
    assert seen and all(seen)
    del held
    got(waiting)
    ram.close()


class Reluctant(list[int]):
    """Releases its views at the fifth call."""

    def __init__(self, views: list[LoraWeights]) -> None:
        super().__init__()
        self.views = views

    def append(self, nbytes: int) -> None:
        super().append(nbytes)
        if len(self) == 5:
            self.views.clear()


def test_a_fetch_reserves_all_versions_or_none(make_ram: MakeRam) -> None:
    ram = make_ram(3)
    first = got(ram.fetch(["a", "b"]))
    blocked = ram.fetch(["c", "d"])
    assert ram.used == 2 * SIZE
    assert got(ram.fetch(["b"]))
    behind = ram.fetch(["e"])
    assert not behind.done() and not blocked.done()
    del first
    assert [w.digest for w in got(blocked)] == ["c", "d"]
    assert got(behind)[0].digest == "e"


def test_evict_last_versions_are_evicted_last(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(3)
    for digest in "abc":
        got(ram.fetch([digest]))
    source.leased = {"a", "b"}
    got(ram.fetch(["d"]))
    assert source.evicted == ["c"]
    got(ram.fetch(["e", "f"]))
    assert source.evicted == ["c", "d", "a"]


def test_a_failed_load_fails_all_its_fetches_and_takes_no_room(make_ram: MakeRam, source: Source) -> None:
    ram, gate = make_ram(4), source.hold("b")
    source.errors["b"] = InvalidAdapter("broken")
    futures = [ram.fetch(["a", "b"]), ram.fetch(["b"]), ram.fetch(["b", "c"])]
    gate.set()
    for future in futures:
        with pytest.raises(InvalidAdapter, match="broken"):
            future.result(SECONDS)
    until(lambda: ram.held == 0)
    assert "b" not in ram.resident()
    del source.errors["b"]
    assert got(ram.fetch(["b"]))
    assert source.loads["b"] == 2 and ("b", "failed") in source.outcomes


def test_a_version_larger_than_expected_waits_for_its_true_size(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(3)
    source.sizes["x"] = 16
    keep = got(ram.fetch(["a"])) + got(ram.fetch(["b"]))
    waiting = ram.fetch(["x"])
    until(lambda: bool(source.pressure))
    assert ram.used == 2 * SIZE
    keep = ()
    assert got(waiting)[0].nbytes == 2 * SIZE == ram.size("x")
    assert keep == () and ram.used <= 3 * SIZE
    source.sizes["y"] = 1000
    with pytest.raises(NoRoom):
        got(ram.fetch(["y"]))
    assert "y" not in ram.resident()


def test_versions_larger_together_than_the_budget_are_refused(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(5)
    with pytest.raises(NoRoom, match="the budget is"):
        ram.fetch(list("abcdef")).result(0)
    assert ram.used == 0
    source.sizes.update(dict.fromkeys("abc", 16))
    together = ram.fetch(["a", "b", "c"])
    with pytest.raises(NoRoom, match="the budget is"):
        got(together)
    until(lambda: ram.held == 0)
    assert got(ram.fetch(["d"]))


@pytest.mark.parametrize("when", ["waiting", "loading", "done"])
def test_a_cancelled_fetch_holds_nothing(make_ram: MakeRam, source: Source, when: str) -> None:
    ram, gate = make_ram(2), source.hold("b")
    views = got(ram.fetch(["x", "y"])) if when == "waiting" else ()
    future = ram.fetch(["a", "b"])
    if when == "done":
        gate.set()
        got(future)
        future.result()
        del future
    else:
        until(lambda: when == "waiting" or bool(source.loads["b"]))
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result()
    del views
    until(lambda: ram.held == 0)
    gate.set()
    assert [w.digest for w in got(ram.fetch(["b", "c"]))] == ["b", "c"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_callback_may_cancel_another_fetch(
    make_ram: MakeRam, source: Source, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ram, gate = make_ram(2), source.hold("a")
    if fails:
        source.errors["a"] = InvalidAdapter("bad")
    first, second = ram.fetch(["a"]), ram.fetch(["a"])
    first.add_done_callback(lambda _: second.cancel())
    gate.set()
    until(lambda: source.outcomes == [("a", "failed" if fails else "ok")])
    assert second.cancelled() and first.done()
    assert caplog.messages == (["an adapter cannot be loaded: bad"] if fails else [])
    del first
    until(lambda: ram.held == 0)


def test_discard_frees_now_or_with_the_last_view(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(4)
    got(ram.fetch(["a"]))
    ram.discard("a")
    until(lambda: ram.used == 0)
    view = got(ram.fetch(["a"]))
    ram.discard("a")
    assert ram.used == SIZE
    del view
    until(lambda: ram.used == 0)
    assert not source.evicted and ram.loaded_at("a") is None
    view = got(ram.fetch(["a"]))
    tensor = weakref.ref(view[0].modules["m"].A)
    ram.discard("a")
    del view
    until(lambda: tensor() is None)
    view = got(ram.fetch(["a"]))
    ram.discard("a")
    view = got(ram.fetch(["a"]))
    del view
    assert ram.used == SIZE
    ram.discard("never there")


def test_offer_takes_only_free_room(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(2)
    assert ram.offer(weights_of("a")) and ram.offer(weights_of("a")) and ram.offer(weights_of("b"))
    assert not ram.offer(weights_of("c"))
    got(ram.fetch(["a"]))
    assert not source.loads


async def test_wait_loaded_times_out(make_ram: MakeRam) -> None:
    ram = make_ram(1)
    (view,) = await wait_loaded(ram.fetch(["a"]))
    waiting = ram.fetch(["b"])
    with pytest.raises(NoRoom, match="not loaded within"):
        await wait_loaded(waiting, seconds=0.05)
    assert waiting.cancelled()
    del view
    assert (await wait_loaded(ram.fetch(["b"])))[0].digest == "b"


def test_close_cancels_waiting_fetches(make_ram: MakeRam) -> None:
    ram = make_ram(1)
    views = got(ram.fetch(["a"]))
    waiting = ram.fetch(["b"])
    ram.close()
    assert waiting.cancelled() and ram.fetch(["a"]).cancelled()
    assert views[0].modules["m"].A[0, 0] == ord("a")


def test_a_callback_may_fetch_again(make_ram: MakeRam) -> None:
    ram, second = make_ram(2), []
    done = threading.Event()

    def again(future: Fetched) -> None:
        second.append(ram.fetch(["b"]))
        done.set()

    ram.fetch(["a"]).add_done_callback(again)
    assert done.wait(10)
    assert got(second[0])[0].digest == "b"


def test_views_may_die_in_a_garbage_collection_under_the_lock(make_ram: MakeRam) -> None:
    ram = make_ram(4)
    old = gc.get_threshold()
    gc.freeze()  # collect only new objects
    gc.set_threshold(1, 1, 1)
    try:
        for i in range(300):
            cycle: list[object] = [got(ram.fetch(["ab"[i % 2], "c"]))]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*old)
        gc.collect()
        gc.unfreeze()
    until(lambda: ram.held == 0)
    assert ram.used <= 4 * SIZE


def test_many_threads_stay_within_the_budget(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(4)
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(60):
                pick = torch.randperm(8, generator=generator)[: 1 + seed % 3].tolist()
                digests = ["abcdefgh"[i] for i in pick]
                future = ram.fetch(digests)
                if torch.rand(1, generator=generator) < 0.2:
                    future.cancel()
                    continue
                views = got(future)
                assert [v.digest for v in views] == digests
                assert all(bool((v.modules["m"].A == ord(v.digest)).all()) for v in views)
                assert ram.used <= ram.capacity
                del views, future
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
    assert not failures and not any(thread.is_alive() for thread in threads)
    until(lambda: ram.held == 0)


def test_close_cancels_loads_that_have_not_started(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(4)
    source.gates = {digest: threading.Event() for digest in "ab"}
    futures = [ram.fetch([digest]) for digest in "abc"]
    until(lambda: source.loads["a"] and source.loads["b"])
    closing = threading.Thread(target=ram.close)
    closing.start()
    try:
        until(lambda: all(future.cancelled() for future in futures))
    finally:
        for gate in source.gates.values():
            gate.set()
        closing.join(SECONDS)
    assert source.loads["c"] == 0


def test_a_panic_of_a_library_is_a_failed_load(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(1)
    source.errors["a"] = KeyboardInterrupt("called `Option::unwrap()` on a `None` value")
    with pytest.raises(RuntimeError, match="unwrap"):
        ram.fetch(["a"]).result(SECONDS)
    assert ram.used == 0
    del source.errors["a"]
    assert ram.fetch(["a"]).result(SECONDS)[0].digest == "a" and source.outcomes == [("a", "failed"), ("a", "ok")]


def test_the_true_size_is_kept_until_the_version_is_discarded(make_ram: MakeRam) -> None:
    ram = make_ram(2)
    assert not ram.offer(weights_of("a", 64))
    assert ram.size("a") == 8 * SIZE
    ram.discard("a")
    assert ram.size("a") == SIZE


def test_a_version_larger_than_expected_keeps_its_place_in_the_queue(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(2)
    keep = ram.fetch(["a"])
    keep.result(SECONDS)
    source.gates["x"], source.sizes["x"] = threading.Event(), 16
    large, behind = ram.fetch(["x"]), ram.fetch(["e"])
    source.gates["x"].set()
    until(lambda: ram.size("x") == 2 * SIZE)
    assert ram.used == SIZE
    del keep
    assert large.result(SECONDS)[0].digest == "x"
    del large
    assert behind.result(SECONDS)


def test_a_failing_callback_does_not_block_other_fetches(
    make_ram: MakeRam, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(list[int]):
        def append(self, _: int) -> None:
            raise ZeroDivisionError

    source.pressure = Broken()
    ram = make_ram(1)
    keep = ram.fetch(["a"])
    keep.result(SECONDS)
    waits = ram.fetch(["b"])
    until(lambda: caplog.text.count("ZeroDivisionError") > 2)
    del keep
    assert waits.result(SECONDS)[0].digest == "b"


def test_kept_versions_are_not_evicted(make_ram: MakeRam, source: Source) -> None:
    ram = make_ram(2)
    ram.keep(["a", "z"])
    got(ram.fetch(["a"]))
    for digest in "bcd":
        got(ram.fetch([digest]))
    assert source.evicted == ["b", "c"] and set(ram.resident()) == {"a", "d"}
    with pytest.raises(
        NoRoom, match=f"the mix takes {2 * SIZE} bytes in RAM; the budget is {2 * SIZE} .* take {2 * SIZE}"
    ):
        ram.check_room(["b", "c"])
    ram.check_room(["a", "z"])
    blocked = ram.fetch(["b", "c"])
    assert not blocked.done()
    ram.keep([])
    assert len(got(blocked)) == 2
