"""`POST /generate` and `POST /classify`: our own routes to the engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from adapters.weights import Choice
from server.api import schemas
from server.api.error_responses import Responses, errors
from server.api.state import Services, ServicesDep, StateDep
from server.api.stream import EventStream, check_complete, finished, listening, still_there
from server.engine.request import Delivery, Sampling, TokenLogprob
from server.errors import SHUTTING_DOWN, InvalidRequest, NotReady
from server.model.tokenizer import ModelTokenizer
from server.tasks import sampling
from server.tasks.definitions import check_labels
from server.tasks.inference import Caller, Generation, Inference, timings
from server.tasks.mix_key import adapters_json
from server.tasks.resolve import Target

router = APIRouter(tags=["generate"])

TaskQuery = Annotated[schemas.TaskQuery, Query()]

CALLED = errors(400, 404, 422, 429, 500, 503, 504, 507)
STREAMED: Responses = {200: {"content": {"text/event-stream": {"schema": {}}}}}
"""With `stream`. The document has no word for events one by one, so it says nothing of their form."""


@router.post(
    "/generate",
    response_model=schemas.GenerateAnswer,
    responses={**CALLED, **STREAMED},
)
async def generate(
    body: schemas.GenerateBody, request: Request, runtime: StateDep, parts: ServicesDep, query: TaskQuery
) -> Response:
    """Continue a prompt through a task, a mix of adapters, or the base."""
    caller = runtime.caller(request, body.deadline_ms)
    with resolve_task(parts, request, query.task, body.adapters, caller) as target:
        with counted(parts.inference, target, caller):
            asked = asked_fields(body)
            defaults = target.task.defaults if target.task else {}
            layers = asked, defaults, sampling.OWN_DEFAULTS, parts.prompts.limit
            sampling.build(*layers)  # what is right for no prompt is refused before one is tokenized
            ids = await parts.prompts.encode_input(target.task, body.prompt)
            chosen = sampling.build(*layers, len(ids))
            await still_there(request)
        if chosen.logprobs == 0:
            chosen = replace(chosen, logprobs=None)
        generation = parts.inference.start(target, [ids], [chosen], caller)
    if body.stream:
        return EventStream(generation, _Events(generation, parts.prompts.text))
    await finished(request.receive, generation)
    answer = {**ending(generation, parts.prompts.text), "text": "".join(generation.replies[0].text)}
    return json_response(answer)


@router.post("/classify", response_model=schemas.ClassifyAnswer, responses=CALLED)
async def classify(
    body: schemas.ClassifyBody, request: Request, runtime: StateDep, parts: ServicesDep, query: TaskQuery
) -> Response:
    """Probabilities of given labels: softmax over the log-probabilities of each label and the end, as one batch."""
    caller = runtime.caller(request, body.deadline_ms)
    with resolve_task(parts, request, query.task, body.adapters, caller) as target:
        with counted(parts.inference, target, caller):
            labels = check_labels(body.labels) if body.labels else target.task.labels if target.task else ()
            if not labels:
                raise InvalidRequest("labels are needed: give them here, or the task some", "labels")
            parts.engine.check_call(len(labels))
            left = threading.Event()
            async with listening(request.receive, left.set):
                encoded = await parts.prompts.encode_labels(
                    target.task, body.prompt, labels, caller.deadline, left.is_set
                )
            if left.is_set():
                raise ClientDisconnect
        generation = parts.inference.start(
            target,
            [ids for ids, _ in encoded],
            [Sampling(max_tokens=1, logprobs=0)] * len(encoded),
            caller,
            scored=[count for _, count in encoded],
            labels=labels,
        )
    await finished(request.receive, generation)
    check_complete(generation)
    return json_response({**_common(generation), "label": generation.answer_text(), "scores": generation.scores()})


class _Events:
    """The stream of /generate: `{"id", "text"}` per step, then all but the text."""

    def __init__(self, generation: Generation, text: ModelTokenizer) -> None:
        self._generation = generation
        self._text = text
        self._prefix = f'data: {{"id":{json.dumps(generation.id)},"text":'

    def first(self) -> bytes:
        return b""

    def step(self, index: int, delivery: Delivery) -> bytes:
        return f"{self._prefix}{json.dumps(delivery.text)}}}\n\n".encode() if delivery.text else b""

    def last(self) -> bytes:
        return f"data: {json.dumps(ending(self._generation, self._text))}\n\n".encode()


def ending(generation: Generation, text: ModelTokenizer) -> dict[str, Any]:
    """All of /generate's answer but the text."""
    reply = generation.replies[0]
    wanted = reply.request.sampling.logprobs is not None
    return {
        **_common(generation),
        "finish_reason": reply.finish_reason,
        "logprobs": [entry(t, text) for t in reply.logprobs] if wanted else None,
    }


