"""`Vocabulary`: a model's tokenizer with its special tokens and chat template, from a Hugging Face folder.

GGUF files are read by `gguf_vocabulary`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.errors import BadModel

_RARE_TEXT = "a\ua66e"
"""Few vocabularies have a token for this: a tokenizer without a working unk_token fails on it."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the tokens with a meaning of their own.

    Attributes:
        tokenizer: To be called with `add_special_tokens=False`.
        eos_ids: Tokens that end an answer; never empty.
        bos_id: The beginning-of-text token, if there is one. `add_bos`: a text begins with it.
        special: Special token -> id.
        eos_id: The one of `eos_ids` that ends a text; chat templates know it as `eos_token`.
        names: More tokens that the chat template may name, such as `pad_token`.
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
        """The highest id plus one. Ids may have gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def make_vocabulary(
    tokenizer: Tokenizer,
    *,
    chat_template: str | None,
    eos_ids: set[int],
    eos_id: int | None,
    bos_id: int | None,
    add_bos: bool,
    names: Mapping[str, str] | None = None,
) -> Vocabulary:
    """Check the ids and build a `Vocabulary`. Raises BadModel."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    ends = frozenset(i for i in eos_ids if 0 <= i < size)
    if not ends:
        raise BadModel("the model does not say which token ends a text (eos_token_id)")
    if add_bos and bos_id is None:
        raise BadModel("the tokenizer adds a beginning-of-text token that it does not name (bos_token)")
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    end = eos_id if eos_id in ends else min(ends)
    return Vocabulary(tokenizer, chat_template, ends, bos_id, special, add_bos, end, names or {})


def from_folder(folder: Path) -> Vocabulary:
    """Load `tokenizer.json` and the files beside it with Transformers.

    Raises:
        BadModel: there is no `tokenizer.json`, or a file is broken.
    """
    if not (folder / "tokenizer.json").is_file():
        raise BadModel(
            "the model folder has no tokenizer.json. Create it with Transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER); or use the model's GGUF file"
        )
    settings, generation, config = (
        read_json(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    with library_errors("the tokenizer cannot be loaded"):
        from transformers import PreTrainedTokenizerFast

        loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        tokenizer = _without_rows_beyond(loaded.backend_tokenizer, config.get("vocab_size"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eos_ids = {i for source in (generation, config) for i in _ids(source.get("eos_token_id"))}
        eos_id = None if loaded.eos_token is None else tokenizer.token_to_id(loaded.eos_token)
        _mark_special(tokenizer, eos_ids, {loaded.bos_token, loaded.eos_token, loaded.unk_token, *_listed(settings)})
        plain = tokenizer.encode(_RARE_TEXT, add_special_tokens=False).ids
        begun = tokenizer.encode(_RARE_TEXT, add_special_tokens=True).ids
    begins = begun[:1] if begun[1 : 1 + len(plain)] == plain else []
    bos_id = None if loaded.bos_token is None else tokenizer.token_to_id(loaded.bos_token)
    if bos_id is None and begins:
        bos_id = begins[0]
    template = loaded.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise BadModel(f"the chat template must be a text, not {template!r}")
    add_bos = settings.get("add_bos_token")
    names = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    return make_vocabulary(
        tokenizer,
        chat_template=template or None,
        eos_ids=eos_ids | ({eos_id} if eos_id is not None else set()),
        eos_id=eos_id,
        bos_id=bos_id,
        add_bos=begins == [bos_id] if add_bos is None else bool(add_bos),
        names={name: token for name, token in names.items() if tokenizer.token_to_id(token) is not None},
    )


def write_folder(vocabulary: Vocabulary, folder: Path) -> None:
    """Write the files from which `from_folder` reads the same vocabulary. Raises OSError."""
    vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    added = vocabulary.tokenizer.get_added_tokens_decoder()

    def name(token: int | None) -> str | None:
        if token is None or token not in added:
            return None if token is None else vocabulary.tokenizer.id_to_token(token)
        return added[token].content

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
    """The object in a JSON file, empty if there is no such file. Raises BadModel, which names the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, OSError, RecursionError) as error:
        raise BadModel(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadModel(f"{path.name} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON. Raises OSError."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn any error of `tokenizers` or `transformers` into a BadModel that begins with `what`.

    The Rust library raises plain Exceptions, and panics that are BaseExceptions.
    """
    try:
        yield
    except (BadModel, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise BadModel(f"{what}: {error!r}") from error


def _without_rows_beyond(tokenizer: Tokenizer, rows: Any) -> Tokenizer:
    """Drop added tokens that the model's table has no row for, such as a padding token for training."""
    surplus = [i for i in tokenizer.get_added_tokens_decoder() if isinstance(rows, int) and i >= rows]
    if not surplus:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] not in surplus]
    return Tokenizer.from_str(json.dumps(state))


def _mark_special(tokenizer: Tokenizer, ids: set[int], contents: set[str | None]) -> None:
    """Make tokens special that are listed so but not flagged: hidden in answers, and plain text in user text."""
    added = tokenizer.get_added_tokens_decoder()
    ends = {added[i].content for i in ids if i in added}
    known = [content for content in contents | ends if content and tokenizer.token_to_id(content) is not None]
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in sorted(known)])


def _listed(settings: Mapping[str, Any]) -> list[str]:
    """Further special tokens. Transformers lists all user-defined tokens of Llama's class, but reads them as text."""
    if "LlamaTokenizer" in str(settings.get("tokenizer_class")):
        return []
    listed = [settings.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    return [token for tokens in listed if isinstance(tokens, list) for token in tokens if isinstance(token, str)]


def _ids(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [i for i in listed if isinstance(i, int) and not isinstance(i, bool)]
