from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from server.errors import BadModel
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import PRE_TOKENIZERS, Vocabulary, from_folder, from_gguf, write_folder

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


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (160, 0x2FFF), (0x3000, 0xD7FF), (0x1F300, 0x1F6FF)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """GGUF metadata of a small byte-level BPE, with two control tokens and one that is user-defined."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20 + ["the three theories of 12 and 123 there  10"] * 20, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    types = [3, 3, 3] + [1] * (len(tokens) - 4) + [4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


def rebuilt(metadata: dict[str, Any], splitters: list[Any], ignore_merges: bool = False) -> Tokenizer:
    """The tokenizer as its model's own tokenizer.json has it."""
    pairs = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "tekken", "qwen2", "deepseek-r1-qwen"])
def test_pre_tokenizers_cut_as_the_original_ones(trained: dict[str, Any], pre: str) -> None:
    ours = from_gguf(trained | {"tokenizer.ggml.pre": pre}).tokenizer
    splitters: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        splitters.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre != "gpt-2":
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        splitters = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    theirs = rebuilt(trained, splitters, PRE_TOKENIZERS[pre].whole)
    for text in TEXTS + random_texts(300):
        normal = ours.normalizer.normalize_str(text) if ours.normalizer is not None else text
        assert ours.encode(text).ids == theirs.encode(normal).ids, text


