"""Order, units and refusals of the settings."""

from __future__ import annotations

import os
from pathlib import Path

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
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_training_process_keeps_few_kernels_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    keep_few_kernels()
    assert training_environment()[name] == os.environ[name] == "7"
    monkeypatch.delenv(name)
    assert training_environment() == {**os.environ, name: "64"}
    keep_few_kernels()
    assert os.environ[name] == "64"


def test_flags_over_variables_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loramux.toml").write_text('max_batch = 8\nmax_mix = 4\nkv_cache = "1GiB"\nallowed_hosts = ["a", "b"]\n')
    monkeypatch.setenv("LORAMUX_MAX_BATCH", "16")
    monkeypatch.setenv("LORAMUX_MAX_MIX", "5")
    settings = load_settings({"max_batch": "24", "max_slots": None})
    assert (settings.max_batch, settings.max_mix, settings.max_slots) == (24, 5, 64)
    assert settings.kv_cache == 1 << 30
    assert settings.allowed_hosts == ("a", "b")


def test_the_file_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("port = 1\n")
    (tmp_path / "two.toml").write_text("port = 2\n")
    monkeypatch.setenv("LORAMUX_CONFIG", "one.toml")
    assert load_settings().port == 1
    assert load_settings(config=Path("two.toml")).port == 2
    with pytest.raises(BadSetting, match=r"three\.toml does not exist"):
        load_settings(config=Path("three.toml"))


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10kb", 10_000), ("7", 7), (9, 9), ("2gb", 2 * 10**9)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("300s", 300), ("5m", 300), ("250ms", 0.25), ("1h", 3600), (2, 2)])
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1", "1 2", "nan", None, True])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "inf", float("inf"), float("nan"), True])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


def test_auto_is_none() -> None:
    settings = load_settings({"kv_cache": "auto", "threads": "auto", "group_size": "auto", "adapter_dir": "auto"})
    assert settings.kv_cache is settings.threads is settings.group_size is None
    assert settings.watched_dir == Path("data/adapters")
    assert load_settings({"state_dir": "x"}).watched_dir == Path("x/adapters")
    assert load_settings({"library": "none"}).library is None


@pytest.mark.parametrize("host", ["a.example:443", "https://a.example", "a.example/", "::1", "[a", "a b"])
def test_a_host_header_that_could_never_match(host: str) -> None:
    assert load_settings({"allowed_hosts": "a.example, [::1],*"}).allowed_hosts == ("a.example", "[::1]", "*")
    with pytest.raises(BadSetting, match="is no host: no scheme, port or path"):
        load_settings({"allowed_hosts": f"b.example,{host}"})


@pytest.mark.parametrize("name", ["model", "state_dir", "adapter_dir", "library", "api_keys_file"])
def test_an_empty_name_is_no_place(name: str) -> None:
    """A shell's variable that is not set would have the working directory watched, or written to."""
    with pytest.raises(BadSetting, match="leave it out") as e:
        load_settings({name: ""})
    assert e.value.param == name


def test_unknown_variable_names_close_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_MAX_BACH", "3")
    with pytest.raises(BadSetting, match=r"LORAMUX_MAX_BACH; did you mean LORAMUX_MAX_BATCH") as e:
        load_settings()
    assert e.value.param == "max_bach"
    monkeypatch.setenv("LORAMUX_MAX_BACH", "")
    with pytest.raises(BadSetting, match="LORAMUX_MAX_BACH; did you mean"):
        load_settings()


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loramux.toml").write_text("max_batch = 3\n")
    for name in ("MAX_BATCH", "MODEL", "CONFIG"):
        monkeypatch.setenv(f"LORAMUX_{name}", "")
    assert load_settings().max_batch == 3 and load_settings().model == "smollm2-135m"


def test_unknown_key_of_the_file_names_close_ones() -> None:
    Path("loramux.toml").write_text("treads = 3\n")
    with pytest.raises(BadSetting, match=r"treads in loramux\.toml; did you mean threads"):
        load_settings()


def test_broken_file() -> None:
    Path("loramux.toml").write_text("port = = 1\n")
    with pytest.raises(BadSetting, match="can not be read"):
        load_settings()


def test_a_value_of_the_file_is_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.toml").write_text('max_batch = "many"\n')
    with pytest.raises(BadSetting, match=r"^max_batch \(in my\.toml\): ") as e:
        load_settings(config=Path("my.toml"))
    assert e.value.param == "max_batch"
    for flags, variable in (({"max_batch": "0"}, ""), ({}, "0")):  # these are what counts
        monkeypatch.setenv("LORAMUX_MAX_BATCH", variable)
        with pytest.raises(BadSetting, match=r"^max_batch \(--max-batch, LORAMUX_MAX_BATCH\): "):
            load_settings(flags, config=Path("my.toml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"table_bits": "9"}, "table_bits .*8 or 16"),
        ({"port": "70000"}, "port .*65535"),
        ({"kv_cache": "lots"}, "'lots' is no size"),
        ({"kernels": "fast"}, "kernels"),
        ({"max_mix": "0"}, "max_mix"),
        ({"threads": "-3"}, "threads"),
        ({"max_context": "1"}, "max_context"),
        ({"key_concurrency": "0"}, "key_concurrency"),
        ({"task_concurrency": "-1"}, "task_concurrency"),
        ({"deadline": "0"}, "deadline"),
        ({"block_size": "8"}, "multiple of 16 for the native kernels.*--kernels reference"),
        ({"block_size": "24", "kernels": "native"}, "multiple of 16"),
        ({"group_size": "48"}, "one of 32, 64, 128, 256, not 48"),
        ({"quantization": "nf4", "group_size": "32"}, "groups of 64"),
        ({"host": "0.0.0.0"}, "no keys"),
        ({"host": "::"}, "no keys"),
        ({"max_bach": "1"}, "did you mean max_batch"),
    ],
)
def test_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load_settings(flags)


