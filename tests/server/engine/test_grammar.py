"""Structured output: masks, the limits on time and memory, and the compiler's queue."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.grammar import Grammar, Grammars
from server.engine.request import Delivery, Request, Sampling
from server.errors import EngineFailed, InvalidRequest, QueueFull
from server.model.gguf_vocabulary import from_gguf
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary
from tests.server.engine.conftest import Panic, make_text
from tests.waiting import until

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "kind": {"enum": ["good", "bad"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def tiny_text(tiny_vocabulary: Vocabulary) -> ModelTokenizer:
    return ModelTokenizer(tiny_vocabulary)


@pytest.fixture
def grammars(tiny_text: ModelTokenizer) -> Grammars:
    return Grammars(tiny_text, tiny_text.size)


@pytest.fixture
def gate(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(grammars, monkeypatch)


class Gate:
    """Holds up compilations until `opened` is set, and records their schemas."""

    def __init__(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.opened = threading.Event(), threading.Event()
        self.compiled: list[Any] = []
        compile = grammars._compile

        def held(schema: str) -> Any:
            self.compiled.append(json.loads(schema)["enum"][0])
            self.began.set()
            assert self.opened.wait(10)
            return compile(schema)

        monkeypatch.setattr(grammars, "_compile", held)


def allowed(grammar: Grammar, size: int) -> list[int]:
    return np.flatnonzero(np.unpackbits(grammar.mask(), count=size, bitorder="little")).tolist()


def random_answer(text: ModelTokenizer, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """A random answer that the grammar allows; None if it did not end."""
    dice, tokens = random.Random(seed), []
    for _ in range(most):
        token = dice.choice(allowed(grammar, text.size))
        grammar.accept(token)
        if token in text.vocabulary.eos_ids:
            return text.decode(tokens)
        tokens.append(token)
    return None


def test_random_answers_follow_the_schema(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    import jsonschema

    answers = [random_answer(tiny_text, grammar, i) for i, grammar in enumerate(grammars.ask(POINT, 20).result())]
    complete = [json.loads(a) for a in answers if a is not None]
    assert len(complete) >= 15
    for answer in complete:
        jsonschema.validate(answer, POINT)
    assert {answer["kind"] for answer in complete} == {"good", "bad"}


def test_the_space_that_sentencepiece_adds_is_not_in_answers(spm_metadata: dict[str, Any]) -> None:
    text = ModelTokenizer(from_gguf(spm_metadata))
    schema = {"type": "object", "properties": {"the other": {"enum": ["and again"]}}, "additionalProperties": False}
    compiled = Grammars(text, text.size).ask(schema, 10).result()
    complete = [json.loads(a) for i, g in enumerate(compiled) if (a := random_answer(text, g, i)) is not None]
    assert {"the other": "and again"} in complete and all(a in ({}, {"the other": "and again"}) for a in complete)


def test_special_tokens_are_masked_and_end_tokens_come_last(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    special, ends = set(tiny_text.vocabulary.special.values()), tiny_text.vocabulary.eos_ids
    [grammar] = grammars.ask({"enum": [{"a": "<|im_end|>"}]}, 1).result()
    answer = b""
    while not answer.endswith(b"}"):
        ids = allowed(grammar, tiny_text.size)
        assert not special & set(ids)
        grammar.accept(ids[0])
        answer += tiny_text.token_bytes(ids[0])
    assert json.loads(answer) == {"a": "<|im_end|>"}
    for _ in range(2):
        assert set(allowed(grammar, tiny_text.size)) == ends
        grammar.accept(min(ends))


def test_an_end_token_that_is_a_letter_is_masked_in_strings(tiny_text: ModelTokenizer) -> None:
    letter = tiny_text.encode("a")[0]
    text = ModelTokenizer(replace(tiny_text.vocabulary, eos_ids=tiny_text.vocabulary.eos_ids | {letter}))
    for vocabulary, is_allowed in ((tiny_text, True), (text, False)):
        (grammar,) = Grammars(vocabulary, vocabulary.size).ask({"type": "string"}, 1).result()
        grammar.accept(vocabulary.encode('"')[0])
        assert (letter in allowed(grammar, vocabulary.size)) is is_allowed


@pytest.mark.parametrize(
    ("space", "is_allowed"),
    [("", True), (" ", True), ("\n", True), ("\n  ", True), ("  ", False), ("\n\n", False), (" \n", False)],
)
def test_whitespace_between_json_tokens_is_limited(
    grammars: Grammars, tiny_text: ModelTokenizer, space: str, is_allowed: bool
) -> None:
    [grammar] = grammars.ask(POINT, 1).result()
    for token in tiny_text.encode("{" + space + '"', add_bos=False, prefix_space=False):
        if token not in allowed(grammar, tiny_text.size):
            assert not is_allowed
            return
        grammar.accept(token)
    assert is_allowed


def test_a_model_may_have_more_ids_than_the_tokenizer(tiny_text: ModelTokenizer) -> None:
    [grammar] = Grammars(tiny_text, tiny_text.size + 50).ask(POINT, 1).result()
    assert max(allowed(grammar, tiny_text.size + 50)) < tiny_text.size


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nonsense"}, ""),
        ({"type": "string", "pattern": "("}, ""),
        ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
        ({"type": "string", "pattern": "(?:a?){5000}a{5000}" * 3}, ""),
        ({"$ref": "https://example.com/schema"}, ""),
        ({"$ref": "#"}, "refer to itself"),
        ({"enum": ["x" * 70_000]}, "70"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ""),
    ],
)
def test_invalid_schemas_are_refused_soon_and_with_a_reason(
    grammars: Grammars, schema: dict[str, Any], reason: str
) -> None:
    start = time.process_time()
    with pytest.raises(InvalidRequest, match=f"schema.*{reason}") as refused:
        grammars.ask(schema, 1).result()[0].mask()
    assert time.process_time() - start < 5
    assert refused.value.param == "response_format" and len(refused.value.message) < 400
    assert grammars.ask(POINT, 1).result()


@pytest.mark.parametrize("pattern", ["(.*a.*){200}", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_mask_takes_bounded_time(grammars: Grammars, tiny_text: ModelTokenizer, pattern: str) -> None:
    [grammar] = grammars.ask({"type": "string", "pattern": pattern}, 1).result()
    try:
        for _ in range(40):
            start = time.thread_time()
            ids = allowed(grammar, tiny_text.size)
            assert time.thread_time() - start < 0.25
            grammar.accept(ids[-1])
    except InvalidRequest as error:
        assert "too complex" in error.message


def test_answers_do_not_share_limits(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    names = [f"s{i}" for i in range(1, 6)]
    properties = {name: {"type": "string", "maxLength": 1000 * i} for i, name in enumerate(names, 1)}
    dice = random.Random(0)
    for grammar in grammars.ask({"type": "object", "properties": properties, "required": names}, 8).result():
        answer = {name: "".join(dice.choices("abcdefgh ", k=dice.randint(200, 600))) for name in names}
        for token in tiny_text.encode(json.dumps(answer), add_bos=False, prefix_space=False):
            assert token in allowed(grammar, tiny_text.size)
            grammar.accept(token)


KEYS = ("type", "properties", "items", "enum", "pattern", "anyOf", "minimum", "required", "$ref")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from((*KEYS, "object", "string", "#")),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), v, max_size=4),
)
shared: list[Grammars] = []


@settings(deadline=None)
@given(schema=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_schema_is_compiled_or_refused(schema: dict[str, Any]) -> None:
    if not shared:
        text = make_text()
        shared.append(Grammars(text, text.size))
    try:
        [grammar] = shared[0].ask(schema, 1).result()
        grammar.mask()
    except InvalidRequest:
        return


def test_without_llguidance_only_schemas_are_refused(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match="need the package llguidance"):
        Grammars(tiny_text, tiny_text.size).ask(POINT, 1).result()


def test_cancelled_requests_are_not_compiled(grammars: Grammars, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.grammar.MAX_WAITING", 6)
    first = grammars.ask({"enum": [0]}, 100)
    assert gate.began.wait(10)
    others = [grammars.ask({"enum": [i]}, 1) for i in range(1, 6)]
    with pytest.raises(QueueFull):
        grammars.ask({"enum": [6]}, 1)
    assert first.cancel() and all(one.cancel() for one in others)
    last = grammars.ask({"enum": [7]}, 1)
    gate.opened.set()
    assert last.result(10) and gate.compiled == [0, 7]


def test_tenants_take_turns(grammars: Grammars, gate: Gate) -> None:
    many = [grammars.ask({"enum": [f"many {i}"]}, 50, "a") for i in range(8)]
    one = grammars.ask({"enum": ["one"]}, 1, "b")
    gate.opened.set()
    assert len(one.result(10)) == 1
    assert [len(job.result(10)) for job in many] == [50] * 8
    assert gate.compiled.index("one") <= 2
    assert [name for name in gate.compiled if name != "one"] == [f"many {i}" for i in range(8) for _ in range(50)]


def test_the_queue_is_limited_per_tenant_and_in_total(
    grammars: Grammars, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.grammar.MAX_WAITING", 2)
    monkeypatch.setattr("server.engine.grammar.MAX_WAITING_IN_ALL", 3)
    jobs = [grammars.ask({"enum": [1]}, 1, "a") for _ in range(2)]
    with pytest.raises(QueueFull, match="2 schemas"):
        grammars.ask(POINT, 1, "a")
    jobs.append(grammars.ask({"enum": [1]}, 1, "b"))
    with pytest.raises(QueueFull):
        grammars.ask(POINT, 1, "c")
    gate.opened.set()
    assert all(len(job.result(10)) == 1 for job in jobs)
    assert grammars.ask({"enum": [1]}, 1, "a").result(10)
    pending = grammars.ask({"enum": [1]}, 5, "a")
    grammars.close()
    assert pending.cancelled() or pending.result(10)


def test_a_missing_thread_rejects_only_the_requests_that_wait(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = threading.stack_size()

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(QueueFull, match="try again later"):
        patch.setattr(threading.Thread, "start", no_thread)
        grammars.ask(POINT, 1).result(10)
    assert grammars.ask(POINT, 1).result(10) and threading.stack_size() == default


def test_a_panic_of_the_library_fails_one_request(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(schema: str) -> Any:
        raise Panic("at line 1")

    with monkeypatch.context() as patch, pytest.raises(EngineFailed, match="could not be compiled: at line 1"):
        patch.setattr(grammars, "_compile", panics)
        grammars.ask(POINT, 1).result(10)
    assert grammars.ask(POINT, 1).result(10)


def chain(count: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A schema of `count` definitions, each of which refers to the next."""
    to = [{"$ref": f"#/d/{i}"} for i in range(count + 1)]
    return {**to[0], "d": {**{str(i): link(to[i + 1]) for i in range(count)}, str(count): {"type": "string"}}}


