"""/tasks over HTTP: definitions, their precedence, and what a request makes of them."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreFailed
from tests.waiting import until

BODY = {"prompt": "Say: {input}"}


def test_a_folders_task_and_one_put_over_it(live: Any) -> None:
    file = live.http.get("/tasks/mood").json()
    assert file["source"] == "file" and file["route"] == {"choice": [{"name": "mood", "weight": 1.0}]}
    put = live.http.put("/tasks/mood", json={**BODY, "route": {"choice": [{"name": "a", "weight": 0.5}]}})
    assert put.status_code == 200 and put.json()["source"] == "api"
    answer = live.generate("x", task="mood").json()
    assert answer["adapters"][0]["name"] == "a" and answer["adapters"][0]["weight"] == 0.5
    assert live.http.get("/adapters/a").json()["tasks"] == ["mood"]
    assert live.http.delete("/tasks/mood").json()["source"] == "api"
    assert live.http.get("/tasks/mood").json() == file
    assert live.http.delete("/tasks/mood").json()["source"] == "file"
    assert live.http.get("/tasks/mood").status_code == 404


def test_a_put_reads_what_a_get_answers(live: Any) -> None:
    made = live.http.put("/tasks/own", json={**BODY, "format": "chat", "system": "Be kind.", "labels": ["x", "y"],
                                             "defaults": {"max_tokens": 3, "stop": "."}})  # fmt: skip
    assert made.status_code == 201, made.text
    assert made.json()["route"] == {"choice": []}, "no adapter of that name: the base"
    got = live.http.get("/tasks/own").json()
    assert live.http.put("/tasks/own", json=got).json() == got
    assert [t["name"] for t in live.http.get("/tasks").json()["tasks"]] == ["mood", "own"]
    assert live.http.put("/tasks/a", json=BODY).json()["route"] == {"choice": [{"name": "a", "weight": 1.0}]}
    route = {"choice": [{"name": "a", "weight": 0.7}]}
    assert live.http.put("/tasks/a", json={**BODY, "route": route}).json()["route"] == route, "and not 0.699999988"


def test_tasks_survive_a_restart(start: Any) -> None:
    first = start()
    assert first.http.put("/tasks/own", json=BODY).status_code == 201
    first.stop()
    assert start().http.get("/tasks/own").json()["prompt"] == BODY["prompt"]


def test_special_characters_of_a_template_are_literal(live: Any) -> None:
    live.http.put("/tasks/braces", json={"prompt": "{{x}} %s \\1 {input} {other}", "route": {"choice": []}})
    text = live.services.prompts.tokenizer
    answer = live.generate("{input}{input}", task="braces").json()
    assert answer["usage"]["prompt_tokens"] == len(text.encode("{{x}} %s \\1 {input}{input} {other}"))


BAD_DEFINITIONS: list[tuple[Any, int, str | None]] = [
    ({"prompt": "no place"}, 422, "prompt"),
    ({"prompt": "{input} {input}"}, 400, "prompt"),
    ({}, 422, "prompt"),
    ({**BODY, "surplus": 1}, 422, "surplus"),
    ({**BODY, "format": "html"}, 422, "format"),
    ({**BODY, "system": "raw has none"}, 400, "system"),
    ({**BODY, "labels": ["a", "a"]}, 400, "labels"),
    ({**BODY, "defaults": {"temperature": 9}}, 422, "defaults.temperature"),
    ({**BODY, "route": {}}, 400, "route"),
    ({**BODY, "route": {"choice": [], "metric": "accuracy"}}, 400, "route"),
    ({**BODY, "route": {"choice": [{"name": "nobody"}]}}, 404, "route"),
    ({**BODY, "route": {"choice": [{"name": "a"}, {"name": "a", "weight": 0.5}]}}, 400, "route"),
    ({**BODY, "route": {"choice": [{"name": "a", "weight": 99}]}}, 422, "route"),
    ({**BODY, "route": {"best": ["a"]}}, 422, "route"),
    ({**BODY, "route": {"best": ["a", "a"]}}, 400, "route"),
]


def test_bad_definitions_are_refused(live: Any, subtests: pytest.Subtests) -> None:
    for body, status, param in BAD_DEFINITIONS:
        with subtests.test(str(body)[:80]):
            answer = live.http.put("/tasks/own", json=body)
            assert answer.status_code == status, answer.text
            if param:
                assert answer.json()["error"]["param"].startswith(param)
            assert live.http.get("/tasks/own").status_code == 404


BAD_NAMES: list[str] = ["tiny", "base", "none", "a,b", "-x"]


def test_bad_names_are_refused(live: Any, subtests: pytest.Subtests) -> None:
    for name in BAD_NAMES:
        with subtests.test(name):
            assert live.http.put(f"/tasks/{name}", json=BODY).status_code == 400


def test_stop_tokens_of_a_task_are_in_the_vocabulary(live: Any, write_adapter: Any) -> None:
    body = {**BODY, "defaults": {"min_tokens": 5, "max_tokens": 2}}
    never = live.http.put("/tasks/mine", json=body)
    assert never.status_code == 400 and never.json()["error"]["param"] == "defaults.min_tokens"
    body = {**BODY, "defaults": {"stop_token_ids": [99_999_999]}}
    refused = live.http.put("/tasks/far", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "defaults.stop_token_ids"
    write_adapter("far", 33, task=body)
    made = live.http.post("/adapters", json={"name": "far", "source": "far"}).json()
    assert made["tasks"] == [] and "99999999 is no token id" in made["notes"][-1]


def test_a_bad_task_file_leaves_its_adapter_served(live: Any, write_adapter: Any) -> None:
    write_adapter("odd", 31, task={"prompt": "no input here"})
    assert live.http.post("/adapters", json={"name": "odd", "source": "odd"}).status_code in (200, 201)
    assert live.http.get("/tasks/odd").status_code == 404
    assert live.generate("x", adapters=[{"name": "odd"}]).status_code == 200
    [note] = [note for note in live.http.get("/adapters/odd").json()["notes"] if "task.json" in note]
    assert note.startswith("its task.json is not used: ") and "{input}" in note
    for seed, weight in enumerate((99, float("nan")), 40):
        write_adapter(f"far{seed}", seed, task={**BODY, "route": {"choice": [{"name": "a", "weight": weight}]}})
        made = live.http.post("/adapters", json={"name": f"far{seed}", "source": f"far{seed}"})
        assert made.status_code in (200, 201), made.text
        assert live.http.get(f"/tasks/far{seed}").status_code == 404


def test_a_task_file_with_a_mix_over_the_limit_is_told(start: Any, write_adapter: Any) -> None:
    live, names = start(max_mix=2), ("one", "two", "three")
    route = {"choice": [{"name": name} for name in names]}
    for seed, name in enumerate(names):
        write_adapter(name, seed, task={**BODY, "route": route} if name == "three" else None)
        live.http.post("/adapters", json={"name": name, "source": name})
    assert live.http.get("/adapters/three").json()["notes"] == [
        "its task.json has a route that cannot be served: a mix of 3 adapters is over the limit of 2 (--max-mix)"
    ]


def test_a_task_that_names_no_route_is_the_adapter_of_its_name_whenever_it_comes(
    start: Any, write_adapter: Any
) -> None:
    live, own = start(), {"choice": [{"name": "late", "weight": 1.0}]}
    write_adapter("late", 1)
    for name, route in (("late", None), ("fixed", {"choice": []})):
        put = live.http.put(f"/tasks/{name}", json={"prompt": "{input}", "route": route})
        assert put.status_code == 201 and put.json()["route"] == {"choice": []}, "the base alone"
    for name in ("late", "fixed"):
        live.http.post("/adapters", json={"name": name, "source": "late"})
        assert live.http.get(f"/adapters/{name}").status_code == 200
    assert live.http.get("/tasks/late").json()["route"] == own
    assert live.http.get("/tasks/fixed").json()["route"] == {"choice": []}
    assert live.generate("x", task="late").json()["adapters"][0]["name"] == "late"
    assert live.http.delete("/adapters/late").status_code == 409
    live.stop()
    live = start(max_rank=1)
    assert live.http.get("/tasks/late").json()["route"] == own
    refused = live.generate("x", task="late")
    assert refused.status_code == 404 and "over the limit of 1" in refused.text, "never silently the base"
    live.stop()
    live = start()
    assert live.http.get("/tasks/late").json()["route"] == own
    assert live.http.get("/tasks/fixed").json()["route"] == {"choice": []}


def test_a_task_without_a_route_stays_so_when_it_is_changed_by_what_it_tells(start: Any, write_adapter: Any) -> None:
    live = start()
    write_adapter("late", 1)
    for name in ("late", "fixed"):
        told = live.http.put(f"/tasks/{name}", json={"prompt": "{input}"}).json()
        changed = {**told, "prompt": "Say {input}", "route": told["route"] if name == "late" else {"choice": []}}
        if name == "fixed":
            live.http.delete("/tasks/fixed")
        assert live.http.put(f"/tasks/{name}", json=changed).json()["prompt"] == "Say {input}"
        live.http.post("/adapters", json={"name": name, "source": "late"})
    assert live.http.get("/tasks/late").json()["route"] == {"choice": [{"name": "late", "weight": 1.0}]}
    assert live.http.get("/tasks/fixed").json()["route"] == {"choice": []}


def test_a_task_file_that_routes_to_nobody_is_told_until_there_is_one(
    live: Any, write_adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter("lost", 31, task={**BODY, "route": {"choice": [{"name": "lost"}, {"name": "nobody", "weight": 0.5}]}})
    made = live.http.post("/adapters", json={"name": "lost", "source": "lost"})
    assert made.status_code in (200, 201) and "'nobody'" in made.json()["notes"][-1]
    assert (
        "the task.json of adapter 'lost' has a route that cannot be served" in caplog.text and "'nobody'" in caplog.text
    )
    assert live.generate("x", task="lost").json()["error"]["param"] == "adapters"
    assert live.http.post("/adapters", json={"name": "nobody", "source": "a"}).status_code == 201
    assert live.http.get("/adapters/lost").json()["notes"] == []
    assert live.generate("x", task="lost").status_code == 200
    route = {"choice": [{"name": "twice"}, {"name": "twice@0123456789ab", "weight": 0.5}]}
    write_adapter("twice", 34, task={**BODY, "route": route})
    made = live.http.post("/adapters", json={"name": "twice", "source": "twice"})
    assert "is not used: the adapter 'twice' is named twice" in made.json()["notes"][-1]
    route = {"best": ["a", "b@000000000000"]}
    write_adapter("best", 32, task={**BODY, "route": route})
    made = live.http.post("/adapters", json={"name": "best", "source": "best"})
    assert "'b' has no version" in made.json()["notes"][-1]


def test_half_of_a_character_in_an_adapters_files_is_in_nobodys_answer(live: Any, write_adapter: Any) -> None:
    for seed, file in enumerate(("task.json", "adapter_config.json"), 50):
        path = write_adapter(f"half{seed}", seed, task=BODY) / file
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "\ud800", "system": "\udfff"})
        )
        refused = live.http.post("/adapters", json={"name": f"half{seed}", "source": f"half{seed}"})
        assert refused.status_code == 400 and f"{file} holds half" in refused.json()["error"]["message"]
    assert live.http.get("/adapters").status_code == live.http.get("/tasks").status_code == 200


def test_a_folders_task_that_routes_elsewhere_stays_deleted(live: Any, write_adapter: Any) -> None:
    write_adapter("odd", 31, task={**BODY, "task": "elsewhere", "route": {"choice": [{"name": "a"}]}})
    assert live.http.post("/adapters", json={"name": "odd", "source": "odd"}).status_code in (200, 201)
    assert live.http.get("/tasks/elsewhere").json()["source"] == "file"
    assert live.http.delete("/tasks/elsewhere").status_code == 200
    assert live.http.get("/tasks/elsewhere").status_code == 404


@pytest.mark.usefixtures("idle_watch")
def test_names_of_equal_content_have_a_task_and_a_card_each(live: Any, write_adapter: Any) -> None:
    """And none gets another's, or loses its own to it."""
    folder = write_adapter("one", 31)
    for name, given in (("one", None), ("two", "Two: {input}"), ("three", "Three: {input}")):
        (folder / "README.md").write_text(f"card of {name}")
        if given:
            (folder / "task.json").write_text(json.dumps({"prompt": given}))
        made = live.http.post("/adapters", json={"name": name, "source": "one"})
        assert made.status_code == 201 and made.json()["card"] == f"card of {name}"
    assert live.http.get("/tasks/one").status_code == 404
    for name, prompt in (("two", "Two: {input}"), ("three", "Three: {input}")):
        assert live.http.get(f"/tasks/{name}").json()["prompt"] == prompt
    (folder / "task.json").write_text(json.dumps({"prompt": "New: {input}"}))
    assert live.http.put("/adapters/two", json={"source": "one"}).status_code == 200
    assert [live.http.get(f"/tasks/{name}").json().get("prompt") for name in ("one", "two", "three")] == [
        None, "New: {input}", "Three: {input}",
    ]  # fmt: skip
    assert live.http.get("/adapters/one").json()["card"] == "card of one"
    assert live.http.get("/adapters/one").json()["tasks"] == []


