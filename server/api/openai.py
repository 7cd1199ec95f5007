"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`: OpenAI's routes on the same engine as /generate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from server.api import openai_schemas as schemas
from server.api.error_responses import errors
from server.api.generate import STREAMED, Call, json_response, requested_fields, requested_mix
from server.api.openai_shapes import ChatShape, CompletionShape, Shape, V1Events
from server.api.state import Services, ServicesDep, StateDep
from server.api.stream import EventStream, check_complete, check_connected, wait_finished, wait_for_result
from server.engine.request import Constraint
from server.errors import DeadlineExceeded, InvalidRequest
from server.tasks import sampling
from server.tasks.generation import Caller, Generation, new_id, samplings_per_choice
from server.tasks.resolve import Target

router = APIRouter(prefix="/v1", tags=["openai"])

GENERATION_ERRORS = errors(400, 404, 429, 500, 503, 504, 507)
Body = schemas.CompletionBody | schemas.ChatBody
Layers = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], sampling.ContextLimit]


@router.get("/models", response_model=schemas.ModelList, responses=errors(503))
async def list_models(services: ServicesDep) -> dict[str, Any]:
    """The base, all tasks and all adapters. An adapter with the name of a task is listed as `adapter:<name>`."""
    return {"object": "list", "data": _models(services)}


@router.get("/models/{model}", response_model=schemas.ModelEntry, responses=errors(400, 404, 503))
async def get_model(model: Annotated[str, Path(max_length=256)], services: ServicesDep) -> dict[str, Any]:
    """One model: an entry of the list, an exact adapter version, or `adapter:<name>`."""
    for entry in _models(services):
        if entry["id"] == model:
            return entry
    services.resolver.model(model, None)
    return _model_entry(services, model, "adapter", services.model.name)


def _models(services: Services) -> list[dict[str, Any]]:
    base = services.model.name
    tasks = dict.fromkeys(task.name for task in services.tasks.all())
    found: list[tuple[str, str, str | None]] = [(base, "base", None), *((name, "task", base) for name in tasks)]
    found += [(f"adapter:{a}" if a in tasks else a, "adapter", base) for a in services.registry.names()]
    return [_model_entry(services, *entry) for entry in found]


def _model_entry(services: Services, id: str, kind: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": services.model.created,
        "owned_by": "loramux",
        "kind": kind,
        "parent": parent,
        "root": id,  # vLLM's clients read `root` and `max_model_len`
        "max_model_len": services.prompts.limit.context,
    }


@router.post("/completions", response_model=schemas.Completion, responses={**GENERATION_ERRORS, **STREAMED})
async def completions(
    body: schemas.CompletionBody, request: Request, state: StateDep, services: ServicesDep
) -> Response:
    """Continue prompts: a text, texts, token ids, or lists of token ids."""
    with Call(services.inference, state.caller(request, body.deadline_ms)) as call:
        target = _admit(call, services, body, request)
        schemas.refuse_unserved(body)
        layers = _sampling_layers(services, target, body, sampling.COMPLETION_DEFAULTS)
        prompts = await _encode_prompts(services, target, body)
        tokenizer = services.prompts.tokenizer
        new_segments = [tokenizer.is_added_token(prompt[-1]) for prompt in prompts for _ in range(body.n or 1)]
        shape = CompletionShape(new_id("cmpl"), int(time.time()), body.model, tokenizer, new_segments)
        generation = await _start(call, services, request, body, prompts, layers, shape.id)
    return await _respond(request, body, generation, shape)


@router.post("/chat/completions", response_model=schemas.ChatCompletion, responses={**GENERATION_ERRORS, **STREAMED})
async def chat(body: schemas.ChatBody, request: Request, state: StateDep, services: ServicesDep) -> Response:
    """Answer a conversation. The template of a task wraps the last user message."""
    with Call(services.inference, state.caller(request, body.deadline_ms)) as call:
        target = _admit(call, services, body, request)
        schemas.refuse_unserved(body)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        layers = _sampling_layers(services, target, body, sampling.CHAT_DEFAULTS)
        ids = await services.prompts.encode_chat(target.task, [_message(m) for m in body.messages])
        shape = ChatShape(new_id("chatcmpl"), int(time.time()), body.model, services.prompts.tokenizer)
        generation = await _start(call, services, request, body, [ids], layers, shape.id)
    return await _respond(request, body, generation, shape)


