"""Adapter sources: the adapter directory as a jail, allow-lists, and limits, with a local HTTP server."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.errors import InvalidRequest, NoCapacity, QueueFull
from server.sources import Sources, retries, urls
from server.sources.budget import Budget, Spend
from tests.waiting import SECONDS, until

RELEASE = threading.Event()
"""Ends requests that hang."""
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"s" * 3_000_000}
SUMS = "".join(f"{hashlib.sha256(content).hexdigest().upper()}  {name}\n" for name, content in FILES.items())
ASKED: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSE", 0.0)
    ASKED.clear()


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "adapters" / "team" / "one").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "adapters-secret").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "adapters" / "loop").symlink_to("loop")
    return Sources(tmp_path / "adapters", tmp_path / "scratch", hub_allow=["org/*", "solo/one"])


async def test_folders_inside_the_adapter_directory(sources: Sources, tmp_path: Path) -> None:
    inside = tmp_path / "adapters" / "team" / "one"
    for source in ("team/one", str(inside), "team/../team/one"):
        async with sources.open(source) as (folder, within):
            assert (folder, within) == (inside, tmp_path / "adapters")


@pytest.mark.parametrize(
    "source", ["../secret", "../adapters-secret", "link", "/etc", "team/../../secret", "a\0b", "loop", "x" * 5000]
)
async def test_no_path_leads_outside(sources: Sources, source: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as e:
        async with sources.open(source):
            pass
    assert str(tmp_path) not in e.value.message


async def test_a_path_from_the_working_directory_gets_a_suggestion(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for here, source in ((tmp_path, "adapters/team/one"), (tmp_path / "adapters" / "team", "./one")):
        monkeypatch.chdir(here)
        with pytest.raises(InvalidRequest, match="did you mean 'team/one'"):
            async with sources.open(source):
                pass
    monkeypatch.chdir(tmp_path)
    for source in ("adapters", "adapters/absent", "secret"):
        with pytest.raises(InvalidRequest, match="--hub-allow permits$"):
            async with sources.open(source):
                pass


@pytest.mark.parametrize("source", ["", ".", "absent", "other/name", "solo/two", "team/one/absent@v1"])
async def test_unknown_or_forbidden_sources(sources: Sources, source: str) -> None:
    with pytest.raises(InvalidRequest, match="--hub-allow"):
        async with sources.open(source):
            pass


async def test_allowed_hub_ids(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(hub_id: str, directory: Path, max_bytes: int, spend: Spend) -> Path:
        spend(max_bytes)
        (directory / hub_id.replace("/", "-")).mkdir()
        return directory / hub_id.replace("/", "-")

    monkeypatch.setattr("server.sources.hub.fetch_adapter", fetch)
    async with sources.open("org/any@abc") as (folder, within):
        assert folder.is_relative_to(within) and folder.is_dir()
    assert not folder.exists() and not within.exists()


class _Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        ASKED[self.path] += 1
        if "forbidden" in self.path:
            self.send_error(403)
        elif "busy" in self.path and ASKED[self.path] < 6:  # HEAD and GET are both asked, for each try
            self.send_error(503)
        elif "broken" in self.path:
            self.send_error(500)
        elif "short" in self.path and name == "adapter_model.safetensors" and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(FILES[name])))
            self.end_headers()
            self.wfile.write(FILES[name][: 1_000_000 if ASKED[self.path] < 5 else None])
        elif "sums" in self.path and name == "SHA256SUMS":
            body = SUMS.encode() if "wrong" not in self.path else SUMS.replace("4", "5").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")
        elif "hang" in self.path:
            RELEASE.wait(10)
        elif name == {"redirect": "adapter_config.json", "login": "README.md"}.get(self.path.split("/")[1]):
            self.send_response(302)
            self.send_header("Location", f"/good/{name}")
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"<html" if self.command == "GET" else b"")
        elif name in FILES and "absent" not in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(len(FILES[name])))
            self.end_headers()
            self.wfile.write(FILES[name] if self.command == "GET" else b"")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    RELEASE.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    RELEASE.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_urls_must_be_plain_and_allowed() -> None:
    allow = ["https://models.example/lora/", "s3://bucket", "http://[::1]:9/x"]
    assert urls.check("http://[::1]:9/x/a", allow) == "http://[::1]:9/x/a"
    assert urls.check("https://models.example/lora/one/", allow) == "https://models.example/lora/one"
    assert urls.check("s3://bucket/a/b", allow) == "s3://bucket/a/b"
    for url in (
        "https://models.example/lora-private/one",
        "https://models.example/lora/../private",
        "https://models.example/lora/%2e%2e/private",
        "https://models.example/lora/..\\private",
        "https://models.example/lora/one?x=1",
        "https://models.example/lora/one?",
        "https://models.example/lora/one#",
        "https://u:p@models.example/lora/one",
        "https://@models.example/lora/one",
        "https://other.example/lora/one",
        "http://models.example/lora/one",
        "file:///etc",
        "http://[bad",
        "http://a\u2100b/",
        "file:/etc",
        "simplecache::s3://bucket/a",
    ):
        with pytest.raises(InvalidRequest):
            urls.check(url, allow)


async def test_a_url_is_downloaded(tmp_path: Path, host: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host])
    async with sources.open(f"{host}/good") as (folder, _):
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("absent", {}, "has no adapter_config.json: .*404"),
        ("forbidden", {}, "has no adapter_config.json: .*403"),
        ("good", {"max_bytes": 2_000_000}, "over the limit"),
        ("hang", {"seconds": 0.5}, "within 0.5 s"),
        ("broken", {}, "could not be read in 3 attempts: .*500"),
        ("wrong-sums", {}, "is not the one in SHA256SUMS"),
    ],
)
async def test_failing_urls(tmp_path: Path, host: str, path: str, limits: dict[str, float], message: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host], **limits)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=message):
        async with sources.open(f"{host}/{path}"):
            pass
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_redirects_are_not_followed(tmp_path: Path, host: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host])
    with pytest.raises(
        InvalidRequest, match=r"no adapter_config.json: the host answers 302; redirects are not followed"
    ):
        async with sources.open(f"{host}/redirect"):
            pass
    async with sources.open(f"{host}/login") as (folder, _):
        assert {p.name for p in folder.iterdir()} == FILES.keys() - {"README.md"}


async def test_an_unreachable_host(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=["http://127.0.0.1:9"])
    with pytest.raises(InvalidRequest, match="could not be read in 3 attempts: .*onnect"):
        async with sources.open("http://127.0.0.1:9/lora"):
            pass


@pytest.mark.parametrize("path", ["busy", "short", "sums"])
async def test_broken_transfers_are_retried(tmp_path: Path, host: str, path: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host])
    async with sources.open(f"{host}/{path}") as (folder, _):
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
        assert sources.budget.spent == sum(map(len, FILES.values())), "failed attempts are not counted"
    assert sources.budget.spent == 0


async def test_downloads_share_one_disk_budget(tmp_path: Path, host: str) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources(tmp_path, tmp_path / "scratch", url_allow=[host], disk=5_000_000)
    async with sources.open(f"{host}/good"):
        with pytest.raises(QueueFull) as caught:
            async with sources.open(f"{host}/good"):
                pass
        assert caught.value.retry_after
    async with sources.open(f"{host}/good"):
        pass
    small = Sources(tmp_path, tmp_path / "scratch", url_allow=[host], disk=1_000_000)
    with pytest.raises(NoCapacity, match="--fetch-disk"):
        async with small.open(f"{host}/good"):
            pass
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_closed_account_cannot_spend() -> None:
    budget = Budget(10)
    with budget.account() as spend:
        spend(10)
        spend(-3)
        assert budget.spent == 7
    with pytest.raises(TimeoutError):
        spend(1)
    assert budget.spent == 0


def test_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "fetch-old").mkdir(parents=True)
    (tmp_path / "scratch" / "fetch-old" / "adapter_model.safetensors").write_bytes(b"half")
    Sources(tmp_path, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_an_allowed_repository_is_allowed_at_any_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(hub_id: str, directory: Path, max_bytes: int, spend: Spend) -> Path:
        asked.append(hub_id)
        return directory

    monkeypatch.setattr("server.sources.hub.fetch_adapter", fetch)
    sources = Sources(tmp_path / "adapters", tmp_path / "scratch", hub_allow=["solo/one"])
    async with sources.open("solo/one@v1"):
        assert asked == ["solo/one@v1"]


async def test_a_hanging_source_times_out_and_its_late_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, wrote = threading.Event(), threading.Event()

    def fetch(hub_id: str, directory: Path, max_bytes: int, spend: Spend) -> Path:
        assert release.wait(SECONDS)
        directory.mkdir(exist_ok=True)
        (directory / "late").write_text("x")
        wrote.set()
        return directory

    monkeypatch.setattr("server.sources.hub.fetch_adapter", fetch)
    sources = Sources(tmp_path / "adapters", tmp_path / "scratch", hub_allow=["solo/one"], seconds=0.01)
    try:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(InvalidRequest, match="did not answer within"):
                async with sources.open("solo/one"):
                    pass
    finally:
        release.set()
    await asyncio.to_thread(until, wrote.is_set)
    await asyncio.to_thread(until, lambda: not list((tmp_path / "scratch").iterdir()))


@pytest.mark.parametrize("prefix", ["file:///srv", "https://me@host.example", "memory://a"])
def test_allowed_prefixes_cannot_open_local_files_or_users(prefix: str) -> None:
    with pytest.raises(InvalidRequest, match="plain URL"):
        urls.check(f"{prefix}/a", [prefix])
