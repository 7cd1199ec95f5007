"""A server that crashes or is killed keeps every acknowledged write and names the requests that were running."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Live, serving
from tests.postgres import postgres  # noqa: F401
from tests.waiting import until

pytestmark = pytest.mark.e2e
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def test_a_native_crash_names_the_requests_and_loses_no_state(
    tmp_path: Path, embedded: Path, write_random: Callable[..., Path]
) -> None:
    folder, log = write_random(tmp_path / "f", rank=4, seed=1), tmp_path / "first.log"
    with serving(tmp_path / "state", log=log) as live:
        files = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
        version = live.client.post("/adapters", files=files, data={"name": "kept"}).json()["version"]
        body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True, "adapters": [{"name": "kept"}]}
        with pytest.raises(httpx.HTTPError), live.client.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            id = json.loads(next(lines)[6:])["id"]
            live.process.send_signal(signal.SIGSEGV)
            for _ in lines:
                continue
        assert live.process.wait(60) == -signal.SIGSEGV
    text = log.read_text()
    assert f"SIGSEGV in native code; the last step ran {id}.0 {version.partition('@')[2]}\n" in text
    assert "Fatal Python error: Segmentation fault" in text
    with serving(tmp_path / "state", log=tmp_path / "second.log") as live:
        assert live.get("/adapters/kept")["version"] == version
        assert live.post("/generate", {"prompt": "x", "max_tokens": 2, "adapters": [{"name": "kept"}]})["text"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_acknowledged_write_is_lost(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, embedded: Path, write_random: Callable[..., Path]
) -> None:
    flags = []
    if kind == "postgresql":
        url = request.getfixturevalue("postgres")()
        flags = ["--database-url", url.render_as_string(hide_password=False)]
    folders = [write_random(tmp_path / f"f{i}", rank=4, seed=i) for i in range(3)]
    files = [{name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)} for folder in folders]
    adapters: dict[str, str] = {}  # name -> last acknowledged version
    tasks: dict[str, int] = {}  # name -> last acknowledged number
    jobs: list[str] = []
    scores = 0

    def publish(live: Live, n: int) -> None:
        answer = live.client.put(f"/adapters/n{n % 5}", files=files[n % 3])
        adapters[f"n{n % 5}"] = answer.json()["version"]

    def define(live: Live, n: int) -> None:
        body = {"prompt": f"{n}: {{input}}", "route": {"choice": []}}
        live.client.put(f"/tasks/t{n % 3}", json=body).raise_for_status()
        tasks[f"t{n % 3}"] = n

    def score(live: Live, n: int) -> None:
        nonlocal scores
        answer = live.post("/generate?task=sentiment", {"prompt": f"film {n}", "max_tokens": 1})
        live.client.post("/tasks/sentiment/feedback", json={"id": answer["id"], "score": 1.0}).raise_for_status()
        scores += 1

    def evaluate(live: Live, n: int) -> None:
        body = {"data": [{"input": f"film {n}", "output": "positive"}] * 50, "candidates": [[]]}
        jobs.append(live.post("/tasks/sentiment/evaluate", body, status=202)["id"])

    def repeat(write: Callable[[Live, int], None], live: Live) -> None:
        for n in range(10**6):
            try:
                write(live, n)
            except httpx.TransportError:  # killed; an HTTP error status would fail the test
                return

    with serving(tmp_path / "state", *flags) as live:
        threads = [threading.Thread(target=repeat, args=(write, live)) for write in (publish, define, score, evaluate)]
        for thread in threads:
            thread.start()
        done = lambda: len(adapters) >= 5 and len(tasks) >= 3 and scores >= 5 and len(jobs) >= 3  # noqa: E731
        until(done, "the writes make no progress", every=0.01)
        live.process.kill()
        live.process.wait()
        for thread in threads:
            thread.join()
    with serving(tmp_path / "state", *flags, log=tmp_path / "second.log") as live:
        listed: dict[str, Any] = {a["name"]: a for a in live.get("/adapters")["adapters"]}
        for name, version in adapters.items():
            assert version in [v["version"] for v in live.get(f"/adapters/{name}")["versions"]]
            answer = live.post("/generate", {"prompt": "x", "max_tokens": 2, "adapters": [{"name": name}]})
            assert answer["adapters"][0]["version"] == listed[name]["version"]
        for name, number in tasks.items():  # the write after the last acknowledged one may have been committed too
            assert int(live.get(f"/tasks/{name}")["prompt"].partition(":")[0]) in (number, number + 3)
        quality = live.get("/tasks/sentiment/performance")["versions"][0]["quality"]
        (feedback,) = [entry for entry in quality if entry["source"] == "feedback"]
        assert scores <= feedback["samples"] <= scores + 1 and feedback["mean"] == 1.0
        assert set(jobs) <= {job["id"] for job in live.get("/jobs")["jobs"]}
        assert list((tmp_path / "state" / "store" / "incoming").iterdir()) == []
