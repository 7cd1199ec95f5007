"""`NativeRunner`: the second implementation behind `runner.run`. One C call a step; the Python decoder is its oracle.

Steps, draws and changes of slots are jobs for a thread of the kernels' own, which does them in the order in which they
are given. Whoever reads what came of one computes with that thread until it is there.

Owns the memory that the C++ model points into: the KV cache, the angles, the slots' adapters, a step's arrays, as long
as a job may read it. Does not know how anything is computed (kernels/cpu), nor requests or scheduling.
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
from server.kernels.cpu.adapter_layout import SITE, AdapterLayout
from server.kernels.lora import TARGET_MODULES, SlotWeights, site_finder
from server.model.config import ModelConfig
from server.model.decoder import Source
from server.model.rope import angles_before, frequencies

VECTOR = 16
"""Tokens of a block that the kernels read together: block sizes are multiples of it."""

DRAWING = 4 * 4
"""Bytes that a thread draws with for each token of the vocabulary: three floats and an id."""

PLANNED_AHEAD = 3_000_000
"""Nanoseconds before the end of a step from which the next is planned; what arrives after that waits for one step more.
All that Python does between two steps of sixteen takes 0.4 ms, and up to 2 beside a busy event loop."""


class _Arena:
    """Memory of one result at a time, and the step that last took it."""

    __slots__ = ("memory", "used")

    def __init__(self, size: int) -> None:
        self.memory = np.empty(size, dtype=np.float32)
        self.used = 0


def _references(arena: _Arena) -> int:
    """What the interpreter counts, some of it for the question: results are what is above `_NOBODY`."""
    return sys.getrefcount(arena.memory)


_NOBODY = _references(_Arena(1))


class _Results:
    """Memory for steps' logits that is used again once nobody holds them: fresh pages cost a tenth of a step.

    Sizes are powers of two. The smallest piece that will do is taken, and one that nobody has needed for a while is
    given back: what a rare step with many rows has touched would stay for good.
    """

    KEPT = 4
    RECENT = 512  # steps
    LARGEST = 2**26  # bytes; what a long scoring step needs is given back at once

    def __init__(self) -> None:
        self._arenas: list[_Arena] = []  # the smallest first
        self._step = 0

    def take(self, rows: int, columns: int) -> npt.NDArray[np.float32]:
        """float32 [rows, columns], not initialised, that no other living result shares."""
        self._step += 1
        size = rows * columns
        for arena in self._arenas:
            if arena.memory.size >= size and _references(arena) == _NOBODY:
                break
        else:
            arena = _Arena(1 << (size - 1).bit_length())
            self._keep(arena)
        arena.used = self._step
        self._arenas = [each for each in self._arenas if self._step - each.used < self.RECENT]
        return arena.memory[:size].reshape(rows, columns)

    def _keep(self, arena: _Arena) -> None:
        if arena.memory.nbytes > self.LARGEST:
            return
        recent = sorted(self._arenas, key=lambda each: each.used)[1 - self.KEPT :]
        self._arenas = sorted([*recent, arena], key=lambda each: each.memory.size)

    @property
    def nbytes(self) -> int:
        return sum(arena.memory.nbytes for arena in self._arenas)  # others ask while a step takes one


class _Mixes(NamedTuple):
    """The mixes of a step's sequences as the kernels read them: sequence s has entries start[s] to start[s+1]."""

    start: ctypes.Array[ctypes.c_int32]
    slot: ctypes.Array[ctypes.c_int32]
    weight: ctypes.Array[ctypes.c_float]


@lru_cache(maxsize=8)
def _flat(mixes: tuple[SlotWeights, ...]) -> _Mixes:
    """Steps that follow each other mostly have the same."""
    starts = [0, *accumulate(map(len, mixes))]
    entries = [*chain.from_iterable(mixes)]
    size = max(len(entries), 1)
    return _Mixes(
        (ctypes.c_int32 * len(starts))(*starts),
        (ctypes.c_int32 * size)(*(slot for slot, _ in entries)),
        (ctypes.c_float * size)(*(weight for _, weight in entries)),
    )