def test_a_task_that_two_folders_bring_is_deleted_at_once(live: Any, write_adapter: Any) -> None:
    for seed, name in ((31, "first"), (32, "second")):
        write_adapter(name, seed, task={**BODY, "task": "both"})
        assert live.http.post("/adapters", json={"name": name, "source": name}).status_code == 201
    assert live.http.delete("/tasks/both").status_code == 200
    assert live.http.get("/tasks/both").status_code == 404
    assert live.http.delete("/adapters/first").status_code == 202


def test_a_deleted_task_comes_back_with_another_definition_or_with_its_adapter_put_anew(
    live: Any, write_adapter: Any
) -> None:
    write_adapter("re", 31, task=BODY)
    put = {"name": "re", "source": "re"}
    assert live.http.post("/adapters", json=put).status_code == 201
    assert live.http.delete("/tasks/re").status_code == 200
    assert live.http.put("/adapters/re", json={"source": "re"}).status_code == 200
    assert live.http.get("/tasks/re").status_code == 404, "it is what was deleted"
    assert live.http.delete("/adapters/re").status_code == 202
    assert live.http.post("/adapters", json=put).json()["tasks"] == ["re"]
    assert live.http.delete("/tasks/re").status_code == 200
    write_adapter("re", 31, task={"prompt": "Other: {input}"})
    assert live.http.put("/adapters/re", json={"source": "re"}).json()["tasks"] == ["re"]


