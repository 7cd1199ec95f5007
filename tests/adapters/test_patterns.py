"""Untrusted patterns: the results of `re`, within a bounded time."""

from __future__ import annotations

import errno
import json
import math
import re
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import patterns, peft_config
from adapters.errors import AdapterError, InvalidAdapter, StoreFailed

NAMES = [f"model.layers.{i}.{p}" for i in range(12) for p in ("self_attn.q_proj", "mlp.down_proj")]
UNSLOTH = (
    r"(?:.*?(?:vision|image|language|text|model).*?(?:self_attn|attention|mlp|ffn).*?(?:k_proj|q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize(
    "pattern", [r".*\.q_proj", r"model\.layers\.(1|2|11)\..*", UNSLOTH, r"(?i)MODEL.*", r"(model)(.*)+\d?j"]
)
def test_full_matches_equal_re(pattern):
    assert patterns.full_matches(pattern, NAMES, "k") == [re.fullmatch(pattern, n) is not None for n in NAMES]


@pytest.mark.parametrize(
    "hostile",
    [r"(\w+\.?)+!", r"(.|.|m)*!", r"(.|.)(.|.)(.|.)" * 8 + "!", r"(.*)*\1x", r"(?x)([\w.]+) +!", r"(?x:([\w.]+) +!)"],
)
def test_a_slow_pattern_is_stopped(hostile, monkeypatch):
    monkeypatch.setattr(patterns, "CHILD_SECONDS", 0.5)
    started = time.monotonic()
    try:
        assert not any(patterns.full_matches(hostile, NAMES, "target_modules"))
    except InvalidAdapter as error:
        assert "target_modules" in error.message
    assert time.monotonic() - started < 3.0


