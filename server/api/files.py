"""`/v1/files`: uploads for training and evaluation, and the result files of training jobs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile
from starlette.types import Receive, Scope, Send

from server.api import fine_tuning_schemas as schemas
from server.api.error_responses import errors
from server.api.generate import json_response
from server.api.state import Services, ServicesDep, StateDep
from server.api.uploads import disk_errors, form_fields, read_form
from server.errors import InvalidRequest, UnknownName, UnsupportedParameter
from server.jobs.file_store import File

router = APIRouter(prefix="/v1/files", tags=["files"])

Id = Annotated[str, PathParameter(max_length=schemas.MAX_FILE_ID)]
After = Annotated[str | None, Query(max_length=schemas.MAX_FILE_ID, description="the id after which to begin")]
PURPOSE = "fine-tune"
CHUNK = 1 << 20
"""Bytes that are read and written at a time."""


class _FileResponse(StreamingResponse):
    """A whole open file. It can be deleted while it is sent. Range requests are ignored, as HTTP allows."""

    def __init__(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        headers = {"content-length": str(size), "accept-ranges": "none", "x-content-type-options": "nosniff"}
        chunks = iter(partial(file.read, CHUNK), b"")
        super().__init__(chunks, headers=headers, media_type="application/octet-stream")
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


_FORM_SCHEMA = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
    },
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM_SCHEMA}}}}
_CONTENT = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.post("", response_model=schemas.FileObject, responses=errors(400, 500, 503, 507), openapi_extra=_FORM)
async def upload(request: Request, runtime: StateDep, services: ServicesDep) -> Response:
    """Upload a file of examples, JSON or JSONL. Its content is checked when a job uses it."""
    with disk_errors("the upload"):
        async with read_form(request, runtime.settings, max_files=1) as form:
            added = await _add(services, form_fields(form))
    return json_response(_file_object(added))


async def _add(services: Services, form: Mapping[str, Any]) -> File:
    """Add the file of a form. Raises InvalidRequest, UnsupportedParameter, StoreFailed."""
    for field in form.keys() - {"file", "purpose"}:
        shown = str(field)[:64]
        raise UnsupportedParameter(f"{shown} is not supported; send only file and purpose", shown)
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("send multipart/form-data with a part `file` that has a filename", "file")
    if form.get("purpose") != PURPOSE:
        raise InvalidRequest(f"purpose must be {PURPOSE}", "purpose")
    stream = file.file

    def write(path: Path) -> None:
        stream.seek(0)
        with path.open("wb") as out:
            shutil.copyfileobj(stream, out, CHUNK)

    return await asyncio.to_thread(services.files.add, write, file.filename or "file", PURPOSE)


@router.get("", response_model=schemas.FileList, responses=errors(400, 404, 503))
async def list_files(
    services: ServicesDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """All files, newest first."""
    found = [_file_object(file) for file in services.files.all() if purpose in (None, file.purpose)]
    return page_of(found if order == "desc" else found[::-1], after, limit, with_ends=True)


@router.get("/{file_id}", response_model=schemas.FileObject, responses=errors(400, 404, 503))
async def get_file(file_id: Id, services: ServicesDep) -> dict[str, Any]:
    """One file, without its content."""
    return _file_object(services.files.get(file_id))


@router.get("/{file_id}/content", response_class=Response, responses={**errors(400, 404, 503), 200: _CONTENT})
async def content(file_id: Id, services: ServicesDep) -> Response:
    """A file's content."""
    try:
        file = services.files.path(file_id).open("rb")
    except (FileNotFoundError, IsADirectoryError):
        message = f"the content of {file_id} is missing on the server's disk; upload it again"
        raise UnknownName(message, "file_id") from None
    return _FileResponse(file)


@router.delete("/{file_id}", response_model=schemas.FileDeleted, responses=errors(400, 404, 409, 500, 503, 507))
async def delete_file(file_id: Id, services: ServicesDep) -> dict[str, Any]:
    """Delete a file. 409 while a job needs it."""
    await asyncio.to_thread(services.files.delete, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def page_of(
    entries: Sequence[dict[str, Any]], after: str | None, limit: int, with_ends: bool = False
) -> dict[str, Any]:
    """A page in OpenAI's list shape: the entries after the id `after`. Raises InvalidRequest for an unknown id."""
    start = 0
    if after is not None:
        start = next((i + 1 for i, entry in enumerate(entries) if entry["id"] == after), 0)
        if not start:
            raise InvalidRequest(f"after must be an id of the list, not {after[:64]!r}", "after")
    page = list(entries[start : start + limit])
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {
        "object": "list",
        "data": page,
        **(ends if with_ends else {}),
        "has_more": start + limit < len(entries),
    }


def _file_object(file: File) -> dict[str, Any]:
    return {"object": "file", "status": "processed", **vars(file)}
