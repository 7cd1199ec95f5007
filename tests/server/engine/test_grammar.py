"""Grammars over a small byte-level vocabulary: what is allowed next, the end, and the limits."""

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
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary, from_gguf
from tests.server.engine.conftest import Panic
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


def allowed(grammar: Grammar, size: int) -> list[int]:
    return np.flatnonzero(np.unpackbits(grammar.mask(), count=size, bitorder="little")).tolist()


def walk(text: ModelTokenizer, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """A random answer within the grammar; None if it did not end."""
    dice, said = random.Random(seed), []
    for _ in range(most):
        token = dice.choice(allowed(grammar, text.size))
        grammar.accept(token)
        if token in text.vocabulary.eos_ids:
            return text.decode(said)
        said.append(token)
    return None


def test_random_walks_follow_the_schema(tiny_text: ModelTokenizer) -> None:
    import jsonschema

    grammars = Grammars(tiny_text, tiny_text.size).ask(POINT, 20).result()
    answers = [walk(tiny_text, grammar, i) for i, grammar in enumerate(grammars)]
    whole = [json.loads(a) for a in answers if a is not None]
    assert len(whole) >= 15
    for answer in whole:
        jsonschema.validate(answer, POINT)
    assert {answer["kind"] for answer in whole} == {"good", "bad"}


def test_a_space_before_a_text_is_not_put_into_an_answer(
    spm_metadata: dict[str, Any],
) -> None:
    text = ModelTokenizer(from_gguf(spm_metadata))
    schema = {"type": "object", "properties": {"the other": {"enum": ["and again"]}}, "additionalProperties": False}
    answers = [walk(text, grammar, i) for i, grammar in enumerate(Grammars(text, text.size).ask(schema, 10).result())]
    whole = [json.loads(a) for a in answers if a is not None]
    assert {"the other": "and again"} in whole and all(a in ({}, {"the other": "and again"}) for a in whole)


def test_special_tokens_are_never_part_of_it_and_the_end_only_when_it_is_whole(tiny_text: ModelTokenizer) -> None:
    special = set(tiny_text.vocabulary.special.values())
    [grammar] = Grammars(tiny_text, tiny_text.size).ask({"enum": [{"a": "<|im_end|>"}]}, 1).result()
    said = b""
    while not said.endswith(b"}"):
        ids = allowed(grammar, tiny_text.size)
        assert not special & set(ids)
        grammar.accept(ids[0])
        said += tiny_text.token_bytes(ids[0])
    assert json.loads(said) == {"a": "<|im_end|>"}
    assert set(allowed(grammar, tiny_text.size)) == tiny_text.vocabulary.eos_ids
    grammar.accept(min(tiny_text.vocabulary.eos_ids))
    assert set(allowed(grammar, tiny_text.size)) == tiny_text.vocabulary.eos_ids, "after the end, the end again"


@pytest.mark.parametrize(
    ("space", "may"),
    [("", True), (" ", True), ("\n", True), ("\n  ", True), ("  ", False), ("\n\n", False), (" \n", False)],
)
def test_no_room_is_lost_on_spaces_and_empty_lines(tiny_text: ModelTokenizer, space: str, may: bool) -> None:
    [grammar] = Grammars(tiny_text, tiny_text.size).ask(POINT, 1).result()
    for token in tiny_text.encode("{" + space + '"', add_bos=False, prefix_space=False):
        if token not in allowed(grammar, tiny_text.size):
            assert not may
            return
        grammar.accept(token)
    assert may


def test_a_model_s_table_may_be_longer_than_the_vocabulary(tiny_text: ModelTokenizer) -> None:
    [grammar] = Grammars(tiny_text, tiny_text.size + 50).ask(POINT, 1).result()
    ids = allowed(grammar, tiny_text.size + 50)
    assert ids and max(ids) < tiny_text.size


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
        ({"$ref": "#"}, "refer to itself"),
    ],
)
def test_why_a_schema_is_refused_is_told_in_words(tiny_text: ModelTokenizer, schema: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        [grammar] = Grammars(tiny_text, tiny_text.size).ask(schema, 1).result()
        grammar.mask()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?:a?){5000}a{5000}" * 3},
        {"$ref": "https://example.com/schema"},
        {"type": "object", "unevaluatedProperties": False, "patternProperties": {"[": {}}},
        {"enum": ["x" * 70_000]},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
    ],
)
def test_what_cannot_be_held_to_is_refused_and_soon(tiny_text: ModelTokenizer, schema: dict[str, Any]) -> None:
    grammars = Grammars(tiny_text, tiny_text.size)
    start = time.process_time()
    with pytest.raises(InvalidRequest, match="schema") as told:
        grammars.ask(schema, 1).result()
    assert time.process_time() - start < 5
    assert told.value.param == "response_format" and len(told.value.message) < 400
    assert grammars.ask(POINT, 1).result()


