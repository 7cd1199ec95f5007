"""/adapters: register, publish, roll back, remove, upload, pin and compose."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.peft_format import read_folder
from server.api import uploads
from tests.waiting import until

SUMMARY = {"name", "version", "ranks", "targets", "bytes", "tier", "leases", "loaded_at", "base", "pinned", "tasks"}
DETAILS = SUMMARY | {"versions", "honoured", "harmless", "notes", "card"}
OLD = '"a@000000000000"'
Write = Callable[..., Path]


def upload(folder: Path, **fields: str) -> dict[str, Any]:
    files = {n: (n, (folder / n).read_bytes()) for n in ("adapter_config.json", "adapter_model.safetensors")}
    return {"files": files, "data": fields}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_list_and_details(live: Any) -> None:
    listed = live.http.get("/adapters").json()
    assert [a["name"] for a in listed["adapters"]] == ["a", "b", "mood"] and listed["rejected"] == []
    assert all(set(a) == SUMMARY for a in listed["adapters"])
    one = live.http.get("/adapters/mood")
    assert set(one.json()) == DETAILS and one.json()["tasks"] == ["mood"]
    assert one.headers["etag"] == f'"{one.json()["version"]}"'


@pytest.mark.parametrize("name", ["nobody", "a@", "a@abc"])
def test_unknown_names_are_404(live: Any, name: str) -> None:
    assert live.http.get(f"/adapters/{name}").status_code == live.http.delete(f"/adapters/{name}").status_code == 404
    for verb in ("pin", "unpin", "prefetch"):
        assert live.http.post(f"/adapters/{name}/{verb}").status_code == 404


def test_register_is_201_then_200_and_409_for_other_content(live: Any, write_adapter: Write) -> None:
    write_adapter("late", 5)
    made = live.http.post("/adapters", json={"name": "new", "source": "late"})
    assert made.status_code == 201 and set(made.json()) == DETAILS
    assert live.http.post("/adapters", json={"name": "new", "source": "late"}).status_code == 200
    write_adapter("late", 6)
    refused = live.http.post("/adapters", json={"name": "new", "source": "late"})
    assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
    assert live.generate("x", adapters=[{"name": "new"}]).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", "/adapters/a"), ("GET", "/adapters"), ("PUT", "/tasks/mood"), ("GET", "/jobs"), ("GET", "/tasks")],
)
def test_unknown_query_parameters_are_refused(live: Any, method: str, path: str) -> None:
    version = live.http.get("/adapters/a").json()["version"]
    refused = live.http.request(method, path, params={"version": version}, json={"prompt": "{input}"})
    assert refused.status_code == 422 and error_of(refused)["param"] == "version"
    assert live.http.get("/adapters/a").json()["version"] == version


@pytest.mark.parametrize("content", [b"", b'{"source": "a"', b'{"source": "\xff"}'])
def test_malformed_json_is_answered_as_on_other_routes(live: Any, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    put = live.http.put("/adapters/a", content=content, headers=headers)
    generate = live.http.post("/generate", content=content, headers=headers)
    assert (put.status_code, error_of(put)) == (generate.status_code, error_of(generate))


def test_errors_name_the_field_of_the_request(live: Any) -> None:
    def param(method: str, path: str, body: Any) -> str:
        answer = live.http.request(method, path, json=body)
        assert answer.status_code in (400, 404), answer.text
        return str(error_of(answer)["param"])

    nobody = [{"name": "nobody"}]
    for terms in (nobody, [{"name": "a", "weight": 0}]):
        assert param("POST", "/adapters/compose", {"name": "sum", "from": terms}) == "from"
    assert param("PUT", "/adapters/a", {"version": "a@000000000000"}) == "version"
    assert param("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "nowhere"}) == "lora_path"
    assert param("POST", "/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "a"}) == "lora_name"
    assert param("POST", "/v1/unload_lora_adapter", {"lora_name": "nobody"}) == "lora_name"
    assert param("POST", "/v1/completions", {"model": "adapter:nobody", "prompt": "x"}) == "model"
    assert param("POST", "/tasks/mood/evaluate", {"file": "file-none"}) == "file"
    candidates = {"data": [{"input": "x", "output": "good"}], "candidates": [nobody]}
    assert param("POST", "/tasks/mood/evaluate", candidates) == "candidates"


def test_another_base_model_name_is_a_note(live: Any, write_adapter: Write) -> None:
    config = write_adapter("far", 9) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/Giant-7B"}))
    made = live.http.post("/adapters", json={"name": "far", "source": "far"})
    assert made.status_code in (200, 201) and made.json()["base"] == "org/Giant-7B"
    assert "'org/Giant-7B'" in made.json()["notes"][0] and "'tiny'" in made.json()["notes"][0]
    assert live.http.get("/adapters/a").json()["notes"] == []


def test_put_publishes_and_rolls_back(live: Any, write_adapter: Write) -> None:
    first = live.http.get("/adapters/a").headers["etag"].strip('"')

    def logprobs(name: str) -> Any:
        return live.generate("so it goes", adapters=[{"name": name}], logprobs=1).json()["logprobs"]

    before = logprobs("a")
    write_adapter("later", 77)
    moved = live.http.put("/adapters/a", json={"source": "later"})
    assert moved.status_code == 200 and moved.json()["version"] != first
    assert logprobs("a") != before and logprobs(first) == before
    back = live.http.put("/adapters/a", json={"version": first})
    assert back.status_code == 200 and back.json()["version"] == first
    assert live.http.put("/adapters/fresh", json={"source": "later"}).status_code == 201
    for body, status in (({"version": "b@000000000000"}, 400), ({"version": "a@ffffffffffff"}, 404), ({}, 400)):
        assert live.http.put("/adapters/a", json=body).status_code == status


def test_if_match_is_compared_with_the_current_version(live: Any, write_adapter: Write) -> None:
    etag = live.http.get("/adapters/a").headers["etag"]
    write_adapter("later", 77)
    for given in (OLD, '"b@1"', f'{OLD}, "c@2"'):
        assert live.http.put("/adapters/a", json={"source": "later"}, headers={"if-match": given}).status_code == 412
    assert live.http.put("/adapters/fresh", json={"source": "a"}, headers={"if-match": "*"}).status_code == 412
    assert live.http.delete("/adapters/a", headers={"if-match": OLD}).status_code == 412
    weak = live.http.put("/adapters/a", json={"source": "later"}, headers={"if-match": f"W/{etag}"})
    assert weak.status_code == 200
    assert live.http.delete("/adapters/a", headers={"if-match": etag}).status_code == 412
    assert live.http.delete("/adapters/a", headers={"if-match": weak.headers["etag"]}).status_code == 202


@pytest.mark.usefixtures("idle_watch")
@pytest.mark.parametrize("how", ["source", "upload", "from", "version"])
def test_version_that_changes_during_a_put_is_not_overwritten(
    live: Any, write_adapter: Write, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    registry, folder = live.services.registry, write_adapter("late", 5)
    first = live.http.get("/adapters/a").json()["version"]
    assert live.http.put("/adapters/a", json={"source": "b"}).status_code == 200
    body: dict[str, Any] = {
        "source": {"json": {"source": "late"}},
        "upload": upload(folder),
        "from": {"json": {"from": [{"name": "b", "weight": 0.5}]}},
        "version": {"json": {"version": first}},
    }[how]
    check, quick = registry.check_publish, write_adapter("quick", 6)

    def overtaken(*given: Any) -> None:
        check(*given)
        monkeypatch.undo()
        registry.publish_now("a", quick)

    expected = live.http.get("/adapters/a").headers["etag"]
    monkeypatch.setattr(registry, "check_publish", overtaken)
    refused = live.http.put("/adapters/a", headers={"if-match": expected}, **body)
    assert refused.status_code == 412, refused.text
    assert registry.is_current("a", read_folder(quick, name="a").digest)


@pytest.mark.parametrize("name", ["a,b", "", "-x", "a/b", "x" * 65, "base", "other", "none", "tiny", "ü"])
def test_invalid_and_reserved_names_are_refused_before_the_source_is_opened(
    live: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(live.services.sources, "open", None)
    assert live.http.post("/adapters", json={"name": name, "source": "far"}).status_code in (400, 422)
    loaded = live.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "far"})
    assert loaded.status_code == 400
    stale = live.http.put("/adapters/a", json={"source": "far"}, headers={"if-match": OLD})
    assert stale.status_code == 412


@pytest.mark.parametrize(
    "source", ["/etc", "../outside", "a/../../x", "link", "~", "\x00", ".", "https://x/y", "org/name"]
)
def test_sources_outside_the_adapter_directory_are_refused(
    live: Any, adapter_dir: Path, tmp_path: Path, source: str
) -> None:
    (tmp_path / "outside").mkdir(exist_ok=True)
    os.symlink(tmp_path / "outside", adapter_dir / "link")
    answer = live.http.post("/adapters", json={"name": "n", "source": source})
    assert answer.status_code in (400, 404, 422) and str(tmp_path) not in answer.text


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "task.json"])
def test_symlinks_out_of_the_source_are_refused(live: Any, write_adapter: Write, tmp_path: Path, file: str) -> None:
    path = write_adapter("leaky", 5, task={"prompt": "Say: {input}"}) / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)
    for method, to, body in (("POST", "/adapters", {"name": "out"}), ("PUT", "/adapters/out", {})):
        refused = live.http.request(method, to, json={**body, "source": "leaky"})
        assert refused.status_code == 400 and error_of(refused)["message"].startswith(file), refused.text
    assert live.http.get("/adapters/out").status_code == 404


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 400), (errno.ENOSPC, 507)])
def test_unreadable_source_is_400_and_a_full_disk_507(
    live: Any, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def opened(source: str) -> Any:
        raise OSError(number, os.strerror(number), "/secret/path")

    monkeypatch.setattr(live.services.sources, "open", opened)
    refused = live.http.post("/adapters", json={"name": "n", "source": "a"})
    assert refused.status_code == status and os.strerror(number) in error_of(refused)["message"]
    assert "secret" not in refused.text


def test_uploads(live: Any, write_adapter: Write) -> None:
    made = live.http.post("/adapters", **upload(write_adapter("local", 8), name="sent"))
    assert made.status_code == 201, made.text
    assert live.http.put("/adapters/sent", **upload(write_adapter("local", 9))).status_code == 200
    same = live.http.post("/adapters", **upload(write_adapter("local", 9), name="sent"))
    assert same.status_code == 200
    other = live.http.post("/adapters", **upload(write_adapter("local", 10), name="sent"))
    assert other.status_code == 409 and live.http.get("/adapters/sent").json()["version"] == same.json()["version"]
    renamed = live.http.put("/adapters/new", **upload(write_adapter("local", 8), name="other"))
    assert renamed.status_code in (400, 422) and error_of(renamed)["param"] == "name"
    assert not list((live.state.settings.state_dir / "uploads").iterdir()), "nothing is left over"


@pytest.mark.parametrize(
    ("add", "remove", "param", "message"),
    [
        ([("nonsense", (None, "1"))], None, "nonsense", "no such field"),
        ([("adapter_model.bin", ("adapter_model.bin", b"x"))], None, "adapter_model.bin", "adapter_model.safetensors"),
        ([("adapter_config.json", ("x", b"{}"))], None, "adapter_config.json", "given twice"),
        ([("name", (None, "other"))], None, "name", "given twice"),
        ([], "name", "name", "needs this field"),
        ([], "adapter_config.json", "adapter_config.json", "needs this file"),
        ([], "adapter_model.safetensors", "adapter_model.safetensors", "needs this file"),
    ],
)
def test_wrong_upload_fields_are_422(
    live: Any, adapter_dir: Path, add: list[Any], remove: str | None, param: str, message: str
) -> None:
    fields = [("name", (None, "up")), *upload(adapter_dir / "a")["files"].items(), *add]
    refused = live.http.post("/adapters", files=[field for field in fields if field[0] != remove])
    assert (refused.status_code, error_of(refused)["param"]) == (422, param), refused.text
    assert message in error_of(refused)["message"]


def test_broken_uploads_are_400(live: Any) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    junk = live.http.post("/adapters", content=b"junk", headers=headers)
    assert junk.status_code == 400 and error_of(junk)["message"].startswith("the upload cannot be read: ")
    missing = live.http.post("/adapters", content=b"", headers={"content-type": "multipart/form-data"})
    assert missing.status_code == 400


def test_upload_with_an_invalid_task_file_keeps_the_present_task(live: Any, write_adapter: Write) -> None:
    def with_task(task: str, **fields: str) -> dict[str, Any]:
        body = upload(write_adapter("local", 8), **fields)
        body["files"]["task.json"] = ("task.json", task.encode())
        return body

    assert live.http.put("/adapters/brings", **with_task('{"prompt": "Say: {input}"}')).status_code == 201
    invalid = '{"prompt": "no place for the input"}'
    for answer in (
        live.http.put("/adapters/brings", **with_task(invalid)),
        live.http.post("/adapters", **with_task(invalid, name="brings")),
        live.http.put("/adapters/brings", **with_task("no JSON")),
    ):
        assert answer.status_code == 400, answer.text
    assert live.http.get("/tasks/brings").json()["prompt"] == "Say: {input}"


class Boom:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-executed",)


def test_bad_content_is_refused_and_changes_nothing(live: Any, write_adapter: Write) -> None:
    folder = write_adapter("folder", 11)
    config, data = (folder / "adapter_config.json").read_text(), (folder / "adapter_model.safetensors").read_bytes()
    fields = json.loads(config)
    version = live.http.get("/adapters/a").json()["version"]
    for text, content in (
        (config, data[: len(data) // 2]),
        (config, pickle.dumps(Boom())),
        ("{", data),
        (json.dumps({**fields, "use_dora": True}), data),
        (json.dumps({**fields, "r": 0}), data),
        (json.dumps({**fields, "r": 100}), data),
        (json.dumps({**fields, "unheard_of": 5}), data),
    ):
        files = {"adapter_config.json": text.encode(), "adapter_model.safetensors": content}
        refused = live.http.put("/adapters/a", files=files)
        assert refused.status_code == 400 and error_of(refused)["message"], refused.text
    assert not Path("was-executed").exists()
    assert live.http.get("/adapters/a").json()["version"] == version
    assert live.generate("x", adapters=[{"name": "a"}]).status_code == 200


def test_full_disk_during_an_upload_is_507(live: Any, write_adapter: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write_adapter("local", 12)
    with monkeypatch.context() as patched:
        patched.setattr(uploads, "_write", full)
        assert live.http.post("/adapters", **upload(folder, name="sent")).status_code == 507
    spool = live.state.settings.state_dir / "uploads"
    spool.rmdir()
    spool.write_text("not a directory")
    for answer in (
        live.http.post("/adapters", **upload(folder, name="sent")),
        live.http.post("/adapters/compose", json={"name": "sent", "from": [{"name": "a"}]}),
    ):
        assert answer.status_code == 507 and answer.headers["x-should-retry"] == "false"
        assert str(live.state.settings.state_dir) not in answer.text
    assert live.http.get("/adapters/sent").status_code == 404


def test_remove_waits_for_tasks_and_frees_everything(live: Any) -> None:
    used = live.http.delete("/adapters/mood")
    assert used.status_code == 409 and "mood" in error_of(used)["message"]
    assert live.http.delete("/tasks/mood").status_code == 200
    assert live.http.delete("/adapters/mood").status_code == 202
    assert live.http.get("/adapters/mood").status_code == 404
    assert live.generate("x", adapters=[{"name": "mood"}]).status_code == 404
    assert 'adapter="mood"' not in live.http.get("/metrics").text


def test_pin_unpin_prefetch(live: Any) -> None:
    assert live.http.post("/adapters/a/prefetch").json()["tier"] in ("ram", "device")
    assert live.http.post("/adapters/a/pin").json()["pinned"] is True
    assert live.http.post("/adapters/a/unpin").json()["pinned"] is False


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
    assert live.http.get("/stats").json()["adapters"]["leases"] == 0


def test_put_replaces_a_sum_that_a_task_uses(live: Any) -> None:
    def terms(weight: float) -> list[dict[str, Any]]:
        return [{"name": "a", "weight": weight}, {"name": "b"}]

    first = live.http.post("/adapters/compose", json={"name": "sum", "from": terms(0.5)}).json()["version"]
    body = {"prompt": "{input}", "route": {"choice": [{"name": "sum"}]}}
    assert live.http.put("/tasks/own", json=body).status_code == 201
    assert live.http.post("/adapters/compose", json={"name": "sum", "from": terms(0.7)}).status_code == 409
    put = live.http.put("/adapters/sum", json={"from": terms(0.7), "rank": 3}, headers={"if-match": first})
    assert put.status_code == 200, put.text
    assert put.json()["ranks"] == [3] and 0 < put.json()["error"] < 1 and put.json()["version"] != first
    assert live.generate("x", task="own").json()["adapters"][0]["version"] == put.json()["version"]
    for wrong, param in (
        ({"from": terms(1.0), "source": "a"}, "source"),
        ({"source": "a", "rank": 3}, "rank"),
        ({"from": [{"name": "no"}]}, "from"),
    ):
        refused = live.http.put("/adapters/sum", json=wrong)
        assert refused.status_code in (400, 404) and error_of(refused)["param"] == param, refused.text


def test_damaged_version_is_not_composed_and_is_repaired_by_publishing_it_again(live: Any) -> None:
    version = live.http.get("/adapters/a").json()["version"]
    files = live.services.training.store.path(live.services.registry.current("a").digest)
    whole = {name: (files / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    tensors = whole["adapter_model.safetensors"]
    for damaged in (tensors[:-1] + bytes([tensors[-1] ^ 1]), tensors[:200]):
        (files / "adapter_model.safetensors").write_bytes(damaged)
        refused = live.http.post("/adapters/compose", json={"name": "sum", "from": [{"name": "a"}]})
        assert refused.status_code == 507 and version in error_of(refused)["message"], refused.text
        again = live.http.put("/adapters/a", files={n: (n, content) for n, content in whole.items()})
        assert again.status_code == 200 and again.json()["version"] == version
        assert (files / "adapter_model.safetensors").read_bytes() == tensors
    assert live.http.post("/adapters/compose", json={"name": "sum", "from": [{"name": "a"}]}).status_code == 201


@pytest.mark.usefixtures("quick_watch")
def test_watched_directory(live: Any, write_adapter: Write) -> None:
    write_adapter("late", 5)
    assert live.http.post("/adapters", json={"name": "late", "source": "late"}).status_code in (200, 201)
    assert live.http.delete("/adapters/late").status_code == 202
    write_adapter("dropped", 21, task={"prompt": "{input}", "task": "dropped-task"})
    until(lambda: live.http.get("/tasks/dropped-task").status_code == 200, every=0.02)
    assert live.generate("x", task="dropped-task").json()["adapters"][0]["name"] == "dropped"
    assert live.http.get("/adapters/late").status_code == 404, "a deleted adapter stays deleted"
    assert live.http.put("/adapters/late", json={"source": "late"}).status_code == 201
