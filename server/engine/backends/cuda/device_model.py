"""`DeviceModel`: a base's weights on a GPU and a step of its decoder as a list of Triton kernels.

Owns the order of the kernels and what is put side by side: q, k and v, and gate and up, are one matrix each, all of
them in one piece of memory. It allocates and launches, and never waits for the device or looks at a value on it, so a
step can be captured as a CUDA graph. Does not know requests, slots' contents or how a step's numbers came to the
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from server.errors import BadModel
from server.kernels.cuda import attention, epilogue, lora, matmul, packing, rowwise, shared_memory
from server.kernels.cuda.lora import Lanes, Pool
from server.kernels.cuda.matmul import Matrix
from server.kernels.lora import TARGET_MODULES
from server.kernels.packed_format import TILE
from server.kernels.weight import Weight
from server.model.decoder import Source
from server.model.rope import angles, frequencies

QKV, OUT, GATE_UP, DOWN = 0, 3, 4, 6


@dataclass(frozen=True)
class DeviceStep:
    """A step's numbers on the device: T rows of S sequences; rows that only fill a bucket have position -1.

    tokens, positions, sequence  int32 [T]       blocks int32 [S, B]    context int32 [S]
    singles      int32 [n] rows and sequences of the rows that are a sequence's only one, None without any
    prefills     int32 [n, 4] as kernels/cuda/attention.py has them, None without any
    logit_rows   int32 [L]
    lanes        tiles of rows, with their adapters unless `adapters` is off
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    blocks: torch.Tensor
    context: torch.Tensor
    singles: tuple[torch.Tensor, torch.Tensor] | None
    prefills: torch.Tensor | None
    logit_rows: torch.Tensor
    lanes: Lanes
    adapters: bool


@dataclass(frozen=True)
class _Layer:
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    has_rope: bool


