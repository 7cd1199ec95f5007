"""Access control: keys and the access table of all routes, Host and Origin headers, tenants."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api.auth import Access, KeyRing, access
from server.errors import BadSetting
from tests.waiting import until

OPEN = {
    *(("GET", path) for path in ("/health", "/health/live", "/health/ready")),
    *(("GET", path) for path in ("/", "/web/{file}", "/web/{folder}/{file}")),
}
METRICS = {("GET", "/metrics")}
INFERENCE = {
    *(("POST", path) for path in ("/generate", "/classify", "/v1/completions", "/v1/chat/completions")),
    *(("GET", path) for path in ("/adapters", "/adapters/{name}", "/tasks", "/tasks/{task}", "/stats", "/docs")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/{model}", "/openapi.json", "/tasks/{task}/performance")),
    ("POST", "/tasks/{task}/feedback"),
    *(("GET", path) for path in ("/jobs", "/jobs/{id}")),
}
KEYED = {"api_keys": "team:secret-one", "admin_keys": "boss:secret-two"}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    return error


def all_routes(app: Any) -> set[tuple[str, str]]:
    def walk(routes: Any) -> Iterator[APIRoute]:
        for route in routes:
            included = getattr(route, "original_router", None)
            if included is not None:
                yield from walk(included.routes)
            elif isinstance(route, APIRoute):
                yield route

    return {(method, route.path) for route in walk(app.routes) for method in route.methods}


def test_access_of_every_route(start: Any) -> None:
    """Routes that are not listed in this file need an admin key, including new ones."""
    live = start(**KEYED)
    routes = all_routes(live.app)
    assert len(routes) > 20
    for method, path in routes:
        url = re.sub(r"\{\w+\}", "x", path)
        plain = live.http.request(method, url)
        assert (plain.status_code == 401) == ((method, path) not in OPEN), (method, path, plain.status_code)
        if (method, path) in OPEN:
            continue
        assert error_of(plain)["code"] == "invalid_api_key" and plain.headers["www-authenticate"] == "Bearer"
        assert live.http.request(method, url, headers=bearer("wrong")).status_code == 401
        as_team = live.http.request(method, url, headers=bearer("secret-one")).status_code
        assert (as_team == 403) == ((method, path) not in INFERENCE | METRICS), (method, path, as_team)
        assert live.http.request(method, url, headers=bearer("secret-two")).status_code not in (401, 403)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/something/new"),
        ("DELETE", "/generate"),
        ("POST", "/tasks/x/evaluate"),
        ("GET", "/v1/files"),
        ("GET", "/adapters/a/b"),
        ("POST", "/generate\n"),
        ("GET", "/openapixjson"),
    ],
)
def test_unlisted_paths_need_an_admin_key(method: str, path: str) -> None:
    assert access(method, path) is Access.ADMIN


def test_admin_routes_are_forbidden_if_there_are_no_admin_keys(start: Any) -> None:
    live = start(api_keys="team:secret-one")
    refused = live.http.delete("/adapters/x", headers=bearer("secret-one"))
    assert refused.status_code == 403 and "LORAMUX_ADMIN_KEYS" in error_of(refused)["message"]
    assert live.http.get("/adapters", headers=bearer("team:secret-one")).status_code == 200


def test_with_admin_keys_alone_every_route_needs_one(start: Any) -> None:
    live = start(admin_keys="boss:secret-two")
    assert live.http.get("/adapters").status_code == live.generate("x").status_code == 401
    assert live.http.get("/adapters", headers=bearer("secret-two")).status_code == 200


def test_unknown_routes_are_404_with_any_key(start: Any) -> None:
    live = start(api_keys="team:secret-one", metrics_key="prom:secret-three")
    assert live.http.post("/v1/embeddings", json={}, headers=bearer("secret-one")).status_code == 404
    wrong = live.http.get("/generate", headers=bearer("secret-one"))
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert live.http.post("/v1/embeddings", json={}).status_code == 401
    assert live.http.get("/nope", headers=bearer("secret-three")).status_code == 403


def test_metrics_key_opens_metrics_only(start: Any, tmp_path: Path) -> None:
    live = start(**KEYED, metrics_key="prom:secret-three")
    assert live.http.get("/metrics").status_code == 401
    assert live.http.get("/metrics", headers=bearer("secret-three")).status_code == 200
    assert live.http.get("/adapters", headers=bearer("secret-three")).status_code == 403
    public = start(**KEYED, metrics_public=True, state_dir=tmp_path / "other")
    assert public.http.get("/metrics").status_code == 200


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def test_key_file_is_read_again_when_it_changes(start: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one:alpha\n")
    live = start(api_keys_file=file)

    def status(secret: str) -> int:
        return int(live.http.get("/adapters", headers=bearer(secret)).status_code)

    assert status("alpha") == 200
    file.write_text("two:beta\n", encoding="utf-8-sig")
    assert (status("alpha"), status("beta")) == (401, 200)
    for change in (lambda: file.write_text("not a key"), file.unlink):
        change()
        assert status("beta") == 200, "the last good keys stay"
        assert live.http.get("/adapters").status_code == 401


def test_key_file_with_unchanged_time_and_size_is_read_again(tmp_path: Path) -> None:
    """An unpacked archive keeps both."""
    file = tmp_path / "keys"
    file.write_text("team:alpha")
    ring, before = KeyRing("", file, "api_keys"), file.stat()

    def change_time_moved() -> bool:
        os.utime(file)
        return file.stat().st_ctime_ns != before.st_ctime_ns

    until(change_time_moved)
    file.write_text("team:gamma")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert ring.find(digest("gamma")) and not ring.find(digest("alpha"))


def test_each_error_in_a_key_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("team:one")
    ring = KeyRing("", file, "api_keys")
    for content, logged in (("no key", 1), ("another", 2), ("team:one", 2), ("no key", 3)):
        file.write_text(content)
        for _ in range(3):
            assert ring.find(digest("one"))
        assert caplog.text.count("the keys stay unchanged") == logged, content


def test_empty_key_file_allows_nobody_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("")
    ring = KeyRing("", file, "api_keys")
    assert ring and ring.find(b"") is None
    with pytest.raises(BadSetting, match="api_keys_file"):
        KeyRing("", tmp_path / "absent", "api_keys")


def test_host_header(start: Any) -> None:
    live = start(allowed_hosts="llm.example")
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "llm.example", "LLM.example:443"):
        assert live.http.get("/adapters", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "[::2]"):
        refused = live.http.get("/adapters", headers={"host": host})
        assert refused.status_code == 403 and error_of(refused)["code"] == "forbidden", host
    live.stop()
    assert start(allowed_hosts="*").http.get("/stats", headers={"host": "10.1.2.3:8000"}).status_code == 200


def test_foreign_origins_are_refused_on_writes(live: Any) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    assert live.http.post("/generate", json=body, headers={"origin": live.url}).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://[", "", "ftp://127.0.0.1"):
        refused = live.http.post("/generate", json=body, headers={"origin": origin})
        assert refused.status_code == 403 and error_of(refused)["code"] == "forbidden", origin
        assert "access-control-allow-origin" not in refused.headers
    evil = {"origin": "http://evil.example"}
    for method, path in (("PUT", "/tasks/x"), ("DELETE", "/adapters/a"), ("OPTIONS", "/generate")):
        assert live.http.request(method, path, headers=evil).status_code == 403
    assert live.http.get("/adapters", headers=evil).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:443", "https://localhost", 200),
        ("localhost", "http://localhost:80", 200),
        ("localhost:443", "http://localhost", 403),
        ("localhost", "https://localhost:80", 403),
    ],
)
def test_default_ports_do_not_matter_for_the_origin(live: Any, host: str, origin: str, status: int) -> None:
    headers = {"host": host, "origin": origin}
    assert live.http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=headers).status_code == status


@pytest.mark.parametrize(("site", "status"), [("same-origin", 200), ("same-site", 403), ("cross-site", 403)])
def test_sec_fetch_site_marks_the_own_page_behind_a_proxy(live: Any, site: str, status: int) -> None:
    headers = {"origin": "https://models.example", "sec-fetch-site": site}
    answer = live.http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    assert answer.status_code == status


def test_repeated_host_and_authorization_headers_are_refused(start: Any) -> None:
    """A proxy may have checked the other one."""
    live = start(**KEYED)
    host, port = live.url.removeprefix("http://").split(":")
    right, wrong = b"Authorization: Bearer secret-one", b"Authorization: Bearer other"

    def status(*headers: bytes) -> int:
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"\r\n".join((b"GET /adapters HTTP/1.1", *headers, b"Connection: close", b"", b"")))
            return int(connection.recv(64).split()[1])

    assert status(b"Host: localhost", right) == 200
    for twice in ((right, wrong), (wrong, right), (right, right)):
        assert status(b"Host: localhost", *twice) == 401
    assert status(b"Host: localhost", b"Host: evil.example", right) in (400, 403)


def test_tenants_do_not_share_the_prefix_cache(start: Any) -> None:
    live = start(api_keys="one:alpha,two:beta", admin_keys="boss:gamma")
    body = {"prompt": "a long enough prompt for several blocks of the cache, twice", "max_tokens": 1}

    def cached(token: str) -> int:
        answer = live.http.post("/generate", json=body, headers=bearer(token))
        return int(answer.json()["usage"]["cached_tokens"])

    assert cached("alpha") == 0 and cached("alpha") > 0
    assert cached("beta") == 0
