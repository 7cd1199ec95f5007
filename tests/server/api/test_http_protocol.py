"""Malformed HTTP over real connections: request smuggling, and log lines without its content."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from typing import Any

import pytest


def connect(live: Any) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /generate HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 16397\r\n",
    ],
)
def test_body_with_length_and_chunks_is_refused(live: Any, head: bytes) -> None:
    """A proxy may see another end of the body, and pass on as body what is the next request here."""
    with connect(live) as connection:
        connection.sendall(
            head + b"Host: localhost\r\nContent-Type: application/json\r\n\r\n"
            b"4000\r\n" + b" " * 0x4000 + b"\r\n0\r\n\r\nGET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        with connection.makefile("rb") as answer:
            received = answer.read()
    assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1") == 1 and b"invalid_http" in received


@pytest.mark.parametrize(
    "sent", [b"a secret of theirs\x1b[2J", b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization : Bearer secret"]
)
def test_malformed_request_is_logged_with_its_id_and_without_its_content(
    live: Any, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    caplog.set_level(logging.INFO)
    with connect(live) as connection:
        connection.sendall(sent + b"\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        error = json.loads(answer.read())["error"]
    assert answer.status == 400 and error["code"] == "invalid_http"
    (record,) = (r for r in caplog.records if str(answer.headers["x-request-id"]) in r.getMessage())
    assert "secret" not in str(record.__dict__)