def test_a_task_goes_on_with_weights_that_are_sent_alone(live: Any, write_adapter: Any) -> None:
    before = live.http.get("/tasks/mood").json()
    write_adapter("retrained", 31)
    sent = live.http.put("/adapters/mood", json={"source": "retrained"})
    assert sent.status_code == 200 and sent.json()["tasks"] == ["mood"]
    assert live.http.get("/tasks/mood").json() == before
    answer = live.generate("x", task="mood").json()
    assert answer["adapters"][0]["version"] == sent.json()["version"]
    again = live.http.post("/adapters", json={"name": "mood", "source": "retrained"})
    assert again.status_code == 200 and again.json() == {**sent.json(), **_moving(again.json())}


def _moving(told: dict[str, Any]) -> dict[str, Any]:
    """What of an adapter is no content."""
    return {key: told[key] for key in ("tier", "loaded_at", "leases")}


def test_a_task_that_was_deleted_does_not_come_back_with_weights_alone(live: Any, write_adapter: Any) -> None:
    assert live.http.delete("/tasks/mood").status_code == 200
    for seed in (31, 32):
        write_adapter("retrained", seed)
        assert live.http.put("/adapters/mood", json={"source": "retrained"}).json()["tasks"] == []
    write_adapter("bringing", 33, task={**BODY, "task": "mood"})
    assert live.http.put("/adapters/mood", json={"source": "bringing"}).json()["tasks"] == ["mood"]


