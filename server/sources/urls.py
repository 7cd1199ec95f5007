"""Adapters below a URL, through `fsspec`: http(s), s3, gs and whatever protocol is installed; never local files.

Only below prefixes that the settings allow, with limits on bytes and time; redirects are not followed, since they
could lead out of the allow-list.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server.errors import InvalidRequest

_REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
_OPTIONAL = ("task.json", "README.md")
_SMALL = 1 << 20  # bytes of any file but the tensors
_CHUNK = 1 << 20
_BLOCK = {"http": 0, "https": 0}  # as a stream: not every host serves ranges
_LOCAL = frozenset({"file", "local", "memory", "zip", "tar", "libarchive", "git", "ssh", "sftp", "smb", "reference"})


def is_url(text: str) -> bool:
    """Whether `text` begins like a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


def check(url: str, allow: Sequence[str]) -> str:
    """`url` without a trailing slash, if it is plain and below one of `allow`. Raises InvalidRequest."""
    parts = urlsplit(url)
    plain = "://" in url and not (parts.query or parts.fragment or parts.username or parts.password)
    if not plain or parts.scheme in _LOCAL or "::" in url or "%" in url or "\\" in url or ".." in parts.path.split("/"):
        raise InvalidRequest("the source must be a plain URL of a folder: no query, user, escapes or `..`", "source")
    trimmed = url.rstrip("/")
    if not any(f"{trimmed}/".startswith(f"{prefix.rstrip('/')}/") for prefix in allow):
        raise InvalidRequest("adapters may not be loaded from this URL; --url-allow names prefixes", "source")
    return trimmed


def fetch(url: str, folder: Path, *, max_bytes: int, seconds: float) -> None:
    """Copy the adapter at `url` (already checked) into `folder`, within both limits.

    Raises InvalidRequest, TimeoutError, OSError.
    """
    try:
        import fsspec

        scheme = urlsplit(url).scheme
        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            import aiohttp

            options = {"allow_redirects": False, "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=seconds)}}
        files = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except (ImportError, ValueError) as e:
        raise InvalidRequest(f"this URL needs a package that is not installed: {e}", "source") from None
    end, left = time.monotonic() + seconds, max_bytes
    for name in (*_REQUIRED, *_OPTIONAL):
        limit = left if name.endswith(".safetensors") else min(left, _SMALL)
        try:
            left -= _copy(files, f"{url}/{name}", folder / name, limit, end)
        except FileNotFoundError as e:  # http's word for a host that cannot be reached, too: the cause tells
            (folder / name).unlink(missing_ok=True)
            if name in _REQUIRED:
                reason = " ".join(str(e.__cause__ or "not found").split())[:200]
                raise InvalidRequest(f"the URL gives no {name}: {reason}", "source") from None


def _copy(files: Any, url: str, target: Path, limit: int, end: float) -> int:
    copied = 0
    with target.open("wb") as out:
        for chunk in _chunks(files, url, end):
            copied += len(chunk)
            if copied > limit:
                raise InvalidRequest(f"{target.name} is over the limit of {limit} bytes (--max-upload)", "source")
            out.write(chunk)
    return copied


def _chunks(files: Any, url: str, end: float) -> Iterator[bytes]:
    """The remote file in pieces. Raises FileNotFoundError, TimeoutError, and InvalidRequest for all else there."""
    try:
        if time.monotonic() >= end:
            raise TimeoutError
        with files.open(url, "rb", block_size=_BLOCK.get(urlsplit(url).scheme, _CHUNK)) as remote:
            while chunk := remote.read(_CHUNK):
                yield chunk
                if time.monotonic() >= end:
                    raise TimeoutError
    except (FileNotFoundError, TimeoutError):
        raise
    except Exception as e:  # each protocol's library has errors of its own
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise InvalidRequest(f"the URL could not be read: {reason}", "source") from None
