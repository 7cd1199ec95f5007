"""A training job through OpenAI's client: its adapter is served, and a killed job resumes bit-exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Live, sentences, serving

pytestmark = pytest.mark.e2e

ANSWERS = ("north", "south")


def lines() -> bytes:
    """Twelve sentences with arbitrary answers, which the base model cannot guess."""
    pairs = [{"input": text, "output": ANSWERS[i % 2]} for i, text in enumerate(sentences()[:12])]
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


def start(client: openai.OpenAI, suffix: str, epochs: int = 4, **lora: Any) -> str:
    file = client.files.create(file=("answers.jsonl", lines()), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model="smollm2-135m",
        training_file=file,
        validation_file=file,
        suffix=suffix,
        hyperparameters={"n_epochs": epochs, "batch_size": 4, "learning_rate_multiplier": 2},
        extra_body={"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], **lora}},
    )
    return job.id


def client_of(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def wait(client: openai.OpenAI, id: str, done: Any, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = client.fine_tuning.jobs.retrieve(id)
        if done(job):
            return job
        time.sleep(0.1)
    raise AssertionError((job, [e.message for e in client.fine_tuning.jobs.list_events(id, limit=20).data]))


def over(job: Any) -> bool:
    return job.status in ("succeeded", "failed", "cancelled")


def losses(client: openai.OpenAI, id: str) -> dict[int, float]:
    events = client.fine_tuning.jobs.list_events(id, limit=1000).data
    return {
        e.data["step"]: e.data["train_loss"] for e in events if "train_loss" in (e.data or {}) and e.type == "metrics"
    }


def child(id: str) -> int:
    found = subprocess.run(["pgrep", "-f", f"server.jobs.worker .*{id}"], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


def mapped(process: int) -> set[str]:
    """Packed base files that a process has mapped."""
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if line.endswith(".packed")}


def test_a_job_is_served_and_survives_kills_bit_for_bit(tmp_path: Path, embedded: Path) -> None:
    state = tmp_path / "state"
    with serving(state) as live:
        client = client_of(live)
        body = {"prompt": sentences()[0], "max_tokens": 8, "logprobs": 1}
        before = live.post("/generate", body)
        whole = start(client, "whole")
        wait(client, whole, lambda job: losses(client, whole))
        assert mapped(child(whole)) == mapped(live.process.pid) != set(), "both map the same file"
        during = live.post("/generate", body)
        assert (during["text"], during["logprobs"]) == (before["text"], before["logprobs"])
        job = wait(client, whole, over)
        assert job.status == "succeeded" and job.fine_tuned_model == "whole", job
        curve = losses(client, whole)
        assert len(curve) == 12 and curve[12] < curve[1] / 2
        said = client.chat.completions.create(
            model="whole", messages=[{"role": "user", "content": sentences()[0]}], max_tokens=4, temperature=0
        )
        assert said.usage.completion_tokens and "whole" in [model.id for model in client.models.list()]
        shown = live.get("/jobs/" + whole)
        trained, served = shown["curves"]["valid_loss"][-1][1], shown["result"]["evaluation"]["score"]
        assert served == pytest.approx(trained, rel=0.03), "losses differ by more than 8-bit activations explain"

        parts = start(client, "parts")
        wait(client, parts, lambda job: len(losses(client, parts)) >= 3)
        os.kill(child(parts), signal.SIGKILL)
        job = wait(client, parts, over)
        assert job.status == "failed" and "SIGKILL" in job.error.message
        client.fine_tuning.jobs.resume(parts)
        wait(client, parts, lambda job: job.status == "running" and len(losses(client, parts)) >= 5)
        live.process.kill()
        live.process.wait()
    with serving(state) as live:
        client = client_of(live)
        assert wait(client, parts, over).status == "succeeded"
        assert losses(client, parts) == curve
        versions = [live.get(f"/adapters/{name}")["version"].split("@")[1] for name in ("whole", "parts")]
        assert versions[0] == versions[1]
