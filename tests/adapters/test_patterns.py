"""Strangers' patterns: exactly what `re` says, within a bounded time."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import patterns, peft_config
from adapters.errors import AdapterError, InvalidAdapter

NAMES = [f"model.layers.{i}.{p}" for i in range(12) for p in ("self_attn.q_proj", "mlp.down_proj")]
UNSLOTH = (
    r"(?:.*?(?:vision|image|language|text|model).*?(?:self_attn|attention|mlp|ffn).*?(?:k_proj|q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize(
    "pattern", [r".*\.q_proj", r"model\.layers\.(1|2|11)\..*", UNSLOTH, r"(?i)MODEL.*", r"(model)(.*)+\d?j"]
)
def test_full_matches_are_pythons(pattern):
    assert patterns.full_matches(pattern, NAMES, "k") == [re.fullmatch(pattern, n) is not None for n in NAMES]


@pytest.mark.parametrize("hostile", [r"(\w+\.?)+!", r"(.|.|m)*!", r"(.|.)(.|.)(.|.)" * 8 + "!", r"(.*)*\1x"])
def test_a_hostile_pattern_is_stopped(hostile, monkeypatch):
    monkeypatch.setattr(patterns, "CHILD_SECONDS", 0.5)
    started = time.monotonic()
    try:
        assert not any(patterns.full_matches(hostile, NAMES, "target_modules"))
    except InvalidAdapter as error:
        assert "target_modules" in error.message
    assert time.monotonic() - started < 3.0


def test_first_suffix_match_is_the_first_in_order():
    keys = ["q_proj", r"layers\.1\..*", "proj", "odel.layers.0.self_attn.q_proj"]
    found = patterns.first_suffix_match(keys, NAMES, "rank_pattern")
    for name, index in zip(NAMES, found, strict=True):
        assert index == next((i for i, k in enumerate(keys) if re.match(rf"(.*\.)?({k})$", name)), None)


def test_what_is_no_pattern_is_named():
    for pattern in ("(", "x{99999999999}", "a" * 5000):
        with pytest.raises(InvalidAdapter, match="target_modules"):
            patterns.full_matches(pattern, NAMES, "target_modules")
    with pytest.raises(InvalidAdapter, match="too long"):
        patterns.full_matches(".*", ["x" * 300], "target_modules")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(peft_config.HONOURED | set(peft_config.HARMLESS) | set(peft_config.REFUSED) | set(peft_config.DEFAULTS))


@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), json_values, max_size=3))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_any_config_is_read_or_refused(changes):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
    try:
        parsed = peft_config.parse(json.loads(json.dumps(config)))
        chosen = peft_config.select(parsed, NAMES)
        sizes = peft_config.ranks_and_scales(parsed, chosen)
    except AdapterError as error:
        assert error.message
    else:
        assert all(rank > 0 for rank, _ in sizes.values())
