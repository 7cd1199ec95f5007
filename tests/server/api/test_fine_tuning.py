"""FileStore and training jobs over HTTP, by OpenAI's own client, over a tiny base.

What a process can do is shown with real ones; they take longer to import torch than to train. What is told and
published of any job is shown with the same work on a thread of the server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

import server.app
from adapters.errors import StoreFailed
from server.api.files import content
from server.api.startup import build
from server.jobs import training_job, worker, worker_process
from server.jobs.file_store import FileStore
from server.jobs.job_store import Job, Progress
from server.jobs.publisher import Publisher
from server.jobs.requests import config_of
from server.jobs.worker_messages import WorkerSpec
from server.model.loader import Base
from tests import waiting
from tests.server.api.test_openapi_document import check

LINES = [{"input": f"the {i}", "output": "good" if i % 2 else "bad"} for i in range(12)]


def jsonl(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture
def house(
    start: Callable[..., Any], tiny_folder: Path, folder_base: Base, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`house(**settings)`: a server that can train."""
    monkeypatch.setattr(
        server.app,
        "load_and_build",
        lambda settings, *given: build(settings, folder_base, *given[:2], tiny_folder),
    )
    return lambda **settings: start(quantization="none", **settings)


@pytest.fixture
def live(house: Callable[..., Any]) -> Any:
    return house()


class Within:
    """Stands in for `Process`: what the process does, without one. Its lines come when it has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stop = folder, threading.Event()

    def lines(self) -> Iterator[dict[str, Any]]:
        told: list[str] = []
        worker.run(self._folder, lambda line: told.append(json.dumps(line)), self._stop)
        return map(json.loads, told)

    def stop(self) -> None:
        self._stop.set()

    kill = stop


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are trained by threads."""
    monkeypatch.setattr(training_job, "Process", Within)


def client_of(live: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(live: Any) -> openai.OpenAI:
    return client_of(live)


def upload(client: openai.OpenAI, lines: list[Any] | bytes = LINES, name: str = "mood.jsonl") -> str:
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    return client.files.create(file=(name, content), purpose="fine-tune").id


def create(client: openai.OpenAI, **fields: Any) -> Any:
    fields.setdefault("training_file", None)
    fields["training_file"] = fields["training_file"] or upload(client)
    lora = fields.pop("lora", {})
    return client.fine_tuning.jobs.create(
        **{
            "model": "tiny",
            "hyperparameters": {"n_epochs": 1, "batch_size": 4},
            "extra_body": {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], **lora}},
            **fields,
        }
    )


LOOK = 0.05
"""Seconds between two looks at a job. Its process gets only what the looks leave of the processors."""


def until(client: openai.OpenAI, id: str, *statuses: str, seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = client.fine_tuning.jobs.retrieve(id)
        if job.status in (statuses or ("succeeded", "failed", "cancelled")):
            return job
        time.sleep(LOOK)
    raise AssertionError((job, client.fine_tuning.jobs.list_events(id, limit=100).data))


def test_a_job_from_upload_to_served_model(live: Any, client: openai.OpenAI) -> None:
    file = client.files.create(file=("mood.jsonl", jsonl(LINES)), purpose="fine-tune")
    assert (file.object, file.filename, file.bytes) == ("file", "mood.jsonl", len(jsonl(LINES)))
    judged = upload(client, LINES[:4], "dev.jsonl")
    job = create(
        client, training_file=file.id, validation_file=judged, suffix="mood", seed=7, metadata={"for": "a test"}
    )
    assert job.status in ("queued", "validating_files", "running") and job.fine_tuned_model is None
    assert job.hyperparameters.n_epochs == 1 and job.seed == 7 and job.metadata == {"for": "a test"}
    told = live.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert {
        type(h["n_epochs"]) for h in (told["hyperparameters"], told["method"]["supervised"]["hyperparameters"])
    } == {int}
    job = until(client, job.id)
    assert job.status == "succeeded", job
    assert job.fine_tuned_model == "mood" and job.trained_tokens > 0 and job.finished_at >= job.created_at
    chat = client.chat.completions.create(model="mood", messages=[{"role": "user", "content": "the 1"}], max_tokens=3)
    assert chat.usage.completion_tokens >= 1
    adapter = live.http.get("/adapters/mood").json()
    assert adapter["ranks"] == [2] and "3 steps of 4" in adapter["card"]
    assert job.id not in live.services.registry.names(), "the name that it was measured under is gone"
    folder = live.state.settings.state_dir / "jobs" / job.id
    assert (folder / "stderr.log").read_text() == "", "the process has ended without a word"

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # follows the pages
    assert [e.message for e in events][0] == "The job has succeeded." and events[-1].message == "Created."
    steps = [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data]
    assert steps == [3, 2, 1]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints[0].step_number == 3 and checkpoints[0].metrics.train_loss > 0
    assert [j.id for j in client.fine_tuning.jobs.list()] == [job.id]

    [table] = job.result_files
    rows = client.files.content(table).text.splitlines()
    assert rows[0].startswith("step,train_loss") and len(rows) == 4
    assert client.files.retrieve(table).purpose == "fine-tune-results"
    assert client.files.delete(file.id).deleted and file.id not in [f.id for f in client.files.list()]

    shown = live.http.get(f"/jobs/{job.id}").json()
    assert shown["kind"] == "training" and shown["progress"] == 1.0 and len(shown["curves"]["train_loss"]) == 3
    assert shown["result"]["evaluation"]["metric"] == "loss" and shown["result"]["evaluation"]["samples"] == 4
    assert live.http.get("/jobs").json()["jobs"][0]["id"] == job.id
    text = live.http.get("/metrics").text
    for name in ("loss", "tokens_total", "progress"):
        assert f'loramux_training_{name}{{job="{job.id}"}} ' in text


def test_what_is_wrong_with_a_file_fails_the_job_by_its_line(
    client: openai.OpenAI, request: pytest.FixtureRequest
) -> None:
    bad = upload(client, jsonl(LINES) + b'{"input": "x"}\n', "bad.jsonl")
    job = until(client, create(client, training_file=bad).id)
    assert job.status == "failed" and job.error.code == "invalid_training_file" and job.error.param == "training_file"
    assert job.error.message == "bad.jsonl, line 13: 'output' is missing"
    request.getfixturevalue("within")  # one process has told how it failed
    job = until(client, create(client, validation_file=bad).id)
    assert job.error.code == "invalid_validation_file" and "line 13" in job.error.message


REFUSED_AT_ONCE: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4"}, "model"),
    ({"training_file": "file-none"}, "training_file"),
    ({"suffix": "base"}, "suffix"),
    ({"suffix": "tiny"}, "suffix"),
    ({"suffix": "no good"}, "suffix"),
    ({"method": {"type": "dpo"}}, "dpo"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ({"lora": {"r": 1000}}, "lora.r"),
    ({"lora": {"r": 0}}, "lora.r"),
    ({"lora": {"rank": 4}}, "lora.rank"),
    ({"method": {}, "lora": {"target_modules": [], "r": 0}}, "lora.r"),
    ({"lora": {"r": 4, "prune_to": 4}}, "prune_to must be below r, which is 4"),
    ({"lora": {"prune_to": 16}}, "lora.prune_to"),
    ({"lora": {"prune_to": 8, "auto_rank": True}}, "prune_to must be below 4 times r, which is 8"),
    ({"lora": {"task": "nobody"}}, "lora.task"),
    ({"lora": {"init_from": "nobody"}}, "lora.init_from"),
    ({"lora": {"auto_rank": True, "r": 32}}, "auto_rank"),
    ({"lora": {"target_modules": ["nothing", "none"]}}, "target_modules = nothing, none; they are called down_proj, "),
    ({"lora": {"target_modules": ".*nothing"}}, "lora.target_modules"),
    ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "lora.target_modules"),
    ({"lora": {"target_modules": "(q_proj"}}, "lora.target_modules"),
    ({"hyperparameters": {"batch_size": 0}}, "batch_size"),
    ({"hyperparameters": {"beta": 1}}, "beta"),
]


