"""Tokenizers rebuilt from GGUF metadata, against the originals' pre-tokenizers and SentencePiece's merge rule."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from server.errors import BadModel
from server.model.gguf_vocabulary import BYTE, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, from_gguf
from tests.server.model.tokenizers_for_tests import TEXTS, trained_metadata

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Segmentations by the package sentencepiece 0.2.3 with the vocabulary of `spm_metadata`.
SEGMENTATIONS = {
    "the theory of the other": "▁the ▁the ory ▁o f ▁the ▁other",
    "he says:  'no',\n\nyes!": "▁he ▁say s : ▁ ▁' no ', <0x0A> <0x0A> y es !",
    "a              b": "▁a ▁▁▁▁▁▁▁▁ ▁▁▁▁▁ ▁b",
    "   ": "▁▁▁▁",
    "café naïve größer": "▁c afé ▁ naï ve ▁ gr öß er",
    "12 and 1234": "▁ 1 2 ▁and ▁ 1 2 3 4",
    "日本 😀": "▁ <0xE6> <0x97> <0xA5> <0xE6> <0x9C> <0xAC> ▁ <0xF0> <0x9F> <0x98> <0x80>",
    "</s> <0x41> [x]": "▁ <0x3C> <0x2F> s <0x3E> ▁ <0x3C> 0 <0x78> 4 1 <0x3E> ▁ <0x5B> <0x78> <0x5D>",
    " the": "▁ ▁the",
    "": "",
}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return trained_metadata()


def ggml(metadata: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "tekken", "qwen2", "deepseek-r1-qwen"])
def test_byte_level_ids_equal_those_of_the_original_pre_tokenizer(trained: dict[str, Any], pre: str) -> None:
    ours = from_gguf(ggml(trained, pre=pre)).tokenizer
    splitters: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        splitters.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre != "gpt-2":
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        splitters = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    pairs = [tuple(merge.split(" ")) for merge in trained["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(trained["tokenizer.ggml.tokens"])}
    theirs = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=PRE_TOKENIZERS[pre].ignore_merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    theirs.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    theirs.add_tokens([AddedToken("<think>", normalized=False)])
    rng = random.Random(0)
    ranges = [(32, 127), (160, 0x2FFF), (0x3000, 0xD7FF), (0x1F300, 0x1F6FF)]
    for text in TEXTS + ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(200)]:
        normal = ours.normalizer.normalize_str(text) if ours.normalizer is not None else text
        assert ours.encode(text).ids == theirs.encode(normal).ids, text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == normal


def test_special_and_added_tokens(trained: dict[str, Any]) -> None:
    vocabulary = from_gguf(trained)
    assert vocabulary.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (vocabulary.eos_ids, vocabulary.bos_id, vocabulary.add_bos) == (frozenset({2}), 1, False)
    think = len(trained["tokenizer.ggml.tokens"]) - 1
    assert vocabulary.tokenizer.encode("<|im_start|>a<think>").ids[::2] == [1, think]
    assert vocabulary.chat_template == "{{ messages }}"
    more = from_gguf(ggml(trained, eot_token_id=0, add_bos_token=True))
    assert more.eos_ids == frozenset({0, 2}) and more.add_bos
    assert from_gguf(ggml(trained, pre="llama-bpe")).add_bos
    types = [3, 3, 1, *trained["tokenizer.ggml.token_type"][3:]]
    assert from_gguf(ggml(trained, token_type=types)).special["<|im_end|>"] == 2, "an end token typed as normal"


def test_unused_tokens_are_dropped(trained: dict[str, Any]) -> None:
    """Converters write one for each padding row of the table."""
    tokens, types = trained["tokenizer.ggml.tokens"], trained["tokenizer.ggml.token_type"]
    pad, stop = len(tokens), len(tokens) + 1
    padded = ggml(trained, tokens=[*tokens, "[PAD1]", "<|stop|>"], token_type=[*types, 5, 5], eot_token_id=stop)
    vocabulary, before = from_gguf(padded), from_gguf(trained)
    assert vocabulary.tokenizer.id_to_token(pad) is None
    assert vocabulary.eos_ids == before.eos_ids | {stop}, "one with a meaning is kept"
    text = "a text [PAD1], and more"
    assert vocabulary.tokenizer.encode(text).ids == before.tokenizer.encode(text).ids
    unused = ggml(trained, token_type=[5 if kind == 1 else kind for kind in types])
    assert from_gguf(unused).tokenizer.encode("the model").ids, "one that merges need is kept"


@pytest.mark.parametrize(
    ("name", "kind", "ends"),
    [("<|eot_id|>", 3, True), ("<|end|>", 4, True), ("<|end|>", 1, False), ("</s>", 3, True), ("</s>", 4, False)],
)
def test_known_end_tokens_end_answers_without_being_named(
    trained: dict[str, Any], name: str, kind: int, ends: bool
) -> None:
    tokens, types = list(trained["tokenizer.ggml.tokens"]), list(trained["tokenizer.ggml.token_type"])
    tokens[-1], types[-1] = name, kind
    vocabulary = from_gguf(ggml(trained, tokens=tokens, token_type=types))
    assert (len(tokens) - 1 in vocabulary.eos_ids) is ends and (name in vocabulary.special) is ends
    named = {key: value for key, value in trained.items() if key != "tokenizer.ggml.unknown_token_id"}
    assert from_gguf(named).eos_ids == {0, 2} and from_gguf(trained).eos_ids == {2}, "not the unknown token"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "bloom"}, "pre-tokenizer 'bloom' is not supported"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"model": "t5"}, "tokenizer 't5' is not supported"),
        ({"eos_token_id": 10**6}, "eos_token_id of the GGUF file is 1000000"),
        ({"eos_token_id": None}, "which token ends a text"),
        ({"tokens": [1, 2]}, "do not fit"),
        ({"token_type": [1]}, "do not fit"),
        ({"merges": 3}, "broken"),
        ({"merges": ["nonsense"]}, "broken"),
        ({"merges": ["never seen"]}, "broken"),
    ],
)
def test_broken_or_unsupported_tokenizers_are_refused(
    trained: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadModel, match=message):
        from_gguf(ggml(trained, **change))
    with pytest.raises(BadModel, match=r"lacks tokenizer\.ggml\.tokens"):
        from_gguf({k: v for k, v in trained.items() if k != "tokenizer.ggml.tokens"})
    with pytest.raises(BadModel, match="chat_template"):
        from_gguf(trained | {"tokenizer.chat_template": 3})


# SentencePiece


def plain(metadata: Mapping[str, Any], **changes: Any) -> Tokenizer:
    """The tokenizer as the server uses it: special tokens in text are plain text."""
    tokenizer = from_gguf(ggml(metadata, **changes)).tokenizer
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def bare(spm_metadata: dict[str, Any]) -> Tokenizer:
    return plain(spm_metadata, add_space_prefix=False)


def greedy(text: str, scores: Mapping[str, float]) -> list[str]:
    """SentencePiece's rule: merge the adjacent pair with the best score, the leftmost of equal ones."""
    parts = list(text)
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        joined = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not joined:
            break
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [name for part in parts for name in ([part] if part in scores else [BYTES[b] for b in part.encode()])]


