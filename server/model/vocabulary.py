"""`Vocabulary`: a base's tokenizer, its special tokens and its chat template, from GGUF metadata or a folder.

Owns how byte-level BPE is rebuilt from what a GGUF file says, and which files of a Hugging Face folder say what.
Needs the `tokenizers` library alone. Does not know how prompts are made of it (engine/text.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.errors import BadModel


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids and back, and the tokens that mean something.

    `special` maps each special token to its id. `eos_ids`, never empty, end an answer. `add_bos` says whether a text
    begins with `bos_id`; the tokenizer itself is to be called with `add_special_tokens=False`.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    eos_ids: frozenset[int]
    bos_id: int | None
    special: dict[str, int]
    add_bos: bool


@dataclass(frozen=True)
class _Split:
    """How text is cut before the merges. `regex` None is GPT-2's own; `whole` leaves a piece that is a token alone."""

    regex: str | None = None
    digits: bool = False
    whole: bool = False
    nfc: bool = False
    bos: bool = False


_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, _Split] = {
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "llama-bpe": _Split(_LLAMA3, whole=True, bos=True),
    "llama3": _Split(_LLAMA3, whole=True, bos=True),
    "llama-v3": _Split(_LLAMA3, whole=True, bos=True),
    "smaug-bpe": _Split(_LLAMA3, whole=True),
    "falcon3": _Split(_LLAMA3),
    "tekken": _Split(_TEKKEN, whole=True, bos=True),
    "qwen2": _Split(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Split(_QWEN2),
}
"""`tokenizer.ggml.pre` -> how the tokenizer that the model was trained with cuts text."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises BadModel for a tokenizer or pre-tokenizer that is not known, by name."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise BadModel(
            f"the GGUF tokenizer {kind!r} is not served, only byte-level BPE ('gpt2'); "
            "give the model's Hugging Face folder instead"
        )
    pre = str(metadata.get("tokenizer.ggml.pre", "none"))
    if pre not in PRE_TOKENIZERS:
        raise BadModel(f"the GGUF pre-tokenizer {pre!r} is not known; known are {', '.join(sorted(PRE_TOKENIZERS))}")
    split = PRE_TOKENIZERS[pre]
    try:
        tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
        types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
        tokenizer = _byte_level(tokens, types, metadata["tokenizer.ggml.merges"], split)
    except KeyError as error:
        raise BadModel(f"the GGUF file lacks {error.args[0]}") from error
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED, special=False))
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    # An end token that the file lists as ordinary would be shown to people and parsed in their texts.
    named = [AddedToken(tokens[i], special=True, normalized=False) for i in ids.values() if i is not None]
    tokenizer.add_special_tokens(named)
    return _checked(
        tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        eos_ids={i for i in (ids["eos"], ids["eot"]) if i is not None},
        bos_id=ids["bos"],
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", split.bos)),
    )


def from_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face folder.

    Reads `tokenizer.json` (other tokenizer files are not served), `tokenizer_config.json`, `generation_config.json`,
    `config.json` and `chat_template.jinja`. Raises BadModel.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadModel("the model folder has no tokenizer.json; other tokenizer formats are not served")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise BadModel(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_json(folder / "tokenizer_config.json")
    generation, config = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    named = {name: _token_id(tokenizer, settings.get(f"{name}_token")) for name in ("bos", "eos")}
    eos_ids = {i for source in (generation, config) for i in _ids(source.get("eos_token_id"))}
    bos_id = named["bos"] if settings else _first(_ids(config.get("bos_token_id")))
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        begun = tokenizer.encode("a", add_special_tokens=True).ids
        add_bos = bos_id is not None and begun[:1] == [bos_id]
    return _checked(
        tokenizer,
        chat_template=_chat_template(folder, settings),
        eos_ids=eos_ids | ({named["eos"]} if named["eos"] is not None else set()),
        bos_id=bos_id,
        add_bos=bool(add_bos),
    )


def write_folder(vocabulary: Vocabulary, folder: Path) -> None:
    """Write the files from which `from_folder` reads the same vocabulary. Raises OSError."""
    vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    bos = None if vocabulary.bos_id is None else vocabulary.tokenizer.id_to_token(vocabulary.bos_id)
    settings = {"add_bos_token": vocabulary.add_bos, "bos_token": bos, "chat_template": vocabulary.chat_template}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(vocabulary.eos_ids)})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file. Raises BadModel, naming the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadModel(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadModel(f"{path.name} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` for people to read. Raises OSError."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checked(
    tokenizer: Tokenizer, *, chat_template: str | None, eos_ids: set[int], bos_id: int | None, add_bos: bool
) -> Vocabulary:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    eos_ids = {i for i in eos_ids if 0 <= i < size}
    if not eos_ids:
        raise BadModel("the model does not say which token ends a text (eos_token_id)")
    if add_bos and bos_id is None:
        raise BadModel("the tokenizer wants a text to begin with a token that it does not name (bos_token)")
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return Vocabulary(tokenizer, chat_template, frozenset(eos_ids), bos_id, special, add_bos)


def _byte_level(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], split: _Split) -> Tokenizer:
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    try:
        pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
        vocabulary = {
            _spelled(token) if kind == _NORMAL and not alphabet.issuperset(token) else token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        }
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.whole))
    except Exception as error:  # the library raises plain Exception
        raise BadModel(f"the GGUF file's tokenizer is not whole: {error}") from error
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spelled(token: str) -> str:
    """A token given as text in the byte alphabet of GPT-2: some converters write added tokens as ordinary ones."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)
    return "".join(piece for piece, _ in pieces)


def _added(tokens: Sequence[str], types: Sequence[int], kind: int, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, its in zip(tokens, types, strict=True)
        if its == kind
    ]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name; the default one is for conversations without tools
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template or None


def _token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return tokenizer.token_to_id(content) if isinstance(content, str) else None


def _ids(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [i for i in listed if isinstance(i, int) and not isinstance(i, bool)]


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None