def test_any_text_comes_back(trained: dict[str, Any]) -> None:
    tokenizer = from_gguf(trained | {"tokenizer.ggml.pre": "smollm"}).tokenizer
    for text in TEXTS + random_texts(50):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_and_added_tokens(trained: dict[str, Any]) -> None:
    vocabulary = from_gguf(trained)
    assert vocabulary.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (vocabulary.eos_ids, vocabulary.bos_id, vocabulary.add_bos) == (frozenset({2}), 1, False)
    think = len(trained["tokenizer.ggml.tokens"]) - 1
    assert vocabulary.tokenizer.encode("<|im_start|>a<think>").ids[::2] == [1, think]
    vocabulary.tokenizer.encode_special_tokens = True
    assert 1 not in vocabulary.tokenizer.encode("<|im_start|>").ids
    assert vocabulary.chat_template == "{{ messages }}"
    more = from_gguf(trained | {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.add_bos_token": True})
    assert more.eos_ids == frozenset({0, 2}) and more.add_bos
    assert from_gguf(trained | {"tokenizer.ggml.pre": "llama-bpe"}).add_bos


def test_what_fills_up_a_table_is_no_text(trained: dict[str, Any]) -> None:
    """Converters write a token for each row that the tokenizer has none for; a model may choose one all the same."""
    more = {
        "tokenizer.ggml.tokens": [*trained["tokenizer.ggml.tokens"], "[PAD1]", "<|stop|>"],
        "tokenizer.ggml.token_type": [*trained["tokenizer.ggml.token_type"], 5, 5],
        "tokenizer.ggml.eot_token_id": len(trained["tokenizer.ggml.tokens"]) + 1,
    }
    whole, before = from_gguf(trained | more), from_gguf(trained)
    pad = len(trained["tokenizer.ggml.tokens"])
    assert whole.tokenizer.id_to_token(pad) is None and whole.tokenizer.decode([pad]) == ""
    assert whole.eos_ids == before.eos_ids | {pad + 1} and whole.special["<|stop|>"] == pad + 1, "one that ends is kept"
    text = "a text [PAD1], and more"
    assert whole.tokenizer.encode(text).ids == before.tokenizer.encode(text).ids
    unused = [5 if kind == 1 else kind for kind in trained["tokenizer.ggml.token_type"]]
    merged = from_gguf(trained | {"tokenizer.ggml.token_type": unused})
    assert merged.tokenizer.encode("the model").ids, "what merges are made of is kept, whatever it is called"


def test_tokens_known_as_ends_are_ends_though_the_file_names_one(trained: dict[str, Any]) -> None:
    assert from_gguf(trained).eos_ids == {2}, "the file has <|endoftext|> for what is unknown"
    told = {key: value for key, value in trained.items() if key != "tokenizer.ggml.unknown_token_id"}
    for eos in (0, 2):
        vocabulary = from_gguf(told | {"tokenizer.ggml.eos_token_id": eos})
        assert (vocabulary.eos_ids, vocabulary.eos_id) == (frozenset({0, 2}), eos)
    think = len(trained["tokenizer.ggml.tokens"]) - 1
    assert from_gguf(trained | {"tokenizer.ggml.eom_token_id": 1}).eos_ids == {1, 2}
    for name, kind, ends in [
        ("<|eot_id|>", 3, True),
        ("<|end|>", 4, True),
        ("<|end|>", 1, False),
        ("</s>", 3, True),
        ("</s>", 4, False),
    ]:
        tokens, types = list(trained["tokenizer.ggml.tokens"]), list(trained["tokenizer.ggml.token_type"])
        tokens[think], types[think] = name, kind
        vocabulary = from_gguf(trained | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
        assert (think in vocabulary.eos_ids) is ends, (name, kind)
        assert (name in vocabulary.special) is ends, "an end is not shown"
        if kind != 1:
            assert vocabulary.tokenizer.encode(f"a{name}").ids[-1] == think


def test_an_end_token_listed_as_ordinary_is_special_all_the_same(trained: dict[str, Any]) -> None:
    types = [3, 3, 1, *trained["tokenizer.ggml.token_type"][3:]]
    assert from_gguf(trained | {"tokenizer.ggml.token_type": types}).special["<|im_end|>"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.pre": "bloom"}, "'bloom' is not known"),
        ({"tokenizer.ggml.pre": None}, "does not say how its tokenizer splits texts"),
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.model": None}, "None is not served"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no list of texts"),
        ({"tokenizer.ggml.merges": 3}, "not whole"),
        ({"tokenizer.chat_template": 3}, "chat_template is of the wrong type"),
        ({"tokenizer.ggml.merges": ["nonsense"]}, "not whole"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "not whole"),
        ({"tokenizer.ggml.token_type": [1]}, "not whole"),
        ({"tokenizer.ggml.eos_token_id": None}, "ends a text"),
    ],
)
def test_gguf_vocabularies_that_cannot_be_served(trained: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        from_gguf(trained | change)
    with pytest.raises(BadModel, match=r"lacks tokenizer\.ggml\.tokens"):
        from_gguf({k: v for k, v in trained.items() if k != "tokenizer.ggml.tokens"})


def folder(path: Path, vocabulary: Vocabulary, **settings: Any) -> Path:
    vocabulary.tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"} | settings))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    return path


def test_folder_files(tmp_path: Path, trained: dict[str, Any]) -> None:
    gguf = from_gguf(trained)
    gguf.tokenizer.enable_truncation(4)
    gguf.tokenizer.enable_padding(length=64)
    vocabulary = from_folder(folder(tmp_path, gguf, eos_token={"content": "<|endoftext|>"}, chat_template="T"))
    assert (vocabulary.eos_ids, vocabulary.bos_id, vocabulary.add_bos) == (frozenset({0, 2}), 1, False)
    assert vocabulary.eos_id == 0, "the tokenizer's own"
    assert vocabulary.chat_template == "T"
    assert 4 < len(vocabulary.tokenizer.encode("abcdefghijk lmnop").ids) < 64
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    assert from_folder(tmp_path).eos_ids == frozenset({0, 1, 2})
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    assert from_folder(tmp_path).eos_id == 2, "and not the smallest"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert from_folder(tmp_path).chat_template == "J"


def test_ids_with_a_hole_lose_no_end_token(tmp_path: Path, trained: dict[str, Any]) -> None:
    folder(tmp_path, from_gguf(trained), eos_token="<|im_end|>")
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for added in saved["added_tokens"]:
        added["id"] = 900 if added["content"] == "<|im_end|>" else added["id"]
    saved["model"]["vocab"]["<|im_end|>"] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 900}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [900, 901, -1, 0]}))
    vocabulary = from_folder(tmp_path)
    assert (vocabulary.eos_ids, vocabulary.eos_id) == (frozenset({0, 900}), 900)
    assert vocabulary.size == 901 == ModelTokenizer(vocabulary).size


