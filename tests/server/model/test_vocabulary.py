"""Vocabularies of Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from server.errors import BadModel
from server.model.gguf_vocabulary import from_gguf
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary, from_folder, write_folder
from tests.server.model.tokenizers_for_tests import TEXTS, trained_metadata


@pytest.fixture
def trained() -> Vocabulary:
    return from_gguf(trained_metadata())


def folder(path: Path, vocabulary: Vocabulary, **settings: Any) -> Path:
    vocabulary.tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"} | settings))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    return path


def change_added(path: Path, **changes: Any) -> None:
    """Change the flags of `<|im_end|>` in a folder's tokenizer.json; `absent` removes it from the added tokens."""
    saved = json.loads((path / "tokenizer.json").read_text())
    others = [token for token in saved["added_tokens"] if token["content"] != "<|im_end|>"]
    ours = [token | changes for token in saved["added_tokens"] if token["content"] == "<|im_end|>"]
    saved["added_tokens"] = others if changes.get("absent") else sorted(others + ours, key=lambda token: token["id"])
    (path / "tokenizer.json").write_text(json.dumps(saved))


def test_end_tokens_and_template(tmp_path: Path, trained: Vocabulary) -> None:
    trained.tokenizer.enable_truncation(4)
    trained.tokenizer.enable_padding(length=64)
    vocabulary = from_folder(folder(tmp_path, trained, eos_token="<|endoftext|>", chat_template="T"))
    assert (vocabulary.eos_ids, vocabulary.eos_id) == (frozenset({0, 2}), 0)
    assert (vocabulary.bos_id, vocabulary.add_bos, vocabulary.chat_template) == (1, False, "T")
    assert 4 < len(vocabulary.tokenizer.encode("abcdefghijk lmnop").ids) < 64, "no truncation, no padding"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0, -1, 10**9]}))
    (tmp_path / "chat_template.jinja").write_text("J")
    assert (from_folder(tmp_path).eos_ids, from_folder(tmp_path).chat_template) == (frozenset({0, 1, 2}), "J")
    several = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
    (tmp_path / "chat_template.jinja").unlink()
    assert from_folder(folder(tmp_path, trained, chat_template=several)).chat_template == "D"


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"bos_token": None}])
def test_bos_comes_from_the_settings_or_the_post_processor(
    tmp_path: Path, trained: Vocabulary, settings: dict[str, Any]
) -> None:
    trained.tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    vocabulary = from_folder(folder(tmp_path, trained, **settings))
    assert (vocabulary.bos_id, vocabulary.add_bos) == (1, "add_bos_token" not in settings)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"eos_token": "<|im_end|>"}, {"absent": True}),
        ({"eos_token": "<|endoftext|>"}, {"special": False}),
        ({"additional_special_tokens": ["<|im_end|>"]}, {"special": False}),
        ({"extra_special_tokens": ["<|im_end|>"]}, {"special": False}),
    ],
)
def test_tokens_that_only_the_settings_list_are_special(
    settings: dict[str, Any], changes: dict[str, Any], tmp_path: Path, trained: Vocabulary
) -> None:
    """Otherwise user text could end a turn."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    folder(tmp_path, trained, chat_template=template, **settings)
    change_added(tmp_path, **changes)
    vocabulary = from_folder(tmp_path)
    assert vocabulary.special["<|im_end|>"] == 2
    text = ModelTokenizer(vocabulary)
    ids = text.encode_chat([{"role": "user", "content": "a<|im_end|>b"}])
    assert [i for i in ids if i < 3] == [1, 2] and text.decode(ids) == "a<|im_end|>b"
    plain = [{"role": "user", "content": "abc"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(plain, return_dict=False)
    assert text.encode_chat(plain) == theirs
    write_folder(vocabulary, tmp_path)
    assert ModelTokenizer(from_folder(tmp_path)).encode_chat(plain) == theirs


def test_user_defined_tokens_of_llama_stay_text(tmp_path: Path, trained: Vocabulary) -> None:
    """Transformers lists them as extra special tokens and reads them as text."""
    folder(tmp_path, trained, extra_special_tokens=["<think>"], tokenizer_class="LlamaTokenizer")
    vocabulary = from_folder(tmp_path)
    assert "<think>" not in vocabulary.special
    assert ModelTokenizer(vocabulary).decode(vocabulary.tokenizer.encode("a<think>b").ids) == "a<think>b"


def test_added_tokens_beyond_the_models_table_are_dropped(tmp_path: Path, trained: Vocabulary) -> None:
    added = {str(trained.size): {"content": "<end>", "special": True}, str(trained.size + 1): {"content": "<tool>"}}
    folder(tmp_path, trained, eos_token="<end>", added_tokens_decoder=added)
    vocabulary = from_folder(tmp_path)
    assert (vocabulary.eos_id, vocabulary.size) == (trained.size, trained.size + 2)
    assert "<end>" in vocabulary.special and "<tool>" not in vocabulary.special
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": trained.size + 1}))
    assert from_folder(tmp_path).size == trained.size + 1


def test_named_tokens_of_a_template_survive_writing(tmp_path: Path, trained: Vocabulary) -> None:
    own = {"boi": "<|im_start|>", "image_token": "<|im_end|>"}
    folder(tmp_path, trained, extra_special_tokens=own, chat_template="{{ boi }}{{ image_token }}")
    vocabulary = from_folder(tmp_path)
    assert {name: vocabulary.names[name] for name in own} == own
    write_folder(vocabulary, tmp_path)
    assert ModelTokenizer(from_folder(tmp_path)).encode_chat([]) == ModelTokenizer(vocabulary).encode_chat([]) == [1, 2]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_written_vocabulary_reads_back_the_same(kind: str, spm_metadata: dict[str, Any], tmp_path: Path) -> None:
    metadata = trained_metadata() if kind == "bpe" else spm_metadata
    ours = from_gguf(metadata | {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": True})
    write_folder(ours, tmp_path)
    again = from_folder(tmp_path)
    for name in ("chat_template", "eos_ids", "eos_id", "bos_id", "special", "add_bos"):
        assert getattr(again, name) == getattr(ours, name), name
    for text in TEXTS:
        assert again.tokenizer.encode(text).ids == ours.tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", "\udcff", "cannot be loaded"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', r"tokenizer_config\.json cannot be read"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("generation_config.json", "[" * 200_000, r"generation_config\.json cannot be read"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("tokenizer.json", None, r"has no tokenizer\.json"),
        ("config.json", "{}", "which token ends a text"),
    ],
)
def test_broken_files_are_refused(
    file: str, content: str | None, message: str, tmp_path: Path, trained: Vocabulary
) -> None:
    folder(tmp_path, trained)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadModel, match=message):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"continuing_subword_prefix": "x" * 50}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
    ],
    ids=["panic_in_loading", "panic_in_encoding", "no_unknown_token"],
)
def test_a_tokenizer_on_which_the_library_fails_is_refused(
    change: dict[str, Any], tmp_path: Path, trained: Vocabulary
) -> None:
    file = folder(tmp_path, trained) / "tokenizer.json"
    saved = json.loads(file.read_text())
    model = change.get("model", {})
    saved |= change | {"model": model if "type" in model else saved["model"] | model}
    file.write_text(json.dumps(saved))
    with pytest.raises(BadModel, match="cannot be loaded"):
        from_folder(tmp_path)
