"""Names to mixes: what `?task=`, `model` and `adapters` of a request mean.

Unknown names are errors, never a silent base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import UnknownAdapter
from adapters.leases import Lease
from adapters.weights import AT_DIGEST, NAME, Choice, Version
from server.errors import UnknownName, rename_params
from server.tasks.definitions import DEFAULT, BestRoute, Task
from server.tasks.task_store import TaskStore

_VERSION = re.compile(f"({NAME.pattern}){AT_DIGEST}")


class Versions(Protocol):
    """What resolving asks of the registry."""

    def current(self, name: str) -> Version: ...

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]: ...


class Router(Protocol):
    """Picks one of a `best` route's candidates for the next request."""

    def pick(self, task: Task, route: BestRoute) -> str: ...


@dataclass(frozen=True)
class Target:
    """What answers a request: a task's template or none, and a choice. `held` is a lease of the choice that the caller
    has: its versions answer, whatever becomes of their names. With `custom_mix` the choice is the request's own.
    """

    task: Task | None
    choice: Choice
    held: Lease | None = None
    custom_mix: bool = False


class Resolver:
    """From a client's words to a `Target`."""

    def __init__(self, tasks: TaskStore, adapters: Versions, base: str, router: Router) -> None:
        self.base = base
        self._tasks = tasks
        self._adapters = adapters
        self._router = router

    def task(self, name: str | None, override: Choice | None) -> Target:
        """`?task=`: tasks only. None is `default`, which is the base where nobody defined it. Raises UnknownName."""
        task = self._tasks.find(DEFAULT if name is None else name)
        if task is None and name not in (None, DEFAULT):
            raise self._no_task(name)
        custom_mix = override is not None
        choice = override if override is not None else self._route(task)
        return Target(task, choice, custom_mix=custom_mix)

    def model(self, name: str, override: Choice | None) -> Target:
        """`model`: exact version, then task, then adapter, then base. Raises UnknownName, UnknownAdapter."""
        bare, custom_mix = name.removeprefix("adapter:"), override is not None
        if bare != name or _VERSION.fullmatch(name):
            if not NAME.fullmatch(bare.partition("@")[0]):
                raise _no_model(name)
            with rename_params(adapters="model"):
                self._adapters.resolve([(bare, 1.0)])
            return Target(None, [(bare, 1.0)] if override is None else override, custom_mix=custom_mix)
        task = self._tasks.find(name)
        if task is not None:
            return Target(task, override if override is not None else self._route(task), custom_mix=custom_mix)
        if self._is_adapter(name):
            return Target(None, [(name, 1.0)] if override is None else override, custom_mix=custom_mix)
        if name != self.base:
            raise _no_model(name)
        return Target(None, override or [], custom_mix=custom_mix)

    def _no_task(self, name: str) -> UnknownName:
        told = "GET /tasks lists them"
        if self._is_adapter(name):
            told = f"{name} is an adapter: name it in `adapters`, or PUT /tasks/{name} makes a task of it"
        return UnknownName(f"there is no task {name[:64]!r}; {told}", "task")

    def _is_adapter(self, name: str) -> bool:
        try:
            self._adapters.current(name)
        except UnknownAdapter:
            return False
        return True

    def _route(self, task: Task | None) -> Choice:
        if task is None:
            return []
        if isinstance(task.route, BestRoute):
            return [(self._router.pick(task, task.route), 1.0)]
        return list(task.route.choice)


def _no_model(name: str) -> UnknownName:
    return UnknownName(f"there is no model {name[:96]!r}; GET /v1/models lists them", "model")
