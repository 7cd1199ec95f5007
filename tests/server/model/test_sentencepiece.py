"""SentencePiece's BPE out of GGUF metadata: its own segmentations, a plain greedy oracle, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.errors import BadModel
from server.model.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, rebuild
from server.model.vocabulary import from_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# What the package sentencepiece 0.2.3 says of the vocabulary of `spm_metadata`.
SEGMENTATIONS = {
    "the theory of the other": "▁the ▁the ory ▁o f ▁the ▁other",
    "he says:  'no',\n\nyes!": "▁he ▁say s : ▁ ▁' no ', <0x0A> <0x0A> y es !",
    "a              b": "▁a ▁▁▁▁▁▁▁▁ ▁▁▁▁▁ ▁b",
    "   ": "▁▁▁▁",
    "café naïve größer": "▁c afé ▁ naï ve ▁ gr öß er",
    "12 and 1234": "▁ 1 2 ▁and ▁ 1 2 3 4",
    "日本 😀": "▁ <0xE6> <0x97> <0xA5> <0xE6> <0x9C> <0xAC> ▁ <0xF0> <0x9F> <0x98> <0x80>",
    "это тест": "▁это ▁т ест",
    "</s> <0x41> [x]": "▁ <0x3C> <0x2F> s <0x3E> ▁ <0x3C> 0 <0x78> 4 1 <0x3E> ▁ <0x5B> <0x78> <0x5D>",
    " the": "▁ ▁the",
    "": "",
}


def plain(metadata: Mapping[str, Any], **changes: Any) -> Tokenizer:
    """The tokenizer as it is used here: special tokens in a text are plain characters."""
    tokenizer = from_gguf({**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}).tokenizer
    tokenizer.encode_special_tokens = True
    return tokenizer


def greedy(text: str, scores: Mapping[str, float]) -> list[str]:
    """SentencePiece's merging as it is told: the best pair of neighbours, the leftmost of those alike."""
    parts = list(text)
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        joined = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not joined:
            break
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [name for part in parts for name in ([part] if part in scores else [BYTES[b] for b in part.encode()])]


def test_segmentations_are_sentencepiece_s_own(spm_metadata: dict[str, Any], bare: Tokenizer) -> None:
    tokenizer = plain(spm_metadata)
    for text, pieces in SEGMENTATIONS.items():
        assert tokenizer.encode(text).tokens == pieces.split(), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        # without the prefix it is as if the text began with its space already
        assert bare.encode(f" {text}" if text else "").tokens == pieces.split(), text
        assert bare.decode(bare.encode(text).ids) == text


@pytest.fixture(scope="module")
def bare(spm_metadata: dict[str, Any]) -> Tokenizer:
    return plain(spm_metadata, add_space_prefix=False)


@given(text=st.text("theran oi's \n▁é日1\"", max_size=60) | st.text(max_size=30))
def test_any_text_is_cut_as_the_greedy_oracle_cuts_it(spm_metadata: dict[str, Any], bare: Tokenizer, text: str) -> None:
    tokens, scores = spm_metadata["tokenizer.ggml.tokens"], spm_metadata["tokenizer.ggml.scores"]
    known = {t: float(s) for t, s in zip(tokens[259:], scores[259:], strict=True)}
    assert bare.encode(text).tokens == greedy(text.replace(" ", "▁"), known)


@given(st.data())
def test_any_order_of_merges_is_sentencepiece_s(data: st.DataObject) -> None:
    """Small alphabets, where pieces overlap in every way, and runs of one letter that share a score."""
    letters = data.draw(st.sampled_from(["a", "ab", "abc"]))
    pieces = list(letters)
    for _ in range(data.draw(st.integers(0, 20))):
        pieces.append(data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces)))
    pieces = [piece for piece in dict.fromkeys(pieces) if len(piece) < 10]
    scores = dict(zip(pieces, data.draw(st.permutations(range(len(pieces)))), strict=True))
    if data.draw(st.booleans()):
        tied = data.draw(st.sampled_from([-1, len(pieces)]))
        scores |= {piece: tied for piece in pieces if set(piece) == {"a"}}
    tokens = ["<unk>", *BYTES, *pieces]
    types = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    values = np.array([0] * 257 + [scores[piece] for piece in pieces], np.float64)
    tokenizer = rebuild(tokens, types, values, unknown="<unk>", space_prefix=False)
    for text in data.draw(st.lists(st.text(letters, max_size=40), min_size=5, max_size=5)):
        assert tokenizer.encode(text).tokens == greedy(text, scores)


def extended(metadata: dict[str, Any], *more: tuple[str, int, float]) -> dict[str, Any]:
    """The metadata with further tokens: name, type and score."""
    names, types, scores = zip(*more, strict=True)
    return metadata | {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *names],
        "tokenizer.ggml.token_type": np.append(metadata["tokenizer.ggml.token_type"], np.array(types, np.int32)),
        "tokenizer.ggml.scores": np.append(metadata["tokenizer.ggml.scores"], np.array(scores, np.float32)),
    }


