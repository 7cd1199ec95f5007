"""MixKey: equality, labels, and which versions a mix has."""

from __future__ import annotations

from adapters.weights import Version
from server.tasks.mix_key import MixKey

A, B = Version("a", "a" * 64), Version("b", "b" * 64)


def test_a_key_consists_of_task_versions_weights_and_base() -> None:
    one = MixKey.of("t", [(A, 1.0)], "base")
    assert one.label == "a@" + "a" * 12 and one.adapter == "a"
    mixed = MixKey.of("t", [(B, 0.5), (A, -2.0)], "base")
    assert mixed == MixKey.of("t", [(A, -2.0), (B, 0.5)], "base") and mixed.adapter == "a+b"
    assert mixed.label == f"a@{'a' * 12}*-2+b@{'b' * 12}*0.5"
    assert MixKey.of("t", [(A, 0.0)], "base").label == "base"
    assert len({one, mixed, MixKey.of("t", [(A, 1.0)], "other"), MixKey.of("u", [(A, 1.0)], "base")}) == 4


def test_weights_are_equal_in_float32() -> None:
    close = [MixKey.of("t", [(A, weight)], "base") for weight in (0.7, 0.7 + 1e-12, 0.7000001)]
    assert close[0] == close[1] and [key.label[-10:] for key in close[1:]] == ["aaaaaa*0.7", "*0.7000001"]


def test_uses_only_compares_the_versions_of_a_mix() -> None:
    mixed = MixKey.of("t", [(A, 1.0), (B, 0.5)], "base")
    assert mixed.versions == [A.label, B.label]
    assert mixed.uses_only(frozenset({A.label, B.label, "c@0"})) and not mixed.uses_only(frozenset({A.label}))
    assert MixKey.of("t", [], "base").uses_only(frozenset())
