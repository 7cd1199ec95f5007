"""Settings: precedence of their sources, units, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from server.errors import BadSetting
from server.settings import (
    Settings,
    keep_few_kernels,
    load_settings,
    parse_duration,
    parse_keys,
    parse_size,
    training_environment,
)


@pytest.fixture(autouse=True)
def _empty_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_flags_override_variables_which_override_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loramux.toml").write_text('max_batch = 8\nmax_mix = 4\nkv_cache = "1GiB"\nallowed_hosts = ["a", "b"]\n')
    monkeypatch.setenv("LORAMUX_MAX_BATCH", "16")
    monkeypatch.setenv("LORAMUX_MAX_MIX", "5")
    settings = load_settings({"max_batch": "24", "max_slots": None})
    assert (settings.max_batch, settings.max_mix, settings.max_slots) == (24, 5, 64)
    assert settings.kv_cache == 1 << 30 and settings.allowed_hosts == ("a", "b")
    assert {"max_batch", "max_mix", "kv_cache"} <= settings.model_fields_set and "port" not in settings.model_fields_set


def test_settings_without_load_read_no_file_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loramux.toml").write_text("max_batch = 8\n")
    monkeypatch.setenv("LORAMUX_MAX_MIX", "5")
    assert (Settings().max_batch, Settings().max_mix) == (32, 8)


def test_config_flag_overrides_config_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one.toml").write_text("port = 1\n")
    (tmp_path / "two.toml").write_text("port = 2\n")
    monkeypatch.setenv("LORAMUX_CONFIG", "one.toml")
    assert load_settings().port == 1
    assert load_settings(config=Path("~/two.toml")).port == 2
    with pytest.raises(BadSetting, match=r"three\.toml does not exist"):
        load_settings(config=Path("three.toml"))


def test_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loramux.toml").write_text("max_batch = 3\n")
    for name in ("MAX_BATCH", "MODEL", "CONFIG"):
        monkeypatch.setenv(f"LORAMUX_{name}", "")
    assert load_settings().max_batch == 3 and load_settings().model == "smollm2-135m"


def test_with_defaults_keeps_what_was_set() -> None:
    settings = load_settings({"group_size": "128"}).with_defaults({"group_size": 32, "quantization": "none"})
    assert (settings.group_size, settings.quantization) == (128, "none")
    with pytest.raises(BadSetting, match="groups of 64"):
        load_settings({"quantization": "nf4"}).with_defaults({"group_size": 32})


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10kb", 10_000), ("7", 7), (9, 9), ("2gb", 2 * 10**9)],
)
def test_parse_size(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1", "1 2", "nan", None, "9" * 400, f"{1 << 33}TiB"])
def test_parse_size_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("300s", 300), ("5m", 300), ("250ms", 0.25), ("1h", 3600), (2, 2)])
def test_parse_duration(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "inf", float("inf"), float("nan"), -1.0, True, "9" * 400])
def test_parse_duration_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_auto_is_none() -> None:
    settings = load_settings({"kv_cache": "auto", "threads": "auto", "group_size": "auto", "adapter_dir": "auto"})
    assert settings.kv_cache is settings.threads is settings.group_size is None
    assert settings.watched_dir == Path("data/adapters")
    assert load_settings({"state_dir": "x"}).watched_dir == Path("x/adapters")
    assert load_settings({"library": "none"}).library is None


def test_gpu_memory_is_a_size_or_a_share() -> None:
    given = {"auto": None, "20GiB": 20 << 30, "0.9": 0.9, ".5": 0.5, "1.0": 1.0, "4096": 4096}
    for text, value in given.items():
        assert load_settings({"gpu_memory": text}).gpu_memory == value
    assert isinstance(load_settings({"gpu_memory": "1.0"}).gpu_memory, float)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"table_bits": "9"}, "table_bits .*8 or 16"),
    ({"port": "70000"}, "port .*65535"),
    ({"kv_cache": "lots"}, "'lots' is not a size"),
    ({"kernels": "fast"}, "kernels"),
    ({"max_mix": "0"}, "max_mix"),
    ({"threads": "-3"}, "threads"),
    ({"max_context": "1"}, "max_context"),
    ({"key_concurrency": "0"}, "key_concurrency"),
    ({"task_rate": "0"}, "task_rate"),
    ({"deadline": "0"}, "deadline"),
    ({"gpu_memory": "1.5"}, "gpu_memory"),
    ({"gpu_memory": "half"}, "gpu_memory"),
    ({"block_size": "8"}, "multiple of 16 for the native kernels.*--kernels reference"),
    ({"block_size": "24", "kernels": "native"}, "multiple of 16"),
    ({"group_size": "48"}, "one of 32, 64, 128, 256, not 48"),
    ({"quantization": "nf4", "group_size": "32"}, "groups of 64"),
    ({"host": "0.0.0.0"}, "no keys"),
    ({"host": "[::]"}, "no keys"),
    ({"host": "0.0.0.0", "api_keys": " ,\n"}, "no keys"),
    ({"allowed_hosts": "a.example:443"}, "is not a host name"),
    ({"allowed_hosts": "b.example,https://a.example"}, "is not a host name"),
    ({"allowed_hosts": "::1"}, "is not a host name"),
    ({"state_dir": "~nobody-at-all/x"}, r"state_dir .*home directory in ~nobody-at-all/x is unknown"),
    ({"max_bach": "1"}, "did you mean max_batch"),
    *(({name: ""}, f"{name} .*leave it out") for name in ("model", "state_dir", "adapter_dir", "api_keys_file")),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[str(flags) for flags, _ in REFUSED])
def test_refused_values(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load_settings(flags)


def test_accepted_hosts_and_blocks() -> None:
    assert load_settings({"block_size": "8", "kernels": "reference"}).block_size == 8
    assert load_settings({"allowed_hosts": "a.example, [::1],*"}).allowed_hosts == ("a.example", "[::1]", "*")
    assert load_settings({"host": "[::1]"}).host == "::1"
    for host in ("localhost", "127.8.0.1", "::1"):
        assert load_settings({"host": host}).host == host
    keyed: list[dict[str, Any]] = [
        {"api_keys": "a:s"},
        {"admin_keys": "a:s"},
        {"api_keys_file": "keys"},
        {"insecure": True},
    ]
    for more in keyed:
        assert load_settings({"host": "0.0.0.0", **more}).host == "0.0.0.0"


@pytest.mark.parametrize("value", ["3", ""])
def test_unknown_variable_is_refused_with_a_suggestion(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LORAMUX_MAX_BACH", value)
    with pytest.raises(BadSetting, match=r"LORAMUX_MAX_BACH; did you mean LORAMUX_MAX_BATCH") as refused:
        load_settings()
    assert refused.value.param == "max_bach"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("treads = 3\n", r"treads in loramux\.toml; did you mean threads"),
        ("port = = 1\n", "cannot be read"),
        ('max_batch = "many"\n', r"^max_batch \(in loramux\.toml\): "),
    ],
)
def test_refused_files(content: str, message: str) -> None:
    Path("loramux.toml").write_text(content)
    with pytest.raises(BadSetting, match=message):
        load_settings()


@pytest.mark.parametrize(("flags", "variable"), [({"max_batch": "0"}, ""), ({}, "0")])
def test_error_names_flag_and_variable_if_they_override_the_file(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], variable: str
) -> None:
    Path("loramux.toml").write_text('max_batch = "many"\n')
    monkeypatch.setenv("LORAMUX_MAX_BATCH", variable)
    with pytest.raises(BadSetting, match=r"^max_batch \(--max-batch, LORAMUX_MAX_BATCH\): ") as refused:
        load_settings(flags)
    assert refused.value.param == "max_batch"


@pytest.mark.parametrize("service", ["LORAMUX", "LORAMUX_GPU"])
def test_service_variables_of_kubernetes_are_ignored(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8000_TCP_PROTO", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"{service}_{name}", "10.0.0.1")
    for name in ("PORT", "PORT_8000_TCP"):
        monkeypatch.setenv(f"{service}_{name}", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("LORAMUX_MAX_MIX", "5")
    assert (load_settings().port, load_settings().max_mix) == (8000, 5)


@pytest.mark.parametrize(("name", "value"), [("SERVER_PORT", "8000"), ("PORTS", "tcp://a:1"), ("PORT", "8OOO")])
def test_similar_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"LORAMUX_{name}", value)
    with pytest.raises(BadSetting):
        load_settings()


def test_parse_keys() -> None:
    assert parse_keys("a:x, b:y:z\n\nc-1:w,") == {"a": "x", "b": "y:z", "c-1": "w"}


@pytest.mark.parametrize(
    "text",
    ["hunter2", "a:", ":hunter2", "a b:hunter2", "a:hunter2,a:hunter2", "a:hunter2\x07", "a:hunter2\u00e9"],
)
def test_refused_keys_are_not_in_the_message(text: str) -> None:
    with pytest.raises(BadSetting) as refused:
        parse_keys(text)
    assert "hunter2" not in refused.value.message


def test_secrets_are_hidden_and_settings_frozen() -> None:
    settings = load_settings({"api_keys": "me:hunter2"})
    assert "hunter2" not in repr(settings) and "hunter2" not in settings.model_dump_json()
    assert settings.api_keys.get_secret_value() == "me:hunter2"
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_paths_expand_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("state_dir", "adapter_dir", "library", "api_keys_file", "admin_keys_file", "metrics_key_file")
    for name in names:
        monkeypatch.setenv(f"LORAMUX_{name.upper()}", f"~/{name}")
    settings = load_settings()
    assert {name: getattr(settings, name) for name in names} == {name: tmp_path / name for name in names}


def test_kernel_cache_limits_do_not_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "64")
    monkeypatch.setenv(name, "7")
    keep_few_kernels()
    assert training_environment()[name] == os.environ[name] == "7"
    monkeypatch.delenv(name)
    assert training_environment() == {**os.environ, name: "64"}
    keep_few_kernels()
    assert os.environ[name] == "64"