def test_what_can_be_refused_at_once_is(client: openai.OpenAI, subtests: pytest.Subtests) -> None:
    for fields, named in REFUSED_AT_ONCE:
        with subtests.test(str(fields)[:80]):
            with pytest.raises(openai.APIStatusError) as refused:
                create(client, **fields)
            nobody = named in ("model", "training_file", "lora.task", "lora.init_from")
            assert (
                refused.value.status_code == (404 if nobody else 400)
                and named in f"{refused.value} {refused.value.param}"
            )
            assert client.fine_tuning.jobs.list().data == []


def test_a_field_of_lora_that_is_not_served_is_an_unsupported_parameter(live: Any, client: openai.OpenAI) -> None:
    body = {"model": "tiny", "training_file": upload(client), "lora": {"foo": 1}}
    error = live.http.post("/v1/fine_tuning/jobs", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "lora.foo")
    asks_nothing = {"r": 1000, "foo": None, "bar": []}
    error = live.http.post("/v1/fine_tuning/jobs", json={**body, "lora": asks_nothing}).json()["error"]
    assert error["param"] == "lora.r"


class Gate:
    """The step at which training processes wait until a later one is named, or they are asked to stop."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def name(self, step: int) -> None:
        self._file.with_suffix(".new").write_text(str(step))
        self._file.with_suffix(".new").replace(self._file)  # at once: it is being read


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    file = tmp_path / "gate"
    monkeypatch.setattr(
        worker_process, "COMMAND", (sys.executable, str(Path(__file__).with_name("held_child.py")), str(file))
    )
    return Gate(file)


def child_of(id: str) -> int:
    """The process that trains a job, which waits at the gate."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"held_child.py") for word in words) and any(id.encode() in word for word in words):
            return int(status.parent.name)
    raise AssertionError("there is no process")


def long_job(client: openai.OpenAI, epochs: int = 200, **fields: Any) -> Any:
    return create(client, hyperparameters={"n_epochs": epochs, "batch_size": 4}, **fields)


def steps_of(client: openai.OpenAI, id: str, limit: int = 1000) -> list[tuple[int, float]]:
    """Step and loss of every step that has been told, or that the last `limit` events tell, in the order of time."""
    events = [e for e in client.fine_tuning.jobs.list_events(id, limit=limit).data if e.type == "metrics"]
    return [(e.data["step"], e.data["train_loss"]) for e in reversed(events)]


def record_of(live: Any, id: str) -> dict[str, Any]:
    """What is on the disk of a job."""
    record: dict[str, Any] = json.loads((live.state.settings.state_dir / "jobs" / id / "job.json").read_text())
    return record


def trained_tokens(live: Any, id: str) -> float:
    lines = live.http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("loramux_training_tokens_total{") and id in line]
    return float(line.rpartition(" ")[2])


