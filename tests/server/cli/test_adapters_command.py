"""`loramux adapters` against what is no loramux server, with hosts that are none and keys that cannot be sent."""

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

from adapters.errors import InvalidAdapter
from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.api.auth import Keys
from server.cli import adapters as commands
from server.cli import app, main
from server.cli.adapters import _call, _quoted, _tell, list_
from server.errors import BadSetting, RemoteError, ServerError
from server.settings import Settings

BROKEN = {
    "HTML": b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<!doctype html><p>hello",
    "no HTTP": b"220 mail.example ESMTP\r\n",
    "a list": b"HTTP/1.0 200 OK\r\n\r\n[]",
    "bytes": b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe\x00",
    "a part": b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{}",
}


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """Where a server answers once, with the bytes of the parameter, whatever it is asked."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        other, _ = server.accept()
        with other:
            other.recv(65536)
            other.sendall(request.param)
            other.shutdown(socket.SHUT_WR)
            while other.recv(65536):  # closed with a body unread, the answer would be lost
                continue

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    thread.join(30)
    server.close()


@pytest.mark.parametrize("port", BROKEN.values(), ids=BROKEN.keys(), indirect=True)
def test_what_is_no_loramux_server(port: int) -> None:
    with pytest.raises(ServerError, match=rf"what answers at http://127\.0\.0\.1:{port} is no loramux server"):
        _call(Settings(port=port), "GET", "/adapters")


@pytest.mark.parametrize("port", [b"HTTP/1.0 200 OK\r\n\r\n{}"], indirect=True)
def test_json_of_another_server(port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {**dict.fromkeys(list_.__annotations__), "as_json": True, "port": port}
    with pytest.raises(ServerError, match="is no loramux server"):
        list_(**given)


ERROR = {"message": "no adapter 'x'", "type": "invalid_request_error", "param": "name", "code": "adapter_not_found"}
LOCKED = {**ERROR, "message": "a key is needed"}
KEYLESS = b"HTTP/1.0 401 Unauthorized\r\n\r\n" + json.dumps({"error": LOCKED}).encode()
UNKNOWN = b"HTTP/1.0 404 Not Found\r\n\r\n" + json.dumps({"error": ERROR}).encode()


@pytest.mark.parametrize("port", [UNKNOWN], indirect=True)
def test_what_a_server_refuses_is_told_in_its_own_words(
    port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["loramux", "adapters", "show", "x", "--port", str(port), "--json"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": ERROR} and printed.err == "error: no adapter 'x'\n"


def test_a_name_that_is_no_text_is_asked_for_by_its_bytes() -> None:
    assert _quoted("a/\udcff") == "a%2F%FF"


def test_a_server_that_is_slow_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "PATIENCE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ServerError, match=r"has not answered for 0 s"):
            _call(Settings(port=server.getsockname()[1]), "GET", "/adapters")


@pytest.mark.parametrize("port", [b"HTTP/1.0 200 OK\r\n\r\n{}"], indirect=True)
def test_a_load_may_take_as_long_as_it_takes(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "PATIENCE", 0.0)
    assert _call(Settings(port=port), "POST", "/adapters", {}) == {}


@pytest.mark.parametrize("port", [KEYLESS], indirect=True)
def test_where_a_key_comes_from_is_told(port: int) -> None:
    with pytest.raises(RemoteError) as e:
        _call(Settings(port=port), "GET", "/adapters")
    assert e.value.body == LOCKED
    assert e.value.message.startswith("a key is needed; this command takes its key from LORAMUX_ADMIN_KEYS")


def test_an_adapter_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"bytes": 3 << 20, "loaded_at": 1.5e9, "pinned": False, "leases": 0, "ranks": [8, 4], "card": None}
    _tell({**known, "versions": [{"version": "x@0"}, {"version": "x@1"}]}, as_json=False)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"2017-07-1\d \d\d:\d\d:\d\d", lines.pop("loaded_at"))
    assert lines == {"bytes": "3.0 MiB", "pinned": "no", "leases": "0", "ranks": "8, 4", "versions": "x@0, x@1"}


WORDLESS = (b"busy", b"[]", b'{"error": "busy"}', b'{"error": {}}')


@pytest.mark.parametrize("port", [b"HTTP/1.0 502 Bad Gateway\r\n\r\n" + body for body in WORDLESS], indirect=True)
def test_an_error_without_words(port: int) -> None:
    with pytest.raises(ServerError, match="the server answered 502 Bad Gateway"):
        _call(Settings(port=port), "GET", "/adapters")


def test_host_and_port_are_those_of_the_server_to_talk_to() -> None:
    shown = CliRunner().invoke(app, ["adapters", "list", "--help"], env={"COLUMNS": "200"}).output
    assert "address of the server to talk to [127.0.0.1]" in shown and "listen" not in shown
    assert "port of the server to talk to [8000]" in shown


@pytest.mark.parametrize("host", ["127..0.0.1", "a b", "ö" * 70, "a\u2100b", "a/b", "me@a", "a\0b", "[bad"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(BadSetting, match="is no name or address of a host; see --host"):
        _call(Settings(host=host, insecure=True), "GET", "/adapters")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "::1", "localhost", "0.0.0.0"])
def test_a_host_that_is_one(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with pytest.raises(ServerError, match="no server answers at http://"):
        _call(Settings(host=host, port=port, insecure=True), "GET", "/adapters")


@pytest.mark.parametrize("secret", ["ключ", "a\x07b"])
def test_a_key_that_no_header_carries(secret: str) -> None:
    with pytest.raises(BadSetting, match="the secret of 'me' has characters that headers do not carry") as e:
        _call(Settings(api_keys=SecretStr(f"me:{secret}")), "GET", "/adapters")
    assert secret not in e.value.message


@pytest.mark.parametrize("name", ["admin_keys_file", "api_keys_file"])
def test_a_file_of_keys_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for file in (tmp_path, tmp_path / "absent", tmp_path / "bytes"):
        with pytest.raises(BadSetting, match=f"{name} cannot be read"):
            _call(Settings(**{name: file}), "GET", "/adapters")


def sent(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str | None:
    """The key that a command sends."""
    asked: list[str | None] = []

    def opened(self: object, request: urllib.request.Request, timeout: float | None = None) -> None:
        asked.append(request.get_header("Authorization"))
        raise OSError("nobody is there")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", opened)
    with pytest.raises(ServerError, match="nobody is there"):
        _call(Settings(**settings), "GET", "/adapters")
    return asked[0]


def test_keys_that_the_server_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id may be in the variable and in the file, with two secrets."""
    (tmp_path / "keys").write_text("you:1\nme:new\n")
    both: dict[str, Any] = {"admin_keys": SecretStr("me:old"), "admin_keys_file": tmp_path / "keys"}
    assert Keys(Settings(**both)).admin
    assert sent(monkeypatch, **both) == "Bearer me:old"
    assert sent(monkeypatch, **both | {"admin_keys": SecretStr("")}) == "Bearer you:1"
    (tmp_path / "keys").write_text("me:1,me:2")
    with pytest.raises(BadSetting, match="admin_keys_file: the id 'me' is given twice"):
        _call(Settings(**both), "GET", "/adapters")


