"""Tasks over adapters that are stand-ins: what is written of them, and what a full disk leaves for later."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from adapters.weights import Version
from server.tasks import store
from server.tasks.store import Tasks


class Folders:
    """Adapters with what their folders bring."""

    def __init__(self, **bodies: Any) -> None:
        self.bodies = bodies

    def names(self) -> list[str]:
        return sorted(self.bodies)

    def current(self, name: str) -> Version:
        return Version(name, name[0] * 64)

    def metadata(self, name: str) -> dict[str, Any]:
        return {"task": self.bodies[name]}

    def undisturbed(self, call: Any) -> Any:
        return call()

    def lease(self, choice: Any) -> Any:
        return self

    def release(self) -> None: ...


def opened(path: Path, adapters: Any, **options: Any) -> Tasks:
    return Tasks(path / "tasks.json", adapters, **options)


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
        patch.setattr(store, "replace_file", full)
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
        patch.setattr(store, "replace_file", full)
        tasks.refresh()
    tasks.refresh()
    assert opened(tmp_path, adapters).get("both").prompt == "second: {input}"


def test_a_task_file_with_an_empty_name_is_named_after_its_adapter(tmp_path: Path) -> None:
    tasks = opened(tmp_path, Folders(x={"task": "", "prompt": "{input}"}, y={"task": None, "prompt": "{input}"}))
    assert [task.name for task in tasks.all()] == ["x", "y"]


def test_a_task_file_that_was_of_no_use_may_be_replaced_by_another_such(tmp_path: Path) -> None:
    """There is nothing to lose."""
    tasks = opened(tmp_path, Folders(x={"prompt": "nothing"}))
    assert tasks.faults("x")
    tasks.check_file("x", {"prompt": "nothing either"})


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
