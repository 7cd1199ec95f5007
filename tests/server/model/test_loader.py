from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapters.weights import LoraWeights, LowRank
from server.errors import BadModel, BadSetting, Conflict
from server.kernels import choose
from server.kernels.cpu.packing import pack
from server.kernels.packed_format import dequantize_stored
from server.kernels.reference import Reference
from server.kernels.weight import Weight
from server.model.config import ModelConfig, RopeScaling
from server.model.gguf_config import llama3_divisors
from server.model.gguf_file import GgufFile
from server.model.loader import Base, _remove_abandoned, load_base, quantize_folder
from server.model.packed_file import PackedWriter
from server.model.quantization import bits, quantize
from server.model.vocabulary import Vocabulary, write_folder
from server.settings import Settings

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_unquantized_folders_hold_exactly_the_models_tensors(
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
    assert base.shapes()["model.layers.3.mlp.down_proj"] == (128, 192) and len(base.shapes()) == 28


@pytest.mark.parametrize(
    ("settings", "scheme", "group"),
    [
        ({}, "int4", 64),
        ({"group_size": 32, "double_quant": True}, "int4", 32),
        ({"quantization": "nf4", "double_quant": True}, "nf4", 64),
    ],
)
def test_folders_are_quantized_as_asked(
    tmp_path: Path, settings: dict[str, Any], scheme: str, group: int, tiny_vocabulary: Vocabulary
) -> None:
    base = load(saved(tmp_path, "Qwen2", tiny_vocabulary), **settings)
    expected = tiny_model("Qwen2").state_dict()
    for path in base.shapes():
        weight, double = base.weights[path], settings.get("double_quant", False)
        assert (weight.scheme, weight.group, weight.double_quantized) == (scheme, group, double)
        again = quantize(expected[f"{path}.weight"], scheme, group, double)
        assert torch.equal(dequantize_stored(weight), dequantize_stored(again))
    assert base.weights["lm_head"].scheme == base.weights["model.embed_tokens"].scheme == "int8"
    assert base.quantization == {
        "scheme": scheme, "group": group, "double": settings.get("double_quant", False), "table_bits": 8,
    }  # fmt: skip
    assert load(tmp_path, table_bits=16).weights["lm_head"].tensors["codes"].dtype == torch.bfloat16


def test_the_id_knows_content_and_quantization(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary)
    one = load(tmp_path)
    assert len(one.id) == 64 and one.id == load(tmp_path).id
    assert one.id != load(tmp_path, double_quant=True).id
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert one.id != load(tmp_path).id


def test_tied_tables_are_one_even_if_the_file_has_both(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head" not in load(tmp_path).weights


def test_a_head_that_differs_from_the_embedding_is_read_whatever_the_config_says(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    """Transformers unties them too. Such folders are left by training and merging."""
    source = saved(tmp_path / "m", "Qwen2", tiny_vocabulary, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0.25
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, head)
    base = load(source, quantization="none")
    assert torch.equal(base.weights["lm_head"].tensors["codes"], head)
    table = base.weights["model.embed_tokens"].tensors["codes"]
    assert torch.equal(table, tensors["model.embed_tokens.weight"]) and not base.config.tie_word_embeddings
    [note] = base.notes
    assert note.startswith("config.json ties lm_head.weight to model.embed_tokens.weight, but the two differ")
    quantize_folder(source, tmp_path / "q")
    assert same(load(source), load(tmp_path / "q")) and load(tmp_path / "q").notes == base.notes

    # Tables in other types are compared by their values, and those of other sizes are two.
    embedding = tensors["model.embed_tokens.weight"].bfloat16()
    as_stored = tensors | {"model.embed_tokens.weight": embedding}
    save_file(as_stored | {"lm_head.weight": embedding.float()}, source / "model.safetensors")
    assert "lm_head" not in load(source).weights and load(source).notes == ()
    save_file(as_stored | {"lm_head.weight": head[:-1].clone()}, source / "model.safetensors")
    with pytest.raises(BadModel, match=r"lm_head\.weight has the shape \[299, 128\]"):
        load(source)


def test_tied_tables_may_be_stored_under_the_name_of_the_head(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary, tie_word_embeddings=True)
    first = load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    base = load(tmp_path)
    assert same(first, base) and base.config.tie_word_embeddings and base.notes == ()
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadModel, match=r"lacks model\.embed_tokens\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("shards", ["left", "gone"])
def test_one_whole_file_is_read_and_not_the_parts_of_an_earlier_save(
    tmp_path: Path, tiny_vocabulary: Vocabulary, shards: str
) -> None:
    source, cache = saved(tmp_path / "m", "Llama", tiny_vocabulary, "200KB"), tmp_path / "cache"
    parts = list(source.glob("model-*.safetensors"))
    model = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_file(dict(model.state_dict()), source / "model.safetensors", metadata={"format": "pt"})
    if shards == "gone":
        for part in parts:
            part.unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    base = load(source, quantization="none")
    assert torch.equal(base.weights["lm_head"].tensors["codes"], model.lm_head.weight)
    [note] = load(source, cache_dir=cache).notes
    assert note.startswith("model.safetensors is read; model.safetensors.index.json beside it")
    assert load(source, cache_dir=cache).notes == base.notes == (note,)
    (source / "model.safetensors.index.json").unlink()
    again = load(source, cache_dir=cache)
    assert again.id == load(source).id and again.notes == ()
    assert load(source, quantization="none").id == base.id, "the index was no part of it"


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(tensors: dict[str, torch.Tensor], said: str) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(BadModel, match=said):
            load(tmp_path)

    refused({k: v for k, v in whole.items() if k != name}, f"lacks {name}")
    refused(whole | {"model.layers.9.x": torch.ones(1)}, r"does not: model\.layers\.9\.x")
    refused(whole | {name: torch.ones(8, 8)}, rf"{name} has the shape \[8, 8\].* asks for \[192, 128\]")
    refused(whole | {name: torch.full((192, 128), float("nan"))}, "up_proj holds values that are not finite")
    refused(
        whole | {"model.norm.weight": torch.full((128,), float("inf"))}, "model.norm.weight holds values that are not"
    )
    refused(whole | {name: torch.ones((192, 128), dtype=torch.int32)}, "int32")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(BadModel, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_norms_are_floats_as_matrices_are(tmp_path: Path, tiny_vocabulary: Vocabulary, dtype: torch.dtype) -> None:
    file = saved(tmp_path, "Llama", tiny_vocabulary) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, file)
    with pytest.raises(BadModel, match=rf"model\.norm\.weight is of the type {dtype}, which is not read"):
        load(tmp_path)


def test_why_a_file_of_weights_cannot_be_opened_is_told(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary)
    opened = Path.open

    def not_ours(path: Path, *how: Any, **more: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", not_ours)
    with pytest.raises(BadModel, match=r"model\.safetensors cannot be read: Permission denied$"):
        load(tmp_path)


def test_a_group_that_does_not_fit_names_the_layer(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary)
    with pytest.raises(BadModel, match=r"mlp\.down_proj has 192 inputs.*groups of 32, 64 do"):
        load(tmp_path, group_size=128)
    with pytest.raises(BadSetting):
        load(tmp_path, group_size=48)


def test_folders_that_are_none(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    with pytest.raises(BadModel, match="neither"):
        load(tmp_path)
    with pytest.raises(BadModel, match="no model at"):
        load(tmp_path / "nowhere")
    saved(tmp_path, "Llama", tiny_vocabulary)
    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(BadModel, match=r"no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadModel, match="pickles"):
        load(tmp_path)
    with pytest.raises(BadModel, match="pickle"):
        load(tmp_path / "pytorch_model.bin")
    for outside in ("../kept", "gone.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(BadModel, match="names the file"):
            load(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_table_is_refused(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    saved(tmp_path, "Llama", tiny_vocabulary, vocab_size=100)
    last = tiny_vocabulary.tokenizer.id_to_token(tiny_vocabulary.size - 1)
    with pytest.raises(BadModel, match=rf"\('{last}'\), the model's table ends before 100; take those"):
        load(tmp_path)


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
    assert len(list(cache.glob("*.packed"))) == 2

    class Other(Reference):
        layout = "other-1"

    load_base(source, name="tiny", backend=Other(), cache_dir=cache)
    assert len(list(cache.glob("*.packed"))) == 3


def test_a_damaged_cache_is_made_again(
    tmp_path: Path, tiny_vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = saved(tmp_path / "m", "Llama", tiny_vocabulary), tmp_path / "cache"
    first = load(source, cache_dir=cache)
    [path] = cache.glob("*.packed")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert same(first, load(source, cache_dir=cache))
    assert "made again" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_base_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, kind: str, cached: bool
) -> None:
    """Else its cache would hold the weights of one under the digest of the other for good."""
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

    with pytest.raises(BadModel, match="m changed while it was read, or its owner"):
        load_base(tmp_path / "m", name="m", backend=Replacing(), cache_dir=cache if cached else None)
    assert list(cache.glob("base-*")) == []
    assert load(tmp_path / "m", cache_dir=cache)


def test_a_base_that_is_replaced_while_it_is_quantized_is_refused(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    config = source / "config.json"
    with pytest.raises(BadModel, match="m changed while it was read, or its owner"):
        quantize_folder(source, tmp_path / "q", progress=lambda *_: config.write_bytes(config.read_bytes()))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_costs_the_cache_only(
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
    assert seen[-1] == ("loading", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("kind", ["Qwen2", "SmolLM3"])
@pytest.mark.parametrize("settings", [{"double_quant": True}, {"quantization": "nf4"}, {"quantization": "none"}])
def test_a_quantized_folder_loads_again_as_it_is(
    tmp_path: Path, kind: str, settings: dict[str, Any], tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = saved(tmp_path / "m", kind, tiny_vocabulary), tmp_path / "q"
    monkeypatch.setattr("server.model.loader._SHARD", 60_000)
    summary = quantize_folder(source, target, **settings)
    direct = load(source, **settings)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {target.stat().st_mode & 0o666}, "as any file"
    assert summary["bytes"] == direct.nbytes
    assert summary["bits"] == bits(direct.weights[path] for path in direct.shapes())
    monkeypatch.setattr("server.model.checkpoint.quantize", None)
    again = load(target, **settings)
    assert same(direct, again) and again.notes == () and again.config == direct.config
    assert again.quantization == direct.quantization
    other = load(target, quantization="int4", group_size=128)
    assert same(direct, other) and "quantized already" in other.notes[0]
    with pytest.raises(Conflict):
        quantize_folder(source, target)


def test_a_quantize_that_fails_leaves_nothing(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    with pytest.raises(BadModel):
        quantize_folder(source, tmp_path / "q", group_size=256)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("part", ["save_file", "write_folder", "write_json"])
def test_a_disk_that_is_full_says_so(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Each library tells it in a way of its own; what was written by then goes."""
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    errors = {
        "save_file": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "write_folder": Exception("No space left on device (os error 28)"),
        "write_json": OSError(errno.ENOSPC, "No space left on device"),
    }

    def full(*_: object) -> None:
        raise errors[part]

    monkeypatch.setattr(f"server.model.loader.{part}", full)
    with pytest.raises(BadSetting, match=r"/q cannot be written: No space left on device$") as e:
        quantize_folder(source, tmp_path / "q")
    assert e.value.param == "target" and [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_a_killed_quantize_left_goes_with_the_next_for_the_same_target(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    """And nothing of one that runs, which holds a lock, nor of another target."""
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    left, mine, running, other, longer = (
        tmp_path / f".{name}.partial" for name in ("q.99999", f"q.{os.getpid()}", "q.1", "r.99999", "q.v2.99999")
    )
    for folder in (left, mine, running, other, longer):
        folder.mkdir()
        (folder / "weights-00001.safetensors").write_bytes(b"part")
    handle = os.open(running, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        quantize_folder(source, tmp_path / "q")
    finally:
        os.close(handle)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "q", running.name, other.name, longer.name}


def test_a_folder_of_another_run_is_left_alone_by_one_of_the_same_number(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    """Processes of two containers may both be number 1."""
    source, others = saved(tmp_path / "m", "Llama", tiny_vocabulary), tmp_path / f".q.{os.getpid()}.partial"
    others.mkdir()
    handle = os.open(others, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(BadSetting, match="File exists"):
            quantize_folder(source, tmp_path / "q")
    finally:
        os.close(handle)
    assert others.is_dir() and not (tmp_path / "q").exists()


def test_who_quantizes_holds_its_folder(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source, seen = saved(tmp_path / "m", "Llama", tiny_vocabulary), set[str]()

    def another(*_: object) -> None:
        _remove_abandoned(tmp_path / "q")
        seen.update(path.name for path in tmp_path.iterdir())

    quantize_folder(source, tmp_path / "q", progress=another)
    assert seen == {"m", f".q.{os.getpid()}.partial"}


def test_a_disk_that_takes_no_more(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source, before = saved(tmp_path / "m", "Llama", tiny_vocabulary), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(BadSetting, match=r"/q cannot be written: File too large"):
            quantize_folder(source, tmp_path / "q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_cache_of_another_reading_of_the_same_files_is_made_again(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = saved(tmp_path / "m", "Llama", tiny_vocabulary), tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(ModelConfig, "table_shapes", lambda c: {"model.embed_tokens": (c.vocab_size, c.hidden_size)})
        patched.setattr("server.model.checkpoint._check_names", lambda *_: None)
        assert "lm_head" not in load(source, cache_dir=cache).weights
    assert same(load(source, cache_dir=cache), load(source))


def test_a_gguf_of_which_no_config_json_can_tell_is_not_quantized_to_a_folder(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    """Qwen2's tensors, whose o_proj has no bias, in a file that says it is a llama."""
    path = to_gguf(tmp_path / "m.gguf", "Qwen2", tiny_vocabulary, TYPES.F32, TYPES.F32)
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"llama"))
    assert load(path).config.architecture == "LlamaForCausalLM"
    with pytest.raises(BadModel, match="output_bias"):
        quantize_folder(path, tmp_path / "q")
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("named", [3, [], ["model.safetensors"], "model.safetensors", None])
def test_an_index_that_names_no_files(tmp_path: Path, tiny_vocabulary: Vocabulary, named: object) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(BadModel, match=r"model\.safetensors\.index\.json is not whole: its weight_map"):
        load(source)


def test_a_damaged_quantized_folder_is_refused(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    target = tmp_path / "q"
    quantize_folder(saved(tmp_path / "m", "Llama", tiny_vocabulary), target)
    manifest = json.loads((target / "loramux.json").read_text())
    for change, said in [({"format": 9}, "format 9"), ({"weights": None}, "not whole"), ({"files": []}, "lacks")]:
        (target / "loramux.json").write_text(json.dumps(manifest | change))
        with pytest.raises(BadModel, match=said):
            load(target)


def test_parts_of_a_wrong_type_or_shape_never_reach_a_kernel(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    target = tmp_path / "q"
    quantize_folder(saved(tmp_path / "m", "Llama", tiny_vocabulary), target, double_quant=True)
    [path] = target.glob("*.safetensors")
    whole, stem = load_file(path), "model.layers.2.mlp.down_proj"
    for part in ("codes", "scale_codes", "zero_step"):
        for wrong in (whole[f"{stem}.{part}"][:-1].clone(), whole[f"{stem}.{part}"].to(torch.int16)):
            save_file(whole | {f"{stem}.{part}": wrong}, path)
            with pytest.raises(BadModel, match="down_proj is not a matrix of 128 by 192 in int4"):
                load(target)
    for name in (f"{stem}.scale_step", "model.norm.weight"):
        save_file(whole | {name: torch.full_like(whole[name], float("inf"))}, path)
        with pytest.raises(BadModel, match=f"{name} holds values that are not finite"):
            load(target)
    save_file(whole, path)
    manifest = json.loads((target / "loramux.json").read_text())
    manifest["weights"][stem]["group"] = 48
    (target / "loramux.json").write_text(json.dumps(manifest))
    with pytest.raises(BadModel, match="groups of 48"):
        load(target)


def test_codes_of_an_unquantized_folder_are_floats_of_the_whole_matrix(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    target, stem = tmp_path / "q", "model.layers.2.mlp.down_proj"
    quantize_folder(saved(tmp_path / "m", "Llama", tiny_vocabulary), target, quantization="none")
    [path] = target.glob("*.safetensors")
    whole = load_file(path)
    codes = whole[f"{stem}.codes"]
    for wrong in (codes[:-1].clone(), codes[:, :-1].clone(), codes.to(torch.int16)):
        save_file(whole | {f"{stem}.codes": wrong}, path)
        with pytest.raises(BadModel, match="down_proj is not a matrix of 128 by 192 in none"):
            load(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_none_keeps_the_floats_that_the_file_has(
    tmp_path: Path, tiny_vocabulary: Vocabulary, dtype: torch.dtype
) -> None:
    """In a written folder, and for the kernels, of which the native ones have bf16. What people read says so."""
    folder = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    [path] = folder.glob("*.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    quantize_folder(folder, tmp_path / "q", quantization="none")
    for base in (load(folder, quantization="none"), load(tmp_path / "q")):
        assert {weight.tensors["codes"].dtype for weight in base.weights.values()} == {dtype}
        assert {pack(weight).tensors["codes"].dtype for weight in base.weights.values()} == {torch.bfloat16}
    assert "none keeps the file's floats" in str(Settings.model_fields["quantization"].description)


def test_a_quantized_folder_has_the_parts_of_its_manifest_and_no_others(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    target, stem = tmp_path / "q", "model.layers.2.mlp.down_proj"
    quantize_folder(saved(tmp_path / "m", "Llama", tiny_vocabulary), target)
    [path] = target.glob("*.safetensors")
    whole = load_file(path)
    save_file({name: tensor for name, tensor in whole.items() if name != f"{stem}.codes"}, path)
    with pytest.raises(BadModel, match=rf"lacks {stem}\.codes"):
        load(target)
    save_file(whole | {f"{stem}.more": torch.ones(1)}, path)
    with pytest.raises(BadModel, match=rf"does not: {stem}\.more"):
        load(target)
    save_file(whole, path)
    manifest = json.loads((target / "loramux.json").read_text())
    for change, said in (
        ({"files": [f"../q/{path.name}"]}, r"names the file '\.\./q/"),
        ({"weights": {**manifest["weights"], stem: {**manifest["weights"][stem], "group": 128}}}, "do not divide 192"),
    ):
        (target / "loramux.json").write_text(json.dumps(manifest | change))
        with pytest.raises(BadModel, match=said):
            load(target)


def test_shards_lie_in_the_folder_and_have_each_tensor_once(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, "../elsewhere.safetensors")}))
    with pytest.raises(BadModel, match=r"names the file '\.\./elsewhere\.safetensors'"):
        load(source)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, "x" * 10**6)}))
    with pytest.raises(BadModel, match=r"^the model names the file 'x+"):
        load(source)
    names = sorted(whole)
    for file, those in (("one", names[:9]), ("two", names[8:])):
        save_file({name: whole[name] for name in those}, source / f"{file}.safetensors")
    told = dict.fromkeys(names[:9], "one.safetensors") | dict.fromkeys(names[9:], "two.safetensors")
    index.write_text(json.dumps({"weight_map": told}))
    with pytest.raises(BadModel, match=rf"{names[8]} is in both one\.safetensors and two\.safetensors"):
        load(source)


def test_every_file_that_a_base_is_read_from_is_of_its_id(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    """Adapters are for one base, and a packed file too."""
    source = saved(tmp_path, "Llama", tiny_vocabulary, "200KB")
    ids = {load(source).id}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        file = source / name
        file.write_text(file.read_text() + "\n")
        ids.add(load(source).id)
    for name in ("chat_template.jinja", "generation_config.json"):
        (source / name).write_text("{}")
        ids.add(load(source).id)
    (source / "README.md").write_text("not of it")
    assert load(source).id in ids and len(ids) == 7


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_not_read_by_whatever_name(tmp_path: Path, tiny_vocabulary: Vocabulary, suffix: str) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(BadModel, match="is a pickle, which can run code"):
        load(tmp_path / f"model{suffix}")
    saved(tmp_path, "Llama", tiny_vocabulary)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadModel, match="no model.safetensors" if suffix == ".ckpt" else "holds pickles"):
        load(tmp_path)


# -- GGUF


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
    """A tiny model as llama.cpp's converter would write it, the order of q and k included.

    A vocabulary of SentencePiece's kind is given as its metadata. `more` are vectors by their names in the file.
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


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_tensors_arrive_in_transformers_order(tmp_path: Path, kind: str, tiny_vocabulary: Vocabulary) -> None:
    changes = {"attention_bias": True} if kind in ("Llama", "SmolLM3") else {}
    changes |= {"tie_word_embeddings": True} if kind == "Llama" else {}
    changes |= {"sliding_window": None} if kind == "Mistral" else {}
    path = to_gguf(tmp_path / "m.gguf", kind, tiny_vocabulary, TYPES.F32, TYPES.F32, **changes)
    base = load(path, quantization="none")
    expected = tiny_model(kind, **changes).state_dict()
    for module, weight in base.weights.items():
        assert torch.equal(dequantize_stored(weight), expected[f"{module}.weight"]), module
    for name, tensor in base.tensors.items():
        assert torch.equal(tensor, expected[name]), name
    assert ("lm_head" in base.weights) is (kind != "Llama")
    assert base.config.no_rope_layers == ((1, 1, 1, 0) if kind == "SmolLM3" else ())
    assert base.vocabulary.special == tiny_vocabulary.special


@pytest.mark.parametrize("linear", [TYPES.Q4_0, TYPES.Q4_1])
def test_gguf_blocks_are_taken_over_without_loss(tmp_path: Path, linear: TYPES, tiny_vocabulary: Vocabulary) -> None:
    base = load(to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, linear, TYPES.Q8_0))
    expected = tiny_model("Llama").state_dict()
    for module, weight in base.weights.items():
        kind = linear if module in base.shapes() else TYPES.Q8_0
        values = gguf.quants.quantize(expected[f"{module}.weight"].numpy(), kind)
        assert torch.equal(dequantize_stored(weight), torch.from_numpy(gguf.quants.dequantize(values, kind))), module
    assert base.bits == 5.0 and base.notes == ()
    assert base.quantization["group"] == 32


def test_other_gguf_types_are_quantized_again_and_it_says_so(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q5_1, TYPES.Q8_0)
    base = load(path)
    assert base.notes == ("28 tensors of the GGUF type Q5_1 were re-quantized",)
    assert {(w.scheme, w.group) for p, w in base.weights.items() if p in base.shapes()} == {("int4", 32)}
    expected = tiny_model("Llama").state_dict()["model.layers.0.self_attn.k_proj.weight"]
    got = dequantize_stored(base.weights["model.layers.0.self_attn.k_proj"])
    assert float((got - expected).norm() / expected.norm()) < 0.09
    cache = tmp_path / "cache"
    assert load(path, cache_dir=cache).notes == load(path, cache_dir=cache).notes == base.notes
    assert load(path, double_quant=True).weights["model.layers.0.self_attn.q_proj"].double_quantized
    assert load(path, quantization="nf4").quantization["group"] == 64
    widened = load(path, quantization="none").notes
    assert widened and all(note.endswith("were widened to bf16") for note in widened)


def test_gguf_groups_asked_for_are_given(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    base = load(to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0), group_size=64)
    assert base.quantization["group"] == 64 and "Q4_0 were re-quantized" in base.notes[0]


def test_a_gguf_quantizes_to_a_folder(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_1, TYPES.Q8_0)
    quantize_folder(path, tmp_path / "q")
    direct, again = load(path), load(tmp_path / "q")
    assert same(direct, again) and again.config == direct.config and again.notes == ()
    assert again.vocabulary.special == direct.vocabulary.special
    assert again.vocabulary.eos_ids == direct.vocabulary.eos_ids


def test_a_gguf_of_sentencepiece_s_kind_is_read_and_quantized_to_a_folder(
    tmp_path: Path, spm_metadata: dict[str, Any]
) -> None:
    told = spm_metadata | {"tokenizer.ggml.add_space_prefix": False}
    path = to_gguf(tmp_path / "m.gguf", "Llama", told, TYPES.Q4_0, TYPES.Q8_0, vocab_size=400)
    quantize_folder(path, tmp_path / "q")
    for base in (load(path), load(tmp_path / "q")):
        vocabulary = base.vocabulary
        assert (vocabulary.bos_id, vocabulary.add_bos, vocabulary.eos_ids) == (1, True, frozenset({2}))
        assert vocabulary.tokenizer.encode("the theory 日").tokens == [
            *("the", "▁the", "ory", "▁"),
            *("<0xE6>", "<0x97>", "<0xA5>"),
        ]


def test_gguf_tensors_that_do_not_belong_are_named(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Qwen2", tiny_vocabulary, TYPES.F32, TYPES.F32)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(BadModel, match=r"blk\.1\.ffn_xx\.weight"):
        load(path)
    for number in ("\u00b2", "01", "+1"):
        with pytest.raises(BadModel, match="which no architecture that is served has"):
            load(to_gguf(path, "Llama", tiny_vocabulary, TYPES.F32, TYPES.F32, {f"blk.{number}.attn_q.bias": [0.0]}))
    with pytest.raises(BadModel, match=r"^the model has tensors that its config does not: model\.layers\.9"):
        load(to_gguf(path, "Llama", tiny_vocabulary, TYPES.F32, TYPES.F32, {f"blk.{'9' * 5000}.attn_q.bias": [0.0]}))
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(BadModel, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path)


def test_the_divisors_of_llama_3_are_its_scaling_and_no_weight(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    more = {"rope_freqs.weight": llama3_divisors(scaling, 10000.0, 32)}
    base = load(to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0, more))
    plain = load(to_gguf(tmp_path / "p.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0))
    assert base.config.rope_scaling == scaling and same(base, plain) and base.id != plain.id
    rows = {"rope_freqs.weight": np.reshape(more["rope_freqs.weight"], (2, -1))}
    assert (
        load(to_gguf(tmp_path / "r.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0, rows)).config == base.config
    )
    quantize_folder(tmp_path / "m.gguf", tmp_path / "q")
    assert load(tmp_path / "q").config == base.config


def test_what_a_gguf_is_taken_over_as_is_what_was_asked_for(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    double = load(path, double_quant=True)
    assert double.weights["model.layers.0.mlp.up_proj"].double_quantized and "Q4_0 were re-quantized" in double.notes[0]
    assert load(path, table_bits=16).weights["lm_head"].tensors["codes"].dtype == torch.bfloat16
    half = load(to_gguf(tmp_path / "h.gguf", "Llama", tiny_vocabulary, TYPES.F16, TYPES.F16))
    assert half.notes == (), "nothing was quantized before"


def test_a_part_of_a_gguf_and_one_of_several_are_no_model(
    tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    path = to_gguf(tmp_path / "m" / "a.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    parts = 1

    class Part(GgufFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.metadata = {**self.metadata, "split.count": parts}

    monkeypatch.setattr("server.model.checkpoint.GgufFile", Part)
    assert load(tmp_path / "m").id == load(path).id
    parts = 2
    with pytest.raises(BadModel, match=r"a\.gguf is one of 2 parts"):
        load(path)
    path.with_name("b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(BadModel, match="exactly one GGUF file"):
        load(tmp_path / "m")


def test_a_vector_of_a_gguf_that_is_not_finite_is_named(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    norm = tiny_model("Llama").state_dict()["model.norm.weight"]
    data, wrong = path.read_bytes(), norm.clone()
    wrong[3] = float("nan")
    assert data.count(norm.numpy().tobytes()) == 1
    path.write_bytes(data.replace(norm.numpy().tobytes(), wrong.numpy().tobytes()))
    with pytest.raises(BadModel, match=r"model\.norm\.weight holds values that are not finite"):
        load(path)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "none"])
@pytest.mark.parametrize("kernels", ["reference", "aten", "auto"])
def test_an_adapters_bytes_are_known_before_it_is_read(tiny_base: Base, kernels: str, scheme: str) -> None:
    base = replace(tiny_base, backend=choose(kernels, "cpu"), quantization={"scheme": scheme})
    size, generator = base.sizes(), torch.Generator().manual_seed(1)
    for ranks in ([1, 2, 3], [7, 16, 17], [64]):
        modules = {
            path: LowRank(torch.randn(r, into, generator=generator), torch.randn(out, r, generator=generator), 2.0)
            for (path, (out, into)), r in zip(base.shapes().items(), cycle(ranks), strict=False)
        }
        told = {path: (m.rank, *m.shape) for path, m in modules.items()}
        assert size(told) == base.prepare(LoraWeights("a", "a" * 64, modules)).nbytes
    assert size({**told, "model.elsewhere": (1, 2, 3)}) is None