def past(client: openai.OpenAI, id: str, step: int, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(s >= step for s, _ in steps_of(client, id, limit=10)):
            return
        time.sleep(LOOK)
    raise AssertionError(f"step {step} is not reached: {client.fine_tuning.jobs.retrieve(id)}")


def test_pausing_killing_and_restarting_change_no_bit(
    house: Callable[..., Any], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that yields to all others and goes with its server; beside a job that nothing has happened to."""
    live = house()
    client = client_of(live)
    with monkeypatch.context() as patch:
        patch.setattr(training_job, "Process", Within)
        whole = until(client, long_job(client, 30, suffix="whole").id)
    gate.name(5)
    job = long_job(client, 30, suffix="parts")

    past(client, job.id, 5)
    pid = child_of(job.id)
    assert live.services.engine._scheduler.cpu_sharing.enabled, "a process that trains gets processors between steps"
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    client.fine_tuning.jobs.pause(job.id)
    assert until(client, job.id, "paused").status == "paused"
    kept = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].step_number
    assert kept == live.http.get(f"/jobs/{job.id}").json()["step"], "it can go on from there"
    assert not live.services.engine._scheduler.cpu_sharing.enabled
    time.sleep(0.3)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    gate.name(25)
    client.fine_tuning.jobs.resume(job.id)

    past(client, job.id, 25)
    os.kill(child_of(job.id), signal.SIGKILL)
    failed = until(client, job.id)
    assert failed.status == "failed" and failed.error.code == "process_died" and "SIGKILL" in failed.error.message
    most = trained_tokens(live, job.id)
    gate.name(22)
    client.fine_tuning.jobs.resume(job.id)
    waiting.until(lambda: live.http.get(f"/jobs/{job.id}").json()["step"] == 22)
    assert trained_tokens(live, job.id) >= most > 0, "a counter does not fall where steps are taken again"
    gate.name(45)
    past(client, job.id, 45)
    pid = child_of(job.id)
    assert record_of(live, job.id)["status"] == "running"
    live.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert record_of(live, job.id)["status"] == "queued"

    gate.name(91)
    live = house()
    client = client_of(live)
    assert until(client, job.id).status == "succeeded"
    curve = live.http.get(f"/jobs/{job.id}").json()["curves"]["train_loss"]
    told = dict(steps_of(client, job.id))
    assert curve == [[step, told[step]] for step in sorted(told)], "each step once, as it was at last"
    assert told == dict(steps_of(client, whole.id)) and len(told) == 90
    digests = [live.http.get(f"/adapters/{name}").json()["version"].split("@")[1] for name in ("whole", "parts")]
    assert digests[0] == digests[1]


def test_one_at_a_time_and_cancelling(live: Any, client: openai.OpenAI, gate: Gate) -> None:
    gate.name(1)
    first, second, third = (long_job(client, metadata=m) for m in (None, None, {"run": "1"}))
    past(client, first.id, 1)
    assert [client.fine_tuning.jobs.retrieve(j.id).status for j in (second, third)] == ["queued", "queued"]
    with pytest.raises(openai.ConflictError, match=first.id):
        client.files.delete(first.training_file)
    jobs = client.fine_tuning.jobs
    assert [job.id for job in jobs.list(metadata={"run": "1"})] == [third.id] and not jobs.list(
        metadata={"run": ""}
    ).data
    without = {job.id for job in jobs.list(extra_query={"metadata": "null"})}
    assert {first.id, second.id} <= without and third.id not in without
    assert client.fine_tuning.jobs.cancel(third.id).status == "cancelled"
    client.fine_tuning.jobs.pause(second.id)
    pid = child_of(first.id)
    client.fine_tuning.jobs.cancel(first.id)
    assert until(client, first.id).status == "cancelled"
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(first.id)
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.resume(first.id)
    assert client.fine_tuning.jobs.retrieve(second.id).status == "paused"
    client.fine_tuning.jobs.cancel(second.id)
    client.files.delete(first.training_file)


@pytest.mark.usefixtures("within")
def test_publishing_by_rule(live: Any, client: openai.OpenAI) -> None:
    task = {"prompt": "{input}", "format": "chat", "labels": ["good", "bad"], "defaults": {"max_tokens": 4}}
    assert live.http.put("/tasks/mood", json=task).status_code == 201
    good = upload(client, [{"input": "the", "output": "good"}] * 8)
    first = until(client, long_job(client, 60, suffix="mood", training_file=good, validation_file=good).id)
    assert first.status == "succeeded", first
    before = live.http.get("/adapters/mood").json()["version"]
    shown = live.http.get(f"/jobs/{first.id}").json()["result"]
    assert shown["evaluation"]["metric"] == "accuracy" and shown["evaluation"]["replaced"] is None
    [entry] = live.http.get("/tasks/mood/performance").json()["versions"]
    assert entry["version"] == before and entry["quality"][0]["samples"] == 8
    assert entry["quality"][0]["source"] == "evaluation"
    assert live.http.get("/tasks/mood").json()["source"] == "api"

    worse = upload(client, [{"input": "the", "output": "bad"}] * 8)
    second = until(
        client,
        create(client, suffix="mood", training_file=worse, validation_file=good, lora={"publish": "if_better"}).id,
    )
    assert second.status == "succeeded" and second.fine_tuned_model is None
    assert live.http.get("/adapters/mood").json()["version"] == before
    names = [client.files.retrieve(id).filename for id in second.result_files]
    assert names[1:] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "r" in json.loads(client.files.content(second.result_files[1]).text)
    said = [e.message for e in client.fine_tuning.jobs.list_events(second.id, limit=50)]
    assert any(m.startswith("Not published: mood@") for m in said)

    third = until(client, create(client, suffix="mood", training_file=worse, lora={"publish": "always"}).id)
    assert third.fine_tuned_model == "mood" and live.http.get("/adapters/mood").json()["version"] != before
    fourth = until(client, create(client, suffix="mood", training_file=worse, lora={"publish": "never"}).id)
    assert fourth.fine_tuned_model is None and len(fourth.result_files) == 3


@pytest.mark.usefixtures("within")
def test_a_task_keeps_its_route_when_its_adapter_is_trained_again(
    live: Any, client: openai.OpenAI, write_adapter: Any
) -> None:
    route = {"choice": [{"name": "mine", "weight": 0.5}, {"name": "second", "weight": 0.25}]}
    write_adapter("second", 5)
    assert live.http.post("/adapters", json={"name": "second", "source": "second"}).status_code in (200, 201)
    write_adapter("mine", 6, task={"prompt": "{input}", "route": route})
    assert live.http.post("/adapters", json={"name": "mine", "source": "mine"}).status_code in (200, 201)
    before = live.http.get("/adapters/mine").json()["version"]
    job = until(client, create(client, suffix="mine").id)
    assert job.status == "succeeded" and live.http.get("/adapters/mine").json()["version"] != before
    task = live.http.get("/tasks/mine").json()
    assert task["route"] == route and task["source"] == "file"


@pytest.mark.usefixtures("within")
def test_the_result_answers_to_its_name_unless_a_task_routes_elsewhere(live: Any, client: openai.OpenAI) -> None:
    """A task that was put before there was an adapter of its name is that adapter once there is."""
    live.http.put("/tasks/early", json={"prompt": "{input}"}).raise_for_status()
    live.http.put("/tasks/second", json={"prompt": "{input}", "route": {"choice": []}}).raise_for_status()
    for name in ("early", "second"):
        job = until(client, create(client, suffix=name).id)
        assert job.status == "succeeded" and job.fine_tuned_model == name
        used = live.generate("the", task=name, max_tokens=1).json()["adapters"]
        said = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=50) if e.level == "warn"]
        if name == "early":
            assert [adapter["name"] for adapter in used] == ["early"] and not said
        else:
            assert used == [] and "goes by a route that is not this adapter alone" in said[0]


@pytest.mark.usefixtures("within")
def test_a_trained_job_goes_on_without_its_files(
    live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk has kept it from being published, and people make room."""

    def full(*_: Any) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", full)
        job = until(client, create(client, suffix="late", seed=2).id)
    assert job.status == "failed" and "no space left" in job.error.message
    folder = live.state.settings.state_dir / "jobs" / job.id
    assert WorkerSpec.read(folder).created_at == record_of(live, job.id)["created_at"], "what a template is told"
    client.files.delete(job.training_file)
    client.fine_tuning.jobs.resume(job.id)
    job = until(client, job.id)
    assert job.status == "succeeded" and job.fine_tuned_model == "late", job


@pytest.mark.usefixtures("within")
def test_a_full_disk_is_told_as_that(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/a/secret/spec.json")

    monkeypatch.setattr(WorkerSpec, "write", full)
    job = until(client, create(client).id)
    assert job.status == "failed" and job.error.code == "failed", job
    assert "No space left on device" in job.error.message and "secret" not in job.error.message


@pytest.mark.usefixtures("within")
def test_going_on_from_an_adapter_pruning_and_auto_rank(live: Any, client: openai.OpenAI) -> None:
    first = until(client, create(client, suffix="first").id)
    assert first.status == "succeeded"
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client),
        suffix="second",
        hyperparameters={"n_epochs": 1, "batch_size": 4},
        extra_body={"lora": {"init_from": "first", "prune_to": 1}},
    )
    job = until(client, job.id)
    assert job.status == "succeeded", job
    assert live.http.get("/adapters/second").json()["ranks"] == [1]
    assert (
        f"going on from {live.http.get('/adapters/first').json()['version']} with"
        in (live.http.get("/adapters/second").json()["card"])
    )
    asked = job.model_extra["lora"]
    assert [asked[k] for k in ("r", "alpha", "target_modules", "rslora")] == [None] * 4, "they are those of first"
    said = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=50)]
    assert any("pruned to rank 1" in m for m in said)
    with pytest.raises(openai.BadRequestError, match="leave r out"):
        create(client, lora={"init_from": "first"})
    no_cut = {"lora": {"init_from": "first", "prune_to": 2}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client), extra_body=no_cut)
    assert until(client, job.id).error.param == "lora.prune_to"

    auto = until(client, create(client, suffix="auto", lora={"auto_rank": True, "target_modules": "all-linear"}).id)
    assert auto.status == "succeeded", auto
    assert [s for s, _ in steps_of(client, auto.id)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("within")
def test_chat_and_completion_data(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "and"}]
    chat = upload(client, [{"messages": turns}] * 20)
    job = until(client, create(client, training_file=chat, suffix="talk", lora={"publish": "if_better"}).id)
    assert job.status == "succeeded" and job.fine_tuned_model == "talk", "there is nothing that it would replace"
    job = until(client, create(client, training_file=chat, suffix="talk", lora={"publish": "if_better"}).id)
    assert job.fine_tuned_model is None, "an equal is not better"
    raw = upload(client, [{"prompt": "the", "completion": " is"}] * 4, "raw.json")
    assert until(client, create(client, training_file=raw).id).fine_tuned_model.startswith("ft-ftjob-")


