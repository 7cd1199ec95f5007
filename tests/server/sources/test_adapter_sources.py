"""Where adapters may come from: the jail of the adapter directory, allow-lists, limits. HTTP is a server of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.errors import InvalidRequest
from server.sources import Sources, urls

RELEASE = threading.Event()
"""Set when the tests are over: what hangs need hang no longer."""
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"s" * 3_000_000}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "adapters" / "team" / "one").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "secret")
    return Sources(tmp_path / "adapters", tmp_path / "scratch", hub_allow=["org/*", "solo/one"])


async def test_folders_inside(sources: Sources, tmp_path: Path) -> None:
    inside = tmp_path / "adapters" / "team" / "one"
    for source in ("team/one", str(inside), "team/../team/one"):
        async with sources.open(source) as (folder, within):
            assert (folder, within) == (inside, tmp_path / "adapters")


@pytest.mark.parametrize("source", ["../secret", "link", "/etc", "team/../../secret", "a\0b"])
async def test_nothing_leads_out(sources: Sources, source: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as e:
        async with sources.open(source):
            pass
    assert str(tmp_path) not in e.value.message


@pytest.mark.parametrize("source", ["", ".", "absent", "other/name", "solo/two", "team/one/absent@v1"])
async def test_neither_folder_nor_allowed(sources: Sources, source: str) -> None:
    with pytest.raises(InvalidRequest, match="--hub-allow"):
        async with sources.open(source):
            pass


async def test_hub_ids_that_are_allowed(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(hub_id: str, directory: Path, max_bytes: int) -> Path:
        (directory / hub_id.replace("/", "-")).mkdir()
        return directory / hub_id.replace("/", "-")

    monkeypatch.setattr("server.sources.hub.fetch_adapter", fetch)
    async with sources.open("org/any@abc") as (folder, within):
        assert folder.is_relative_to(within) and folder.is_dir()
    assert not folder.exists() and not within.exists()


class _Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "forbidden" in self.path:
            self.send_error(403)
        elif "hang" in self.path:
            RELEASE.wait(10)
        elif "redirect" in self.path and name == "adapter_config.json":
            self.send_response(302)
            self.send_header("Location", "/good/adapter_config.json")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name in FILES and "absent" not in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(len(FILES[name])))
            self.end_headers()
            self.wfile.write(FILES[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    RELEASE.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_urls_must_be_plain_and_allowed() -> None:
    allow = ["https://models.example/lora/", "s3://bucket"]
    assert urls.check("https://models.example/lora/one/", allow) == "https://models.example/lora/one"
    assert urls.check("s3://bucket/a/b", allow) == "s3://bucket/a/b"
    for url in (
        "https://models.example/lora-private/one",
        "https://models.example/lora/../private",
        "https://models.example/lora/%2e%2e/private",
        "https://models.example/lora/one?x=1",
        "https://u:p@models.example/lora/one",
        "https://other.example/lora/one",
        "http://models.example/lora/one",
        "file:///etc",
        "file:/etc",
        "simplecache::s3://bucket/a",
    ):
        with pytest.raises(InvalidRequest):
            urls.check(url, allow)


async def test_a_url(tmp_path: Path, host: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host])
    async with sources.open(f"{host}/good") as (folder, _):
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("absent", {}, "gives no adapter_config.json: .*404"),
        ("forbidden", {}, "gives no adapter_config.json: .*403"),
        ("good", {"max_bytes": 2_000_000}, "over the limit"),
        ("hang", {"seconds": 0.5}, "within 0.5 s"),
    ],
)
async def test_urls_that_fail(tmp_path: Path, host: str, path: str, limits: dict[str, float], message: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host], **limits)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=message):
        async with sources.open(f"{host}/{path}"):
            pass
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_redirects_are_not_followed(tmp_path: Path, host: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[f"{host}/redirect"])
    async with sources.open(f"{host}/redirect") as (folder, _):
        assert (folder / "adapter_config.json").read_bytes() != FILES["adapter_config.json"]


async def test_a_host_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=["http://127.0.0.1:9"])
    with pytest.raises(InvalidRequest, match="gives no adapter_config.json: .*onnect"):
        async with sources.open("http://127.0.0.1:9/lora"):
            pass