@pytest.mark.usefixtures("quick_watch")
def test_a_task_of_the_api_outlives_a_folder_that_was_put_over_the_library(
    start: Any, write_adapter: Any, adapter_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "library").mkdir()
    write_adapter("mood", 31).rename(tmp_path / "library" / "mood")
    live = start(library=tmp_path / "library")

    def version() -> str:
        return live.generate("x", task="own").json()["adapters"][0]["version"]

    assert live.http.put("/tasks/own", json={**BODY, "route": {"choice": [{"name": "mood"}]}}).status_code == 201
    shipped = version()
    write_adapter("mood", 32)
    until(lambda: version() != shipped, every=0.02)
    shutil.rmtree(adapter_dir / "mood")
    until(lambda: version() == shipped, every=0.02)


@pytest.mark.usefixtures("quick_watch")
def test_a_task_that_goes_with_its_folder_is_forgotten(start: Any, write_adapter: Any, adapter_dir: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(name, seed)
    write_adapter("rival", 5, task={"task": "contest", "prompt": "{input}", "route": {"best": ["a", "b"]}})
    live = start()
    until(lambda: live.http.get("/tasks/contest").status_code == 200, every=0.02)
    assert live.generate("x", task="contest").status_code == 200
    router = live.services.router
    assert "contest" in router._states
    shutil.rmtree(adapter_dir / "rival")
    until(lambda: live.http.get("/tasks/contest").status_code == 404, every=0.02)
    until(lambda: not router._states)


def test_a_version_that_a_task_names_is_kept(live: Any, write_adapter: Any) -> None:
    write_adapter("pv", 40)
    first = live.http.post("/adapters", json={"name": "pv", "source": "pv"}).json()["version"]
    route = {"choice": [{"name": first}]}
    assert live.http.put("/tasks/pinned", json={**BODY, "route": route}).status_code == 201
    for seed in range(41, 46):
        write_adapter("pv", seed)
        assert live.http.put("/adapters/pv", json={"source": "pv"}).status_code == 200
    answer = live.generate("x", task="pinned").json()
    assert answer["adapters"][0]["version"] == first
    assert len(live.http.get("/adapters/pv").json()["versions"]) == 4
    assert live.http.delete("/tasks/pinned").status_code == 200
    write_adapter("pv", 46)
    assert len(live.http.put("/adapters/pv", json={"source": "pv"}).json()["versions"]) == 3


@pytest.mark.parametrize("deleted_first", [True, False])
def test_a_task_and_the_deletion_of_its_adapter_come_together(live: Any, deleted_first: bool) -> None:
    registry, waits, go_on = live.services.registry, threading.Event(), threading.Event()
    statuses: dict[str, int] = {}
    route = {"choice": [{"name": "a"}]}
    calls = {
        "delete": lambda: live.http.delete("/adapters/a"),
        "put": lambda: live.http.put("/tasks/own", json={**BODY, "route": route}),
    }

    def ask(which: str) -> None:
        statuses[which] = calls[which]().status_code

    registry._writer.submit(lambda: (waits.set(), go_on.wait(10)))
    assert waits.wait(10)  # what is in its queue from now on is what is asked
    asking = [threading.Thread(target=ask, args=(which,)) for which in sorted(calls, reverse=not deleted_first)]
    for number, thread in enumerate(asking, start=1):
        thread.start()
        until(lambda number=number: registry._writer._work_queue.qsize() >= number)
    go_on.set()
    for thread in asking:
        thread.join(10)
    assert statuses == ({"delete": 202, "put": 404} if deleted_first else {"delete": 409, "put": 201})
    assert ("own" in live.services.tasks.routing_to("a")) == ("a" in registry.names())


def test_a_model_is_found_without_a_list_of_all(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes longer the more adapters there are, on the thread that answers everybody."""
    registry = live.services.registry
    for model in ("a", "tiny"):  # the second time: what is counted for the first time has its names looked up
        for patch in ({}, {"names": None}):
            with monkeypatch.context() as patched:
                for name, value in patch.items():
                    patched.setattr(registry, name, value)
                answer = live.http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
            assert answer.status_code == 200, answer.text
    assert live.http.post("/v1/completions", json={"model": "third", "prompt": "x"}).status_code == 404


def test_a_task_that_is_gone_is_told_so_whatever_the_disk_says_to_its_records(
    live: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise StoreFailed("the quality records cannot be written: database is locked")

    assert live.http.put("/tasks/own", json=BODY).status_code == 201
    monkeypatch.setattr(live.services.router, "forget_task", refused)
    assert live.http.delete("/tasks/own").status_code == 200
    assert live.http.get("/tasks/own").status_code == 404
    assert "cannot be stored: the quality records" in caplog.text
    assert live.http.put("/tasks/own", json=BODY).status_code == 201


def test_the_series_of_a_task_go_with_it(live: Any) -> None:
    live.http.put("/tasks/own", json={"prompt": "{input}"}).raise_for_status()
    assert live.generate("x", task="own", max_tokens=1).status_code == 200
    assert live.idle() and 'task="own"' in live.http.get("/metrics").text
    live.http.delete("/tasks/own").raise_for_status()
    assert 'task="own"' not in live.http.get("/metrics").text


def test_the_series_of_a_task_stay_while_its_folder_brings_it(live: Any) -> None:
    live.http.put("/tasks/mood", json=BODY).raise_for_status()
    assert live.generate("x", task="mood", max_tokens=1).status_code == 200 and live.idle()
    assert live.http.delete("/tasks/mood").status_code == 200
    assert 'task="mood"' in live.http.get("/metrics").text
