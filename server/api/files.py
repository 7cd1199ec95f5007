"""`/v1/files`: data for training and evaluation, and what training jobs leave behind."""

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
PIECE = 1 << 20
"""Bytes of a file that are read and written at a time."""


class _WholeFile(StreamingResponse):
    """A file that is open already, and closed however its answer ends: deleted meanwhile, it is sent to its end.

    All of it whatever range is asked for, as HTTP allows.
    """

    def __init__(self, file: BinaryIO) -> None:
        pieces = iter(partial(file.read, PIECE), b"")
        size = os.fstat(file.fileno()).st_size
        headers = {"content-length": str(size), "accept-ranges": "none", "x-content-type-options": "nosniff"}
        super().__init__(pieces, headers=headers, media_type="application/octet-stream")
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                    },
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("", response_model=schemas.FileObject, responses=errors(400, 500, 503, 507), openapi_extra=_FORM)
async def upload(request: Request, runtime: StateDep, parts: ServicesDep) -> Response:
    """Upload a file of examples, JSON or JSONL. What is in it is looked at when a job uses it."""
    with disk_errors("the upload"):
        async with read_form(request, runtime.settings, max_files=1) as form:
            added = await _add(parts, form_fields(form))
    return json_response(_shown(added))


async def _add(parts: Services, given: Mapping[str, Any]) -> File:
    """The file of a form. Raises InvalidRequest, UnsupportedParameter, StoreFailed."""
    for field in given.keys() - {"file", "purpose"}:
        shown = str(field)[:64]
        raise UnsupportedParameter(f"{shown} is not served; an upload has a file and a purpose", shown)
    file = given.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("send multipart/form-data with a part `file` that has a filename", "file")
    if given.get("purpose") != PURPOSE:
        raise InvalidRequest(f"purpose must be {PURPOSE}", "purpose")
    stream = file.file

    def write(path: Path) -> None:
        stream.seek(0)
        with path.open("wb") as out:
            shutil.copyfileobj(stream, out, PIECE)

    return await asyncio.to_thread(parts.files.add, write, file.filename or "file", PURPOSE)


@router.get("", response_model=schemas.FileList, responses=errors(400, 404, 503))
async def list_files(
    parts: ServicesDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """All files, newest first."""
    found = [file for file in parts.files.all() if purpose in (None, file.purpose)]
    page, more = paged([_shown(f) for f in (found if order == "desc" else found[::-1])], after, limit)
    return {"object": "list", "data": page, **ends(page), "has_more": more}


@router.get("/{file_id}", response_model=schemas.FileObject, responses=errors(400, 404, 503))
async def get_file(file_id: Id, parts: ServicesDep) -> dict[str, Any]:
    """One file, without its content."""
    return _shown(parts.files.get(file_id))


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={
        **errors(400, 404, 503),
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    },
)
async def content(file_id: Id, parts: ServicesDep) -> Response:
    """A file's content."""
    path = parts.files.path(file_id)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        why = f"the content of {file_id} is gone from the server's disk; upload it again"
        raise UnknownName(why, "file_id") from None
    return _WholeFile(file)


@router.delete("/{file_id}", response_model=schemas.FileDeleted, responses=errors(400, 404, 409, 503))
async def delete_file(file_id: Id, parts: ServicesDep) -> dict[str, Any]:
    """Delete a file. 409 while a job needs it."""
    await asyncio.to_thread(parts.files.delete, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def paged(entries: Sequence[dict[str, Any]], after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The entries after the one of that id, and whether there are more. Raises InvalidRequest for an unknown id."""
    start = 0
    if after is not None:
        places = [i for i, entry in enumerate(entries) if entry["id"] == after]
        if not places:
            raise InvalidRequest(f"after must be an id of the list, not {after[:64]!r}", "after")
        start = places[0] + 1
    return list(entries[start : start + limit]), start + limit < len(entries)


def ends(page: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ids that a page begins and ends with."""
    return {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}


def _shown(file: File) -> dict[str, Any]:
    return {"object": "file", "status": "processed", **vars(file)}