@pytest.mark.parametrize("child", ["import os; os.kill(os.getpid(), 9)", "raise MemoryError"])
def test_a_killed_child_process_is_a_system_error(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_CHILD", child)
    with pytest.raises(StoreFailed, match="^target_modules: .* cannot be matched now: .* exited with ") as failed:
        patterns.full_matches("(.*)*x", NAMES, "target_modules")
    assert sys.executable not in failed.value.message


def test_an_invalid_pattern_is_refused_by_the_child_process() -> None:
    for pattern in ("(?a)(?u)q_proj", "(a"):
        with pytest.raises(InvalidAdapter, match="is not a valid pattern"):
            patterns.full_matches(pattern, NAMES, "target_modules")


def test_a_child_process_that_cannot_start_is_a_system_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_files(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files", sys.executable)

    monkeypatch.setattr("subprocess.run", out_of_files)
    with pytest.raises(StoreFailed, match="cannot be matched now: Too many open files$"):
        patterns.full_matches("(.*)*x", NAMES, "target_modules")


UNCOUNTED = [
    r"(?x)([\w.]+) +!",
    r"(?ix)([\w.]+) +!",
    r"(?x:([\w.]+) +!)",
    r"(?i-s+x:([\w.]+) +!)",
    r"(?i-s:a)",
    "(?x:([\\w.]+)#a remark\n+!)",
    r"([\w.]+)(?#a remark)+!",
    r"(?:(?=(a+))a)+",
    r"(?<=a)(b)*",
    r"(a*)\1",
    r"(?P<x>a*)(?P=x)",
    r"(a)?(?(1)b|c)",
    r"(?>a*)",
    r"a*+",
    r"(a?){9}",
    r"(a?){2,}?",
    r"(a*)?+b",
    r"a{2}{3}",
    r"[^]a](b)+",
    r"[[]a](b)+",
    r"a)(b",
    r"(a",
    r"+a",
    "(" * 65 + "a" + ")" * 65,
]


@pytest.mark.parametrize("pattern", UNCOUNTED)
def test_unknown_constructs_have_no_bound(pattern):
    assert patterns.steps(pattern, 40) == math.inf


def test_the_bound_counts_ways_and_steps():
    assert patterns.steps(r"model\.layers\.(1|2|11)\..*", 40) < 1000
    assert patterns.steps(r"(?:.*\.)?(?!lm_head)[\w.-]+?(q|k|v)_proj$", 40) < 1e5
    for part in (".*", r"\w+", "a?", "(a|b)", "(a|)", "(a)?", "(?=.*a)"):
        assert patterns.steps(part * 31, 40) > 2**30, part
    assert patterns.steps("a{3}" * 30, 40) < 1e5 < patterns.steps("a{,3}" * 30, 40)
    assert patterns.steps("a{0,9999}b", 40) == pytest.approx(patterns.steps("a*b", 40))


def test_the_bound_is_of_the_pattern_that_is_matched(monkeypatch):
    """PEFT inserts each key into a larger pattern, where `+` repeats the part before it."""
    asked = []
    monkeypatch.setattr(patterns, "_in_child_process", lambda *args: asked.append(args[0]) or [[None] * len(NAMES)])
    patterns.layer_numbers(["+x"], NAMES, "layers_pattern")
    patterns.first_suffix_match(["(?x:a) +"], NAMES, "rank_pattern")
    assert asked == [[r"(?:^|.*?\.)+x\.(?P<idx>\d+)\."], [r"(.*\.)?((?x:a) +)$"]]


@given(
    st.lists(
        st.sampled_from(
            [".", "a", "m", r"\.", r"\w", "[a-m.]", r"[^\d]", "(", "(?:", "(?=", "(?!", ")", ")?", ")??", "|", "*", "+"]
            + ["?", "*?", "{2}", "{1,3}", "{,2}?", "^", "$", r"\b", " ", "#", "(?P<g>", "(?x)", "(?#"]
        ),
        max_size=12,
    ).map("".join)
)
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_patterns_matched_in_this_process_equal_re(pattern):
    if patterns.steps(pattern, 40) == math.inf:
        return
    try:
        wanted = [re.fullmatch(pattern, name) is not None for name in NAMES]
    except re.error:
        wanted = None
    try:
        assert patterns.full_matches(pattern, NAMES, "k") == wanted
    except InvalidAdapter:
        assert wanted is None


def test_the_first_matching_suffix_pattern_counts():
    keys = ["q_proj", r"layers\.1\..*", "proj", "odel.layers.0.self_attn.q_proj"]
    found = patterns.first_suffix_match(keys, NAMES, "rank_pattern")
    for name, index in zip(NAMES, found, strict=True):
        assert index == next((i for i, k in enumerate(keys) if re.match(rf"(.*\.)?({k})$", name)), None)


def test_invalid_patterns_are_refused_with_the_key():
    for pattern in ("(", "x{99999999999}", "a" * 5000, "[z-a]", "(?P<g>a)(?P<g>b)", "(?x)(a"):
        with pytest.raises(InvalidAdapter, match="target_modules"):
            patterns.full_matches(pattern, NAMES, "target_modules")
    with pytest.raises(InvalidAdapter, match="too long"):
        patterns.full_matches(".*", ["x" * 300], "target_modules")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(peft_config.HONOURED | set(peft_config.HARMLESS) | set(peft_config.REFUSED) | set(peft_config.NEUTRAL))


@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), json_values, max_size=3))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_any_config_is_parsed_or_refused(changes):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
    try:
        parsed = peft_config.parse(json.loads(json.dumps(config)))
        chosen = peft_config.select(parsed, NAMES)
        sizes = peft_config.ranks_and_scales(parsed, chosen)
    except AdapterError as error:
        assert error.message
    else:
        assert all(rank > 0 for rank, _ in sizes.values())


def test_a_module_name_with_a_line_break_is_refused() -> None:
    with pytest.raises(InvalidAdapter, match="has a line break"):
        patterns.full_matches(".*", ["x\n"], "target_modules")


def test_a_single_slow_match_runs_in_the_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(patterns, "_in_child_process", lambda *args: asked.append(args[0]) or [[None]])
    name, slow = "model.layers.0.self_attn.q_proj", ".*" * 4 + "!"
    assert patterns.CHEAP_MATCH < patterns.steps(slow, len(name)) < patterns.CHEAP_STEPS
    assert patterns.full_matches(slow, [name], "target_modules") == [False] and asked == [[slow]]
    patterns.full_matches(".*!", [name], "target_modules")
    assert asked == [[slow]]
