"""`Vocabulary`: a base's tokenizer, its special tokens and its chat template, from GGUF metadata or a folder.

Owns how byte-level BPE is rebuilt from what a GGUF file says, and which files of a Hugging Face folder say what.
SentencePiece's kind is rebuilt in sentencepiece.py. Needs the `tokenizers` library alone. Does not know how prompts
are made of it (model/tokenizer.py).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.errors import BadModel
from server.model import sentencepiece
from server.model.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, is_spaces
from server.model.values import cut


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids and back, and the tokens that mean something.

    `special` maps each special token to its id. `eos_ids`, never empty, end an answer; `eos_id` is the one among them
    that ends a text, and that chat templates know. `add_bos` says whether a text begins with `bos_id`; the tokenizer
    itself is to be called with `add_special_tokens=False`. `names` are the tokens that a chat template may name beside
    `bos_token` and `eos_token`: `pad_token` and whatever else a folder's settings do.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    eos_ids: frozenset[int]
    bos_id: int | None
    special: dict[str, int]
    add_bos: bool
    eos_id: int
    names: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def size(self) -> int:
        """The highest id and one more: ids may have holes, so it is not how many tokens there are."""
        return _size(self.tokenizer)


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


_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>"}
)
"""Tokens that end an answer whether the file names them or not, as with llama.cpp: it names one or two, where the
generation_config.json of a folder names all, and an answer would run on past the others."""
_ENDS_IF_CONTROL = _ENDS | {"</s>", "<eos>", "<EOT>", "<｜end▁of▁sentence｜>"}
"""Those, and some that are text in other vocabularies, such as HTML's tags, and end an answer where they are control
tokens."""

_UNKNOWN_TEXT = "a\ua66e"
"""What few vocabularies have a token for: one whose token for what is unknown is missing fails on it."""

_ERROR = 200
"""Characters of what the library says of a tokenizer that it does not take."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What a tokenizer.json says of an added token beside its text and id."""


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises BadModel for a tokenizer or pre-tokenizer that is not known, by name, and for one that is not whole.
    `tokenizer.ggml.add_eos_token` is not read: it is for training, and a prompt that ends so has no answer. Tokens that
    are known as ends are ends, too, unless the file has one for what is unknown, as SmolLM2's has.
    """
    kind = _told(metadata, "tokenizer.ggml.model", str, None)
    if kind not in ("gpt2", "llama"):
        raise BadModel(
            f"the GGUF tokenizer {cut(repr(kind))} is not served, only byte-level BPE ('gpt2') and SentencePiece's BPE "
            "('llama'); give the model's Hugging Face folder instead"
        )
    make = _byte_level if kind == "gpt2" else _sentencepiece
    try:
        tokens = _tokens(metadata)
        types = [int(kind) for kind in _numbers(metadata, "tokenizer.ggml.token_type", "iu", len(tokens))]
        with _sound("the GGUF file's tokenizer is not whole"):
            tokenizer, add_bos = make(metadata, tokens, types)
    except KeyError as error:
        raise BadModel(f"the GGUF file lacks {error.args[0]}") from error
    named = ("bos", "eos", "eot", "eom")
    ids = {name: _listed_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in named}
    ends = {i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None}
    if ends:
        ends |= _known_ends(tokens, types) - {_told(metadata, "tokenizer.ggml.unknown_token_id", int, None)}
    # An end token that the file lists as ordinary would be shown to people and parsed in their texts.
    special = ends | {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN) or i == ids["bos"]}
    defined = [i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in special]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in defined if not is_spaces(tokens[i])])
    return _checked(
        tokenizer,
        chat_template=_told(metadata, "tokenizer.chat_template", str, None),
        eos_ids=ends,
        eos_id=ids["eos"],
        bos_id=ids["bos"],
        add_bos=bool(_told(metadata, "tokenizer.ggml.add_bos_token", bool, add_bos)),
    )


def from_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face folder.

    Reads `tokenizer.json` (other tokenizer files are not served), `tokenizer_config.json`, `generation_config.json`,
    `config.json` and `chat_template.jinja`. Raises BadModel.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadModel(f"the model folder has no tokenizer.json; {_instead(folder)}")
    with _sound("tokenizer.json cannot be read"):
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    settings, generation, config = (
        read_json(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    eos_ids = {i for source in (generation, config) for i in _ids(source.get("eos_token_id"))}
    tokenizer = _completed(tokenizer, settings, config.get("vocab_size"), eos_ids)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = {name: _token_id(tokenizer, settings.get(f"{name}_token")) for name in ("bos", "eos")}
    bos_id = named["bos"] if settings else _first(_ids(config.get("bos_token_id")))
    with _sound("tokenizer.json fails on a text (is its unk_token in its vocabulary?)"):
        plain, begun = (tokenizer.encode(_UNKNOWN_TEXT, add_special_tokens=special).ids for special in (False, True))
    begins = begun[:1] if begun[1 : 1 + len(plain)] == plain else []
    if bos_id is None:
        bos_id = _first(begins)
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        add_bos = begins == [bos_id]
    return _checked(
        tokenizer,
        chat_template=_chat_template(folder, settings),
        eos_ids=eos_ids | ({named["eos"]} if named["eos"] is not None else set()),
        eos_id=named["eos"],
        bos_id=bos_id,
        add_bos=bool(add_bos),
        names={name: token for name, token in _named(settings).items() if tokenizer.token_to_id(token) is not None},
    )


@contextmanager
def _sound(what: str) -> Iterator[None]:
    """Raises BadModel, beginning with `what`, where the library fails: it raises plain Exception, and a panic in it is
    not even that. A KeyError passes: what the file lacks is told by its key."""
    try:
        yield
    except (BadModel, KeyError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise BadModel(f"{what}: {cut(error, _ERROR)}") from error


def write_folder(vocabulary: Vocabulary, folder: Path) -> None:
    """Write the files from which `from_folder` reads the same vocabulary. Raises OSError."""
    vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    contents = {token: text for text, token in vocabulary.special.items()}  # id_to_token tells of them normalized

    def name(token: int | None) -> str | None:
        return None if token is None else contents.get(token, vocabulary.tokenizer.id_to_token(token))

    settings = {
        **{name: token for name, token in vocabulary.names.items() if name.endswith("_token")},
        "extra_special_tokens": {n: token for n, token in vocabulary.names.items() if not n.endswith("_token")},
        "add_bos_token": vocabulary.add_bos,
        "bos_token": name(vocabulary.bos_id),
        "eos_token": name(vocabulary.eos_id),
        "chat_template": vocabulary.chat_template,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(vocabulary.eos_ids)})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file. Raises BadModel, naming the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, OSError, RecursionError) as error:
        raise BadModel(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadModel(f"{path.name} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` for people to read. Raises OSError."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checked(
    tokenizer: Tokenizer,
    *,
    chat_template: str | None,
    eos_ids: set[int],
    eos_id: int | None,
    bos_id: int | None,
    add_bos: bool,
    names: Mapping[str, str] | None = None,
) -> Vocabulary:
    size = _size(tokenizer)
    eos_ids = {i for i in eos_ids if 0 <= i < size}
    if not eos_ids:
        raise BadModel("the model does not say which token ends a text (eos_token_id)")
    if add_bos and bos_id is None:
        raise BadModel("the tokenizer wants a text to begin with a token that it does not name (bos_token)")
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    end = eos_id if eos_id in eos_ids else min(eos_ids)
    return Vocabulary(tokenizer, chat_template, frozenset(eos_ids), bos_id, special, add_bos, end, names or {})


def _size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """The tokenizer of GPT-2's kind, and whether a text begins with bos where the file does not say."""
    pre = _told(metadata, "tokenizer.ggml.pre", str, "")
    if not pre:
        raise BadModel(
            "the GGUF file does not say how its tokenizer splits texts (tokenizer.ggml.pre); convert it anew"
        )
    if pre not in PRE_TOKENIZERS:
        raise BadModel(
            f"the GGUF pre-tokenizer {cut(pre)!r} is not known; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    split = PRE_TOKENIZERS[pre]
    merges = metadata["tokenizer.ggml.merges"]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    # What fills the table up is no text, and not in the tokenizer that the file was made of.
    of = ("bos", "eos", "eot", "eom", "unknown")
    named = {_told(metadata, f"tokenizer.ggml.{name}_token_id", int, None) for name in of}
    merged = {part for pair in pairs for part in (*pair, "".join(pair))} if UNUSED in types else set()
    vocabulary = {
        _spelled(token) if kind == NORMAL and not alphabet.issuperset(token) else token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED or i in named or token in merged
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.whole))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """The tokenizer of SentencePiece's kind, which begins a text with bos unless the file says otherwise."""
    # SentencePiece's normalizer would change a text before it is cut. Llama's and Mistral's files ask for none.
    squeezed = "tokenizer.ggml.remove_extra_whitespaces"
    for key, asked in (
        (squeezed, _told(metadata, squeezed, bool, False)),
        ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.precompiled_charsmap" in metadata),
    ):
        if asked:
            raise BadModel(f"the GGUF file asks for {key}, which is not served for the tokenizer 'llama'")
    scores = _numbers(metadata, "tokenizer.ggml.scores", "f", len(tokens)).astype(np.float64)
    unknown = _listed_id(metadata, "tokenizer.ggml.unknown_token_id", len(tokens))
    space_prefix = bool(_told(metadata, "tokenizer.ggml.add_space_prefix", bool, True))
    name = None if unknown is None else tokens[unknown]
    return sentencepiece.rebuild(tokens, types, scores, unknown=name, space_prefix=space_prefix), True


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Raises KeyError if there are none, BadModel if they are no texts."""
    tokens = metadata["tokenizer.ggml.tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BadModel("the GGUF file's tokenizer is not whole: tokenizer.ggml.tokens is no list of texts")
    return tokens


def _numbers(metadata: Mapping[str, Any], key: str, kinds: str, count: int) -> npt.NDArray[Any]:
    """A list of `count` numbers whose kind is one of numpy's letters. Raises KeyError if there is none, BadModel."""
    value = metadata[key]
    plain = isinstance(value, list) and all(isinstance(number, int | float) for number in value)
    values = np.array(value) if plain else value
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in kinds:
        raise BadModel(f"the GGUF file's tokenizer is not whole: {key} is no list of numbers of its kind")
    if len(values) != count:
        raise BadModel(f"the GGUF file's tokenizer is not whole: {key} has {len(values)} entries for {count} tokens")
    return values