def test_folder_chat_templates_by_name(tmp_path: Path, trained: dict[str, Any]) -> None:
    several = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
    assert from_folder(folder(tmp_path, from_gguf(trained), chat_template=several)).chat_template == "D"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja cannot be read"),
        ("chat_template.json", b'{"chat_template": 5}', "neither a text nor a list of named ones: 5"),
        ("chat_template.json", b'{"chat_template": ["T"]}', "neither a text nor a list"),
        ("chat_template.json", b'{"chat_template": [{"name": "default", "template": 5}]}', "neither a text nor a list"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', r"tokenizer_config\.json cannot be read"),
        ("generation_config.json", b"[" * 200_000, r"generation_config\.json cannot be read: maximum recursion"),
    ],
)
def test_texts_that_are_none(file: str, content: bytes, said: str, tmp_path: Path, trained: dict[str, Any]) -> None:
    (folder(tmp_path, from_gguf(trained)) / file).write_bytes(content)
    with pytest.raises(BadModel, match=said):
        from_folder(tmp_path)


def test_folder_bos_from_the_post_processor_or_the_settings(tmp_path: Path, trained: dict[str, Any]) -> None:
    vocabulary = from_gguf(trained)
    vocabulary.tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert from_folder(folder(tmp_path, vocabulary)).add_bos
    assert not from_folder(folder(tmp_path, vocabulary, add_bos_token=False)).add_bos


def test_folder_bos_that_the_post_processor_alone_names(tmp_path: Path, trained: dict[str, Any]) -> None:
    vocabulary = from_gguf(trained)
    vocabulary.tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    again = from_folder(folder(tmp_path, vocabulary, bos_token=None))
    assert (again.bos_id, again.add_bos) == (1, True)
    (tmp_path / "tokenizer_config.json").unlink()
    again = from_folder(tmp_path)
    assert (again.bos_id, again.add_bos) == (1, True)


def ordinary(path: Path, *tokens: str) -> None:
    """Make these special tokens of a folder's tokenizer.json ordinary entries of its vocabulary."""
    saved = json.loads((path / "tokenizer.json").read_text())
    saved["added_tokens"] = [added for added in saved["added_tokens"] if added["content"] not in tokens]
    (path / "tokenizer.json").write_text(json.dumps(saved))


