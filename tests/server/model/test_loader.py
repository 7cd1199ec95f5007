"""`load_base` from Hugging Face folders: content, identity, cache, and broken folders."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.weights import LoraWeights, LowRank
from server.errors import BadModel, BadSetting
from server.kernels import choose
from server.kernels.packed_format import dequantize_stored
from server.kernels.reference import Reference
from server.kernels.weight import Weight
from server.model.config import ModelConfig
from server.model.loader import Base, load_base
from server.model.packed_file import PackedWriter
from server.model.quantization import quantize
from server.model.vocabulary import Vocabulary
from tests.server.model.tiny_models import KINDS, TYPES, load, same, saved, tiny_model, to_gguf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_unquantized_tensors_equal_those_of_the_model(
    tmp_path: Path, kind: str, shard: str, tiny_vocabulary: Vocabulary
) -> None:
    base = load(saved(tmp_path, kind, tiny_vocabulary, shard), quantization="none")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard == "200KB")
    expected = dict(tiny_model(kind).state_dict())
    for path, weight in base.weights.items():
        assert torch.equal(dequantize_stored(weight), expected.pop(f"{path}.weight"))
    for name, tensor in base.tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected.pop(name))
    assert expected == {}
    assert base.quantization == {"scheme": "none", "group": None, "double": False, "table_bits": None}


@pytest.mark.parametrize(
    ("settings", "scheme", "group"),
    [
        ({}, "int4", 64),
        ({"group_size": 32, "double_quant": True}, "int4", 32),
        ({"quantization": "nf4", "double_quant": True}, "nf4", 64),
    ],
)
def test_quantization_settings(
    tmp_path: Path, settings: dict[str, Any], scheme: str, group: int, tiny_vocabulary: Vocabulary
) -> None:
    base = load(saved(tmp_path, "Qwen2", tiny_vocabulary), **settings)
    expected, double = tiny_model("Qwen2").state_dict(), settings.get("double_quant", False)
    for path in base.shapes():
        weight = base.weights[path]
        assert (weight.scheme, weight.group, weight.double_quantized) == (scheme, group, double)
        again = quantize(expected[f"{path}.weight"], scheme, group, double)
        assert torch.equal(dequantize_stored(weight), dequantize_stored(again))
    assert base.weights["lm_head"].scheme == base.weights["model.embed_tokens"].scheme == "int8"
    assert base.quantization == {"scheme": scheme, "group": group, "double": double, "table_bits": 8}
    assert load(tmp_path, table_bits=16).weights["lm_head"].tensors["codes"].dtype == torch.bfloat16
    with pytest.raises(BadModel, match=r"mlp\.down_proj has 192 inputs.*groups of 32, 64"):
        load(tmp_path, group_size=128)
    with pytest.raises(BadSetting):
        load(tmp_path, group_size=48)


def test_the_id_covers_all_files_and_the_quantization(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path, "Llama", tiny_vocabulary, "200KB")
    ids = {load(source).id, load(source).id, load(source, double_quant=True).id}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        file = source / name
        file.write_text(file.read_text() + "\n")
        ids.add(load(source).id)
    (source / "chat_template.jinja").write_text("{}")
    ids.add(load(source).id)
    (source / "README.md").write_text("not part of it")
    assert load(source).id in ids and len(ids) == 7
    file = next(iter(source.glob("model-*.safetensors")))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)
    assert load(source).id not in ids


# Tied tables


def test_tied_tables_in_every_spelling(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    first, tensors = load(tmp_path), load_file(file)
    table = tensors["model.embed_tokens.weight"]
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors | {"lm_head.weight": table.clone()} | unused, file)
    assert same(first, load(tmp_path)), "the same table twice"
    del tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table}, file)
    base = load(tmp_path)
    assert same(first, base) and base.config.tie_word_embeddings and base.notes == (), "under the other name"
    save_file(tensors, file)
    with pytest.raises(BadModel, match=r"lacks model\.embed_tokens\.weight"):
        load(tmp_path)


def test_an_output_table_that_differs_unties_the_config(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    """As in Transformers. Training and merging leave such folders."""
    source = saved(tmp_path / "m", "Qwen2", tiny_vocabulary, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0.25
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    base = load(source, quantization="none")
    assert torch.equal(theirs.lm_head.weight, head) and torch.equal(base.weights["lm_head"].tensors["codes"], head)
    assert not base.config.tie_word_embeddings and "but the two differ" in base.notes[0]
    half = tensors["model.embed_tokens.weight"].bfloat16()
    both = tensors | {"model.embed_tokens.weight": half, "lm_head.weight": half.float()}
    save_file(both, source / "model.safetensors")
    assert "lm_head" not in load(source).weights, "equal values in another dtype"


# Broken folders


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = load_file(file)
    for tensors, message in [
        ({k: v for k, v in whole.items() if k != name}, f"lacks {name}"),
        (whole | {"model.layers.9.x": torch.ones(1)}, r"does not: model\.layers\.9\.x"),
        (whole | {name: torch.ones(8, 8)}, rf"{name} has the shape \[8, 8\].* says \[192, 128\]"),
        (whole | {name: torch.full((192, 128), float("nan"))}, "up_proj holds values that are not finite"),
        (whole | {"model.norm.weight": torch.full((128,), float("inf"))}, "model.norm.weight holds values"),
        (whole | {name: torch.ones((192, 128), dtype=torch.int32)}, "int32, which is not supported"),
        (whole | {"model.norm.weight": torch.ones(128, dtype=torch.bool)}, "bool, which is not supported"),
    ]:
        save_file(tensors, file)
        with pytest.raises(BadModel, match=message):
            load(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadModel, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_folders_without_a_readable_model(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    with pytest.raises(BadModel, match="neither a config.json nor"):
        load(tmp_path)
    with pytest.raises(BadModel, match="no model at"):
        load(tmp_path / "nowhere")
    saved(tmp_path, "Llama", tiny_vocabulary)
    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(BadModel, match=r"no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(BadModel, match="pickle.*can run code"):
            load(source)


def test_indexes_of_shards(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = sorted(whole)
    for file, those in (("one", names[:9]), ("two", names[8:])):
        save_file({name: whole[name] for name in those}, source / f"{file}.safetensors")
    twice = dict.fromkeys(names[:9], "one.safetensors") | dict.fromkeys(names[9:], "two.safetensors")
    for weight_map, message in [
        (dict.fromkeys(whole, "../elsewhere.safetensors"), r"names the file '\.\./elsewhere\.safetensors'"),
        (dict.fromkeys(whole, "x" * 10**6), "names the file 'xxx"),
        (twice, rf"{names[8]} is in both one\.safetensors and two\.safetensors"),
        (3, "no weight_map"),
        (None, "no weight_map"),
    ]:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadModel, match=message):
            load(source)


def test_a_whole_file_wins_over_an_index(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary, "200KB")
    model = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_file(dict(model.state_dict()), source / "model.safetensors", metadata={"format": "pt"})
    base = load(source, quantization="none")
    assert torch.equal(base.weights["lm_head"].tensors["codes"], model.lm_head.weight)
    assert base.notes[0].startswith("model.safetensors is read; model.safetensors.index.json beside it")


def test_a_tokenizer_with_more_tokens_than_the_table(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary, vocab_size=100)
    last = tiny_vocabulary.tokenizer.id_to_token(tiny_vocabulary.size - 1)
    with pytest.raises(BadModel, match=rf"\('{last}'\), but the embedding table has only 100 rows"):
        load(tmp_path)


# The packed cache


def test_warm_starts_map_the_cache_and_read_no_weights(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = saved(tmp_path / "m", "Qwen3", tiny_vocabulary), tmp_path / "cache"
    memory = load(source)
    cold = load(source, cache_dir=cache)
    assert same(memory, cold) and cold.id == memory.id
    [path] = cache.glob("*.packed")
    with monkeypatch.context() as patched:
        patched.setattr("server.model.checkpoint.quantize", None)
        warm = load(source, cache_dir=cache)
    assert same(memory, warm) and str(path) in Path("/proc/self/maps").read_text()
    load(source, cache_dir=cache, group_size=32)

    class Other(Reference):
        layout = "other-1"

    load_base(source, name="tiny", backend=Other(), cache_dir=cache)
    assert len(list(cache.glob("*.packed"))) == 3


def test_a_damaged_or_outdated_cache_is_rebuilt(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = saved(tmp_path / "m", "Llama", tiny_vocabulary), tmp_path / "cache"
    with monkeypatch.context() as patched:  # a version that read these files differently
        patched.setattr(ModelConfig, "table_shapes", lambda c: {"model.embed_tokens": (c.vocab_size, c.hidden_size)})
        patched.setattr("server.model.checkpoint.check_names", lambda *_: None)
        assert "lm_head" not in load(source, cache_dir=cache).weights
    first = load(source, cache_dir=cache)
    assert same(first, load(source))
    [path] = cache.glob("*.packed")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert same(first, load(source, cache_dir=cache))
    assert "is rebuilt" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_model_that_is_replaced_during_loading_is_refused(
    tmp_path: Path, tiny_vocabulary: Vocabulary, kind: str
) -> None:
    """Otherwise the cache would hold other weights under its digest."""
    if kind == "folder":
        file = saved(tmp_path / "m", "Llama", tiny_vocabulary) / "model.safetensors"
    else:
        file = to_gguf(tmp_path / "m", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    other, cache = tmp_path / "other", tmp_path / "cache"
    other.write_bytes(file.read_bytes())

    class Replacing(Reference):
        def pack(self, weight: Weight) -> Weight:
            if other.exists():
                os.replace(other, file)
            return super().pack(weight)

    with pytest.raises(BadModel, match="m changed while it was read"):
        load_base(tmp_path / "m", name="m", backend=Replacing(), cache_dir=cache)
    assert list(cache.glob("base-*")) == []
    assert load(tmp_path / "m", cache_dir=cache)


def test_a_full_disk_keeps_the_base_in_memory(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = saved(tmp_path / "m", "Llama", tiny_vocabulary), tmp_path / "cache"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PackedWriter, "add_tensor", full)
    with caplog.at_level(logging.WARNING):
        base = load(source, cache_dir=cache)
    assert same(base, load(source)) and "kept in memory" in caplog.text
    assert list(cache.glob("base-*")) == []


def test_progress_counts_every_parameter(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    seen: list[tuple[str, int, int]] = []
    base = load(saved(tmp_path, "Llama", tiny_vocabulary), progress=lambda *step: seen.append(step))
    total = sum(w.shape[0] * w.shape[1] for w in base.weights.values())
    assert seen[-1] == ("loading", total, total) and seen == sorted(seen)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "none"])
@pytest.mark.parametrize("kernels", ["reference", "aten", "auto"])
def test_sizes_of_adapters_equal_their_prepared_bytes(tiny_base: Base, kernels: str, scheme: str) -> None:
    base = replace(tiny_base, backend=choose(kernels, "cpu"), quantization={"scheme": scheme})
    size, generator = base.sizes(), torch.Generator().manual_seed(1)
    for ranks in ([1, 2, 3], [7, 16, 17], [64]):
        modules = {
            path: LowRank(torch.randn(r, into, generator=generator), torch.randn(out, r, generator=generator), 2.0)
            for (path, (out, into)), r in zip(base.shapes().items(), cycle(ranks), strict=False)
        }
        updates = {path: (m.rank, *m.shape) for path, m in modules.items()}
        assert size(updates) == base.prepare(LoraWeights("a", "a" * 64, modules)).nbytes
    assert size({**updates, "model.elsewhere": (1, 2, 3)}) is None
