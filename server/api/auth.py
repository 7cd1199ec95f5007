"""Who may call what: keys, the Host and Origin headers. Default-deny: a route that is not listed needs an admin key.

Owns the access table of all routes and the keys' lifetime. Keys are kept as SHA-256 digests, compared in constant time.
"""

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

from server.api.errors import NO_ROUTE, answer
from server.api.middleware import refuse
from server.api.types import ASGIApp, Receive, Scope, Send
from server.errors import BadSetting, Forbidden, ServerError, Unauthorized, UnknownName
from server.settings import Settings, parse_keys

log = logging.getLogger(__name__)

NAME = "[^/]+"
_CONTROL = re.compile(r"[\0-\x1f\x7f]")


class Access(enum.Enum):
    """What a route asks of its caller."""

    OPEN = "open"
    METRICS = "metrics"
    INFERENCE = "inference"
    ADMIN = "admin"


def _paths(*templates: str) -> re.Pattern[str]:
    return re.compile("|".join(re.sub(r"\{\w+\}", NAME, re.escape(t).replace(r"\{", "{").replace(r"\}", "}"))
                               for t in templates))  # fmt: skip


OPEN = {"GET": _paths("/health", "/health/live", "/health/ready", "/", "/web/{file}", "/web/{folder}/{file}")}
INFERENCE = {
    "GET": _paths(
        *("/adapters", "/adapters/{name}", "/tasks", "/tasks/{task}", "/tasks/{task}/performance", "/v1/models"),
        *("/v1/models/{model}", "/jobs", "/jobs/{id}", "/stats", "/docs", "/openapi.json"),
    ),
    "POST": _paths(
        *("/generate", "/classify", "/v1/completions", "/v1/chat/completions", "/tasks/{task}/feedback"),
    ),
}


def access(method: str, path: str) -> Access:
    """What `path` asks of a caller. The tables above are the only ones that open anything."""
    if method in OPEN and OPEN[method].fullmatch(path):
        return Access.OPEN
    if method == "GET" and path == "/metrics":
        return Access.METRICS
    if method in INFERENCE and INFERENCE[method].fullmatch(path):
        return Access.INFERENCE
    return Access.ADMIN


@dataclass(frozen=True)
class Key:
    """A caller's key: `id` names the tenant."""

    id: str
    digest: bytes


