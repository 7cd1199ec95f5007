"""The client examples run unchanged against a server with the bundled adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e.conftest import REPO, Live

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("with_openai.py", ["sentiment: positive", "refused:", "sentiment task", '"stars"']),
        ("with_httpx.py", ["positive  A stirring", "negative  Two hours", "negative {", "stream: "]),
    ],
)
def test_an_example(default_server: Live, script: str, says: list[str]) -> None:
    command = [sys.executable, "-W", "error", str(REPO / "examples" / "clients" / script), default_server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in says:
        assert words in done.stdout, done.stdout
