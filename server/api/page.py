"""The built-in web page: static files under a strict Content-Security-Policy.

All files are read at startup, so a path from a client never reaches the file system, and an upgrade of the installed
package does not mix two versions of the page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response

from server.errors import UnknownName

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).resolve().parent.parent / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def install(app: FastAPI) -> None:
    """Read all files of the page, by path relative to the folder."""
    app.state.page = {}
    for path in FOLDER.rglob("*"):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            app.state.page[path.relative_to(FOLDER).as_posix()] = _File(content, _TYPES[path.suffix], etag)


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _file_response("index.html", request)


@router.get("/web/{file}")
async def file(file: str, request: Request) -> Response:
    """A script, style sheet or icon of the page."""
    return _file_response(file, request)


@router.get("/web/{folder}/{file}")
async def vendored(folder: str, file: str, request: Request) -> Response:
    """A third-party file of the page."""
    return _file_response(f"{folder}/{file}", request)


def _file_response(path: str, request: Request) -> Response:
    """The file, or 304 if the browser has it. Browsers revalidate on every load. Raises UnknownName."""
    found: _File | None = request.app.state.page.get(path)
    if found is None:
        raise UnknownName("there is no such file")
    headers = {
        "etag": found.etag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in tags:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
