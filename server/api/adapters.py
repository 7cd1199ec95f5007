"""`/adapters`: list, publish, roll back, remove, pin and compose adapters."""

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

WRITE_ERRORS = errors(400, 404, 409, 412, 422, 429, 500, 503, 507)

Name = Annotated[str, PathParameter(max_length=64)]
IfMatch = Annotated[str | None, Header(alias="if-match", description="the version that the adapter must have now")]
B = TypeVar("B", bound=BaseModel)


def _two_bodies(model: type[BaseModel], named: bool) -> dict[str, Any]:
    """OpenAPI description of a body that is JSON or a multipart upload."""
    file = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = dict.fromkeys((*REQUIRED, *OPTIONAL), file)
    required = [*REQUIRED]
    if named:
        properties["name"] = {"type": "string", "pattern": schemas.NAME_PATTERN}
        required.append("name")
    form = {
        "title": model.__name__.replace("Body", "Form"),
        "description": "The files of the adapter, each as a field with the name of the file.",
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
async def list_adapters(services: ServicesDep) -> dict[str, Any]:
    """All adapters, and rejected folders with the reason."""
    return {"adapters": services.registry.list(), "rejected": services.registry.rejected()}


@router.get("/{name}", response_model=schemas.AdapterAnswer, responses=errors(404, 422, 503))
async def get_adapter(name: Name, services: ServicesDep) -> Response:
    """One adapter with its versions, the supported keys of its configuration, and its card."""
    return _adapter_response(services.registry.describe(name))


@router.post(
    "",
    status_code=201,
    response_model=schemas.AdapterAnswer,
    responses={**WRITE_ERRORS, 200: {"model": schemas.AdapterAnswer, "description": "the adapter has this content"}},
    openapi_extra=_two_bodies(schemas.RegisterBody, named=True),
)
async def register(request: Request, state: StateDep, services: ServicesDep) -> Response:
    """Register an adapter under a new name. Other content under an existing name is 409: use PUT."""
    if is_multipart(request):
        async with uploaded(request, state.settings, named=True) as (name, folder):
            await asyncio.to_thread(_check_task_file, services, name, folder, folder)
            published = await services.registry.publish(name, folder, create_only=True)
    else:
        body = await _json_body(request, schemas.RegisterBody)
        published = await publish_source(services, body.name, body.source, create_only=True)
    return _adapter_response(published.description, 201 if published.created else 200)


@router.put(
    "/{name}",
    response_model=schemas.AdapterAnswer | schemas.ComposedAnswer,
    responses={
        **WRITE_ERRORS,
        201: {"model": schemas.AdapterAnswer | schemas.ComposedAnswer, "description": "the name is new"},
    },
    openapi_extra=_two_bodies(schemas.PublishBody, named=False),
)
async def publish(
    name: Name, request: Request, state: StateDep, services: ServicesDep, if_match: IfMatch = None
) -> Response:
    """Publish a new version: an upload, a source or a sum of adapters. Or roll back to an earlier version."""
    expected = _expected_version(if_match)
    services.registry.check_publish(name, expected)  # before a source is downloaded
    if is_multipart(request):
        async with uploaded(request, state.settings, named=False) as (field, folder):
            if field not in ("", name):
                raise InvalidRequest(f"the upload has the name {field[:64]!r}, the path {name!r}", "name")
            await asyncio.to_thread(_check_task_file, services, name, folder, folder)
            published = await services.registry.publish(name, folder, if_match=expected)
        return _adapter_response(published.description, 201 if published.first else 200)

    body = await _json_body(request, schemas.PublishBody)
    if [body.source, body.version, body.from_].count(None) != 2:
        raise InvalidRequest("send one of source, version and from", "source")
    if body.rank is not None and body.from_ is None:
        raise InvalidRequest("rank needs from", "rank")
    if body.from_ is not None:
        description, published = await _publish_sum(state, services, name, body.from_, body.rank, if_match=expected)
        return _adapter_response(description, 201 if published.first else 200)
    if body.version is not None:
        if body.version.partition("@")[0] != name:
            raise InvalidRequest(f"{body.version} is not a version of {name!r}", "version")
        with rename_params(adapters="version"):
            published = await services.registry.roll_back(name, body.version, if_match=expected)
    else:
        published = await publish_source(services, name, body.source or "", if_match=expected)
    return _adapter_response(published.description, 201 if published.first else 200)


@router.delete(
    "/{name}", status_code=202, response_model=schemas.AdapterAnswer | schemas.UnservedAnswer, responses=WRITE_ERRORS
)
async def retire(name: Name, services: ServicesDep, if_match: IfMatch = None) -> Response:
    """Remove an adapter. Running requests finish with it; then its memory and disk space are freed.

    For an adapter that is registered but not served the answer has its name only, and no ETag.
    """
    return _adapter_response(await services.registry.retire(name, _expected_version(if_match)), 202)


@router.post("/{name}/pin", response_model=schemas.AdapterAnswer, responses=WRITE_ERRORS)
async def pin(name: Name, services: ServicesDep) -> Response:
    """Load an adapter and keep it in RAM."""
    await services.registry.pin(name)
    return _adapter_response(services.registry.describe(name))


@router.post("/{name}/unpin", response_model=schemas.AdapterAnswer, responses=WRITE_ERRORS)
async def unpin(name: Name, services: ServicesDep) -> Response:
    """Let an adapter be evicted from RAM again."""
    await services.registry.unpin(name)
    return _adapter_response(services.registry.describe(name))


@router.post("/{name}/prefetch", response_model=schemas.AdapterAnswer, responses=WRITE_ERRORS)
async def prefetch(name: Name, services: ServicesDep) -> Response:
    """Load an adapter into RAM before its first request."""
    await services.registry.prefetch(name)
    return _adapter_response(services.registry.describe(name))


@router.post(
    "/compose",
    status_code=201,
    response_model=schemas.ComposedAnswer,
    responses={**WRITE_ERRORS, 200: {"model": schemas.ComposedAnswer, "description": "the adapter has this content"}},
)
async def compose(body: schemas.ComposeBody, state: StateDep, services: ServicesDep) -> Response:
    """Store a mix as one adapter: the exact sum, truncated to `rank` if given. `error` is that of the truncation."""
    description, published = await _publish_sum(state, services, body.name, body.from_, body.rank, create_only=True)
    return _adapter_response(description, 201 if published.created else 200)


async def _publish_sum(
    state: ServerState,
    services: Services,
    name: str,
    terms: Sequence[schemas.Weighted],
    rank: int | None,
    **options: Any,
) -> tuple[dict[str, Any], Published]:
    """Publish a sum of adapters. Returns its description with the error of the truncation."""
    with rename_params(adapters="from"):
        lease = services.registry.lease([(term.name, term.weight) for term in terms])
    with lease:

        def make(folder: Path) -> float:
            pairs = [(services.registry.read_version(v), weight) for v, weight in lease.versions]
            with rename_params(adapters="from"):
                made = composition.compose(pairs, name, rank=rank)
            save(made, folder)
            pruning = made.metadata.get("pruning")
            return float(pruning["error"]) if pruning else 0.0

        async with temporary(state.settings) as folder:
            error = await asyncio.to_thread(make, folder)
            published = await services.registry.publish(name, folder, source="compose", **options)
    return {**published.description, "error": error}, published


async def publish_source(services: Services, name: str, location: str, **options: Any) -> Published:
    """Publish an adapter from `location`, a source that a client named. `options` are those of `Registry.publish`.

    Raises:
        InvalidRequest: the source is not allowed or cannot be read.
    """
    services.registry.check_publish(name)
    try:
        with disk_errors("the adapter"):
            async with services.sources.open(location) as (folder, within):
                await asyncio.to_thread(_check_task_file, services, name, folder, within)
                imported = await asyncio.to_thread(watched_folder_state, name, folder, within)
                return await services.registry.publish(name, folder, within=within, imported=imported, **options)
    except OSError as error:
        raise InvalidRequest(f"source cannot be read: {error.strerror}", "source") from None


def _check_task_file(services: Services, name: str, folder: Path, within: Path | None) -> None:
    """Raises InvalidRequest for a task.json that is not a task: publishing would remove the adapter's present task.

    Malformed JSON is left to the code that reads the folder.
    """
    path = open_inside(folder / TASK_FILE, within)
    if path is None:
        return
    with open(path, "rb") as file:
        content = file.read(MAX_SIDE_BYTES)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return
    services.tasks.check_task_file(name, body)


def _adapter_response(description: dict[str, Any], status: int = 200) -> Response:
    """The response for an adapter. Its version is the ETag."""
    headers = {"etag": f'"{description["version"]}"'} if "version" in description else None
    return json_response(description, status, headers)


async def _json_body(request: Request, model: type[B]) -> B:
    """Parse and validate a JSON body with the same errors as FastAPI's."""
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


def _expected_version(if_match: str | None) -> str | None:
    """The version in an If-Match header: an ETag, which a proxy may have marked as weak, or a bare version."""
    return None if if_match is None else if_match.strip().removeprefix("W/").strip('"')