def test_uploads_are_checked_and_bounded(house: Callable[..., Any]) -> None:
    live = house(max_upload=10_000)
    http: httpx.Client = live.http
    part = {"file": ("x.jsonl", b"{}")}
    for given in (
        {"files": part, "data": {"purpose": "batch"}},
        {"files": part},
        {"data": {"purpose": "fine-tune"}},
        {"files": {**part, "other": ("y", b"")}, "data": {"purpose": "fine-tune"}},
        {"content": b"{}", "headers": {"content-type": "application/json"}},
    ):
        answer = http.post("/v1/files", **given)
        assert answer.status_code == 400, answer.text
    large = http.post("/v1/files", files={"file": ("x", b"0" * 20_000)}, data={"purpose": "fine-tune"})
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    named = http.post("/v1/files", files={"file": ("../../x.jsonl", b"{}")}, data={"purpose": "fine-tune"}).json()
    assert named["filename"] == "x.jsonl"
    assert [p.name for p in (live.state.settings.state_dir / "files").iterdir()] == [named["id"]]
    assert http.get("/v1/files/..%2f..").status_code == 404 and http.delete("/v1/files/file-x").status_code == 404


def test_a_files_content_is_whole_whatever_range_is_asked_for(live: Any, client: openai.OpenAI) -> None:
    id = upload(client, b"0123456789")
    for asked in ("bytes=2-4", "bytes=99999-", "bytes=foo", "items=0-1", "bytes=5-2", "bytes="):
        answer = live.http.get(f"/v1/files/{id}/content", headers={"range": asked})
        assert answer.status_code == 200 and answer.content == b"0123456789"


