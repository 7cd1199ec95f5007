"""TaskStore over adapters that are stand-ins: what is written of them, and what a full disk leaves for later."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreFailed
from adapters.weights import Version
from server.tasks import task_store
from server.tasks.definitions import from_folder
from server.tasks.task_store import TaskStore


class Folders:
    """Adapters with what their folders bring."""

    def __init__(self, **bodies: Any) -> None:
        self.bodies = bodies
        self.aside: set[str] = set()

    def names(self) -> list[str]:
        return sorted(self.bodies)

    def exists(self, name: str) -> bool:
        return name in self.bodies or name in self.aside

    def current(self, name: str) -> Version:
        return Version(name, name.encode().hex().ljust(64, "0"))

    def metadata(self, name: str) -> dict[str, Any]:
        return {"task": self.bodies[name]}

    def run_exclusive(self, call: Any) -> Any:
        return call()

    def lease(self, choice: Any) -> Any:
        return self

    def release(self) -> None: ...


BROUGHT = {"prompt": "{input}"}


def opened(path: Path, adapters: Any, **options: Any) -> TaskStore:
    return TaskStore(path / "tasks.json", adapters, **options)


def test_a_task_that_was_deleted_twice_stays_away_from_both_that_brought_it(tmp_path: Path) -> None:
    adapters = Folders(x={"task": "both", "prompt": "x: {input}"})
    tasks = opened(tmp_path, adapters)
    tasks.delete("both")
    adapters.bodies["y"] = {"task": "both", "prompt": "y: {input}"}
    tasks.refresh()
    assert tasks.get("both").prompt == "y: {input}"
    tasks.delete("both")
    assert tasks.all() == [] == opened(tmp_path, adapters).all()


def test_a_task_without_a_route_is_the_base_after_a_restart_too(tmp_path: Path) -> None:
    adapters = Folders()
    opened(tmp_path, adapters).put("own", {"prompt": "{input}"})
    again = opened(tmp_path, adapters)
    assert not again.get("own").route.candidates
    adapters.bodies["own"] = None
    again.refresh()
    assert list(again.get("own").route.candidates) == ["own"], "and gets the adapter of its name still"


def test_a_task_that_waits_for_another_base_keeps_the_adapter_of_its_name(tmp_path: Path) -> None:
    adapters = Folders(two=None)
    opened(tmp_path, adapters, reserved=("one",)).put("two", {"prompt": "{input}"})
    opened(tmp_path, adapters, reserved=("two",)).put("three", {"prompt": "{input}"})
    del adapters.bodies["two"]  # not served at this start
    assert list(opened(tmp_path, adapters, reserved=("one",)).get("two").route.candidates) == ["two"]


def test_the_adapter_of_a_tasks_name_is_written_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = Folders()
    tasks = opened(tmp_path, adapters)
    tasks.put("late", {"prompt": "{input}"})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    adapters.bodies["late"] = None
    with monkeypatch.context() as patch:
        patch.setattr(task_store, "replace_file", full)
        tasks.refresh()
    assert list(tasks.get("late").route.candidates) == ["late"], "requests have it meanwhile"
    tasks.refresh()
    assert json.loads((tmp_path / "tasks.json").read_text())["own"] == ["late"]


def test_whose_a_contested_task_is_is_written_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = Folders(second={"task": "both", "prompt": "second: {input}"})
    tasks = opened(tmp_path, adapters)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    adapters.bodies["first"] = {"task": "both", "prompt": "first: {input}"}
    with monkeypatch.context() as patch:
        patch.setattr(task_store, "replace_file", full)
        tasks.refresh()
    tasks.refresh()
    assert opened(tmp_path, adapters).get("both").prompt == "second: {input}"


def test_whose_a_contested_task_was_is_forgotten_with_the_last_of_both(tmp_path: Path) -> None:
    """What is set aside at one start comes back at another."""
    both = {name: {"task": "both", "prompt": f"{name}: {{input}}"} for name in ("first", "second")}
    adapters = Folders(second=both["second"])
    tasks = opened(tmp_path, adapters)

    def owners(**bodies: Any) -> Any:
        adapters.bodies = bodies
        tasks.refresh()
        return json.loads((tmp_path / "tasks.json").read_text())["owners"]

    kept = {"both": "second"}
    assert owners(**both) == kept
    adapters.aside = {"second"}
    assert owners() == kept
    tasks.put("both", BROUGHT)
    adapters.aside = set()
    assert owners() == kept, "the task is there"
    tasks.delete("both")
    assert owners() == {}


def test_a_task_file_with_an_empty_name_is_named_after_its_adapter(tmp_path: Path) -> None:
    tasks = opened(tmp_path, Folders(x={"task": "", "prompt": "{input}"}, y={"task": None, "prompt": "{input}"}))
    assert [task.name for task in tasks.all()] == ["x", "y"]


def test_a_task_file_that_was_of_no_use_may_be_replaced_by_another_such(tmp_path: Path) -> None:
    """There is nothing to lose."""
    tasks = opened(tmp_path, Folders(x={"prompt": "nothing"}))
    assert tasks.faults("x")
    tasks.check_task_file("x", {"prompt": "nothing either"})


def test_what_an_adapter_brought_is_deleted_for_the_version_that_brought_it(tmp_path: Path) -> None:
    class Retrained(Folders):
        digest = "a" * 64

        def current(self, name: str) -> Version:
            return Version(name, self.digest)

        def metadata(self, name: str) -> dict[str, Any]:
            return {"task": self.bodies[name], "task_of": "a" * 64}

    adapters = Retrained(x={"prompt": "{input}"})
    tasks = opened(tmp_path, adapters)
    tasks.delete("x")
    adapters.digest = "b" * 64  # weights alone
    tasks.refresh()
    assert tasks.all() == []


def test_what_was_deleted_before_marks_had_definitions_stays_away(tmp_path: Path) -> None:
    adapters = Folders(x=BROUGHT, y=BROUGHT)
    deleted = {"x": adapters.current("x").digest}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": {}, "deleted": deleted}))
    assert [task.name for task in opened(tmp_path, adapters).all()] == ["y"]


def test_tasks_that_the_system_does_not_let_us_read_are_no_damage(tmp_path: Path, caplog: Any) -> None:
    file = tmp_path / "tasks.json"
    file.mkdir()
    with pytest.raises(
        StoreFailed, match=r"tasks\.json cannot be read \(Is a directory\); see to it that the server may"
    ):
        opened(tmp_path, None)
    file.rmdir()
    for text in ("{", "[]"):
        file.write_text(text)
        assert opened(tmp_path, Folders()).all() == []
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["{", "[]"]
    assert "set aside as tasks.broken.json" in caplog.text and "set aside as tasks.broken2.json" in caplog.text


def test_a_folder_does_not_take_a_task_from_the_adapter_that_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def mood(name: str) -> dict[str, str]:
        return {"task": "mood", "prompt": f"{name}: {{input}}"}

    def prompt(tasks: TaskStore) -> str:
        return tasks.get("mood").prompt.partition(":")[0]

    adapters = Folders(reviews=mood("reviews"))
    tasks = opened(tmp_path, adapters)
    assert prompt(tasks) == "reviews" and tasks.faults("reviews") == []
    adapters.bodies |= {name: mood(name) for name in ("experiment", "mood")}
    tasks.refresh()
    assert prompt(tasks) == "reviews"
    assert ["is that of adapter 'reviews'" in fault for fault in tasks.faults("experiment")] == [True]
    assert "task.json of adapter 'mood' is not used" in caplog.text
    assert prompt(opened(tmp_path, adapters)) == "reviews", "after a restart too"
    elsewhere = Folders()  # a start on another base, on which none of them can be served
    elsewhere.aside = set(adapters.bodies)
    opened(tmp_path, elsewhere)
    assert prompt(again := opened(tmp_path, adapters)) == "reviews"
    del adapters.bodies["reviews"]
    again.refresh()
    assert prompt(again) == "mood" and again.faults("mood") == [] and again.faults("experiment") != []


def test_a_thousand_adapters_with_tasks_are_listed_at_once(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(1000)]
    tasks = opened(tmp_path, Folders(**dict.fromkeys(names, BROUGHT)))
    began = time.thread_time()
    assert [tasks.routing_to(name) for name in names] == [[name] for name in names]
    assert time.thread_time() - began < 0.5, "every list of adapters, /stats and each scrape ask for all of them"


def test_an_adapter_that_changes_has_no_other_task_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = Folders(**{name: {"prompt": f"{name}: {{input}}"} for name in ("x", "y", "z")})
    read: list[str] = []

    def counted(name: str, *args: Any, **options: Any) -> Any:
        read.append(name)
        return from_folder(name, *args, **options)

    tasks = opened(tmp_path, adapters)
    monkeypatch.setattr(task_store, "from_folder", counted)
    adapters.bodies |= {"y": {"prompt": "other: {input}"}, "z": {"prompt": "nothing"}}
    tasks.refresh()
    assert read == ["y", "z"] and tasks.get("y").prompt == "other: {input}"
    fault = tasks.faults("z")
    tasks.refresh()
    assert read == ["y", "z"] and fault and tasks.faults("z") == fault, "what is wrong is still told"
    del adapters.bodies["x"]
    assert tasks.refresh() == {"x"}


def test_a_task_that_is_deleted_while_folders_are_read_stays_away(tmp_path: Path) -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Slow(Folders):
        """Reading the second one's task takes its time on the writer's thread."""

        def metadata(self, name: str) -> dict[str, Any]:
            if name == "y" and threading.current_thread().name == "writer":
                reading.set()
                assert go_on.wait(10)
            return super().metadata(name)

    tasks = opened(tmp_path, Slow(x=BROUGHT, y=BROUGHT))
    writer = threading.Thread(target=tasks.refresh, name="writer")
    deleter = threading.Thread(target=tasks.delete, args=("x",))
    writer.start()
    assert reading.wait(10)
    deleter.start()
    deleter.join(0.2)
    go_on.set()
    writer.join(10)
    deleter.join(10)
    assert [task.name for task in tasks.all()] == ["y"]
