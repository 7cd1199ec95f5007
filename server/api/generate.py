"""`POST /generate` and `POST /classify`.

The path of a request: resolve the task (`tasks.resolve`), tokenize (`tasks.prompts`), start (`tasks.inference`), which
submits to the engine (`engine.engine`).
"""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from adapters.leases import Lease
from adapters.weights import Choice
from server.api import schemas
from server.api.error_responses import Responses, errors
from server.api.state import ServicesDep, StateDep
from server.api.stream import EventStream, check_complete, check_connected, on_disconnect, wait_finished
from server.engine.request import Delivery, Sampling, TokenLogprob
from server.errors import SHUTTING_DOWN, InvalidRequest, NotReady
from server.model.tokenizer import ModelTokenizer
from server.tasks import sampling
from server.tasks.definitions import check_labels
from server.tasks.generation import Caller, Generation, timings
from server.tasks.inference import Inference
from server.tasks.mix_key import adapters_json
from server.tasks.resolve import Target

router = APIRouter(tags=["generate"])

TaskQuery = Annotated[schemas.TaskQuery, Query()]

GENERATION_ERRORS = errors(400, 404, 422, 429, 500, 503, 504, 507)
STREAMED: Responses = {200: {"content": {"text/event-stream": {"schema": {}}}}}


@router.post("/generate", response_model=schemas.GenerateAnswer, responses={**GENERATION_ERRORS, **STREAMED})
async def generate(
    body: schemas.GenerateBody, request: Request, state: StateDep, services: ServicesDep, query: TaskQuery
) -> Response:
    """Continue a prompt through a task, a mix of adapters, or the base."""
    prompts = services.prompts
    with Call(services.inference, state.caller(request, body.deadline_ms)) as call:
        target = call.admit(services.resolver.task(query.task, requested_mix(body.adapters)))
        defaults = target.task.defaults if target.task else {}
        layers = requested_fields(body), defaults, sampling.OWN_DEFAULTS, prompts.limit
        sampling.build(*layers)  # checks all bounds before the prompt is tokenized
        ids = await prompts.encode_input(target.task, body.prompt)
        params = sampling.build(*layers, len(ids))
        if params.logprobs == 0:
            params = replace(params, logprobs=None)
        await check_connected(request)
        generation = call.start([ids], [params])
    if body.stream:
        return EventStream(generation, GenerateEvents(generation, prompts.tokenizer))
    await wait_finished(request.receive, generation)
    text = "".join(generation.replies[0].text)
    return json_response({**_final_fields(generation, prompts.tokenizer), "text": text})


@router.post("/classify", response_model=schemas.ClassifyAnswer, responses=GENERATION_ERRORS)
async def classify(
    body: schemas.ClassifyBody, request: Request, state: StateDep, services: ServicesDep, query: TaskQuery
) -> Response:
    """Probabilities of the given labels: a softmax over log p(label and end token | prompt), scored as one batch."""
    with Call(services.inference, state.caller(request, body.deadline_ms)) as call:
        target = call.admit(services.resolver.task(query.task, requested_mix(body.adapters)))
        labels = check_labels(body.labels) if body.labels else target.task.labels if target.task else ()
        if not labels:
            raise InvalidRequest("labels are needed: send `labels`, or define them in the task", "labels")
        services.engine.check_call(len(labels))
        disconnected = threading.Event()
        async with on_disconnect(request.receive, disconnected.set):
            encoded = await services.prompts.encode_labels(
                target.task, body.prompt, labels, call.caller.deadline, disconnected.is_set
            )
        if disconnected.is_set():
            raise ClientDisconnect
        generation = call.start(
            [ids for ids, _ in encoded],
            [Sampling(max_tokens=1, logprobs=0)] * len(encoded),
            scored=[count for _, count in encoded],
            labels=labels,
        )
    await wait_finished(request.receive, generation)
    check_complete(generation)
    answer = {**_common_fields(generation), "label": generation.answer_text(), "scores": generation.scores()}
    return json_response(answer)


