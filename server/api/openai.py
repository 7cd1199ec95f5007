"""`/v1/models`, `/v1/completions`, `/v1/chat/completions`: OpenAI's shapes over the same engine.

What an answer looks like is in `openai_shapes`; which fields are accepted, in `openai_schemas`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from server.api import openai_schemas as schemas
from server.api.error_responses import errors
from server.api.generate import STREAMED, asked_fields, counted, json_response, override, within_limits
from server.api.openai_shapes import ChatShape, CompletionShape, Shape, V1Events
from server.api.state import Services, ServicesDep, StateDep
from server.api.stream import EventStream, answered, check_complete, finished, still_there
from server.engine.request import Constraint
from server.errors import DeadlineExceeded, InvalidRequest
from server.tasks import sampling
from server.tasks.inference import Caller, new_id, samplings_per_choice
from server.tasks.resolve import Target

router = APIRouter(prefix="/v1", tags=["openai"])

CALLED = errors(400, 404, 429, 500, 503, 504, 507)
Layers = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], sampling.ContextLimit]


@router.get("/models", response_model=schemas.ModelList, responses=errors(503))
async def list_models(parts: ServicesDep) -> dict[str, Any]:
    """The base, the tasks, and the adapters; an adapter whose name a task has is `adapter:<name>`."""
    return {"object": "list", "data": models(parts)}


@router.get("/models/{model}", response_model=schemas.ModelEntry, responses=errors(400, 404, 503))
async def get_model(model: Annotated[str, Path(max_length=256)], parts: ServicesDep) -> dict[str, Any]:
    """One entry of the list; exact versions, and `adapter:<name>` of any adapter, are told of too."""
    for entry in models(parts):
        if entry["id"] == model:
            return entry
    parts.resolver.model(model, None)
    return _entry(parts, model, "adapter", parts.model.name)


def models(parts: Services) -> list[dict[str, Any]]:
    """Every id that `model` may be, exact versions aside."""
    base = parts.model.name
    tasks = dict.fromkeys(task.name for task in parts.tasks.all())
    found: list[tuple[str, str, str | None]] = [(base, "base", None), *((name, "task", base) for name in tasks)]
    found += [(f"adapter:{a}" if a in tasks else a, "adapter", base) for a in parts.registry.names()]
    return [_entry(parts, *entry) for entry in found]


def _entry(parts: Services, id: str, kind: str, parent: str | None) -> dict[str, Any]:
    """`root` and `max_model_len` are vLLM's, which its benchmark and other clients read."""
    told = {"id": id, "object": "model", "created": parts.model.created, "owned_by": "loramux"}
    return {**told, "kind": kind, "parent": parent, "root": id, "max_model_len": parts.prompts.limit.context}


@router.post("/completions", response_model=schemas.Completion, responses={**CALLED, **STREAMED})
async def completions(
    body: schemas.CompletionBody, request: Request, runtime: StateDep, parts: ServicesDep
) -> Response:
    """Continue prompts: text, texts, token ids, or lists of them."""
    caller = runtime.caller(request, body.deadline_ms)
    with resolve_model(parts, body, caller, request) as target:
        with counted(parts.inference, target, caller):
            schemas.refuse_unserved(body)
            layers = _layers(parts, target, body, sampling.COMPLETION_DEFAULTS)
            prompts = await _prompts(parts, target, body)
        text = parts.prompts.text
        begins = [text.is_added_token(prompt[-1]) for prompt in prompts for _ in range(body.n or 1)]
        shape = CompletionShape(new_id("cmpl"), _now(), body.model, text, begins)
        return await _answer(parts, request, body, caller, target, prompts, layers, shape)


@router.post("/chat/completions", response_model=schemas.ChatCompletion, responses={**CALLED, **STREAMED})
async def chat(body: schemas.ChatBody, request: Request, runtime: StateDep, parts: ServicesDep) -> Response:
    """Answer a conversation. A task's template wraps its last user message."""
    caller = runtime.caller(request, body.deadline_ms)
    with resolve_model(parts, body, caller, request) as target:
        with counted(parts.inference, target, caller):
            schemas.refuse_unserved(body)
            if body.top_logprobs and not body.logprobs:
                raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
            layers = _layers(parts, target, body, sampling.CHAT_DEFAULTS)
            ids = await parts.prompts.encode_chat(target.task, [_message(m) for m in body.messages])
        shape = ChatShape(new_id("chatcmpl"), _now(), body.model, parts.prompts.text)
        return await _answer(parts, request, body, caller, target, [ids], layers, shape)


