"""`loramux adapters`: errors of servers and keys, output, and `check`."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

import adapters
from adapters.errors import InvalidAdapter
from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.cli import adapters as commands
from server.cli import app, main
from server.cli.adapters import _call, _keys, _print_adapter, _quote
from server.errors import BadSetting, RemoteError, ServerError
from server.settings import Settings

LIBRARY = Path(adapters.__path__[0]) / "library"
OK = b"HTTP/1.0 200 OK\r\n\r\n"
ERROR = {"message": "no adapter 'x'", "type": "invalid_request_error", "param": "name", "code": "adapter_not_found"}
ERROR_BODY = json.dumps({"error": ERROR}).encode()
NOT_LORAMUX = {
    "HTML": b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<!doctype html><p>hello",
    "not HTTP": b"220 mail.example ESMTP\r\n",
    "a list": OK + b"[]",
    "bytes": OK + b"\xff\xfe\x00",
    "incomplete": b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "another API": OK + b"{}",
}


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that answers one request with the bytes of the parameter."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        client, _ = server.accept()
        with client:
            client.recv(65536)
            client.sendall(request.param)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                continue

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    thread.join(30)
    server.close()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["loramux", "adapters", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("port", NOT_LORAMUX.values(), ids=NOT_LORAMUX.keys(), indirect=True)
def test_other_servers(
    port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "list", "--port", str(port)) == 1
    assert capsys.readouterr().err.startswith(f"error: The server at http://127.0.0.1:{port} is not loramux.")


@pytest.mark.parametrize("port", [b"HTTP/1.0 404 Not Found\r\n\r\n" + ERROR_BODY], indirect=True)
def test_errors_of_the_server_are_passed_on(
    port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "show", "x", "--port", str(port), "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": ERROR} and printed.err == "error: no adapter 'x'\n"


@pytest.mark.parametrize("port", [b"HTTP/1.0 401 Unauthorized\r\n\r\n" + ERROR_BODY], indirect=True)
def test_unauthorized_says_where_keys_come_from(port: int) -> None:
    with pytest.raises(RemoteError) as e:
        _call(Settings(port=port), "GET", "/adapters")
    assert "This command uses LORAMUX_ADMIN_KEYS" in e.value.message


@pytest.mark.parametrize(
    "port",
    [b"HTTP/1.0 502 Bad Gateway\r\n\r\n" + body for body in (b"busy", b"[]", b'{"error": "busy"}', b'{"error": {}}')],
    indirect=True,
)
def test_errors_without_a_message(port: int) -> None:
    with pytest.raises(ServerError, match="The server answered with status 502 Bad Gateway"):
        _call(Settings(port=port), "GET", "/adapters")


def test_timeout_of_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "READ_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ServerError, match="did not answer within 0 s"):
            _call(Settings(port=server.getsockname()[1]), "GET", "/adapters")


@pytest.mark.parametrize("port", [OK + b"{}"], indirect=True)
def test_writes_have_no_timeout(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "READ_TIMEOUT", 0.0)
    assert _call(Settings(port=port), "POST", "/adapters", {}) == {}


@pytest.mark.parametrize("host", ["127..0.0.1", "a b", "ö" * 70, "a\u2100b", "a/b", "me@a", "a\0b", "[bad"])
def test_invalid_hosts(host: str) -> None:
    with pytest.raises(BadSetting, match="is not a valid host"):
        _call(Settings(host=host, insecure=True), "GET", "/adapters")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "::1", "localhost", "0.0.0.0"])
def test_valid_hosts(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with pytest.raises(ServerError, match="No server answers at http://"):
        _call(Settings(host=host, port=port, insecure=True), "GET", "/adapters")


def test_names_are_quoted() -> None:
    assert _quote("a/\udcff") == "a%2F%FF"


def test_choice_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Admin keys before inference keys, variables before files."""
    file = tmp_path / "keys"
    file.write_text("you:1\nme:new\n")
    inference = {"api_keys": SecretStr("team:one")}
    assert _keys(Settings()) == {} and _keys(Settings(**inference)) == {"team": "one"}
    assert _keys(Settings(**inference, admin_keys_file=file)) == {"you": "1", "me": "new"}
    both: dict[str, Any] = {"admin_keys": SecretStr("me:old"), "admin_keys_file": file}
    sent: list[str | None] = []

    def opened(self: object, request: urllib.request.Request, timeout: float | None = None) -> None:
        sent.append(request.get_header("Authorization"))
        raise OSError("refused")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", opened)
    with pytest.raises(ServerError, match="refused"):
        _call(Settings(**both), "GET", "/adapters")
    assert sent == ["Bearer me:old"]


@pytest.mark.parametrize("name", ["admin_keys_file", "api_keys_file"])
def test_invalid_keys(tmp_path: Path, name: str) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for file in (tmp_path, tmp_path / "absent", tmp_path / "bytes"):
        with pytest.raises(BadSetting, match=f"{name} cannot be read"):
            _call(Settings(**{name: file}), "GET", "/adapters")
    for secret in ("ключ", "a\x07b"):
        with pytest.raises(BadSetting) as e:
            _call(Settings(api_keys=SecretStr(f"me:{secret}")), "GET", "/adapters")
        assert secret not in e.value.message


