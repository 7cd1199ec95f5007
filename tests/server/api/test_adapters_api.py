"""/adapters over HTTP: register, publish, roll back, retire, upload, pin, compose, and everything that is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format import read_folder
from tests.waiting import until

FIELDS = {"name", "version", "ranks", "targets", "bytes", "tier", "leases", "loaded_at", "base", "pinned", "tasks"}
DETAILS = FIELDS | {"versions", "honoured", "harmless", "notes", "card"}


def upload(folder: Path, **fields: str) -> dict[str, Any]:
    files = {n: (n, (folder / n).read_bytes()) for n in ("adapter_config.json", "adapter_model.safetensors")}
    return {"files": files, "data": fields}


def test_the_list_and_one_adapter(live: Any) -> None:
    listed = live.http.get("/adapters").json()
    assert [a["name"] for a in listed["adapters"]] == ["a", "b", "mood"] and listed["rejected"] == []
    assert all(set(a) == FIELDS for a in listed["adapters"])
    one = live.http.get("/adapters/mood")
    assert set(one.json()) == DETAILS and one.json()["tasks"] == ["mood"]
    assert one.headers["etag"] == f'"{one.json()["version"]}"'
    assert live.http.get("/adapters/nobody").status_code == 404


def test_registering_is_201_then_200_then_409(live: Any, write_adapter: Callable[..., Path]) -> None:
    write_adapter("late", 5)
    made = live.http.post("/adapters", json={"name": "new", "source": "late"})
    assert made.status_code == 201 and set(made.json()) == DETAILS
    assert live.http.post("/adapters", json={"name": "new", "source": "late"}).status_code == 200
    write_adapter("late", 6)
    refused = live.http.post("/adapters", json={"name": "new", "source": "late"})
    assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
    assert live.generate("x", adapters=[{"name": "new"}]).status_code == 200


@pytest.mark.parametrize(
    "method, path",
    [("DELETE", "/adapters/a"), ("GET", "/adapters"), ("PUT", "/tasks/mood"), ("GET", "/jobs"), ("GET", "/tasks")],
)
def test_a_query_that_nothing_reads_is_refused_and_changes_nothing(live: Any, method: str, path: str) -> None:
    """Who means one version would else retire the whole adapter."""
    version = live.http.get("/adapters/a").json()["version"]
    refused = live.http.request(method, path, params={"version": version}, json={"prompt": "{input}"})
    assert refused.status_code == 422
    assert refused.json()["error"]["message"] == "version: there is no such field; /docs lists all fields"
    assert live.http.get("/adapters/a").json()["version"] == version
    assert live.http.get("/tasks/mood").json()["source"] == "file"


@pytest.mark.usefixtures("quick_watch")
def test_what_is_deleted_before_the_watch_has_seen_its_folder_stays_deleted(
    live: Any, write_adapter: Callable[..., Path]
) -> None:
    def names() -> set[str]:
        return {adapter["name"] for adapter in live.http.get("/adapters").json()["adapters"]}

    write_adapter("late", 5)
    assert live.http.post("/adapters", json={"name": "late", "source": "late"}).status_code in (200, 201)
    assert live.http.delete("/adapters/late").status_code == 202
    write_adapter("witness", 6)
    until(lambda: "witness" in names())
    assert "late" not in names()
    assert live.http.put("/adapters/late", json={"source": "late"}).status_code == 201
    assert "late" in names()


def test_a_body_that_is_no_json_is_told_as_elsewhere(live: Any) -> None:
    def told(content: bytes) -> tuple[int, str]:
        answer = live.http.put("/adapters/a", content=content, headers={"content-type": "application/json"})
        elsewhere = live.http.post("/generate", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            elsewhere.status_code, elsewhere.json()["error"]["message"]
        )  # fmt: skip
        return answer.status_code, answer.json()["error"]["message"]

    assert told(b"") == (422, "a JSON body is needed, sent as application/json")
    assert told(b'{"source": "a"') == (422, "the body is not valid JSON, at character 14")
    assert told(b'{"source": "\xff"}')[0] == 400


def test_what_is_not_known_is_named_by_the_field_that_it_came_in(live: Any) -> None:
    def param(method: str, path: str, body: Any) -> str:
        answer = live.http.request(method, path, json=body)
        assert answer.status_code in (400, 404), answer.text
        return str(answer.json()["error"]["param"])

    nobody = [{"name": "nobody"}]
    for terms in (nobody, [{"name": "a", "weight": 0}]):
        assert param("POST", "/adapters/compose", {"name": "sum", "from": terms}) == "from"
    assert param("PUT", "/adapters/a", {"version": "a@000000000000"}) == "version"
    assert param("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "nowhere"}) == "lora_path"
    assert param("POST", "/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "a"}) == "lora_name"
    assert param("POST", "/v1/unload_lora_adapter", {"lora_name": "nobody"}) == "lora_name"
    assert param("POST", "/v1/completions", {"model": "adapter:nobody", "prompt": "x"}) == "model"
    assert param("POST", "/tasks/mood/evaluate", {"file": "file-none"}) == "file"
    asked = {"data": [{"input": "x", "output": "good"}], "candidates": [nobody]}
    assert param("POST", "/tasks/mood/evaluate", asked) == "candidates"


def test_a_base_by_another_name_is_a_note(live: Any, write_adapter: Callable[..., Path]) -> None:
    config = write_adapter("far", 9) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/Giant-7B"}))
    made = live.http.post("/adapters", json={"name": "far", "source": "far"})
    assert made.status_code in (200, 201) and made.json()["base"] == "org/Giant-7B"
    assert "'org/Giant-7B'" in made.json()["notes"][0] and "'tiny'" in made.json()["notes"][0]
    assert live.http.get("/adapters/a").json()["notes"] == []


def test_put_publishes_compares_and_rolls_back(live: Any, write_adapter: Callable[..., Path]) -> None:
    first = live.http.get("/adapters/a").headers["etag"]
    before = live.generate("so it goes", adapters=[{"name": "a"}], logprobs=1).json()
    write_adapter("later", 77)
    stale = live.http.put("/adapters/a", json={"source": "later"}, headers={"if-match": '"a@000000000000"'})
    assert stale.status_code == 412
    moved = live.http.put("/adapters/a", json={"source": "later"}, headers={"if-match": first})
    assert moved.status_code == 200 and moved.headers["etag"] != first
    after = live.generate("so it goes", adapters=[{"name": "a"}], logprobs=1).json()
    assert after["logprobs"] != before["logprobs"]
    kept = live.generate("so it goes", adapters=[{"name": first.strip('"')}], logprobs=1).json()
    assert kept["text"] == before["text"]
    back = live.http.put("/adapters/a", json={"version": first.strip('"')})
    assert back.status_code == 200 and back.headers["etag"] == first
    assert live.http.put("/adapters/a", json={"version": "b@000000000000"}).status_code == 400
    assert live.http.put("/adapters/a", json={"version": "a@ffffffffffff"}).status_code == 404
    assert live.http.put("/adapters/a", json={}).status_code == 400
    assert live.http.put("/adapters/fresh", json={"source": "later"}).status_code == 201
    several = f'"a@000000000000", {first}'
    assert live.http.put("/adapters/a", json={"source": "a"}, headers={"if-match": several}).status_code == 200
    assert live.http.put("/adapters/a", json={"source": "a"}, headers={"if-match": '"b@1", "c@2"'}).status_code == 412
    now = live.http.get("/adapters/a").headers["etag"]
    for given in (
        [("if-match", '"a@000000000000"'), ("if-match", now)],
        {"if-match": f'"{"x" * 64}@000000000000", ' * 3 + now},
    ):
        assert live.http.put("/adapters/a", json={"source": "a"}, headers=given).status_code == 200


def test_a_name_or_a_version_that_will_not_do_is_told_before_a_source_is_asked(live: Any, monkeypatch: Any) -> None:
    def opened(source: str) -> Any:
        raise AssertionError(f"{source} was asked")

    monkeypatch.setattr(live.services.sources, "open", opened)
    for name in ("base", "none", "tiny"):
        refused = live.http.post("/adapters", json={"name": name, "source": "far"})
        assert refused.status_code == 400 and "reserved" in refused.json()["error"]["message"]
        assert live.http.put(f"/adapters/{name}", json={"source": "far"}).json() == refused.json()
    invalid = live.http.post("/v1/load_lora_adapter", json={"lora_name": "a b", "lora_path": "far"})
    assert invalid.status_code == 400 and "name" in invalid.json()["error"]["message"]
    stale = live.http.put("/adapters/a", json={"source": "far"}, headers={"if-match": '"a@000000000000"'})
    assert stale.status_code == 412
    new = live.http.put("/adapters/fresh", json={"source": "far"}, headers={"if-match": "*"})
    assert new.status_code == 412


def test_uploads(live: Any, write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter("local", 8)
    made = live.http.post("/adapters", **upload(folder, name="sent"))
    assert made.status_code == 201, made.text
    assert live.http.put("/adapters/sent", **upload(write_adapter("local", 9))).status_code == 200
    assert live.http.post("/adapters", **upload(folder)).status_code == 422
    extra = upload(folder, name="x")
    extra["files"]["evil.py"] = ("evil.py", b"import os")
    assert live.http.post("/adapters", **extra).status_code == 422
    assert not list((live.state.settings.state_dir / "uploads").iterdir()), "nothing is left behind"


def test_an_upload_under_a_name_in_use_replaces_nothing(live: Any, write_adapter: Callable[..., Path]) -> None:
    before = live.http.get("/adapters/b").json()["version"]
    refused = live.http.post("/adapters", **upload(write_adapter("local", 8), name="b"))
    assert refused.status_code == 409 and live.http.get("/adapters/b").json()["version"] == before
    same = live.http.post("/adapters", **upload(write_adapter("local", 2, rank=3), name="b"))
    assert same.status_code == 200 and same.json()["version"] == before


def test_of_several_that_come_at_once_one_has_made_the_name(live: Any, write_adapter: Callable[..., Path]) -> None:
    bodies = [upload(write_adapter(f"race{seed}", seed)) for seed in range(20, 24)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: live.http.put("/adapters/raced", **body), bodies))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]


def test_a_task_that_is_none_does_not_take_the_one_that_is_there(live: Any, write_adapter: Callable[..., Path]) -> None:
    def sent(task: str, **fields: str) -> dict[str, Any]:
        body = upload(write_adapter("local", 8), **fields)
        body["files"]["task.json"] = ("task.json", task.encode())
        return body

    assert live.http.put("/adapters/brings", **sent('{"prompt": "Say: {input}"}')).status_code == 201
    of_no_use = '{"prompt": "nothing to put in"}'
    for answer in (
        live.http.put("/adapters/brings", **sent(of_no_use)),
        live.http.post("/adapters", **sent(of_no_use, name="brings")),
    ):
        assert answer.status_code == 400, answer.text
        told = answer.json()["error"]
        assert told["param"] == "task.json" and "{input}" in told["message"] and "leave it out" in told["message"]
    assert live.http.get("/tasks/brings").json()["prompt"] == "Say: {input}"
    assert live.http.put("/adapters/brings", **sent("no JSON")).status_code == 400


@pytest.mark.usefixtures("idle_watch")
def test_so_it_does_not_from_a_source(live: Any, write_adapter: Callable[..., Path]) -> None:
    before = live.http.get("/tasks/mood").json()
    write_adapter("local", 8, task={"prompt": "nothing to put in"})
    refused = live.http.put("/adapters/mood", json={"source": "local"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "task.json", refused.text
    assert live.http.get("/tasks/mood").json() == before


@pytest.mark.usefixtures("idle_watch")
def test_what_was_published_is_told_though_it_is_deleted_at_once(
    live: Any, write_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = live.services.registry

    def deleting(change: Any) -> Any:
        async def changed(name: str, *rest: Any, **options: Any) -> Any:
            published = await change(name, *rest, **options)
            registry.retire_now(name)
            return published

        return changed

    folder, old = write_adapter("late", 5), live.http.get("/adapters/a").json()["version"]
    write_adapter("later", 6)
    assert live.http.put("/adapters/a", json={"source": "later"}).status_code == 200
    monkeypatch.setattr(registry, "publish", deleting(registry.publish))
    monkeypatch.setattr(registry, "roll_back", deleting(registry.roll_back))
    parts = [{"name": "b", "weight": 1.0}]
    for answer, status in (
        (live.http.put("/adapters/a", json={"version": old}), 200),
        (live.http.post("/adapters", json={"name": "new", "source": "late"}), 201),
        (live.http.put("/adapters/new", json={"source": "late"}), 201),
        (live.http.put("/adapters/new", **upload(folder)), 201),
        (live.http.post("/adapters/compose", json={"name": "sum", "from": parts}), 201),
    ):
        assert answer.status_code == status, answer.text
        assert DETAILS <= set(answer.json()) and answer.headers["etag"] == f'"{answer.json()["version"]}"'
        assert live.http.get(f"/adapters/{answer.json()['name']}").status_code == 404


def test_retiring_waits_for_tasks_and_frees(live: Any) -> None:
    used = live.http.delete("/adapters/mood")
    assert used.status_code == 409 and "mood" in used.json()["error"]["message"]
    assert live.http.delete("/tasks/mood").status_code == 200
    assert live.http.delete("/adapters/mood").status_code == 202
    assert live.http.get("/adapters/mood").status_code == 404
    assert live.generate("x", adapters=[{"name": "mood"}]).status_code == 404
    assert 'adapter="mood"' not in live.http.get("/metrics").text
    assert live.http.delete("/adapters/mood").status_code == 404


def test_pin_unpin_prefetch(live: Any) -> None:
    assert live.http.post("/adapters/a/prefetch").json()["tier"] in ("ram", "device")
    assert live.http.post("/adapters/a/pin").json()["pinned"] is True
    assert live.http.post("/adapters/a/unpin").json()["pinned"] is False
    version = live.http.get("/adapters/a").json()["version"]
    for verb in ("pin", "unpin", "prefetch"):
        for unknown in ("nobody", version, "a@", "a@abc"):
            assert live.http.post(f"/adapters/{unknown}/{verb}").status_code == 404
    for unknown in (version, "a@", "a@abc"):
        assert live.http.get(f"/adapters/{unknown}").status_code == 404
        assert live.http.delete(f"/adapters/{unknown}").status_code == 404


def test_compose_stores_the_exact_sum(live: Any) -> None:
    parts = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -1.5}]
    made = live.http.post("/adapters/compose", json={"name": "sum", "from": parts})
    assert made.status_code == 201, made.text
    assert set(made.json()) == DETAILS | {"error"} and made.json()["error"] == 0 and made.json()["ranks"] == [7]
    mixed = live.generate("hello you", adapters=parts, logprobs=5).json()["logprobs"]
    stored = live.generate("hello you", adapters=[{"name": "sum"}], logprobs=5).json()["logprobs"]
    assert [t["logprob"] for t in stored] == pytest.approx([t["logprob"] for t in mixed], abs=1e-4)
    cut = live.http.post("/adapters/compose", json={"name": "cut", "from": parts, "rank": 3})
    assert cut.status_code == 201 and 0 < cut.json()["error"] < 1 and cut.json()["ranks"] == [3]
    assert live.http.post("/adapters/compose", json={"name": "cut", "from": parts, "rank": 3}).status_code == 200
    assert live.http.post("/adapters/compose", json={"name": "a", "from": parts}).status_code == 409
    assert live.http.post("/adapters/compose", json={"name": "x", "from": [{"name": "no"}]}).status_code == 404


def test_a_sum_that_a_task_routes_to_is_replaced_by_a_put(live: Any) -> None:
    def parts(weight: float) -> list[dict[str, Any]]:
        return [{"name": "a", "weight": weight}, {"name": "b"}]

    first = live.http.post("/adapters/compose", json={"name": "sum", "from": parts(0.5)}).json()["version"]
    body = {"prompt": "{input}", "route": {"choice": [{"name": "sum"}]}}
    assert live.http.put("/tasks/own", json=body).status_code == 201
    again = live.http.post("/adapters/compose", json={"name": "sum", "from": parts(0.7)})
    assert again.status_code == 409 and "put the new content" in again.json()["error"]["message"]
    stale = live.http.put("/adapters/sum", json={"from": parts(0.7)}, headers={"if-match": '"sum@000000000000"'})
    assert stale.status_code == 412
    put = live.http.put("/adapters/sum", json={"from": parts(0.7), "rank": 3}, headers={"if-match": first})
    assert put.status_code == 200, put.text
    assert put.json()["ranks"] == [3] and 0 < put.json()["error"] < 1 and put.json()["version"] != first
    assert live.generate("x", task="own").json()["adapters"][0]["version"] == put.json()["version"]
    assert live.http.put("/adapters/new", json={"from": parts(1.0)}).status_code == 201
    for wrong, param in (
        ({"from": parts(1.0), "source": "a"}, "source"),
        ({"source": "a", "rank": 3}, "rank"),
        ({"from": [{"name": "no"}]}, "from"),
    ):
        refused = live.http.put("/adapters/sum", json=wrong)
        assert refused.status_code in (400, 404) and refused.json()["error"]["param"] == param, refused.text


def test_an_upload_under_another_name_than_its_own_is_refused(live: Any, write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter("late", 5)
    refused = live.http.put("/adapters/new", **upload(folder, name="other"))
    assert refused.status_code in (400, 422) and refused.json()["error"]["param"] == "name"
    assert live.http.get("/adapters/new").status_code == live.http.get("/adapters/other").status_code == 404
    assert live.http.put("/adapters/new", **upload(folder, name="new")).status_code == 201


def test_an_etag_that_a_proxy_made_weak_is_the_version_all_the_same(live: Any) -> None:
    etag = live.http.get("/adapters/a").headers["etag"]
    answer = live.http.put("/adapters/a", json={"source": "b"}, headers={"if-match": f"W/{etag}"})
    assert answer.status_code == 200, answer.text
    again = live.http.put("/adapters/a", json={"source": "a"}, headers={"if-match": f"W/{etag}"})
    assert again.status_code == 412


@pytest.mark.usefixtures("idle_watch")
@pytest.mark.parametrize("how", ["source", "upload", "from", "version"])
def test_what_overtakes_a_put_that_expects_a_version_is_not_put_over(
    live: Any, write_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It had that version still when the request came."""
    registry, folder = live.services.registry, write_adapter("late", 5)
    first = live.http.get("/adapters/a").json()["version"]
    assert live.http.put("/adapters/a", json={"source": "b"}).status_code == 200
    body: dict[str, Any] = {
        "source": {"json": {"source": "late"}},
        "upload": upload(folder),
        "from": {"json": {"from": [{"name": "b", "weight": 0.5}]}},
        "version": {"json": {"version": first}},
    }[how]
    check, overtaking = registry.check_publish, write_adapter("quick", 6)

    def overtaken(*given: Any) -> None:
        check(*given)
        monkeypatch.undo()
        registry.publish_now("a", overtaking)

    expected = live.http.get("/adapters/a").headers["etag"]
    monkeypatch.setattr(registry, "check_publish", overtaken)
    refused = live.http.put("/adapters/a", headers={"if-match": expected}, **body)
    assert refused.status_code == 412, refused.text
    assert registry.is_current("a", read_folder(overtaking, name="a").digest)


