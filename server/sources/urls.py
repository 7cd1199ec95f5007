"""Adapters below a URL, through `fsspec`: http(s), s3, gs and whatever protocol is installed; never local files.

Only below prefixes that the settings allow, with limits on bytes and time; redirects are not followed, since they
could lead out of the allow-list. What breaks on the way is asked for again, what is refused is not. Where the folder
has a file SHA256SUMS (as `sha256sum` writes it), the files that it lists must agree with it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from adapters.peft_format import OPTIONAL, REQUIRED
from server.errors import InvalidRequest
from server.sources import retries
from server.sources.budget import Spend

T = TypeVar("T")

_SUMS = "SHA256SUMS"
_SMALL = 1 << 20  # bytes of any file but the tensors
_CHUNK = 1 << 20
_BLOCK = {"http": 0, "https": 0}  # as a stream: not every host serves ranges
_LOCAL = frozenset({"file", "local", "memory", "zip", "tar", "libarchive", "git", "ssh", "sftp", "smb", "reference"})
_SILENCE = 30.0
"""Seconds after which a host that says nothing is given up, and asked again."""


class _Broken(Exception):
    """The transfer failed in a way that may pass."""


class _Refused(Exception):
    """The host has no such file, or does not give it: asking again would not help."""


def is_url(text: str) -> bool:
    """Whether `text` begins like a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


def check(url: str, allow: Sequence[str]) -> str:
    """`url` without a trailing slash, if it is plain and below one of `allow`. Raises InvalidRequest."""
    if not _is_plain(url):
        raise InvalidRequest("the source must be a plain URL of a folder: no query, user, escapes or `..`", "source")
    trimmed = url.rstrip("/")
    if not any(f"{trimmed}/".startswith(f"{prefix.rstrip('/')}/") for prefix in allow):
        raise InvalidRequest("adapters may not be loaded from this URL; --url-allow names prefixes", "source")
    return trimmed


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no address, or letters that would become other ones in a host's name
        return False
    bare = not ("?" in url or "#" in url or "@" in parts.netloc)
    escaped = "%" in url or "\\" in url or "::" in url.replace(parts.netloc, "", 1)  # `::` joins protocols
    return bare and "://" in url and not escaped and parts.scheme not in _LOCAL and ".." not in parts.path.split("/")


def fetch(url: str, folder: Path, *, max_bytes: int, seconds: float, spend: Spend) -> None:
    """Copy the adapter at `url` (already checked) into `folder`, within both limits, telling `spend` of every byte.

    Raises InvalidRequest, TimeoutError, OSError, and what `spend` raises.
    """
    fetcher = _Fetcher(_filesystem(urlsplit(url).scheme, seconds), time.monotonic() + seconds, spend)
    sums = _read_sums(fetcher.text(f"{url}/{_SUMS}"))
    left = max_bytes
    for name in (*REQUIRED, *OPTIONAL):
        limit = left if name.endswith(".safetensors") else min(left, _SMALL)
        try:
            size, digest = fetcher.copy(f"{url}/{name}", folder / name, limit)
        except _Refused as e:  # where nobody may list a bucket, what is not there is forbidden
            if name in REQUIRED:
                raise InvalidRequest(f"the URL gives no {name}: {e}", "source") from None
            continue
        left -= size
        if sums.get(name, digest) != digest:
            raise InvalidRequest(f"{name} is not what {_SUMS} says: it has the SHA-256 {digest}", "source")


def _read_sums(text: str) -> dict[str, str]:
    """Digests by file name, from lines of `<sha256> [ *]<name>`."""
    lines = re.findall(r"^([0-9a-fA-F]{64}) [ *](?:\./)?(\S+)\s*$", text, re.MULTILINE)
    return {name: digest.lower() for digest, name in lines}


def _filesystem(scheme: str, seconds: float) -> Any:
    """`fsspec`'s files of one protocol, with time limits where the protocol has them. Raises InvalidRequest."""
    silence = min(seconds, _SILENCE)
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=silence, sock_read=silence)
            options = {"allow_redirects": False, "client_kwargs": {"timeout": timeout}}
        elif scheme in ("s3", "s3a"):
            limits = {"connect_timeout": silence, "read_timeout": silence, "retries": {"max_attempts": 0}}
            options = {"config_kwargs": limits}
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except (ImportError, ValueError) as e:
        raise InvalidRequest(f"this URL needs a package that is not installed: {e}", "source") from None


