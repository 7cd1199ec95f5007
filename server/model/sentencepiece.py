"""SentencePiece's BPE as a GGUF file gives it (`tokenizer.ggml.model` = "llama"), rebuilt for the `tokenizers` library.

Owns the checks of such a vocabulary and how its scores become ranked merges. Does not know GGUF's keys, nor which
tokens begin and end a text: vocabulary.py does.

SentencePiece merges, again and again, the two neighbours that together are the piece with the highest score, and the
leftmost of those that are alike (`bpe_model.cc`; llama.cpp's `llm_tokenizer_spm` is the same). The library merges by
the rank of a pair. Both agree if each way to cut a piece in two is a merge, ranked by the piece's score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers

from server.errors import BadModel
from server.model.values import cut

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`, in both kinds of vocabulary."""

SPACE = "\u2581"
"""What stands for a space in a piece."""

_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def is_spaces(piece: str) -> bool:
    """Whether a piece is a run of spaces, which is text whatever its type: merged as such, and shown as spaces."""
    return not piece.strip(SPACE)


def rebuild(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: npt.NDArray[np.float64],
    *,
    unknown: str | None,
    space_prefix: bool,
) -> Tokenizer:
    """The tokenizer of pieces with their types and scores, one of each a token. Added tokens are not in it yet.

    Each text between added tokens begins with a space of the tokenizer's own if `space_prefix`, as with llama.cpp.
    What is no piece becomes the bytes of its UTF-8. Raises BadModel for a vocabulary that is not whole, or whose
    scores leave open what is merged first, and what the library raises for one that it does not take.
    """
    _check(tokens, types, scores)
    # Control tokens and bytes are never made out of text, and added ones are cut out of it before anything is merged.
    # Unused pieces are made, as llama.cpp has it.
    known = {
        piece: score
        for piece, kind, score in zip(tokens, types, scores.tolist(), strict=True)
        if (kind in (NORMAL, UNUSED) or (kind == USER_DEFINED and is_spaces(piece))) and piece not in _BYTES
    }
    merges = _merges(known)
    vocabulary = {piece: i for i, piece in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix: list[Any] = [normalizers.Prepend(SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    return tokenizer


def _check(tokens: Sequence[str], types: Sequence[int], scores: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise BadModel(f"the GGUF file's tokenizer is not whole: the score of {cut(tokens[at])!r} is {scores[at]}")
    seen: set[str] = set()
    for piece, kind in zip(tokens, types, strict=True):
        if piece in seen:
            raise BadModel(f"the GGUF file's tokenizer is not whole: {cut(piece)!r} is there more than once")
        seen.add(piece)
        if not NORMAL <= kind <= BYTE:
            raise BadModel(f"the GGUF file's tokenizer is not whole: {cut(piece)!r} is of the unknown type {kind}")
        if kind == BYTE and piece not in _BYTES:
            raise BadModel(f"the GGUF file's tokenizer is not whole: {cut(piece)!r} is said to be a byte")
    if missing := [name for name in _BYTES if name not in seen]:
        raise BadModel(
            f"the GGUF file's tokenizer is not whole: {len(missing)} of the 256 byte pieces are not there, "
            f"{missing[0]} first"
        )


def _merges(known: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the highest score first. Raises BadModel where scores leave that open.

    Pieces of one score, of which the leftmost in the text goes first, have no rank that says so. The exception is a
    run of one character, such as the runs of spaces that share a score in Llama's and Mistral's vocabularies: a run
    that grows from the left by the longest left part is what the leftmost pair comes to.
    """
    merges: list[tuple[float, int, str, str]] = []
    # Only parts that are as long as a piece are looked up: all parts of one are the square of its length to copy.
    lengths = {len(piece) for piece in known}
    made: dict[float, str] = {}
    for piece, score in known.items():
        ways = [
            (-score, -at, piece[:at], piece[at:])
            for at in range(1, len(piece))
            if at in lengths and len(piece) - at in lengths and piece[:at] in known and piece[at:] in known
        ]
        if not ways:
            continue
        other = made.setdefault(score, piece)
        if other is not piece and len(set(other + piece)) > 1:
            raise BadModel(
                f"the GGUF file's pieces {cut(other)!r} and {cut(piece)!r} share the score {score:g}: which of them is "
                "merged first is then up to each text, which is not served"
            )
        merges += ways
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]