def test_output_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {"bytes": 3 << 20, "loaded_at": 1.5e9, "pinned": False, "leases": 0, "ranks": [8, 4], "notes": []}
    versions = [{"version": "x@0"}, {"version": "x@1"}]
    _print_adapter({**adapter, "card": "[x] is text", "versions": versions, "task": None}, as_json=False)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"2017-07-1\d \d\d:\d\d:\d\d", lines.pop("loaded_at"))
    expected = {"bytes": "3.0 MiB", "pinned": "no", "leases": "0", "ranks": "8, 4", "versions": "x@0, x@1"}
    assert lines == {**expected, "card": "[x] is text"}


def test_list_is_not_folded_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"tier": "ram", "bytes": 2048, "ranks": [8], "targets": ["q_proj"] * 9, "leases": 0, "pinned": True}
    adapter = {"version": f"{'a' * 64}@0123456789ab", **fields, "tasks": ["t" * 64]}
    monkeypatch.setattr(commands, "_call", lambda *_: {"adapters": [adapter], "rejected": []})
    shown = CliRunner().invoke(app, ["adapters", "list"], env={"COLUMNS": "40"}).stdout
    expected = [adapter["version"], "ram", "2.0", "KiB", "8", *["q,"] * 8, "q", "0", "yes", "t" * 64]
    assert shown.splitlines()[1].split() == expected


def check(*arguments: object) -> tuple[dict[str, Any], str]:
    """The JSON and the error of `loramux adapters check`."""
    done = CliRunner().invoke(app, ["adapters", "check", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == bool(done.stderr)
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def own(
    tiny_folder: Path, tmp_path: Path, tiny_adapter: Callable[..., LoraWeights], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An adapter `own` in the adapter directory of a server on the base `tiny`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMUX_MODEL", str(tiny_folder))
    save(tiny_adapter(1), tmp_path / "data" / "adapters" / "own")
    return tmp_path / "data" / "adapters" / "own"


def test_check_without_the_base(tmp_path: Path) -> None:
    found, _ = check(LIBRARY / "sentiment", "--state-dir", tmp_path)
    assert found["ranks"] == [8] and found["version"].startswith("sentiment@") and len(found["targets"]) == 7
    assert "r" in found["honoured"] and found["fits"] is None and "not on this machine" in found["notes"][0]
    with pytest.raises(Exception, match="rank"):
        check(LIBRARY / "sentiment", "--max-rank", "4")


def test_check_against_another_base(own: Path) -> None:
    assert check(own)[0]["fits"] == "tiny"
    with pytest.raises(Exception, match="base"):
        check(LIBRARY / "sentiment")


GOOD: dict[str, Any] = {"prompt": "Mood: {input}"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({**GOOD, "lables": ["a"]}, "lables"),
        ({"prompt": "Mood:"}, "{input}"),
        ({**GOOD, "task": "base"}, "base"),
        ({**GOOD, "task": "tiny"}, "tiny"),
        ({**GOOD, "defaults": {"min_tokens": 9, "max_tokens": 3}}, "min_tokens"),
        ({**GOOD, "defaults": {"stop_token_ids": [1 << 30]}}, str(1 << 30)),
        ({**GOOD, "route": {"choice": [{"name": "own", "weight": 99}]}}, "weight"),
    ],
)
def test_check_of_an_invalid_task(own: Path, body: dict[str, Any], reason: str) -> None:
    (own / "task.json").write_text(json.dumps(body))
    found, error = check(own)
    assert found["fits"] == "tiny" and found["task"] is None and found["error"]["message"] in error
    assert "task.json is invalid" in error and reason.replace(",", "") in error.replace(",", "")


def test_check_of_a_task(own: Path) -> None:
    assert check(own)[0]["task"] is None
    (own / "task.json").write_text(json.dumps({**GOOD, "defaults": {"stop_token_ids": [1]}}))
    assert check(own)[0]["task"] == "own"
    (own / "task.json").write_text(json.dumps({**GOOD, "task": "another"}))
    assert check(own)[0]["task"] == "another"


@pytest.mark.parametrize("name", ["base", "tiny", "my own"])
def test_check_of_invalid_names(own: Path, tmp_path: Path, name: str) -> None:
    """In the adapter directory they are errors, elsewhere notes."""
    with pytest.raises(InvalidAdapter):
        check(own.rename(own.parent / name))
    (tmp_path / "elsewhere").mkdir()
    folder = (own.parent / name).rename(tmp_path / "elsewhere" / name)
    (folder / "task.json").write_text(json.dumps(GOOD))
    found, error = check(folder)
    assert found["notes"][0].startswith("to serve it, give it another name") and found["task"] is None and not error
    (folder / "task.json").write_text(json.dumps({**GOOD, "task": "mine"}))
    assert check(folder)[0]["task"] == "mine"


def test_check_of_symbolic_links(own: Path, tmp_path: Path) -> None:
    (own.parent / "within").symlink_to("own")
    assert check(own.parent / "within")[0]["version"].startswith("within@")
    shutil.move(own, tmp_path / "away")
    (own.parent / "out").symlink_to(tmp_path / "away")
    with pytest.raises(InvalidAdapter):
        check(own.parent / "out")
    assert check(tmp_path / "away")[0]["notes"] == []
