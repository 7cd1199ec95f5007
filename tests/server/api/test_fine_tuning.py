"""`/v1/fine_tuning/jobs` with OpenAI's client over a tiny base. Most jobs train on a thread, some in a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

import server.app
from adapters.errors import StoreFailed
from server.api.startup import build
from server.jobs import training_job, worker_process
from server.jobs.job_store import Job, JobStore, Progress
from server.jobs.publisher import Publisher
from server.jobs.training_request import training_config
from server.jobs.worker_messages import WorkerSpec
from server.model.loader import Base
from tests import waiting
from tests.server.api.jobs import (
    LINES,
    POLL,
    ThreadProcess,
    client_of,
    create,
    jsonl,
    messages,
    stored_job,
    until,
    upload,
)
from tests.server.api.test_openapi_document import check


@pytest.fixture
def start_training(
    start: Callable[..., Any], tiny_folder: Path, folder_base: Base, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`start_training(**settings)`: a server that can train."""
    monkeypatch.setattr(
        server.app, "load_and_build", lambda settings, *given: build(settings, folder_base, *given[:2], tiny_folder)
    )
    return lambda **settings: start(quantization="none", **settings)


@pytest.fixture
def live(start_training: Callable[..., Any]) -> Any:
    return start_training()


@pytest.fixture
def client(live: Any) -> openai.OpenAI:
    return client_of(live)


@pytest.fixture
def on_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_job, "WorkerProcess", ThreadProcess)


def test_a_job_from_upload_to_served_model(live: Any, client: openai.OpenAI) -> None:
    file = client.files.create(file=("mood.jsonl", jsonl(LINES)), purpose="fine-tune")
    assert (file.object, file.filename, file.bytes) == ("file", "mood.jsonl", len(jsonl(LINES)))
    held = upload(client, LINES[:4], "dev.jsonl")
    job = create(client, training_file=file.id, validation_file=held, suffix="mood", seed=7, metadata={"for": "a test"})
    assert job.status in ("queued", "validating_files", "running") and job.fine_tuned_model is None
    assert job.hyperparameters.n_epochs == 1 and job.seed == 7 and job.metadata == {"for": "a test"}
    answer = live.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    counts = [h["n_epochs"] for h in (answer["hyperparameters"], answer["method"]["supervised"]["hyperparameters"])]
    assert {type(count) for count in counts} == {int}
    job = until(client, job.id)
    assert job.status == "succeeded", job
    assert job.fine_tuned_model == "mood" and job.trained_tokens > 0 and job.finished_at >= job.created_at
    chat = client.chat.completions.create(model="mood", messages=[{"role": "user", "content": "the 1"}], max_tokens=3)
    assert chat.usage is not None and chat.usage.completion_tokens >= 1
    adapter = live.http.get("/adapters/mood").json()
    assert adapter["ranks"] == [2] and "3 steps of 4" in adapter["card"]
    assert job.id not in live.services.registry.names(), "the name for its evaluation"
    folder = live.state.settings.state_dir / "jobs" / job.id
    assert (folder / "stderr.log").read_text() == ""

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # follows the pages
    assert [e.message for e in events][0] == "The job has succeeded." and events[-1].message == "Created."
    steps = [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data]  # type: ignore[index,operator]
    assert steps == [3, 2, 1]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints[0].step_number == 3 and (checkpoints[0].metrics.train_loss or 0) > 0
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


def test_a_bad_line_fails_the_job(client: openai.OpenAI, request: pytest.FixtureRequest) -> None:
    bad = upload(client, jsonl(LINES) + b'{"input": "x"}\n', "bad.jsonl")
    job = until(client, create(client, training_file=bad).id)
    assert job.status == "failed" and job.error.code == "invalid_training_file" and job.error.param == "training_file"
    assert job.error.message == "bad.jsonl, line 13: 'output' is missing"
    request.getfixturevalue("on_thread")  # one process is enough
    job = until(client, create(client, validation_file=bad).id)
    assert job.error.code == "invalid_validation_file" and "line 13" in job.error.message


