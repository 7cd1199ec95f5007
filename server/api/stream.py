"""Server-sent events, and stopping work when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import error_reply
from server.engine.request import Delivery
from server.errors import NotReady
from server.tasks.generation import Generation

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Encoder(Protocol):
    """Turns the deliveries of a generation into bytes of whole events, possibly none."""

    def first(self) -> bytes: ...

    def step(self, index: int, delivery: Delivery) -> bytes: ...

    def last(self) -> bytes: ...


@contextlib.asynccontextmanager
async def on_disconnect(receive: Receive, callback: Callable[[], object]) -> AsyncIterator[None]:
    """Call `callback` if the client disconnects inside the block."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        callback()

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()


@contextlib.asynccontextmanager
async def cancelled_on_exit(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancel what is left of the generation when the client disconnects or the block ends for any reason."""
    try:
        async with on_disconnect(receive, generation.cancel):
            yield
    finally:
        generation.cancel()


async def wait_finished(receive: Receive, generation: Generation) -> None:
    """Wait for a generation; cancel it if the client disconnects. Raises its error."""
    async with cancelled_on_exit(receive, generation):
        await generation.finished()


async def check_connected(request: Request) -> None:
    """Raises ClientDisconnect if the client has already disconnected."""
    await asyncio.sleep(0)  # lets the event loop read the socket
    if await request.is_disconnected():
        raise ClientDisconnect


async def wait_for_result(receive: Receive, future: Future[T]) -> T:
    """The result of `future`, which is cancelled if the client disconnects or the wait is cancelled.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    disconnected = False

    def cancel() -> None:
        nonlocal disconnected
        disconnected = True
        future.cancel()

    async with on_disconnect(receive, cancel):
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if disconnected:
                raise ClientDisconnect from None
            raise


class EventStream(Response):
    """A streamed answer. An error before the first byte is a plain error response; later it is the last event."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, encoder: Encoder) -> None:
        super().__init__()
        self.generation = generation
        self.encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_on_exit(receive, self.generation):
            # In its own task: otherwise every event resumes all layers of routes and middleware.
            await asyncio.create_task(self._send_events(scope["state"]["request_id"], send))

    async def _send_events(self, request_id: str, send: Send) -> None:
        steps = self.generation.steps()
        arrived = await anext(steps)
        body, delayed = self.encoder.first() + self._encode(arrived), False  # raises if there is no answer
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            while True:
                if body and not delayed:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    body = b""
                arrived = await anext(steps)
                body += self._encode(arrived)
                # Events without text are sent together with the next step: this halves the cost of sending.
                delayed = not delayed and not any(delivery.text for _, delivery in arrived)
        except StopAsyncIteration:
            body += self.encoder.last() + DONE
        except Exception as error:
            body += b"data: " + error_reply(error, request_id).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _encode(self, arrived: list[tuple[int, Delivery]]) -> bytes:
        return b"".join([self.encoder.step(index, delivery) for index, delivery in arrived])


def check_complete(generation: Generation) -> None:
    """Raises NotReady if the server cancelled the answer: OpenAI has no finish reason for that."""
    if generation.cancelled:
        raise incomplete_answer()


def incomplete_answer() -> NotReady:
    return NotReady("the server stopped before the answer was complete; send the request again", retry_after=2.0)