def _admit(call: Call, services: Services, body: Body, request: Request) -> Target:
    if "task" in request.query_params:
        raise InvalidRequest("on /v1 routes name the task as `model`, not in the query", "task")
    return call.admit(services.resolver.model(body.model, requested_mix(body.adapters)))


async def _start(
    call: Call,
    services: Services,
    request: Request,
    body: Body,
    prompts: list[list[int]],
    layers: Layers,
    id: str,
) -> Generation:
    """Compile the response format, then submit `n` sequences for each prompt."""
    n = body.n or 1
    params = [sampling.build(*layers, len(prompt)) for prompt in prompts]
    schema = body.response_format.schema_of_answer() if body.response_format is not None else None
    constraints: list[Constraint] = []
    if schema is not None:
        constraints = await _compile_schema(services, request, schema, len(prompts) * n, call.caller)
    await check_connected(request)
    return call.start(
        [prompt for prompt in prompts for _ in range(n)],
        [each for one in params for each in samplings_per_choice(one, n)],
        id=id,
        answers=n,
        constraints=constraints,
    )


async def _respond(request: Request, body: Body, generation: Generation, shape: Shape) -> Response:
    if body.stream:
        options = body.stream_options or schemas.StreamOptions()
        events = V1Events(generation, shape, bool(options.include_usage), bool(options.continuous_usage_stats))
        return EventStream(generation, events)
    await wait_finished(request.receive, generation)
    check_complete(generation)
    return json_response(shape.whole(generation))


async def _compile_schema(
    services: Services, request: Request, schema: Mapping[str, Any], count: int, caller: Caller
) -> list[Constraint]:
    """`count` constraints for a JSON schema. Raises InvalidRequest, QueueFull, DeadlineExceeded, ClientDisconnect."""
    try:
        async with asyncio.timeout(caller.deadline - time.monotonic()):
            compiled = services.grammars.ask(schema, count, caller.tenant)
            return [*await wait_for_result(request.receive, compiled)]
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the schema of response_format was compiled") from None


def _sampling_layers(services: Services, target: Target, body: Body, defaults: Mapping[str, Any]) -> Layers:
    """The arguments of `sampling.build`. Raises InvalidRequest for values that are wrong for every prompt."""
    prompt, n = body.prompt if isinstance(body, schemas.CompletionBody) else "", body.n or 1
    count = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
    if count * n > schemas.MAX_SEQUENCES:
        raise InvalidRequest(f"{count} prompts with n={n} are over {schemas.MAX_SEQUENCES} answers", "n")
    services.engine.check_call(count * n)
    task_defaults = dict(target.task.defaults) if target.task else {}
    if body.logprobs is False or not task_defaults.get("logprobs"):  # logprobs 0 means "none" on /generate only
        task_defaults.pop("logprobs", None)
    layers = _requested_fields(body), task_defaults, defaults, services.prompts.limit
    sampling.build(*layers)
    return layers


def _requested_fields(body: Body) -> dict[str, Any]:
    """The sampling fields of the request, with `logprobs` as the number of alternatives."""
    fields = requested_fields(body)
    if isinstance(body, schemas.ChatBody):
        fields.pop("logprobs", None)
        if body.logprobs:
            fields["logprobs"] = body.top_logprobs or 0
    elif body.logprobs is False:
        del fields["logprobs"]
    return fields


async def _encode_prompts(services: Services, target: Target, body: schemas.CompletionBody) -> list[list[int]]:
    """Token ids of the prompts. Texts go through the template of the task; token ids are taken as they are."""
    prompts, prompt = services.prompts, body.prompt
    if isinstance(prompt, str):
        return [await prompts.encode_input(target.task, prompt)]
    if isinstance(prompt[0], int):
        return [prompts.check_token_ids(prompt)]
    if isinstance(prompt[0], str):
        encoded = []
        for text in prompt:
            await asyncio.sleep(0)  # tokenizing takes milliseconds; let other requests run in between
            encoded.append(await prompts.encode_input(target.task, text))
        return encoded
    return [prompts.check_token_ids(ids) for ids in prompt]


def _message(message: schemas.ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    name = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.text(), **name}