def test_tokens_that_only_the_settings_call_special_are_special(tmp_path: Path, trained: dict[str, Any]) -> None:
    """As Transformers has it: else they are cut in pieces where a template writes them, and shown where generated."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{{ pad_token }}{{ end }}"
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    plain = [{"role": "user", "content": "a<|im_end|>b"}]
    folder(tmp_path, from_gguf(trained), **settings)
    ordinary(tmp_path, "<|im_start|>", "<|im_end|>")
    vocabulary = from_folder(tmp_path)
    assert vocabulary.special.keys() >= {"<|im_start|>", "<|im_end|>"}
    text = ModelTokenizer(vocabulary)
    ids = text.encode_chat(plain)
    assert [i for i in ids if i < 3] == [1, 2, 0] and text.decode(ids) == "a<|im_end|>b"
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "abc"}], return_dict=False
    )
    assert text.encode_chat([{"role": "user", "content": "abc"}]) == theirs
    write_folder(vocabulary, tmp_path)
    assert ModelTokenizer(from_folder(tmp_path)).encode_chat(plain) == ids


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_an_added_token_that_ends_an_answer_is_special_whoever_says_so(
    where: str, tmp_path: Path, trained: dict[str, Any]
) -> None:
    folder(tmp_path, from_gguf(trained), eos_token="<|endoftext|>")
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for added in saved["added_tokens"]:
        added["special"] = added["content"] != "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": [0, 2] if name == where else 0}))
    vocabulary = from_folder(tmp_path)
    assert vocabulary.eos_ids == {0, 2} and vocabulary.special["<|im_end|>"] == 2
    assert 2 not in ModelTokenizer(vocabulary).encode("a<|im_end|>b"), "people's words end nothing"


def test_names_of_a_templates_own_tokens_survive_being_written(tmp_path: Path, trained: dict[str, Any]) -> None:
    template = "{{ boi }}{{ image_token }}"
    own = {"boi": "<|im_start|>", "image_token": "<|im_end|>"}
    folder(tmp_path, from_gguf(trained), extra_special_tokens=own, chat_template=template)
    vocabulary = from_folder(tmp_path)
    assert {name: vocabulary.names[name] for name in own} == own
    write_folder(vocabulary, tmp_path)
    again = from_folder(tmp_path)
    assert again.names.items() >= vocabulary.names.items()
    assert ModelTokenizer(again).encode_chat([]) == ModelTokenizer(vocabulary).encode_chat([]) == [1, 2]


@pytest.mark.parametrize("listed", ["additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"])
def test_each_list_of_special_tokens_is_read(listed: str, tmp_path: Path, trained: dict[str, Any]) -> None:
    told: Any = ["<|im_end|>", {"content": "<nowhere>"}]
    if listed == "added_tokens_decoder":
        told = {"2": {"content": "<|im_end|>", "special": True}}
    folder(tmp_path, from_gguf(trained), **{listed: told})
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for added in saved["added_tokens"]:
        added["special"] = added["content"] != "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    vocabulary = from_folder(tmp_path)
    assert vocabulary.special["<|im_end|>"] == 2 and "<nowhere>" not in vocabulary.special


@pytest.mark.parametrize(("class_", "text"), [("LlamaTokenizer", "a<think>b<|im_end|>"), (None, "ab")])
def test_what_a_user_of_sentencepiece_has_defined_stays_text(
    class_: str | None, text: str, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """Transformers lists all such pieces, and Llama's class reads them as text; ends stay what they are."""
    more = {"extra_special_tokens": ["<think>", "<|im_end|>"], "bos_token": "<|im_start|>", "tokenizer_class": class_}
    folder(tmp_path, from_gguf(trained), **more)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for added in saved["added_tokens"]:
        added["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    vocabulary = from_folder(tmp_path)
    ids = vocabulary.tokenizer.encode("<|im_start|>a<think>b<|im_end|>").ids
    assert ids[0] == 1 and ModelTokenizer(vocabulary).decode(ids) == text


def test_added_tokens_that_only_the_settings_have(tmp_path: Path, trained: dict[str, Any]) -> None:
    size = from_gguf(trained).size
    more = {str(size): {"content": "<end>", "special": True}, str(size + 1): {"content": "<tool>"}}
    folder(tmp_path, from_gguf(trained), eos_token="<end>", added_tokens_decoder=more)
    vocabulary = from_folder(tmp_path)
    assert (vocabulary.eos_id, vocabulary.size) == (size, size + 2)
    assert "<end>" in vocabulary.special and "<tool>" not in vocabulary.special
    assert vocabulary.tokenizer.encode("<tool>").ids == [size + 1]
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size + 1}))  # no row for the last
    assert from_folder(tmp_path).size == size + 1
    (tmp_path / "config.json").unlink()
    folder(tmp_path, from_gguf(trained), added_tokens_decoder={str(size + 7): {"content": "<end>"}})
    with pytest.raises(BadModel, match=f"'<end>' the id {size + 7}"):
        from_folder(tmp_path)
    for broken in (
        {"x": {"content": "<end>"}},
        {"5": {}},
        {"5": "<end>"},
        ["<end>"],
        {"-5": {"content": "<end>"}},
        {"5": {"content": 5}},
        {"5": {"content": None}},
    ):
        folder(tmp_path, from_gguf(trained), added_tokens_decoder=broken)
        with pytest.raises(BadModel, match="added_tokens_decoder is not whole"):
            from_folder(tmp_path)


