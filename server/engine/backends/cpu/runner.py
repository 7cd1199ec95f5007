"""`NativeRunner`: runs steps with the C++ kernels.

Steps, sampling and changes of slots are jobs that a thread of the kernels runs in order. A thread that reads a result
computes together with it until the job is done.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from adapters.weights import LoraWeights
from server.engine.batch import Batch, Logits
from server.engine.sampler import DeviceSamples
from server.errors import BadModel
from server.kernels.cpu import bindings, packing
from server.kernels.cpu.adapter_layout import LORA_MODULE, AdapterLayout
from server.kernels.lora import TARGET_MODULES, SlotWeights, module_finder
from server.model.config import ModelConfig
from server.model.decoder import Source
from server.model.rope import angles_before, frequencies

VECTOR = 16
"""Tokens per vector of keys: block sizes are multiples of it."""

SAMPLING_BYTES = 4 * 4
"""Bytes per vocabulary entry that a thread needs for sampling: three floats and an id."""

PLANNING_NS = 3_000_000
"""Nanoseconds before the end of a step at which the engine plans the next one. Planning takes 0.4 ms, or up to 2 ms
beside a busy event loop. Requests that arrive later wait for one more step."""


class _Buffer:
    """Memory of one result, and the step that used it last."""

    __slots__ = ("last_step", "memory")

    def __init__(self, size: int) -> None:
        self.memory = np.empty(size, dtype=np.float32)
        self.last_step = 0


def _references(buffer: _Buffer) -> int:
    return sys.getrefcount(buffer.memory)


_UNREFERENCED = _references(_Buffer(1))


class _LogitsMemory:
    """Reuses memory of logits that are no longer referenced, because page faults cost a tenth of a step.

    Sizes are powers of two. Buffers that were not used for `RECENT` steps are freed.
    """

    MAX_BUFFERS = 4
    RECENT = 512
    MAX_BYTES = 2**26  # larger buffers, for scoring long texts, are not kept

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []  # ascending by size
        self._step = 0

    def take(self, rows: int, columns: int) -> npt.NDArray[np.float32]:
        """Uninitialized float32 [rows, columns] that no other live result shares."""
        self._step += 1
        size = rows * columns
        for buffer in self._buffers:
            if buffer.memory.size >= size and _references(buffer) == _UNREFERENCED:
                break
        else:
            buffer = _Buffer(1 << (size - 1).bit_length())
            self._keep(buffer)
        buffer.last_step = self._step
        self._buffers = [each for each in self._buffers if self._step - each.last_step < self.RECENT]
        return buffer.memory[:size].reshape(rows, columns)

    def _keep(self, buffer: _Buffer) -> None:
        if buffer.memory.nbytes <= self.MAX_BYTES:
            recent = sorted(self._buffers, key=lambda each: each.last_step)[1 - self.MAX_BUFFERS :]
            self._buffers = sorted([*recent, buffer], key=lambda each: each.memory.size)

    @property
    def nbytes(self) -> int:
        return sum(buffer.memory.nbytes for buffer in self._buffers)


class _Mixes(NamedTuple):
    """The mixes of a batch, flattened: sequence s has entries start[s] to start[s+1]."""

    start: ctypes.Array[ctypes.c_int32]
    slot: ctypes.Array[ctypes.c_int32]
    weight: ctypes.Array[ctypes.c_float]


@lru_cache(maxsize=8)
def _flatten(mixes: tuple[SlotWeights, ...]) -> _Mixes:
    """Cached, because successive steps mostly have the same mixes."""
    starts = [0, *accumulate(map(len, mixes))]
    entries = [*chain.from_iterable(mixes)]
    size = max(len(entries), 1)
    return _Mixes(
        (ctypes.c_int32 * len(starts))(*starts),
        (ctypes.c_int32 * size)(*(slot for slot, _ in entries)),
        (ctypes.c_float * size)(*(weight for _, weight in entries)),
    )


class _Job:
    """A submitted job and the objects that it needs until it is done."""

    __slots__ = ("_references", "_wait", "number", "outcome")

    def __init__(self, wait: Callable[[int], None], *references: object) -> None:
        self._wait = wait
        self._references = references
        self.number = 0
        self.outcome = ctypes.c_int32(bindings.DONE)

    def finish(self) -> None:
        """Wait for the job. Raises MemoryError if it had too little memory."""
        self._wait(self.number)
        outcome = self.outcome.value
        if outcome == bindings.NO_MEMORY:
            raise MemoryError("not enough memory for the work buffers of a step")
        assert outcome == bindings.DONE, bindings.FAULTS[outcome]


class _PendingSamples:
    """Sampled tokens of a job that may still run; see `DeviceSamples`."""

    def __init__(self, logits: Logits, job: _Job, tokens: npt.NDArray[np.int32]) -> None:
        self._logits, self._job, self._tokens = logits, job, tokens

    def read(self) -> npt.NDArray[np.int32]:
        self._logits.wait()  # if the step failed, the samples are meaningless
        self._job.finish()
        return self._tokens


class NativeRunner:
    """Runs one model with the C++ kernels. Not thread-safe: only the engine's thread calls it.

    Args:
        base: The base model, packed for the native kernels.
        max_slots: Number of adapter slots.
        threads: Number of threads that compute a step.

    Raises:
        ValueError: `threads` is not positive.
        BadModel: The model lacks a tensor.
        MemoryError: There is not enough memory.
    """

    def __init__(self, base: Source, max_slots: int, threads: int) -> None:
        # Torch's threads spin after each small operation and would take the processors from the kernels.
        torch.set_num_threads(1)
        self._base = base
        self._config = base.config
        self._library = bindings.library()
        self._pool = bindings.ThreadPool(threads, use_waiting_thread=True)
        self._threads = threads
        self._logits = _LogitsMemory()
        self._jobs: deque[_Job] = deque()  # those not known to be done, in order
        self._last_step = 0
        self._slots: list[LoraWeights | None] = [None] * max_slots
        linears = base.config.linear_shapes()
        self._find_modules = module_finder(linears)
        self._quantized = frozenset(base.weights[path].scheme != "none" for path in linears)
        self._vectors: list[torch.Tensor] = []  # float32 copies of norms and biases, kept alive for the model
        self._c_config = _c_config(base.config, max_slots)
        embed = packing.matrix(base.weights["model.embed_tokens"])
        head = embed if base.config.tie_word_embeddings else packing.matrix(base.weights["lm_head"])
        layers = (bindings.Layer * base.config.num_hidden_layers)(
            *(self._layer(i) for i in range(base.config.num_hidden_layers))
        )
        norm = self._vector("model.norm.weight")
        self._model: int = self._library.loramux_model_new(self._c_config, layers, embed, head, norm, self._pool.handle)
        if not self._model:
            raise MemoryError("the system has no memory, or no thread, for the kernels' model")
        self._cache = torch.empty(0, dtype=torch.bfloat16)
        self._angles = (torch.empty(0), torch.empty(0))
        self._block_size = 0

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.loramux_model_free(self._model)
            self._model = 0

    def allocate(self, blocks: int, block_size: int) -> None:
        """Allocate the KV cache. Raises ValueError unless the block size is a multiple of 16."""
        if block_size < 1 or block_size % VECTOR:
            raise ValueError(f"the native kernels need a block size that is a multiple of {VECTOR}, not {block_size}")
        self.wait()
        positions = self._positions(blocks * block_size)
        angles = angles_before(*frequencies(self._config), positions)
        values = blocks * self.block_bytes(block_size) // torch.bfloat16.itemsize
        # Free the old cache before allocating the new one.
        self._library.loramux_model_cache(self._model, None, 0, block_size, None, None, 0)
        self._cache = torch.empty(0, dtype=torch.bfloat16)
        # The system provides zeroed pages on the first write, so an unused cache takes no memory.
        self._cache = torch.from_numpy(np.zeros(values, np.int16)).view(torch.bfloat16)
        self._angles = angles
        self._block_size = block_size
        addresses = (t.data_ptr() for t in (self._cache, *self._angles))
        cache, cosine, sine = addresses
        self._library.loramux_model_cache(self._model, cache, blocks, block_size, cosine, sine, positions)

    def _positions(self, tokens: int) -> int:
        """Most positions of a sequence in a cache of so many tokens."""
        return min(tokens, self._config.context_length)

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Point a slot at a prepared adapter, without a copy.

        Raises:
            ValueError: The adapter does not fit this base or was not prepared for these kernels.
            IndexError: There is no such slot.
            MemoryError: There is not enough memory.
        """
        self._check_slot(slot)
        if not isinstance(weights.layout, AdapterLayout) or not weights.layout.formats <= self._quantized:
            raise ValueError(f"the adapter {weights.name!r} was not prepared for the native kernels")
        table = np.zeros(self._config.num_hidden_layers * len(TARGET_MODULES), LORA_MODULE)
        table[self._find_modules(weights.layout.shapes)] = weights.layout.modules
        self._set_slot(slot, ctypes.cast(table.ctypes.data, ctypes.POINTER(bindings.LoraModule)))
        self._slots[slot] = weights

    def unload_adapter(self, slot: int) -> None:
        self._check_slot(slot)
        self._set_slot(slot, None)
        self._slots[slot] = None

    def _set_slot(self, slot: int, modules: Any) -> None:
        """Submit the change. The job keeps the old adapter alive until no step reads it."""
        idle = not self._has_unfinished()
        job = _Job(self._finish, self._slots[slot])
        self._submit(job, self._library.loramux_model_set_slot(self._model, slot, modules, job.outcome))
        if idle:
            self.wait()

    def wait(self) -> None:
        """Wait for all submitted jobs, whatever their outcome."""
        if self._jobs:
            self._finish(self._jobs[-1].number)

    def wait_until_nearly_done(self) -> None:
        """Compute with the kernels' threads until the next step should be planned."""
        self._library.loramux_model_wait_until_nearly_done(self._model, self._last_step, PLANNING_NS)

    def run(self, batch: Batch) -> Logits:
        """Submit a step. A token -1 - r stands for the token of row r of the step before, greedy or sampled.

        Reading the logits raises MemoryError if the step had too little memory.
        """
        logits = self._logits.take(len(batch.logit_rows), self._config.vocab_size)
        argmax = np.empty(len(logits), np.int64)
        if batch.rows == 0:
            return Logits(logits, argmax)
        arrays = _arrays(batch)
        mixes = _flatten(batch.mixes)
        step = bindings.Step(
            rows=batch.rows,
            sequences=batch.sequences,
            table_width=batch.blocks.shape[1],
            logit_count=len(logits),
            mix_start=ctypes.addressof(mixes.start),
            mix_slot=ctypes.addressof(mixes.slot),
            mix_weight=ctypes.addressof(mixes.weight),
            logits=logits.ctypes.data,
            argmax=argmax.ctypes.data,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        job = _Job(self._finish, logits, argmax, arrays, mixes)
        self._submit(job, self._library.loramux_model_step(self._model, step, job.outcome))
        self._last_step = job.number
        return Logits(logits, argmax, job.finish)

    def draw(self, logits: Logits, how: np.ndarray, top_k: np.ndarray) -> DeviceSamples:
        """Submit sampling of a token per row of the last step's logits; see `DeviceSampler`.

        Reading the samples raises MemoryError if there was too little memory.
        """
        rows = logits.unread
        tokens = np.empty(len(rows), np.int32)
        job = _Job(self._finish, rows, how, top_k, tokens)
        addresses = how.ctypes.data, top_k.ctypes.data, tokens.ctypes.data
        number = self._library.loramux_model_sample(self._model, rows.data_ptr(), len(rows), *addresses, job.outcome)
        self._submit(job, number)
        return _PendingSamples(logits, job, tokens)

    def _submit(self, job: _Job, number: int) -> None:
        """Track a submitted job. Raises MemoryError if it was not accepted."""
        if not number:
            raise MemoryError("not enough memory to submit a job to the kernels")
        job.number = number
        self._jobs.append(job)

    def _finish(self, number: int) -> None:
        """Compute with the kernels' threads until a job is done."""
        self._library.loramux_model_wait(self._model, number)
        self._has_unfinished()

    def _has_unfinished(self) -> bool:
        """Whether a job is not done. Releases what finished jobs referenced."""
        done = self._library.loramux_model_done(self._model)
        while self._jobs and self._jobs[0].number <= done:
            self._jobs.popleft()
        return bool(self._jobs)

    def block_bytes(self, block_size: int) -> int:
        return int(self._library.loramux_block_bytes(self._c_config, block_size))

    def work_bytes(self, tokens: int) -> int:
        """Rotary tables, and each thread's scratch memory for attention and sampling.

        Attention counts twice with several threads, since each also has a single-threaded runner.
        """
        config, positions, threads = self._config, self._positions(tokens), self._threads
        attention = int(self._library.loramux_attention_bytes()) * positions * (2 * threads if threads > 1 else 1)
        return 4 * config.head_dim * positions + attention + SAMPLING_BYTES * config.vocab_size * threads

    def nbytes(self) -> dict[str, int]:
        base = sum(weight.nbytes for weight in self._base.weights.values())
        base += sum(tensor.nbytes for tensor in self._base.tensors.values())
        work = self._library.loramux_model_bytes(self._model) + self._logits.nbytes
        work += sum(tensor.nbytes for tensor in self._angles)
        used_blocks = self._library.loramux_model_used_blocks(self._model)
        return {"base": base, "kv_cache": used_blocks * self.block_bytes(self._block_size), "activations": int(work)}

    def take_times(self) -> dict[str, float]:
        """Seconds per phase since the last call, for benchmarks."""
        times = (ctypes.c_int64 * len(bindings.PHASES))()
        self._library.loramux_model_times(self._model, times)
        return {name: t * 1e-9 for name, t in zip(bindings.PHASES, times, strict=True)}

    def _layer(self, index: int) -> bindings.Layer:
        path = f"model.layers.{index}"
        layer = bindings.Layer(rope=int(self._config.has_rope(index)))
        for i, name in enumerate(TARGET_MODULES):
            module = f"{path}.{'self_attn' if name in TARGET_MODULES[:4] else 'mlp'}.{name}"
            layer.module[i] = packing.matrix(self._base.weights[module])
            if f"{module}.bias" in self._base.tensors:
                layer.module[i].bias = self._vector(f"{module}.bias")
        layer.input_norm = self._vector(f"{path}.input_layernorm.weight")
        layer.post_norm = self._vector(f"{path}.post_attention_layernorm.weight")
        if self._config.qk_norm:
            layer.q_norm = self._vector(f"{path}.self_attn.q_norm.weight")
            layer.k_norm = self._vector(f"{path}.self_attn.k_norm.weight")
        return layer

    def _vector(self, name: str) -> int:
        """Address of a float32 copy of a small tensor."""
        if name not in self._base.tensors:
            raise BadModel(f"the model lacks {name}")
        tensor = self._base.tensors[name].float().contiguous()
        self._vectors.append(tensor)
        return tensor.data_ptr()

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"there are {len(self._slots)} slots and no slot {slot}")


def _arrays(batch: Batch) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a step, contiguous and in the dtypes of kernels.h."""
    wide, narrow = ("tokens", "positions", "logit_rows"), ("row_start", "context", "blocks")
    arrays: dict[str, npt.NDArray[Any]] = {n: np.ascontiguousarray(getattr(batch, n), np.int64) for n in wide}
    return arrays | {n: np.ascontiguousarray(getattr(batch, n), np.int32) for n in narrow}


def _c_config(config: ModelConfig, max_slots: int) -> bindings.Config:
    return bindings.Config(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        max_slots=max_slots,
        eps=config.rms_norm_eps,
    )
