"""Incremental detokenization with stop strings.

`tokenizers.decoders.DecodeStream` is not used: after an invalid byte it holds everything back until a valid character
comes, and it strips SentencePiece's prefix space only once, not after each added token.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.model.tokenizer import ModelTokenizer


class Detokenizer:
    """The text of one answer, token by token: never half a character, never the beginning of a stop string.

    Args:
        tokenizer: The model's tokenizer.
        stop: Stop strings.
        new_segment: The answer follows an added token (`ModelTokenizer.is_added_token`), so that its prefix space is
            not shown. Otherwise it continues a text and keeps its space.

    Attributes:
        stopped: A stop string was found. It and all text after it are hidden.
    """

    def __init__(self, tokenizer: ModelTokenizer, stop: tuple[str, ...] = (), *, new_segment: bool = True) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._new_segment = new_segment
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._within_text = not new_segment  # after whole characters of the same segment

    def add(self, token: int, *, search: bool = True) -> str:
        """The text that becomes visible with `token`. Without `search`, stop strings are not looked for."""
        if self.stopped:
            return ""
        new = self._tokenizer.standalone_text(token) if self._within_text else None
        if new is None:
            new = self._decode(token)
        if not self._stop:
            return new
        if not search:
            new, self._held = self._held + new, ""
            return new
        return self._release(self._held + new)

    def rest(self) -> str:
        """The text held back as a possible beginning of a stop string. An incomplete character is dropped."""
        held, self._held = self._held, ""
        return held

    def _decode(self, token: int) -> str:
        first, self._new_segment = self._new_segment, self._tokenizer.adds_space_after(token)
        new = ""
        if not self._tokenizer.is_special(token):
            spelled = self._tokenizer.token_bytes(token)
            strip = first and not self._new_segment
            new = self._decoder.decode(self._tokenizer.strip_prefix_space(spelled) if strip else spelled)
        self._within_text = not self._new_segment and not self._decoder.getstate()[0]
        return new

    def _release(self, text: str) -> str:
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        hold = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
