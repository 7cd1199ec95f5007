"""Contents of the source distribution and of a build, made by setuptools in a copy of the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.conftest import part_missing

REPO = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "adapters", "benchmarks", "deploy", "docs", "examples", "server", "tests")
GENERATED = {
    "server/kernels/cpu/_native.cpython-399-x86_64-linux-gnu.so",
    "server/__pycache__/app.cpython-399.pyc",
    "deploy/secrets/api_keys",
    "data/names.json",
}
"""Files in a checkout that must not be packaged."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    try:
        new = int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        new = False
    if not new:
        part_missing("setuptools 77 or newer is not installed")
    copy = tmp_path / "checkout"
    for name in FOLDERS:
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "secrets"))
    for path in REPO.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    for path in GENERATED:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).touch()
    return copy


def run(checkout: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=checkout, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_source_distribution_has_the_checkout_without_generated_files(checkout: Path) -> None:
    run(checkout, "egg_info")
    names = set((checkout / "loramux.egg-info" / "SOURCES.txt").read_text().splitlines())
    assert not names & GENERATED
    there = {path.relative_to(checkout).as_posix() for folder in FOLDERS for path in (checkout / folder).rglob("*")}
    files = {name for name in there - GENERATED if (checkout / name).is_file()}
    assert files <= names
    assert {path.name for path in REPO.glob("*.md")} | {"Makefile", "Dockerfile", "docker-compose.yml"} <= names
    assert set(re.findall(r"^!(\w+\.?\w*)$", (REPO / ".dockerignore").read_text(), re.M)) <= names | set(FOLDERS)


def test_build_removes_files_of_an_earlier_build_except_libraries(checkout: Path) -> None:
    run(checkout, "build_py")
    (built,) = (checkout / "build").glob("lib*")
    before = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in before} == {"adapters", "benchmarks", "server"} and not list(built.rglob("*.so"))
    library = built / "server" / "kernels" / "cpu" / "_native.so"
    for left in (built / "server" / "gone.py", built / "adapters" / "library" / "gone" / "task.json", library):
        left.parent.mkdir(exist_ok=True)
        left.touch()
    run(checkout, "build_py")
    after = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    assert after == before | {library.relative_to(built)}


def test_build_keeps_foreign_files_in_a_given_folder(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "mine").touch()
    run(checkout, "build_py", "--build-lib", str(tmp_path / "named"))
    assert (tmp_path / "named" / "mine").exists() and (tmp_path / "named" / "server").is_dir()
