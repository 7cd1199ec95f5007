"""The built-in page: `/` and `/web/...`, plain files of the package under a strict Content-Security-Policy.

The files are read once, as the application is made: a path from a client only ever looks one up and never opens
anything, and what is installed over a server that runs mixes no other version's page with it.
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
    """Read the page for this application."""
    app.state.page = _files()


def _files() -> dict[str, _File]:
    """Every file of the page by its path within the folder."""
    found = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file() and path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[path.relative_to(FOLDER).as_posix()] = _File(content, _TYPES[path.suffix], etag)
    return found


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _answer("index.html", request)


@router.get("/web/{file}")
async def file(file: str, request: Request) -> Response:
    """One of the page's own files. Raises UnknownName."""
    return _answer(file, request)


@router.get("/web/{folder}/{file}")
async def vendored(folder: str, file: str, request: Request) -> Response:
    """One of the files of others that the page uses. Raises UnknownName."""
    return _answer(f"{folder}/{file}", request)


def _answer(path: str, request: Request) -> Response:
    """A file, or 304 where the browser has it. It asks each time, so that no page is of two servers' files."""
    found = request.app.state.page.get(path)
    if found is None:
        raise UnknownName("there is no such file")
    headers = {
        "etag": found.etag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    if _has(request.headers.getlist("if-none-match"), found.etag):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


def _has(tags: list[str], etag: str) -> bool:
    """Whether If-None-Match tells of this tag, be it as a weak one: a proxy that compresses makes it one (RFC 9110,
    13.1.2)."""
    told = [tag.strip().removeprefix("W/") for line in tags for tag in line.split(",")]
    return etag in told or "*" in told
