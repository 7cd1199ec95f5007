"""`load_base` from GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from server.errors import BadModel
from server.kernels.packed_format import dequantize_stored
from server.model.config import RopeScaling
from server.model.gguf_config import llama3_divisors
from server.model.gguf_file import GgufFile
from server.model.quantized_folder import quantize_folder
from server.model.vocabulary import Vocabulary
from tests.server.model.tiny_models import KINDS, TYPES, load, same, tiny_model, to_gguf


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_in_transformers_order(tmp_path: Path, kind: str, tiny_vocabulary: Vocabulary) -> None:
    changes: dict[str, Any] = {"attention_bias": True} if kind in ("Llama", "SmolLM3") else {}
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
def test_4_and_8_bit_blocks_are_used_without_loss(tmp_path: Path, linear: TYPES, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, linear, TYPES.Q8_0)
    base = load(path)
    expected = tiny_model("Llama").state_dict()
    for module, weight in base.weights.items():
        kind = linear if module in base.shapes() else TYPES.Q8_0
        values = gguf.quants.quantize(expected[f"{module}.weight"].numpy(), kind)
        assert torch.equal(dequantize_stored(weight), torch.from_numpy(gguf.quants.dequantize(values, kind))), module
    assert base.bits == 5.0 and base.notes == () and base.quantization["group"] == 32
    quantize_folder(path, tmp_path / "q")
    again = load(tmp_path / "q")
    assert same(base, again) and again.config == base.config and again.notes == ()
    assert again.vocabulary.special == base.vocabulary.special
    assert again.vocabulary.eos_ids == base.vocabulary.eos_ids


def test_other_types_are_quantized_again_with_a_note(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q5_1, TYPES.Q8_0)
    base, cache = load(path), tmp_path / "cache"
    assert base.notes == ("28 tensors of the GGUF type Q5_1 were re-quantized",)
    assert {(w.scheme, w.group) for p, w in base.weights.items() if p in base.shapes()} == {("int4", 32)}
    expected = tiny_model("Llama").state_dict()["model.layers.0.self_attn.k_proj.weight"]
    got = dequantize_stored(base.weights["model.layers.0.self_attn.k_proj"])
    assert float((got - expected).norm() / expected.norm()) < 0.09
    assert load(path, cache_dir=cache).notes == load(path, cache_dir=cache).notes == base.notes
    assert load(path, quantization="nf4").quantization["group"] == 64
    widened = load(path, quantization="none").notes
    assert widened and all(note.endswith("were widened to bf16") for note in widened)


def test_settings_that_the_blocks_do_not_have_requantize(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    double, group = load(path, double_quant=True), load(path, group_size=64)
    assert double.weights["model.layers.0.mlp.up_proj"].double_quantized and group.quantization["group"] == 64
    assert all("Q4_0 were re-quantized" in base.notes[0] for base in (double, group))
    assert load(path, table_bits=16).weights["lm_head"].tensors["codes"].dtype == torch.bfloat16
    assert load(to_gguf(tmp_path / "h", "Llama", tiny_vocabulary, TYPES.F16, TYPES.F16)).notes == ()


def test_a_sentencepiece_vocabulary(tmp_path: Path, spm_metadata: dict[str, Any]) -> None:
    metadata = spm_metadata | {"tokenizer.ggml.add_space_prefix": False}
    path = to_gguf(tmp_path / "m.gguf", "Llama", metadata, TYPES.Q4_0, TYPES.Q8_0, vocab_size=400)
    quantize_folder(path, tmp_path / "q")
    for base in (load(path), load(tmp_path / "q")):
        vocabulary = base.vocabulary
        assert (vocabulary.bos_id, vocabulary.add_bos, vocabulary.eos_ids) == (1, True, frozenset({2}))
        tokens = vocabulary.tokenizer.encode("the theory 日").tokens
        assert tokens == ["the", "▁the", "ory", "▁", "<0xE6>", "<0x97>", "<0xA5>"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", r"blk\.1\.ffn_xx\.weight"),
        (b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight", r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (b"blk.1.ffn_up.weight", b"blk.+.ffn_up.weight", "which is not supported"),
    ],
)
def test_unknown_and_missing_tensors_are_named(
    tmp_path: Path, tiny_vocabulary: Vocabulary, old: bytes, new: bytes, message: str
) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Qwen2", tiny_vocabulary, TYPES.F32, TYPES.F32)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(BadModel, match=message):
        load(path)


def test_rope_freqs_are_a_llama3_scaling(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    divisors = llama3_divisors(scaling, 10000.0, 32)
    plain = load(to_gguf(tmp_path / "p.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0))
    for more in (divisors, np.reshape(divisors, (2, -1))):
        path = to_gguf(tmp_path / "m", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0, {"rope_freqs.weight": more})
        base = load(path)
        assert base.config.rope_scaling == scaling and same(base, plain) and base.id != plain.id


def test_folders_and_parts(tmp_path: Path, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    path = to_gguf(tmp_path / "m" / "a.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    assert load(tmp_path / "m").id == load(path).id
    path.with_name("b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(BadModel, match="exactly one GGUF file"):
        load(tmp_path / "m")

    class Part(GgufFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.metadata = {**self.metadata, "split.count": 2}

    monkeypatch.setattr("server.model.gguf_checkpoint.GgufFile", Part)
    with pytest.raises(BadModel, match=r"a\.gguf is one of 2 parts"):
        load(path)


def test_non_finite_vectors_are_named(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    path = to_gguf(tmp_path / "m.gguf", "Llama", tiny_vocabulary, TYPES.Q4_0, TYPES.Q8_0)
    norm = tiny_model("Llama").state_dict()["model.norm.weight"]
    wrong = norm.clone()
    wrong[3] = float("nan")
    path.write_bytes(path.read_bytes().replace(norm.numpy().tobytes(), wrong.numpy().tobytes()))
    with pytest.raises(BadModel, match=r"model\.norm\.weight holds values that are not finite"):
        load(path)
