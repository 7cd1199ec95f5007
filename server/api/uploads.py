"""Uploads: the files of a multipart body in a folder of our own, and what is said when the disk refuses them."""

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
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile

from adapters.atomic_files import refused
from adapters.errors import MACHINE, StoreFailed
from adapters.peft_format import OPTIONAL, REQUIRED
from server.errors import InvalidRequest
from server.settings import Settings

MAX_FIELDS = 16
"""More than there are, so that one which is not known can be named."""
CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii"})
"""What an upload may say that its fields are written in."""
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}) | MACHINE
"""Errors that are the disk's or the machine's, and no client's."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Raises StoreFailed where the disk refuses `what`; other errors go on as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK:
            raise StoreFailed(f"the disk refuses {what}: {error.strerror}") from None
        raise


@asynccontextmanager
async def temporary(settings: Settings) -> AsyncIterator[Path]:
    """A folder of our own that goes away again. Raises StoreFailed if the disk refuses."""
    root = settings.state_dir / "uploads"

    def make() -> Path:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=root))

    with refused("an upload"):
        folder = await asyncio.to_thread(make)
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, True)


@asynccontextmanager
async def uploaded(request: Request, settings: Settings, *, named: bool) -> AsyncIterator[tuple[str, Path]]:
    """The name and a folder with the files of a multipart body.

    Raises RequestValidationError for other fields than an upload has or one that is there twice, InvalidRequest for
    fields that are not in UTF-8, BodyTooLarge, StoreFailed.
    """
    async with temporary(settings) as folder:
        with disk_errors("the upload"):
            async with form_of(request, settings, max_files=MAX_FIELDS) as form:
                given = parts_of(form)
                allowed = {*REQUIRED, *OPTIONAL, "name"}
                for field in given.keys() - allowed:
                    raise _malformed("extra_forbidden", str(field), "")
                for field in REQUIRED:
                    if field not in given:
                        raise _malformed("missing", field, "an upload needs this file, and all of it")
                name = given.pop("name", "")
                if named and (not isinstance(name, str) or not name):
                    raise _malformed("missing", "name", "an upload needs this field")
                for field, value in given.items():
                    await asyncio.to_thread(_write, folder / field, value)
                yield str(name), folder


def form_of(request: Request, settings: Settings, *, max_files: int) -> AbstractAsyncContextManager[FormData]:
    """The form of a body. Raises InvalidRequest for fields that are said to be in anything but UTF-8.

    They would be read on the event loop by whatever codec Python has of that name, and some take the square of the
    length.
    """
    _, given = parse_options_header(request.headers.get("content-type"))
    charset = given.get(b"charset", b"utf-8")
    if charset.lower() not in CHARSETS:
        shown = charset[:64].decode("latin-1")
        raise InvalidRequest(
            f"an upload's charset is utf-8, not {shown!r}; leave it out of Content-Type", "content-type"
        )
    return request.form(max_files=max_files, max_fields=MAX_FIELDS, max_part_size=settings.max_body)


def parts_of(form: FormData) -> dict[str, UploadFile | str]:
    """The parts of a form by name. Raises RequestValidationError for a name that is there twice."""
    given: dict[str, UploadFile | str] = {}
    for field, value in form.multi_items():
        if field in given:
            raise _malformed("value_error", field, "it is there twice")
        given[field] = value
    return given


def _malformed(kind: str, field: str, message: str) -> RequestValidationError:
    """What the schema would say of a multipart body."""
    return RequestValidationError([{"type": kind, "loc": ("body", field), "msg": message, "input": None}])


def _write(path: Path, value: UploadFile | str) -> None:
    with path.open("wb") as out:
        if isinstance(value, str):
            out.write(value.encode())
        else:
            value.file.seek(0)
            shutil.copyfileobj(value.file, out, 1 << 20)


def is_multipart(request: Request) -> bool:
    """Whether the body says that it is an upload."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")