def test_segmentations_equal_those_of_sentencepiece(spm_metadata: dict[str, Any], bare: Tokenizer) -> None:
    tokenizer = plain(spm_metadata)
    for text, pieces in SEGMENTATIONS.items():
        assert tokenizer.encode(text).tokens == pieces.split(), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert bare.encode(f" {text}" if text else "").tokens == pieces.split(), text
        assert bare.decode(bare.encode(text).ids) == text


@given(text=st.text("theran oi's \n▁é日1\"", max_size=60) | st.text(max_size=30))
def test_any_text_is_split_by_the_greedy_rule(spm_metadata: dict[str, Any], bare: Tokenizer, text: str) -> None:
    tokens, scores = spm_metadata["tokenizer.ggml.tokens"], spm_metadata["tokenizer.ggml.scores"]
    known = {t: float(s) for t, s in zip(tokens[259:], scores[259:], strict=True)}
    assert bare.encode(text).tokens == greedy(text.replace(" ", "▁"), known)


@given(st.data())
def test_any_scores_give_the_greedy_rule(data: st.DataObject) -> None:
    """Small alphabets, where tokens overlap in every way, and runs of one letter that share a score."""
    letters = data.draw(st.sampled_from(["a", "ab", "abc"]))
    pieces = list(letters)
    for _ in range(data.draw(st.integers(0, 20))):
        pieces.append(data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces)))
    pieces = [piece for piece in dict.fromkeys(pieces) if len(piece) < 10]
    scores = dict(zip(pieces, data.draw(st.permutations(range(len(pieces)))), strict=True))
    if data.draw(st.booleans()):
        tied = data.draw(st.sampled_from([-1, len(pieces)]))
        scores |= {piece: tied for piece in pieces if set(piece) == {"a"}}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", *BYTES, *pieces],
        "tokenizer.ggml.token_type": [UNKNOWN, *[BYTE] * 256, *[NORMAL] * len(pieces)],
        "tokenizer.ggml.scores": np.array([0] * 257 + [scores[piece] for piece in pieces], np.float32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = plain(metadata)
    for text in data.draw(st.lists(st.text(letters, max_size=40), min_size=5, max_size=5)):
        assert tokenizer.encode(text).tokens == greedy(text, scores)


def test_sentencepiece_token_types(spm_metadata: dict[str, Any]) -> None:
    vocabulary = from_gguf(spm_metadata)
    assert vocabulary.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (vocabulary.eos_ids, vocabulary.bos_id, vocabulary.add_bos) == (frozenset({2}), 1, True)
    assert vocabulary.tokenizer.encode("a</s>a", add_special_tokens=False).tokens == ["▁a", "</s>", "▁a"]
    keys = {key: spm_metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores")}
    tokenizer = plain(
        spm_metadata,
        tokens=[*keys["tokens"], "[X]", "▁" * 6],
        token_type=[*keys["token_type"], USER_DEFINED, USER_DEFINED],
        scores=[*keys["scores"], 0.0, -1e9],
    )
    assert tokenizer.encode("the[X]other").tokens == ["▁the", "[X]", "▁other"]
    assert tokenizer.encode("      ").tokens == ["▁" * 6, "▁"], "runs of spaces are merged, not added"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0]}, "lacks scores or byte tokens"),
        ({"scores": "nan"}, "lacks scores or byte tokens"),
        ({"remove_extra_whitespaces": True}, "normalization"),
        ({"precompiled_charsmap": b"x"}, "normalization"),
    ],
)
def test_broken_sentencepiece_vocabularies_are_refused(
    spm_metadata: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    if change.get("scores") == "nan":
        change = {"scores": np.full(len(spm_metadata["tokenizer.ggml.tokens"]), np.nan, np.float32)}
    with pytest.raises(BadModel, match=message):
        from_gguf(ggml(spm_metadata, **change))
    tied = spm_metadata["tokenizer.ggml.scores"].copy()
    tied[-len(tied) + 264 :] = -1.0
    with pytest.raises(BadModel, match="same score"):
        from_gguf(ggml(spm_metadata, scores=tied))


def test_a_large_vocabulary_takes_well_under_two_seconds() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    tokens = ["<end>", *alphabet, *(a + b for a, b in pairs)]
    keys = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3] + [1] * (len(tokens) - 1)}
    started = time.perf_counter()
    from_gguf(ggml({}, **keys, merges=[f"{a} {b}" for a, b in pairs], eos_token_id=0))
    assert time.perf_counter() - started < 2
