"""The HEALTHCHECK command of the Dockerfile: uses LORAMUX_PORT and ignores proxies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

DOCKERFILE = Path(__file__).resolve().parents[2] / "Dockerfile"


def command() -> list[str]:
    joined = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", "")
    found = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", joined, re.MULTILINE)
    assert found is not None
    python, *arguments = json.loads(found[1])
    assert python == "python"
    return [sys.executable, *arguments]


class _Server(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def healthy(**environment: str) -> bool:
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    ran = subprocess.run(command(), env={**kept, **environment}, capture_output=True, timeout=60, check=False)
    return ran.returncode == 0


def test_health_check_uses_port_and_ignores_proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    assert healthy(LORAMUX_PORT=str(port), **proxies)
    monkeypatch.setattr(_Server, "status", 503)
    assert not healthy(LORAMUX_PORT=str(port))