@pytest.mark.usefixtures("on_thread")
def test_bad_requests_are_refused(live: Any, client: openai.OpenAI, subtests: pytest.Subtests) -> None:
    refused: list[tuple[dict[str, Any], str, int]] = [
        ({"model": "gpt-4"}, "model", 404),
        ({"training_file": "file-none"}, "training_file", 404),
        ({"suffix": "base"}, "suffix", 400),
        ({"suffix": "no good"}, "suffix", 400),
        ({"method": {"type": "dpo"}}, "method.type", 400),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", 400),
        ({"lora": {"r": 1000}}, "lora.r", 400),
        ({"lora": {"r": 0}}, "lora.r", 400),
        ({"lora": {"rank": 4}}, "lora.rank", 400),
        ({"method": {}, "lora": {"target_modules": [], "r": 0}}, "lora.r", 400),
        ({"lora": {"r": 4, "prune_to": 4}}, "lora.prune_to", 400),
        ({"lora": {"task": "nobody"}}, "lora.task", 404),
        ({"lora": {"init_from": "nobody"}}, "lora.init_from", 404),
        ({"lora": {"target_modules": ["nothing"]}}, "lora.target_modules", 400),
        ({"lora": {"target_modules": "(q_proj"}}, "lora.target_modules", 400),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", 400),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", 400),
    ]
    for fields, param, status in refused:
        with subtests.test(str(fields)[:80]):
            with pytest.raises(openai.APIStatusError) as error:
                create(client, **fields)
            assert error.value.status_code == status
            named = f"{error.value.param}"
            assert named == param or named.startswith(f"{param}.") or param.startswith(f"{named}."), named
    assert client.fine_tuning.jobs.list().data == []
    body = {"model": "tiny", "training_file": upload(client), "lora": {"foo": 1}}
    answer = live.http.post("/v1/fine_tuning/jobs", json=body).json()["error"]
    assert (answer["code"], answer["param"]) == ("unsupported_parameter", "lora.foo")
    nothing = {"r": 1000, "foo": None, "bar": []}
    assert live.http.post("/v1/fine_tuning/jobs", json={**body, "lora": nothing}).json()["error"]["param"] == "lora.r"


