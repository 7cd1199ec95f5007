"""Adapters from an S3-compatible server: `moto`, in this process, through the real `fsspec` and `s3fs`."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.errors import InvalidRequest
from server.sources import Sources, retries
from tests.waiting import until

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": bytes(range(256)) * 12_000,
    "task.json": b'{"prompt": "{input}"}',
}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server that has the bucket `lora` with the adapter `team/one`."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with httpx.Client(base_url=address) as http:
        http.post("/moto-api/reset").raise_for_status()  # all such servers of a process are one
        http.put("/lora").raise_for_status()
        for name, content in FILES.items():
            http.put(f"/lora/team/one/{name}", content=content).raise_for_status()
        http.put("/lora/team/half/adapter_config.json", content=b"{}").raise_for_status()
    yield address
    server.stop()


@pytest.fixture
def sources(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setattr(retries, "PAUSE", 0.0)
    return Sources(tmp_path, tmp_path / "scratch", url_allow=["s3://lora/team"])


async def test_a_folder_of_a_bucket(sources: Sources, tmp_path: Path) -> None:
    async with sources.open("s3://lora/team/one") as (folder, within):
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
        assert folder.is_relative_to(within)
    assert list((tmp_path / "scratch").iterdir()) == [] and sources.budget.spent == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://lora/team/none", "has no adapter_config.json"),
        ("s3://lora/team/half", "has no adapter_model.safetensors"),
        ("s3://lora/other/one", "--url-allow"),
        ("s3://other/team/one", "--url-allow"),
    ],
)
async def test_what_is_not_there_or_not_allowed(sources: Sources, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        async with sources.open(source):
            pass
    assert not (tmp_path / "scratch").exists() or list((tmp_path / "scratch").iterdir()) == []


async def test_a_size_limit(s3: str, sources: Sources, tmp_path: Path) -> None:
    small = Sources(tmp_path, tmp_path / "scratch", url_allow=["s3://lora"], max_bytes=1_000_000)
    with pytest.raises(InvalidRequest, match="over the limit"):
        async with small.open("s3://lora/team/one"):
            pass


async def test_a_server_that_never_answers(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        quick = Sources(tmp_path, tmp_path / "scratch", url_allow=["s3://lora"], seconds=0.3)
        with pytest.raises(InvalidRequest, match=r"within 0\.3 s"):
            async with quick.open("s3://lora/team/one"):
                pass
        await asyncio.to_thread(until, lambda: all(thread.name != "fetch" for thread in threading.enumerate()))
    assert list((tmp_path / "scratch").iterdir()) == [] and quick.budget.spent == 0
