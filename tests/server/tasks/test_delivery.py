"""What crosses from the engine's thread to the event loop: in order, and together."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.tasks.delivery import EventLoopDelivery


async def test_what_is_posted_is_handed_over_together_once_the_loop_is_woken() -> None:
    mailbox = EventLoopDelivery(asyncio.get_running_loop())
    arrived: list[int] = []

    def post(items: range) -> None:
        for item in items:
            mailbox.post(arrived.append, item)

    async def from_a_thread(items: range) -> None:
        thread = threading.Thread(target=post, args=(items,))
        thread.start()
        thread.join()

    await from_a_thread(range(3))
    for _ in range(3):
        await asyncio.sleep(0)
    assert arrived == [], "nobody has woken the loop"
    mailbox.wake()
    await from_a_thread(range(3, 6))
    await asyncio.sleep(0)
    assert arrived == [0, 1, 2, 3, 4, 5]
    mailbox.wake()
    await from_a_thread(range(6, 8))
    mailbox.wake()
    await asyncio.sleep(0)
    assert arrived == [0, 1, 2, 3, 4, 5, 6, 7]


async def test_a_receiver_that_fails_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    mailbox = EventLoopDelivery(asyncio.get_running_loop())
    arrived: list[int] = []

    def failing(item: int) -> None:
        raise RuntimeError("a fault of its own")

    for receiver in (failing, arrived.append):
        mailbox.post(receiver, 1)
    mailbox.wake()
    await asyncio.sleep(0)
    assert arrived == [1] and "a fault of its own" in caplog.text


async def test_a_loop_that_is_closed_is_left_alone() -> None:
    loop = asyncio.new_event_loop()
    mailbox = EventLoopDelivery(loop)
    arrived: list[int] = []
    loop.close()
    mailbox.post(arrived.append, 1)
    mailbox.wake()
    assert loop.is_closed() and arrived == [], "and nothing is raised"