def _common(generation: Generation) -> dict[str, Any]:
    task = generation.target.task
    return {
        "id": generation.id,
        "task": task.name if task else None,
        "adapters": adapters_json(generation.versions),
        "usage": generation.usage(),
        "timings": timings(generation),
    }


def entry(token: TokenLogprob, text: ModelTokenizer) -> dict[str, Any]:
    """One token's log-probability, as our own routes show it."""
    return {
        "token": text.token_text(token.id),
        "logprob": finite(token.logprob),
        "top": [{"token": text.token_text(id), "logprob": finite(logprob)} for id, logprob in token.top],
    }


def finite(logprob: float) -> float:
    """JSON has no infinity: the log-probability of the impossible is -9999."""
    return max(logprob, -9999.0)


def asked_fields(body: schemas.GenerationFields) -> dict[str, Any]:
    """The generation fields that a request gave. Raises InvalidRequest if it gave two lengths."""
    fields = {name: getattr(body, name) for name in _ASKED}
    if hasattr(body, "logprobs"):
        fields["logprobs"] = body.logprobs
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
        fields["max_tokens"] = body.max_completion_tokens
    return {name: value for name, value in fields.items() if value is not None}


_ASKED = [
    name
    for name in schemas.GenerationFields.model_fields
    if name not in ("max_completion_tokens", "stream", "adapters", "deadline_ms")
]


def override(adapters: list[schemas.Weighted] | None) -> Choice | None:
    """The choice that a request names itself, if it does."""
    return None if adapters is None else [(a.name, a.weight) for a in adapters]


def resolve_task(
    parts: Services, request: Request, task: str | None, adapters: list[schemas.Weighted] | None, caller: Caller
) -> AbstractContextManager[Target]:
    """The target of `?task=`, held. Raises InvalidRequest, UnknownName and what `within_limits` does, which are
    counted."""

    def resolve() -> Target:
        if len(request.query_params.multi_items()) > 1:  # no other field gets this far
            raise InvalidRequest("the query names more than one task; give one", "task")
        return parts.resolver.task(task, override(adapters))

    return within_limits(parts, resolve, caller)


@contextmanager
def within_limits(parts: Services, resolve: Callable[[], Target], caller: Caller) -> Iterator[Target]:
    """What `resolve` answers, if the key and the task may have one more call, and its mix can be
    adapters_json; its versions
    are held inside, so that a task may change its adapters, and these go, while a call of before is being prepared.
    Raises what `resolve`, `Inference.check` and `Inference.lease` do, which is counted."""
    with counted(parts.inference, None, caller):
        target = resolve()
    with counted(parts.inference, target, caller):
        parts.inference.check(target, caller)
        lease = parts.inference.lease(target)
    with lease:
        yield replace(target, held=lease)


class counted:
    """Records a call that fails before it reaches the engine, whose client leaves, or that the server's end overtakes;
    the exception goes on."""

    def __init__(self, inference: Inference, target: Target | None, caller: Caller) -> None:
        self._inference, self._target, self._caller = inference, target, caller

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ClientDisconnect):
            self._inference.record_disconnect(self._target, self._caller)
        elif isinstance(error, Exception):
            self._inference.record_rejection(self._target, error, self._caller)
        elif isinstance(error, asyncio.CancelledError):  # `Boundary` answers so
            self._inference.record_rejection(self._target, NotReady(SHUTTING_DOWN), self._caller)


def json_response(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON body as it is, without a second pass through a schema."""
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")
