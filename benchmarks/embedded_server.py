"""`serving`: a `loramux serve` of its own for a benchmark, on the embedded base, with a fresh state, on the processor.

Knows where the base lies once it has been fetched. Does not know what is asked.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.server_process import ServerProcess, free_port, running

REPO = Path(__file__).resolve().parents[1]
MODELS = REPO / "data" / "models"
"""Where the base lies once `make serve` has fetched it; a server without it fetches its own."""
CACHE = REPO / "data" / "cache"
"""Where it lies packed then."""


@contextlib.contextmanager
def serving(state: Path, models: Path, *flags: str, module: str = "server.cli") -> Iterator[ServerProcess]:
    """A server on a free port, ready to answer; stopped at the end. `module` is what is run as `loramux`."""
    state.mkdir(parents=True)
    for name, kept in (("models", models.resolve()), ("cache", CACHE)):
        if kept.is_dir():
            (state / name).symlink_to(kept)
    port = free_port()
    with running(command(port, state, *flags, module=module), port, "/health/ready", state / "server.log") as server:
        yield server


def command(port: int, state: Path, *flags: str, module: str = "server.cli") -> list[str]:
    """What starts it. A GPU that is there serves nothing, unless `flags` name it."""
    started = [sys.executable, "-m", module, "serve", "--port", str(port), "--state-dir", str(state)]
    return [*started, "--library", "none", "--device", "cpu", *flags]
