"""`DeviceModel`: the base's weights on a GPU, and a step of the decoder as a sequence of Triton kernels.

q, k and v are one matrix, and so are gate and up. A step never synchronizes with the host, so it can be captured as a
CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from server.errors import BadModel
from server.kernels.cuda import attention, epilogue, lora, matmul, packing, rowwise, shared_memory
from server.kernels.cuda.lora import DeviceAdapters, Lanes
from server.kernels.cuda.matmul import Matrix
from server.kernels.lora import TARGET_MODULES
from server.kernels.packed_format import TILE
from server.kernels.weight import Weight
from server.model.decoder import Source
from server.model.rope import angles, frequencies

QKV, OUT, GATE_UP, DOWN = 0, 3, 4, 6


@dataclass(frozen=True)
class DeviceStep:
    """The arrays of a step on the device, for T rows of S sequences. Padding rows have position -1.

    Attributes:
        tokens: int32 [T].
        positions: int32 [T].
        sequence: int32 [T].
        blocks: int32 [S, B].
        context: int32 [S].
        singles: Rows and sequences of decoded rows, int32 [n] each, or None.
        prefills: int32 [n, 4] as in kernels/cuda/attention.py, or None.
        logit_rows: int32 [L].
        lanes: Tiles of rows and their adapters.
        adapters: Whether any row has an adapter.
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
    """The base on `device`, with activations in `dtype`. Raises BadModel for unsupported shapes."""

    def __init__(self, base: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = base.config, device, dtype
        _check(base)
        self._buffer = shared_memory.SharedBuffer(shared_memory.required_bytes(base.weights), device)
        self._parts: dict[str, Weight] = {}
        self._layers = [self._layer(base, i) for i in range(base.config.num_hidden_layers)]
        self._table = self._matrix(base, "model.embed_tokens")
        self._head = self._table if base.config.tie_word_embeddings else self._matrix(base, "lm_head")
        self._norm = self._vector(base, "model.norm.weight")
        self._angles = (torch.empty(0), torch.empty(0))
        self.nbytes = sum(matrix.nbytes for matrix in self._matrices()) + sum(t.nbytes for t in self._vectors())

    def export(self) -> dict[str, Any]:
        """Describe the quantized matrices for another process; see kernels/cuda/shared_memory.py."""
        return shared_memory.export(self._parts, self._buffer.memory)

    def make_rotary_tables(self, positions: int) -> None:
        """Compute the rotary tables for that many positions."""
        inverse, factor = frequencies(self.config)
        cosine, sine = angles(inverse, factor, torch.arange(min(positions, self.config.context_length)))
        self._angles = (cosine.to(self.device), sine.to(self.device))

    def logits(self, step: DeviceStep, cache: torch.Tensor, adapters: DeviceAdapters) -> torch.Tensor:
        """Run a step.

        Args:
            step: The step's arrays.
            cache: KV cache [layers, blocks, kv_heads, 2, block_size, head_dim]; receives new keys and values.
            adapters: The adapters on the device.

        Returns:
            Logits of the step's `logit_rows`, float32 [L, vocab].
        """
        stream = self._new(step.tokens.shape[0], self.config.hidden_size)
        rowwise.embed(self._table, step.tokens, stream)
        for index, layer in enumerate(self._layers):
            module = index * len(TARGET_MODULES)
            x, sums = self._normed(stream, layer.input_norm, layer.qkv)
            attention_out, attention_sums = self._attend(index, layer, x, sums, step, cache, adapters)
            self._finish(
                layer.out, OUT, layer.biases[1], attention_out, attention_sums, step, adapters, module, stream, add=True
            )
            x, sums = self._normed(stream, layer.post_norm, layer.gate_up)
            hidden, sums = self._gated(layer, x, sums, step, adapters, module)
            self._finish(layer.down, DOWN, layer.biases[3], hidden, sums, step, adapters, module, stream, add=True)
        selected = stream.index_select(0, step.logit_rows)
        x, sums = self._normed(selected, self._norm, self._head)
        tiling = self._head.tiling(x.shape[0])
        result = self._new(tiling.splits, x.shape[0], self._head.rows)
        self._head.multiply(x, sums, result, tiling)
        return result[0] if tiling.splits == 1 else result.sum(0)

    # -- parts of a layer

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        sums: torch.Tensor,
        step: DeviceStep,
        cache: torch.Tensor,
        adapters: DeviceAdapters,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of each row; also the sums of its groups if a kernel computes them (decoded rows only)."""
        heads, d = self.config.num_attention_heads, self.config.head_dim
        qkv = self._new(x.shape[0], layer.qkv.rows, dtype=self.dtype)
        self._finish(layer.qkv, QKV, layer.biases[0], x, sums, step, adapters, index * len(TARGET_MODULES), qkv)
        turns = self._angles if layer.has_rope else None
        rowwise.rotate(
            qkv, layer.head_norms, turns, step.positions, step.sequence, step.blocks, cache, index,
            self.config.rms_norm_eps,
        )  # fmt: skip
        attention_out = self._new(x.shape[0], heads * d, dtype=self.dtype)
        attention_sums, group = attention_out, 0
        if step.singles is not None:
            n = step.singles[0].shape[0]
            scratch = self._new(n, heads, attention.SPLITS, d), self._new(n, heads, attention.SPLITS)
            if layer.out.wants_sums and d % layer.out.group == 0:
                group = layer.out.group
                attention_sums = self._new(x.shape[0], heads * d // group)
            attention.decode(
                qkv, cache, index, step.blocks, step.context, *step.singles, scratch,
                attention_out, attention_sums, group,
            )  # fmt: skip
        if step.prefills is not None:
            attention.prefill(qkv, cache, index, step.blocks, step.prefills, attention_out)
        return attention_out, attention_sums if group and step.prefills is None else None

    def _gated(
        self,
        layer: _Layer,
        x: torch.Tensor,
        sums: torch.Tensor,
        step: DeviceStep,
        adapters: DeviceAdapters,
        module: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLP's hidden rows and the sums of their groups."""
        product, shrunk = self._product(layer.gate_up, x, sums, 2, step, adapters, module + GATE_UP)
        width = layer.gate_up.rows // 2
        group = layer.down.group if layer.down.wants_sums else 0
        hidden = self._new(x.shape[0], width, dtype=self.dtype)
        hidden_sums = self._new(x.shape[0], width // group) if group else product
        epilogue.finish_swiglu(
            product, layer.biases[2], hidden, hidden_sums, group, step.lanes, adapters, module + GATE_UP, shrunk
        )
        return hidden, hidden_sums

    def _finish(
        self,
        matrix: Matrix,
        first_module: int,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        sums: torch.Tensor | None,
        step: DeviceStep,
        adapters: DeviceAdapters,
        module: int,
        out: torch.Tensor,
        add: bool = False,
    ) -> None:
        """A linear with its adapters into `out`, or added to it. Computes the sums of x's groups if `sums` is None."""
        if sums is None:
            sums = x
            if matrix.wants_sums:
                sums = self._new(x.shape[0], matrix.width // matrix.group)
                matmul.group_sums(x, matrix.group, sums)
        slices = self._qkv_slices() if first_module == QKV else (matrix.rows,)
        product, shrunk = self._product(matrix, x, sums, len(slices), step, adapters, module + first_module)
        epilogue.finish(product, bias, out, slices, step.lanes, adapters, module + first_module, shrunk, add)

    def _product(
        self,
        matrix: Matrix,
        x: torch.Tensor,
        sums: torch.Tensor,
        slices: int,
        step: DeviceStep,
        adapters: DeviceAdapters,
        module: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A split-K product and the result of `shrink`, None without adapters."""
        count = x.shape[0]
        tiling = matrix.tiling(count)
        product = self._new(tiling.splits, count, matrix.rows)
        matrix.multiply(x, sums, product, tiling)
        if not step.adapters:
            return product, None
        splits = lora.shrink_splits(step.lanes.tile_rows, step.lanes.width, matrix.width)
        shrunk = self._new(splits, slices, count, step.lanes.width)
        lora.shrink(x, adapters, step.lanes, module, slices, shrunk)
        return product, shrunk

    def _normed(self, stream: torch.Tensor, weight: torch.Tensor, into: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed rows and the sums of the groups of `into`."""
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
        joined = packing.concatenate([base.weights[path] for path in paths], self.device)
        if joined.scheme != "none":
            joined = self._buffer.add(joined)
            at = 0
            for path in paths:
                rows = base.weights[path].shape[0]
                self._parts[path] = packing.slice_outputs(joined, at, at + rows)
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
        twice = " with double quantization" if table.double_quantized else ""
        raise BadModel(
            "the CUDA kernels support embedding tables of 16 bits, or of 8 bits without double quantization, but "
            f"model.embed_tokens is in {table.scheme}{twice}; use --device cpu"
        )
    for path, (out, _) in config.linear_shapes().items():
        if out % TILE:
            raise BadModel(f"the CUDA kernels need linears with a multiple of {TILE} outputs, but {path} has {out}")
    if config.head_dim % 2:
        raise BadModel(f"the CUDA kernels need an even head size, not {config.head_dim}")