def resolve_model(
    parts: Services, body: schemas.V1Fields, caller: Caller, request: Request
) -> AbstractContextManager[Target]:
    """The target of `model`, held. Raises InvalidRequest, UnknownName, UnknownAdapter and what `within_limits` does,
    which are counted."""

    def resolve() -> Target:
        if "task" in request.query_params:  # other words of a query may be a client's own, this one is ours
            raise InvalidRequest("a task is named as the model here, not in the query", "task")
        return parts.resolver.model(body.model, override(body.adapters))

    return within_limits(parts, resolve, caller)


async def _answer(
    parts: Services,
    request: Request,
    body: schemas.CompletionBody | schemas.ChatBody,
    caller: Caller,
    target: Target,
    prompts: Sequence[list[int]],
    layers: Layers,
    shape: Shape,
) -> Response:
    n = body.n or 1
    with counted(parts.inference, target, caller):
        built = [sampling.build(*layers, len(p)) for p in prompts]
        schema = body.response_format.schema_of_answer() if body.response_format is not None else None
        grammars: Sequence[Constraint] = ()
        if schema is not None:
            grammars = await _compiled(parts, request, schema, len(prompts) * n, caller)
        await still_there(request)
    generation = parts.inference.start(
        target,
        [p for p in prompts for _ in range(n)],
        [each for chosen in built for each in samplings_per_choice(chosen, n)],
        caller,
        id=shape.id,
        answers=n,
        constraints=grammars,
    )
    if body.stream:
        wanted = body.stream_options or schemas.StreamOptions()
        events = V1Events(generation, shape, bool(wanted.include_usage), bool(wanted.continuous_usage_stats))
        return EventStream(generation, events)
    await finished(request.receive, generation)
    check_complete(generation)
    return json_response(shape.whole(generation))


async def _compiled(
    parts: Services, request: Request, schema: Mapping[str, Any], count: int, caller: Caller
) -> Sequence[Constraint]:
    """`count` constraints that hold answers to a schema. Raises InvalidRequest, QueueFull, DeadlineExceeded, and
    ClientDisconnect."""
    try:
        async with asyncio.timeout(caller.deadline - time.monotonic()):
            return await answered(request.receive, parts.grammars.ask(schema, count, caller.tenant))
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the schema of response_format was compiled") from None


def _layers(
    parts: Services, target: Target, body: schemas.CompletionBody | schemas.ChatBody, defaults: Mapping[str, Any]
) -> Layers:
    """What `sampling.build` takes beside a prompt's length. Raises InvalidRequest for what is right for no prompt."""
    _check_count(parts, body)
    own = target.task.defaults if target.task else {}
    if body.logprobs is False or not own.get("logprobs"):  # here a number of 0 would be those of the tokens alone
        own = {k: v for k, v in own.items() if k != "logprobs"}
    layers = _asked(body), own, defaults, parts.prompts.limit
    sampling.build(*layers)
    return layers


def _check_count(parts: Services, body: schemas.CompletionBody | schemas.ChatBody) -> None:
    """Raises InvalidRequest and NoCapacity for more answers than one call may ask for."""
    prompt, n = body.prompt if isinstance(body, schemas.CompletionBody) else "", body.n or 1
    count = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
    if count * n > schemas.MAX_SEQUENCES:
        raise InvalidRequest(f"{count} prompts with n={n} are over {schemas.MAX_SEQUENCES} answers", "n")
    parts.engine.check_call(count * n)


def _asked(body: schemas.CompletionBody | schemas.ChatBody) -> dict[str, Any]:
    asked = asked_fields(body)
    if isinstance(body, schemas.ChatBody):
        asked.pop("logprobs", None)
        if body.logprobs:
            asked["logprobs"] = body.top_logprobs or 0
    elif body.logprobs is False:
        del asked["logprobs"]
    return asked


async def _prompts(parts: Services, target: Target, body: schemas.CompletionBody) -> list[list[int]]:
    """Texts go through the task's template, if there is one; token ids are taken as they are."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await parts.prompts.encode_input(target.task, prompt)]
    if isinstance(prompt[0], int):
        return [parts.prompts.check_token_ids(prompt)]
    if isinstance(prompt[0], str):
        found = []
        for text in prompt:
            await asyncio.sleep(0)  # others are answered between two of them: each takes some milliseconds
            found.append(await parts.prompts.encode_input(target.task, text))
        return found
    return [parts.prompts.check_token_ids(ids) for ids in prompt]


def _message(message: schemas.ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}  # a template may have a place for it
    return {"role": role, "content": message.text(), **named}


def _now() -> int:
    return int(time.time())