class Gate:
    """The step after which training processes wait until a later one is named, or they are asked to stop."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def open_until(self, step: int) -> None:
        self._file.with_suffix(".new").write_text(str(step))
        self._file.with_suffix(".new").replace(self._file)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    file = tmp_path / "gate"
    command = (sys.executable, str(Path(__file__).with_name("gated_worker.py")), str(file))
    monkeypatch.setattr(worker_process, "COMMAND", command)
    return Gate(file)


def process_of(id: str) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"gated_worker.py") for word in words) and any(id.encode() in word for word in words):
            return int(path.parent.name)
    raise AssertionError("there is no process")


def steps_of(client: openai.OpenAI, id: str, limit: int = 1000) -> list[tuple[int, float]]:
    """Step and loss of the events of steps, oldest first."""
    data: list[Any] = [e.data for e in client.fine_tuning.jobs.list_events(id, limit=limit).data if e.type == "metrics"]
    return [(fields["step"], fields["train_loss"]) for fields in reversed(data)]


def wait_for_step(client: openai.OpenAI, id: str, step: int) -> None:
    waiting.until(lambda: any(s >= step for s, _ in steps_of(client, id, limit=10)), every=POLL)


def stored_status(live: Any, id: str) -> str:
    services = live.services
    return JobStore(services.jobs.store._database, services.jobs.store._folder).jobs[id].status


def trained_tokens(live: Any, id: str) -> float:
    lines = live.http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("loramux_training_tokens_total{") and id in line]
    return float(line.rpartition(" ")[2])


def test_pausing_killing_and_restarting_change_no_bit(
    start_training: Callable[..., Any], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with a job that runs through. The process has the lowest priority and ends with its server."""
    live = start_training()
    client = client_of(live)
    with monkeypatch.context() as patch:
        patch.setattr(training_job, "WorkerProcess", ThreadProcess)
        whole = until(client, create(client, 30, suffix="whole").id)
    gate.open_until(5)
    job = create(client, 30, suffix="parts")

    wait_for_step(client, job.id, 5)
    pid = process_of(job.id)
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    client.fine_tuning.jobs.pause(job.id)
    assert until(client, job.id, "paused").status == "paused"
    kept = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].step_number
    assert kept == live.http.get(f"/jobs/{job.id}").json()["step"]
    time.sleep(0.3)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    gate.open_until(25)
    client.fine_tuning.jobs.with_raw_response.retrieve(job.id)
    live.http.post(f"/v1/fine_tuning/jobs/{job.id}/resume").raise_for_status()

    wait_for_step(client, job.id, 25)
    os.kill(process_of(job.id), signal.SIGKILL)
    failed = until(client, job.id)
    assert failed.status == "failed" and failed.error.code == "process_died" and "SIGKILL" in failed.error.message
    most = trained_tokens(live, job.id)
    gate.open_until(22)
    client.fine_tuning.jobs.resume(job.id)
    waiting.until(lambda: live.http.get(f"/jobs/{job.id}").json()["step"] == 22)
    assert trained_tokens(live, job.id) >= most > 0, "a counter never falls"
    gate.open_until(45)
    wait_for_step(client, job.id, 45)
    pid = process_of(job.id)
    assert stored_status(live, job.id) == "running"
    live.stop()
    assert not Path(f"/proc/{pid}").exists()

    gate.open_until(91)
    live = start_training()
    client = client_of(live)
    assert until(client, job.id).status == "succeeded"
    curve = live.http.get(f"/jobs/{job.id}").json()["curves"]["train_loss"]
    losses = dict(steps_of(client, job.id))
    assert curve == [[step, losses[step]] for step in sorted(losses)], "each step once"
    assert losses == dict(steps_of(client, whole.id)) and len(losses) == 90
    digests = [live.http.get(f"/adapters/{name}").json()["version"].split("@")[1] for name in ("whole", "parts")]
    assert digests[0] == digests[1]


def test_jobs_run_one_at_a_time_and_can_be_cancelled(live: Any, client: openai.OpenAI, gate: Gate) -> None:
    gate.open_until(1)
    first, second, third = (create(client, 200) for _ in range(3))
    wait_for_step(client, first.id, 1)
    assert [client.fine_tuning.jobs.retrieve(job.id).status for job in (second, third)] == ["queued", "queued"]
    with pytest.raises(openai.ConflictError, match=first.id):
        client.files.delete(first.training_file)
    assert client.fine_tuning.jobs.cancel(third.id).status == "cancelled"
    client.fine_tuning.jobs.pause(second.id)
    pid = process_of(first.id)
    client.fine_tuning.jobs.cancel(first.id)
    assert until(client, first.id).status == "cancelled"
    assert not Path(f"/proc/{pid}").exists()
    for change in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError):
            change(first.id)
    assert client.fine_tuning.jobs.retrieve(second.id).status == "paused"
    client.fine_tuning.jobs.cancel(second.id)
    client.files.delete(first.training_file)


