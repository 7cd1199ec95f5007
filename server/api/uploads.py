"""Uploads: the files of a multipart body in a folder of our own, and what is said when the disk refuses them."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fastapi import Request
from starlette.datastructures import UploadFile

from adapters.errors import StoreFailed
from server.errors import InvalidRequest
from server.settings import Settings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OPTIONAL = ("README.md", "task.json")
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})
"""Errors that are the disk's, and no client's."""


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

    try:
        folder = await asyncio.to_thread(make)
    except OSError as error:
        raise StoreFailed(f"the disk refuses an upload: {error.strerror}") from None
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, True)


@asynccontextmanager
async def uploaded(request: Request, settings: Settings, *, named: bool) -> AsyncIterator[tuple[str, Path]]:
    """The name and a folder with the files of a multipart body. Raises InvalidRequest, BodyTooLarge, StoreFailed."""
    async with temporary(settings) as folder:
        with disk_errors("the upload"):
            async with request.form(max_files=4, max_fields=4, max_part_size=settings.max_body) as form:
                given = dict(form.multi_items())
                allowed = {CONFIG, TENSORS, *OPTIONAL, "name"}
                for field in given.keys() - allowed:
                    raise InvalidRequest(f"an upload has no field {str(field)[:64]!r}", str(field)[:64])
                for field in (CONFIG, TENSORS):
                    if field not in given:
                        raise InvalidRequest(f"an upload needs the file {field}", field)
                name = given.pop("name", "")
                if named and (not isinstance(name, str) or not name):
                    raise InvalidRequest("an upload needs a field `name`", "name")
                for field, value in given.items():
                    await asyncio.to_thread(_write, folder / field, value)
                yield str(name), folder


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