def test_folder_refusals(tmp_path: Path, trained: dict[str, Any]) -> None:
    with pytest.raises(BadModel, match=r"no tokenizer\.json; other"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadModel, match=r"no tokenizer\.json; its tokenizer\.model is not read.*save_pretrained"):
        from_folder(tmp_path)
    folder(tmp_path, from_gguf(trained), bos_token="<nowhere>", add_bos_token=True)
    with pytest.raises(BadModel, match="begin with"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadModel, match=r"tokenizer_config\.json"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModel, match=r"tokenizer\.json cannot be read"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"continuing_subword_prefix": "x" * 50}}, "cannot be read: range end index"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}}, "fails on a text"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0, "<end>": 1}, "unk_token": "<unk>"}}, "Missing .UNK. token"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}, "is its unk_token in its vocabulary"),
    ],
    ids=["panic_in_loading", "panic_in_encoding", "words", "unigram"],
)
def test_a_tokenizer_on_which_the_library_fails_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """Some of it are panics, which are no Exception."""
    file = folder(tmp_path, from_gguf(trained)) / "tokenizer.json"
    saved = json.loads(file.read_text())
    model = change.get("model", {})
    saved |= change | {"model": model if "type" in model else saved["model"] | model}
    file.write_text(json.dumps(saved))
    with pytest.raises(BadModel, match=said):
        from_folder(tmp_path)


def test_a_pre_tokenizer_of_a_long_name_is_cut(trained: dict[str, Any]) -> None:
    with pytest.raises(BadModel) as e:
        from_gguf(trained | {"tokenizer.ggml.pre": "x" * 10**6})
    assert len(e.value.message) < 400


@pytest.mark.parametrize("kind", ["trained", "spm_metadata"])
def test_what_is_written_reads_back_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    told = request.getfixturevalue(kind)
    ours = from_gguf(told | {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": True})
    write_folder(ours, tmp_path)
    again = from_folder(tmp_path)
    for name in ("chat_template", "eos_ids", "eos_id", "bos_id", "special", "add_bos"):
        assert getattr(again, name) == getattr(ours, name), name
    for text in TEXTS:
        assert again.tokenizer.encode(text).ids == ours.tokenizer.encode(text).ids


def test_special_tokens_that_are_normalized_keep_their_names(tmp_path: Path, spm_metadata: dict[str, Any]) -> None:
    """As the first Llama's tokenizer.json has them, whose normalizer puts a space before each."""
    folder(tmp_path, from_gguf(spm_metadata), bos_token="<s>", eos_token="</s>", add_bos_token=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["normalizer"] = {"type": "Prepend", "prepend": "\u2581"}
    saved["added_tokens"] = [added | {"normalized": True} for added in saved["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    vocabulary = from_folder(tmp_path)
    assert vocabulary.tokenizer.id_to_token(vocabulary.bos_id) == "\u2581<s>"
    write_folder(vocabulary, tmp_path)
    again = from_folder(tmp_path)
    assert (again.bos_id, again.eos_id, again.special) == (1, 2, vocabulary.special)


def test_a_large_vocabulary_takes_well_under_two_seconds() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    tokens = ["<end>", *alphabet, *(a + b for a, b in pairs)]
    started = time.perf_counter()
    from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
            "tokenizer.ggml.eos_token_id": 0,
        }
    )
    assert time.perf_counter() - started < 2.0
