"""Small tokenizers for the tests of this package."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    "  ",
    "Hello, world! It's 12345 o'clock, I'LL be there in 3 min.",
    "def f(x):\n    return x ** 2\n\n\n# done\t\t!",
    "  7,  200   and\u00a0 3-9\r\n\r\n 1:  10:",
    "日本語のテキスト。Привет, мир! Ünïcödé cafe\u0301 ½ ² Ⅷ ４５ ٣٤",
    "👩\u200d👩\u200d👧 🇩🇪 \u200b\ufeff\x00\x01",
    "<|im_start|>user\nhi<|im_end|>\n<think>",
]


def trained_metadata() -> dict[str, Any]:
    """GGUF metadata of a trained byte-level BPE with three control tokens and the user-defined `<think>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20 + ["the three theories of 12 and 123 there  10"] * 20, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 4) + [4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


def bpe(specials: list[str], **options: Any) -> Tokenizer:
    """Byte-level BPE over all bytes with a few merges; `options` are those of the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ċ", "Ċ"), ("p", "o"), ("po", "s")]
    tokens = [*specials, *alphabet, *["".join(m) for m in merges]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False, **options) for s in specials])
    return tokenizer


def text_of(
    tokenizer: Tokenizer, template: str | None, eos: int, bos: int | None = None, add_bos: bool = False
) -> ModelTokenizer:
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return ModelTokenizer(Vocabulary(tokenizer, template, frozenset({eos}), bos, special, add_bos, eos))
