"""Script: loads and unloads adapters 2,000 times; prints remaining objects and memory samples as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from adapters.peft_format import read_folder
from adapters.protocols import NoSlots
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LoraWeights

WARM_UP, CYCLES, SAMPLE = 200, 2000, 20


class Device(NoSlots):
    """Slots that keep views until the cycle ends."""

    def __init__(self) -> None:
        self.kept: dict[str, LoraWeights] = {}

    def holds(self, digest: str) -> bool:
        return digest in self.kept

    def unload(self, digest: str) -> None:
        self.kept.pop(digest, None)


def cycle(registry: Registry, device: Device, folders: list[Path], n: int) -> None:
    """Lease, load and release one adapter or a mix; publish and retire now and then."""
    if n % 20 == 0:
        registry.publish_now("a", folders[n // 20 % 6])
        registry.publish_now("b", folders[(n // 20 + 1) % 6])
    with registry.lease([("a", 1.0), ("b", 0.5)][: 1 + n % 2]) as lease:
        for view in registry.fetch(lease.mix).result(10):
            device.kept[view.digest] = view
    device.kept.clear()
    for digest in lease.mix.digests:
        registry._ram.discard(digest)
    if n % 50 == 49:
        registry.retire_now("a")
        registry.publish_now("a", folders[n // 20 % 6])


def figures(registry: Registry) -> dict[str, int]:
    """Retire every name and count the objects that remain."""
    for name in ("a", "b"):
        registry.retire_now(name)
    ram = registry._ram
    until(lambda: ram.used == 0)
    with registry._lock:
        kept = len(registry._draining) + len(registry._load_errors) + len(registry._incompatible)
    kept += len(ram._sizes) + len(ram._weights) + len(ram._loading) + len(ram._discarded) + len(ram._loaded_at)
    kept += len(registry._store.records)
    gc.collect()
    return {
        "tensors": sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor),
        "descriptors": psutil.Process().num_fds(),
        "threads": psutil.Process().num_threads(),
        "leases": len(registry._leases),
        "ram": ram.used,
        "stored": len(list((registry._store.root / "versions").iterdir())),
        "kept": kept,
    }


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.001)


def main() -> None:
    given = json.loads(sys.argv[1])
    folders = [Path(folder) for folder in given["folders"]]
    shapes = {path: (out, into) for path, (out, into) in given["shapes"].items()}
    os.fsync = lambda fd: None
    size = read_folder(folders[0], name="a").nbytes
    registry = Registry(AdapterStore(Path(given["store"])), shapes=shapes, ram_bytes=2 * size)
    registry.slots = device = Device()
    for n in range(WARM_UP):
        cycle(registry, device, folders, n)
    before = figures(registry)
    memory = []
    for n in range(CYCLES):
        if n % SAMPLE == 0:
            memory.append(psutil.Process().memory_info().rss)
        cycle(registry, device, folders, n)
    after = figures(registry)
    registry.close()
    sys.stdout.write(json.dumps({"before": before, "after": after, "memory": memory}))


if __name__ == "__main__":
    main()
