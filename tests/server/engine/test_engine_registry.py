"""The engine with a real adapter registry: RAM, slots and leases."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from adapters.errors import NoRoom, UnknownAdapter
from adapters.leases import Lease
from adapters.peft_format import save
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LowRank, with_digest
from server.engine.backends.torch.runner import TorchRunner
from server.engine.engine import Engine
from server.engine.request import Delivery, Request, Sampling
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from tests.waiting import until

COUNT = 6


class Server:
    """A registry with RAM for `room` adapters, and a running engine with 8 slots."""

    def __init__(self, root: Path, base: Base, runner: TorchRunner, room: int) -> None:
        self.root = root
        self.numbers = iter(range(10**9))
        folders = []
        for seed in range(COUNT):
            generator = torch.Generator().manual_seed(seed)
            modules = {
                path: LowRank(
                    torch.randn(4, into, generator=generator) * 0.2, torch.randn(out, 4, generator=generator) * 0.2, 2.0
                )
                for path, (out, into) in base.config.linear_shapes().items()
                if path.endswith("q_proj")
            }
            weights = with_digest(f"a{seed}", modules)
            save(weights, root / f"a{seed}")
            folders.append(root / f"a{seed}")
        self.size = base.prepare(weights).nbytes
        self.registry = Registry(
            AdapterStore(root / "store"),
            shapes=base.config.linear_shapes(),
            prepare=base.prepare,
            ram_bytes=room * self.size,
        )
        self.engine = Engine(
            runner,
            fetch=self.registry.fetch,
            tokenizer=ModelTokenizer(base.vocabulary),
            eos_ids=frozenset(),
            vocab_size=base.config.vocab_size,
            context_length=256,
            base_id=base.id,
            blocks=64,
            max_batch=8,
            max_slots=8,
            age_limit=0.3,
        )
        self.registry.slots = self.engine
        for folder in folders:
            self.registry.publish_now(folder.name, folder)
        self.engine.start()

    def submit(
        self, names: list[str], tokens: int = 8, seconds: float = 30.0, priority: int = 0
    ) -> tuple[Lease, Callable[[], Delivery]]:
        """Submit a request. Returns its lease, and a function that waits for its end."""
        lease = self.registry.lease([(name, 1.0) for name in names])
        done = threading.Event()
        last: list[Delivery] = []

        def deliver(delivery: Delivery) -> None:
            if delivery.finish_reason is not None:
                last.append(delivery)
                lease.release()
                done.set()

        number = self.last = next(self.numbers)
        self.engine.submit(
            Request(
                id=str(number),
                prompt=(5, 6, 7 + number % 50),
                sampling=Sampling(max_tokens=tokens, ignore_eos=True),
                deliver=deliver,
                mix=lease.mix,
                check_fits=lambda: self.registry.check_room(lease.mix),
                deadline=time.monotonic() + seconds,
                fair_key="+".join(names),
                priority=priority,
            )
        )

        def wait() -> Delivery:
            assert done.wait(seconds + 10), "a request did not end"
            return last[0]

        return lease, wait

    def close(self) -> None:
        self.engine.stop(0)
        self.registry.close()


@pytest.fixture
def open_server(tmp_path: Path, tiny_base: Base, tiny_runner: TorchRunner) -> Iterator[Callable[[int], Server]]:
    servers: list[Server] = []

    def make(room: int) -> Server:
        servers.append(Server(tmp_path, tiny_base, tiny_runner, room))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def test_mixes_that_compete_for_ram_all_finish(open_server: Callable[[int], Server]) -> None:
    server, dice = open_server(3), random.Random(3)
    waits = [server.submit(dice.sample([f"a{i}" for i in range(COUNT)], dice.randint(1, 3)))[1] for _ in range(60)]
    assert [wait().finish_reason for wait in waits] == ["length"] * 60
    memory = server.registry.memory()
    assert memory["leases"] == 0 and memory["bytes"] <= 3 * server.size


def test_retired_adapters_leave_slots_and_ram(open_server: Callable[[int], Server]) -> None:
    server = open_server(COUNT)
    waits = [server.submit([f"a{i}"])[1] for i in range(COUNT)]
    assert all(wait().finish_reason == "length" for wait in waits)
    assert {entry["tier"] for entry in server.registry.list()} == {"device"}
    lease, wait = server.submit(["a0", "a1"], tokens=60)
    for i in range(COUNT):
        server.registry.retire_now(f"a{i}")
    assert wait().finish_reason == "length"
    until(lambda: server.registry.memory()["bytes"] == 0)
    assert server.engine.stats()["slots"]["resident"] == []
    until(lambda: not list((server.registry._store.root / "versions").iterdir()))


def test_steady_traffic_does_not_starve_a_cold_adapter(open_server: Callable[[int], Server]) -> None:
    server = open_server(2)
    stop = threading.Event()

    def keep_busy(name: str) -> None:
        waits: list[Callable[[], Delivery]] = []
        dice = random.Random(name)
        while not stop.is_set():
            waits.append(server.submit([name], tokens=dice.randint(10, 60))[1])
            if len(waits) >= 5:
                waits.pop(0)()
        for wait in waits:
            wait()

    threads = [threading.Thread(target=keep_busy, args=(name,)) for name in ("a0", "a1")]
    for thread in threads:
        thread.start()
    until(lambda: set(server.engine.stats()["slots"]["resident"]) >= set(server.registry._ram.resident()))
    began = time.monotonic()
    last = server.submit(["a2"], seconds=10)[1]()
    waited = time.monotonic() - began
    stop.set()
    for thread in threads:
        thread.join()
    assert last.finish_reason == "length", last.error
    assert waited < 5


def test_a_mix_that_no_longer_fits_beside_a_pinned_adapter_ends_alone(
    open_server: Callable[[int], Server],
) -> None:
    """RAM fits two adapters. One is pinned after a mix of two others was leased."""
    server = open_server(2)
    busy = server.submit(["a0"], tokens=200)[1]
    until(lambda: server.engine.stats()["running"] == 1)
    mix = server.submit(["a1", "a2"], seconds=30)[1]
    until(lambda: server.engine.stats()["loading"] == 1)
    asyncio.run(server.registry.pin("a0"))
    began = time.monotonic()
    last = mix()
    assert isinstance(last.error, NoRoom) and "pinned" in str(last.error)
    assert server.submit(["a0"])[1]().finish_reason == "length"
    assert server.submit(["a3"])[1]().finish_reason == "length"
    assert time.monotonic() - began < 15 and busy().finish_reason == "length"


def test_a_load_of_an_evaluation_releases_its_ram_for_a_client(open_server: Callable[[int], Server]) -> None:
    server = open_server(2)
    low = server.submit(["a0", "a1"], priority=1)[1]
    high = [server.submit([f"a{i}"], seconds=20)[1] for i in (2, 3, 4, 5)]
    assert [wait().finish_reason for wait in (*high, low)] == ["length"] * 5


def test_nothing_stays_reserved_after_mixed_traffic(open_server: Callable[[int], Server]) -> None:
    """RAM fits 4 of 6 adapters. Mixes have up to 4, and some requests are cancelled."""
    server, stop = open_server(4), threading.Event()
    names = [f"a{i}" for i in range(COUNT)]
    folders = [server.root / name for name in names]
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        dice = random.Random(seed)
        try:
            while not stop.is_set():
                choice = dice.sample(names, dice.randint(0, 4))
                try:
                    lease, wait = server.submit(choice, tokens=dice.randint(1, 12))
                except UnknownAdapter:
                    continue
                if dice.random() < 0.2:
                    time.sleep(dice.random() * 0.01)
                    server.engine.cancel(str(server.last))
                last = wait()
                assert last.finish_reason in ("length", "cancelled"), last.error
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    dice, end = random.Random(99), time.monotonic() + 4
    while time.monotonic() < end:
        name = dice.choice(names)
        if dice.random() < 0.2:
            with suppress(UnknownAdapter):
                server.registry.retire_now(name)
        server.registry.publish_now(name, dice.choice(folders))
        if dice.random() < 0.3:
            old = dice.choice(server.registry.describe(name)["versions"])["version"]
            asyncio.run(server.registry.roll_back(name, old))
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert server.registry.memory()["leases"] == 0
    for name in names:
        with suppress(UnknownAdapter):
            server.registry.retire_now(name)
    until(lambda: server.registry.memory()["bytes"] == 0)
    stats = server.engine.stats()
    assert stats["running"] == stats["waiting"] == 0 and stats["slots"]["resident"] == []
    assert stats["kv_blocks"]["used"] == 0
