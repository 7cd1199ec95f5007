"""Server-sent events, and noticing that a client has gone away.

Owns the wire form of a stream. What an event says is the encoder's, one for each kind of answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.errors import answer
from server.api.types import Receive, Scope, Send
from server.engine.request import Delivery
from server.errors import NotReady
from server.tasks.inference import Generation

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Encoder(Protocol):
    """What a stream says: bytes of whole events, possibly none."""

    def first(self) -> bytes: ...

    def step(self, index: int, delivery: Delivery) -> bytes: ...

    def last(self) -> bytes: ...


@contextlib.asynccontextmanager
async def listening(receive: Receive, leave: Callable[[], object]) -> AsyncIterator[None]:
    """While inside, `leave` is called once the client has gone away."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        leave()

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()


@contextlib.asynccontextmanager
async def working(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """While inside, a client that goes away stops its work; after, so does leaving early for any reason."""
    try:
        async with listening(receive, generation.cancel):
            yield
    finally:
        generation.cancel()


async def finished(receive: Receive, generation: Generation) -> None:
    """Wait for a whole answer, as long as there is somebody to send it to. Raises the generation's error."""
    async with working(receive, generation):
        await generation.finished()


async def still_there(request: Request) -> None:
    """Raises ClientDisconnect for a client that has sent a request and gone: nothing is begun for it."""
    await asyncio.sleep(0)  # in which the loop hears of it
    if await request.is_disconnected():
        raise ClientDisconnect


async def answered(receive: Receive, future: Future[T]) -> T:
    """What `future` gives, as long as there is somebody to send it to. It is cancelled when it is not waited for any
    more.

    Raises its error, and ClientDisconnect when the client goes away.
    """
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        future.cancel()

    async with listening(receive, leave):
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if gone:
                raise ClientDisconnect from None
            raise


class EventStream(Response):
    """A streamed answer. A failure before the first byte is a plain error, after it the last event."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, encoder: Encoder) -> None:
        super().__init__()
        self.generation = generation
        self.encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with working(receive, self.generation):
            # As a task of its own: each event would otherwise resume every layer of the routes and middleware first.
            await asyncio.create_task(self._answer(scope["state"]["request_id"], send))

    async def _answer(self, request_id: str, send: Send) -> None:
        steps = self.generation.steps()
        arrived = await anext(steps)
        body, held = self.encoder.first() + self._said(arrived), False  # it may say that there is no answer
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            while True:
                if body and not held:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    body = b""
                arrived = await anext(steps)
                body += self._said(arrived)
                # What shows nothing goes with the step after it, if it is not the first: half of what it costs to send.
                held = not held and not any(delivery.text for _, delivery in arrived)
        except StopAsyncIteration:
            body += self._end()
        except Exception as error:
            body += b"data: " + answer(error, request_id).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _said(self, arrived: list[tuple[int, Delivery]]) -> bytes:
        return b"".join([self.encoder.step(index, delivery) for index, delivery in arrived])

    def _end(self) -> bytes:
        return self.encoder.last() + DONE


def check_complete(generation: Generation) -> None:
    """Raises NotReady if the server cut the answer short, which OpenAI's finish reasons have no word for."""
    if generation.cancelled:
        raise cut_short()


def cut_short() -> NotReady:
    """The error for an answer that the server's end has cut short."""
    return NotReady("the server stopped before the answer was complete; send the request again", retry_after=2.0)
