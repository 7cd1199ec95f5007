"""How commands end: one error line, JSON on request, exit status; never a traceback."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import adapters
from server.cli import generate, main
from server.cli.options import IGNORED_VARIABLE
from server.model.loader import Base
from server.tasks.generation import Generation

LIBRARY = Path(adapters.__path__[0]) / "library"

Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("pull", "x")` gives the exit status, stdout and stderr of `loramux pull x`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
        with pytest.raises(SystemExit) as e:
            main()
        printed = capsys.readouterr()
        return e.value.code, printed.out, printed.err

    return call


def out_of_memory() -> RuntimeError:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    return error.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "A file cannot be written: no space left on the disk"),
        (OSError(errno.ENOSPC, "No space", "/a/b"), "/a/b cannot be written: no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x cannot be read or written: Permission denied"),
        (TimeoutError(), "TimeoutError"),
        (MemoryError("Unable to allocate 1 GiB"), "memory"),
        (out_of_memory(), "memory"),
        (SafetensorError("header is odd"), "A safetensors file cannot be read or written: header is odd"),
        (RuntimeError("can't start new thread"), "The system does not allow more threads"),
    ],
)
def test_system_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("server.sources.resolve_model", refused)
    status, out, err = run("pull")
    assert (status, out) == (1, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
    status, out, again = run("pull", "--json")
    body = {"message": err.removeprefix("error: ").rstrip("\n"), "type": type(error).__name__, "param": None}
    assert (status, json.loads(out), again) == (1, {"error": body}, err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--host", "0.0.0.0"], "host"),
        (["serve", "--kv-cache", "lots"], "kv_cache"),
        (["pull", "no-such-model"], "no-such-model"),
        (["pull", ""], "model"),
        (["pull", "~nouser/x.gguf"], "model"),
        (["quantize", "no-such-model", "out"], "no-such-model"),
        (["adapters", "check", "."], ""),
        (["adapters", "list", "--port", "9"], "No server answers at http://127.0.0.1:9"),
        (["adapters", "list", "--host", "192.0.2.1.invalid"], "No server answers at http://192.0.2.1.invalid"),
        (["bench", "load", "http://127.0.0.1:9", "--model", "x", "--requests", "2"], "of 2 requests"),
        (["prune", "a", "--output=~nobody-at-all/x"], "~nobody-at-all/x"),
        (["doctor", "--adapter-ram", "9" * 400], "adapter_ram"),
    ],
)
def test_user_errors_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_errors_as_json_have_type_and_param(run: Run, tiny_folder: Path) -> None:
    error = json.loads(run("pull", "no-such-model", "--json")[1])["error"]
    assert error["type"] == "BadModel" and error["param"] == "model"
    for target in ("/proc/q", str(tiny_folder / "config.json" / "q")):
        status, out, _ = run("quantize", str(tiny_folder), target, "--group-size", "32", "--json")
        assert status == 1 and json.loads(out)["error"]["param"] == "target"


def test_usage_errors(run: Run) -> None:
    for arguments, message in ((["quantize"], "Missing argument"), (["pull", "--nope"], "--nope"), (["nope"], "nope")):
        status, out, err = run(*arguments)
        assert status == 2 and out == "" and message in err
        status, out, err = run(*arguments, "--json")
        assert status == 2 and message in json.loads(out)["error"]["message"] and message in err


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"{metadata.version('loramux')}\n", "")


@pytest.mark.parametrize("prompt", ["-", "caf\udce9"])
def test_prompt_must_be_utf8(run: Run, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    monkeypatch.setattr(generate, "load_model", lambda *_, **__: pytest.fail("the base is loaded"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    status, out, err = run("generate", prompt, "--json")
    assert (status, err) == (1, "error: The prompt is not valid UTF-8.\n")
    assert json.loads(out)["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [("é\r\nß\n".encode(), "é\nß"), (b"a\n\n", "a\n"), (b"a", "a"), (b"\xef\xbb\xbfa\r\n", "a")],
)
def test_prompt_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch, piped: bytes, prompt: str) -> None:
    prompts: list[Any] = []

    async def answer(settings: object, base: object, prompt: str, *_: object, **__: object) -> dict[str, Any]:
        prompts.append(prompt)
        return {}

    monkeypatch.setattr(generate, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(generate, "_answer", answer)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="ascii"))
    assert run("generate", "-")[0] == 0 and prompts == [prompt]


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_closed_standard_streams(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: str) -> None:
    monkeypatch.setattr(sys, closed, None)
    status, out, err = run("adapters", "check", str(LIBRARY / "sentiment"), "--state-dir", str(tmp_path), "--json")
    assert (status, err) == (0, "") and (closed == "stdout" or json.loads(out)["ranks"] == [8])
    with getattr(sys, closed) as replacement:
        assert replacement.name == os.devnull


def test_output_that_stdout_cannot_encode(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    (tmp_path / "ö.gguf").touch()
    assert run("pull", str(tmp_path / "ö.gguf"))[0] == 0
    sys.stdout.flush()
    assert b"\\xf6.gguf" in written.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_and_remove_its_temporary_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    async def answer(*_: object, **__: object) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="own-", dir=tmp_path):
            signal.raise_signal(number)
            await asyncio.sleep(60)
        raise AssertionError("the command was not interrupted")

    monkeypatch.setattr(generate, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(generate, "_answer", answer)
    previous = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        assert run("generate", "x") == (130, "", "interrupted\n")
        status, out, err = run("generate", "x", "--json")
        assert (status, err) == (130, "interrupted\n")
        assert json.loads(out) == {"error": {"message": "interrupted", "type": "Interrupted", "param": None}}
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    assert not list(tmp_path.glob("own-*"))


def test_interrupted_answer_ends_with_a_newline(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Base
) -> None:
    async def steps(self: Generation) -> Any:
        yield [(0, SimpleNamespace(text="Once upon"))]
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_model", lambda *_, **__: tiny_base)
    monkeypatch.setattr(Generation, "steps", steps)
    result = run("generate", "x", "--library", "none", "--state-dir", str(tmp_path))
    assert result == (130, "Once upon\n", "interrupted\n")


def test_variables_that_limit_threads_are_ignored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    check = ("adapters", "check", str(LIBRARY / "sentiment"))
    status, _, err = run(*check)
    assert status == 0 and err == f"{IGNORED_VARIABLE % 'OMP_THREAD_LIMIT'}\n"
    assert "OMP_THREAD_LIMIT" not in os.environ
    assert run(*check)[2] == ""


@pytest.mark.parametrize(("log_format", "start"), [("json", '{"'), ("text", "error: ")])
def test_errors_follow_the_log_format(run: Run, monkeypatch: pytest.MonkeyPatch, log_format: str, start: str) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    handlers = logging.getLogger().handlers[:]
    monkeypatch.setenv("LORAMUX_LOG_FORMAT", log_format)
    monkeypatch.setattr(generate, "load_model", out_of_memory)
    try:
        status, _, err = run("generate", "x")
    finally:
        logging.getLogger().handlers[:] = handlers
    assert status == 1 and err.startswith(start) and err.count("\n") == 1 and "memory" in err


def test_exit_while_a_library_thread_is_running(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would abort the process at a normal exit."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="loramux-grammar")
    thread.start()
    try:
        assert run("--version")[0] == 0 and statuses == [0]
    finally:
        done.set()
        thread.join()
    assert run("--version")[0] == 0 and statuses == [0]
