"""A fake completion server, and helpers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Reply = Callable[[dict[str, Any]], tuple[int, "list[str] | str"]]
"""Maps a request body to a status, and to the data of the events (or the text of an error)."""


def events(tokens: int, usage: bool = True) -> list[str]:
    """A stream of events with text, then one without, as llama-server ends its streams."""
    data = [json.dumps({"choices": [{"text": text}]}) for text in [*("x" * tokens), ""]]
    return [*data, *([json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})] if usage else []), "[DONE]"]


def runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class FakeServer:
    """`requests` has (route, Authorization header, body) of each request; `stats` is the answer to /stats."""

    url: str
    reply: Reply
    requests: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    stats: Any = None


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append((self.path, self.headers["Authorization"], body))
            status, data = fake.reply(body)
            stream = status == 200 and isinstance(data, list)
            self.answer(status, "".join(f"data: {d}\n\n" for d in data) if stream else "".join(data))

        def do_GET(self) -> None:
            found = fake.stats is not None and self.path == "/stats"
            self.answer(200 if found else 404, json.dumps(fake.stats))

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 512

    server = Server(("127.0.0.1", 0), Handler)
    fake = FakeServer(f"http://127.0.0.1:{server.server_address[1]}", lambda body: (200, events(body["max_tokens"])))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()