class KeyRing:
    """Keys of one kind: from a setting and from a file that is read again whenever it changes."""

    def __init__(self, text: str, file: Path | None, param: str) -> None:
        self._fixed = _digests(parse_keys(text, param))
        self._file = file
        self._param = param
        self._stamp: tuple[int, ...] | None = None
        self._told: tuple[tuple[int, ...] | None, str] | None = None
        """Which state of the file is wrong, and how, as the log has been told."""
        self._read: list[Key] = []
        if file is not None:
            self._refresh(first=True)

    def __bool__(self) -> bool:
        """Whether keys of this kind are asked for at all. An empty file locks out; it does not open."""
        return bool(self._fixed) or self._file is not None

    def find(self, digest: bytes) -> Key | None:
        """The key of a token's digest. Looks at every key, whatever it finds."""
        if self._file is not None:
            self._refresh()
        found = None
        for key in (*self._fixed, *self._read):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self, first: bool = False) -> None:
        """Read the file if it is another one than before. A file that cannot be read leaves the keys as they were."""
        assert self._file is not None
        stamp = None
        try:
            stat = self._file.stat()
            # Archives bring their files' own times, and a new file may get the inode of the one it replaces.
            stamp = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return
            self._read = _digests(parse_keys(self._file.read_text(encoding="utf-8-sig"), f"{self._param}_file"))
            self._stamp, self._told = stamp, None
            if not first:
                log.info("%s_file was read again: %d keys", self._param, len(self._read) // 2)
        except (OSError, UnicodeDecodeError, BadSetting) as error:
            if first:
                raise BadSetting(f"{self._param}_file cannot be read: {error}", f"{self._param}_file") from None
            if (stamp, str(error)) != self._told:
                log.error("%s_file cannot be read, the keys stay as they were: %s", self._param, error)
            self._stamp, self._told = None, (stamp, str(error))


def _digests(keys: dict[str, str]) -> list[Key]:
    """A client may send the secret alone, or `id:secret`."""
    return [
        Key(name, hashlib.sha256(token.encode()).digest())
        for name, secret in keys.items()
        for token in (secret, f"{name}:{secret}")
    ]


class Keys:
    """All keys of a server, and the rule of who may call what."""

    def __init__(self, settings: Settings) -> None:
        self.inference = KeyRing(settings.api_keys.get_secret_value(), settings.api_keys_file, "api_keys")
        self.admin = KeyRing(settings.admin_keys.get_secret_value(), settings.admin_keys_file, "admin_keys")
        self.metrics = KeyRing(settings.metrics_key.get_secret_value(), settings.metrics_key_file, "metrics_key")
        self.metrics_public = settings.metrics_public

    def check(self, needed: Access, authorization: str | None) -> str:
        """The tenant of a caller who may do this. Raises Unauthorized, Forbidden."""
        if needed is Access.OPEN or (needed is Access.METRICS and self.metrics_public):
            return ""
        if not self.inference and not self.admin and not (self.metrics and needed is Access.METRICS):
            return ""
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise Unauthorized("a key is needed: send it as `Authorization: Bearer <key>`")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        admin, inference, metrics = self.admin.find(digest), self.inference.find(digest), self.metrics.find(digest)
        if admin is not None:
            return admin.id
        if inference is not None:
            if needed is Access.ADMIN:
                raise Forbidden(
                    "this route needs an admin key"
                    if self.admin
                    else "this route needs an admin key, and the server has none; set LORAMUX_ADMIN_KEYS"
                )
            return inference.id
        if metrics is not None:
            if needed is Access.METRICS:
                return metrics.id
            raise Forbidden("this key opens /metrics and nothing else")
        raise Unauthorized("the key is not known")


class AuthMiddleware:
    """Middleware: Host, Origin, then the key. Refuses before a byte of the body is looked at."""

    def __init__(self, app: ASGIApp, keys: Keys, hosts: frozenset[str]) -> None:
        self.app = app
        self.keys = keys
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["tenant"] = self.check(scope)
        except ServerError as error:
            await refuse(answer(error), scope, receive, send)
            return
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> str:
        """The caller's tenant. Raises Unauthorized, Forbidden, UnknownName."""
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"sec-fetch-site", b"authorization"):
                headers.setdefault(name, []).append(value.decode("latin-1"))
        hosts = headers.get(b"host", [])
        if not self._known(hosts):
            raise Forbidden("this server does not go by that name; add it with --allowed-hosts")
        if scope["method"] != "GET" and headers.get(b"sec-fetch-site") != ["same-origin"]:
            for origin in headers.get(b"origin", []):
                if not _is_origin(origin, hosts):
                    raise Forbidden(
                        "pages of another origin may not call this server; let a server of yours call it for them, and "
                        "for its own page let the proxy in between pass on the Host header with its port"
                    )
        authorization = headers.get(b"authorization", [])
        given = authorization[0] if len(authorization) == 1 else None
        needed = access(scope["method"], scope["path"])
        broken = _CONTROL.search(scope["path"])  # the router would take a path and a line's end for that path
        if needed is Access.ADMIN and (broken or not _routed(scope)):
            needed = Access.INFERENCE  # whoever may ask at all hears that there is no such route, or not that method
        tenant = self.keys.check(needed, given)
        if broken:
            raise UnknownName(NO_ROUTE)
        return tenant

    def _known(self, hosts: list[str]) -> bool:
        """Whether the server goes by the one name that it is asked by. A client of HTTP/1.0 may tell none."""
        if len(hosts) != 1:
            return not hosts and "*" in self.hosts
        name = hosts[0].lower()
        name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
        return name in self.hosts or "*" in self.hosts


def _routed(scope: Scope) -> bool:
    """Whether the application has a route for this method and path."""
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


def _is_origin(origin: str, hosts: list[str]) -> bool:
    """Whether an Origin header names the host that was asked. The port that its scheme has anyway is told by some."""
    try:
        url = urlsplit(origin)
    except ValueError:
        return False
    default = {"http": ":80", "https": ":443"}.get(url.scheme)
    if default is None:
        return False
    return [url.netloc.lower().removesuffix(default)] == [host.lower().removesuffix(default) for host in hosts]


def known_hosts(settings: Settings) -> frozenset[str]:
    """The values of the Host header, without a port, that the server goes by."""
    own = settings.host.strip("[]").lower()
    own = f"[{own}]" if ":" in own else own
    return frozenset({"localhost", "127.0.0.1", "[::1]", own, *(h.lower() for h in settings.allowed_hosts)})
