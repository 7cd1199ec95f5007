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