def test_kinds_of_tokens(spm_metadata: dict[str, Any]) -> None:
    vocabulary = from_gguf(spm_metadata)
    assert vocabulary.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (vocabulary.eos_ids, vocabulary.bos_id, vocabulary.add_bos) == (frozenset({2}), 1, True)
    assert not from_gguf(spm_metadata | {"tokenizer.ggml.add_bos_token": False}).add_bos
    assert vocabulary.tokenizer.encode("a</s>a", add_special_tokens=False).tokens == ["▁a", "</s>", "▁a"]
    more = extended(
        spm_metadata,
        ("[X]", USER_DEFINED, 0.0),
        ("her", USER_DEFINED, 0.0),  # of the score of a piece that is merged, and no rival of it: it is cut out before
        ("<|end|>", CONTROL, -1000.0),
        ("<pad>", UNUSED, -1000.0),
        ("▁" * 6, USER_DEFINED, -1e9),
    )
    tokenizer = plain(more)
    assert tokenizer.encode("the[X]other").tokens == ["▁the", "[X]", "▁o", "t", "her"]
    assert "<|end|>" not in tokenizer.encode("<|end|>").tokens
    assert tokenizer.encode("      ").tokens == ["▁" * 6, "▁"]
    assert from_gguf(more).special.keys() == {"<unk>", "<s>", "</s>", "<|end|>"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "t5", "'t5' is not served"),
        ("tokens", None, r"tokens is no list of texts"),
        ("tokens", np.arange(3), r"tokens is no list of texts"),
        ("tokens", [["a"], "b"], r"tokens is no list of texts"),
        ("scores", np.zeros(7, np.float32), "scores has 7 entries for 3"),
        ("scores", [[0.5], 1.0], "scores is no list of numbers"),
        ("scores", "0 1 2", "scores is no list of numbers"),
        ("token_type", np.ones(7, np.int32), "token_type has 7 entries for 3"),
        ("token_type", np.full(3, 1.5), "token_type is no list of numbers"),
        ("eos_token_id", 10**6, "eos_token_id is 1000000, and there are"),
        ("bos_token_id", -1, "bos_token_id is -1"),
        ("unknown_token_id", 10**6, "unknown_token_id is 1000000"),
        ("eot_token_id", "two", "eot_token_id is of the wrong type"),
        ("add_bos_token", np.ones(2), "add_bos_token is of the wrong type"),
        ("add_space_prefix", 1, "add_space_prefix is of the wrong type"),
        ("eos_token_id", None, "ends a text"),
        ("remove_extra_whitespaces", True, "remove_extra_whitespaces"),
        ("precompiled_charsmap", np.ones(4, np.uint8), "precompiled_charsmap"),
    ],
)
def test_metadata_that_cannot_be_served(spm_metadata: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(BadModel, match=said):
        from_gguf(spm_metadata | {f"tokenizer.ggml.{key}": value})


def test_vocabularies_that_cannot_be_served(spm_metadata: dict[str, Any]) -> None:
    for key in ("tokens", "scores", "token_type"):
        with pytest.raises(BadModel, match=rf"lacks tokenizer\.ggml\.{key}"):
            from_gguf({name: value for name, value in spm_metadata.items() if name != f"tokenizer.ggml.{key}"})
    for more, said in [
        (("the", NORMAL, -500.0), "'the' is there more than once"),
        (("<0x41>", BYTE, 0.0), "'<0x41>' is there more than once"),
        (("new", 9, 0.0), "'new' is of the unknown type 9"),
        (("<0xZZ>", BYTE, 0.0), "'<0xZZ>' is said to be a byte"),
        (("new", NORMAL, float("nan")), "the score of 'new' is nan"),
        (("new", NORMAL, float("inf")), "the score of 'new' is inf"),
        (("then", NORMAL, -2.0), "'the' and 'then' share the score -2"),
        (("▁▁a", NORMAL, -1e9), "share the score -1e\\+09"),
    ]:
        with pytest.raises(BadModel, match=said):
            from_gguf(extended(spm_metadata, more))
    renamed = ["?" if token == "<0x41>" else token for token in spm_metadata["tokenizer.ggml.tokens"]]
    types = spm_metadata["tokenizer.ggml.token_type"].copy()
    types[renamed.index("?")] = NORMAL
    with pytest.raises(BadModel, match="1 of the 256 byte pieces are not there, <0x41> first"):
        from_gguf(spm_metadata | {"tokenizer.ggml.tokens": renamed, "tokenizer.ggml.token_type": types})
    # what two pieces share a score with has nothing to say if neither is ever merged
    assert from_gguf(extended(spm_metadata, ("@@@", NORMAL, -2.0), ("###", NORMAL, -2.0)))


def test_a_long_piece_takes_no_square_of_its_length(spm_metadata: dict[str, Any]) -> None:
    started = time.perf_counter()
    assert from_gguf(extended(spm_metadata, ("the" * 100_000, NORMAL, -700.0)))
    assert time.perf_counter() - started < 1.0
    with pytest.raises(BadModel) as e:
        from_gguf(extended(spm_metadata, ("x" * 10**6, 9, 0.0)))
    assert len(e.value.message) < 200


def test_a_vocabulary_of_32000_pieces_takes_well_under_two_seconds() -> None:
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in letters for b in letters]
    pieces = [*letters, *pairs, *(a + b + c for a in pairs for b in pairs[::12] for c in letters[:1])]
    pieces = [*dict.fromkeys([*pieces, *(a + b for a in pieces[-9000:] for b in ("er", "▁in"))])][: 32_000 - 259]
    assert len(pieces) == 32_000 - 259
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * len(pieces)], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    started = time.perf_counter()
    from_gguf(metadata)
    assert time.perf_counter() - started < 2.0
