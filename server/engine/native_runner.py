"""`NativeRunner`: the second implementation behind `runner.run`. One C call a step; the Python decoder is its oracle.

Owns the memory that the C++ model points into: the KV cache, the angles, the slots' adapters, a step's arrays. Does
not know how anything is computed (kernels/cpu) nor requests, sampling or scheduling.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.engine.batch import Batch, Logits, SlotWeights
from server.engine.sampler import DrawnHere
from server.errors import BadModel
from server.kernels.cpu import bindings, packing
from server.kernels.cpu.bindings import SITES
from server.kernels.cpu.places import SITE, Places, Shapes
from server.model.config import ModelConfig
from server.model.decoder import Source
from server.model.rope import angles, frequencies

VECTOR = 16
"""Tokens of a block that the kernels read together: block sizes are multiples of it."""

KINDS = 256
"""Sets of modules of which it is remembered where they are in a slot's table."""


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

    def take(self, rows: int, columns: int) -> torch.Tensor:
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
        return torch.from_numpy(arena.memory)[:size].view(rows, columns)

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
        self._pool = bindings.Pool(threads)
        self._results = _Results()
        self._slots: list[LoraWeights | None] = [None] * max_slots
        self._sites = _site_places(base.config)
        self._known: dict[Shapes, np.ndarray] = {}
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
            raise MemoryError("no memory for the kernels' model")
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
        inverse, factor = frequencies(self._config)
        positions = torch.arange(min(blocks * block_size, self._config.max_position_embeddings))
        cosine, sine = angles(inverse, factor, positions)
        halves = blocks * self.block_bytes(block_size) // torch.bfloat16.itemsize
        self._storage = torch.empty(0, dtype=torch.bfloat16)
        # Zeroed pages come from the system when they are first written, so an unused cache takes no memory.
        self._storage = torch.from_numpy(np.zeros(halves, np.int16)).view(torch.bfloat16)
        self._angles = (cosine.float().contiguous(), sine.float().contiguous())
        self._block_size = block_size
        angle_addresses = (t.data_ptr() for t in self._angles)
        self._library.loramux_model_cache(
            self._model, self._storage.data_ptr(), blocks, block_size, *angle_addresses, len(positions)
        )

    def place(self, slot: int, weights: LoraWeights) -> None:
        """Point a slot at an adapter's own memory. Raises ValueError if it is not this base's or not prepared,
        IndexError if there is no such slot, and MemoryError."""
        self._check_slot(slot)
        if not isinstance(weights.places, Places):
            raise ValueError(f"the adapter {weights.name!r} was not prepared for the native kernels")
        table = np.zeros(self._config.num_hidden_layers * len(SITES), SITE)
        table[self._indexes(weights.places.shapes)] = weights.places.sites
        sites = ctypes.cast(table.ctypes.data, ctypes.POINTER(bindings.LoraSite))
        if not self._library.loramux_model_slot(self._model, slot, sites):
            raise MemoryError("no memory for an adapter's place")
        self._slots[slot] = weights

    def clear(self, slot: int) -> None:
        self._check_slot(slot)
        self._library.loramux_model_slot(self._model, slot, None)
        self._slots[slot] = None

    def run(self, batch: Batch) -> Logits:
        logits = self._results.take(batch.logit_rows.shape[0], self._config.vocab_size)
        largest = torch.empty(logits.shape[0], dtype=torch.int64)
        if batch.rows == 0:
            return Logits(logits, largest.numpy())
        arrays = _arrays(batch)
        mixes = _flat(batch.mixes)
        step = bindings.Step(
            rows=batch.rows,
            sequences=batch.sequences,
            table_width=batch.blocks.shape[1],
            logit_count=logits.shape[0],
            mix_start=ctypes.addressof(mixes.start),
            mix_slot=ctypes.addressof(mixes.slot),
            mix_weight=ctypes.addressof(mixes.weight),
            logits=logits.data_ptr(),
            largest=largest.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in arrays.items()},
        )
        outcome = self._library.loramux_model_step(self._model, step)
        if outcome == bindings.NO_MEMORY:
            raise MemoryError(f"no memory for a step of {batch.rows} rows")
        assert outcome == bindings.DONE, bindings.FAULTS[outcome]  # the engine's own invariants, checked there
        return Logits(logits, largest.numpy())

    def draw(self, logits: torch.Tensor, how: np.ndarray, top_k: np.ndarray) -> DrawnHere:
        """A token of each row of a step's logits, by the kernels' threads; see `Draw`. Raises MemoryError."""
        logits = logits.contiguous()
        tokens = np.empty(len(logits), np.int32)
        if not self._library.loramux_model_draw(
            self._model, logits.data_ptr(), len(logits), how.ctypes.data, top_k.ctypes.data, tokens.ctypes.data
        ):
            raise MemoryError(f"no memory to draw from {len(logits)} rows of logits")
        return DrawnHere(tokens)

    def block_bytes(self, block_size: int) -> int:
        return int(self._library.loramux_block_bytes(self._shape, block_size))

    def nbytes(self) -> dict[str, int]:
        base = sum(weight.nbytes for weight in self._base.weights.values())
        base += sum(tensor.nbytes for tensor in self._base.tensors.values())
        work = self._library.loramux_model_bytes(self._model) + self._results.nbytes
        work += sum(tensor.nbytes for tensor in self._angles)
        touched = self._library.loramux_model_touched(self._model)
        return {"base": base, "kv_cache": touched * self._block_nbytes(), "activations": int(work)}

    def _block_nbytes(self) -> int:
        return self.block_bytes(self._block_size) if self._block_size else 0

    def take_times(self) -> dict[str, float]:
        """Seconds that each kind of phase has taken since the last call, for benchmarks."""
        times = (ctypes.c_int64 * len(bindings.PHASES))()
        self._library.loramux_model_times(self._model, times)
        return {name: t * 1e-9 for name, t in zip(bindings.PHASES, times, strict=True)}

    def _layer(self, index: int) -> bindings.Layer:
        path = f"model.layers.{index}"
        layer = bindings.Layer(rope=int(self._config.has_rope(index)))
        for i, name in enumerate(SITES):
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

    def _indexes(self, shapes: Shapes) -> np.ndarray:
        """Where an adapter's modules are in a slot's table. Adapters of one kind, which most are, ask alike."""
        found = self._known.get(shapes)
        if found is None:
            indexes = []
            for path, shape in shapes:
                if path not in self._sites:
                    raise ValueError(f"the base has no linear {path} that an adapter could change")
                index, own = self._sites[path]
                if shape != own:
                    raise ValueError(f"the update of {path} is {shape} (out, in), the module is {own}")
                indexes.append(index)
            if len(self._known) >= KINDS:
                self._known.clear()
            found = self._known[shapes] = np.array(indexes, np.int64)
        return found

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"there are {len(self._slots)} slots and no slot {slot}")


def _arrays(batch: Batch) -> dict[str, torch.Tensor]:
    """The step's tensors in the dtypes of kernels.h, contiguous."""
    wide = {name: getattr(batch, name).to(torch.int64).contiguous() for name in ("tokens", "positions", "logit_rows")}
    narrow = {name: getattr(batch, name).to(torch.int32).contiguous() for name in ("row_start", "context", "blocks")}
    return wide | narrow


def _parent(name: str) -> str:
    return "self_attn" if name in SITES[:4] else "mlp"


def _site_places(config: ModelConfig) -> dict[str, tuple[int, tuple[int, int]]]:
    """Module path -> (place in a slot's table, (out, in))."""
    places = {}
    for path, shape in config.linear_shapes().items():
        layer, name = int(path.split(".")[2]), path.rsplit(".", 1)[1]
        places[path] = (layer * len(SITES) + SITES.index(name), shape)
    return places


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
