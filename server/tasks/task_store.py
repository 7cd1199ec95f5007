"""All tasks by name: those put through the API, stored in the database, and those of adapters' task.json.

- A task of the API hides a folder task of the same name. Deleting it makes the folder task visible again.
- If several adapters bring the same task, it belongs to the first that brought it, as long as that one does. Then it
  goes to the adapter of the task's name, else to the first by name. Owners are stored.
- A folder task that was deleted through the API stays deleted until its adapter brings other content or another
  task.json, or is itself deleted. The deleted contents are stored as marks.
- A task put without a route uses the base model until there is an adapter of its name, then that adapter for good.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError, StoreFailed, UnknownAdapter
from adapters.peft_format import TASK_FILE
from adapters.weights import RESERVED, canonical_mix
from server.database import Database
from server.errors import InvalidRequest, ServerError, UnknownName
from server.tasks.definitions import (
    BestRoute,
    FixedRoute,
    Route,
    Task,
    check_consistency,
    check_task_name,
    from_folder,
    parse,
)
from server.tasks.task_tables import StoredTasks, load, save

if TYPE_CHECKING:
    from adapters.registry import Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _FolderTask:
    """What an adapter brings: a task, or the error in its task.json (`body`). `digest` is that of its version."""

    digest: str
    body: Any
    task: Task | None = None
    error: str | None = None

    @property
    def mark(self) -> str:
        """Identifies the content and its task.json among deleted ones."""
        return f"{self.digest}:{hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:16]}"

    def is_deleted(self, marks: Collection[str]) -> bool:
        return self.mark in marks or self.digest in marks  # the digest alone: marks of versions before 2026-11-24


class TaskStore:
    """Every task by name. Reading takes no lock: tables are replaced, never changed.

    Args:
        database: where tasks of the API are stored.
        adapters: the adapter registry.
        reserved: names that no task may have, such as that of the base model.
        vocabulary: size of the vocabulary; stop tokens of tasks must be below it.
        max_mix: most adapters of a mix.

    Raises:
        StoreFailed: the database cannot be read.
    """

    def __init__(
        self,
        database: Database,
        adapters: Registry,
        reserved: Collection[str] = (),
        vocabulary: int | None = None,
        max_mix: int = 8,
    ) -> None:
        self._database = database
        self._adapters = adapters
        self._reserved = RESERVED | set(reserved)
        self._vocabulary = vocabulary
        self._max_mix = max_mix
        self._lock = threading.Lock()
        self._folders: dict[str, _FolderTask] = {}  # by adapter
        self._visible: dict[str, Task] = {}  # folder tasks by name
        self._errors: dict[str, str] = {}  # by adapter
        self._routed: dict[str, list[Task]] = {}  # by adapter
        self._stored = load(database, self._reserved)
        self.refresh()

    # -- reading

    def get(self, name: str) -> Task:
        """The task of that name. Raises UnknownName."""
        task = self.find(name)
        if task is None:
            raise UnknownName(f"there is no task {name[:64]!r}; GET /tasks lists them", "task")
        return task

    def find(self, name: str) -> Task | None:
        return self._stored.tasks.get(name) or self._visible.get(name)

    def all(self) -> list[Task]:
        """All tasks, sorted by name."""
        table = {**self._visible, **self._stored.tasks}
        return [table[name] for name in sorted(table)]

    def routing_to(self, adapter: str) -> list[str]:
        """Names of the tasks that route to an adapter."""
        return [task.name for task in self._routed.get(adapter, ())]

    def versions(self, adapter: str) -> set[str]:
        """Version prefixes of an adapter that tasks name."""
        return {version for task in self._routed.get(adapter, ()) for version in task.versions(adapter)}

    def faults(self, adapter: str) -> list[str]:
        """What is wrong with an adapter's task.json, for `notes` of the adapter."""
        error = self._errors.get(adapter)
        return [] if error is None else [f"its task.json {error}"]

    # -- changes

    def put(self, name: str, body: Mapping[str, Any]) -> tuple[Task, bool]:
        """Define a task. Returns it and whether the name is new.

        Raises:
            InvalidRequest: the definition is not valid.
            UnknownAdapter, InvalidChoice, NoRoom: its route cannot be served.
            StoreFailed: the database refuses; nothing is changed.
        """
        if name in self._reserved:
            raise InvalidRequest(f"the name {name!r} is reserved", "task")
        check_task_name(name)
        # No adapter may come or go between the check of the route and the write.
        return self._adapters.run_exclusive(lambda: self._put(name, body))

    def _put(self, name: str, body: Mapping[str, Any]) -> tuple[Task, bool]:
        before = self._stored.tasks.get(name)
        if before is not None and before.by_name and before.route.candidates:
            default: Route = before.route
        else:
            default = _named_route(name, self._adapters.names())
        task = parse(name, body, default_route=default, source="api")
        if before is not None and before.by_name and before.route == task.route:
            task = replace(task, by_name=True)  # a client sends back the route that GET showed
        check_consistency(task, self._vocabulary)
        self._check_route(task.route)
        with self._lock:
            created = self.find(name) is None
            deleted = {key: marks for key, marks in self._stored.deleted.items() if key != name}
            self._save(replace(self._stored, tasks={**self._stored.tasks, name: task}, deleted=deleted))
            self._index_routes()
        return task, created

    def _check_route(self, route: Route) -> None:
        try:
            if isinstance(route, FixedRoute):
                self._adapters.lease(list(route.choice)).release()
            else:
                self._adapters.resolve([(candidate, 1.0) for candidate in route.candidates])
        except AdapterError as error:
            raise type(error)(error.message, "route") from None

    def delete(self, name: str) -> Task:
        """Delete a task; a folder task that it hid is visible again. Raises UnknownName, StoreFailed."""
        with self._lock:
            task = self.get(name)
            if task.source == "api":
                kept = {key: other for key, other in self._stored.tasks.items() if key != name}
                self._save(replace(self._stored, tasks=kept))
            else:
                marks = [found.mark for found in self._folders.values() if found.task and found.task.name == name]
                marks = list(dict.fromkeys([*self._stored.deleted.get(name, ()), *marks]))
                self._save(replace(self._stored, deleted={**self._stored.deleted, name: marks}))
        self.refresh()
        return task

    def check_task_file(self, adapter: str, body: Any) -> None:
        """Raises InvalidRequest for a bad task.json of an adapter that has a task now, which would be lost."""
        before = self._folders.get(adapter)
        if before is None or before.task is None:
            return
        found = self._parse_folder(adapter, before.digest, body)
        if found.error is not None:
            raise InvalidRequest(
                f"{TASK_FILE} {found.error}; correct it, or leave it out to keep the task of {adapter!r}", TASK_FILE
            )

    # -- tasks of folders

    def refresh(self) -> set[str]:
        """Read the task.json of all adapters again. Called when an adapter was added, changed or removed.

        Returns:
            Names of tasks that are gone.
        """
        with self._lock:
            folders = {name: found for name in self._adapters.names() if (found := self._read_folder(name))}
            removed = {f.digest for f in self._folders.values()} - {f.digest for f in folders.values()}
            deleted = _without_marks(self._stored.deleted, removed)
            offers: dict[str, dict[str, Task]] = {}  # task -> adapter -> definition
            for adapter, found in folders.items():
                if found.task is not None and not found.is_deleted(deleted.get(found.task.name, ())):
                    offers.setdefault(found.task.name, {})[adapter] = found.task
            owners = {name: self._choose_owner(name, several) for name, several in offers.items()}
            self._report_errors(folders, offers, owners)
            visible = {name: several[owners[name]] for name, several in offers.items()}
            gone = self._visible.keys() - visible.keys() - self._stored.tasks.keys()
            self._folders, self._visible = folders, visible
            # An adapter that cannot be served at this start may be served at the next one.
            absent = {n: o for n, o in self._stored.owners.items() if n not in offers and self._adapters.exists(o)}
            api_tasks = {name: self._with_adapter(task) for name, task in self._stored.tasks.items()}
            state = StoredTasks(api_tasks, deleted, absent | owners)
            try:
                self._save(state)
            except StoreFailed as error:
                log.warning("changes of tasks are lost at the next start: %s", error.message)
                self._stored = state
            self._index_routes()
        return gone

    def _read_folder(self, adapter: str) -> _FolderTask | None:
        """What an adapter brings; None if it was removed meanwhile."""
        try:
            metadata = self._adapters.metadata(adapter)
            digest = metadata.get("task_of") or self._adapters.current(adapter).digest
        except UnknownAdapter:
            return None
        body, before = metadata.get("task"), self._folders.get(adapter)
        if before is not None and before.digest == digest and before.body == body:
            return before
        return _FolderTask(digest, body) if body is None else self._parse_folder(adapter, digest, body)

    def _parse_folder(self, adapter: str, digest: str, body: Any) -> _FolderTask:
        try:
            task = from_folder(adapter, body, reserved=self._reserved, vocabulary=self._vocabulary)
        except (ServerError, AdapterError, ValueError) as error:
            return _FolderTask(digest, body, error=f"is not used: {error}")
        return _FolderTask(digest, body, task)

    def _choose_owner(self, task: str, adapters: Collection[str]) -> str:
        owner = self._stored.owners.get(task)
        if owner in adapters:
            return str(owner)
        return task if task in adapters else min(adapters)

    def _report_errors(
        self, folders: Mapping[str, _FolderTask], offers: Mapping[str, Mapping[str, Task]], owners: Mapping[str, str]
    ) -> None:
        """Collect what is wrong with each task.json and log what is new."""
        errors = {adapter: found.error for adapter, found in folders.items() if found.error is not None}
        for name, several in offers.items():
            owner = owners[name]
            for adapter in several.keys() - {owner}:
                errors[adapter] = f"is not used: the task {name!r} belongs to adapter {owner!r}; give it another name"
            if (reason := self._route_error(owner, several[owner])) is not None:
                errors[owner] = f"has a route that cannot be served: {reason}"
        for adapter, error in errors.items():
            if error != self._errors.get(adapter):
                log.warning("the task.json of adapter %r %s", adapter, error)
        self._errors = errors

    def _route_error(self, adapter: str, task: Task) -> str | None:
        route = task.route
        try:
            if isinstance(route, BestRoute):
                self._adapters.resolve([(candidate, 1.0) for candidate in route.candidates])
            elif set(route.candidates) - {adapter}:
                canonical_mix(self._adapters.resolve(list(route.choice)), self._max_mix)
        except AdapterError as error:
            return error.message
        return None

    def _with_adapter(self, task: Task) -> Task:
        """A task put without a route gets the adapter of its name, if there is one."""
        if not task.by_name or task.route.candidates:
            return task
        return replace(task, route=_named_route(task.name, self._adapters.names()))

    def _save(self, state: StoredTasks) -> None:
        """Write what differs, then use it. Raises StoreFailed; nothing is changed then."""
        save(self._database, self._stored, state)
        self._stored = state

    def _index_routes(self) -> None:
        """Called with the lock after each change: adapters are listed often, with their tasks."""
        routed: dict[str, list[Task]] = {}
        for task in self.all():
            for adapter in task.adapters:
                routed.setdefault(adapter, []).append(task)
        self._routed = routed


def _without_marks(deleted: Mapping[str, list[str]], digests: Collection[str]) -> dict[str, list[str]]:
    """Deleted tasks without the marks of adapter versions that no longer exist."""
    kept = {name: [mark for mark in marks if mark.partition(":")[0] not in digests] for name, marks in deleted.items()}
    return {name: marks for name, marks in kept.items() if marks}


def _named_route(name: str, adapters: Collection[str]) -> FixedRoute:
    """The route of a task that was put without one."""
    return FixedRoute(((name, 1.0),)) if name in adapters else FixedRoute()
