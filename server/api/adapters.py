"""`/adapters`: what there is, and publishing, rolling back, retiring, pinning and composing it.

Owns the two bodies of a registration, JSON and multipart. What an adapter must be is the registry's to say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from adapters import composition
from adapters.directory_watcher import watched_folder_state
from adapters.peft_format import MAX_SIDE_BYTES, OPTIONAL, REQUIRED, TASK_FILE, open_inside, save
from adapters.protocols import Published
from server.api import schemas
from server.api.error_responses import errors
from server.api.errors import UNREADABLE
from server.api.generate import json_response
from server.api.state import NO_QUERY, ServerState, Services, ServicesDep, StateDep
from server.api.uploads import disk_errors, is_multipart, temporary, uploaded
from server.errors import InvalidRequest, rename_params

router = APIRouter(prefix="/adapters", tags=["adapters"], dependencies=NO_QUERY)

WRITE = errors(400, 404, 409, 412, 422, 429, 500, 503, 507)

Name = Annotated[str, PathParameter(max_length=64)]
IfMatch = Annotated[list[str] | None, Header(alias="if-match", description="the version it must have now, or several")]
B = TypeVar("B", bound=BaseModel)


def _two_bodies(model: type[BaseModel], named: bool) -> dict[str, Any]:
    """The request body of a registration for the OpenAPI document: JSON, or a multipart upload."""
    file = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = dict.fromkeys((*REQUIRED, *OPTIONAL), file)
    required = [*REQUIRED]
    if named:
        properties["name"] = {"type": "string", "pattern": schemas.NAME_PATTERN}
        required.append("name")
    form = {
        "title": model.__name__.replace("Body", "Form"),
        "description": "The adapter's files, each a part of the form with its own name.",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    body = model.model_json_schema(ref_template="#/components/schemas/{model}")
    body.pop("$defs", None)
    content = {"application/json": {"schema": body}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


@router.get("", response_model=schemas.AdapterList, responses=errors(422, 503))
async def list_adapters(parts: ServicesDep) -> dict[str, Any]:
    """All adapters, and the folders that are not served with the reason."""
    return {"adapters": parts.registry.list(), "rejected": parts.registry.rejected()}


@router.get("/{name}", response_model=schemas.AdapterAnswer, responses=errors(404, 422, 503))
async def get_adapter(name: Name, parts: ServicesDep) -> Response:
    """One adapter with its versions, the keys that were honoured, and its card."""
    return described(parts.registry.describe(name))


@router.post(
    "",
    status_code=201,
    response_model=schemas.AdapterAnswer,
    responses={**WRITE, 200: {"model": schemas.AdapterAnswer, "description": "the same content was there already"}},
    openapi_extra=_two_bodies(schemas.RegisterBody, named=True),
)
async def register(request: Request, runtime: StateDep, parts: ServicesDep) -> Response:
    """Give a new name its content. Other content under a name in use is 409: that is what PUT is for."""
    if is_multipart(request):
        async with uploaded(request, runtime.settings, named=True) as (name, folder):
            await asyncio.to_thread(_check_task, parts, name, folder, folder)
            published = await parts.registry.publish(name, folder, create_only=True)
    else:
        body = await _json_body(request, schemas.RegisterBody)
        name = body.name
        published = await publish_source(parts, name, body.source, create_only=True)
    return described(published.description, 201 if published.created else 200)


@router.put(
    "/{name}",
    response_model=schemas.AdapterAnswer | schemas.ComposedAnswer,
    responses={
        **WRITE,
        201: {"model": schemas.AdapterAnswer | schemas.ComposedAnswer, "description": "the name is new"},
    },
    openapi_extra=_two_bodies(schemas.PublishBody, named=False),
)
async def publish(
    name: Name, request: Request, runtime: StateDep, parts: ServicesDep, if_match: IfMatch = None
) -> Response:
    """Give a name new content, be it the sum of others, or one of the versions that it had before."""
    expected = _version(parts, name, if_match)
    parts.registry.check_publish(name, expected)  # before anything is fetched or taken in
    if is_multipart(request):
        async with uploaded(request, runtime.settings, named=False) as (field, folder):
            if field not in ("", name):
                raise InvalidRequest(f"the upload's name is {field[:64]!r}, and the path's {name!r}", "name")
            await asyncio.to_thread(_check_task, parts, name, folder, folder)
            published = await parts.registry.publish(name, folder, if_match=expected)
        return described(published.description, 201 if published.first else 200)
    body = await _json_body(request, schemas.PublishBody)
    if [body.source, body.version, body.from_].count(None) != 2:
        raise InvalidRequest("give one of source, version and from", "source")
    if body.rank is not None and body.from_ is None:
        raise InvalidRequest("rank is what the sum of from is cut to; leave it out", "rank")
    if body.from_ is not None:
        told, published = await _publish_sum(runtime, parts, name, body.from_, body.rank, if_match=expected)
        return described(told, 201 if published.first else 200)
    if body.version is not None:
        if body.version.partition("@")[0] != name:
            raise InvalidRequest(f"{body.version} is no version of {name!r}", "version")
        with rename_params(adapters="version"):
            published = await parts.registry.roll_back(name, body.version, if_match=expected)
    else:
        published = await publish_source(parts, name, body.source or "", if_match=expected)
    return described(published.description, 201 if published.first else 200)


@router.delete(
    "/{name}", status_code=202, response_model=schemas.AdapterAnswer | schemas.UnservedAnswer, responses=WRITE
)
async def retire(name: Name, parts: ServicesDep, if_match: IfMatch = None) -> Response:
    """Take a name away. What runs on it finishes; then its memory and disk are freed. Of one that was
    set aside, and is not served, the name alone is told, without an ETag.
    """
    return described((await parts.registry.retire(name, _version(parts, name, if_match))).description, 202)


@router.post("/{name}/pin", response_model=schemas.AdapterAnswer, responses=WRITE)
async def pin(name: Name, parts: ServicesDep) -> Response:
    """Load an adapter and keep it in RAM."""
    await parts.registry.pin(name)
    return described(parts.registry.describe(name))


@router.post("/{name}/unpin", response_model=schemas.AdapterAnswer, responses=WRITE)
async def unpin(name: Name, parts: ServicesDep) -> Response:
    """Let an adapter be evicted again."""
    await parts.registry.unpin(name)
    return described(parts.registry.describe(name))


@router.post("/{name}/prefetch", response_model=schemas.AdapterAnswer, responses=WRITE)
async def prefetch(name: Name, parts: ServicesDep) -> Response:
    """Load an adapter into RAM ahead of its first request."""
    await parts.registry.prefetch(name)
    return described(parts.registry.describe(name))


@router.post(
    "/compose",
    status_code=201,
    response_model=schemas.ComposedAnswer,
    responses={**WRITE, 200: {"model": schemas.ComposedAnswer, "description": "the same content was there already"}},
)
async def compose(body: schemas.ComposeBody, runtime: StateDep, parts: ServicesDep) -> Response:
    """Store a mix as one adapter: the exact sum, cut to `rank` if that is given. `error` is what the cut costs."""
    told, published = await _publish_sum(runtime, parts, body.name, body.from_, body.rank, create_only=True)
    return described(told, 201 if published.created else 200)


async def _publish_sum(
    runtime: ServerState,
    parts: Services,
    name: str,
    terms: Sequence[schemas.Weighted],
    rank: int | None,
    **options: Any,
) -> tuple[dict[str, Any], Published]:
    """Publish the sum of adapters; answers what is told of it, and what came of it. Raises what the registry does."""
    with rename_params(adapters="from"):
        lease = parts.registry.lease([(term.name, term.weight) for term in terms])
    with lease:

        def make(folder: Path) -> float:
            pairs = [(parts.registry.read_version(v), weight) for v, weight in lease.versions]
            with rename_params(adapters="from"):
                made = composition.compose(pairs, name, rank=rank)
            save(made, folder)
            cut = made.metadata.get("pruning")
            return float(cut["error"]) if cut else 0.0

        async with temporary(runtime.settings) as folder:
            error = await asyncio.to_thread(make, folder)
            published = await parts.registry.publish(name, folder, source="compose", **options)
    return {**published.description, "error": error}, published


async def publish_source(parts: Services, name: str, place: str, **options: Any) -> Published:
    """Publish from a place that a client named, if the name will do. Raises InvalidRequest for a place that will not.

    Raises what the registry does.
    """
    parts.registry.check_publish(name)
    try:
        with disk_errors("the adapter"):
            async with parts.sources.open(place) as (folder, within):
                await asyncio.to_thread(_check_task, parts, name, folder, within)
                taken = await asyncio.to_thread(watched_folder_state, name, folder, within)
                return await parts.registry.publish(name, folder, within=within, imported=taken, **options)
    except OSError as error:
        raise InvalidRequest(f"source cannot be read: {error.strerror}", "source") from None


def _check_task(parts: Services, name: str, folder: Path, within: Path | None) -> None:
    """Raises InvalidRequest for a task.json that would take the adapter's task away and be none itself: who sends it is
    there to be told. One that cannot even be read is the reader's to refuse."""
    found = open_inside(folder / TASK_FILE, within)
    if found is None:
        return
    with open(found, "rb") as file:
        content = file.read(MAX_SIDE_BYTES)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return
    parts.tasks.check_task_file(name, body)


def described(told: dict[str, Any], status: int = 200) -> Response:
    """The answer about one adapter, with its version as ETag; one that is not served has none."""
    return json_response(told, status, {"etag": f'"{told["version"]}"'} if "version" in told else None)


# Bodies


async def _json_body(request: Request, model: type[B]) -> B:
    """The body by its schema, as FastAPI would read it. Raises RequestValidationError, and HTTPException for what is
    not even text.
    """
    body = await request.body()
    if not body:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "", "input": None}])
    try:
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        problems = [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)]
        raise RequestValidationError(problems) from None
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "", "input": None}
        raise RequestValidationError([problem]) from None
    except (ValueError, RecursionError):
        raise HTTPException(400, UNREADABLE) from None


def _version(parts: Services, name: str, if_match: list[str] | None) -> str | None:
    """The version within If-Match headers: an ETag as we send them, a bare label, or `*`.

    Of several it is the one that the adapter has now, so that the registry can hold it to that.
    """
    if if_match is None:
        return None
    listed = [tag.strip().removeprefix("W/").strip('"') for tag in ",".join(if_match).split(",")]
    now = parts.registry.current(name).label if name in parts.registry.names() else None
    return now if now in listed else listed[0]
