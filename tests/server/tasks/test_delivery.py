"""Delivery from other threads to the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.tasks.delivery import EventLoopDelivery


async def test_posts_are_delivered_in_order_after_a_wake() -> None:
    delivery, received = EventLoopDelivery(asyncio.get_running_loop()), list[int]()

    def post(items: range) -> None:
        def run() -> None:
            for item in items:
                delivery.post(received.append, item)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    post(range(3))
    for _ in range(3):
        await asyncio.sleep(0)
    assert received == []
    delivery.wake()
    post(range(3, 6))
    await asyncio.sleep(0)
    assert received == [*range(6)]
    delivery.wake()
    post(range(6, 8))
    delivery.wake()
    await asyncio.sleep(0)
    assert received == [*range(8)]


async def test_an_error_of_one_receiver_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    delivery, received = EventLoopDelivery(asyncio.get_running_loop()), list[int]()

    def failing(item: int) -> None:
        raise RuntimeError("an error of its own")

    for receiver in (failing, received.append):
        delivery.post(receiver, 1)
    delivery.wake()
    await asyncio.sleep(0)
    assert received == [1] and "an error of its own" in caplog.text


def test_nothing_is_delivered_to_a_closed_loop() -> None:
    loop, received = asyncio.new_event_loop(), list[int]()
    delivery = EventLoopDelivery(loop)
    loop.close()
    delivery.post(received.append, 1)
    delivery.wake()
    assert received == []
