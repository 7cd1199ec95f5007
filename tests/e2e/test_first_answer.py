"""First steps of a new user: tasks of the bundled adapters, streaming, and adapters that come and go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Live

pytestmark = pytest.mark.e2e


def test_the_sentiment_task(default_server: Live) -> None:
    answer = default_server.post("/generate?task=sentiment", {"prompt": "A dull, lifeless film."})
    assert answer["text"] == "negative"
    assert answer["finish_reason"] == "stop"
    assert answer["task"] == "sentiment"
    assert answer["adapters"][0]["version"].startswith("sentiment@")
    assert default_server.post("/generate?task=sentiment", {"prompt": "A stirring, funny film."})["text"] == "positive"
    shown = default_server.client.get("/adapters/sentiment").json()
    assert shown["base"].startswith("HuggingFaceTB/") and shown["notes"] == [], "the base is known by its Hub name too"


def test_streamed_text_equals_unstreamed_text(default_server: Live) -> None:
    body = {"prompt": "The old lighthouse", "max_tokens": 24, "adapters": []}
    whole = default_server.post("/generate", body)
    pieces, last = [], None
    with default_server.client.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    for event in map(json.loads, events[:-1]):
        pieces.append(event.get("text", "") if "finish_reason" not in event else "")
        last = event
    assert "".join(pieces) == whole["text"]
    assert last is not None and last["finish_reason"] == whole["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 24


def test_removed_adapters_free_memory_and_files(
    default_server: Live, write_random: Callable[..., Path], tmp_path: Path
) -> None:
    """Register, use and remove 40 adapters. The base's log-probabilities stay bit-equal."""
    live = default_server
    base = {"prompt": "The engine coughed twice", "max_tokens": 8, "adapters": [], "logprobs": 5}
    before = live.post("/generate", base)["logprobs"]
    folder = write_random(tmp_path / "cycle", rank=4, seed=9)
    files = {n: (folder / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")}

    def cycle() -> None:
        assert live.client.post("/adapters", files=files, data={"name": "cycle"}).status_code == 201
        live.post("/generate", {"prompt": "Hi", "max_tokens": 1, "adapters": [{"name": "cycle"}]})
        assert live.client.delete("/adapters/cycle").status_code == 202

    for _ in range(10):
        cycle()
    descriptors, resident = live.descriptors(), live.resident()
    for _ in range(30):
        cycle()
    assert live.descriptors() <= descriptors
    assert live.resident() <= resident + 8 * 2**20
    assert live.post("/generate", base)["logprobs"] == before
    names = [a["name"] for a in live.get("/adapters")["adapters"]]
    assert "cycle" not in names
