"""Access control: API keys, and the Host and Origin headers. Routes that are not listed here need an admin key."""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_reply
from server.api.middleware import discard_body, send_reply
from server.errors import BadSetting, Forbidden, ServerError, Unauthorized
from server.settings import Settings, parse_keys

log = logging.getLogger(__name__)


class Access(enum.Enum):
    """What a route requires of its caller."""

    OPEN = "open"
    METRICS = "metrics"
    INFERENCE = "inference"
    ADMIN = "admin"


def _paths(*templates: str) -> re.Pattern[str]:
    return re.compile("|".join(re.sub(r"\{\w+\}", "[^/]+", t.replace(".", r"\.")) for t in templates))


OPEN = {"GET": _paths("/health", "/health/live", "/health/ready", "/", "/web/{file}", "/web/{folder}/{file}")}
INFERENCE = {
    "GET": _paths(
        *("/adapters", "/adapters/{name}", "/tasks", "/tasks/{task}", "/tasks/{task}/performance", "/v1/models"),
        *("/v1/models/{model}", "/jobs", "/jobs/{id}", "/stats", "/docs", "/openapi.json"),
    ),
    "POST": _paths("/generate", "/classify", "/v1/completions", "/v1/chat/completions", "/tasks/{task}/feedback"),
}


def access(method: str, path: str) -> Access:
    """What a method and path require. Anything that is not in the tables above requires an admin key."""
    if method in OPEN and OPEN[method].fullmatch(path):
        return Access.OPEN
    if method == "GET" and path == "/metrics":
        return Access.METRICS
    if method in INFERENCE and INFERENCE[method].fullmatch(path):
        return Access.INFERENCE
    return Access.ADMIN


@dataclass(frozen=True)
class Key:
    """A key. `id` is the tenant."""

    id: str
    digest: bytes


class KeyRing:
    """Keys of one kind, from a setting and from a file that is read again when it changes.

    Only SHA-256 digests are kept, and they are compared in constant time.
    """

    def __init__(self, text: str, file: Path | None, param: str) -> None:
        self._fixed = _digests(parse_keys(text, param))
        self._from_file: list[Key] = []
        self._file = file
        self._param = f"{param}_file"
        self._stamp = None if file is None else _file_stamp(file)
        if file is not None:
            try:
                self._from_file = self._read(file)
            except (OSError, UnicodeDecodeError, BadSetting) as error:
                raise BadSetting(f"{self._param} cannot be read: {error}", self._param) from None

    def __bool__(self) -> bool:
        """Whether keys of this kind are configured. An empty key file means that nobody has access."""
        return bool(self._fixed) or self._file is not None

    def find(self, digest: bytes) -> Key | None:
        """The key with this digest. Compares all keys, so that the time does not depend on the result."""
        if self._file is not None:
            self._refresh(self._file)
        found = None
        for key in (*self._fixed, *self._from_file):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self, file: Path) -> None:
        """Read the file if it changed. If it cannot be read, log that once and keep the keys."""
        stamp = _file_stamp(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._from_file = self._read(file)
            log.info("%s was read again: %d keys", self._param, len(self._from_file) // 2)
        except (OSError, UnicodeDecodeError, BadSetting) as error:
            log.error("%s cannot be read, the keys stay unchanged: %s", self._param, error)

    def _read(self, file: Path) -> list[Key]:
        return _digests(parse_keys(file.read_text(encoding="utf-8-sig"), self._param))


def _file_stamp(file: Path) -> tuple[int, ...] | None:
    """Changes whenever the file does; None if there is no file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _digests(keys: dict[str, str]) -> list[Key]:
    """Two digests for each key: clients may send the secret or `id:secret`."""
    return [
        Key(name, hashlib.sha256(token.encode()).digest())
        for name, secret in keys.items()
        for token in (secret, f"{name}:{secret}")
    ]


class Keys:
    """All keys of a server, and who may call what."""

    def __init__(self, settings: Settings) -> None:
        self.inference = KeyRing(settings.api_keys.get_secret_value(), settings.api_keys_file, "api_keys")
        self.admin = KeyRing(settings.admin_keys.get_secret_value(), settings.admin_keys_file, "admin_keys")
        self.metrics = KeyRing(settings.metrics_key.get_secret_value(), settings.metrics_key_file, "metrics_key")
        self.metrics_public = settings.metrics_public

    def check(self, needed: Access, authorization: str | None) -> str:
        """The tenant of the caller. Raises Unauthorized, Forbidden."""
        if needed is Access.OPEN or (needed is Access.METRICS and self.metrics_public):
            return ""
        if not self.inference and not self.admin and not (self.metrics and needed is Access.METRICS):
            return ""  # the server has no keys
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("a key is needed: send it as `Authorization: Bearer <key>`")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        admin, inference, metrics = self.admin.find(digest), self.inference.find(digest), self.metrics.find(digest)
        if admin is not None:
            return admin.id
        if inference is not None:
            if needed is Access.ADMIN:
                missing = "" if self.admin else ", and the server has none; set LORAMUX_ADMIN_KEYS"
                raise Forbidden(f"this route needs an admin key{missing}")
            return inference.id
        if metrics is not None:
            if needed is Access.METRICS:
                return metrics.id
            raise Forbidden("this key is for /metrics only")
        raise Unauthorized("the key is not known")


class AuthMiddleware:
    """Checks Host, Origin and key before the body is read. Sets `tenant` in the request state."""

    def __init__(self, app: ASGIApp, keys: Keys, hosts: frozenset[str]) -> None:
        self.app = app
        self.keys = keys
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["tenant"] = self.check(scope)
            except ServerError as error:
                await discard_body(receive)
                await send_reply(error_reply(error), scope, send)
                return
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> str:
        """The caller's tenant. Raises Unauthorized, Forbidden."""
        hosts = _header(scope, b"host")
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            raise Forbidden("the server does not accept this Host header; add the name with --allowed-hosts")
        if scope["method"] != "GET" and _header(scope, b"sec-fetch-site") != ["same-origin"]:
            if any(not _is_same_origin(origin, hosts[0]) for origin in _header(scope, b"origin")):
                raise Forbidden(
                    "pages of other origins may not call this server; call it from your own backend. If this is the "
                    "server's own page behind a proxy, let the proxy pass on the Host header with its port"
                )
        needed = access(scope["method"], scope["path"])
        if needed is Access.ADMIN and not _has_route(scope):
            needed = Access.INFERENCE  # any key gets 404 or 405 instead of 403
        given = _header(scope, b"authorization")
        return self.keys.check(needed, given[0] if len(given) == 1 else None)

    def _is_own_host(self, host: str) -> bool:
        name = host.lower()
        name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
        return name in self.hosts or "*" in self.hosts


def _header(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _has_route(scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


def _is_same_origin(origin: str, host: str) -> bool:
    """Whether an Origin header names the requested host. Either may leave out the default port."""
    try:
        url = urlsplit(origin)
    except ValueError:
        return False
    port = {"http": ":80", "https": ":443"}.get(url.scheme)
    return port is not None and url.netloc.lower().removesuffix(port) == host.lower().removesuffix(port)


def known_hosts(settings: Settings) -> frozenset[str]:
    """Accepted values of the Host header, without port."""
    own = settings.host.strip("[]").lower()
    own = f"[{own}]" if ":" in own else own
    return frozenset({"localhost", "127.0.0.1", "[::1]", own, *(h.lower() for h in settings.allowed_hosts)})
