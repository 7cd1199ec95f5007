"""Who gets in: keys by an allow-list of every route, Host, Origin, body limits; and one error shape on every status."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api import middleware
from server.api.auth import Access, KeyRing, access
from server.api.middleware import patient
from server.errors import BadSetting, BodyTooSlow
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


def dial(live: Any) -> socket.socket:
    """A connection to the server on which nothing has been said."""
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"].startswith("req-")
    error: dict[str, Any] = body["error"]
    return error


def every_route(app: Any) -> set[tuple[str, str]]:
    def walk(routes: Any) -> Iterator[APIRoute]:
        for route in routes:
            included = getattr(route, "original_router", None)
            if included is not None:
                yield from walk(included.routes)
            elif isinstance(route, APIRoute):
                yield route

    return {(m, r.path) for r in walk(app.routes) for m in r.methods}


def test_every_route_needs_what_the_contract_says(start: Any) -> None:
    """Walks all routes: what is not listed here needs an admin key, new ones included."""
    live = start(**KEYED)
    routes = every_route(live.app)
    assert len(routes) > 20
    for method, path in routes:
        url = re.sub(r"\{\w+\}", "x", path)
        plain = live.http.request(method, url)
        kept_out = plain.status_code == 401
        assert kept_out == ((method, path) not in OPEN), (method, path, plain.status_code)
        if not kept_out:
            continue
        assert error_of(plain)["code"] == "invalid_api_key" and plain.headers["www-authenticate"] == "Bearer"
        assert live.http.request(method, url, headers=bearer("wrong")).status_code == 401
        as_team = live.http.request(method, url, headers=bearer("secret-one")).status_code
        assert (as_team == 403) == ((method, path) not in INFERENCE | METRICS), (method, path, as_team)
        assert live.http.request(method, url, headers=bearer("secret-two")).status_code not in (401, 403)


def test_a_route_that_nobody_has_listed_needs_an_admin_key() -> None:
    assert access("GET", "/something/new") is Access.ADMIN
    assert access("DELETE", "/generate") is Access.ADMIN
    assert access("POST", "/tasks/x/evaluate") is Access.ADMIN
    assert access("GET", "/v1/files") is Access.ADMIN
    assert access("GET", "/adapters/a/b") is Access.ADMIN


def test_admin_routes_are_closed_without_admin_keys(start: Any) -> None:
    live = start(api_keys="team:secret-one")
    answer = live.http.delete("/adapters/x", headers=bearer("secret-one"))
    assert answer.status_code == 403 and "admin" in error_of(answer)["message"]
    assert live.http.get("/adapters", headers=bearer("team:secret-one")).status_code == 200


def test_what_is_no_route_is_not_found_whatever_the_key(start: Any) -> None:
    live = start(api_keys="team:secret-one", metrics_key="prom:secret-three")
    assert live.http.post("/v1/embeddings", json={}, headers=bearer("secret-one")).status_code == 404
    wrong = live.http.get("/generate", headers=bearer("secret-one"))
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert live.http.post("/v1/embeddings", json={}).status_code == 401
    assert live.http.get("/nope", headers=bearer("secret-three")).status_code == 403


@pytest.mark.parametrize("path", ["/generate%0A", "/generate%00", "/health/live%0A", "/adapters/a%0D", "/web/%7F"])
def test_no_path_has_control_characters(start: Any, path: str) -> None:
    """Least of all those of a route with a line's end behind them."""
    live = start(api_keys="team:secret-one", admin_keys="boss:secret-two")
    for method in ("GET", "POST"):
        for key in ("secret-one", "secret-two"):
            refused = live.http.request(method, path, headers=bearer(key))
            assert refused.status_code == 404 and error_of(refused)["code"] == "not_found"


def test_with_admin_keys_alone_nothing_is_open_to_others(start: Any) -> None:
    live = start(admin_keys="boss:secret-two")
    assert live.http.get("/adapters").status_code == live.generate("x").status_code == 401
    assert live.http.get("/adapters", headers=bearer("secret-two")).status_code == 200