class _Job:
    """What was given to the kernels' thread, and what it needs until it is done."""

    __slots__ = ("_kept", "_wait", "number", "outcome")

    def __init__(self, wait: Callable[[int], None], *kept: object) -> None:
        self._wait = wait
        self._kept = kept
        self.number = 0
        self.outcome = ctypes.c_int32(bindings.DONE)

    def finish(self) -> None:
        """Wait until it is done. Raises MemoryError if it lacked some."""
        self._wait(self.number)
        outcome = self.outcome.value
        if outcome == bindings.NO_MEMORY:
            raise MemoryError("no memory for a step's work buffers")
        assert outcome == bindings.DONE, bindings.FAULTS[outcome]  # the engine's own invariants, checked there


class _LaterDrawn:
    """Tokens that are waited for when they are read; see `DeviceSamples`."""

    def __init__(self, logits: Logits, job: _Job, tokens: npt.NDArray[np.int32]) -> None:
        self._logits, self._job, self._tokens = logits, job, tokens

    def read(self) -> npt.NDArray[np.int32]:
        self._logits.wait()  # where the step has failed, what was drawn is of whatever lay there
        self._job.finish()
        return self._tokens


class NativeRunner:
    """One model on the C++ kernels. Not thread-safe: the engine's thread alone calls it."""

    def __init__(self, base: Source, max_slots: int, threads: int) -> None:
        """`threads` is the size of the kernels' own pool. Raises ValueError and BadModel.

        Torch's own pool, which is the process's, is set to one thread: its threads spin for a while after every small
        operation between steps, and a step would wait for the processors that they hold (6.6 ms became 10.0).
        """
        torch.set_num_threads(1)
        self._base = base
        self._config = base.config
        self._library = bindings.library()
        self._pool = bindings.Pool(threads, guest=True)
        self._threads = threads
        self._results = _Results()
        self._jobs: deque[_Job] = deque()
        """Those that are not known to be done, in order."""
        self._last_step = 0
        self._slots: list[LoraWeights | None] = [None] * max_slots
        linears = base.config.linear_shapes()
        self._find_sites = site_finder(linears)
        self._coded = frozenset(base.weights[path].scheme != "none" for path in linears)
        self._kept: list[torch.Tensor] = []  # float32 copies of norms and biases that the model points to
        self._shape = _config(base.config, max_slots)
        embed = packing.matrix(base.weights["model.embed_tokens"])
        head = embed if base.config.tie_word_embeddings else packing.matrix(base.weights["lm_head"])
        layers = (bindings.Layer * base.config.num_hidden_layers)(
            *(self._layer(i) for i in range(base.config.num_hidden_layers))
        )
        norm = self._vector("model.norm.weight")
        self._model: int = self._library.loramux_model_new(self._shape, layers, embed, head, norm, self._pool.handle)
        if not self._model:
            raise MemoryError("the system has no memory, or no thread, for the kernels' model")
        self._storage = torch.empty(0, dtype=torch.bfloat16)
        self._angles = (torch.empty(0), torch.empty(0))
        self._block_size = 0

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.loramux_model_free(self._model)
            self._model = 0

    def allocate(self, blocks: int, block_size: int) -> None:
        """Raises ValueError for a block size that is no multiple of 16."""
        if block_size < 1 or block_size % VECTOR:
            raise ValueError(f"the native kernels need a block size that is a multiple of {VECTOR}, not {block_size}")
        self.wait()
        positions = self._positions(blocks * block_size)
        angles = angles_before(*frequencies(self._config), positions)
        halves = blocks * self.block_bytes(block_size) // torch.bfloat16.itemsize
        # There may be no memory for another one: until there is, the model has none.
        self._library.loramux_model_cache(self._model, None, 0, block_size, None, None, 0)
        self._storage = torch.empty(0, dtype=torch.bfloat16)
        # Zeroed pages come from the system when they are first written, so an unused cache takes no memory.
        self._storage = torch.from_numpy(np.zeros(halves, np.int16)).view(torch.bfloat16)
        self._angles = angles
        self._block_size = block_size
        angle_addresses = (t.data_ptr() for t in self._angles)
        self._library.loramux_model_cache(
            self._model, self._storage.data_ptr(), blocks, block_size, *angle_addresses, positions
        )

    def _positions(self, tokens: int) -> int:
        """Those that a sequence may have in a cache of so many tokens."""
        return min(tokens, self._config.context_length)

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Point a slot at an adapter's own memory. Raises ValueError if it is not this base's or not prepared,
        IndexError if there is no such slot, and MemoryError."""
        self._check_slot(slot)
        if not isinstance(weights.layout, AdapterLayout) or not weights.layout.coded <= self._coded:
            raise ValueError(f"the adapter {weights.name!r} was not prepared for the native kernels")
        table = np.zeros(self._config.num_hidden_layers * len(TARGET_MODULES), SITE)
        table[self._find_sites(weights.layout.shapes)] = weights.layout.sites
        self._set_slot(slot, ctypes.cast(table.ctypes.data, ctypes.POINTER(bindings.LoraSite)))
        self._slots[slot] = weights

    def unload_adapter(self, slot: int) -> None:
        self._check_slot(slot)
        self._set_slot(slot, None)
        self._slots[slot] = None

    def _set_slot(self, slot: int, sites: Any) -> None:
        """The adapter that was there is kept until no step reads it any more."""
        nothing_runs = not self._unfinished()
        job = _Job(self._finish, self._slots[slot])
        self._give(job, self._library.loramux_model_slot(self._model, slot, sites, job.outcome))
        if nothing_runs:
            self.wait()

    def wait(self) -> None:
        """Wait for all that was given, whatever becomes of it."""
        if self._jobs:
            self._finish(self._jobs[-1].number)

    def wait_until_nearly_done(self) -> None:
        """Compute with the kernels' thread until it is time to plan what comes after the last step."""
        self._library.loramux_model_linger(self._model, self._last_step, PLANNED_AHEAD)

    def run(self, batch: Batch) -> Logits:
        """A token of the batch below 0 is that of row -1 - token of the step before: the largest of its logits, or what
        was drawn there. What fails, fails when it is read: MemoryError."""
        logits = self._results.take(len(batch.logit_rows), self._config.vocab_size)
        largest = np.empty(len(logits), np.int64)
        if batch.rows == 0:
            return Logits(logits, largest)
        arrays = _arrays(batch)
        mixes = _flat(batch.mixes)
        step = bindings.Step(
            rows=batch.rows,
            sequences=batch.sequences,
            table_width=batch.blocks.shape[1],
            logit_count=len(logits),
            mix_start=ctypes.addressof(mixes.start),
            mix_slot=ctypes.addressof(mixes.slot),
            mix_weight=ctypes.addressof(mixes.weight),
            logits=logits.ctypes.data,
            largest=largest.ctypes.data,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        job = _Job(self._finish, logits, largest, arrays, mixes)
        self._give(job, self._library.loramux_model_step(self._model, step, job.outcome))
        self._last_step = job.number
        return Logits(logits, largest, job.finish)

    def draw(self, logits: Logits, how: np.ndarray, top_k: np.ndarray) -> DeviceSamples:
        """A token of each row of the last step's logits, by the kernels' threads; see `Draw`. What fails, fails when it
        is read: MemoryError."""
        rows = logits.unread
        tokens = np.empty(len(rows), np.int32)
        job = _Job(self._finish, rows, how, top_k, tokens)
        addresses = how.ctypes.data, top_k.ctypes.data, tokens.ctypes.data
        number = self._library.loramux_model_draw(self._model, rows.data_ptr(), len(rows), *addresses, job.outcome)
        self._give(job, number)
        return _LaterDrawn(logits, job, tokens)

    def _give(self, job: _Job, number: int) -> None:
        """Keep what the job needs. Raises MemoryError if it was not taken."""
        if not number:
            raise MemoryError("no memory to give the kernels another job")
        job.number = number
        self._jobs.append(job)

    def _finish(self, number: int) -> None:
        """Compute with the kernels' thread until a job is done."""
        self._library.loramux_model_wait(self._model, number)
        self._unfinished()

    def _unfinished(self) -> bool:
        """Whether a job is not done; those that are need nothing any more."""
        done = self._library.loramux_model_done(self._model)
        while self._jobs and self._jobs[0].number <= done:
            self._jobs.popleft()
        return bool(self._jobs)

    def block_bytes(self, block_size: int) -> int:
        return int(self._library.loramux_block_bytes(self._shape, block_size))

    def work_bytes(self, tokens: int) -> int:
        """The angles of all positions, and what each thread attends with (twice, as it works with the others and alone)
        and draws with."""
        config, positions, threads = self._config, self._positions(tokens), self._threads
        attending = int(self._library.loramux_attending()) * positions * (2 * threads if threads > 1 else 1)
        return 4 * config.head_dim * positions + attending + DRAWING * config.vocab_size * threads

    def nbytes(self) -> dict[str, int]:
        base = sum(weight.nbytes for weight in self._base.weights.values())
        base += sum(tensor.nbytes for tensor in self._base.tensors.values())
        work = self._library.loramux_model_bytes(self._model) + self._results.nbytes
        work += sum(tensor.nbytes for tensor in self._angles)
        touched = self._library.loramux_model_touched(self._model)
        return {"base": base, "kv_cache": touched * self.block_bytes(self._block_size), "activations": int(work)}

    def take_times(self) -> dict[str, float]:
        """Seconds that each kind of phase has taken since the last call, for benchmarks."""
        times = (ctypes.c_int64 * len(bindings.PHASES))()
        self._library.loramux_model_times(self._model, times)
        return {name: t * 1e-9 for name, t in zip(bindings.PHASES, times, strict=True)}

    def _layer(self, index: int) -> bindings.Layer:
        path = f"model.layers.{index}"
        layer = bindings.Layer(rope=int(self._config.has_rope(index)))
        for i, name in enumerate(TARGET_MODULES):
            module = f"{path}.{_parent(name)}.{name}"
            bias = f"{module}.bias"
            layer.site[i] = packing.matrix(self._base.weights[module])
            if bias in self._base.tensors:
                layer.site[i].bias = self._vector(bias)
        layer.input_norm = self._vector(f"{path}.input_layernorm.weight")
        layer.post_norm = self._vector(f"{path}.post_attention_layernorm.weight")
        if self._config.qk_norm:
            layer.q_norm = self._vector(f"{path}.self_attn.q_norm.weight")
            layer.k_norm = self._vector(f"{path}.self_attn.k_norm.weight")
        return layer

    def _vector(self, name: str) -> int:
        """Address of a small tensor as float32, kept alive here."""
        if name not in self._base.tensors:
            raise BadModel(f"the model lacks {name}")
        tensor = self._base.tensors[name].float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"there are {len(self._slots)} slots and no slot {slot}")


def _arrays(batch: Batch) -> dict[str, npt.NDArray[Any]]:
    """The step's arrays in the dtypes of kernels.h, contiguous."""
    wide, narrow = ("tokens", "positions", "logit_rows"), ("row_start", "context", "blocks")
    arrays: dict[str, npt.NDArray[Any]] = {n: np.ascontiguousarray(getattr(batch, n), np.int64) for n in wide}
    return arrays | {n: np.ascontiguousarray(getattr(batch, n), np.int32) for n in narrow}


def _parent(name: str) -> str:
    return "self_attn" if name in TARGET_MODULES[:4] else "mlp"


def _config(config: ModelConfig, max_slots: int) -> bindings.Config:
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
