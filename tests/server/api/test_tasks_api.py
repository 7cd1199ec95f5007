"""/tasks: definitions by the API and by task.json, and which of them applies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreFailed
from tests.waiting import until

BODY = {"prompt": "Say: {input}"}
Write = Callable[..., Path]


def publish(live: Any, name: str, source: str | None = None) -> dict[str, Any]:
    answer = live.http.put(f"/adapters/{name}", json={"source": source or name})
    assert answer.status_code in (200, 201), answer.text
    described: dict[str, Any] = answer.json()
    return described


def route_of(*names: str) -> dict[str, Any]:
    return {"choice": [{"name": name, "weight": 1.0} for name in names]}


def test_task_of_the_api_overrides_a_task_file(live: Any) -> None:
    file = live.http.get("/tasks/mood").json()
    assert file["source"] == "file" and file["route"] == route_of("mood")
    put = live.http.put("/tasks/mood", json={**BODY, "route": {"choice": [{"name": "a", "weight": 0.5}]}})
    assert put.status_code == 200 and put.json()["source"] == "api"
    answer = live.generate("x", task="mood").json()
    assert answer["adapters"][0]["name"] == "a" and answer["adapters"][0]["weight"] == 0.5
    assert live.http.get("/adapters/a").json()["tasks"] == ["mood"]
    assert live.http.delete("/tasks/mood").json()["source"] == "api"
    assert live.http.get("/tasks/mood").json() == file
    assert live.http.delete("/tasks/mood").json()["source"] == "file"
    assert live.http.get("/tasks/mood").status_code == 404


def test_put_accepts_the_answer_of_get(live: Any) -> None:
    body = {**BODY, "format": "chat", "system": "Be kind.", "labels": ["x", "y"]}
    made = live.http.put("/tasks/own", json={**body, "defaults": {"max_tokens": 3, "stop": "."}})
    assert made.status_code == 201 and made.json()["route"] == {"choice": []}, made.text
    got = live.http.get("/tasks/own").json()
    assert live.http.put("/tasks/own", json=got).json() == got
    assert [t["name"] for t in live.http.get("/tasks").json()["tasks"]] == ["mood", "own"]
    assert live.http.put("/tasks/a", json=BODY).json()["route"] == route_of("a")
    route = {"choice": [{"name": "a", "weight": 0.7}]}
    assert live.http.put("/tasks/a", json={**BODY, "route": route}).json()["route"] == route, "not 0.699999988"


def test_tasks_survive_a_restart(start: Any) -> None:
    first = start()
    assert first.http.put("/tasks/own", json=BODY).status_code == 201
    first.stop()
    assert start().http.get("/tasks/own").json()["prompt"] == BODY["prompt"]


def test_special_characters_of_a_template_are_literal(live: Any) -> None:
    live.http.put("/tasks/braces", json={"prompt": "{{x}} %s \\1 {input} {other}", "route": {"choice": []}})
    answer = live.generate("{input}{input}", task="braces").json()
    expected = live.services.prompts.tokenizer.encode("{{x}} %s \\1 {input}{input} {other}")
    assert answer["usage"]["prompt_tokens"] == len(expected)


BAD_DEFINITIONS: list[tuple[Any, int, str]] = [
    ({"prompt": "no place"}, 422, "prompt"),
    ({"prompt": "{input} {input}"}, 400, "prompt"),
    ({}, 422, "prompt"),
    ({**BODY, "surplus": 1}, 422, "surplus"),
    ({**BODY, "format": "html"}, 422, "format"),
    ({**BODY, "system": "raw has none"}, 400, "system"),
    ({**BODY, "labels": ["a", "a"]}, 400, "labels"),
    ({**BODY, "defaults": {"temperature": 9}}, 422, "defaults.temperature"),
    ({**BODY, "defaults": {"min_tokens": 5, "max_tokens": 2}}, 400, "defaults.min_tokens"),
    ({**BODY, "defaults": {"stop_token_ids": [99_999_999]}}, 400, "defaults.stop_token_ids"),
    ({**BODY, "route": {}}, 400, "route"),
    ({**BODY, "route": {"choice": [], "metric": "accuracy"}}, 400, "route"),
    ({**BODY, "route": {"choice": [{"name": "nobody"}]}}, 404, "route"),
    ({**BODY, "route": {"choice": [{"name": "a"}, {"name": "a", "weight": 0.5}]}}, 400, "route"),
    ({**BODY, "route": {"choice": [{"name": "a", "weight": 99}]}}, 422, "route"),
    ({**BODY, "route": {"best": ["a"]}}, 422, "route"),
    ({**BODY, "route": {"best": ["a", "a"]}}, 400, "route"),
]


def test_bad_definitions_and_names_are_refused(live: Any, subtests: pytest.Subtests) -> None:
    for body, status, param in BAD_DEFINITIONS:
        with subtests.test(str(body)[:80]):
            answer = live.http.put("/tasks/own", json=body)
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["param"].startswith(param)
    assert live.http.get("/tasks/own").status_code == 404
    for name in ("tiny", "base", "none", "a,b", "-x"):
        assert live.http.put(f"/tasks/{name}", json=BODY).status_code == 400


@pytest.mark.parametrize(
    ("task", "served", "note"),
    [
        ({"prompt": "no place"}, False, "{input}"),
        ({**BODY, "defaults": {"stop_token_ids": [99_999_999]}}, False, "99999999"),
        ({**BODY, "route": {"choice": [{"name": "a", "weight": 99}]}}, False, "99"),
        ({**BODY, "route": {"choice": [{"name": "odd"}, {"name": "odd@0123456789ab"}]}}, False, "named twice"),
        ({**BODY, "route": route_of("nobody")}, True, "'nobody'"),
        ({**BODY, "route": {"best": ["a", "b@000000000000"]}}, True, "'b' has no version"),
        ({**BODY, "route": route_of("a", "b", "mood")}, True, "over the limit of 2 (--max-mix)"),
    ],
)
def test_wrong_task_file_is_a_note_and_its_adapter_is_served(
    start: Any, write_adapter: Write, task: dict[str, Any], served: bool, note: str
) -> None:
    live = start(max_mix=2)
    for seed, name in enumerate(("a", "b", "mood")):
        write_adapter(name, seed)
        publish(live, name)
    write_adapter("odd", 31, task=task)
    assert note in publish(live, "odd")["notes"][-1]
    assert live.http.get("/tasks/odd").status_code == (200 if served else 404)
    assert live.generate("x", adapters=[{"name": "odd"}]).status_code == 200


def test_route_of_a_task_file_is_served_once_its_adapter_exists(live: Any, write_adapter: Write) -> None:
    write_adapter("lost", 31, task={**BODY, "route": route_of("lost", "nobody")})
    assert "'nobody'" in publish(live, "lost")["notes"][-1]
    assert live.generate("x", task="lost").json()["error"]["param"] == "adapters"
    publish(live, "nobody", "a")
    assert live.http.get("/adapters/lost").json()["notes"] == []
    assert live.generate("x", task="lost").status_code == 200


def test_task_without_a_route_uses_the_adapter_of_its_name(start: Any, write_adapter: Write) -> None:
    live = start()
    write_adapter("late", 1)
    for name, route in (("late", None), ("fixed", {"choice": []})):
        put = live.http.put(f"/tasks/{name}", json={"prompt": "{input}", "route": route})
        assert put.status_code == 201 and put.json()["route"] == {"choice": []}
    assert live.http.put("/tasks/late", json=live.http.get("/tasks/late").json()).status_code == 200
    for name in ("late", "fixed"):
        publish(live, name, "late")

    def routes() -> list[Any]:
        return [live.http.get(f"/tasks/{name}").json()["route"] for name in ("late", "fixed")]

    assert routes() == [route_of("late"), {"choice": []}]
    assert live.http.delete("/adapters/late").status_code == 409
    live.stop()
    live = start(max_rank=1)
    refused = live.generate("x", task="late")
    assert refused.status_code == 404 and "over the limit of 1" in refused.text, "never silently the base"
    live.stop()
    live = start()
    assert routes() == [route_of("late"), {"choice": []}]


def test_lone_surrogates_in_adapter_files_are_refused(live: Any, write_adapter: Write) -> None:
    for seed, file in enumerate(("task.json", "adapter_config.json"), 50):
        path = write_adapter(f"half{seed}", seed, task=BODY) / file
        bad = {"base_model_name_or_path": "\ud800", "system": "\udfff"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **bad}))
        refused = live.http.post("/adapters", json={"name": f"half{seed}", "source": f"half{seed}"})
        assert refused.status_code == 400 and file in refused.json()["error"]["message"]
    assert live.http.get("/adapters").status_code == live.http.get("/tasks").status_code == 200


@pytest.mark.usefixtures("idle_watch")
def test_names_of_equal_content_have_their_own_task_and_card(live: Any, write_adapter: Write) -> None:
    folder = write_adapter("one", 31)
    for name, prompt in (("one", None), ("two", "Two: {input}"), ("three", "Three: {input}")):
        (folder / "README.md").write_text(f"card of {name}")
        if prompt:
            (folder / "task.json").write_text(json.dumps({"prompt": prompt}))
        assert publish(live, name, "one")["card"] == f"card of {name}"
    (folder / "task.json").write_text(json.dumps({"prompt": "New: {input}"}))
    publish(live, "two", "one")
    prompts = [live.http.get(f"/tasks/{name}").json().get("prompt") for name in ("one", "two", "three")]
    assert prompts == [None, "New: {input}", "Three: {input}"]
    assert live.http.get("/adapters/one").json()["card"] == "card of one"


def test_deleted_task_file_stays_deleted_until_it_changes(live: Any, write_adapter: Write) -> None:
    write_adapter("re", 31, task=BODY)
    publish(live, "re")
    assert live.http.delete("/tasks/re").status_code == 200
    publish(live, "re")
    assert live.http.get("/tasks/re").status_code == 404
    assert live.http.delete("/adapters/re").status_code == 202
    assert publish(live, "re")["tasks"] == ["re"], "the adapter is new"
    assert live.http.delete("/tasks/re").status_code == 200
    write_adapter("re", 31, task={"prompt": "Other: {input}"})
    assert publish(live, "re")["tasks"] == ["re"]


def test_deleting_a_task_of_two_folders_removes_both(live: Any, write_adapter: Write) -> None:
    for seed, name in ((31, "first"), (32, "second")):
        write_adapter(name, seed, task={**BODY, "task": "both", "route": route_of("a")})
        publish(live, name)
    assert live.http.get("/tasks/both").json()["source"] == "file"
    assert live.http.delete("/tasks/both").status_code == 200
    assert live.http.get("/tasks/both").status_code == 404
    assert live.http.delete("/adapters/first").status_code == 202


@pytest.mark.parametrize("deleted", [False, True])
def test_weights_without_a_task_file_leave_the_task_unchanged(live: Any, write_adapter: Write, deleted: bool) -> None:
    before = live.http.get("/tasks/mood").json()
    if deleted:
        assert live.http.delete("/tasks/mood").status_code == 200
    write_adapter("retrained", 31)
    sent = publish(live, "mood", "retrained")
    assert sent["tasks"] == ([] if deleted else ["mood"])
    if not deleted:
        assert live.http.get("/tasks/mood").json() == before
        assert live.generate("x", task="mood").json()["adapters"][0]["version"] == sent["version"]
    write_adapter("bringing", 33, task={**BODY, "task": "mood"})
    assert publish(live, "mood", "bringing")["tasks"] == ["mood"]


@pytest.mark.usefixtures("quick_watch")
def test_removed_folder_falls_back_to_the_library(
    start: Any, write_adapter: Write, adapter_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "library").mkdir()
    write_adapter("mood", 31).rename(tmp_path / "library" / "mood")
    live = start(library=tmp_path / "library")

    def version() -> str:
        return str(live.generate("x", task="own").json()["adapters"][0]["version"])

    assert live.http.put("/tasks/own", json={**BODY, "route": route_of("mood")}).status_code == 201
    shipped = version()
    write_adapter("mood", 32)
    until(lambda: version() != shipped, every=0.02)
    shutil.rmtree(adapter_dir / "mood")
    until(lambda: version() == shipped, every=0.02)


@pytest.mark.usefixtures("quick_watch")
def test_task_of_a_removed_folder_is_gone(start: Any, write_adapter: Write, adapter_dir: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(name, seed)
    write_adapter("rival", 5, task={"task": "contest", "prompt": "{input}", "route": {"best": ["a", "b"]}})
    live = start()
    until(lambda: live.http.get("/tasks/contest").status_code == 200, every=0.02)
    assert live.generate("x", task="contest").status_code == 200
    shutil.rmtree(adapter_dir / "rival")
    until(lambda: live.http.get("/tasks/contest").status_code == 404, every=0.02)
    until(lambda: 'task="contest"' not in live.http.get("/metrics").text, every=0.02)


def test_version_that_a_task_names_is_kept(live: Any, write_adapter: Write) -> None:
    write_adapter("pv", 40)
    first = publish(live, "pv")["version"]
    assert live.http.put("/tasks/pinned", json={**BODY, "route": route_of(first)}).status_code == 201
    for seed in range(41, 46):
        write_adapter("pv", seed)
        publish(live, "pv")
    assert live.generate("x", task="pinned").json()["adapters"][0]["version"] == first
    assert len(live.http.get("/adapters/pv").json()["versions"]) == 4
    assert live.http.delete("/tasks/pinned").status_code == 200
    write_adapter("pv", 46)
    assert len(publish(live, "pv")["versions"]) == 3


def test_task_is_deleted_even_if_its_leader_cannot_be_removed(
    live: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise StoreFailed("the database is locked")

    assert live.http.put("/tasks/own", json=BODY).status_code == 201
    monkeypatch.setattr(live.services.router, "forget_task", refused)
    assert live.http.delete("/tasks/own").status_code == 200
    assert live.http.get("/tasks/own").status_code == 404
    assert "cannot be stored: the database is locked" in caplog.text
