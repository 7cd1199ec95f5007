"""What a client's words for a model or a task come to: a template or none, a choice, and whose the choice is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import UnknownAdapter
from adapters.weights import Version
from server.errors import UnknownName
from server.tasks.definitions import BestRoute, FixedRoute, Task
from server.tasks.resolve import Resolver

A = Version("a", "0123456789ab" + "c" * 52)
MIX = (("a", 0.5), ("b", 2.0))
TASKS = {
    "mood": Task("mood", "{input}", FixedRoute((("mood", 1.0),))),
    "mixed": Task("mixed", "{input}", FixedRoute(MIX)),
    "best": Task("best", "{input}", BestRoute(("a", "b"))),
    "plain": Task("plain", "{input}", FixedRoute()),
    "a@012345": Task("a@012345", "{input}", FixedRoute()),
}


class Adapters:
    """`a`, of which one version is known by its digest, `b` and `mood`."""

    def current(self, name: str) -> Version:
        if name not in ("a", "b", "mood"):
            raise UnknownAdapter("no", "adapters")
        return A

    def resolve(self, choice: Any) -> Any:
        for name, _ in choice:
            bare, _, digest = name.partition("@")
            self.current(bare)
            if digest and not A.digest.startswith(digest):
                raise UnknownAdapter("no version", "adapters")


def resolver(**more: Task) -> Resolver:
    tasks: Any = SimpleNamespace(find={**TASKS, **more}.get)
    router: Any = SimpleNamespace(pick=lambda task, route: route.candidates[1])
    return Resolver(tasks, Adapters(), "base", router)


def test_a_model_is_a_version_then_a_task_then_an_adapter_then_the_base() -> None:
    told = resolver()
    for name, task, choice in (
        ("a", None, [("a", 1.0)]),
        ("adapter:a", None, [("a", 1.0)]),
        ("a@012345", None, [("a@012345", 1.0)]),
        (f"a@{A.digest}", None, [(f"a@{A.digest}", 1.0)]),
        ("adapter:a@0123456789ab", None, [("a@0123456789ab", 1.0)]),
        ("adapter:mood", None, [("mood", 1.0)]),
        ("mood", "mood", [("mood", 1.0)]),
        ("mixed", "mixed", list(MIX)),
        ("best", "best", [("b", 1.0)]),
        ("plain", "plain", []),
        ("base", None, []),
    ):
        found = told.model(name, None)
        assert (found.task and found.task.name, list(found.choice), found.custom_mix) == (task, choice, False), name
    named = resolver(base=Task("base", "{input}", FixedRoute(MIX))).model("base", None)
    assert named.task is not None and list(named.choice) == list(MIX)


@pytest.mark.parametrize("own", [[("b", 2.0)], []])
def test_the_adapters_of_a_request_take_the_place_of_those_of_its_model(own: Any) -> None:
    """An empty list is the base, whatever the model is."""
    told = resolver()
    for name in ("a", "adapter:mood", "a@012345", "base", "mood", "best"):
        found = told.model(name, own)
        assert (list(found.choice), found.custom_mix) == (own, True), name
        assert (found.task is None) == (name not in TASKS or "@" in name)
    for asked, task in ((None, None), ("default", None), ("mood", "mood")):
        by_task = told.task(asked, own)
        assert (by_task.task and by_task.task.name, list(by_task.choice), by_task.custom_mix) == (task, own, True)


def test_models_that_are_not_there_are_no_base() -> None:
    told = resolver()
    for name in ("c", "c@012345", "a@999999", "adapter:c", "adapter:a@999999"):
        with pytest.raises((UnknownName, UnknownAdapter)) as missing:
            told.model(name, None)
        assert missing.value.param == "model", name
    for name in ("adapter:", "adapter:base", "adapter:../a", "adapter:a b@012345", "a@01234", "", "x" * 999):
        with pytest.raises((UnknownName, UnknownAdapter)) as missing:
            told.model(name, [("a", 1.0)])
        assert missing.value.param == "model" and len(missing.value.message) < 200, name
    with pytest.raises(UnknownName, match="GET /v1/models lists them"):
        told.model("adapter:no name", None)


def test_no_task_is_the_default_one_or_the_base() -> None:
    told = resolver()
    for name in (None, "default"):
        found = told.task(name, None)
        assert (found.task, list(found.choice)) == (None, [])
        own = resolver(default=Task("default", "{input}", FixedRoute(MIX))).task(name, None)
        assert own.task is not None and own.task.name == "default" and list(own.choice) == list(MIX)
    with pytest.raises(UnknownName):
        resolver(default=Task("default", "{input}", FixedRoute(MIX))).task("", None)
    assert list(told.task("best", None).choice) == [("b", 1.0)] and not told.task("best", None).custom_mix
    for name, said in (
        ("a", "a is an adapter: name it in `adapters`"),
        ("c" * 300, "GET /tasks lists them"),
        ("", "GET"),
    ):
        with pytest.raises(UnknownName, match=said) as missing:
            told.task(name, None)
        assert missing.value.param == "task" and len(missing.value.message) < 200
