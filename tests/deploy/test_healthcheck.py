"""The image's health check, as Docker would run it: it asks this server, whatever proxy the container is told of."""

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
        """Nothing to say."""


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


def test_the_port_is_the_settings_and_a_proxy_is_not_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    assert healthy(LORAMUX_PORT=str(port), **proxies)
    monkeypatch.setattr(_Server, "status", 503)
    assert not healthy(LORAMUX_PORT=str(port))


def test_without_a_port_it_is_the_default_one() -> None:
    """The address that is asked is looked at, since that port may be another server's here."""
    python, flag, code = command()
    for value in ("", "tcp://10.0.0.1:8000"):
        told = code.replace("build_opener(ProxyHandler({})).open(url + '/health/ready', timeout=2)", "print(url)")
        assert told != code
        ran = subprocess.run(
            [python, flag, told], env={**os.environ, "LORAMUX_PORT": value}, capture_output=True, text=True, check=True
        )
        assert ran.stdout == "http://127.0.0.1:8000\n"
