"""A server of completions that answers as a test tells it to, and keeps what it was asked."""

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
"""The status of an answer to a body, and the data of its events; of another status than 200 the first is the text."""


def events(tokens: int, usage: bool = True) -> list[str]:
    """A stream of so many events with text, then one with none, as llama-server ends its own."""
    texts = [*("x" * tokens), ""]
    told = [json.dumps({"choices": [{"text": text}]}) for text in texts]
    return [*told, *([json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})] if usage else []), "[DONE]"]


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Answering:
    """Where it is, and what it was asked: (route, the header of the key, body). `stats` is what it tells of itself, if
    anything."""

    url: str
    reply: Reply
    asked: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    stats: Any = None


@pytest.fixture
def answering() -> Iterator[Answering]:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.asked.append((self.path, self.headers["Authorization"], body))
            status, data = told.reply(body)
            stream = status == 200 and isinstance(data, list)
            text = "".join(f"data: {d}\n\n" for d in data) if stream else "".join(data)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            text = json.dumps(told.stats).encode()
            self.send_response(200 if told.stats is not None and self.path == "/stats" else 404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 512  # as many come at once

    server = Server(("127.0.0.1", 0), Answer)
    told = Answering(f"http://127.0.0.1:{server.server_address[1]}", lambda body: (200, events(body["max_tokens"])))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()