class _Fetcher:
    """Reads files of one filesystem until `end` on the monotonic clock."""

    def __init__(self, files: Any, end: float, spend: Spend) -> None:
        self._files, self._end, self._spend = files, end, spend

    def text(self, url: str) -> str:
        """A small file's text; empty if it is not there."""
        try:
            return _again(lambda: b"".join(self._chunks(url, _SUMS, _SMALL)), self._end).decode("utf-8", "replace")
        except _Refused:
            return ""

    def copy(self, url: str, target: Path, limit: int) -> tuple[int, str]:
        """Copy one file of up to `limit` bytes; answers its size and its SHA-256. Nothing is left of a failure."""

        def attempt() -> tuple[int, str]:
            copied, digest = 0, hashlib.sha256()
            try:
                with target.open("wb") as out:
                    for chunk in self._chunks(url, target.name, limit):
                        self._spend(len(chunk))
                        copied += len(chunk)
                        out.write(chunk)
                        digest.update(chunk)
            except (_Broken, _Refused):
                target.unlink(missing_ok=True)
                self._spend(-copied)
                raise
            return copied, digest.hexdigest()

        return _again(attempt, self._end)

    def _chunks(self, url: str, name: str, limit: int) -> Iterator[bytes]:
        """The remote file in pieces. Raises _Refused, _Broken, TimeoutError, and InvalidRequest over `limit` bytes."""
        copied, expected = 0, None
        try:
            if time.monotonic() >= self._end:
                raise TimeoutError
            with self._files.open(url, "rb", block_size=_BLOCK.get(urlsplit(url).scheme, _CHUNK)) as remote:
                _check_status(getattr(getattr(remote, "r", None), "status", 200))
                expected = getattr(remote, "size", None)
                while chunk := remote.read(_CHUNK):
                    copied += len(chunk)
                    if copied > limit:
                        which = "that such a file has" if limit == _SMALL else "(--max-upload)"
                        raise InvalidRequest(f"{name} is over the limit of {limit} bytes {which}", "source")
                    yield chunk
                    if time.monotonic() >= self._end:
                        raise TimeoutError
        except (InvalidRequest, _Refused):
            raise
        except Exception as e:  # each protocol's library has errors of its own
            if time.monotonic() >= self._end:
                raise TimeoutError from None
            reason = " ".join(str(e.__cause__ or e).split())[:200] or type(e).__name__
            raise (_Refused if _is_final(e) else _Broken)(reason) from None
        if isinstance(expected, int) and copied != expected:
            raise _Broken(f"{name} has {expected} bytes, of which {copied} came")


def _check_status(status: int) -> None:
    """Raises _Refused for an answer over HTTP that is no error and not the file either."""
    if status != 200:
        why = "; redirects are not followed" if 300 <= status < 400 else ""
        raise _Refused(f"the host answers {status}{why}")


def _again(attempt: Callable[[], T], end: float) -> T:
    """What `attempt` gives; if the transfer breaks, it is tried again after a pause. Raises InvalidRequest."""
    for tried in range(1, retries.TRIES):
        try:
            return attempt()
        except _Broken:
            time.sleep(max(0.0, min(retries.PAUSE * tried, end - time.monotonic())))
    try:
        return attempt()
    except _Broken as e:
        raise InvalidRequest(f"the URL could not be read, {retries.TRIES} times: {e}", "source") from None


def _is_final(error: BaseException) -> bool:
    """Whether the host has answered, and not said that it is out of order or too busy."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)  # botocore's
        told = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = getattr(seen, "status", told.get("HTTPStatusCode"))
        if isinstance(status, int):
            return not retries.may_pass(status)
        seen = seen.__cause__
    bare = isinstance(error, FileNotFoundError) and error.__cause__ is None
    return bare or isinstance(error, PermissionError | ValueError | TypeError)