def test_other_kernels_take_blocks_of_any_length() -> None:
    assert load_settings({"block_size": "8", "kernels": "reference"}).block_size == 8


def test_other_hosts_need_keys_or_a_word(tmp_path: Path) -> None:
    for more in ({"api_keys": "a:s"}, {"admin_keys": "a:s"}, {"api_keys_file": tmp_path / "keys"}, {"insecure": True}):
        assert load_settings({"host": "0.0.0.0", **more}).host == "0.0.0.0"
    for nothing in (" ", ",", "\n"):  # no key is in it, and every route would be open
        with pytest.raises(BadSetting, match="there are no keys"):
            load_settings({"host": "0.0.0.0", "api_keys": nothing})
    for host in ("localhost", "127.0.0.1", "127.8.0.1", "::1"):
        assert load_settings({"host": host}).host == host


def test_keys() -> None:
    for odd in ("a:\u043a\u043b\u044e\u0447", "a:x\x07y", "a:\u00e9"):
        with pytest.raises(BadSetting, match="characters that headers do not carry") as refused:
            parse_keys(odd)
        assert odd.partition(":")[2] not in str(refused.value)
    assert parse_keys("a:x, b:y:z\n\nc-1:w,") == {"a": "x", "b": "y:z", "c-1": "w"}
    for bad in ("hunter2", "a:", ":hunter2", "a b:hunter2", "a:hunter2,a:hunter2"):
        with pytest.raises(BadSetting) as e:
            parse_keys(bad)
        assert "hunter2" not in e.value.message


def test_secrets_are_not_shown() -> None:
    settings = load_settings({"api_keys": "me:hunter2"})
    assert "hunter2" not in repr(settings) and "hunter2" not in settings.model_dump_json()
    assert settings.api_keys.get_secret_value() == "me:hunter2"


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_gpu_memory_is_a_size_or_a_share() -> None:
    given = {"auto": None, "20GiB": 20 << 30, "0.9": 0.9, ".5": 0.5, "1.0": 1.0, "4096": 4096}
    for text, value in given.items():
        assert load_settings({"gpu_memory": text}).gpu_memory == value
    assert isinstance(load_settings({"gpu_memory": "1.0"}).gpu_memory, float)
    for text in ("1.5", "0.0", "half"):
        with pytest.raises(BadSetting, match="gpu_memory"):
            load_settings({"gpu_memory": text})


LINKS = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "8000",
    "SERVICE_PORT_HTTP": "8000",
    "PORT": "tcp://10.0.0.1:8000",
    "PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "PORT_8000_TCP_PROTO": "tcp",
    "PORT_8000_TCP_PORT": "8000",
    "PORT_8000_TCP_ADDR": "10.0.0.1",
}


@pytest.mark.parametrize("service", ["LORAMUX", "LORAMUX_GPU"])
def test_what_kubernetes_sets_beside_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    monkeypatch.setenv("LORAMUX_MAX_MIX", "5")
    settings = load_settings()
    assert (settings.port, settings.max_mix) == (8000, 5)
    monkeypatch.setenv(f"{service}_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv(f"{service}_PORT", "tcp://[fd00::1]:8000")
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVER_PORT", "8000"),
        ("PORT_8000_TCP", "8000"),
        ("PORTS", "tcp://10.0.0.1:8000"),
        ("SERVICE_HOST", "localhost"),
        ("SERVICE_PORT", "many"),
        ("PORT", "http://10.0.0.1:8000"),
        ("PORT", "8OOO"),
        ("PORT_8000_TCP_PROTO", "http"),
    ],
)
def test_what_only_looks_like_that_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"LORAMUX_{name}", value)
    with pytest.raises(BadSetting):
        load_settings()


def test_a_home_is_meant_by_its_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("state_dir", "adapter_dir", "library", "api_keys_file", "admin_keys_file", "metrics_key_file")
    for name in names:
        monkeypatch.setenv(f"LORAMUX_{name.upper()}", f"~/{name}")
    (tmp_path / "mine.toml").write_text("port = 1")
    settings = load_settings(config=Path("~/mine.toml"))
    assert {name: getattr(settings, name) for name in names} == {name: tmp_path / name for name in names}
    assert settings.port == 1
    monkeypatch.setenv("LORAMUX_STATE_DIR", "~nobody-at-all/x")
    with pytest.raises(BadSetting, match=r"state_dir .*whose home that is cannot be told"):
        load_settings()
    with pytest.raises(BadSetting, match="the settings file ~nobody-at-all/x can not be read"):
        load_settings(config=Path("~nobody-at-all/x"))


def test_a_host_in_brackets_is_the_address() -> None:
    assert load_settings({"host": "[::1]"}).host == "::1"
    with pytest.raises(BadSetting, match="no keys"):
        load_settings({"host": "[::]"})


def test_numbers_of_many_digits() -> None:
    for text in ("9" * 400, 10**400, "9" * 30, f"{1 << 33}TiB"):
        with pytest.raises(ValueError, match="more than any machine has"):
            parse_size(text)
    for text in ("9" * 400, 10**400):
        with pytest.raises(ValueError, match="finite"):
            parse_duration(text)
    assert parse_size(str(1 << 50)) == 1 << 50


def test_a_file_may_begin_with_the_mark_that_editors_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marked.toml").write_text("port = 2\n", encoding="utf-8-sig")
    assert load_settings(config=tmp_path / "marked.toml").port == 2
