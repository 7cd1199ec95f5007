"""What the doctor finds is what `serve` would end with, and looking leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.store import AdapterStore
from server.cli.doctor import Report, check_state_dir, examine
from server.errors import BadSetting
from server.settings import Settings


def problems(**settings: Any) -> str:
    return " ".join(examine(Settings(port=0, **settings)).problems)


def test_a_state_directory_that_another_process_holds(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    try:
        with pytest.raises(BadSetting, match="in use by another process"):
            check_state_dir(tmp_path)
        assert f"{tmp_path} is in use by another process" in problems(state_dir=tmp_path)
    finally:
        store.close()
    assert check_state_dir(tmp_path) == tmp_path and problems(state_dir=tmp_path) == ""
    AdapterStore(tmp_path / "store").close()  # the lock was not kept


def test_a_state_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "state", Path("/proc/state"), tmp_path / ("x" * 300), Path("/proc")):
        with pytest.raises(BadSetting, match=r"can not be written: .*--state-dir names another"):
            check_state_dir(place)
    assert "can not be written" in problems(state_dir=file / "state")

    def read_only(dir: Path) -> Any:
        if dir.name == "store":
            raise OSError(errno.EROFS, "Read-only file system")
        return open(tmp_path / "file", "rb")

    (tmp_path / "state" / "store").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(BadSetting, match="Read-only file system; --state-dir"):
        check_state_dir(tmp_path / "state")


def test_who_has_to_be_let_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a fresh volume, which is root's."""

    def refused(dir: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(
        BadSetting, match=rf"Permission denied; the user {os.geteuid()} must be able to, or --state-dir"
    ):
        check_state_dir(tmp_path)


def test_a_package_that_others_install_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**owners: list[str]) -> str:
        monkeypatch.setattr("server.cli.doctor.packages_distributions", lambda: owners)
        return problems(state_dir=tmp_path)

    assert told() == told(adapters=["loramux", "loramux"], server=["loramux"], other=["a", "b"]) == ""
    assert "'adapters'" not in told(adapters=["adapters"]), "of a checkout that is not installed"
    assert "adapters and loramux each install a Python package named 'adapters'" in told(
        adapters=["loramux", "adapters"], server=["loramux"]
    )
    assert "named 'server'" in told(server=["other", "loramux"])


def test_a_base_that_serve_would_refuse(tiny_folder: Path, tmp_path: Path) -> None:
    def told() -> str:
        return problems(model=str(tiny_folder), quantization="none", state_dir=tmp_path / "state")

    assert told() == ""
    tokenizer, settings = (tiny_folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    whole, sound = json.loads(tokenizer.read_text()), settings.read_text() if settings.exists() else "{}"
    settings.write_text(json.dumps(json.loads(sound) | {"chat_template": "{% for %}"}))
    assert "chat template does not parse" in told()
    settings.write_text(sound)
    beyond = {"id": 100_000, "content": "<more>", "special": True, "single_word": False, "lstrip": False}
    whole["added_tokens"].append({**beyond, "rstrip": False, "normalized": False})
    tokenizer.write_text(json.dumps(whole))
    assert "the model's table ends before" in told()


def test_looking_at_a_state_directory_changes_nothing(tmp_path: Path) -> None:
    assert check_state_dir(tmp_path / "a" / "b") == tmp_path and list(tmp_path.iterdir()) == []
    AdapterStore(tmp_path / "store").close()
    before = sorted(tmp_path.rglob("*"))
    assert check_state_dir(tmp_path) == tmp_path and sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_does_not_answer_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nAsk the administrator.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", busy)
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # of a torch that was built without, the GPU is not asked
    for device in ("auto", "cpu"):
        report = examine(Settings(state_dir=tmp_path, port=0, device=device))
        assert report.facts["GPU"] == "one that does not answer"
        told, others = (report.problems, report.remarks) if device == "auto" else (report.remarks, report.problems)
        found = [line for line in told if "GPU" in line]
        assert len(found) == 1 and found[0].endswith("are busy or unavailable")
        assert not any("GPU" in line for line in others)


def test_two_may_look_at_once(tmp_path: Path) -> None:
    AdapterStore(tmp_path / "store").close()
    with (tmp_path / "store" / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert check_state_dir(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["api_keys_file", "admin_keys_file", "metrics_key_file"])
def test_keys_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / "keys"
    for content in (None, b"no key", b"\xff\xfe"):
        if content is not None:
            file.write_bytes(content)
        assert f"{name} cannot be read" in problems(state_dir=tmp_path, **{name: file})
    assert f"{name} cannot be read" in problems(state_dir=tmp_path, **{name: tmp_path})
    file.write_text("me:secret")
    assert problems(state_dir=tmp_path, **{name: file}) == ""


@pytest.mark.parametrize("host", ["127..0.0.1", "no such host", "ö" * 70])
def test_a_host_that_is_none(tmp_path: Path, host: str) -> None:
    report = examine(Settings(port=0, host=host, insecure=True, state_dir=tmp_path))
    assert any(f"can not listen on {host}:0" in p and "--host" in p and "--port" not in p for p in report.problems)
    assert report.facts["address"].endswith("not to be had")


def test_a_folder_that_is_not_there_may_be_a_hub_id(tmp_path: Path) -> None:
    remarks = examine(Settings(port=0, model="data/qwen", state_dir=tmp_path)).remarks
    assert any(
        r.startswith("there is no folder data/qwen here; as a hub id: `loramux pull data/qwen`") for r in remarks
    )


@pytest.mark.parametrize("error", [ImportError("libcudart.so.13: no such file"), OSError(36, "File name too long")])
def test_what_cannot_be_looked_at_is_a_problem_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """And what can be is looked at all the same."""

    def broken(settings: Settings, report: Report) -> None:
        raise error

    for check in ("_processor", "_torch"):
        monkeypatch.setattr(f"server.cli.doctor.{check}", broken)
    report = examine(Settings(state_dir=tmp_path, model="nothing", port=0))
    assert report.problems.count(f"{type(error).__name__}: {error}") == 1 and len(report.problems) == 2
    assert "memory" in report.facts


def test_what_keeps_a_server_from_starting_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path / "store")
    store.close()
    assert problems(state_dir=tmp_path) == ""
    assert "--kv-cache is over" in problems(state_dir=tmp_path, kv_cache=1 << 60, device="cpu")
    (tmp_path / "store" / "names.json").write_text("{")
    assert "names.json cannot be read" in problems(state_dir=tmp_path)
    (tmp_path / "store" / "names.json").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    assert "is full" in problems(state_dir=tmp_path)
