"""Resolving `model`, `?task=` and `adapters` to a target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import UnknownAdapter
from adapters.weights import Version
from server.errors import UnknownName
from server.tasks.definitions import BestRoute, FixedRoute, Task
from server.tasks.resolve import Resolver, Target

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
    """The adapters `a`, of which one version is known by its digest, `b` and `mood`."""

    def current(self, name: str) -> Version:
        if name not in ("a", "b", "mood"):
            raise UnknownAdapter("no", "adapters")
        return A

    def resolve(self, choice: Any) -> None:
        for name, _ in choice:
            adapter, _, digest = name.partition("@")
            self.current(adapter)
            if digest and not A.digest.startswith(digest):
                raise UnknownAdapter("no version", "adapters")


def resolver(**more: Task) -> Resolver:
    tasks: Any = SimpleNamespace(find={**TASKS, **more}.get)
    router: Any = SimpleNamespace(pick=lambda task, route: route.candidates[1])
    adapters: Any = Adapters()
    return Resolver(tasks, adapters, "base", router)


def parts(target: Target) -> tuple[str | None, list[tuple[str, float]], bool]:
    return target.task and target.task.name, list(target.choice), target.custom_mix


@pytest.mark.parametrize(
    ("name", "task", "choice"),
    [
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
    ],
)
def test_a_model_is_a_version_a_task_an_adapter_or_the_base(name: str, task: str | None, choice: Any) -> None:
    assert parts(resolver().model(name, None)) == (task, choice, False)
    for own in ([("b", 2.0)], []):
        assert parts(resolver().model(name, own)) == (task, own, True), "adapters of the request replace the choice"


@pytest.mark.parametrize(
    ("name", "task", "choice"), [(None, None, []), ("default", None, []), ("best", "best", [("b", 1.0)])]
)
def test_without_a_task_a_request_goes_to_the_base(name: str | None, task: str | None, choice: Any) -> None:
    assert parts(resolver().task(name, None)) == (task, choice, False)
    assert parts(resolver().task(name, [("b", 2.0)])) == (task, [("b", 2.0)], True)


def test_tasks_may_be_called_default_or_base() -> None:
    own = resolver(default=Task("default", "{input}", FixedRoute(MIX)), base=Task("base", "{input}", FixedRoute(MIX)))
    for name in (None, "default"):
        assert parts(own.task(name, None)) == ("default", list(MIX), False)
    assert parts(own.model("base", None)) == ("base", list(MIX), False)


@pytest.mark.parametrize(
    "name",
    [
        *("c", "c@012345", "a@999999", "adapter:c", "adapter:a@999999", "adapter:", "adapter:base", "adapter:../a"),
        *("adapter:a b@012345", "a@01234", "", "x" * 999),
    ],
)
def test_an_unknown_model_is_an_error_and_never_the_base(name: str) -> None:
    for own in (None, [("a", 1.0)]):
        with pytest.raises((UnknownName, UnknownAdapter)) as error:
            resolver().model(name, own)
        assert error.value.param == "model" and len(error.value.message) < 200


@pytest.mark.parametrize(
    ("name", "message"),
    [("a", "a is an adapter: name it in `adapters`"), ("c" * 300, "GET /tasks lists them"), ("", "GET /tasks")],
)
def test_an_unknown_task_is_an_error_with_advice(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message) as error:
        resolver(default=Task("default", "{input}", FixedRoute(MIX))).task(name, None)
    assert error.value.param == "task" and len(error.value.message) < 200