def test_metrics_has_a_key_of_its_own_or_is_public(start: Any, tmp_path: Path) -> None:
    live = start(**KEYED, metrics_key="prom:secret-three")
    assert live.http.get("/metrics").status_code == 401
    assert live.http.get("/metrics", headers=bearer("secret-three")).status_code == 200
    assert live.http.get("/adapters", headers=bearer("secret-three")).status_code == 403
    public = start(**KEYED, metrics_public=True, state_dir=tmp_path / "other")
    assert public.http.get("/metrics").status_code == 200


def test_key_files_are_read_again_when_they_change(start: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one:alpha\n")
    live = start(api_keys_file=file)
    assert live.http.get("/adapters", headers=bearer("alpha")).status_code == 200
    file.write_text("two:beta\n", encoding="utf-8-sig")  # as some editors write it
    os.utime(file, ns=(1, 1))
    assert live.http.get("/adapters", headers=bearer("alpha")).status_code == 401
    assert live.http.get("/adapters", headers=bearer("beta")).status_code == 200
    file.write_text("not a key")
    os.utime(file, ns=(2, 2))
    assert live.http.get("/adapters", headers=bearer("beta")).status_code == 200, "a broken file changes nothing"
    file.unlink()
    assert live.http.get("/adapters", headers=bearer("beta")).status_code == 200
    assert live.http.get("/adapters").status_code == 401, "and never opens"
    with pytest.raises(BadSetting, match="api_keys_file"):
        KeyRing("", tmp_path / "absent", "api_keys")


def test_a_key_file_with_the_time_size_and_inode_of_the_one_before_is_read(tmp_path: Path) -> None:
    """As an archive that is unpacked over it may bring one: a key that was revoked opens nothing any more."""
    file = tmp_path / "keys"
    file.write_text("team:alpha")
    ring, before = KeyRing("", file, "api_keys"), file.stat()
    alpha, gamma = (hashlib.sha256(secret).digest() for secret in (b"alpha", b"gamma"))
    assert ring.find(alpha) and not ring.find(gamma)

    def is_later() -> bool:
        os.utime(file)
        return file.stat().st_ctime_ns != before.st_ctime_ns

    until(is_later)
    file.write_text("team:gamma")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert ring.find(gamma) and not ring.find(alpha)


def test_what_a_door_refuses_is_logged_with_its_code(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    live = start(**KEYED, access_log=True, max_body=1000)
    live.http.get("/adapters")
    live.http.get("/adapters", headers={"host": "evil.example"})
    live.http.post("/generate", content=b"x" * 2000, headers={"authorization": "Bearer secret-one"})

    def lines() -> list[logging.LogRecord]:
        return [r for r in caplog.records if getattr(r, "code", "not_ready") != "not_ready"]

    until(lambda: len(lines()) >= 3)  # a line is written once its answer has left
    told = lines()
    assert [(r.status, r.code) for r in told] == [  # type: ignore[attr-defined]
        (401, "invalid_api_key"), (403, "forbidden"), (413, "body_too_large"),
    ]  # fmt: skip
    assert getattr(told[2], "tenant", "") == "team"


def test_each_mistake_in_a_key_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who mends one by another hears of that: the keys are those of before, one that is revoked among them."""
    file = tmp_path / "keys"
    file.write_text("team:one")
    ring = KeyRing("", file, "api_keys")
    for content, told in (("no key", 1), ("another", 2), ("team:one", 2), ("no key", 3)):
        file.write_text(content)
        for _ in range(3):
            ring._refresh()
        assert caplog.text.count("cannot be read, the keys stay") == told, content


def test_hosts_and_origins(start: Any) -> None:
    live = start(allowed_hosts="llm.example")
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "llm.example", "LLM.example:443"):
        assert live.http.get("/adapters", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "[::2]"):
        answer = live.http.get("/adapters", headers={"host": host})
        assert answer.status_code == 403 and error_of(answer)["code"] == "forbidden", host
    own = live.url
    body = {"prompt": "x", "max_tokens": 1}
    assert live.http.post("/generate", json=body, headers={"origin": own}).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://[", ""):
        answer = live.http.post("/generate", json=body, headers={"origin": origin})
        assert answer.status_code == 403, origin
        error_of(answer)
        assert "access-control-allow-origin" not in answer.headers
    evil = {"origin": "http://evil.example"}
    for method, path in (("PUT", "/tasks/x"), ("DELETE", "/tasks/x"), ("DELETE", "/adapters/a")):
        answer = live.http.request(method, path, headers=evil)
        assert answer.status_code == 403 and error_of(answer)["code"] == "forbidden", (method, path)
    assert live.http.get("/adapters", headers={"origin": "http://evil.example"}).status_code == 200
    assert live.http.options("/generate", headers={"origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "origin", "same"),
    [
        ("localhost:443", "https://localhost", True), ("localhost", "https://localhost:443", True),
        ("localhost:80", "http://localhost", True), ("localhost:443", "http://localhost", False),
        ("localhost", "https://localhost:80", False), ("localhost:8", "http://localhost:80", False),
        ("localhost", "ftp://localhost", False),
    ],
)  # fmt: skip
def test_a_port_that_the_scheme_has_anyway_makes_no_other_origin(
    start: Any, host: str, origin: str, same: bool
) -> None:
    live = start()
    headers = {"host": host, "origin": origin}
    answer = live.http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    assert answer.status_code == (200 if same else 403)


def test_a_browser_that_says_that_it_is_the_servers_own_page(start: Any) -> None:
    """A proxy may have changed the Host; no page can set this header itself."""
    live = start()
    headers = {"origin": "https://models.example"}
    for site, status in (("same-origin", 200), ("same-site", 403), ("cross-site", 403), ("none", 403)):
        told = live.http.post(
            "/generate", json={"prompt": "x", "max_tokens": 1}, headers={**headers, "sec-fetch-site": site}
        )
        assert told.status_code == status, site
    assert "pass on the Host header" in error_of(told)["message"]


def test_whoever_tells_no_name_is_heard_where_any_name_is(start: Any) -> None:
    def status(live: Any, path: str, *headers: bytes, version: bytes = b"1.1") -> int:
        with dial(live) as connection:
            first = b"GET " + path.encode() + b" HTTP/" + version
            connection.sendall(b"\r\n".join((first, *headers, b"Connection: close", b"", b"")))
            return int(connection.recv(64).split()[1])

    live = start()
    for path in ("/health/ready", "/stats"):
        assert status(live, path, b"Host: 10.1.2.3:8000") == status(live, path, version=b"1.0") == 403
    live.stop()
    live = start(allowed_hosts="*")
    assert status(live, "/stats", b"Host: 10.1.2.3:8000") == status(live, "/stats", version=b"1.0") == 200
    assert status(live, "/stats", b"Host: a", b"Host: a") in (400, 403)


def test_headers_that_are_given_twice_are_none(start: Any) -> None:
    """Of two that differ a proxy may have looked at the other."""
    live = start(**KEYED)
    right, wrong = b"Authorization: Bearer secret-one", b"Authorization: Bearer other"

    def status(*headers: bytes) -> int:
        with dial(live) as connection:
            connection.sendall(b"\r\n".join((b"GET /adapters HTTP/1.1", *headers, b"Connection: close", b"", b"")))
            return int(connection.recv(64).split()[1])

    assert status(b"Host: localhost", right) == 200
    for twice in ((right, wrong), (wrong, right), (right, right)):
        assert status(b"Host: localhost", *twice) == 401
    for hosts in ((b"Host: localhost", b"Host: evil.example"), (b"Host: localhost", b"Host: localhost")):
        assert status(*hosts, right) in (400, 403)


def test_one_shape_for_every_status(live: Any) -> None:
    seen = {
        404: live.http.get("/nowhere"),
        405: live.http.get("/generate"),
        422: live.http.post("/generate", json={}),
        400: live.http.post("/v1/completions", json={}),
        409: live.http.delete("/adapters/mood"),
    }
    for status, answer in seen.items():
        assert answer.status_code == status, answer.text
        error_of(answer)
    assert seen[405].headers["allow"] == "POST"
    assert live.http.patch("/adapters/a").headers["allow"] == "DELETE, GET, PUT"
    assert live.http.post("/").headers["allow"] == live.http.post("/docs").headers["allow"] == "GET"
    assert seen[409].headers["x-should-retry"] == "false"
    assert error_of(live.http.post("/generate/"))["code"] == "not_found"
    text = live.http.post("/generate", content=b"plain", headers={"content-type": "text/plain"})
    assert text.status_code == 422 and error_of(text)
    number = b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"
    for body in (b"[" * 100_000, b'{"prompt": "\xff"}', number):
        for route in ("/generate", "/v1/completions"):
            unread = live.http.post(route, content=body, headers={"content-type": "application/json"})
            assert unread.status_code == 400 and error_of(unread)["code"] == "invalid_json", unread.text
    several = live.http.post("/v1/completions", json={"model": "x", "prompt": "x", "logprobs": "all"})
    assert error_of(several)["param"] == "logprobs"


def test_head_is_get_without_the_body(start: Any) -> None:
    live = start(**KEYED)
    for path, status in (("/health/live", 200), ("/health/ready", 200), ("/", 200), ("/stats", 401)):
        asked, got = live.http.head(path), live.http.get(path)
        assert asked.status_code == got.status_code == status and not asked.content
        assert asked.headers["content-length"] == str(len(got.content)), path
    refused = live.http.head("/generate", headers=bearer("secret-two"))
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_what_nobody_expected_is_a_500_that_tells_only_its_id(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a secret path /somewhere and a value 0x7f00")

    monkeypatch.setattr(live.services.resolver, "task", broken)
    answer = live.generate("x")
    assert answer.status_code == 500
    error = error_of(answer)
    assert error["code"] == "internal" and "secret" not in answer.text and "0x7f" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]


def test_a_body_of_too_many_keys_is_not_read(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is between them: nobody else is answered meanwhile."""
    monkeypatch.setattr(middleware, "MAX_KEYS", 50)
    live = start()
    for colon, code in ((":", "utf-8"), (" :", "utf-8"), ("\n:", "utf-8"), (":", "utf-16-le")):
        for more, status in ((49, 422), (50, 413)):
            body = '{"prompt": "a:b, c:d"' + "".join(f',"{i}"{colon}0' for i in range(more)) + "}"
            json_body = {"content-type": "application/json"}
            answer = live.http.post("/generate", content=body.encode(code), headers=json_body)
            assert answer.status_code == status
        assert error_of(answer)["code"] == "body_too_large" and "over 50 keys" in error_of(answer)["message"]
    for text in ("a:" * 60, json.dumps(dict.fromkeys(map(str, range(60)))), '\\"":' * 60):
        told = live.generate(text, max_tokens=1)
        assert told.status_code == 200 or error_of(told)["code"] == "context_length_exceeded", "texts have no keys"


def test_a_large_body_is_read_away_and_answered(start: Any) -> None:
    live = start(max_body=10_000)
    for size in (10_001, 12 << 20):
        answer = live.http.post("/generate", json={"prompt": "x" * size})
        assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
        streamed = live.http.post("/generate", content=iter([b"x" * 65536] * (size // 65536 + 1)))
        assert streamed.status_code == 413 and error_of(streamed)
    disguised = {"content-type": "multipart/form-data; boundary=x"}
    answer = live.http.post("/adapters/compose", content=b"x" * 10_001, headers=disguised)
    assert answer.status_code == 413 and "--max-body" in error_of(answer)["message"]
    assert live.generate("small").status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Host: localhost\r\n", 401),
        (b"Host: elsewhere\r\n", 403),
        (b"Host: localhost\r\nAuthorization: Bearer secret-one\r\n", 413),
    ],
)
@pytest.mark.parametrize("begun", [b"", b"x" * 64])
def test_who_asks_before_it_sends_its_body_hears_at_once_that_it_is_refused(
    start: Any, monkeypatch: pytest.MonkeyPatch, head: bytes, status: int, begun: bytes
) -> None:
    """And is not told to go on. One that sends it unasked hears it afterwards, as without that question."""
    drained = []
    drain = middleware._drain

    async def counted(receive: Any) -> None:
        drained.append(receive)
        await drain(receive)

    monkeypatch.setattr(middleware, "_drain", counted)
    live = start(max_body=10_000, **KEYED)
    with dial(live) as connection:
        ask = b"POST /generate HTTP/1.1\r\n%bExpect: 100-continue\r\nContent-Length: 10001\r\n\r\n"
        connection.sendall(ask % head + begun)
        if begun:
            until(lambda: drained)
            connection.sendall(b"x" * (10_001 - len(begun)))
        with connection.makefile("rb") as answer:
            if begun:  # which the framework says before it looks at what there is
                assert (answer.readline(), answer.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
            assert answer.readline().startswith(b"HTTP/1.1 %d " % status)
            headers = list(iter(answer.readline, b"\r\n"))
            assert (b"connection: close\r\n" in headers) == (not begun)
            assert begun or answer.read().startswith(b'{"error"')
    assert bool(drained) == bool(begun)


@pytest.mark.parametrize("draining", [False, True])
def test_who_asks_before_it_sends_its_body_hears_so_too_of_a_route_that_does_not_read_it(
    start: Any, draining: bool
) -> None:
    """Its connection is closed then, which a drain does as well: what comes next would be read as that body."""
    live = start()
    if draining:
        live.state.drain()
    with dial(live) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 100\r\n"
            b"Content-Type: multipart/form-data; boundary=x; charset=punycode\r\n\r\n"
        )
        with connection.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 %d " % (503 if draining else 400))
            headers = list(iter(answer.readline, b"\r\n"))
            assert headers.count(b"connection: close\r\n") == 1
            assert answer.read().startswith(b'{"error"')


@pytest.mark.parametrize(("draining", "status"), [(True, 503), (False, 400)])
def test_who_sends_an_upload_that_no_route_reads_hears_so(start: Any, draining: bool, status: int) -> None:
    """Though its connection is closed then: it has sent all of it, and is not reset."""
    live = start()
    if draining:
        live.state.drain()
    with dial(live) as connection:
        connection.sendall(
            b"POST /adapters HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 16777216\r\n"
            b"Content-Type: multipart/form-data; boundary=x; charset=punycode\r\n\r\n"
        )
        connection.sendall(bytes(16 << 20))
        with connection.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 %d " % status)
            assert b'\r\n\r\n{"error"' in answer.read(), "to the connection's end"


@pytest.mark.parametrize(
    "head",
    [
        b"POST /generate HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 16397\r\n",
        b"POST /generate HTTP/1.0\r\nTransfer-Encoding: chunked\r\n",
        b"HEAD /health/live HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n",
    ],
    ids=["no length", "length", "before chunks", "head"],
)
def test_a_body_with_two_ends_is_refused(live: Any, head: bytes) -> None:
    """And its connection closed: a proxy may have passed on as body what would be the next request."""
    with dial(live) as connection:
        connection.sendall(
            head + b"Host: localhost\r\nContent-Type: application/json\r\n\r\n"
            b"4000\r\n" + b" " * 0x4000 + b"\r\n0\r\n\r\nGET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        with connection.makefile("rb") as answer:
            told = answer.read()
    assert told.startswith(b"HTTP/1.1 400 ") and told.count(b"HTTP/1.1") == 1
    assert (b"invalid_http" in told) == (not head.startswith(b"HEAD"))
    assert live.generate("small").status_code == 200


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"a secret of theirs\x1b[2J", "illegal request line"),
        (b'{"prompt": "a secret of theirs"}', "illegal request line"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization : Bearer secret", "illegal header line"),
        (
            b"GET / HTTP/1.1\r\nHost: a secret\r\nTransfer-Encoding: gzip",
            "Only Transfer-Encoding: chunked is supported",
        ),
    ],
)
def test_what_is_no_http_has_an_id_in_the_log(
    live: Any, caplog: pytest.LogCaptureFixture, sent: bytes, reason: str
) -> None:
    """And nothing of what was sent, which may be a key or a prompt."""
    caplog.set_level(logging.INFO)
    with dial(live) as connection:
        connection.sendall(sent + b"\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        told = httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
    assert told.status_code == 400 and error_of(told)["code"] == "invalid_http"
    assert told.headers["connection"] == "close"
    (record,) = (r for r in caplog.records if told.headers["x-request-id"] in r.getMessage())
    assert record.getMessage().endswith(reason) and "secret" not in str(record.__dict__)
    assert record.__dict__["request_id"] == told.headers["x-request-id"]


@pytest.mark.parametrize(
    ("target", "status"),
    [("http://localhost/health/live", 200), ("https://localhost:1/tasks?x=/", 401), ("HTTP://localhost", 200)],
)
def test_a_target_may_be_absolute(start: Any, target: str, status: int) -> None:
    live = start(**KEYED)
    with dial(live) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(64).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_lying_length_and_a_broken_upload_do_no_harm(live: Any) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{")
    broken = live.http.post(
        "/adapters", content=b"--x\r\nnot", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert broken.status_code == 422 and "needs this file" in error_of(broken)["message"]
    junk = live.http.post("/adapters", content=b"junk", headers={"content-type": "multipart/form-data; boundary=x"})
    assert junk.status_code == 400 and error_of(junk)["message"].startswith("the upload cannot be read: ")
    missing = live.http.post("/adapters", content=b"", headers={"content-type": "multipart/form-data"})
    assert missing.status_code == 400 and error_of(missing)
    assert live.generate("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize("path", ["/adapters", "/v1/files"])
@pytest.mark.parametrize("charset", ["punycode", "undefined", '"raw_unicode_escape"', "x" * 99, ""])
def test_an_upload_in_another_code_than_utf_8_is_not_decoded(live: Any, path: str, charset: str) -> None:
    """Of Python's codecs some take the square of a field's length, and others fail at some fields."""
    body = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n\\ud800\r\n--x--\r\n'
    kind = f"multipart/form-data; charset={charset}; boundary=x"
    answer = live.http.post(path, content=body, headers={"content-type": kind})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", "content-type")
    assert error["message"].startswith("an upload's charset is utf-8, not ") and len(error["message"]) < 150


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", '"utf-8"', "us-ascii"])
def test_an_upload_may_say_that_it_is_in_utf_8(live: Any, charset: str) -> None:
    part = b"--x\r\nContent-Disposition: form-data; name="
    body = part + b'"purpose"\r\n\r\nfine-tune\r\n' + part + b'"file"; filename="a"\r\n\r\n{}\r\n--x--\r\n'
    kind = f"multipart/form-data; charset={charset}; boundary=x"
    assert live.http.post("/v1/files", content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("path", "kind", "begin"),
    [
        ("/generate", "application/json", b"{"),
        ("/adapters", "multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n'),
    ],
)
def test_a_body_that_trickles_in_is_not_waited_for(start: Any, path: str, kind: str, begin: bytes) -> None:
    live = start(body_time=0.1)
    with dial(live) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
        connection.sendall(head.encode() + begin)
        for _ in range(2000):
            if select.select([connection], [], [], 0.01)[0]:
                break
            connection.sendall(b" ")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        told = json.loads(answer.read())["error"]
        assert (answer.status, told["code"], answer.headers["connection"]) == (408, "body_too_slow", "close")
        with contextlib.suppress(ConnectionResetError):  # it was closed with a byte of ours on its way
            assert connection.recv(1) == b""
    assert not list((live.state.settings.state_dir / "uploads").glob("*"))
    assert live.generate("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize(("sent", "pauses", "in_time"), [(1 << 20, [0, 0.1, 0.1], True), (1, [0, 0.06, 60], False)])
def test_what_has_come_of_a_body_buys_time_for_the_rest(sent: int, pauses: list[float], in_time: bool) -> None:
    async def read() -> int:
        left = list(pauses)

        async def receive() -> dict[str, Any]:
            if pause := left.pop(0):
                await asyncio.sleep(pause)
            return {"type": "http.request", "body": b"x" * sent, "more_body": bool(left)}

        kept = patient(receive, 0.05)
        return sum([len((await kept())["body"]) for _ in pauses])

    if in_time:
        assert asyncio.run(read()) == 3 * sent
    else:
        with pytest.raises(BodyTooSlow, match="--body-time"):
            asyncio.run(read())


def test_a_server_that_loads_says_so_and_one_that_failed_tells_no_path(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    import server.app
    from server.errors import BadModel

    gate = threading.Event()

    def slow(*_: Any) -> Any:
        gate.wait(10)
        raise BadModel("there is no model at /a/path/of/ours")

    real = server.app.load_and_build
    monkeypatch.setattr(server.app, "load_and_build", slow)
    live = start(ready=False)
    assert live.http.get("/health/live").status_code == 200
    for answer in (live.http.get("/health/ready"), live.generate("x"), live.http.get("/v1/models")):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1 and error_of(answer)
    assert "loramux_memory_bytes" in live.http.get("/metrics").text
    gate.set()

    def told() -> str:
        return str(live.http.get("/health/ready").json()["error"]["message"])

    until(lambda: "could not start" in told())
    assert "/a/path" not in told(), "/health/ready is open to everybody"
    monkeypatch.setattr(server.app, "load_and_build", real)


def test_tenants_do_not_share_a_prefix(start: Any) -> None:
    live = start(api_keys="one:alpha,two:beta", admin_keys="boss:gamma")
    body = {"prompt": "a long enough prompt for several blocks of the cache, twice", "max_tokens": 1}

    def cached(token: str) -> int:
        answer = live.http.post("/generate", json=body, headers=bearer(token))
        return int(answer.json()["usage"]["cached_tokens"])

    assert cached("alpha") == 0 and cached("alpha") > 0
    assert cached("beta") == 0


def test_answers_hold_no_path_of_the_server(live: Any, tmp_path: Path) -> None:
    shown = [live.http.get(path).text for path in ("/adapters", "/adapters/a", "/tasks", "/v1/models", "/stats")]
    shown.append(live.http.post("/adapters", json={"name": "n", "source": "../../etc"}).text)
    shown.append(live.http.post("/adapters", json={"name": "n", "source": "absent"}).text)
    assert all(str(tmp_path) not in text for text in shown)
    assert json.loads(shown[-1])["error"]["message"]


def test_a_body_in_pieces_of_a_byte_ends_its_connection(start: Any) -> None:
    """Without a key, and with one; some small pieces are no fault."""
    live = start(**KEYED)
    host, port = live.url.removeprefix("http://").split(":")
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for key, few in ((b"", b" 401 "), (b"Authorization: Bearer secret-one\r\n", b" 200 ")):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head + key + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 900)
            connection.sendall(b'20\r\n{"prompt": "x", "max_tokens": 1}\r\n0\r\n\r\n')
            assert few in connection.recv(64)
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head + key + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 100_000)
                assert b" 400 " in connection.recv(64)
                while connection.recv(65536):
                    pass
    assert live.http.get("/health/live").status_code == 200


def test_an_empty_file_of_keys_locks_out(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("")
    assert KeyRing("", file, "api_keys"), "keys are asked for, though none opens"
    file.write_text("a:secret\n")
    ring = KeyRing("", file, "api_keys")
    file.write_text("")
    assert ring.find(b"") is None and ring
