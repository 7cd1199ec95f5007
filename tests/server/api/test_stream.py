"""The work behind an answer, and a client that leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.stream import EventStream, cancelled_on_exit
from server.api.types import Message
from server.engine.request import Delivery
from server.errors import DeadlineExceeded
from tests.waiting import SECONDS, until


async def test_what_leaves_early_stops_its_work_and_listens_no_more() -> None:
    told: list[str] = []

    async def receive() -> Message:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append("deaf")
            raise
        raise AssertionError

    generation: Any = SimpleNamespace(cancel=lambda: told.append("cancelled"))
    with pytest.raises(ValueError, match="the answer failed"):
        async with cancelled_on_exit(receive, generation):
            await asyncio.sleep(0)
            raise ValueError("the answer failed")
    await asyncio.sleep(0)
    assert sorted(told) == ["cancelled", "deaf"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_whole_answer_that_the_server_s_end_cut_short_is_none(
    live: Any, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """No finish_reason of OpenAI's would tell it."""
    monkeypatch.setattr("server.tasks.generation.Generation.cancelled", property(lambda generation: True))
    path, asked = ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}) if chat else (
        "completions", {"prompt": "x"})  # fmt: skip
    answer = live.http.post(f"/v1/{path}", json={"model": "tiny", "max_tokens": 2, **asked})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "stopped before the answer was complete" in answer.json()["error"]["message"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_streamed_answer_that_the_server_s_end_cut_short_ends_with_an_error(live: Any, chat: bool) -> None:
    live.slow_down(0.1)
    path, asked = ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}) if chat else (
        "completions", {"prompt": "x"})  # fmt: skip
    body = {"model": "tiny", "max_tokens": 200, "ignore_eos": True, "stream": True, **asked}
    with live.http.stream("POST", f"/v1/{path}", json=body) as answer:
        received = answer.iter_lines()
        next(received)
        live.services.inference._delivery.loop.call_soon_threadsafe(live.state.abort_requests)
        events = [json.loads(line.removeprefix("data: ")) for line in received if line]
    assert "stopped before the answer was complete" in events[-1]["error"]["message"]
    assert not any(choice["finish_reason"] for event in events[:-1] for choice in event["choices"])
    assert live.idle()


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_that_was_cut_short_before_it_began_is_answered_with_a_status(start: Any, chat: bool) -> None:
    live = start(max_batch=1)
    live.slow_down(0.05)
    path, asked = ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}) if chat else (
        "completions", {"prompt": "x"})  # fmt: skip
    body = {"model": "tiny", "max_tokens": 5, "stream": True, **asked}
    long = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", "/generate", json=long) as running, ThreadPoolExecutor(1) as pool:
        received = running.iter_lines()
        next(received)
        queued = pool.submit(httpx.post, f"{live.url}/v1/{path}", json=body, timeout=SECONDS)
        until(lambda: live.stats()["waiting"])
        live.services.inference._delivery.loop.call_soon_threadsafe(live.state.abort_requests)
        answer = queued.result(SECONDS)
        assert [line for line in received if line][-1] == "data: [DONE]", "how far it came is an answer there"
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "not_ready"


async def streamed(texts: list[str], error: Exception | None = None) -> list[bytes]:
    """What is sent of an answer whose steps have these texts, and which fails after them if there is an `error`."""
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


async def test_what_shows_nothing_goes_with_the_step_after_it() -> None:
    """But for an answer's first token, and never two steps late: clients count each token's event, and time them."""
    sent = await streamed(["", "a", "", "b", "", "", "", "c", ""])
    assert sent == [b"(-", b"a", b"-b", b"--", b"-c", b"-)data: [DONE]\n\n"]


async def test_a_stream_that_fails_says_what_it_had_and_ends_with_the_error() -> None:
    """Without the mark of an answer that is whole."""
    first, last = await streamed(["a", ""], DeadlineExceeded("too late"))
    assert first == b"(a"
    assert last.startswith(b'-data: {"error"') and b"too late" in last
    assert last.endswith(b"}\n\n") and b"[DONE]" not in last
