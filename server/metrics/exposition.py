"""`Metrics`: everything that /metrics shows. Requests and adapter loads are recorded, the rest is read at a scrape."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from adapters.protocols import Observer
from adapters.weights import Version
from server.metrics.requests import TTFT_BUCKETS, Histogram, RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_JOBS = 20
"""Training series exist for this many recent jobs."""
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


@dataclass(frozen=True)
class Snapshot:
    """The values that are read at a scrape. Sizes are bytes."""

    ready: bool = False
    base: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # adapter -> name@digest
    adapter_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (adapter, tier) -> bytes
    rejected: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)  # kind -> bytes
    kv_blocks: Mapping[str, int] = field(default_factory=dict)  # free, used, cached
    block_size: int = 0
    running: int = 0
    waiting: int = 0
    step_buckets: Sequence[float] = ()  # upper bounds of rows per step
    step_counts: Sequence[int] = ()  # steps by bucket, the last one over all bounds
    step_rows: int = 0  # rows of all steps
    max_slots: int = 0
    resident: Iterable[str] = ()
    loading: Iterable[str] = ()
    slot_evictions: int = 0
    quality: Iterable[tuple[str, str, str, str, str, float]] = ()  # task, adapter, version, metric, source, value
    training: Iterable[tuple[str, float, int, float]] = ()  # job, loss, tokens, progress from 0 to 1


class Metrics(RequestMetrics, Observer):
    """All series of the server. Thread-safe. It observes the adapter registry."""

    def __init__(self, snapshot: Callable[[], Snapshot] = Snapshot) -> None:
        super().__init__()
        self.snapshot = snapshot
        self._loads: dict[tuple[str, str], int] = {}
        self._load_seconds = Histogram(TTFT_BUCKETS)
        self._ram_evictions = 0
        self._adapters_lock = threading.Lock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def on_load(self, name: str, outcome: str, seconds: float) -> None:
        """An adapter was loaded into RAM ("ok"), or could not be ("failed")."""
        with self._adapters_lock:
            self._loads[name, outcome] = self._loads.get((name, outcome), 0) + 1
            if outcome == "ok":
                self._load_seconds.observe(seconds)

    def on_evict(self) -> None:
        """An adapter was evicted from RAM."""
        with self._adapters_lock:
            self._ram_evictions += 1

    def on_change(self, name: str, version: Version | None) -> None:
        """An adapter has a new version, or None: it was removed, and so are its series."""
        if version is None:
            self.forget_adapter(name)
            return
        with self._adapters_lock:  # start at 0: a series that starts with the first failure has no rate
            for outcome in ("ok", "failed"):
                self._loads.setdefault((name, outcome), 0)

    def forget_adapter(self, name: str) -> None:
        """Remove all series of an adapter."""
        super().forget_adapter(name)
        with self._adapters_lock:
            self._loads = {key: count for key, count in self._loads.items() if key[0] != name}

    def render(self) -> bytes:
        """The body of /metrics, in text format 0.0.4."""
        return self.render_requests().encode() + generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The series that are read at a scrape, for `prometheus_client`."""
        now = self.snapshot()
        with self._adapters_lock:
            loads = list(self._loads.items())
            load_seconds = Histogram(TTFT_BUCKETS)
            load_seconds.add(self._load_seconds)
            evictions = {"ram": self._ram_evictions, "device": now.slot_evictions}
        yield _gauge("loramux_ready", "Whether requests are accepted, 1 or 0.", (), [((), int(now.ready))])
        yield _gauge(
            "loramux_adapter_info",
            "Current version of each adapter.",
            ("adapter", "version"),
            [((name, version), 1) for name, version in now.versions.items()],
        )
        yield _gauge(
            "loramux_task_quality",
            "Mean quality of a version on a task, by metric and source of the scores.",
            ("task", "adapter", "version", "metric", "source"),
            [(q[:5], q[5]) for q in now.quality],
        )
        yield _gauge(
            "loramux_adapter_bytes",
            "Size of an adapter in memory, by its present tier.",
            ("adapter", "tier"),
            now.adapter_bytes.items(),
        )
        rejected = "Adapters that are not served because of an error; GET /adapters shows the reason."
        yield _gauge("loramux_adapters_rejected", rejected, (), [((), now.rejected)])
        yield _counter("loramux_adapter_loads", "Adapter loads into RAM.", ("adapter", "outcome"), loads)
        yield _histogram("loramux_adapter_load_seconds", "Seconds to load an adapter into RAM.", load_seconds)
        by_tier = "Adapters evicted to make room, by tier."
        yield _counter("loramux_adapter_evictions", by_tier, ("tier",), [((t,), n) for t, n in evictions.items()])
        yield _gauge("loramux_memory_bytes", "Memory by use.", ("kind",), [((k,), n) for k, n in now.memory.items()])
        yield _gauge("loramux_kv_blocks", "KV cache blocks.", ("state",), [((s,), n) for s, n in now.kv_blocks.items()])
        steps = Histogram(tuple(map(float, now.step_buckets or BATCH_BUCKETS)))
        if now.step_counts:
            steps.counts, steps.total = list(now.step_counts), float(now.step_rows)
        yield _histogram("loramux_batch_size", "Rows (tokens) per step, including prompt tokens.", steps)
        yield from _training_families(list(now.training)[-MAX_JOBS:])
        yield from _gateway_families(now)


def _training_families(jobs: Sequence[tuple[str, float, int, float]]) -> Iterator[Metric]:
    yield _gauge("loramux_training_loss", "Last training loss of a job.", ("job",), [((j[0],), j[1]) for j in jobs])
    yield _counter("loramux_training_tokens", "Tokens trained on by a job.", ("job",), [((j[0],), j[2]) for j in jobs])
    progress = "Completed share of a job's steps, 0 to 1."
    yield _gauge("loramux_training_progress", progress, ("job",), [((j[0],), j[3]) for j in jobs])


def _gateway_families(now: Snapshot) -> Iterator[Metric]:
    """The five series of the Kubernetes inference gateway (model server protocol, LoRA section).

    There is exactly one `lora_requests_info` series, whose value is the time. "Running" adapters are the resident ones.
    """
    total = sum(now.kv_blocks.values())
    usage = now.kv_blocks.get("used", 0) / total if total else 0.0
    model, names = (now.base,), ("model_name",)
    yield _gauge("vllm:num_requests_running", "Requests in the running batch.", names, [(model, now.running)])
    yield _gauge("vllm:num_requests_waiting", "Waiting requests.", names, [(model, now.waiting)])
    yield _gauge("vllm:kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.", names, [(model, usage)])
    config = (str(now.block_size), str(total))
    yield _gauge("vllm:cache_config_info", "KV cache layout.", ("block_size", "num_gpu_blocks"), [(config, 1)])
    lora = (str(now.max_slots), ",".join(sorted(set(now.resident))), ",".join(sorted(set(now.loading))))
    yield _gauge(
        "vllm:lora_requests_info",
        "Resident adapters, and adapters that requests wait for.",
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        [(lora, time.time())],
    )


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets, cumulative = [], 0
    for le, count in zip([*map(str, histogram.buckets), "+Inf"], histogram.counts, strict=True):
        cumulative += count
        buckets.append((le, float(cumulative)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)