IN_PROCESS = """
import json, sys, threading
from server.engine.grammar import Grammars
from server.errors import InvalidRequest
from tests.server.engine.conftest import make_text

text, schema = make_text(), json.load(sys.stdin)
grammars, began = Grammars(text, text.size), threading.Event()
if schema == "hang":
    grammars._compile = lambda schema: began.set() or threading.Event().wait()
    grammars.ask({}, 1)
    assert began.wait(10)
    grammars.close()
else:
    try:
        grammars.ask(schema, 1).result()[0].mask()
    except InvalidRequest:
        pass
print("done", end="")
"""


@pytest.mark.parametrize(
    "schema",
    ["hang", chain(1700, lambda to: {"items": to}), chain(1250, lambda to: {"anyOf": [to, {"const": 1}]})],
    ids=["hang", "items", "anyOf"],
)
def test_neither_recursion_nor_a_hanging_compiler_harms_the_process(schema: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS], input=json.dumps(schema), text=True, capture_output=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout == "done", done.stderr


@pytest.mark.parametrize("min_tokens", [0, 50])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_answer_ends_whatever_min_tokens_and_ignore_eos_say(
    bench: Any, text: ModelTokenizer, min_tokens: int, ignore_eos: bool
) -> None:
    b = bench()
    [grammar] = Grammars(text, text.size).ask({"enum": [{"a": 1}]}, 1).result()
    options: dict[str, Any] = {"max_tokens": 60, "min_tokens": min_tokens, "ignore_eos": ignore_eos}
    heard = b.submit(text.encode("hi"), constraint=grammar, **options)
    b.settle()
    assert (heard.reason, heard.error) == ("stop", None) and json.loads(heard.text) == {"a": 1}