@pytest.mark.usefixtures("on_thread")
def test_publishing_by_rule(live: Any, client: openai.OpenAI) -> None:
    task = {"prompt": "{input}", "format": "chat", "labels": ["good", "bad"], "defaults": {"max_tokens": 4}}
    assert live.http.put("/tasks/mood", json=task).status_code == 201
    good = upload(client, [{"input": "the", "output": "good"}] * 8)
    first = until(client, create(client, 60, suffix="mood", training_file=good, validation_file=good).id)
    assert first.status == "succeeded", first
    before = live.http.get("/adapters/mood").json()["version"]
    evaluation = live.http.get(f"/jobs/{first.id}").json()["result"]["evaluation"]
    assert evaluation["metric"] == "accuracy" and evaluation["replaced"] is None
    [entry] = live.http.get("/tasks/mood/performance").json()["versions"]
    assert entry["version"] == before and entry["quality"][0]["samples"] == 8
    assert entry["quality"][0]["source"] == "evaluation"
    assert live.http.get("/tasks/mood").json()["source"] == "api"

    worse = upload(client, [{"input": "the", "output": "bad"}] * 8)
    fields: dict[str, Any] = {"suffix": "mood", "training_file": worse}
    second = until(client, create(client, **fields, validation_file=good, lora={"publish": "if_better"}).id)
    assert second.status == "succeeded" and second.fine_tuned_model is None
    assert live.http.get("/adapters/mood").json()["version"] == before
    names = [client.files.retrieve(id).filename for id in second.result_files]
    assert names[1:] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "r" in json.loads(client.files.content(second.result_files[1]).text)
    assert any(m.startswith("Not published: mood@") for m in messages(client, second.id))

    third = until(client, create(client, **fields, lora={"publish": "always"}).id)
    assert third.fine_tuned_model == "mood" and live.http.get("/adapters/mood").json()["version"] != before
    fourth = until(client, create(client, **fields, lora={"publish": "never"}).id)
    assert fourth.fine_tuned_model is None and len(fourth.result_files) == 3


@pytest.mark.usefixtures("on_thread")
def test_routes_of_tasks_after_training(live: Any, client: openai.OpenAI, write_adapter: Any) -> None:
    """A task in an adapter's folder keeps its route. One with the default route uses the new adapter."""
    route = {"choice": [{"name": "mine", "weight": 0.5}, {"name": "second", "weight": 0.25}]}
    write_adapter("second", 5)
    write_adapter("mine", 6, task={"prompt": "{input}", "route": route})
    for name in ("second", "mine"):
        assert live.http.post("/adapters", json={"name": name, "source": name}).status_code in (200, 201)
    before = live.http.get("/adapters/mine").json()["version"]
    assert until(client, create(client, suffix="mine").id).status == "succeeded"
    assert live.http.get("/adapters/mine").json()["version"] != before
    task = live.http.get("/tasks/mine").json()
    assert task["route"] == route and task["source"] == "file"

    live.http.put("/tasks/early", json={"prompt": "{input}"}).raise_for_status()
    live.http.put("/tasks/elsewhere", json={"prompt": "{input}", "route": {"choice": []}}).raise_for_status()
    for name in ("early", "elsewhere"):
        job = until(client, create(client, suffix=name).id)
        assert job.fine_tuned_model == name
        used = [a["name"] for a in live.generate("the", task=name, max_tokens=1).json()["adapters"]]
        warnings = [m for m in messages(client, job.id) if "does not route to this adapter alone" in m]
        assert (used, len(warnings)) == ((["early"], 0) if name == "early" else ([], 1))