class Call:
    """One client call until the engine has it: admits it, holds its adapter lease, and starts it.

    Use it as a context manager. A call that ends before `start` is counted in the metrics: as rejected if an exception
    leaves the block, as cancelled if the client disconnected.
    """

    def __init__(self, inference: Inference, caller: Caller) -> None:
        self.caller = caller
        self._inference = inference
        self._target: Target | None = None
        self._lease: Lease | None = None
        self._started = False

    def __enter__(self) -> Call:
        return self

    def admit(self, target: Target) -> Target:
        """Check the limits of key, task and engine, and lease the versions of the adapters.

        The lease keeps these versions available while the prompt is tokenized, even if the task or the adapters change.

        Raises:
            QueueFull, UnknownAdapter, InvalidChoice, NoRoom, NoCapacity: the call cannot be served.
        """
        self._target = target
        self._inference.check(target, self.caller)
        self._lease = self._inference.lease(target)
        self._target = replace(target, held=self._lease)
        return self._target

    def start(self, prompts: list[list[int]], samplings: list[Sampling], **options: Any) -> Generation:
        """Submit the call to the engine: see `Inference.start`, which counts it from here on."""
        assert self._target is not None, "admit comes first"
        self._started = True
        return self._inference.start(self._target, prompts, samplings, self.caller, **options)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._lease is not None:
            self._lease.release()  # the generation has its own
        if self._started:
            return
        if isinstance(error, ClientDisconnect):
            self._inference.record_disconnect(self._target, self.caller)
        elif isinstance(error, Exception):
            self._inference.record_rejection(self._target, error, self.caller)
        elif isinstance(error, asyncio.CancelledError):  # RequestBoundary answers with this error
            self._inference.record_rejection(self._target, NotReady(SHUTTING_DOWN), self.caller)


class GenerateEvents:
    """Events of a /generate stream: `{"id", "text"}` for each step, then all other fields."""

    def __init__(self, generation: Generation, tokenizer: ModelTokenizer) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._prefix = f'data: {{"id":{json.dumps(generation.id)},"text":'

    def first(self) -> bytes:
        return b""

    def step(self, index: int, delivery: Delivery) -> bytes:
        return f"{self._prefix}{json.dumps(delivery.text)}}}\n\n".encode() if delivery.text else b""

    def last(self) -> bytes:
        return f"data: {json.dumps(_final_fields(self._generation, self._tokenizer))}\n\n".encode()


def _final_fields(generation: Generation, tokenizer: ModelTokenizer) -> dict[str, Any]:
    """All fields of a /generate answer except the text."""
    reply = generation.replies[0]
    with_logprobs = reply.request.sampling.logprobs is not None
    return {
        **_common_fields(generation),
        "finish_reason": reply.finish_reason,
        "logprobs": [_logprob_entry(t, tokenizer) for t in reply.logprobs] if with_logprobs else None,
    }


def _common_fields(generation: Generation) -> dict[str, Any]:
    task = generation.target.task
    return {
        "id": generation.id,
        "task": task.name if task else None,
        "adapters": adapters_json(generation.versions),
        "usage": generation.usage(),
        "timings": timings(generation),
    }


def _logprob_entry(token: TokenLogprob, tokenizer: ModelTokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token.id),
        "logprob": finite(token.logprob),
        "top": [{"token": tokenizer.token_text(id), "logprob": finite(logprob)} for id, logprob in token.top],
    }


def finite(logprob: float) -> float:
    """Replace -inf, which JSON does not have, by -9999."""
    return max(logprob, -9999.0)


def requested_fields(body: schemas.GenerationFields) -> dict[str, Any]:
    """The sampling fields that the request sets. Raises InvalidRequest for two different lengths."""
    fields = {name: getattr(body, name) for name in schemas.SamplingFields.model_fields}
    if hasattr(body, "logprobs"):
        fields["logprobs"] = body.logprobs
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest("max_tokens and max_completion_tokens differ; send one", "max_completion_tokens")
        fields["max_tokens"] = body.max_completion_tokens
    return {name: value for name, value in fields.items() if value is not None}


def requested_mix(adapters: list[schemas.Weighted] | None) -> Choice | None:
    """The mix that the request sets; None if it leaves the choice to the task."""
    return None if adapters is None else [(a.name, a.weight) for a in adapters]


def json_response(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response without validation by a response model."""
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")