def test_evaluating_candidates_of_a_task(
    live: Any, client: openai.OpenAI, write_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(name, seed)
        live.http.post("/adapters", json={"name": name, "source": name})
    task = {"prompt": "{input}", "labels": ["good", "bad"], "defaults": {"max_tokens": 4}}
    live.http.put("/tasks/mood", json={**task, "route": {"best": ["a", "b"], "source": "evaluation", "min_samples": 5}})
    answer = live.http.post("/tasks/mood/evaluate", json={"data": LINES})
    assert answer.status_code == 202
    job = finished(live, answer.json()["id"])
    assert job["status"] == "succeeded" and job["steps"] == job["step"] == 24, job
    rows = job["result"]["candidates"]
    assert [row["adapters"][0]["name"] for row in rows] == ["a", "b"] and rows[0]["samples"] == 12
    versions = live.http.get("/tasks/mood/performance").json()["versions"]
    assert {v["version"] for v in versions} == {row["adapters"][0]["version"] for row in rows}

    file = upload(client)
    mixes = [[], [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]]
    body = {"file": file, "candidates": mixes, "metric": "loss"}
    job = finished(live, live.http.post("/tasks/mood/evaluate", json=body).json()["id"])
    assert job["status"] == "succeeded" and job["result"]["candidates"][0]["adapters"] == []
    assert all(row["score"] > 0 for row in job["result"]["candidates"])

    with monkeypatch.context() as small:
        small.setattr("server.jobs.evaluation_job.MAX_BYTES", 100)
        for large, field in (({"data": LINES}, "data"), ({"file": file}, "file")):
            refused = live.http.post("/tasks/mood/evaluate", json=large)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text
    with monkeypatch.context() as few:
        few.setattr(live.services.engine._slots, "count", 1)
        refused = live.http.post("/tasks/mood/evaluate", json={"data": LINES, "candidates": mixes})
        assert (refused.status_code, refused.json()["error"]["param"]) == (507, "candidates"), refused.text

    for output, code, param, said in (
        (" ", "invalid_data", "data", "data, line 2: 'output' is empty"),
        ("good", "invalid_request", "metric", "bleu looks at 4 tokens in a row"),
    ):
        body = {"data": [LINES[0], {"input": "x", "output": output}], "metric": "bleu"}
        refused = live.http.post("/tasks/mood/evaluate", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, code, param), error
        assert error["message"].startswith(said), error

    bad = upload(client, [{"prompt": "x", "completion": "y"}])
    job = finished(live, live.http.post("/tasks/mood/evaluate", json={"file": bad}).json()["id"])
    assert job["status"] == "failed" and "line 1" in job["error"]["message"]
    for wrong, status in (
        ({}, 422),
        ({"data": LINES, "file": file}, 422),
        ({"file": "file-none"}, 404),
        ({"data": LINES, "candidates": [[{"name": "nobody"}]]}, 404),
        ({"data": LINES, "candidates": [[{"name": "a"}, {"name": "a"}]]}, 400),
        ({"data": LINES, "metric": "beauty"}, 422),
    ):
        assert live.http.post("/tasks/mood/evaluate", json=wrong).status_code == status, wrong
    assert live.http.post("/tasks/nobody/evaluate", json={"data": LINES}).status_code == 404
    assert live.idle()


def test_a_candidate_that_is_deleted_before_its_turn_is_evaluated_all_the_same(live: Any, write_adapter: Any) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(name, seed)
        live.http.post("/adapters", json={"name": name, "source": name}).raise_for_status()
    live.http.put("/tasks/mood", json={"prompt": "{input}", "labels": ["good", "bad"]}).raise_for_status()
    live.slow_down(0.2)
    body = {"data": LINES, "candidates": [[{"name": "a"}], [{"name": "b"}]]}
    id = live.http.post("/tasks/mood/evaluate", json=body).json()["id"]
    waiting.until(lambda: live.stats()["running"])
    for name in ("a", "b"):
        live.http.delete(f"/adapters/{name}").raise_for_status()
    live.slow_down(0.0)
    job = finished(live, id)
    assert job["status"] == "succeeded", job["error"]
    assert [row["adapters"][0]["name"] for row in job["result"]["candidates"]] == ["a", "b"]
    assert live.idle() and live.http.get("/adapters").json()["adapters"] == []
    assert live.http.post("/tasks/mood/evaluate", json=body).status_code == 404


def test_a_drain_that_runs_out_ends_clients_answers_and_no_job(live: Any) -> None:
    live.http.put("/tasks/mood", json={"prompt": "{input}", "labels": ["good", "bad"]}).raise_for_status()
    live.slow_down(0.1)
    id = live.http.post("/tasks/mood/evaluate", json={"data": LINES, "candidates": [[]]}).json()["id"]
    waiting.until(lambda: live.stats()["running"])
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(live.generate, "x", max_tokens=100, ignore_eos=True)
        inference = live.services.inference
        waiting.until(lambda: any(generation.caller.client for generation in inference.live))
        inference._mailbox.loop.call_soon_threadsafe(live.state.abort_requests)
        assert asked.result(30).json()["finish_reason"] == "cancelled"
    live.slow_down(0.0)
    job = finished(live, id)
    assert job["status"] == "succeeded", job


def test_an_evaluation_is_cancelled_as_the_refusal_says(live: Any, client: openai.OpenAI) -> None:
    document = live.http.get("/openapi.json").json()
    live.http.put("/tasks/mood", json={"prompt": "{input}", "labels": ["good", "bad"]}).raise_for_status()
    file = upload(client)
    live.slow_down(0.3)
    started = live.http.post("/tasks/mood/evaluate", json={"file": file, "candidates": [[]]})
    id = started.json()["id"]
    kept = live.http.delete(f"/v1/files/{file}")
    assert kept.status_code == 409 and f"POST /jobs/{id}/cancel" in kept.json()["error"]["message"]
    elsewhere = live.http.post(f"/v1/fine_tuning/jobs/{id}/cancel")
    assert elsewhere.status_code == 404 and f"POST /jobs/{id}/cancel" in elsewhere.json()["error"]["message"]
    ended = live.http.post(f"/jobs/{id}/cancel")
    assert ended.status_code == 200 and ended.json()["id"] == id and ended.json()["kind"] == "evaluation"
    live.slow_down(0.0)
    assert finished(live, id)["status"] == "cancelled"
    assert live.http.delete(f"/v1/files/{file}").status_code == 200
    again, unknown = live.http.post(f"/jobs/{id}/cancel"), live.http.post("/jobs/eval-none/cancel")
    assert (again.status_code, unknown.status_code) == (409, 404)
    for answer in (elsewhere, ended, again, unknown):
        check(document, answer)


def finished(live: Any, id: str, seconds: float = 30) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job: dict[str, Any] = live.http.get(f"/jobs/{id}").json()
        if job["status"] in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


@pytest.mark.usefixtures("within")
def test_jobs_are_for_admins_but_anybody_may_look(house: Callable[..., Any], tmp_path: Path) -> None:
    live = house(api_keys="team:secret-one", admin_keys="boss:secret-two")
    team, boss = ({"authorization": f"Bearer {s}"} for s in ("secret-one", "secret-two"))
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/fine_tuning/jobs/x/events"),
        ("POST", "/v1/fine_tuning/jobs/x/pause"),
        ("POST", "/tasks/mood/evaluate"),
    ):
        assert live.http.request(method, path, headers=team).status_code == 403, path
        assert live.http.request(method, path, headers=boss).status_code not in (401, 403), path
    assert live.http.get("/jobs", headers=team).json() == {"jobs": []}
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="secret-two")
    job = create(client)
    until(client, job.id)
    shown = [live.http.get(path, headers=team).text for path in ("/jobs", f"/jobs/{job.id}")]
    shown += [live.http.get(f"/v1/fine_tuning/jobs/{job.id}{x}", headers=boss).text for x in ("", "/events?limit=100")]
    assert all(str(tmp_path) not in text and "secret" not in text for text in shown)


