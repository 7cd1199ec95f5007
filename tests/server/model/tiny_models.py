"""Tiny models with random weights, as Hugging Face folders and as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from server.kernels.reference import Reference
from server.model.loader import Base, load_base
from server.model.vocabulary import Vocabulary, write_folder

KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"]
TYPES = gguf.GGMLQuantizationType


def tiny_model(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values | changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def saved(path: Path, kind: str, vocabulary: Vocabulary, shard: str = "5GB", **changes: Any) -> Path:
    model = tiny_model(kind, **changes)
    model.save_pretrained(path, max_shard_size=shard)
    write_folder(vocabulary, path)
    return path


def load(path: Path, **settings: Any) -> Base:
    return load_base(path, name="tiny", backend=Reference(), **settings)


def same(a: Base, b: Base) -> bool:
    if a.weights.keys() != b.weights.keys() or a.tensors.keys() != b.tensors.keys():
        return False
    tensors = all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    return tensors and all(
        torch.equal(tensor, b.weights[path].tensors[part])
        for path, weight in a.weights.items()
        for part, tensor in weight.tensors.items()
    )


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary | dict[str, Any]) -> None:
    if isinstance(vocabulary, dict):
        told = {key.removeprefix("tokenizer.ggml."): value for key, value in vocabulary.items()}
        writer.add_tokenizer_model(told["model"])
        writer.add_tokenizer_pre(told["pre"])
        writer.add_token_list(told["tokens"])
        writer.add_token_scores(told["scores"].tolist())
        writer.add_token_types(told["token_type"].tolist())
        writer.add_bos_token_id(told["bos_token_id"])
        writer.add_unk_token_id(told["unknown_token_id"])
        writer.add_add_space_prefix(told.get("add_space_prefix", True))
        return
    tokenizer = json.loads(vocabulary.tokenizer.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in vocabulary.special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])


def to_gguf(
    path: Path,
    kind: str,
    vocabulary: Vocabulary | dict[str, Any],
    linear: TYPES,
    table: TYPES,
    more: Mapping[str, Sequence[float]] | None = None,
    **changes: Any,
) -> Path:
    """A tiny model as llama.cpp's converter writes it, with its row order of q and k.

    A SentencePiece vocabulary is given as its metadata. `more` are further vectors.
    """
    model = tiny_model(kind, **changes)
    config, arch = model.config, {"Mistral": "llama"}.get(kind, kind.lower())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if kind != "Qwen2" else 32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_vocabulary(writer, vocabulary)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    if kind == "Qwen3":
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        part = stem.rpartition(".")[2]
        if part in ("q_proj", "k_proj") and arch in ("llama", "smollm3"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = values.swapaxes(1, 2).reshape(tensor.shape)
        raw = TYPES.F32 if values.ndim == 1 else table if part in ("embed_tokens", "lm_head") else linear
        data = gguf.quants.quantize(np.ascontiguousarray(values), raw)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", data, raw_dtype=raw)
    for name, vector in (more or {}).items():
        writer.add_tensor(name, np.array(vector, np.float32), raw_dtype=TYPES.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