def _told(metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """What the file says under `key`, or `default`. Raises BadModel if it is of another type than `kind`."""
    value = metadata.get(key)
    if value is None:
        return default
    if type(value) is not kind:
        raise BadModel(f"the GGUF file's {key} is of the wrong type: {type(value).__name__}, not {kind.__name__}")
    return value


def _listed_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    """The id under `key`, if there is one. Raises BadModel if it is none of the `count` tokens'."""
    token = _told(metadata, key, int, None)
    if token is not None and not 0 <= token < count:
        raise BadModel(f"the GGUF file's {key} is {token}, and there are {count} tokens")
    return None if token is None else int(token)


def _spelled(token: str) -> str:
    """A token given as text in the byte alphabet of GPT-2: some converters write added tokens as ordinary ones."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)
    return "".join(piece for piece, _ in pieces)


def _known_ends(tokens: Sequence[str], types: Sequence[int]) -> set[int]:
    return {
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if (kind == CONTROL and token in _ENDS_IF_CONTROL) or (kind == USER_DEFINED and token in _ENDS)
    }


def _instead(folder: Path) -> str:
    """What to do about a folder without a tokenizer.json."""
    if not (folder / "tokenizer.model").is_file():
        return "other tokenizer formats are not served"
    return (
        "its tokenizer.model is not read. Write one beside it, once, with the packages transformers and sentencepiece: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER); or serve the model's GGUF file"
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (ValueError, OSError) as error:
            raise BadModel(f"{path.name} cannot be read: {error}") from error
    template = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        # Several by name; the default one is for conversations without tools.
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise BadModel(f"the chat_template is neither a text nor a list of named ones: {cut(repr(template))}")
    return template or None


def _completed(tokenizer: Tokenizer, settings: Mapping[str, Any], table: Any, ends: Collection[int]) -> Tokenizer:
    """The tokenizer with the added and the special tokens of tokenizer_config.json too, as Transformers has it.

    Some tokenizer.json have them as ordinary tokens or not at all: what the chat template writes would be cut in
    pieces, and people's texts could hold them. Added tokens that are `ends` are special whoever says else. Those beyond
    the model's table, whose rows config.json may tell, stay out: somebody's padding, mostly. Raises BadModel for one
    that cannot have the id that it is given.
    """
    told: dict[str, dict[str, Any]] = {}
    listed = settings.get("added_tokens_decoder") or {}
    try:
        for number, entry in listed.items():
            flags = {name: bool(entry.get(name, False)) for name in _FLAGS}
            if not isinstance(entry["content"], str):
                raise TypeError("a content is no text")
            told[entry["content"]] = {"id": int(number), "content": entry["content"], **flags}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadModel(f"tokenizer_config.json's added_tokens_decoder is not whole: {cut(repr(error))}") from error
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    ending = [content for content in (*told, *added) if tokenizer.token_to_id(content) in ends]
    ending += [content for content, entry in told.items() if entry["id"] in ends]
    kept = {content for content, token in added.items() if not token.special} if _keeps_ordinary(settings) else set()
    listed_special = [content for content in _listed(settings) if content not in kept]
    for content in (*_ends_of_texts(settings), *listed_special, *ending):
        fresh = {"id": tokenizer.token_to_id(content), "content": content, **dict.fromkeys(_FLAGS, False)}
        if fresh["id"] is not None:
            told.setdefault(content, fresh)["special"] = True
        elif content in told:
            told[content]["special"] = True
    rows = table if isinstance(table, int) else math.inf
    lacking = [token for content, token in told.items() if content not in added and token["id"] < rows]
    ordinary = {t["content"] for t in told.values() if t["special"] and t not in lacking} - {
        content for content, token in added.items() if token.special
    }
    if not lacking and not ordinary:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    for entry in state["added_tokens"]:
        entry["special"] |= entry["content"] in ordinary
    state["added_tokens"] += sorted(lacking, key=lambda entry: entry["id"])
    with _sound("tokenizer_config.json's added_tokens_decoder is not whole"):
        tokenizer = Tokenizer.from_str(json.dumps(state))
    for entry in lacking:
        if tokenizer.token_to_id(entry["content"]) != entry["id"]:
            raise BadModel(
                f"tokenizer_config.json gives {cut(entry['content'])!r} the id {entry['id']}, which it cannot have in "
                "tokenizer.json; save the tokenizer again with Transformers"
            )
    return tokenizer


def _ends_of_texts(settings: Mapping[str, Any]) -> list[str]:
    """The tokens that are special by their part. Not the padding, which may be any token and comes in no text."""
    tokens = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk")]
    return [content for content in map(_content, tokens) if content]


def _listed(settings: Mapping[str, Any]) -> list[str]:
    """The tokens that the settings list as special."""
    several = [settings.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    tokens = [token for listed in several if isinstance(listed, list) for token in listed]
    return [content for content in map(_content, tokens) if content]


def _keeps_ordinary(settings: Mapping[str, Any]) -> bool:
    """Whether an added token that tokenizer.json has as text is text, though the settings list it as special.

    So it is in what Transformers 5 saves of Llama's class: it lists every piece there that a user of SentencePiece has
    defined, be it a line break, and goes on reading them as text. Elsewhere what is listed is what chats are made of.
    """
    return str(settings.get("tokenizer_class")).removesuffix("Fast") in ("LlamaTokenizer", "CodeLlamaTokenizer")


def _named(settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a chat template may write by name: one under a key that ends so, or under one's own."""
    own = settings.get("extra_special_tokens")
    told = {name: token for name, token in settings.items() if name.endswith("_token")}
    named = {name: _content(token) for name, token in (told | (own if isinstance(own, dict) else {})).items()}
    return {name: content for name, content in named.items() if content}


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    content = _content(token)
    return None if content is None else tokenizer.token_to_id(content)


def _ids(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [i for i in listed if isinstance(i, int) and not isinstance(i, bool)]


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None
