"""Resolves `?task=`, `model` and `adapters` of a request to a target. Unknown names are errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.errors import UnknownAdapter
from adapters.leases import Lease
from adapters.weights import DIGEST_SUFFIX, NAME, Choice
from server.errors import UnknownName, rename_params
from server.tasks.definitions import DEFAULT, BestRoute, Task
from server.tasks.task_store import TaskStore

if TYPE_CHECKING:
    from adapters.registry import Registry
    from server.tasks.routing import BestRouter

_VERSION = re.compile(f"({NAME.pattern}){DIGEST_SUFFIX}")


@dataclass(frozen=True)
class Target:
    """What answers a request.

    Attributes:
        task: its template is applied; None for the raw prompt.
        choice: adapters with weights; empty is the base model.
        held: a lease on the choice that the caller holds. Its versions answer.
        custom_mix: the request chose the adapters itself.
    """

    task: Task | None
    choice: Choice
    held: Lease | None = None
    custom_mix: bool = False


class Resolver:
    """Finds the target of a request. `override` is the request's own `adapters`, None if it has none."""

    def __init__(self, tasks: TaskStore, adapters: Registry, base: str, router: BestRouter) -> None:
        self.base = base
        self._tasks = tasks
        self._adapters = adapters
        self._router = router

    def task(self, name: str | None, override: Choice | None) -> Target:
        """The target of `?task=`. Without a name: the task `default`, else the base model. Raises UnknownName."""
        task = self._tasks.find(DEFAULT if name is None else name)
        if task is None and name not in (None, DEFAULT):
            raise self._unknown_task(name)
        return self._target(task, [] if task is None else None, override)

    def model(self, name: str, override: Choice | None) -> Target:
        """The target of `model`: version, task, adapter or base model, in this order.

        Raises:
            UnknownName, UnknownAdapter: nothing has that name.
        """
        adapter = name.removeprefix("adapter:")
        if adapter != name or _VERSION.fullmatch(name):
            if not NAME.fullmatch(adapter.partition("@")[0]):
                raise _unknown_model(name)
            with rename_params(adapters="model"):
                self._adapters.resolve([(adapter, 1.0)])
            return self._target(None, [(adapter, 1.0)], override)
        task = self._tasks.find(name)
        if task is not None:
            return self._target(task, None, override)
        if self._is_adapter(name):
            return self._target(None, [(name, 1.0)], override)
        if name != self.base:
            raise _unknown_model(name)
        return self._target(None, [], override)

    def _target(self, task: Task | None, choice: Choice | None, override: Choice | None) -> Target:
        """The choice is the override, else `choice`, else that of the task's route."""
        if override is not None:
            return Target(task, override, custom_mix=True)
        if choice is None:
            assert task is not None
            choice = self._route(task)
        return Target(task, choice)

    def _route(self, task: Task) -> Choice:
        if isinstance(task.route, BestRoute):
            return [(self._router.pick(task, task.route), 1.0)]
        return list(task.route.choice)

    def _is_adapter(self, name: str) -> bool:
        try:
            self._adapters.current(name)
        except UnknownAdapter:
            return False
        return True

    def _unknown_task(self, name: str) -> UnknownName:
        advice = "GET /tasks lists them"
        if self._is_adapter(name):
            advice = f"{name} is an adapter: name it in `adapters`, or create a task with PUT /tasks/{name}"
        return UnknownName(f"there is no task {name[:64]!r}; {advice}", "task")


def _unknown_model(name: str) -> UnknownName:
    return UnknownName(f"there is no model {name[:96]!r}; GET /v1/models lists them", "model")
