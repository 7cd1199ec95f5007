"""Adapters from the hub: the real client against a local HTTP server."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.errors import InvalidRequest, NoCapacity
from server.sources import Sources
from server.sources.hub import missing_files

COMMIT = "c" * 40
FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"t" * 100_000,
    "README.md": b"a card",
    "training.log": b"not wanted",
}
LARGE = "adapter_model.safetensors"
ASKED: Counter[str] = Counter()


class _Hub(BaseHTTPRequestHandler):
    """The routes that a snapshot needs. `org/damaged` sends wrong bytes of the right length."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        ASKED[path] += 1
        if path == "/api/models/org/busy" and ASKED[path] < 3:
            self.answer(b'{"error": "in a moment"}', "application/json", status=503)
            return
        if path.startswith("/api/models/org/") and "tree" in parts:
            self.answer(json.dumps(self.tree()).encode(), "application/json")
        elif path.startswith("/api/models/org/") and parts[3] != "absent":
            self.answer(json.dumps(self.about(parts[3])).encode(), "application/json")
        elif len(parts) == 5 and parts[2:4] == ["resolve", COMMIT] and parts[4] in FILES:
            content = FILES[parts[4]]
            if parts[1] == "damaged" and parts[4] == LARGE:
                content = b"x" * len(content)
            self.answer(content, "application/octet-stream", parts[4])
        else:
            self.answer(b'{"error": "Repository not found"}', "application/json", status=404)

    do_HEAD = do_GET

    def about(self, name: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for file, content in FILES.items():
            one: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": "b" * 40}
            if file == LARGE:
                sha = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 100}
            siblings.append(one)
        return {"id": f"org/{name}", "modelId": f"org/{name}", "sha": COMMIT, "siblings": siblings, "private": False}

    def tree(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in FILES.items()]

    def answer(self, body: bytes, kind: str, file: str = "", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if file:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(FILES[file]).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def sources(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("server.sources.retries.PAUSE", 0.0)
    return Sources(tmp_path, tmp_path / "scratch", hub_allow=["org/*"])


async def test_a_repository_is_downloaded(sources: Sources, tmp_path: Path) -> None:
    async with sources.open("org/one@main") as (folder, within):
        found = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert found == {name: content for name, content in FILES.items() if name != "training.log"}
        assert folder.is_relative_to(within)
        assert sources.budget.spent == sum(map(len, found.values()))
    assert list((tmp_path / "scratch").iterdir()) == [] and sources.budget.spent == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/absent", "could not be downloaded from the hub"),
        ("org/damaged", f"{LARGE} of org/damaged has another SHA-256"),
        ("other/one", "--hub-allow"),
    ],
)
async def test_failing_repositories(sources: Sources, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        async with sources.open(source):
            pass
    assert not (tmp_path / "scratch").exists() or list((tmp_path / "scratch").iterdir()) == []


async def test_limits_are_checked_before_downloading(sources: Sources, tmp_path: Path) -> None:
    small = Sources(tmp_path, tmp_path / "scratch", hub_allow=["org/*"], max_bytes=1000)
    with pytest.raises(InvalidRequest, match="over the limit of 1000"):
        async with small.open("org/one"):
            pass
    full = Sources(tmp_path, tmp_path / "scratch", hub_allow=["org/*"], disk=1000)
    with pytest.raises(NoCapacity, match="--fetch-disk"):
        async with full.open("org/one"):
            pass


async def test_a_busy_hub_is_retried(sources: Sources) -> None:
    async with sources.open("org/busy") as (folder, _):
        assert (folder / LARGE).read_bytes() == FILES[LARGE]
    assert ASKED["/api/models/org/busy"] >= 3


async def test_a_missing_repository_is_not_retried(sources: Sources) -> None:
    before = ASKED["/api/models/org/absent"]
    with pytest.raises(InvalidRequest):
        async with sources.open("org/absent"):
            pass
    assert ASKED["/api/models/org/absent"] == before + 1


async def test_an_unreachable_hub_is_retried(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    paused: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", paused.append)
    with pytest.raises(InvalidRequest, match="could not be downloaded from the hub"):
        async with sources.open("org/one"):
            pass
    assert len(paused) == 2


async def test_a_full_disk_is_an_os_error(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/our/state/fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match="No space left") as caught:
        async with sources.open("org/one"):
            pass
    assert caught.value.errno == errno.ENOSPC


def test_missing_files_follows_the_loader(tmp_path: Path) -> None:
    """A whole file wins over an index, and a quantized folder over both."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert missing_files(tmp_path) == ["model.safetensors"]
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert missing_files(tmp_path) == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert missing_files(tmp_path) == []
    (tmp_path / "loramux.json").write_text(json.dumps({"files": ["weights-00001.safetensors"]}))
    assert missing_files(tmp_path) == ["weights-00001.safetensors"]
