"""Adapters below a URL, through `fsspec`: http(s), s3, gs and other installed protocols, but never local files.

Only prefixes that the settings allow are read, within limits on bytes and time. Redirects are not followed, because
they could leave the allow-list. A file SHA256SUMS in the folder (as `sha256sum` writes it) is checked.
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
_SMALL = 1 << 20  # limit in bytes of every file except the tensors
_CHUNK = 1 << 20
_BLOCK = {"http": 0, "https": 0}  # stream: not every host supports ranges
_LOCAL = frozenset({"file", "local", "memory", "zip", "tar", "libarchive", "git", "ssh", "sftp", "smb", "reference"})
_SILENCE = 30.0  # seconds without data after which a host is given up


class _TransferError(Exception):
    """The transfer failed in a way that may pass."""


class _Refused(Exception):
    """The host does not give the file. Trying again would not help."""


def is_url(text: str) -> bool:
    """Whether `text` begins like a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


def check(url: str, allow: Sequence[str]) -> str:
    """`url` without a trailing slash. Raises InvalidRequest unless it is plain and below one of `allow`."""
    if not _is_plain(url):
        raise InvalidRequest("the source must be a plain URL of a folder: no query, user, escapes or `..`", "source")
    trimmed = url.rstrip("/")
    if not any(f"{trimmed}/".startswith(f"{prefix.rstrip('/')}/") for prefix in allow):
        raise InvalidRequest("adapters may not be loaded from this URL; --url-allow lists the prefixes", "source")
    return trimmed


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    bare = not ("?" in url or "#" in url or "@" in parts.netloc)
    escaped = "%" in url or "\\" in url or "::" in url.replace(parts.netloc, "", 1)  # `::` chains protocols
    return bare and "://" in url and not escaped and parts.scheme not in _LOCAL and ".." not in parts.path.split("/")


def fetch(url: str, folder: Path, *, max_bytes: int, seconds: float, spend: Spend) -> None:
    """Copy the adapter at `url` (see `check`) into `folder`, within limits on bytes and seconds.

    Raises InvalidRequest, TimeoutError, OSError, and the errors of `spend`, which is called with every byte count.
    """
    reader = _Reader(_filesystem(urlsplit(url).scheme, seconds), time.monotonic() + seconds, spend)
    sums = _read_sums(reader.text(f"{url}/{_SUMS}"))
    left = max_bytes
    for name in (*REQUIRED, *OPTIONAL):
        limit = left if name.endswith(".safetensors") else min(left, _SMALL)
        try:
            size, digest = reader.copy(f"{url}/{name}", folder / name, limit)
        except _Refused as error:  # a bucket that may not be listed reports missing files as forbidden
            if name in REQUIRED:
                raise InvalidRequest(f"the URL has no {name}: {error}", "source") from None
            continue
        left -= size
        if sums.get(name, digest) != digest:
            raise InvalidRequest(f"{name} has the SHA-256 {digest}, which is not the one in {_SUMS}", "source")


def _read_sums(text: str) -> dict[str, str]:
    """Digests by file name, from lines of `<sha256> [ *]<name>`."""
    lines = re.findall(r"^([0-9a-fA-F]{64}) [ *](?:\./)?(\S+)\s*$", text, re.MULTILINE)
    return {name: digest.lower() for digest, name in lines}


def _filesystem(scheme: str, seconds: float) -> Any:
    """The `fsspec` filesystem of a protocol, with time limits. Raises InvalidRequest."""
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
    except (ImportError, ValueError) as error:
        raise InvalidRequest(f"this URL needs a package that is not installed: {error}", "source") from None


class _Reader:
    """Reads files of one filesystem until `end` on the monotonic clock."""

    def __init__(self, files: Any, end: float, spend: Spend) -> None:
        self._files, self._end, self._spend = files, end, spend

    def text(self, url: str) -> str:
        """The text of a small file; empty if there is none."""
        try:
            return self._retried(lambda: b"".join(self._chunks(url, _SUMS, _SMALL))).decode("utf-8", "replace")
        except _Refused:
            return ""

    def copy(self, url: str, target: Path, limit: int) -> tuple[int, str]:
        """Copy one file of up to `limit` bytes. Returns its size and SHA-256."""

        def attempt() -> tuple[int, str]:
            copied, digest = 0, hashlib.sha256()
            try:
                with target.open("wb") as out:
                    for chunk in self._chunks(url, target.name, limit):
                        self._spend(len(chunk))
                        copied += len(chunk)
                        out.write(chunk)
                        digest.update(chunk)
            except (_TransferError, _Refused):
                target.unlink(missing_ok=True)
                self._spend(-copied)
                raise
            return copied, digest.hexdigest()

        return self._retried(attempt)

    def _retried(self, attempt: Callable[[], T]) -> T:
        try:
            return retries.retrying(lambda error: isinstance(error, _TransferError))(attempt)
        except _TransferError as error:
            message = f"the URL could not be read in {retries.TRIES} attempts: {error}"
            raise InvalidRequest(message, "source") from None

    def _chunks(self, url: str, name: str, limit: int) -> Iterator[bytes]:
        """Yield the remote file. Raises _Refused, _TransferError, TimeoutError, InvalidRequest over `limit` bytes."""
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
                        which = "for such a file" if limit == _SMALL else "(--max-upload)"
                        raise InvalidRequest(f"{name} is over the limit of {limit} bytes {which}", "source")
                    yield chunk
                    if time.monotonic() >= self._end:
                        raise TimeoutError
        except (InvalidRequest, _Refused):
            raise
        except Exception as error:  # each protocol's library has its own errors
            if time.monotonic() >= self._end:
                raise TimeoutError from None
            reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
            raise (_Refused if _is_final(error) else _TransferError)(reason) from None
        if isinstance(expected, int) and copied != expected:
            raise _TransferError(f"{name} has {expected} bytes, but {copied} arrived")


def _check_status(status: int) -> None:
    """Raises _Refused for an HTTP status below 400 that does not come with the file."""
    if status != 200:
        why = "; redirects are not followed" if 300 <= status < 400 else ""
        raise _Refused(f"the host answers {status}{why}")


def _is_final(error: BaseException) -> bool:
    """Whether the host answered, and not that it is overloaded or out of order."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)  # botocore's
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = getattr(cause, "status", metadata.get("HTTPStatusCode"))
        if isinstance(status, int):
            return not retries.is_transient(status)
        cause = cause.__cause__
    missing = isinstance(error, FileNotFoundError) and error.__cause__ is None
    return missing or isinstance(error, PermissionError | ValueError | TypeError)