def test_a_deletion_that_expects_another_version_is_refused(live: Any) -> None:
    etag = live.http.get("/adapters/a").headers["etag"]
    stale = live.http.delete("/adapters/a", headers={"if-match": '"a@000000000000"'})
    assert stale.status_code == 412 and live.http.get("/adapters/a").headers["etag"] == etag
    assert live.http.delete("/adapters/a", headers={"if-match": etag}).status_code == 202


def test_a_sum_holds_none_of_its_parts(live: Any) -> None:
    parts = [{"name": "a"}, {"name": "b"}]
    for body, status in (({"name": "sum"}, 201), ({"name": "b"}, 409), ({"name": "sum", "rank": 1}, 409)):
        assert live.http.post("/adapters/compose", json={**body, "from": parts}).status_code == status
        assert live.http.get("/stats").json()["adapters"]["leases"] == 0


def test_compose_of_a_damaged_version_is_no_sum_and_publishing_it_again_repairs_it(live: Any) -> None:
    version = live.http.get("/adapters/a").json()["version"]
    files = live.services.training.store.path(live.services.registry.current("a").digest)
    whole = {name: (files / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    tensors = whole["adapter_model.safetensors"]
    for damaged in (tensors[:-1] + bytes([tensors[-1] ^ 1]), tensors[:200]):
        (files / "adapter_model.safetensors").write_bytes(damaged)
        for method, path, body in (
            ("POST", "/adapters/compose", {"name": "sum", "from": [{"name": "a"}]}),
            ("PUT", "/adapters/sum", {"from": [{"name": "b"}, {"name": "a"}]}),
        ):
            refused = live.http.request(method, path, json=body)
            assert refused.status_code == 507, refused.text
            assert refused.json()["error"]["message"].startswith(f"{version} cannot be read from the store")
        assert live.http.get("/adapters/sum").status_code == 404
        again = live.http.put("/adapters/a", files={n: (n, content) for n, content in whole.items()})
        assert again.status_code == 200 and again.json()["version"] == version
        assert (files / "adapter_model.safetensors").read_bytes() == tensors
    assert live.http.post("/adapters/compose", json={"name": "sum", "from": [{"name": "a"}]}).status_code == 201


def test_compose_takes_the_ranks_that_the_server_takes(start: Any, write_adapter: Any) -> None:
    write_adapter("big", 1, rank=80)
    live = start(max_rank=200)
    assert live.http.post("/adapters", json={"name": "big", "source": "big"}).status_code in (200, 201)
    parts = [{"name": "big", "weight": 2.0}]
    made = live.http.post("/adapters/compose", json={"name": "twice", "from": parts})
    assert made.status_code == 201 and made.json()["ranks"] == [80], made.text


FORBIDDEN_NAMES: list[str] = ["a,b", "", "-x", "a/b", "x" * 65, "base", "other", "none", "tiny", "ü"]


def test_names_that_nobody_may_have(live: Any, subtests: pytest.Subtests) -> None:
    for name in FORBIDDEN_NAMES:
        with subtests.test(name):
            answer = live.http.post("/adapters", json={"name": name, "source": "a"})
            assert answer.status_code in (400, 422), answer.text
            loaded = live.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "a"})
            assert loaded.status_code == 400, loaded.text


