"""Checkpoints in GGUF files: their tensors under Transformers' names and in its row order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from server.errors import BadModel
from server.kernels.weight import Weight
from server.model import gguf_config, gguf_vocabulary
from server.model.checkpoint import Checkpoint, check_shapes, quantize_matrix
from server.model.file_digest import Digests
from server.model.gguf_file import BLOCK, GgufFile
from server.model.quantization import Quantization, Rows, check_finite
from server.model.vocabulary import Vocabulary

_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_ROPE_FACTORS = "rope_freqs.weight"
_FLOAT_TYPES = ("F32", "F16", "BF16")


class GgufCheckpoint(Checkpoint):
    """A GGUF file. Q4_0 and Q4_1 linears and Q8_0 tables are used without loss, others are re-quantized.

    llama.cpp stores the rows of q and k of the `llama` and `smollm3` architectures with the two halves of each head
    interleaved. Here they are put back into Transformers' order.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = GgufFile(path)
        metadata, tensors = self._file.metadata, self._file.tensors
        parts = metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise BadModel(f"{path.name} is one of {parts} parts; merge them into one file first")
        factors = self._file.floats(_ROPE_FACTORS).flatten().tolist() if _ROPE_FACTORS in tensors else None
        self.config = gguf_config.from_gguf(metadata, {n: t.shape for n, t in tensors.items()}, factors)
        self.notes: list[str] = []
        self._names = {_transformers_name(name): name for name in tensors if name != _ROPE_FACTORS}
        self._interleaved = metadata["general.architecture"] in ("llama", "smollm3")
        check_shapes({ours: tensors[name].shape for ours, name in self._names.items()}, self.config)

    def files(self) -> list[Path]:
        return [self.source]

    def vocabulary(self) -> Vocabulary:
        return gguf_vocabulary.from_gguf(self._file.metadata)

    def digest(self, digests: Digests) -> str:
        return digests.of(self.source)

    def effective(self, asked: Quantization) -> Quantization:
        return replace(asked, group=BLOCK) if asked.scheme == "int4" and asked.group is None else asked

    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        changed: Counter[str] = Counter()
        tables = self.config.table_shapes()
        for path in (*tables, *self.config.linear_shapes()):
            name = self._names[f"{path}.weight"]
            weight = self._lossless(name, quantization, path in tables)
            if weight is None:
                kind = self._file.tensors[name].type_name
                if kind not in _FLOAT_TYPES:
                    changed[kind] += 1
                weight = self._requantized(path, name, quantization, path in tables)
            elif (order := self._row_order(path)) is not None:
                weight = replace(weight, tensors={key: t[order] for key, t in weight.tensors.items()})
            yield path, weight
        done = "widened to bf16" if quantization.scheme == "none" else "re-quantized"
        for kind, count in sorted(changed.items()):
            self.notes.append(f"{count} tensors of the GGUF type {kind} were {done}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.config.tensor_shapes():
            tensor = self._file.floats(self._names[name]).float()
            check_finite(name, tensor)
            order = self._row_order(name.removesuffix(".bias"))
            yield name, tensor if order is None else tensor[order]

    def _lossless(self, name: str, quantization: Quantization, table: bool) -> Weight | None:
        """The stored blocks, if they are what `quantization` asks for."""
        if table:
            wanted = "int8" if quantization.scheme != "none" and quantization.table_bits == 8 else None
        else:
            exact = quantization.group == BLOCK and not quantization.double_quant
            wanted = "int4" if quantization.scheme == "int4" and exact else None
        stored = self._file.stored(name) if wanted else None
        return stored if stored is not None and stored.scheme == wanted else None

    def _requantized(self, path: str, name: str, quantization: Quantization, table: bool) -> Weight:
        rows: Rows = self._file.rows(name)
        order = self._row_order(path)
        if quantization.scheme == "none" and self._file.tensors[name].type_name not in _FLOAT_TYPES:
            rows = rows[: rows.shape[0]].bfloat16()
        if order is not None:
            rows = rows[: rows.shape[0]][order]
        return quantize_matrix(rows, quantization, path, table=table)

    def _row_order(self, path: str) -> torch.Tensor | None:
        """llama.cpp's row of each row of q or k; None where both orders agree."""
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(path.rsplit(".", 1)[-1])
        if heads is None or not self._interleaved:
            return None
        rows = torch.arange(heads * self.config.head_dim)
        return rows.view(heads, self.config.head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises BadModel for an unknown name."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and re.fullmatch(r"0|[1-9][0-9]*", parts[1]) and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise BadModel(f"the GGUF file has the tensor {name[:80]}, which is not supported")