@pytest.mark.usefixtures("on_thread")
def test_a_trained_job_resumes_without_its_files(
    live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", full)
        job = until(client, create(client, suffix="late", seed=2).id)
    assert job.status == "failed" and "no space left" in job.error.message
    stored = live.services.jobs.get(job.id)
    assert WorkerSpec.read(live.services.jobs.store.folder(job.id)).created_at == stored.created_at
    client.files.delete(job.training_file)
    client.fine_tuning.jobs.resume(job.id)
    job = until(client, job.id)
    assert job.status == "succeeded" and job.fine_tuned_model == "late", job


@pytest.mark.usefixtures("on_thread")
def test_a_full_disk_is_reported_without_paths(
    live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/a/secret/file")

    file = upload(client)
    until(client, create(client, training_file=file, suffix="first").id)
    with monkeypatch.context() as patch:
        patch.setattr(WorkerSpec, "write", full)
        job = until(client, create(client, training_file=file).id)
    assert job.status == "failed" and job.error.code == "failed"
    assert "No space left on device" in job.error.message and "secret" not in job.error.message
    jobs = live.state.settings.state_dir / "jobs"
    before = sorted(jobs.iterdir())
    monkeypatch.setattr(shutil, "copyfile", full)
    body = {"model": "tiny", "training_file": file, "lora": {"init_from": "first", "rslora": False}}
    answer = live.http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 507 and "No space left" in answer.text and "secret" not in answer.text
    assert sorted(jobs.iterdir()) == before


@pytest.mark.usefixtures("on_thread")
def test_continuing_an_adapter_pruning_and_auto_rank(live: Any, client: openai.OpenAI) -> None:
    assert until(client, create(client, suffix="first").id).status == "succeeded"
    job = until(client, create(client, suffix="second", lora={"init_from": "first", "prune_to": 1}).id)
    assert job.status == "succeeded", job
    second = live.http.get("/adapters/second").json()
    assert second["ranks"] == [1]
    assert f"continued from {live.http.get('/adapters/first').json()['version']} with" in second["card"]
    lora = job.model_extra["lora"]
    assert [lora[k] for k in ("r", "alpha", "target_modules", "rslora")] == [None] * 4, "those of the first adapter"
    assert any("pruned to rank 1" in m for m in messages(client, job.id))
    with pytest.raises(openai.BadRequestError, match="leave r out"):
        create(client, lora={"init_from": "first", "r": 2})
    with pytest.raises(openai.BadRequestError, match=r"set lora\.init_from") as refused:
        create(client, model="first")
    assert refused.value.param == "model"
    job = create(client, lora={"init_from": "first", "prune_to": 2})
    assert until(client, job.id).error.param == "lora.prune_to"
    auto = until(client, create(client, suffix="auto", lora={"auto_rank": True, "target_modules": "all-linear"}).id)
    assert auto.status == "succeeded", auto
    assert [s for s, _ in steps_of(client, auto.id)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("on_thread")
def test_chat_and_completion_data(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "and"}]
    chat = upload(client, [{"messages": turns}] * 20)
    for published in ("talk", None):  # an equal result is not better
        job = create(client, training_file=chat, suffix="talk", lora={"publish": "if_better"})
        assert until(client, job.id).fine_tuned_model == published
    raw = upload(client, [{"prompt": "the", "completion": " is"}] * 4, "raw.json")
    assert until(client, create(client, training_file=raw).id).fine_tuned_model.startswith("ft-ftjob-")


@pytest.mark.usefixtures("on_thread")
def test_validation_examples_that_no_engine_can_answer_are_skipped(start_training: Callable[..., Any]) -> None:
    live = start_training(max_context=24)
    client = client_of(live)
    task = {"prompt": "{input}", "format": "raw", "labels": ["good", "bad"], "defaults": {"max_tokens": 2}}
    live.http.put("/tasks/raw", json=task).raise_for_status()
    odd = [{"input": "the " * 40, "output": "good"}, {"input": "", "output": "good"}]
    held = upload(client, [*odd, *LINES[:3]], "dev.jsonl")
    job = until(client, create(client, validation_file=held, suffix="mine", lora={"task": "raw"}).id)
    assert job.status == "succeeded" and job.fine_tuned_model == "mine", job
    evaluation = live.http.get(f"/jobs/{job.id}").json()["result"]["evaluation"]
    assert evaluation["metric"] == "accuracy" and evaluation["samples"] == 3
    assert any(m.startswith("2 validation examples are skipped") for m in messages(client, job.id))


@pytest.mark.usefixtures("on_thread")
def test_answers_match_the_openapi_document(live: Any, client: openai.OpenAI) -> None:
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


@pytest.fixture
def submitted(live: Any, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that clients create. No thread runs them."""
    monkeypatch.setattr(live.services.jobs, "_next", lambda kind: None)
    jobs, submit = list[Job](), live.services.jobs.submit
    monkeypatch.setattr(live.services.jobs, "submit", lambda *given: jobs.append(submit(*given)) or jobs[-1])
    return jobs


def test_hyperparameters_of_the_method_take_precedence(
    client: openai.OpenAI, submitted: list[Job], subtests: pytest.Subtests
) -> None:
    """OpenAI has moved them there. "auto" is the default."""
    old = {"n_epochs": 9, "batch_size": 9}
    for method, epochs, batch, multiplier in (
        ({"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2}}, 2, 16, 2.0),
        ({"hyperparameters": {"n_epochs": "auto"}}, 3, 16, 1.0),
        ({}, 9, 9, 1.0),
    ):
        with subtests.test(str(method)):
            job = create(client, hyperparameters=old, method={"type": "supervised", "supervised": method})
            assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (epochs, batch)
            config = training_config(submitted[-1].request)
            assert (config.epochs, config.batch_size) == (epochs, batch)
            assert config.learning_rate == pytest.approx(5e-4 * multiplier)


@pytest.mark.parametrize(
    ("status", "step", "estimate"), [("running", 2, 1032), ("running", 0, None), ("paused", 2, None)]
)
def test_the_finish_of_a_running_job_is_estimated(
    live: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, status: str, step: int, estimate: int | None
) -> None:
    monkeypatch.setattr("server.api.fine_tuning.time", SimpleNamespace(time=lambda: 1000.0))
    job = stored_job(live, status=status, progress=Progress(step=step, steps=10, tokens=50, seconds=8.0))
    shown = client.fine_tuning.jobs.retrieve(job.id)
    assert shown.estimated_finish == estimate and shown.trained_tokens is None


def test_jobs_are_listed_by_pages_and_metadata(live: Any) -> None:
    jobs = [stored_job(live) for _ in range(20)]
    jobs += [stored_job(live, request={"metadata": {"run": run, "x": "y"}}) for run in ("1", "2")]
    stored_job(live, kind="evaluation")

    def ids(**query: Any) -> tuple[list[str], bool]:
        page = live.http.get("/v1/fine_tuning/jobs", params=query).json()
        return [job["id"] for job in page["data"]], page["has_more"]

    newest = [job.id for job in jobs[::-1]]
    assert ids() == (newest[:20], True) and ids(after=newest[19]) == (newest[20:], False)
    assert ids(**{"metadata[run]": "2"}) == ([newest[0]], False)
    assert ids(**{"metadata[x]": "y"}) == (newest[:2], False)
    assert ids(**{"metadata[run]": "1", "metadata[x]": "z"}) == ([], False)
    assert ids(metadata="null") == (newest[2:], False)


def test_the_objects_of_a_job_its_events_and_checkpoints(live: Any) -> None:
    job, store = stored_job(live, started_at=5.5, finished_at=9.5, request={"base": {"name": "big", "id": ""}}), None
    store = live.services.jobs.store
    shown = live.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert (shown["started_at"], shown["finished_at"], shown["model"]) == (5, 9, "big")
    store.add_event(job, "one")
    store.add_event(job, "two", data={"checkpoint": 4, "train_loss": 0.5})
    store.add_event(job, "three", data={"checkpoint": 6, "train_loss": 0.25})
    events = live.http.get(f"/v1/fine_tuning/jobs/{job.id}/events").json()["data"]
    assert [event["message"] for event in events] == ["three", "two", "one"]
    page = live.http.get(f"/v1/fine_tuning/jobs/{job.id}/checkpoints").json()
    newest, oldest = page["data"]
    assert (newest["step_number"], oldest["step_number"]) == (6, 4)
    assert oldest["metrics"] == {"step": 4, "train_loss": 0.5}
    assert oldest["fine_tuned_model_checkpoint"] == "mine:ckpt-step-4"
    assert (page["first_id"], page["last_id"]) == (newest["id"], oldest["id"])
