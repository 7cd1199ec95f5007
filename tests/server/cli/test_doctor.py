"""`loramux doctor` finds what would make `serve` fail, and changes nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters.store import AdapterStore
from server.cli import app
from server.cli.checks import check_state_dir
from server.cli.doctor import Report, examine
from server.errors import BadSetting
from server.settings import Settings


def problems(**settings: Any) -> str:
    return " ".join(examine(Settings(port=0, **settings)).problems)


def test_report_of_a_machine_without_the_base(tmp_path: Path) -> None:
    report = examine(Settings(port=0, state_dir=tmp_path / "new", threads=4096))
    assert report.problems == []
    assert {"cores", "processor", "memory", "GPU", "kernels", "base", "state", "address"} <= set(report.facts)
    assert "not downloaded" in report.facts["base"] and any("pull" in w for w in report.warnings)
    assert any("4096 threads" in w for w in report.warnings)
    assert list(tmp_path.iterdir()) == []


def test_exit_status(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["doctor", "--port", "0", "--json", "--state-dir", str(tmp_path)])
    bad = runner.invoke(app, ["doctor", "--port", "0", "--json", "--model", "nothing", "--state-dir", str(tmp_path)])
    assert (good.exit_code, json.loads(good.output)["ok"]) == (0, True)
    assert (bad.exit_code, json.loads(bad.output)["ok"]) == (1, False)
    text = runner.invoke(app, ["doctor", "--port", "0", "--state-dir", str(tmp_path)]).output
    assert "ready to serve" in text and "warning" in text


def test_state_directory_in_use(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    try:
        with pytest.raises(BadSetting, match="in use by another process"):
            check_state_dir(tmp_path)
        assert f"{tmp_path} is in use by another process" in problems(state_dir=tmp_path)
    finally:
        store.close()
    with (tmp_path / "store" / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # a second doctor
        assert check_state_dir(tmp_path) == tmp_path
    AdapterStore(tmp_path / "store").close()


def test_check_of_the_state_directory_creates_nothing(tmp_path: Path) -> None:
    assert check_state_dir(tmp_path / "a" / "b") == tmp_path and list(tmp_path.iterdir()) == []
    AdapterStore(tmp_path / "store").close()
    before = sorted(tmp_path.rglob("*"))
    assert check_state_dir(tmp_path) == tmp_path and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["file", "file/state", "/proc/state", "x" * 300, "/proc"])
def test_state_directory_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadSetting, match="cannot be written: .* --state-dir"):
        check_state_dir(tmp_path / place)


def test_missing_permission_names_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(BadSetting, match="Permission denied. Give user "):
        check_state_dir(tmp_path)


def test_disk_and_memory_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--kv-cache is larger" in problems(state_dir=tmp_path, kv_cache=1 << 60, device="cpu")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    assert "is full" in problems(state_dir=tmp_path)


def test_package_name_installed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**owners: list[str]) -> str:
        monkeypatch.setattr("server.cli.doctor.packages_distributions", lambda: owners)
        return problems(state_dir=tmp_path)

    assert found() == found(adapters=["loramux", "loramux"], server=["loramux"], other=["a", "b"]) == ""
    assert "adapters and loramux each install a Python package named 'adapters'" in found(
        adapters=["loramux", "adapters"], server=["loramux"]
    )


def test_model_that_cannot_be_served(tmp_path: Path, tiny_folder: Path) -> None:
    def found(model: Path | str, **settings: Any) -> str:
        return problems(model=str(model), state_dir=tmp_path / "state", **settings)

    assert found(tiny_folder) == found("org/model") == ""
    assert "256" in found(tiny_folder, group_size=256)
    (tmp_path / "notes.txt").write_text("not a model, but as long as the header of one")
    assert "notes.txt" in found(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert "empty" in found(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM" in found(tmp_path / "empty")


def test_quantization_is_reported(tmp_path: Path, tiny_folder: Path) -> None:
    report = examine(Settings(port=0, model=str(tiny_folder), state_dir=tmp_path, group_size=32))
    assert report.problems == [] and report.facts["served as"].startswith("int4")


def test_invalid_chat_template(tmp_path: Path, tiny_folder: Path) -> None:
    settings = tiny_folder / "tokenizer_config.json"
    content = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(content | {"chat_template": "{% for %}"}))
    assert "chat template" in problems(model=str(tiny_folder), state_dir=tmp_path / "state")


def test_gpu_that_does_not_respond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nAsk the administrator.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", busy)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for device in ("auto", "cpu"):
        report = examine(Settings(state_dir=tmp_path, port=0, device=device))
        found, other = (report.problems, report.warnings) if device == "auto" else (report.warnings, report.problems)
        assert len([line for line in found if "GPU" in line and line.endswith("busy or unavailable")]) == 1
        assert not any("GPU" in line for line in other)


@pytest.mark.parametrize("name", ["api_keys_file", "admin_keys_file", "metrics_key_file"])
@pytest.mark.parametrize("content", [None, b"no key", b"\xff\xfe"])
def test_key_files(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    assert f"{name} cannot be read" in problems(state_dir=tmp_path, **{name: file})
    file.write_text("me:secret")
    assert problems(state_dir=tmp_path, **{name: file}) == ""


def test_address_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        report = examine(Settings(port=taken.getsockname()[1], state_dir=tmp_path))
    assert any("Cannot listen on 127.0.0.1" in problem for problem in report.problems)
    assert report.facts["address"].endswith("not available")


@pytest.mark.parametrize("error", [ImportError("libcudart.so.13: no such file"), OSError(36, "File name too long")])
def test_a_failing_check_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(settings: Settings, report: Report) -> None:
        raise error

    for check in ("_processor", "_torch"):
        monkeypatch.setattr(f"server.cli.doctor.{check}", broken)
    report = examine(Settings(state_dir=tmp_path, model="nothing", port=0))
    assert report.problems.count(f"{type(error).__name__}: {error}") == 1 and len(report.problems) == 2
    assert "memory" in report.facts
