"""Multipart uploads: their fields, written to a temporary directory."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData, UploadFile

from adapters.errors import RESOURCE_ERRORS, StoreFailed
from adapters.peft_format import OPTIONAL, REQUIRED
from server.settings import Settings

MAX_FIELDS = 16
"""More than the known fields, so that an unknown one can be named."""
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}) | RESOURCE_ERRORS


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Raise StoreFailed for errors of the disk, such as a full one. Other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise StoreFailed(f"could not write {what}: {error.strerror}") from None
        raise


@asynccontextmanager
async def temporary(settings: Settings) -> AsyncIterator[Path]:
    """A temporary directory inside the state directory. Raises StoreFailed."""
    root = settings.state_dir / "uploads"

    def make() -> Path:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=root))

    try:
        folder = await asyncio.to_thread(make)
    except OSError as error:
        raise StoreFailed(f"could not write an upload: {error.strerror}") from None
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, True)


@asynccontextmanager
async def uploaded(request: Request, settings: Settings, *, named: bool) -> AsyncIterator[tuple[str, Path]]:
    """The name and a directory with the files of an adapter upload.

    Raises:
        RequestValidationError: a field is missing, unknown or given twice.
        BodyTooLarge, BodyTooSlow, StoreFailed: see the middleware and `disk_errors`.
    """
    async with temporary(settings) as folder:
        with disk_errors("the upload"):
            async with read_form(request, settings, max_files=MAX_FIELDS) as form:
                given = form_fields(form)
                for field in given.keys() - {*REQUIRED, *OPTIONAL, "name"}:
                    raise _invalid("extra_forbidden", str(field), "")
                for field in REQUIRED:
                    if field not in given:
                        raise _invalid("missing", field, "an upload needs this file")
                name = given.pop("name", "")
                if named and (not isinstance(name, str) or not name):
                    raise _invalid("missing", "name", "an upload needs this field")
                for field, value in given.items():
                    await asyncio.to_thread(_write, folder / field, value)
                yield str(name), folder


def read_form(request: Request, settings: Settings, *, max_files: int) -> AbstractAsyncContextManager[FormData]:
    """The form of a multipart body."""
    return request.form(max_files=max_files, max_fields=MAX_FIELDS, max_part_size=settings.max_body)


def form_fields(form: FormData) -> dict[str, UploadFile | str]:
    """The fields of a form by name. Raises RequestValidationError for a name that is given twice."""
    given: dict[str, UploadFile | str] = {}
    for field, value in form.multi_items():
        if field in given:
            raise _invalid("value_error", field, "it is given twice")
        given[field] = value
    return given


def is_multipart(request: Request) -> bool:
    """Whether the body is an upload."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def _invalid(kind: str, field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body", field), "msg": message, "input": None}])


def _write(path: Path, value: UploadFile | str) -> None:
    with path.open("wb") as out:
        if isinstance(value, str):
            out.write(value.encode())
        else:
            value.file.seek(0)
            shutil.copyfileobj(value.file, out, 1 << 20)
