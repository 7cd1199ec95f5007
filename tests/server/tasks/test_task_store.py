"""TaskStore: tasks of the API over tasks of adapter folders, deletions, owners and restarts."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import StoreFailed
from adapters.weights import Version
from server.database import Database
from server.database.tables import deleted_tasks, task_owners, tasks
from server.errors import InvalidRequest
from server.tasks import task_store
from server.tasks.definitions import FixedRoute, from_folder
from server.tasks.task_store import TaskStore

BODY = {"prompt": "{input}"}


class Folders:
    """Adapters with the task.json that each brings. `absent` are known, but not served at this start."""

    def __init__(self, **bodies: Any) -> None:
        self.bodies = bodies
        self.absent: set[str] = set()
        self.weights = dict.fromkeys(bodies, "1")
        self.metadata_of: dict[str, dict[str, Any]] = {}

    def names(self) -> list[str]:
        return sorted(self.bodies)

    def exists(self, name: str) -> bool:
        return name in self.bodies or name in self.absent

    def current(self, name: str) -> Version:
        return Version(name, hashlib.sha256(f"{name} {self.weights.get(name)}".encode()).hexdigest())

    def metadata(self, name: str) -> Mapping[str, Any]:
        return {"task": self.bodies[name], **self.metadata_of.get(name, {})}

    def resolve(self, choice: Any) -> Any:
        return [(self.current(name), weight) for name, weight in choice]

    def run_exclusive(self, call: Any) -> Any:
        return call()

    def lease(self, choice: Any) -> Any:
        return self

    def release(self) -> None: ...


def named(task: str, adapter: str) -> dict[str, str]:
    return {"task": task, "prompt": f"{adapter}: {{input}}"}


def owner(store: TaskStore, task: str) -> str:
    return store.get(task).prompt.partition(":")[0]


def names(store: TaskStore) -> list[str]:
    return [task.name for task in store.all()]


def open_store(database: Database, adapters: Any, **options: Any) -> TaskStore:
    return TaskStore(database, adapters, **options)


def test_a_task_of_the_api_hides_that_of_a_folder_until_it_is_deleted(database: Database) -> None:
    adapters = Folders(x=named("x", "x"))
    store = open_store(database, adapters)
    assert store.put("x", {"prompt": "api: {input}"})[1] is False and store.put("new", BODY)[1] is True
    for each in (store, open_store(database, adapters)):
        assert owner(each, "x") == "api" and each.get("x").source == "api" and names(each) == ["new", "x"]
    assert store.delete("x").source == "api" and owner(store, "x") == "x"
    assert names(open_store(database, adapters)) == ["new", "x"]


def test_all_fields_of_a_task_survive_a_restart(database: Database) -> None:
    body = {
        "prompt": "Say \x00 é {input}",
        "format": "chat",
        "system": "Be brief.",
        "labels": ["a", "b"],
        "defaults": {"max_tokens": 3, "temperature": 0.5, "stop": ["\n"]},
        "route": {"best": ["x", "y@0123456789ab"], "metric": "chrf", "min_samples": 3},
    }
    adapters = Folders(x=None, y=None)
    task, _ = open_store(database, adapters).put("t", body)
    again = open_store(database, adapters)
    assert again.get("t") == task and again.routing_to("x") == ["t"] and again.versions("y") == {"0123456789ab"}


@pytest.mark.parametrize(
    ("change", "visible"),
    [
        ("nothing", False),
        ("restart", False),
        ("weights without task.json", False),
        ("weights", True),
        ("task.json", True),
        ("removed and added again", True),
        ("put and deleted", True),
    ],
)
def test_a_deleted_folder_task_stays_deleted_until_its_adapter_brings_something_else(
    database: Database, change: str, visible: bool
) -> None:
    adapters = Folders(x={"prompt": "{input}", "task": "t"})
    store = open_store(database, adapters)
    assert store.delete("t").source == "file" and store.find("t") is None
    match change:
        case "restart":
            store = open_store(database, adapters)
        case "weights without task.json":
            adapters.metadata_of["x"] = {"task_of": adapters.current("x").digest}
            adapters.weights["x"] = "2"
        case "weights":
            adapters.weights["x"] = "2"
        case "task.json":
            adapters.bodies["x"] = {"prompt": "other {input}", "task": "t"}
        case "removed and added again":
            body = adapters.bodies.pop("x")
            store.refresh()
            adapters.bodies["x"] = body
        case "put and deleted":
            store.put("t", BODY)
            store.delete("t")
    store.refresh()
    assert (store.find("t") is not None) is visible


def test_a_task_that_two_adapters_bring_is_deleted_for_both(database: Database) -> None:
    adapters = Folders(x=named("both", "x"))
    store = open_store(database, adapters)
    store.delete("both")
    adapters.bodies["y"] = named("both", "y")
    store.refresh()
    assert owner(store, "both") == "y"
    store.delete("both")
    assert names(store) == [] == names(open_store(database, adapters))


def test_marks_without_a_definition_are_those_of_old_versions(database: Database) -> None:
    adapters = Folders(x=BODY, y=BODY)
    with database.transaction() as connection:
        row = {"name": "x", "marks": [adapters.current("x").digest]}
        connection.execute(sa.insert(deleted_tasks).values(**row))
    assert names(open_store(database, adapters)) == ["y"]


def test_a_task_belongs_to_the_first_adapter_that_brings_it(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Folders(reviews=named("mood", "reviews"))
    store = open_store(database, adapters)
    assert owner(store, "mood") == "reviews" and store.faults("reviews") == []
    adapters.bodies |= {name: named("mood", name) for name in ("experiment", "mood")}
    store.refresh()
    assert owner(store, "mood") == "reviews" and "task.json of adapter 'mood' is not used" in caplog.text
    assert ["belongs to adapter 'reviews'" in fault for fault in store.faults("experiment")] == [True]
    assert owner(open_store(database, adapters), "mood") == "reviews"
    other_base = Folders()
    other_base.absent = set(adapters.bodies)
    assert names(open_store(database, other_base)) == []
    again = open_store(database, adapters)
    assert owner(again, "mood") == "reviews", "it was only not served in between"
    del adapters.bodies["reviews"]
    again.refresh()
    assert owner(again, "mood") == "mood" and again.faults("mood") == [] and again.faults("experiment") != []
    del adapters.bodies["mood"]
    again.refresh()
    assert owner(again, "mood") == "experiment"


def test_the_owner_of_a_task_is_forgotten_with_the_adapter(database: Database) -> None:
    adapters = Folders(x=named("t", "x"))
    store = open_store(database, adapters)
    adapters.bodies = {}
    assert store.refresh() == {"t"} and store.refresh() == set()
    with database.read() as connection:
        assert connection.execute(sa.select(task_owners)).all() == []


def test_a_task_without_a_route_uses_the_adapter_of_its_name_from_then_on(database: Database) -> None:
    adapters = Folders()
    store = open_store(database, adapters)
    store.put("late", BODY)
    store.put("plain", {**BODY, "route": {"choice": []}})
    assert not open_store(database, adapters).get("late").route.candidates
    adapters.bodies |= {"late": None, "plain": None}
    store.refresh()
    adapters.bodies = {}
    for each in (store, open_store(database, adapters)):
        assert each.get("late").route == FixedRoute((("late", 1.0),)), "never silently the base again"
        assert each.get("plain").route == FixedRoute()
    task, _ = store.put("late", {**BODY, "prompt": "other {input}", "route": store.get("late").describe()["route"]})
    assert task.by_name


def test_a_task_with_the_name_of_the_base_waits_for_another_base(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Folders(two=None)
    open_store(database, adapters, reserved=("one",)).put("two", BODY)
    other = open_store(database, adapters, reserved=("two",))
    assert other.find("two") is None and "'two' is not served: the base model has its name" in caplog.text
    other.put("three", BODY)
    with pytest.raises(InvalidRequest, match="'two' is reserved"):
        other.put("two", BODY)
    adapters.bodies = {}
    again = open_store(database, adapters, reserved=("one",))
    assert names(again) == ["three", "two"] and list(again.get("two").route.candidates) == ["two"]


def test_a_stored_task_that_cannot_be_used_is_kept_and_the_others_are_served(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(database, Folders())
    store.put("good", BODY)
    with database.transaction() as connection:
        connection.execute(sa.insert(tasks).values(name="bad", body={"prompt": "no input"}, by_name=False))
    again = open_store(database, Folders())
    again.put("new", BODY)
    assert names(again) == ["good", "new"] and "the stored task 'bad' is not served" in caplog.text
    with database.read() as connection:
        assert {row.name for row in connection.execute(sa.select(tasks))} == {"bad", "good", "new"}


def test_a_refused_write_changes_nothing(database: Database, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    adapters = Folders(x=BODY)
    store = open_store(database, adapters)
    store.put("own", BODY)

    def full() -> Any:
        raise StoreFailed("the database refuses: disk is full; nothing was changed")

    with monkeypatch.context() as patch:
        patch.setattr(database, "transaction", full)
        for write in (lambda: store.put("new", BODY), lambda: store.delete("own"), lambda: store.delete("x")):
            with pytest.raises(StoreFailed, match="disk is full"):
                write()
        assert names(store) == ["own", "x"]
        adapters.bodies["own"] = None
        store.refresh()
    assert "lost at the next start" in caplog.text
    assert list(store.get("own").route.candidates) == ["own"], "requests use the adapter all the same"
    assert list(open_store(database, adapters).get("own").route.candidates) == ["own"]


@pytest.mark.parametrize("name", ["", None])
def test_a_task_file_without_a_name_is_named_after_its_adapter(database: Database, name: Any) -> None:
    assert names(open_store(database, Folders(x={"task": name, **BODY}))) == ["x"]


def test_a_bad_task_file_is_refused_only_where_a_good_one_would_be_lost(database: Database) -> None:
    store = open_store(database, Folders(bad={"prompt": "nothing"}, good=BODY))
    assert len(store.faults("bad")) == 1 and store.faults("good") == []
    store.check_task_file("bad", {"prompt": "nothing either"})
    store.check_task_file("good", {"prompt": "fine: {input}"})
    with pytest.raises(InvalidRequest, match="leave it out to keep the task of 'good'") as error:
        store.check_task_file("good", {"prompt": "nothing"})
    assert error.value.param == "task.json"


def test_only_adapters_that_changed_are_read_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = Folders(**{name: {"prompt": f"{name}: {{input}}"} for name in ("x", "y", "z")})
    read: list[str] = []

    def counted(name: str, *args: Any, **options: Any) -> Any:
        read.append(name)
        return from_folder(name, *args, **options)

    store = open_store(database, adapters)
    monkeypatch.setattr(task_store, "from_folder", counted)
    adapters.bodies |= {"y": {"prompt": "other: {input}"}, "z": {"prompt": "nothing"}}
    store.refresh()
    fault = store.faults("z")
    store.refresh()
    assert read == ["y", "z"] and store.get("y").prompt == "other: {input}" and fault and store.faults("z") == fault
    del adapters.bodies["x"]
    assert store.refresh() == {"x"}


def test_a_deletion_during_a_refresh_is_not_undone(database: Database) -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Slow(Folders):
        def metadata(self, name: str) -> Mapping[str, Any]:
            if name == "y" and threading.current_thread().name == "writer":
                reading.set()
                assert go_on.wait(10)
            return super().metadata(name)

    store = open_store(database, Slow(x=BODY, y=BODY))
    writer = threading.Thread(target=store.refresh, name="writer")
    deleter = threading.Thread(target=store.delete, args=("x",))
    writer.start()
    assert reading.wait(10)
    deleter.start()
    deleter.join(0.2)
    go_on.set()
    writer.join(10)
    deleter.join(10)
    assert names(store) == ["y"]
