"""Fixtures of the end-to-end tests: the embedded base, a PEFT oracle on its weights, and real server processes."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.kernels import choose
from server.model.loader import Base, load_base
from server.sources import resolve_model

REPO = Path(__file__).resolve().parents[2]
STATE = REPO / "data"
"""The state directory of `make serve`. Tests share its model files."""
LONGEST = (
    "test_page.py",
    "test_mixed_traffic.py",
    "test_soak.py",
    "test_command_line_e2e.py",
    "test_training_job.py",
)
"""The slowest files run first, so that parallel workers finish at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded base's GGUF file, downloaded if missing. All servers share its packed form."""
    (STATE / "cache").mkdir(parents=True, exist_ok=True)
    return resolve_model("smollm2-135m", STATE).path


@pytest.fixture(scope="session")
def base(embedded: Path) -> Base:
    """The embedded base on the reference kernels."""
    return load_base(embedded, name="smollm2-135m", backend=choose("reference"), cache_dir=None)


@pytest.fixture(scope="session")
def oracle(base: Base):
    from tests.e2e.oracle import Oracle

    return Oracle(base)


class Live:
    """A running server with its process, address and HTTP client."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, state: Path, seconds: float) -> None:
        self.process, self.url, self.state, self.ready_seconds = process, url, state, seconds
        self.client = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))

    def post(self, path: str, body: object, status: int | None = 200) -> dict:
        answer = self.client.post(path, json=body)
        assert status is None or answer.status_code == status, (answer.status_code, answer.text[:500])
        return answer.json()

    def post_all(self, path: str, bodies: Sequence[object]) -> list[dict]:
        """Post all bodies concurrently and return the answers in order."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.post(path, body), bodies))

    def get(self, path: str) -> dict:
        answer = self.client.get(path)
        assert answer.status_code == 200, (answer.status_code, answer.text[:500])
        return answer.json()

    def resident(self) -> int:
        """Resident bytes of the process, as counted by the operating system."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server has no resident memory")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def serving(state: Path, *flags: str, log: Path | None = None) -> Iterator[Live]:
    """Run `loramux serve` with the embedded base until the block ends. The server is ready when the block starts."""
    state.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for shared in ("models", "cache"):  # the GGUF file and its packed form
        if (STATE / shared).exists() and not (state / shared).exists():
            (state / shared).symlink_to(STATE / shared)
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--state-dir", str(state), *flags]
    out = (log or state / "server.log").open("wb")
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT)
    live = Live(process, f"http://127.0.0.1:{port}", state, 0.0)
    try:
        while True:
            if process.poll() is not None or time.monotonic() - start > 120:
                pytest.fail(f"the server did not start:\n{Path(out.name).read_text()[-4000:]}")
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{live.url}/health/ready", timeout=5).status == 200:
                    break
            time.sleep(0.02)
        live.ready_seconds = time.monotonic() - start
        yield live
    finally:
        live.client.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the server did not stop:\n{Path(out.name).read_text()[-4000:]}")
        finally:
            out.close()


@pytest.fixture(scope="session")
def reference_server(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Iterator[Live]:
    """A server on the float32 reference kernels, with a step limit that suits their speed."""
    with serving(
        tmp_path_factory.mktemp("reference"), "--kernels", "reference", "--step-limit", "600", "--max-batch", "64"
    ) as live:
        yield live


@pytest.fixture(scope="session")
def default_server(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Iterator[Live]:
    """A server with default settings, as `make serve` starts it."""
    with serving(tmp_path_factory.mktemp("default")) as live:
        yield live


@pytest.fixture(scope="session")
def write_random(base: Base) -> Callable[..., Path]:
    """Return `write(path, rank=8, seed=1, ...)`, which writes a random adapter for the embedded base."""
    from benchmarks.synthetic import write_adapter

    return lambda path, **kw: write_adapter(path, base.shapes(), **kw)


def sentences() -> list[str]:
    """Short texts for prompts."""
    return json.loads((Path(__file__).parent / "sentences.json").read_text())