@pytest.mark.usefixtures("within")
def test_real_answers_are_as_the_document_says(live: Any, client: openai.OpenAI) -> None:
    document = live.http.get("/openapi.json").json()
    until(client, create(client, suffix="x", validation_file=upload(client)).id)
    http, jobs = live.http, "/v1/fine_tuning/jobs"
    job = http.get(jobs).json()["data"][0]
    paths = [f"{jobs}/{job['id']}{x}" for x in ("", "/events", "/checkpoints", "/events?limit=0", "/events?after=x")]
    paths += [jobs, "/v1/files", "/v1/files?order=asc&limit=1", f"/v1/files/{job['training_file']}", "/v1/files/x"]
    paths += [f"/v1/files/{job['result_files'][0]}/content", "/jobs", f"/jobs/{job['id']}", "/jobs/x"]
    answers = [http.get(path) for path in paths]
    answers += [http.post(f"{jobs}/{job['id']}/{x}") for x in ("cancel", "pause", "resume")]
    body = {"model": "tiny", "training_file": job["training_file"]}
    answers += [http.post(jobs, json=body), http.post(jobs, json={}), http.post(jobs, json={**body, "model": "x"})]
    answers += [http.delete(f"/v1/files/{job['result_files'][0]}"), http.delete("/v1/files/x")]
    for answer in answers:
        check(document, answer)
    assert {a.status_code for a in answers} == {200, 400, 404, 409}


@pytest.mark.usefixtures("within")
def test_an_example_that_no_engine_can_answer_costs_no_training(house: Callable[..., Any]) -> None:
    live = house(max_context=24)
    client = client_of(live)
    task = {"prompt": "{input}", "format": "raw", "labels": ["good", "bad"], "defaults": {"max_tokens": 2}}
    live.http.put("/tasks/raw", json=task).raise_for_status()
    odd = [{"input": "the " * 40, "output": "good"}, {"input": "", "output": "good"}]
    held = upload(client, [*odd, *LINES[:3]], "dev.jsonl")
    job = until(client, create(client, validation_file=held, suffix="mine", lora={"task": "raw"}).id)
    assert job.status == "succeeded" and job.fine_tuned_model == "mine", job
    shown = live.http.get(f"/jobs/{job.id}").json()["result"]
    assert shown["evaluation"]["metric"] == "accuracy" and shown["evaluation"]["samples"] == 3
    said = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=50)]
    assert any(m.startswith("2 examples that the result would be measured on are left out") for m in said), said


