"""The work behind an answer, and a client that leaves."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from server.api.stream import working
from server.api.types import Message


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
        async with working(receive, generation):
            await asyncio.sleep(0)
            raise ValueError("the answer failed")
    await asyncio.sleep(0)
    assert sorted(told) == ["cancelled", "deaf"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_whole_answer_that_the_server_s_end_cut_short_is_none(
    live: Any, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """No finish_reason of OpenAI's would tell it."""
    monkeypatch.setattr("server.tasks.inference.Generation.cancelled", property(lambda generation: True))
    path, asked = ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}) if chat else (
        "completions", {"prompt": "x"})  # fmt: skip
    answer = live.http.post(f"/v1/{path}", json={"model": "tiny", "max_tokens": 2, **asked})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "stopped before the answer was complete" in answer.json()["error"]["message"]