def test_a_required_stop_token_does_not_end_before_min_tokens(bench: Any, text: ModelTokenizer) -> None:
    b = bench()
    [grammar] = Grammars(text, text.size).ask(POINT, 1).result()
    [brace] = text.encode("{")
    options: dict[str, Any] = {"max_tokens": 60, "min_tokens": 8, "ignore_eos": False, "stop_token_ids": (brace,)}
    heard = b.submit(text.encode("hi"), constraint=grammar, **options)
    b.settle()
    assert heard.error is None and heard.tokens[0] == brace and len(heard.tokens) >= 8


def test_constrained_and_free_requests_in_one_batch(bench: Any, text: ModelTokenizer, tools: Any) -> None:
    b = bench()
    free = [b.submit(text.encode(p), max_tokens=8) for p in ("a b", "c")]
    constrained = [
        b.submit(text.encode("hi"), max_tokens=100, temperature=0.8, seed=i, ignore_eos=False, constraint=grammar)
        for i, grammar in enumerate(Grammars(text, text.size).ask(POINT, 3).result())
    ]
    b.settle()
    assert all(heard.tokens == tools.solo(heard, b.runner.vocab) for heard in free)
    for heard in constrained:
        assert heard.error is None and heard.text.startswith("{")
        assert heard.reason == "length" or set(json.loads(heard.text)) == {"x", "kind"}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the garbage collector, so that reference cycles stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_grammars_are_released_with_their_requests(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [weakref.ref(grammar) for _ in range(3) for grammar in grammars.ask(POINT, 2).result()]
    grammars.ask(POINT, 1).cancel()
    compile = grammars._compile

    def refusing(schema: str) -> Any:
        grammar = Grammar(compile(schema), grammars._ends)
        left.append(weakref.ref(grammar))
        raise InvalidRequest(f"{type(grammar).__name__} is refused")

    monkeypatch.setattr(grammars, "_compile", refusing)
    with pytest.raises(InvalidRequest, match="Grammar is refused"):
        grammars.ask(POINT, 1).result()
    assert len(left) == 7
    until(lambda: not any(grammar() for grammar in left))


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("end", ["stop", "cancelled"])
def test_an_ended_request_releases_its_grammar_and_listener(
    bench: Any, text: ModelTokenizer, overlapped: bool, end: str
) -> None:
    """A listener refers to its requests, and a request to its listener."""
    b = bench(overlapped=overlapped)

    class Call:
        def __init__(self, grammar: Grammar) -> None:
            self.reasons = list[str | None]()
            prompt = tuple(text.encode("hi"))
            self.request = Request("r", prompt, Sampling(max_tokens=60), lambda d: self.hear(d), constraint=grammar)

        def hear(self, delivery: Delivery) -> None:
            self.reasons.append(delivery.finish_reason)

    [grammar] = Grammars(text, text.size).ask({"enum": [{"a": 1}]}, 1).result()
    call = Call(grammar)
    b.engine.submit(call.request)
    if end == "cancelled":
        b.engine.cancel("r")
    b.settle()
    assert call.reasons[-1] == end and call.request.constraint is None
    left = [weakref.ref(thing) for thing in (grammar, call, call.request)]
    del grammar, call
    assert not [thing() for thing in left if thing() is not None]