OUTSIDE: list[str] = [
    "/etc",
    "../outside",
    "a/../../x",
    "link",
    "~",
    "\x00",
    ".",
    "https://x/y",
    "org/name",
]


def test_sources_outside_are_refused(live: Any, adapter_dir: Path, tmp_path: Path, subtests: pytest.Subtests) -> None:
    (tmp_path / "outside").mkdir(exist_ok=True)
    os.symlink(tmp_path / "outside", adapter_dir / "link")
    for source in OUTSIDE:
        with subtests.test(repr(source)):
            answer = live.http.post("/adapters", json={"name": "n", "source": source})
            assert answer.status_code in (400, 404, 422), answer.text
            assert str(tmp_path) not in answer.text


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "task.json"])
def test_a_source_whose_files_lead_out_is_refused(
    live: Any, write_adapter: Callable[..., Path], tmp_path: Path, file: str
) -> None:
    path = write_adapter("leaky", 5, task={"prompt": "Say: {input}"}) / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)
    for method, to, body in (("POST", "/adapters", {"name": "out"}), ("PUT", "/adapters/out", {})):
        refused = live.http.request(method, to, json={**body, "source": "leaky"})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["message"].startswith(f"{file} leads out of the adapter directory")
    assert live.http.get("/adapters/out").status_code == 404


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 400), (errno.ENOSPC, 507)])
def test_a_source_that_cannot_be_read_is_the_clients_and_a_full_disk_is_not(
    live: Any, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def opened(source: str) -> Any:
        raise OSError(number, os.strerror(number), "/secret/path")

    monkeypatch.setattr(live.services.sources, "open", opened)
    refused = live.http.post("/adapters", json={"name": "n", "source": "a"})
    assert refused.status_code == status and os.strerror(number) in refused.json()["error"]["message"]
    assert "secret" not in refused.text


class Boom:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-executed",)


def test_bad_content_is_refused_and_harms_nobody(live: Any, write_adapter: Callable[..., Path]) -> None:
    good = write_adapter("folder", 11)
    config, tensors = good / "adapter_config.json", good / "adapter_model.safetensors"
    data, text = tensors.read_bytes(), config.read_text()

    def put(config_text: str, content: bytes) -> Any:
        files = {"adapter_config.json": config_text.encode(), "adapter_model.safetensors": content}
        return live.http.put("/adapters/a", files=files)

    version = live.http.get("/adapters/a").json()["version"]
    changed = json.loads(text)
    for case in (
        put(text, data[: len(data) // 2]),
        put(text, pickle.dumps(Boom())),
        put("{", data),
        put(json.dumps({**changed, "use_dora": True}), data),
        put(json.dumps({**changed, "r": 0}), data),
        put(json.dumps({**changed, "r": 100}), data),
        put(json.dumps({**changed, "unheard_of": 5}), data),
    ):
        assert case.status_code == 400 and case.json()["error"]["message"], case.text
    assert not Path("was-executed").exists()
    assert live.http.get("/adapters/a").json()["version"] == version
    assert live.generate("x", adapters=[{"name": "a"}]).status_code == 200


def test_a_full_disk_is_507_and_nothing_changes(
    live: Any, write_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.api import uploads

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write_adapter("local", 12)
    monkeypatch.setattr(uploads, "_write", full)
    answer = live.http.post("/adapters", **upload(folder, name="sent"))
    assert answer.status_code == 507 and answer.headers["x-should-retry"] == "false"
    assert live.http.get("/adapters/sent").status_code == 404


def test_an_upload_that_has_no_place_is_507(live: Any, adapter_dir: Path) -> None:
    (live.state.settings.state_dir / "uploads").write_text("no folder")
    for answer in (
        live.http.post("/adapters", **upload(adapter_dir / "a", name="sent")),
        live.http.post("/adapters/compose", json={"name": "sent", "from": [{"name": "a"}]}),
    ):
        assert answer.status_code == 507 and "the disk refuses an upload" in answer.json()["error"]["message"]
        assert str(live.state.settings.state_dir) not in answer.text
    assert live.http.get("/adapters/sent").status_code == 404


def test_an_upload_names_the_file_that_it_lacks(live: Any, adapter_dir: Path) -> None:
    for lacking in ("adapter_config.json", "adapter_model.safetensors"):
        sent = upload(adapter_dir / "a", name="sent")
        del sent["files"][lacking]
        for method, path in (("POST", "/adapters"), ("PUT", "/adapters/sent")):
            refused = live.http.request(method, path, **sent)
            assert refused.status_code == 422 and refused.json()["error"]["param"] == lacking, refused.text


@pytest.mark.usefixtures("quick_watch")
def test_a_folder_in_the_watched_directory_is_served_by_itself(live: Any, write_adapter: Callable[..., Path]) -> None:
    write_adapter("dropped", 21, task={"prompt": "{input}", "task": "dropped-task"})
    until(lambda: live.http.get("/tasks/dropped-task").status_code == 200, every=0.02)  # it comes after its adapter
    assert live.generate("x", task="dropped-task").json()["adapters"][0]["name"] == "dropped"


def test_fields_that_an_upload_does_not_have_or_has_twice_are_named(live: Any, adapter_dir: Path) -> None:
    sent = upload(adapter_dir / "a", name="up")
    for more, field in (({"nonsense": "1"}, "nonsense"), ({"expires_after[anchor]": "created_at"}, "expires_after")):
        ours = live.http.post("/adapters", files=sent["files"], data={**sent["data"], **more})
        assert ours.status_code == 422 and field in ours.json()["error"]["param"], ours.text
        theirs = live.http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune", **more})
        assert theirs.status_code == 400 and theirs.json()["error"]["code"] == "unsupported_parameter"
        assert field in theirs.json()["error"]["param"]
    pickle = live.http.post(
        "/adapters", files={**sent["files"], "adapter_model.bin": ("adapter_model.bin", b"x")}, data=sent["data"]
    )
    assert pickle.status_code == 422 and "as adapter_model.safetensors" in pickle.json()["error"]["message"]
    nameless = live.http.post("/adapters", files=sent["files"])
    assert nameless.status_code == 422 and nameless.json()["error"]["param"] == "name"
    for field, part in (("name", (None, "other")), ("adapter_config.json", ("x", b"{}"))):
        twice = live.http.post("/adapters", files=[*sent["files"].items(), ("name", (None, "up")), (field, part)])
        assert twice.status_code == 422 and twice.json()["error"]["message"] == f"{field}: it is given twice"
    file = {"file": ("a.jsonl", b"{}")}
    theirs = live.http.post("/v1/files", files=file, data={"purpose": ["fine-tune", "fine-tune"]})
    assert theirs.status_code == 400 and theirs.json()["error"]["message"] == "purpose: it is given twice"
