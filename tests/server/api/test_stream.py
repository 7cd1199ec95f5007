"""Server-sent events: grouping of events, errors, and streams that the server stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.types import Message

from server.api.stream import EventStream, cancelled_on_exit
from server.engine.request import Delivery
from server.errors import DeadlineExceeded
from tests.waiting import SECONDS, until

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "tiny", "prompt": "x"}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}),
]


def abort(live: Any) -> None:
    """What `loramux serve` does at the end of the drain."""
    live.services.inference._delivery.loop.call_soon_threadsafe(live.state.abort_requests)


async def test_leaving_the_block_cancels_the_generation_and_the_listener() -> None:
    events: list[str] = []

    async def receive() -> Message:
        try:
            await asyncio.Event().wait()
        finally:
            events.append("listener cancelled")
        raise AssertionError

    generation: Any = SimpleNamespace(cancel=lambda: events.append("generation cancelled"))
    with pytest.raises(ValueError, match="the answer failed"):
        async with cancelled_on_exit(receive, generation):
            await asyncio.sleep(0)
            raise ValueError("the answer failed")
    await asyncio.sleep(0)
    assert sorted(events) == ["generation cancelled", "listener cancelled"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_incomplete_answer_is_503(live: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]) -> None:
    """OpenAI has no finish reason for it."""
    monkeypatch.setattr("server.tasks.generation.Generation.cancelled", property(lambda generation: True))
    answer = live.http.post(path, json={**body, "max_tokens": 2})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "stopped before the answer was complete" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_incomplete_stream_ends_with_an_error(live: Any, path: str, body: dict[str, Any]) -> None:
    live.slow_down(0.1)
    body = {**body, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", path, json=body) as answer:
        received = answer.iter_lines()
        next(received)
        abort(live)
        events = [json.loads(line.removeprefix("data: ")) for line in received if line]
    assert "stopped before the answer was complete" in events[-1]["error"]["message"]
    assert not any(choice["finish_reason"] for event in events[:-1] for choice in event["choices"])
    assert live.idle()


def test_stream_that_is_stopped_before_its_first_token_is_503(start: Any) -> None:
    live = start(max_batch=1)
    live.slow_down(0.05)
    path, body = ROUTES[1]
    long = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", "/generate", json=long) as running, ThreadPoolExecutor(1) as pool:
        received = running.iter_lines()
        next(received)
        queued = pool.submit(httpx.post, f"{live.url}{path}", json={**body, "stream": True}, timeout=SECONDS)
        until(lambda: live.stats()["waiting"])
        abort(live)
        answer = queued.result(SECONDS)
        assert [line for line in received if line][-1] == "data: [DONE]", "/generate has finish_reason cancelled"
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"


async def sent_bodies(texts: list[str], error: Exception | None = None) -> list[bytes]:
    """The body messages of a stream whose steps have these texts and then fail with `error`."""
    sent: list[bytes] = []

    async def steps() -> AsyncIterator[list[tuple[int, Delivery]]]:
        for text in texts:
            yield [(0, Delivery(text, (1,)))]
        if error is not None:
            raise error

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    async def receive() -> Message:
        return await asyncio.Future()

    generation: Any = SimpleNamespace(steps=steps, cancel=lambda: None)
    encoder: Any = SimpleNamespace(
        first=lambda: b"(", step=lambda index, delivery: delivery.text.encode() or b"-", last=lambda: b")"
    )
    await EventStream(generation, encoder)({"state": {"request_id": "r"}}, receive, send)
    return sent


async def test_event_without_text_is_sent_with_the_next_one() -> None:
    sent = await sent_bodies(["", "a", "", "b", "", "", "", "c", ""])
    assert sent == [b"(-", b"a", b"-b", b"--", b"-c", b"-)data: [DONE]\n\n"]


async def test_error_is_the_last_event() -> None:
    first, last = await sent_bodies(["a", ""], DeadlineExceeded("too late"))
    assert first == b"(a"
    assert last.startswith(b'-data: {"error"') and b"too late" in last
    assert last.endswith(b"}\n\n") and b"[DONE]" not in last
