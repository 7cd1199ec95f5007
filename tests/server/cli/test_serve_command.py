"""`loramux serve`: checks before the model is loaded, signals, and the log."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters.store import AdapterStore
from server.api.state import ServerState
from server.cli import logs, malloc
from server.cli.checks import listen
from server.cli.options import IGNORED_VARIABLE
from server.cli.serve import raise_file_limit, serve, stop_on_signals, use_temporary_folder
from server.cli.signals import REPEAT_WINDOW
from server.errors import BadSetting
from server.settings import Settings
from tests.waiting import until


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Calls `serve` with settings; a download of the base fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.sources.resolve_model", lambda *_, **__: pytest.fail("the base is downloaded"))
    monkeypatch.setattr(malloc, "configure_malloc", lambda: True)
    monkeypatch.setattr("server.cli.serve.raise_file_limit", lambda: None)
    monkeypatch.setattr(logs, "configure", lambda log_format, level: None)
    listeners = []

    def listening(host: str, port: int) -> object:
        listeners.append(listen(host, port))
        return listeners[-1]

    monkeypatch.setattr("server.cli.serve.listen", listening)
    before = signal.getsignal(signal.SIGTERM)
    yield lambda **flags: serve(**{**dict.fromkeys(serve.__annotations__), "port": 0, **flags})
    signal.signal(signal.SIGTERM, before)
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"admin_keys_file": "absent"}, "admin_keys_file cannot be read"),
        ({"device": "cuda"}, "there is no GPU"),
        ({"kernels": "cuda"}, "there is no GPU"),
        ({"state_dir": "file"}, "cannot be written"),
        ({"state_dir": "used"}, "in use by another process"),
        ({"host": "no such host", "insecure": True}, "Cannot listen on no such host:0"),
    ],
)
def test_invalid_settings_are_reported_before_a_download(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], message: str
) -> None:
    Path("file").touch()
    monkeypatch.setattr("server.kernels.cuda.unavailable", lambda: "there is no GPU")
    store = AdapterStore(Path("used") / "store")
    try:
        with pytest.raises(BadSetting, match=message):
            start(**flags)
    finally:
        store.close()


@pytest.mark.parametrize("host", ["127..0.0.1", "no such host", "192.0.2.77"])
def test_an_invalid_host_is_named(host: str) -> None:
    with pytest.raises(BadSetting, match=f"Cannot listen on {host}:0: .*--host") as e:
        listen(host, 0)
    assert e.value.param == "host"


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as s:
        port = s.getsockname()[1]
        with pytest.raises(BadSetting, match=f"Cannot listen on 127.0.0.1:{port}: Address already in use.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_all_addresses_include_ipv4() -> None:
    with listen("::", 0) as s, socket.create_connection(("127.0.0.1", s.getsockname()[1]), timeout=5) as client:
        assert client.getpeername()[0] == "127.0.0.1"


def test_large_bodies_are_stored_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    use_temporary_folder(tmp_path / "state")
    with tempfile.SpooledTemporaryFile(max_size=1) as body:
        body.write(b"two")
        assert os.readlink(f"/proc/self/fd/{body.fileno()}").startswith(str(tmp_path / "state"))


def test_signals_end_loading_at_once_and_drain_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    children: list[int] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("server.cli.serve._end_children", lambda: children.append(1))
    state = ServerState(Settings())
    with stop_on_signals(state, 30.0), pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 0 and not state.draining_seconds and children == [1]
    state.state = "ready"
    with stop_on_signals(state, 30.0):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same signal, forwarded by make
        assert state.draining_seconds
        time.sleep(REPEAT_WINDOW)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


def test_probes_work_during_a_download_and_a_signal_ends_it(tmp_path: Path) -> None:
    """The package index accepts the connection and never answers."""

    def status(url: str) -> int:
        try:
            return int(httpx.get(url, timeout=5).status_code)
        except httpx.HTTPError:
            return 0

    with socket.create_server(("127.0.0.1", 0)) as index, socket.create_server(("127.0.0.1", 0)) as free:
        address, port = index.getsockname(), free.getsockname()[1]
        free.close()
        pip = {"PIP_INDEX_URL": f"http://{address[0]}:{address[1]}/", "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--state-dir", str(tmp_path)]
        with subprocess.Popen(
            [*command, "--library", "none"], env={**os.environ, **pip}, stderr=subprocess.PIPE
        ) as server:
            index.settimeout(120)
            connection, _ = index.accept()
            until(lambda: status(f"http://127.0.0.1:{port}/health/live") == 200)
            assert status(f"http://127.0.0.1:{port}/health/ready") == 503
            server.terminate()
            assert server.wait(30) == 0
            connection.settimeout(30)
            while connection.recv(65536):  # until pip has ended too
                pass
            connection.close()


def test_json_log_has_one_object_per_line_and_the_error_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--log-format", "json"]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "OMP_DYNAMIC": "true"}
    run = subprocess.run(
        [*command, "--state-dir", str(tmp_path), "--library", "none"], env=environment, capture_output=True, timeout=120
    )
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert run.returncode == 1 and run.stdout == b""
    assert ("warning", IGNORED_VARIABLE % "OMP_DYNAMIC") in [(line["level"], line["message"]) for line in lines]
    assert [line["level"] for line in lines].count("error") == 1


@pytest.mark.parametrize(
    ("before", "allowed", "after"),
    [
        ((1024, 4096), 1 << 20, [4096]),
        ((1024, 1 << 20), 1 << 20, [1 << 16]),
        ((1024, resource.RLIM_INFINITY), 1 << 20, [1 << 16]),
        ((1 << 17, 1 << 20), 1 << 20, []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1 << 20, []),
        ((1024, resource.RLIM_INFINITY), 10240, [8192]),
        ((1024, resource.RLIM_INFINITY), 1500, []),
    ],
)
def test_limit_of_open_files_is_raised(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], allowed: int, after: list[int]
) -> None:
    limits = []

    def setrlimit(what: int, new: tuple[int, int]) -> None:
        if new[0] > allowed:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(new[0])

    monkeypatch.setattr(resource, "getrlimit", lambda what: before)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    raise_file_limit()
    assert limits == after


def test_malloc_uses_mmap_for_large_blocks() -> None:
    """Runs in a separate process, because the setting cannot be undone."""
    program = """
import ctypes
from server.cli import malloc
assert malloc.configure_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks mapped bytes a b c d e".split()]
libc.mallinfo2.restype = Counts
before, size = libc.mallinfo2().mapped, ctypes.c_size_t(2 * malloc.MMAP_THRESHOLD)
libc.free(ctypes.c_void_p(libc.malloc(size)))
libc.malloc(size)
print(libc.mallinfo2().mapped - before)
"""
    if not hasattr(__import__("ctypes").CDLL(None), "mallinfo2"):
        pytest.skip("the C library is not glibc")
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"
