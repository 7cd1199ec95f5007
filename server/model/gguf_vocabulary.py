"""Rebuilds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

Transformers' converter is not used. It ignores pre-tokenizers such as SmolLM2's (`"a  5"` becomes other ids), NFC and
`ignore_merges`, and takes 3.7 s where this takes 0.3 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.errors import BadModel
from server.model.vocabulary import Vocabulary, library_errors, make_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""
SPACE = "\u2581"
"""Stands for a space in SentencePiece tokens."""


class PreTokenizer(NamedTuple):
    """How a tokenizer splits text before the merges."""

    regex: str | None = None
    """None is GPT-2's regex."""
    digits: bool = False
    """Split digits apart."""
    ignore_merges: bool = False
    """Take a piece that is in the vocabulary as one token."""
    nfc: bool = False
    bos: bool = False
    """A text begins with the BOS token unless the file says otherwise."""


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True, bos=True),
    "llama3": PreTokenizer(_LLAMA3, ignore_merges=True, bos=True),
    "llama-v3": PreTokenizer(_LLAMA3, ignore_merges=True, bos=True),
    "smaug-bpe": PreTokenizer(_LLAMA3, ignore_merges=True),
    "falcon3": PreTokenizer(_LLAMA3),
    "tekken": PreTokenizer(_TEKKEN, ignore_merges=True, bos=True),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
}
"""`tokenizer.ggml.pre` -> pre-tokenizer."""

_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>"}
)
"""Tokens that end an answer even if the file does not name them, as in llama.cpp. Files name only one or two."""
_CONTROL_ENDS = _ENDS | {"</s>", "<eos>", "<EOT>", "<｜end▁of▁sentence｜>"}
"""The same, if they are control tokens; elsewhere some of them are text."""


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        BadModel: the tokenizer or pre-tokenizer is not supported, or a key is missing or broken.
    """
    with library_errors("the tokenizer of the GGUF file is broken"):
        keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        kind = keys.get("model")
        if kind not in ("gpt2", "llama"):
            raise BadModel(f"the GGUF tokenizer {kind!r} is not supported, only gpt2 and llama; use the model's folder")
        for key in ("tokens", "token_type", "merges" if kind == "gpt2" else "scores"):
            if key not in keys:
                raise BadModel(f"the GGUF file lacks tokenizer.ggml.{key}")
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise BadModel("tokenizer.chat_template of the GGUF file is not a text")
        tokens, types = list(keys["tokens"]), [int(kind) for kind in keys["token_type"]]
        if not all(isinstance(token, str) for token in tokens) or len(types) != len(tokens):
            raise BadModel("tokenizer.ggml.tokens and token_type of the GGUF file do not fit")
        ids = {
            name: _token_id(keys, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown")
        }
        ends = {i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None}
        if ends:
            ends |= {i for i, token in enumerate(tokens) if _is_known_end(token, types[i])} - {ids["unknown"]}
        build = _byte_level if kind == "gpt2" else _sentencepiece
        tokenizer, add_bos = build(keys, tokens, types, ids)
        special = ends | {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN) or i == ids["bos"]}
        tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)])
        defined = [i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in special]
        tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in defined if not _is_spaces(tokens[i])])
        return make_vocabulary(
            tokenizer,
            chat_template=template,
            eos_ids=ends,
            eos_id=ids["eos"],
            bos_id=ids["bos"],
            add_bos=bool(keys.get("add_bos_token", add_bos)),
        )


def _byte_level(
    keys: Mapping[str, Any], tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether a text begins with BOS by default."""
    pre = PRE_TOKENIZERS.get(keys.get("pre", ""))
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise BadModel(f"the GGUF pre-tokenizer {keys.get('pre')!r} is not supported; supported are {known}")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    # Unused tokens only pad the table; the original tokenizer does not have them.
    kept = {part for pair in merges for part in (*pair, "".join(pair))} if UNUSED in types else set()
    vocabulary = {
        _byte_spelling(token) if kind == NORMAL and not alphabet.issuperset(token) else token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED or i in ids.values() or token in kept
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.bos


def _sentencepiece(
    keys: Mapping[str, Any], tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> tuple[Tokenizer, bool]:
    """The tokenizer; a text begins with BOS by default.

    SentencePiece merges the adjacent pair whose union has the highest score, the leftmost first. The library merges
    by the rank of a pair. Both agree if every way to split a token in two is a merge, ranked by the token's score.
    """
    if keys.get("remove_extra_whitespaces") or "precompiled_charsmap" in keys:
        raise BadModel("the GGUF file asks for a text normalization that is not supported for the tokenizer 'llama'")
    scores = np.asarray(keys["scores"], np.float64)
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if len(scores) != len(tokens) or not np.isfinite(scores).all() or len(set(tokens)) != len(tokens) or missing:
        raise BadModel("the tokenizer of the GGUF file is broken: it lacks scores or byte tokens, or repeats a token")
    mergeable = {
        token: score
        for token, kind, score in zip(tokens, types, scores.tolist(), strict=True)
        if kind in (NORMAL, UNUSED) or (kind == USER_DEFINED and _is_spaces(token))
    }
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = None if ids["unknown"] is None else tokens[ids["unknown"]]
    merges = _ranked_merges(mergeable)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix: list[Any] = [normalizers.Prepend(SPACE)] if keys.get("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _ranked_merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, highest score first.

    Runs of one character (spaces) share a score; the longest left part goes first. Raises BadModel for other tokens
    with equal scores, because then the order of merges depends on the text.
    """
    lengths = {len(token) for token in scores}
    merges: list[tuple[float, int, str, str]] = []
    by_score: dict[float, str] = {}
    for token, score in scores.items():
        splits = [
            (-score, -at, token[:at], token[at:])
            for at in range(1, len(token))
            if at in lengths and len(token) - at in lengths and token[:at] in scores and token[at:] in scores
        ]
        if splits and len(set(by_score.setdefault(score, token) + token)) > 1 and by_score[score] != token:
            raise BadModel(f"the GGUF file's tokens {by_score[score]!r} and {token!r} have the same score {score:g}")
        merges += splits
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])]


def _token_id(keys: Mapping[str, Any], key: str, count: int) -> int | None:
    token = keys.get(key)
    if token is None:
        return None
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < count:
        raise BadModel(f"tokenizer.ggml.{key} of the GGUF file is {token!r}, and there are {count} tokens")
    return token


def _is_known_end(token: str, kind: int) -> bool:
    return (kind == CONTROL and token in _CONTROL_ENDS) or (kind == USER_DEFINED and token in _ENDS)


def _is_spaces(token: str) -> bool:
    return not token.strip(SPACE)


def _byte_spelling(token: str) -> str:
    """A token in GPT-2's byte alphabet. Some converters write added tokens as plain text."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)
    return "".join(piece for piece, _ in pieces)