def checked(*arguments: object) -> tuple[dict[str, Any], str]:
    """What `check` tells of a folder, and what it ends with, if it does."""
    done = CliRunner().invoke(app, ["adapters", "check", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == bool(done.stderr)
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def own(
    tiny_folder: Path, tmp_path: Path, tiny_adapter: Callable[..., LoraWeights], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An adapter in the directory that a server over `tiny` would watch, if it ran here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMUX_MODEL", str(tiny_folder))
    save(tiny_adapter(1), tmp_path / "data" / "adapters" / "own")
    return tmp_path / "data" / "adapters" / "own"


GOOD: dict[str, Any] = {"prompt": "Mood: {input}"}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({**GOOD, "lables": ["a"]}, "a task has no field 'lables'"),
        ({"prompt": "Mood:"}, "prompt must be a text with {input} in it, once"),
        ({"prompt": "{input} {input}"}, "prompt must be a text with {input} in it, once"),
        ({**GOOD, "task": "base"}, "'base' can not be a task's name"),
        ({**GOOD, "task": "tiny"}, "'tiny' can not be a task's name"),
        ({**GOOD, "defaults": {"min_tokens": 9, "max_tokens": 3}}, "min_tokens is 9, over max_tokens"),
        ({**GOOD, "defaults": {"stop_token_ids": [1 << 30]}}, "is no token id; the vocabulary has"),
        ({**GOOD, "route": {"choice": [{"name": "own", "weight": 99}]}}, "weight"),
    ],
)
def test_a_task_that_the_server_would_not_use_is_told(own: Path, body: dict[str, Any], why: str) -> None:
    (own / "task.json").write_text(json.dumps(body))
    found, error = checked(own)
    assert found["fits"] == "tiny" and found["task"] is None and found["error"]["message"] in error
    assert "served without its task: its task.json is not used: " in error and why in error


def test_the_task_that_a_folder_brings_is_told(own: Path) -> None:
    assert checked(own)[0]["task"] is None
    (own / "task.json").write_text(json.dumps({**GOOD, "defaults": {"stop_token_ids": [1]}}))
    assert checked(own) == ({**checked(own)[0], "task": "own"}, "")
    (own / "task.json").write_text(json.dumps({**GOOD, "task": "another"}))
    assert checked(own)[0]["task"] == "another"


@pytest.mark.parametrize(("name", "why"), [("base", "reserved"), ("tiny", "reserved"), ("my own", "cannot be")])
def test_a_name_that_no_adapter_may_have(own: Path, tmp_path: Path, name: str, why: str) -> None:
    """Elsewhere than in the adapter directory a folder has yet to be given its name."""
    with pytest.raises(InvalidAdapter, match=why):
        checked(own.rename(own.parent / name))
    (tmp_path / "elsewhere").mkdir()
    (note,) = checked((own.parent / name).rename(tmp_path / "elsewhere" / name))[0]["notes"]
    assert note.startswith("another name is needed to serve it: ") and why in note


def test_a_folder_that_is_yet_to_be_named_brings_a_task_all_the_same(own: Path, tmp_path: Path) -> None:
    """Whether it is to be renamed into its place or to be uploaded."""
    (own / "task.json").write_text(json.dumps(GOOD))
    for place in (own.parent / ".new", tmp_path / "my own"):
        own = own.rename(place)
        found, error = checked(own)
        assert error == "" and found["task"] is None and "another name is needed" in found["notes"][0]
    (own / "task.json").write_text(json.dumps({**GOOD, "task": "mine"}))
    assert checked(own)[0]["task"] == "mine"


def test_a_link_is_what_the_watch_makes_of_it(own: Path, tmp_path: Path) -> None:
    (own.parent / "within").symlink_to("own")
    assert checked(own.parent / "within")[0]["version"].startswith("within@")
    shutil.move(own, tmp_path / "away")
    (own.parent / "out").symlink_to(tmp_path / "away")
    with pytest.raises(InvalidAdapter, match="leads out of the adapter directory"):
        checked(own.parent / "out")
    assert checked(tmp_path / "away")[0]["notes"] == []
    with pytest.raises(InvalidAdapter, match="leads out of the adapter directory"):
        checked("data/adapters/out", "--adapter-dir", own.parent)


def test_where_the_path_of_a_source_begins_is_told() -> None:
    shown = CliRunner().invoke(app, ["adapters", "load", "--help"], env={"COLUMNS": "200"}).output
    assert "a path from the server's adapter directory on" in shown