class DeviceModel:
    """The base's weights on `device`, activations in `dtype`. Raises BadModel for shapes that do not fit."""

    def __init__(self, base: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = base.config, device, dtype
        _check(base)
        self._piece = shared_memory.Piece(shared_memory.room(base.weights), device)
        self._parts: dict[str, Weight] = {}
        self._layers = [self._layer(base, i) for i in range(base.config.num_hidden_layers)]
        self._table = self._matrix(base, "model.embed_tokens")
        self._head = self._table if base.config.tie_word_embeddings else self._matrix(base, "lm_head")
        self._norm = self._vector(base, "model.norm.weight")
        self._angles = (torch.empty(0), torch.empty(0))
        self.nbytes = sum(matrix.nbytes for matrix in self._matrices()) + sum(t.nbytes for t in self._vectors())

    def told(self) -> dict[str, Any]:
        """Where the quantized matrices of the base's modules lie, for another process; see kernels/cuda/shared.py."""
        return shared_memory.told(self._parts, self._piece.memory)

    def turn_up_to(self, positions: int) -> None:
        """Make the angles of so many positions."""
        inverse, factor = frequencies(self.config)
        cosine, sine = angles(inverse, factor, torch.arange(min(positions, self.config.context_length)))
        self._angles = (cosine.to(self.device), sine.to(self.device))

    def logits(self, step: DeviceStep, cache: torch.Tensor, pool: Pool) -> torch.Tensor:
        """float32 [L, vocab] of the step's `logit_rows`; its keys and values are in the cache after it.

        cache [layers, blocks, kv_heads, 2, block_size, head_dim] in the model's dtype.
        """
        stream = self._new(step.tokens.shape[0], self.config.hidden_size)
        rowwise.embed(self._table, step.tokens, stream)
        for index, layer in enumerate(self._layers):
            site = index * len(TARGET_MODULES)
            x, sums = self._normed(stream, layer.input_norm, layer.qkv)
            seen, seen_sums = self._attend(index, layer, x, sums, step, cache, pool)
            self._finish(layer.out, OUT, layer.biases[1], seen, seen_sums, step, pool, site, stream, add=True)
            x, sums = self._normed(stream, layer.post_norm, layer.gate_up)
            hidden, sums = self._gated(layer, x, sums, step, pool, site)
            self._finish(layer.down, DOWN, layer.biases[3], hidden, sums, step, pool, site, stream, add=True)
        wanted = stream.index_select(0, step.logit_rows)
        x, sums = self._normed(wanted, self._norm, self._head)
        how = self._head.tiling(x.shape[0])
        result = self._new(how.splits, x.shape[0], self._head.rows)
        self._head.multiply(x, sums, result, how)
        return result[0] if how.splits == 1 else result.sum(0)

    # -- parts of a layer

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        sums: torch.Tensor,
        step: DeviceStep,
        cache: torch.Tensor,
        pool: Pool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What each row sees, and the sums of its groups where they are made beside it: of single rows alone."""
        heads, d = self.config.num_attention_heads, self.config.head_dim
        qkv = self._new(x.shape[0], layer.qkv.rows, dtype=self.dtype)
        self._finish(layer.qkv, QKV, layer.biases[0], x, sums, step, pool, index * len(TARGET_MODULES), qkv)
        turns = self._angles if layer.has_rope else None
        rowwise.rotate(
            qkv, layer.head_norms, turns, step.positions, step.sequence, step.blocks, cache, index,
            self.config.rms_norm_eps,
        )  # fmt: skip
        seen = self._new(x.shape[0], heads * d, dtype=self.dtype)
        seen_sums, group = seen, 0
        if step.singles is not None:
            n = step.singles[0].shape[0]
            scratch = self._new(n, heads, attention.SPLITS, d), self._new(n, heads, attention.SPLITS)
            if layer.out.wants_sums and d % layer.out.group == 0:
                group = layer.out.group
                seen_sums = self._new(x.shape[0], heads * d // group)
            attention.decode(
                qkv, cache, index, step.blocks, step.context, *step.singles, scratch, seen, seen_sums, group
            )  # fmt: skip
        if step.prefills is not None:
            attention.prefill(qkv, cache, index, step.blocks, step.prefills, seen)
        return seen, seen_sums if group and step.prefills is None else None

    def _gated(
        self, layer: _Layer, x: torch.Tensor, sums: torch.Tensor, step: DeviceStep, pool: Pool, site: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLP's hidden rows and the sums of their groups."""
        product, shrunk = self._product(layer.gate_up, x, sums, 2, step, pool, site + GATE_UP)
        width = layer.gate_up.rows // 2
        group = layer.down.group if layer.down.wants_sums else 0
        hidden = self._new(x.shape[0], width, dtype=self.dtype)
        hidden_sums = self._new(x.shape[0], width // group) if group else product
        epilogue.finish_swiglu(
            product, layer.biases[2], hidden, hidden_sums, group, step.lanes, pool, site + GATE_UP, shrunk
        )
        return hidden, hidden_sums

    def _finish(
        self,
        matrix: Matrix,
        place: int,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        sums: torch.Tensor | None,
        step: DeviceStep,
        pool: Pool,
        site: int,
        out: torch.Tensor,
        add: bool = False,
    ) -> None:
        """A linear with its adapters into `out`, or onto it. Without `sums` those of x's groups are made here."""
        if sums is None:
            sums = x
            if matrix.wants_sums:
                sums = self._new(x.shape[0], matrix.width // matrix.group)
                matmul.group_sums(x, matrix.group, sums)
        slices = self._qkv_slices() if place == QKV else (matrix.rows,)
        product, shrunk = self._product(matrix, x, sums, len(slices), step, pool, site + place)
        epilogue.finish(product, bias, out, slices, step.lanes, pool, site + place, shrunk, add)

    def _product(
        self, matrix: Matrix, x: torch.Tensor, sums: torch.Tensor, slices: int, step: DeviceStep, pool: Pool, site: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A product, still split, and what the adapters' A's make of x, None without adapters."""
        count = x.shape[0]
        how = matrix.tiling(count)
        product = self._new(how.splits, count, matrix.rows)
        matrix.multiply(x, sums, product, how)
        if not step.adapters:
            return product, None
        splits = lora.shrink_splits(step.lanes.tile_rows, step.lanes.width, matrix.width)
        shrunk = self._new(splits, slices, count, step.lanes.width)
        lora.shrink(x, pool, step.lanes, site, slices, shrunk)
        return product, shrunk

    def _normed(self, stream: torch.Tensor, weight: torch.Tensor, into: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed rows and the sums of the groups that `into` has."""
        group = into.group if into.wants_sums else 0
        out = self._new(*stream.shape, dtype=self.dtype)
        sums = self._new(stream.shape[0], stream.shape[1] // group) if group else stream
        rowwise.rms_norm(stream, weight, self.config.rms_norm_eps, out, sums, group)
        return out, sums

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _qkv_slices(self) -> tuple[int, int, int]:
        keys = self.config.num_key_value_heads * self.config.head_dim
        return self.config.num_attention_heads * self.config.head_dim, keys, keys

    # -- weights

    def _layer(self, base: Source, index: int) -> _Layer:
        path = f"model.layers.{index}"
        attention_paths = [f"{path}.self_attn.{name}" for name in TARGET_MODULES[:4]]
        mlp_paths = [f"{path}.mlp.{name}" for name in TARGET_MODULES[4:]]
        norms = None
        if base.config.qk_norm:
            norms = (
                self._vector(base, f"{path}.self_attn.q_norm.weight"),
                self._vector(base, f"{path}.self_attn.k_norm.weight"),
            )
        return _Layer(
            qkv=self._matrix(base, *attention_paths[:3]),
            out=self._matrix(base, attention_paths[3]),
            gate_up=self._matrix(base, *mlp_paths[:2]),
            down=self._matrix(base, mlp_paths[2]),
            biases=(
                self._bias(base, *attention_paths[:3]),
                self._bias(base, attention_paths[3]),
                self._bias(base, *mlp_paths[:2]),
                self._bias(base, mlp_paths[2]),
            ),
            input_norm=self._vector(base, f"{path}.input_layernorm.weight"),
            post_norm=self._vector(base, f"{path}.post_attention_layernorm.weight"),
            head_norms=norms,
            has_rope=base.config.has_rope(index),
        )

    def _matrix(self, base: Source, *paths: str) -> Matrix:
        joined = packing.side_by_side([base.weights[path] for path in paths], self.device)
        if joined.scheme != "none":
            joined = self._piece.keep(joined)
            at = 0
            for path in paths:
                rows = base.weights[path].shape[0]
                self._parts[path] = packing.part(joined, at, at + rows)
                at += rows
        return Matrix(joined, self.dtype)

    def _bias(self, base: Source, *paths: str) -> torch.Tensor | None:
        found = [base.tensors.get(f"{path}.bias") for path in paths]
        if all(bias is None for bias in found):
            return None
        parts = [
            torch.zeros(base.weights[path].shape[0]) if bias is None else bias.float()
            for path, bias in zip(paths, found, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    def _vector(self, base: Source, name: str) -> torch.Tensor:
        if name not in base.tensors:
            raise BadModel(f"the model lacks {name}")
        return base.tensors[name].float().contiguous().to(self.device)

    def _matrices(self) -> list[Matrix]:
        tables = [self._table] if self._head is self._table else [self._table, self._head]
        return [m for layer in self._layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)] + tables

    def _vectors(self) -> list[torch.Tensor]:
        found = [self._norm]
        for layer in self._layers:
            found += [layer.input_norm, layer.post_norm, *(layer.head_norms or ())]
            found += [bias for bias in layer.biases if bias is not None]
        return found


def _check(base: Source) -> None:
    config, table = base.config, base.weights["model.embed_tokens"]
    if table.scheme not in ("int8", "none") or table.double_quantized:
        twice = ", its scales too" if table.double_quantized else ""
        raise BadModel(
            "the CUDA kernels look up tables of 16 bits, and of 8 bits whose scales are not quantized; the model's "
            f"model.embed_tokens is in {table.scheme}{twice}, which the kernels of a CPU serve (--device cpu)"
        )
    for path, (out, _) in config.linear_shapes().items():
        if out % TILE:
            raise BadModel(f"the CUDA kernels take linears with a multiple of {TILE} outputs, and {path} has {out}")
    if config.head_dim % 2:
        raise BadModel(f"the CUDA kernels take heads of an even size, not {config.head_dim}")
