"""Helpers of the tests of jobs: clients, data, and training on a thread instead of in a process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from server.jobs import worker
from server.jobs.job_store import TRAINING, Job

LINES = [{"input": f"the {i}", "output": "good" if i % 2 else "bad"} for i in range(12)]
POLL = 0.05
"""Seconds between two polls. The training process gets the CPU that they leave."""


class ThreadProcess:
    """Replaces `WorkerProcess`: runs the worker on this thread. Its messages come when it has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stop = folder, threading.Event()

    def messages(self) -> Iterator[dict[str, Any]]:
        lines: list[str] = []
        worker.run(self._folder, lambda message: lines.append(json.dumps(message)), self._stop)
        return map(json.loads, lines)

    def stop(self) -> None:
        self._stop.set()

    kill = stop


def client_of(live: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def jsonl(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def upload(client: openai.OpenAI, lines: list[Any] | bytes = LINES, name: str = "mood.jsonl") -> str:
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    return client.files.create(file=(name, content), purpose="fine-tune").id


def create(client: openai.OpenAI, epochs: int = 1, **fields: Any) -> Any:
    fields.setdefault("training_file", None)
    fields["training_file"] = fields["training_file"] or upload(client)
    lora = fields.pop("lora", {})
    if "init_from" not in lora:
        lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], **lora}
    defaults = {"model": "tiny", "hyperparameters": {"n_epochs": epochs, "batch_size": 4}}
    return client.fine_tuning.jobs.create(**{**defaults, "extra_body": {"lora": lora}, **fields})


def until(client: openai.OpenAI, id: str, *statuses: str, seconds: float = 180) -> Any:
    """The job once it has one of the statuses, or has finished."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = client.fine_tuning.jobs.retrieve(id)
        if job.status in (statuses or ("succeeded", "failed", "cancelled")):
            return job
        time.sleep(POLL)
    raise AssertionError((job, client.fine_tuning.jobs.list_events(id, limit=100).data))


def finished(live: Any, id: str, seconds: float = 30) -> dict[str, Any]:
    """The answer of `GET /jobs/{id}` once the job has finished."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job: dict[str, Any] = live.http.get(f"/jobs/{id}").json()
        if job["status"] in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def messages(client: openai.OpenAI, id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(id, limit=100).data]


def stored_job(live: Any, kind: str = TRAINING, **fields: Any) -> Job:
    """A job in the store that no thread runs."""
    request = {
        "training_file": "file-x", "validation_file": None, "suffix": None, "seed": 0, "metadata": None,
        "hyperparameters": {"n_epochs": 1.0}, "lora": {"init_from": None}, "base": {"name": "tiny", "id": ""},
    }  # fmt: skip
    store = live.services.jobs.store
    with live.services.jobs._condition:
        job: Job = store.create(kind, "mine", {**request, **fields.pop("request", {})}, "ftjob")
        vars(job).update({"status": "cancelled", **fields})
    store.save(job)
    return job
