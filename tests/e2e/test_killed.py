"""kill -9 of a real server while adapters, tasks and scores are written: all that was confirmed is there again."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import serving
from tests.waiting import until

pytestmark = pytest.mark.e2e
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def test_a_crash_in_native_code_says_what_ran_and_a_restart_brings_all_back(
    tmp_path: Path, embedded: Path, write_random: Callable[..., Path]
) -> None:
    """The signal of a crash, sent while a step runs. The kernels themselves are never given what would crash them."""
    folder, log = write_random(tmp_path / "f", rank=4, seed=1), tmp_path / "first.log"
    with serving(tmp_path / "state", log=log) as live:
        files = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
        version = live.client.post("/adapters", files=files, data={"name": "kept"}).json()["version"]
        asked = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True, "adapters": [{"name": "kept"}]}
        with pytest.raises(httpx.HTTPError), live.client.stream("POST", "/generate", json=asked) as answer:
            lines = answer.iter_lines()
            id = json.loads(next(lines)[6:])["id"]
            live.process.send_signal(signal.SIGSEGV)
            for _ in lines:
                continue
        assert live.process.wait(60) == -signal.SIGSEGV
    said = log.read_text()
    assert f"SIGSEGV in native code; the last step ran {id}.0 {version.partition('@')[2]}\n" in said
    assert "Fatal Python error: Segmentation fault" in said
    with serving(tmp_path / "state", log=tmp_path / "second.log") as live:
        assert live.get("/adapters/kept")["version"] == version
        assert live.post("/generate", {"prompt": "x", "max_tokens": 2, "adapters": [{"name": "kept"}]})["text"]


def test_nothing_that_was_confirmed_is_lost(tmp_path: Path, embedded: Path, write_random: Callable[..., Path]) -> None:
    folders = [write_random(tmp_path / f"f{i}", rank=4, seed=i) for i in range(3)]
    files = [{name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)} for folder in folders]
    adapters: dict[str, str] = {}
    """The version of each name that was confirmed last."""
    tasks: dict[str, str] = {}
    scores = 0

    def register(live: Any) -> None:
        for n in range(10**6):
            name = f"n{n % 5}"
            answer = live.client.put(f"/adapters/{name}", files=files[n % 3])
            adapters[name] = answer.json()["version"]

    def define(live: Any) -> None:
        for n in range(10**6):
            body = {"prompt": f"{n}: {{input}}", "route": {"choice": []}}
            live.client.put(f"/tasks/t{n % 3}", json=body).raise_for_status()
            tasks[f"t{n % 3}"] = body["prompt"]

    def score(live: Any) -> None:
        nonlocal scores
        for n in range(10**6):
            answer = live.post("/generate?task=sentiment", {"prompt": f"film {n}", "max_tokens": 1})
            body = {"id": answer["id"], "score": 1.0}
            live.client.post("/tasks/sentiment/feedback", json=body).raise_for_status()
            scores += 1

    def until_killed(work: Callable[[Any], None], live: Any) -> None:
        try:
            work(live)
        except httpx.TransportError:  # and no status, which says that the server still answers
            return

    with serving(tmp_path / "state") as live:
        threads = [threading.Thread(target=until_killed, args=(work, live)) for work in (register, define, score)]
        for thread in threads:
            thread.start()
        until(lambda: len(adapters) >= 5 and len(tasks) >= 3 and scores >= 5, "they do not get on", every=0.01)
        live.process.kill()
        live.process.wait()
        for thread in threads:
            thread.join()
    with serving(tmp_path / "state", log=tmp_path / "second.log") as live:
        listed = {a["name"]: a for a in live.get("/adapters")["adapters"]}
        for name, version in adapters.items():
            assert version in [v["version"] for v in live.get(f"/adapters/{name}")["versions"]]
            made = live.post("/generate", {"prompt": "x", "max_tokens": 2, "adapters": [{"name": name}]})
            assert made["adapters"][0]["version"] == listed[name]["version"]
        for name, prompt in tasks.items():
            number = int(live.get(f"/tasks/{name}")["prompt"].partition(":")[0])
            assert number in (int(prompt.partition(":")[0]), int(prompt.partition(":")[0]) + 3), "this, or the next"
        (quality,) = live.get("/tasks/sentiment/performance")["versions"][0]["quality"]
        assert scores <= quality["samples"] <= scores + 1 and quality["mean"] == 1.0
        assert list((tmp_path / "state" / "store" / "incoming").iterdir()) == []
        uploads = tmp_path / "state" / "uploads"
        assert not uploads.exists() or list(uploads.iterdir()) == []