@pytest.mark.parametrize("pattern", ["(.*a.*){200}", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_mask_takes_bounded_time(tiny_text: ModelTokenizer, pattern: str) -> None:
    """A pattern made to explode: each step is quick, or the request ends with an error of its own."""
    [grammar] = Grammars(tiny_text, tiny_text.size).ask({"type": "string", "pattern": pattern}, 1).result()
    try:
        for _ in range(40):
            start = time.thread_time()
            ids = allowed(grammar, tiny_text.size)
            assert time.thread_time() - start < 0.25
            grammar.accept(ids[-1])
    except InvalidRequest as error:
        assert "too complex" in error.message


WORDS = (
    "type",
    "properties",
    "items",
    "enum",
    "pattern",
    "anyOf",
    "minimum",
    "required",
    "object",
    "string",
    "$ref",
    "#",
)
SCHEMAS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), v, max_size=4),
)
made: dict[str, Grammars] = {}


@settings(deadline=None)
@given(schema=st.dictionaries(st.sampled_from(WORDS), SCHEMAS, max_size=4))
def test_any_schema_is_compiled_or_refused(schema: dict[str, Any]) -> None:
    if not made:
        from tests.server.engine.conftest import make_text

        text = make_text()
        made["one"] = Grammars(text, text.size)
    try:
        [grammar] = made["one"].ask(schema, 1).result()
        grammar.mask()
    except InvalidRequest:
        return


