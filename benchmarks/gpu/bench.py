"""State of a GPU checklist run: the model under test, timing, and the recorded results."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from adapters.atomic_files import replace_file
from adapters.weights import LoraWeights
from benchmarks.gpu.base import Kind, RandomBase, random_adapters, random_base
from benchmarks.shapes import QWEN_7B
from server.engine.backends.cuda.runner import CudaRunner, gpu_memory
from server.engine.batch import Batch, SlotWeights
from server.kernels.cuda import Cuda
from server.kernels.lora import TARGET_MODULES
from server.model.config import ModelConfig, from_hf

BLOCK_SIZE = 16
START = time.monotonic()
LAST_START = 480.0
"""Seconds after which no section starts, so that the whole run takes less than ten minutes."""
DEADLINE = 580.0
"""Seconds after which the run is stopped."""
MARGIN = 20.0
"""Seconds before the deadline at which long sections end on their own."""
DRIVER = Path("/proc/driver/nvidia/version")
TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
"""The model of --check."""


class Bench:
    """One run.

    Attributes:
        check: run on a tiny model to test the scripts, without measurements.
        file: JSON file for the results.
        section: name of the current section.
        kinds: adapters on all linear layers, and on the attention projections only (as in S-LoRA).
        rows: batch size.
        context: tokens in the KV cache per sequence.
        bandwidth, peak: measured bytes and operations per second.
        folders: quantized base for the section `answers`.
        ready: whether there is a runner that no stuck engine uses.
    """

    def __init__(self, check: bool, file: Path | None) -> None:
        self.check, self.file = check, file
        self.section, self.is_last = "", False
        self.deadline = math.inf if check else START + DEADLINE - MARGIN
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = describe_machine(self.device)
        self.shape = TINY if check else QWEN_7B
        self.config: ModelConfig = from_hf(self.shape)
        self.backend = Cuda(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        attention = TARGET_MODULES[:4]
        self.kinds = (Kind(4), Kind(2, attention)) if check else (Kind(16), Kind(16, attention))
        self.rows, self.context = (2, 20) if check else (32, 256)
        self.blocks = 12 if check else 32 * 64
        self.bandwidth = self.peak = 1.0
        self.results: list[dict[str, Any]] = []
        self.folders: list[Path] = []
        self.runner: CudaRunner
        self.ready = False
        self.base_allocated = 0
        """Device bytes that loading the base took, according to torch."""
        self._adapters: dict[Kind, list[LoraWeights]] = {}

    def record(self, name: str, value: Any, target: Any = None, met: bool | None = None, **details: Any) -> None:
        """Print a result and write all results to the file, because a later section may end the process."""
        met = None if self.check else met
        row = {"name": name, "section": self.section, "value": value, "target": target, "met": met, **details}
        self.results.append(row)
        if self.file is not None:
            replace_file(self.file, json.dumps({**self.machine, "results": self.results}, indent=1).encode())
        print(f"  {name}: {value}" + ("" if target is None else f"   (target: {target})"), flush=True)

    @property
    def is_late(self) -> bool:
        """Whether no long work should start."""
        return not self.check and time.monotonic() > START + LAST_START

    def load_model(self) -> None:
        """Load the random base, compile the kernels and capture the graphs."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        before = self.allocated()
        base: RandomBase = random_base(self.config, self.backend, self.device)
        self.runner = CudaRunner(
            base, self.rows, memory=gpu_memory(None) if on_gpu else 1 << 31, device=self.device,
            adapters=(1 << 20) if self.check else 20 << 30,
            kv_cache=(1 << 20) if self.check else 8 << 30,
            context=64 if self.check else 4096,
        )  # fmt: skip
        base.weights.clear()  # the runner has its own copies
        if on_gpu:
            torch.cuda.empty_cache()
        others = self.runner._pool.nbytes + self.runner._results.nbytes
        self.base_allocated = self.allocated() - before - others
        self.runner.allocate(self.blocks, BLOCK_SIZE)
        self.ready = True

    def seconds(self, call: Callable[[], object], rounds: int = 30) -> float:
        """Median time of `call`, which may be asynchronous, after three warm-up calls."""
        for _ in range(1 if self.check else 3):
            call()
        times = []
        for _ in range(1 if self.check else rounds):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes that torch has allocated on the device."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def batch(self, sequences: int, mixes: tuple[SlotWeights, ...]) -> Batch:
        """A decode step of `sequences`, each with `context` tokens in the cache."""
        blocks = self.context // BLOCK_SIZE + 1
        rows = np.arange(sequences)
        return Batch(
            tokens=rows % self.config.vocab_size,
            positions=np.full(sequences, self.context),
            row_start=np.arange(sequences + 1, dtype=np.int32),
            context=np.full(sequences, self.context + 1, np.int32),
            blocks=(np.arange(sequences * blocks, dtype=np.int32) % self.blocks).reshape(sequences, blocks),
            logit_rows=rows,
            mixes=mixes,
        )

    def prompt(self, tokens: int, mix: SlotWeights = ()) -> Batch:
        """The prefill of one sequence."""
        ids = np.arange(tokens) % self.config.vocab_size
        blocks = np.arange(-(-tokens // BLOCK_SIZE), dtype=np.int32)[None]
        starts, context = np.array([0, tokens], np.int32), np.array([tokens], np.int32)
        return Batch(ids, np.arange(tokens), starts, context, blocks, np.array([tokens - 1]), (mix,))

    def step_seconds(self, sequences: int, mixes: tuple[SlotWeights, ...]) -> float:
        """Time of a single greedy decode step, from the batch on the host to the tokens on the host."""
        batch = self.batch(sequences, mixes)
        how, top_k = np.zeros((sequences, 4), np.float32), np.zeros(sequences, np.int32)
        return self.seconds(lambda: self.runner.draw(self.runner.run(batch), how, top_k).read())

    def running_seconds(
        self, sequences: int, mixes: tuple[SlotWeights, ...], before_each: Callable[[], object] = lambda: None
    ) -> float:
        """Time per step in a sequence of overlapped steps, as the engine runs them: the mean of 30, median of five.

        `before_each` is called before each step is launched.
        """
        batch = self.batch(sequences, mixes)
        batch.tokens[:] = -1 - np.arange(sequences)  # the tokens of the previous step
        how, top_k = np.zeros((sequences, 4), np.float32), np.zeros(sequences, np.int32)
        count = 2 if self.check else 30

        def steps() -> None:
            before_each()
            previous = self.runner.draw(self.runner.run(batch), how, top_k)
            for _ in range(count - 1):
                before_each()
                drawn = self.runner.draw(self.runner.run(batch), how, top_k)
                previous.read()
                previous = drawn
            previous.read()

        return self.seconds(steps, 5) / count

    def adapters(self, kind: Kind) -> list[LoraWeights]:
        """Random adapters, one per row. They are cached, because creating them is slow."""
        if kind not in self._adapters:
            self._adapters[kind] = random_adapters(self.config, self.backend, self.rows, kind)
        return self._adapters[kind]

    def mixed_step_seconds(self, seconds: Callable[[int, tuple[SlotWeights, ...]], float], kind: Kind) -> float:
        """Time of a step with a different adapter for each row."""
        for slot, weights in enumerate(self.adapters(kind)):
            self.runner.load_adapter(slot, weights)
        taken = seconds(self.rows, tuple(((slot, 1.0),) for slot in range(self.rows)))
        for slot in range(self.rows):
            self.runner.unload_adapter(slot)
        return taken

    def step_bytes(self, sequences: int, adapters: float, kind: Kind) -> int:
        """Bytes that a step must read: base without embedding table, distinct adapters, keys and values."""
        config = self.config
        table = config.vocab_size * config.hidden_size * (1 + 2 / 32)
        cache = sequences * self.context * self.runner.block_bytes(1)
        return int(self.runner.nbytes()["base"] - table + self.adapters(kind)[0].nbytes * adapters + cache)


def device_seconds(call: Callable[[], object], count: int = 1) -> float:
    """Mean time of `count` calls in a row by the GPU's clock."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / count


def describe_machine(device: torch.device) -> dict[str, str]:
    """GPU, driver and library versions."""
    found = {"card": "none (interpreted, no measurement)"}
    if device.type == "cuda":
        driver = DRIVER.read_text().partition("\n")[0] if DRIVER.exists() else "unknown"
        found = {"card": torch.cuda.get_device_name(), "driver": driver, "CUDA": str(torch.version.cuda)}
    return {**found, "torch": torch.__version__, "triton": triton.__version__}