@pytest.mark.usefixtures("within")
def test_a_full_disk_is_no_room(live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/secret/place")

    file = upload(client)
    until(client, create(client, training_file=file, suffix="first").id)
    jobs = live.state.settings.state_dir / "jobs"
    before = sorted(jobs.iterdir())
    monkeypatch.setattr(shutil, "copyfile", full)
    body = {"model": "tiny", "training_file": file, "lora": {"init_from": "first", "rslora": False}}
    answer = live.http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 507 and "No space left" in answer.text and "secret" not in answer.text
    assert sorted(jobs.iterdir()) == before


def known(live: Any, **fields: Any) -> Job:
    """A job that is on record, and nobody works on."""
    request = {
        "training_file": "file-x", "validation_file": None, "suffix": None, "seed": 0, "metadata": None,
        "hyperparameters": {"n_epochs": 1.0}, "lora": {"init_from": None},
    }  # fmt: skip
    records = live.services.jobs.records
    job: Job = records.prepare("training", "mine", request, "ftjob", {})
    vars(job).update({"status": "cancelled", **fields})
    records.enter(job)
    return job


def test_a_job_is_told_with_the_base_that_it_was_asked_for_on(live: Any) -> None:
    job = known(live)
    for base, model in (({}, "tiny"), ({"base": {"name": "big", "id": "1" * 64}}, "big")):
        job.request |= base
        assert live.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["model"] == model


@pytest.fixture
def entered(live: Any, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are asked for, which nobody begins."""
    asked: list[Job] = []

    def enter(job: Job) -> Job:
        asked.append(job)
        return job

    monkeypatch.setattr(live.services.jobs, "enter", enter)
    return asked


def test_a_file_is_not_deleted_while_a_job_is_made_of_it(
    live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would succeed, and the job would fail."""
    live.http.put("/tasks/mood", json={"prompt": "{input}", "labels": ["good", "bad"]}).raise_for_status()
    learned, judged, scored = (upload(client) for _ in range(3))
    jobs, deleted = live.services.jobs, list[httpx.Response]()

    def enter(job: Job) -> Job:
        files = [id for id in (job.request["training_file"], job.request.get("validation_file")) if id is not None]
        deleted.extend(httpx.delete(f"{live.url}/v1/files/{id}", timeout=30) for id in files)
        return job

    monkeypatch.setattr(jobs, "enter", enter)
    create(client, training_file=learned, validation_file=judged)
    asked = live.http.post("/tasks/mood/evaluate", json={"file": scored, "candidates": [[]]})
    assert asked.status_code == 202 and [answer.status_code for answer in deleted] == [409] * 3
    document = live.http.get("/openapi.json").json()
    for answer in deleted:
        check(document, answer)
    for id in (learned, judged, scored):
        assert live.http.delete(f"/v1/files/{id}").status_code == 200


def test_files_are_listed_by_pages(live: Any, client: openai.OpenAI) -> None:
    oldest, middle, newest = (upload(client, name=f"{i}.jsonl") for i in range(3))

    def page(**query: Any) -> dict[str, Any]:
        told: dict[str, Any] = live.http.get("/v1/files", params=query).json()
        return {**told, "data": [file["id"] for file in told["data"]]}

    first = page(limit=2)
    assert first["data"] == [newest, middle] and first["has_more"] is True
    assert (first["first_id"], first["last_id"]) == (newest, middle)
    rest = page(limit=1, after=middle)
    assert rest["data"] == [oldest] and rest["has_more"] is False
    assert page(order="asc", limit=2, after=oldest)["data"] == [middle, newest]
    assert page(purpose="fine-tune")["data"] == [newest, middle, oldest]
    none = page(purpose="fine-tune-results")
    assert (none["data"], none["first_id"], none["last_id"]) == ([], None, None)
    refused = live.http.get("/v1/files", params={"after": "file-none"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "after"


def test_a_file_that_is_gone_from_the_disk_is_told_as_that(live: Any, client: openai.OpenAI) -> None:
    id = upload(client)
    live.services.files.path(id).unlink()
    answer = live.http.get(f"/v1/files/{id}/content")
    assert answer.status_code == 404 and "upload it again" in answer.json()["error"]["message"]


@pytest.mark.parametrize("end", ["whole", "left", "broken"])
async def test_a_file_that_is_deleted_while_it_is_sent_is_sent_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """And is closed then, or when its client leaves."""
    files, opened, sent = FileStore(tmp_path / "files"), list[Any](), list[Any]()
    file = files.add(lambda path: path.write_bytes(bytes(200_000)), "a.jsonl", "fine-tune")
    path_open = Path.open

    def noted(path: Path, *mode: str) -> Any:
        opened.append(path_open(path, *mode))
        return opened[-1]

    async def receive() -> Any:
        if end != "left":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if end == "broken":
            raise ValueError("broken")
        sent.append(message)

    monkeypatch.setattr(Path, "open", noted)
    answer = await content(file.id, SimpleNamespace(files=files))  # type: ignore[arg-type]
    files.delete(file.id)
    with pytest.raises(ValueError, match="broken") if end == "broken" else contextlib.nullcontext():
        await answer({"type": "http", "method": "GET", "headers": []}, receive, send)
    assert [stream.closed for stream in opened] == [True]
    if end == "whole":
        assert (b"content-length", b"200000") in sent[0]["headers"]
        assert b"".join(message["body"] for message in sent[1:]) == bytes(200_000) and not sent[-1]["more_body"]


def test_the_last_jobs_and_messages_are_shown(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.jobs.SHOWN", 2)
    monkeypatch.setattr("server.api.jobs.MESSAGES", 2)
    _, second, third = (known(live, created_at=float(i)) for i in range(3))
    assert [job["id"] for job in live.http.get("/jobs").json()["jobs"]] == [third.id, second.id]
    for message in ("one", "two", "three"):
        live.services.jobs.records.note(third, message)
    shown = live.http.get(f"/jobs/{third.id}").json()
    assert [said["message"] for said in shown["messages"]] == ["two", "three"]
    assert live.http.get(f"/jobs/{second.id}").json()["messages"] == [], "a disk may have refused them"


@pytest.mark.parametrize(("status", "estimate"), [("running", 1032), ("paused", None), ("queued", None)])
def test_the_end_of_a_run_is_estimated_by_its_speed_while_it_runs(
    live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, status: str, estimate: int | None
) -> None:
    monkeypatch.setattr("server.api.fine_tuning.time", SimpleNamespace(time=lambda: 1000.0))
    job = known(live, status=status, progress=Progress(step=2, steps=10, tokens=50, seconds=8.0))
    told = client.fine_tuning.jobs.retrieve(job.id)
    assert told.estimated_finish == estimate and told.trained_tokens is None


@pytest.mark.parametrize("pausing", [True, False])
def test_a_pause_that_has_not_come_yet_is_told(live: Any, pausing: bool) -> None:
    known(live, status="running", pausing=pausing)
    assert live.http.get("/jobs").json()["jobs"][0]["pausing"] is pausing


def test_hyperparameters_are_those_of_the_method_if_it_has_any(
    client: openai.OpenAI, entered: list[Job], subtests: pytest.Subtests
) -> None:
    """OpenAI has moved them there; "auto" is what is not given."""
    old = {"n_epochs": 9, "batch_size": 9}
    for method, epochs, batch, multiplier in (
        ({"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2}}, 2, 16, 2.0),
        ({"hyperparameters": {"n_epochs": "auto"}}, 3, 16, 1.0),
        ({}, 9, 9, 1.0),
    ):
        with subtests.test(str(method)):
            job = create(client, hyperparameters=old, method={"type": "supervised", "supervised": method})
            assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (epochs, batch)
            config = config_of(entered[-1].request)
            assert (config.epochs, config.batch_size) == (epochs, batch)
            assert config.learning_rate == pytest.approx(5e-4 * multiplier)


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_what_a_job_left_behind_is_no_data(live: Any, client: openai.OpenAI, entered: list[Job], field: str) -> None:
    left = live.services.files.add(lambda path: path.write_bytes(jsonl(LINES)), "x.csv", "fine-tune-results")
    with pytest.raises(openai.BadRequestError, match="with the purpose fine-tune") as refused:
        create(client, **{field: left.id})
    assert refused.value.param == field and not entered


def test_an_adapter_is_gone_on_from_by_its_own_field(
    live: Any, client: openai.OpenAI, write_adapter: Any, entered: list[Job]
) -> None:
    write_adapter("a", 1)
    live.http.post("/adapters", json={"name": "a", "source": "a"}).raise_for_status()
    with pytest.raises(openai.BadRequestError, match="lora.init_from names an adapter") as refused:
        create(client, model="a")
    assert refused.value.param == "model" and not entered


def test_an_evaluation_is_by_default_of_what_the_task_routes_to_and_by_its_metric(
    live: Any, write_adapter: Any, entered: list[Job]
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(name, seed)
        live.http.post("/adapters", json={"name": name, "source": name}).raise_for_status()
    mix = {"choice": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.25}]}
    best = {"best": ["a", "b"], "metric": "rougeL", "source": "evaluation"}
    for task, route in (("mixed", mix), ("best", best)):
        live.http.put(f"/tasks/{task}", json={"prompt": "{input}", "route": route}).raise_for_status()
        assert live.http.post(f"/tasks/{task}/evaluate", json={"data": LINES}).status_code == 202
    of_mix, of_best = (job.request for job in entered)
    assert of_mix["candidates"] == [[("a", 0.5), ("b", 0.25)]] and of_mix["samples"] == len(LINES)
    assert of_best["candidates"] == [[("a", 1.0)], [("b", 1.0)]] and of_best["metric"] == "rougeL"
    for gone, status in (("a", 202), ("b", 404)):
        live.services.registry.retire_now(gone)
        assert live.http.post("/tasks/best/evaluate", json={"data": LINES}).status_code == status
        assert live.http.post("/tasks/mixed/evaluate", json={"data": LINES}).status_code == 404
    assert len(entered) == 3 and entered[2].request["candidates"] == [[("b", 1.0)]], "the route serves that one"


def test_training_jobs_are_listed_newest_first_by_pages_and_no_others(live: Any) -> None:
    made = [known(live, created_at=float(i)) for i in range(22)]
    known(live, created_at=99.0, kind="evaluation", request={"training_file": "file-x"})
    told = live.http.get("/v1/fine_tuning/jobs").json()
    assert [job["id"] for job in told["data"]] == [job.id for job in made[:1:-1]] and told["has_more"] is True
    told = live.http.get("/v1/fine_tuning/jobs", params={"after": made[2].id}).json()
    assert [job["id"] for job in told["data"]] == [made[1].id, made[0].id] and told["has_more"] is False


def test_a_jobs_events_are_listed_newest_first_and_its_checkpoints_are_named(live: Any) -> None:
    job, records = known(live, started_at=5.5, finished_at=9.5), live.services.jobs.records
    shown = live.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert (shown["started_at"], shown["finished_at"], shown["estimated_finish"]) == (5, 9, None)
    records.note(job, "one")
    records.note(job, "two", data={"checkpoint": 4, "train_loss": 0.5})
    records.note(job, "three", data={"checkpoint": 6, "train_loss": 0.25})
    events = live.http.get(f"/v1/fine_tuning/jobs/{job.id}/events").json()["data"]
    assert [event["message"] for event in events] == ["three", "two", "one"]
    points = live.http.get(f"/v1/fine_tuning/jobs/{job.id}/checkpoints").json()
    assert [point["step_number"] for point in points["data"]] == [6, 4]
    assert points["data"][1]["metrics"] == {"step": 4, "train_loss": 0.5}
    assert points["data"][1]["fine_tuned_model_checkpoint"] == "mine:ckpt-step-4"
    assert (points["first_id"], points["last_id"]) == (points["data"][0]["id"], points["data"][1]["id"])


def test_jobs_are_found_by_their_metadata(live: Any) -> None:
    def listed(**query: str) -> list[str]:
        told = live.http.get("/v1/fine_tuning/jobs", params=query).json()["data"]
        return [job["id"] for job in told]

    request = known(live).request
    one, two = (known(live, request={**request, "metadata": {"run": run, "x": "y"}}) for run in ("1", "2"))
    assert listed(**{"metadata[run]": "2"}) == [two.id]
    assert listed(**{"metadata[x]": "y"}) == [two.id, one.id]
    assert listed(**{"metadata[run]": "1", "metadata[x]": "z"}) == []
    assert len(listed()) == 3 and len(listed(metadata="null")) == 1


def test_a_run_that_has_begun_no_step_has_no_estimate(live: Any) -> None:
    job = known(live, status="running", progress=Progress(step=0, steps=10, seconds=8.0))
    assert live.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["estimated_finish"] is None