def numbers(count: int, **limits: float) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "number", **limits} for i in range(count)}}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (numbers(129, minimum=1.5, exclusiveMaximum=7), "258 bounds of numbers"),
        (numbers(1, multipleOf=99_991), "multipleOf"),
        (numbers(1, multipleOf=8_640_000.0), "multipleOf"),
        ({"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 0.991}]}, "multipleOf"),
    ],
)
def test_numbers_that_take_long_are_refused_at_once(
    tiny_text: ModelTokenizer, schema: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(tiny_text, tiny_text.size)
    monkeypatch.setattr(grammars, "_compile", lambda schema: pytest.fail("it was compiled"))
    with pytest.raises(InvalidRequest, match=told) as refused:
        grammars.ask(schema, 1).result()
    assert refused.value.param == "response_format"


def test_usual_numbers_are_compiled(tiny_text: ModelTokenizer) -> None:
    grammars = Grammars(tiny_text, tiny_text.size)
    assert grammars.ask(numbers(20, minimum=0, maximum=1e6, multipleOf=0.01), 1).result()
    assert grammars.ask({"type": "integer", "allOf": [{"multipleOf": 3600}, {"multipleOf": 0.5}]}, 1).result()
    named = {"type": "object", "properties": {"minimum": {"type": "boolean"}, "multipleOf": {"type": "string"}}}
    assert grammars.ask(named, 1).result()


def test_the_vocabulary_is_told_before_the_first_request(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(tiny_text, tiny_text.size)
    monkeypatch.setattr(Grammars, "_told", lambda self: pytest.fail("it was told during traffic"))
    assert grammars.ask(POINT, 1).result(10)


def test_without_the_library_the_rest_works(tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(tiny_text, tiny_text.size)
    with pytest.raises(InvalidRequest, match="llguidance is not installed"):
        grammars.ask(POINT, 1).result()


def test_what_nobody_waits_for_any_more_is_not_compiled(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, begun, go_on, compiled = Grammars(tiny_text, tiny_text.size), threading.Event(), threading.Event(), []
    compile = grammars._compile

    def slow(schema: str) -> Any:
        compiled.append(json.loads(schema))
        begun.set()
        assert go_on.wait(10)
        return compile(schema)

    monkeypatch.setattr(grammars, "_compile", slow)
    monkeypatch.setattr("server.engine.grammar.MAX_WAITING", 6)
    first = grammars.ask({"enum": [0]}, 1)
    assert begun.wait(10)
    gone = [grammars.ask({"enum": [i]}, 1) for i in range(1, 6)]
    with pytest.raises(QueueFull):
        grammars.ask({"enum": [6]}, 1)
    assert all(one.cancel() for one in gone)
    last = grammars.ask({"enum": [7]}, 1)
    go_on.set()
    assert first.result(10) and last.result(10)
    assert compiled == [{"enum": [0]}, {"enum": [7]}]
    grammars.close()


def test_tenants_take_turns(tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests of 50 answers each from one, then one from another, which waits for one grammar and no more."""
    grammars, go_on, compiled = Grammars(tiny_text, tiny_text.size), threading.Event(), []
    compile = grammars._compile

    def slow(schema: str) -> Any:
        assert go_on.wait(10)
        compiled.append(json.loads(schema)["enum"][0])
        return compile(schema)

    monkeypatch.setattr(grammars, "_compile", slow)
    many = [grammars.ask({"enum": [f"many {i}"]}, 50, "a") for i in range(8)]
    one = grammars.ask({"enum": ["one"]}, 1, "b")
    go_on.set()
    assert len(one.result(10)) == 1
    assert [len(asked.result(10)) for asked in many] == [50] * 8
    assert compiled.index("one") <= 2
    assert [told for told in compiled if told != "one"] == [f"many {i}" for i in range(8) for _ in range(50)]


def test_what_is_left_of_a_request_that_nobody_waits_for_is_dropped(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, begun, go_on, compiled = Grammars(tiny_text, tiny_text.size), threading.Event(), threading.Event(), []

    def slow(schema: str) -> Any:
        compiled.append(json.loads(schema)["enum"][0])
        begun.set()
        assert go_on.wait(10)
        raise InvalidRequest("none", "response_format")

    monkeypatch.setattr(grammars, "_compile", slow)
    gone = grammars.ask({"enum": ["gone"]}, 100)
    assert begun.wait(10) and gone.cancel()
    bad = grammars.ask({"enum": ["bad"]}, 100)
    go_on.set()
    with pytest.raises(InvalidRequest, match="none"):
        bad.result(10)
    assert compiled == ["gone", "bad"]


def test_whoever_leaves_as_their_turn_ends_takes_nobody_elses(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A future says that it is cancelled before the request is dropped for it, and turns go on meanwhile."""
    grammars, begun, go_on = Grammars(tiny_text, tiny_text.size), threading.Event(), threading.Event()
    compile, drop = grammars._compile, grammars._drop

    def slow(schema: str) -> Any:
        begun.set()
        assert go_on.wait(10)
        return compile(schema)

    def late(*of: Any) -> None:
        go_on.set()
        for thread in threading.enumerate():
            if thread.name == "loramux-grammar":
                thread.join(10)
        drop(*of)

    monkeypatch.setattr(grammars, "_compile", slow)
    monkeypatch.setattr(grammars, "_drop", late)
    gone = grammars.ask(POINT, 1)
    assert begun.wait(10) and gone.cancel()
    monkeypatch.setattr(grammars, "_drop", drop)
    assert grammars.ask(POINT, 1).result(10)


def test_a_request_that_is_done_before_its_asker_goes_on_is_done_once(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the asker's thread is held up: what is refused takes no time at all."""
    grammars = Grammars(tiny_text, tiny_text.size)

    def held(work: Any) -> None:
        running = threading.Thread(target=work)
        running.start()
        running.join(10)

    monkeypatch.setattr("server.engine.grammar._begin", held)
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            grammars.ask({"x-guidance": {}}, 1).result(10)
    assert not grammars._asked and not grammars._at_work
    monkeypatch.undo()
    assert grammars.ask(POINT, 1).result(10)


def test_where_the_system_has_no_thread_the_next_request_is_served(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And whoever runs the server is told why, and what to do, in one line for many requests."""
    grammars, usual = Grammars(tiny_text, tiny_text.size), threading.stack_size()

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        for _ in range(3):
            with pytest.raises(QueueFull, match="come back later"):
                grammars.ask(POINT, 1).result(10)
    (warned,) = caplog.messages
    assert "can't start new thread" in warned and "256 MiB" in warned and "ulimit -u and -v" in warned
    assert grammars.ask(POINT, 1).result(10) and threading.stack_size() == usual


def chained(count: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A schema of `count` ones, each of which is `link` of a reference to the next one."""
    to = [{"$ref": f"#/d/{i}"} for i in range(count + 1)]
    return {**to[0], "d": {**{str(i): link(to[i + 1]) for i in range(count)}, str(count): {"type": "string"}}}


@pytest.mark.parametrize(
    "schema",
    [
        chained(1700, lambda to: {"items": to}),
        chained(1250, lambda to: {"anyOf": [to, {"const": 1}]}),
    ],
)
def test_a_long_chain_of_references_does_not_end_the_process(schema: dict[str, Any]) -> None:
    told = subprocess.run(
        [sys.executable, "-c", COMPILES], input=json.dumps(schema), text=True, capture_output=True, timeout=100
    )
    assert told.returncode == 0 and told.stdout in ("compiled", "refused"), told.stderr


def test_the_end_of_the_process_does_not_wait_for_a_schema() -> None:
    told = subprocess.run([sys.executable, "-c", HANGS], text=True, capture_output=True, timeout=60)
    assert told.returncode == 0 and told.stdout == "begun", told.stderr


COMPILES = """
import json, sys
from server.engine.grammar import Grammars
from server.errors import InvalidRequest
from tests.server.engine.conftest import make_text

text = make_text()
try:
    [grammar] = Grammars(text, text.size).ask(json.load(sys.stdin), 1).result()
    grammar.mask()
    print("compiled", end="")
except InvalidRequest:
    print("refused", end="")
"""
HANGS = """
import threading
from server.engine.grammar import Grammars
from tests.server.engine.conftest import make_text

text = make_text()
grammars, begun = Grammars(text, text.size), threading.Event()
grammars._compile = lambda schema: begun.set() or threading.Event().wait()
grammars.ask({}, 1)
assert begun.wait(10)
grammars.close()
print("begun", end="")
"""


def test_a_panic_of_the_library_is_one_requests_failure(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panics(schema: str) -> Any:
        raise Panic("at line 1")

    grammars = Grammars(tiny_text, tiny_text.size)
    with monkeypatch.context() as patch:
        patch.setattr(grammars, "_compile", panics)
        with pytest.raises(EngineFailed, match="could not be compiled: at line 1"):
            grammars.ask(POINT, 1).result(10)
    assert grammars.ask(POINT, 1).result(10)


def test_one_tenants_schemas_leave_room_for_others(tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.grammar.MAX_WAITING", 2)
    monkeypatch.setattr("server.engine.grammar.MAX_WAITING_IN_ALL", 3)
    grammars, go_on = Grammars(tiny_text, tiny_text.size), threading.Event()
    compile = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda schema: go_on.wait(10) and compile(schema))
    asked = [grammars.ask(POINT, 1, "a") for _ in range(2)]
    with pytest.raises(QueueFull, match="2 schemas"):
        grammars.ask(POINT, 1, "a")
    asked.append(grammars.ask(POINT, 1, "b"))
    with pytest.raises(QueueFull):
        grammars.ask(POINT, 1, "c")
    go_on.set()
    assert all(len(one.result(10)) == 1 for one in asked)
    assert grammars.ask(POINT, 1, "a").result(10)
    grammars.ask(POINT, 1, "a")
    grammars.close()


def test_an_answer_that_is_whole_ends_before_min_tokens(bench: Any, text: ModelTokenizer) -> None:
    engine = bench()
    [grammar] = Grammars(text, text.size).ask({"enum": [{"a": 1}]}, 1).result()
    heard = engine.submit(text.encode("hi"), max_tokens=60, min_tokens=50, ignore_eos=False, constraint=grammar)
    engine.settle()
    assert (heard.reason, heard.error) == ("stop", None) and json.loads(heard.text) == {"a": 1}


@pytest.mark.parametrize("least", [0, 50])
def test_an_answer_that_is_whole_ends_where_ends_are_ignored(bench: Any, text: ModelTokenizer, least: int) -> None:
    engine = bench()
    [grammar] = Grammars(text, text.size).ask({"enum": [{"a": 1}]}, 1).result()
    heard = engine.submit(text.encode("hi"), max_tokens=60, min_tokens=least, ignore_eos=True, constraint=grammar)
    engine.settle()
    assert heard.reason == "stop" and json.loads(heard.text) == {"a": 1}


def test_a_token_that_stops_answers_stops_none_before_min_tokens(bench: Any, text: ModelTokenizer) -> None:
    """The grammar allows nothing else there, and goes on after it."""
    engine = bench()
    [grammar] = Grammars(text, text.size).ask(POINT, 1).result()
    [brace] = text.encode("{")
    how: dict[str, Any] = {"max_tokens": 60, "min_tokens": 8, "ignore_eos": False, "stop_token_ids": (brace,)}
    heard = engine.submit(text.encode("hi"), constraint=grammar, **how)
    engine.settle()
    assert heard.error is None and heard.tokens[0] == brace and len(heard.tokens) >= 8 and heard.text.startswith("{")


def test_in_one_batch_with_others(bench: Any, text: ModelTokenizer) -> None:
    """Each request has its own place in its grammar; those without one answer as they do alone."""
    engine = bench()
    grammars = Grammars(text, text.size).ask(POINT, 3).result()
    free = [engine.submit(text.encode(p), max_tokens=8) for p in ("a b", "c")]
    held = [
        engine.submit(text.encode("hi"), max_tokens=100, temperature=0.8, seed=i, ignore_eos=False, constraint=g)
        for i, g in enumerate(grammars)
    ]
    engine.settle()
    alone = bench()
    again = [alone.submit(text.encode(p), max_tokens=8) for p in ("a b", "c")]
    alone.settle()
    assert [f.tokens for f in free] == [a.tokens for a in again]
    for heard in held:
        assert heard.reason in ("stop", "length") and heard.error is None
        if heard.reason == "stop":
            assert set(json.loads(heard.text)) == {"x", "kind"}
        else:
            assert heard.text.startswith("{")


def test_an_end_that_is_an_ordinary_token_is_no_part_of_it_either(tiny_text: ModelTokenizer) -> None:
    """It would end the answer in the middle of a text."""
    letter = tiny_text.encode("a")[0]
    text = ModelTokenizer(replace(tiny_text.vocabulary, eos_ids=tiny_text.vocabulary.eos_ids | {letter}))
    for vocabulary, there in ((tiny_text, True), (text, False)):
        (grammar,) = Grammars(vocabulary, vocabulary.size).ask({"type": "string"}, 1).result()
        grammar.accept(vocabulary.encode('"')[0])
        assert (letter in allowed(grammar, vocabulary.size)) is there


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_a_grammar_goes_with_whoever_asked_for_it(tiny_text: ModelTokenizer) -> None:
    grammars = Grammars(tiny_text, tiny_text.size)
    left = [weakref.ref(grammar) for _ in range(3) for grammar in grammars.ask(POINT, 2).result()]
    cancelled = grammars.ask(POINT, 1)
    cancelled.cancel()
    del cancelled
    until(lambda: not any(grammar() for grammar in left))


@pytest.mark.usefixtures("uncollected")
def test_of_a_schema_that_is_refused_nothing_is_kept(
    tiny_text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, left = Grammars(tiny_text, tiny_text.size), list[Any]()
    compile = grammars._compile

    def refusing(schema: str) -> Any:
        grammar = Grammar(compile(schema), grammars._ends)
        left.append(weakref.ref(grammar))
        raise InvalidRequest(f"{type(grammar).__name__} is of no use")

    monkeypatch.setattr(grammars, "_compile", refusing)
    with pytest.raises(InvalidRequest, match="Grammar is of no use"):
        grammars.ask(POINT, 1).result()
    [grammar] = left
    until(lambda: grammar() is None)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("end", ["stop", "cancelled", "refused"])
def test_a_request_that_has_ended_keeps_neither_its_grammar_nor_who_listens(
    bench: Any, text: ModelTokenizer, overlapped: bool, end: str
) -> None:
    """Who listens keeps its requests, as a call keeps the sequences of its answers."""
    engine = bench(overlapped=overlapped)

    class Call:
        def __init__(self) -> None:
            self.requests, self.reasons = list[Request](), list[str | None]()

        def heard(self, delivery: Delivery) -> None:
            self.reasons.append(delivery.finish_reason)

        def add(self, id: str, grammar: Grammar | None = None) -> None:
            sampling = Sampling(max_tokens=60)
            self.requests.append(
                Request(id, tuple(text.encode("hi")), sampling, lambda d: self.heard(d), constraint=grammar)
            )
            engine.engine.submit(self.requests[-1])

    call = Call()
    for grammar in Grammars(text, text.size).ask({"enum": [{"a": 1}]}, 2).result():
        call.add(f"{len(call.requests)}", grammar)
    if end == "cancelled":
        for request in call.requests:
            engine.engine.cancel(request.id)
    elif end == "refused":  # a third one has the id of the first
        call.add("0")
    engine.settle()
    assert call.reasons[-1] == ("stop" if end == "refused" else end) and len(call.reasons) >= len(call.requests)
    kept = call.requests[0]
    assert kept.constraint is None and kept.finished > 0
    left = [weakref.ref(thing) for thing in (grammar, call, *call.requests)]
    del grammar, call, kept
    if end == "cancelled":
        del request
    assert not [thing() for thing in left if thing() is not None]
