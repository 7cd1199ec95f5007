"""`/v1/files`: uploads, lists, content and deletion."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from server.api.files import content
from server.database import Database, database_url
from server.jobs.file_store import FileStore
from tests.server.api.jobs import client_of, upload


@pytest.fixture
def live(start: Any) -> Any:
    return start(max_upload=10_000)


@pytest.fixture
def client(live: Any) -> openai.OpenAI:
    return client_of(live)


def test_uploads_are_checked_and_limited(live: Any) -> None:
    http: httpx.Client = live.http
    part = {"file": ("x.jsonl", b"{}")}
    wrong: list[dict[str, Any]] = [
        {"files": part, "data": {"purpose": "batch"}},
        {"files": part},
        {"data": {"purpose": "fine-tune"}},
        {"files": {**part, "other": ("y", b"")}, "data": {"purpose": "fine-tune"}},
        {"content": b"{}", "headers": {"content-type": "application/json"}},
    ]
    for given in wrong:
        answer = http.post("/v1/files", **given)
        assert answer.status_code == 400, answer.text
    large = http.post("/v1/files", files={"file": ("x", b"0" * 20_000)}, data={"purpose": "fine-tune"})
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    named = http.post("/v1/files", files={"file": ("../../x.jsonl", b"{}")}, data={"purpose": "fine-tune"}).json()
    assert named["filename"] == "x.jsonl"
    assert [p.name for p in (live.state.settings.state_dir / "files").iterdir()] == [named["id"]]
    assert http.get("/v1/files/..%2f..").status_code == 404 and http.delete("/v1/files/file-x").status_code == 404


def test_files_are_listed_by_pages(live: Any, client: openai.OpenAI) -> None:
    oldest, middle, newest = (upload(client, name=f"{i}.jsonl") for i in range(3))

    def page(**query: Any) -> dict[str, Any]:
        answer: dict[str, Any] = live.http.get("/v1/files", params=query).json()
        return {**answer, "data": [file["id"] for file in answer["data"]]}

    first = page(limit=2)
    assert first["data"] == [newest, middle] and first["has_more"] is True
    assert (first["first_id"], first["last_id"]) == (newest, middle)
    rest = page(limit=1, after=middle)
    assert rest["data"] == [oldest] and rest["has_more"] is False
    assert page(order="asc", limit=2, after=oldest)["data"] == [middle, newest]
    assert page(purpose="fine-tune")["data"] == [newest, middle, oldest]
    none = page(purpose="fine-tune-results")
    assert (none["data"], none["first_id"], none["last_id"]) == ([], None, None)
    refused = live.http.get("/v1/files", params={"after": "file-none"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "after"


@pytest.mark.parametrize("asked", ["bytes=2-4", "bytes=99999-", "bytes=foo", "items=0-1", "bytes="])
def test_range_requests_get_the_whole_content(live: Any, client: openai.OpenAI, asked: str) -> None:
    id = upload(client, b"0123456789")
    answer = live.http.get(f"/v1/files/{id}/content", headers={"range": asked})
    assert answer.status_code == 200 and answer.content == b"0123456789"


def test_content_that_is_missing_on_disk_is_404(live: Any, client: openai.OpenAI) -> None:
    id = upload(client)
    live.services.files.path(id).unlink()
    answer = live.http.get(f"/v1/files/{id}/content")
    assert answer.status_code == 404 and "upload it again" in answer.json()["error"]["message"]


@pytest.mark.parametrize("end", ["whole", "left", "broken"])
async def test_a_file_that_is_deleted_while_it_is_sent_is_sent_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    database = Database(database_url(None, tmp_path))
    files, opened, sent = FileStore(database, tmp_path / "files"), list[Any](), list[Any]()
    file = files.add(lambda path: path.write_bytes(bytes(200_000)), "a.jsonl", "fine-tune")
    path_open = Path.open

    def record_open(path: Path, *mode: str) -> Any:
        opened.append(path_open(path, *mode))
        return opened[-1]

    async def receive() -> Any:
        if end != "left":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if end == "broken":
            raise ValueError("broken")
        sent.append(message)

    monkeypatch.setattr(Path, "open", record_open)
    answer = await content(file.id, SimpleNamespace(files=files))  # type: ignore[arg-type]
    files.delete(file.id)
    database.close()
    with pytest.raises(ValueError, match="broken") if end == "broken" else contextlib.nullcontext():
        await answer({"type": "http", "method": "GET", "headers": []}, receive, send)
    assert [stream.closed for stream in opened] == [True]
    if end == "whole":
        assert (b"content-length", b"200000") in sent[0]["headers"]
        assert b"".join(message["body"] for message in sent[1:]) == bytes(200_000) and not sent[-1]["more_body"]
