"""`TaskStore`: all tasks by name, those put by the API over those that adapter folders bring.

Owns `tasks.json` in the state directory. A task of a folder lives and goes with its adapter; one that was deleted
through the API stays away until its adapter brings one with other content, or another, or is put again after it went.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from adapters.atomic_files import replace_file, set_aside
from adapters.errors import AdapterError, StoreFailed, UnknownAdapter
from adapters.leases import Lease
from adapters.peft_format import TASK_FILE
from adapters.weights import RESERVED, Choice, Version, canonical_mix
from server.errors import InvalidRequest, ServerError, UnknownName
from server.tasks.definitions import (
    BestRoute,
    FixedRoute,
    Route,
    Task,
    check_task_name,
    check_together,
    from_folder,
    parse,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


class AdapterCatalog(Protocol):
    """What tasks ask of the registry."""

    def names(self) -> list[str]: ...

    def exists(self, name: str) -> bool: ...

    def current(self, name: str) -> Version: ...

    def metadata(self, name: str) -> Mapping[str, Any]: ...

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]: ...

    def lease(self, choice: Choice) -> Lease: ...

    def run_exclusive(self, call: Callable[[], T]) -> T: ...


@dataclass(frozen=True)
class _Brought:
    """What an adapter's folder brings as a task: `mark` is what the two are known by, `fault` what is wrong with it.

    `digest` is that of the version that brought it, which need not be the one that the adapter has; `body` its
    task.json, None if it has none.
    """

    digest: str
    body: Any
    mark: str = ""
    task: Task | None = None
    fault: str | None = None


class TaskStore:
    """Every task that can be named. Reading is lock-free: the tables are replaced, never changed.

    Defaults name token ids below `vocabulary`, if one is given.
    """

    def __init__(
        self,
        file: Path,
        adapters: AdapterCatalog,
        reserved: Collection[str] = (),
        vocabulary: int | None = None,
        max_mix: int = 8,
    ) -> None:
        self._file = file
        self._max_mix = max_mix
        self._vocabulary = vocabulary
        self._adapters = adapters
        self._reserved = RESERVED | set(reserved)
        self._lock = threading.Lock()
        self._put: dict[str, Task] = {}
        self._waiting: dict[str, tuple[Any, bool]] = {}
        """TaskStore that have the name of the base that is served, as the file has them, and whether theirs is
        the adapter
        of their name: another base may be served again."""
        self._deleted: dict[str, list[str]] = {}
        """Of each task that was deleted, the marks of those that brought it."""
        self._files: dict[str, Task] = {}
        self._brought: dict[str, list[str]] = {}
        """Of each task in a folder, the marks of all adapters whose folders bring it: it may route to others."""
        self._contested: dict[str, str] = {}
        """The owners of tasks that several adapters bring, which the file has too."""
        self._owners: dict[str, str] = {}
        """Of each task in a folder, the adapter whose definition it has. It keeps it when another brings one too."""
        self._seen: dict[str, _Brought] = {}
        """What each adapter brought when it was last looked at: one that changes has not all others read again."""
        self._faults: dict[str, str] = {}
        """Of each adapter with a task.json that is of no use, what is wrong with it."""
        self._owes = False
        """Whether the file lacks what is known of tasks without a route, as the disk was full."""
        self._routed: dict[str, list[Task]] = {}
        """Of each adapter, the tasks that route to it, by name: lists of adapters ask for each of a thousand."""
        self._read()
        self.refresh()

    def get(self, name: str) -> Task:
        """The task of that name. Raises UnknownName."""
        task = self.find(name)
        if task is None:
            raise UnknownName(f"there is no task {name[:64]!r}; GET /tasks lists them", "task")
        return task

    def find(self, name: str) -> Task | None:
        """The task of that name, or None."""
        return self._put.get(name) or self._files.get(name)

    def all(self) -> list[Task]:
        """All tasks by name."""
        table = {**self._files, **self._put}
        return [table[name] for name in sorted(table)]

    def routing_to(self, adapter: str) -> list[str]:
        """Names of the tasks that route to an adapter."""
        return [task.name for task in self._routed.get(adapter, ())]

    def versions(self, adapter: str) -> set[str]:
        """The first digits of the versions of an adapter that tasks name."""
        return {version for task in self._routed.get(adapter, ()) for version in task.versions(adapter)}

    def faults(self, adapter: str) -> list[str]:
        """What is wrong with the task.json that an adapter brought, for its description."""
        fault = self._faults.get(adapter)
        return [] if fault is None else [f"its task.json {fault}"]

    def put(self, name: str, body: Mapping[str, Any]) -> tuple[Task, bool]:
        """Define a task; answers it and whether the name is new.

        Raises InvalidRequest, StoreFailed, and UnknownAdapter, InvalidChoice or NoRoom as a request with its mix would.
        """
        if name in self._reserved:
            raise InvalidRequest(f"the name {name!r} is reserved", "task")
        check_task_name(name)
        return self._adapters.run_exclusive(lambda: self._define(name, body))

    def _define(self, name: str, body: Mapping[str, Any]) -> tuple[Task, bool]:
        """While no adapter comes or goes: what the task routes to is there when it is written."""
        before, own = self._put.get(name), _own(name, self._adapters.names())
        if before is not None and before.by_name and before.route.candidates:
            own = FixedRoute(((name, 1.0),))  # though it is not served now
        task = parse(name, body, default_route=own, source="api")
        if before is not None and before.by_name and before.route == task.route:
            task = replace(task, by_name=True)  # who changes what GET has told means the rest to stay
        check_together(task, self._vocabulary)
        self._check(task.route)
        with self._lock:
            created = self.find(name) is None
            self._write({**self._put, name: task}, {k: v for k, v in self._deleted.items() if k != name})
        return task, created

    def _check(self, route: Route) -> None:
        try:
            if isinstance(route, FixedRoute):
                self._adapters.lease(list(route.choice)).release()
            else:
                self._adapters.resolve([(candidate, 1.0) for candidate in route.candidates])
        except AdapterError as error:
            raise type(error)(error.message, "route") from None

    def delete(self, name: str) -> Task:
        """Take a task away; one of a folder that a task of the API had covered comes back. Raises UnknownName, and
        StoreFailed if it cannot be written down."""
        with self._lock:
            task = self.get(name)
            if task.source == "api":
                self._write({k: v for k, v in self._put.items() if k != name}, self._deleted)
            else:
                marks = [*self._deleted.get(name, ()), *self._brought.get(name, ())]
                self._write(self._put, {**self._deleted, name: list(dict.fromkeys(marks))})
        self.refresh()
        return task

    def refresh(self) -> set[str]:
        """Read again what the adapters' folders bring. Called when an adapter came, changed or went. Answers the
        names of the tasks that went with it."""
        with self._lock:  # of two, the one that has read last is written last
            offers: dict[str, dict[str, Task]] = {}  # of each task, by adapter
            brought: dict[str, list[str]] = {}
            faults: dict[str, str] = {}
            read = {adapter: found for adapter in self._adapters.names() if (found := self._look(adapter))}
            self._forget({b.digest for b in self._seen.values()} - {b.digest for b in read.values()})
            for adapter, found in read.items():
                if found.fault is not None:
                    faults[adapter] = found.fault
                task = found.task
                if task is None or not {found.mark, found.digest}.isdisjoint(self._deleted.get(task.name, ())):
                    continue
                brought.setdefault(task.name, []).append(found.mark)
                offers.setdefault(task.name, {})[adapter] = task
            owners = {name: self._owner(name, those) for name, those in offers.items()}
            for name, those in offers.items():
                for adapter in those.keys() - {owners[name]}:
                    faults[adapter] = (
                        f"is not used: the task {name!r} is that of adapter {owners[name]!r}; give it another name"
                    )
                if (unknown := self._useless(owners[name], those[owners[name]])) is not None:
                    faults[owners[name]] = f"has a route that no request can take: {unknown}"
            for adapter, fault in faults.items():
                if fault != self._faults.get(adapter):
                    log.warning("the task.json of adapter %r %s", adapter, fault)
            # Of those that nobody brings now as well: an adapter that is set aside at one start comes back at another,
            # and one that was deleted does not.
            absent = {
                name: owner
                for name, owner in self._contested.items()
                if name not in offers and (name in self._put or self._adapters.exists(owner))
            }
            self._keep_owners(absent | {name: owners[name] for name, those in offers.items() if len(those) > 1})
            self._owners = owners
            files = {name: those[owners[name]] for name, those in offers.items()}
            gone = self._files.keys() - files.keys() - self._put.keys()
            self._files, self._brought, self._seen, self._faults = files, brought, read, faults
            self._find_own()
            self._note_routes()
        return gone

    def _find_own(self) -> None:
        """Give tasks without a route the adapter of their name, once there is one. It stays when that goes: requests
        are refused then. With the lock."""
        served = set(self._adapters.names())
        found = {
            name: replace(task, route=_own(name, served))
            for name, task in self._put.items()
            if task.by_name and not task.route.candidates and name in served
        }
        if found or self._owes:
            try:
                self._write({**self._put, **found}, self._deleted)
                self._owes = False
            except StoreFailed as error:
                self._put, self._owes = {**self._put, **found}, True
                log.warning("which adapters the tasks without a route have is not written: %s", error.message)

    def _note_routes(self) -> None:
        """Whenever a table of tasks has been replaced. With the lock."""
        routed: dict[str, list[Task]] = {}
        for task in self.all():
            for adapter in task.adapters:
                routed.setdefault(adapter, []).append(task)
        self._routed = routed

    def _useless(self, adapter: str, task: Task) -> str | None:
        """What is wrong with the route of the task of an adapter: it leads to what there is not, or to no mix."""
        route = task.route
        try:
            if isinstance(route, BestRoute):
                self._adapters.resolve([(candidate, 1.0) for candidate in route.candidates])
            elif set(route.candidates) - {adapter}:
                canonical_mix(self._adapters.resolve(list(route.choice)), self._max_mix)
        except AdapterError as error:
            return error.message
        return None

    def _owner(self, name: str, offers: Collection[str]) -> str:
        """Of the adapters that bring a task: the one that has it, else the one that is called so, else the first."""
        has = self._owners.get(name) or self._contested.get(name)
        if has is not None and has in offers:
            return has
        return name if name in offers else min(offers)

    def _keep_owners(self, contested: dict[str, str]) -> None:
        """Remember across restarts whose the tasks are that several adapters bring. With the lock."""
        if contested != self._contested:
            before, self._contested = self._contested, contested
            try:
                self._write(self._put, self._deleted)
            except StoreFailed as error:
                self._contested = before
                log.warning("whose the tasks %s are is not remembered: %s", ", ".join(contested), error.message)

    def _look(self, adapter: str) -> _Brought | None:
        """What an adapter brings; None if it went in between: its own notice follows."""
        try:
            told = self._adapters.metadata(adapter)
            digest, body = told.get("task_of") or self._adapters.current(adapter).digest, told.get("task")
        except UnknownAdapter:
            return None
        before = self._seen.get(adapter)
        if before is not None and before.digest == digest and before.body is body:
            return before
        if body is None:
            return _Brought(digest, body)
        try:
            return _Brought(digest, body, _mark(digest, body), self._from_folder(adapter, body))
        except (ServerError, AdapterError, ValueError) as error:
            return _Brought(digest, body, fault=f"is not used: {error}")

    def _forget(self, digests: Collection[str]) -> None:
        """Let adapters that went bring their tasks again, should they come back. With the lock."""
        kept = {
            name: [mark for mark in marks if mark.partition(":")[0] not in digests]
            for name, marks in self._deleted.items()
        }
        if kept != self._deleted:
            try:
                self._write(self._put, {name: marks for name, marks in kept.items() if marks})
            except StoreFailed as error:
                log.warning("tasks that were deleted stay so: %s", error.message)

    def check_task_file(self, adapter: str, body: Any) -> None:
        """Raises InvalidRequest for a task.json of no use that would take the place of what the adapter brought. Where
        there is nothing to lose, the adapter is served without a task, and told what is wrong."""
        before = self._seen.get(adapter)
        if before is None or before.task is None:
            return
        try:
            self._from_folder(adapter, body)
        except (ServerError, AdapterError, ValueError) as error:
            raise InvalidRequest(
                f"{TASK_FILE} can not be used: {error}; mend it, or leave it out to keep the task that {adapter!r} has",
                TASK_FILE,
            ) from error

    def _from_folder(self, adapter: str, body: Any) -> Task:
        return from_folder(adapter, body, reserved=self._reserved, vocabulary=self._vocabulary)

    def _read(self) -> None:
        """The file. What is damaged of it is left out, and the whole is kept aside as it was. Raises StoreFailed where
        the system does not let us read it."""
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            deleted = {str(k): [v] if isinstance(v, str) else [*map(str, v)] for k, v in stored["deleted"].items()}
            owners = {str(k): str(v) for k, v in stored.get("owners", {}).items()}
            own = {str(name) for name in stored.get("own", ())}
            bodies = dict(stored["tasks"])
        except FileNotFoundError:
            return
        except OSError as error:  # it may be whole
            raise StoreFailed(
                f"{self._file} cannot be read ({error.strerror}); see to it that the server may"
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            to = set_aside(self._file).name
            log.error("%s cannot be read (%s); it is set aside as %s", self._file.name, error, to)
            return
        self._deleted, self._contested = deleted, owners
        aside = None
        for name, body in bodies.items():
            if name in self._reserved:
                log.error(
                    "the task %r of %s waits for another base: the one that is served has its name",
                    name[:64],
                    self._file.name,
                )
                self._waiting[name] = body, name in own
                continue
            try:
                body = {**body, "route": None} if name in own else body
                self._put[name] = parse(name, body, default_route=_own(name, own), source="api")
            except (ValueError, KeyError, AttributeError, TypeError, ServerError, AdapterError) as error:
                aside = aside or set_aside(self._file, copy=True)
                log.error(
                    "the task %r of %s cannot be read (%s) and is left out; the file as it was is kept as %s",
                    name[:64],
                    self._file.name,
                    error,
                    aside.name,
                )

    def _write(self, put: dict[str, Task], deleted: dict[str, list[str]]) -> None:
        """Disk first, then memory. Raises StoreFailed if the disk refuses."""
        tasks = {name: body for name, (body, _) in self._waiting.items()}
        tasks |= {name: task.body() for name, task in put.items()}
        own = [name for name, (_, by_name) in self._waiting.items() if by_name]
        found = {name: task for name, task in put.items() if task.by_name and task.route.candidates}
        own += found
        for name, task in found.items():  # versions before 2026-11-30 would take it for the base alone, and write that
            tasks[name] = {**tasks[name], "route": task.route.describe()}
        content = {"tasks": tasks, "deleted": deleted, "owners": self._contested, "own": own}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._file, json.dumps(content).encode())
        except OSError as error:
            raise StoreFailed(f"the task cannot be written: {error.strerror}; nothing has changed") from None
        self._put, self._deleted = put, deleted
        self._note_routes()


def _own(name: str, adapters: Collection[str]) -> FixedRoute:
    """The route of a task that was put without one."""
    return FixedRoute(((name, 1.0),)) if name in adapters else FixedRoute()


def _mark(digest: str, body: Any) -> str:
    """What an adapter's content and its task.json are known by."""
    return f"{digest}:{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]}"
