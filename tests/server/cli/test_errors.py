"""How commands end that fail: one line, JSON where it is asked for, and a status; never a traceback."""

from __future__ import annotations

import asyncio
import errno
import importlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import adapters
from server.cli import generate, main
from server.cli.options import LEFT_OUT
from server.engine.grammar import _begin
from server.kernels.threads import run_in_thread
from server.model.loader import Base
from server.tasks.inference import Generation
from tests.waiting import until

APART = importlib.import_module("server.cli.main").APART
LIBRARY = Path(adapters.__path__[0]) / "library"

Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("pull", "x")` is the status of `loramux pull x`, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
        with pytest.raises(SystemExit) as e:
            main()
        printed = capsys.readouterr()
        return e.value.code, printed.out, printed.err

    return call


def wanting_memory() -> RuntimeError:
    """What torch raises where more is asked for than the system gives."""
    with pytest.raises(RuntimeError) as told:
        torch.empty(10**14)
    return told.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a file cannot be written: no space left on the disk"),
        (OSError(errno.ENOSPC, "No space", "/a/b"), "/a/b cannot be written: no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x cannot be read or written: Permission denied"),
        (TimeoutError(), "TimeoutError"),
        (MemoryError("Unable to allocate 1 GiB"), "out of memory: Unable to allocate 1 GiB"),
        (wanting_memory(), "out of memory: an allocation of 400,000.0 GB failed"),
        (SafetensorError("header is odd"), "a file of tensors cannot be read or written: header is odd"),
        (
            RuntimeError("can't start new thread"),
            "the system lets this process have no more threads; raise its limits (ulimit -u and -v)",
        ),
    ],
)
def test_what_the_system_refuses(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("server.sources.resolve_model", refused)
    assert run("pull") == (1, "", f"error: {message}\n")
    status, out, err = run("pull", "--json")
    told = {"error": {"message": message, "type": type(error).__name__, "param": None}}
    assert (status, json.loads(out), err) == (1, told, f"error: {message}\n")


def test_a_target_that_cannot_be_written(run: Run, tiny_folder: Path) -> None:
    for target in ("/proc/q", str(tiny_folder / "config.json" / "q"), "x" * 300):
        status, out, err = run("quantize", str(tiny_folder), target, "--group-size", "32", "--json")
        assert status == 1 and f"error: {target} cannot be written: " in err and "Traceback" not in err
        assert json.loads(out)["error"]["param"] == "target"


def test_usage_errors_as_json(run: Run) -> None:
    for arguments, said in ((["quantize"], "Missing argument"), (["pull", "--nope"], "--nope"), (["nope"], "nope")):
        status, out, err = run(*arguments)
        assert status == 2 and out == "" and said in err
        status, out, again = run(*arguments, "--json")
        assert status == 2 and said in json.loads(out)["error"]["message"] and said in again


@pytest.mark.parametrize("model", ["~nouser/x.gguf", "x" * 300, "a/" + "x" * 300 + ".gguf", "~nouser"])
def test_a_model_that_is_no_path(run: Run, model: str) -> None:
    status, _, err = run("pull", model)
    assert status == 1 and err.startswith("error: the model ") and err.count("\n") == 1


def test_a_size_of_many_digits(run: Run) -> None:
    status, _, err = run("doctor", "--adapter-ram", "9" * 400)
    assert status == 1 and err.startswith("error: adapter_ram ") and "between 0 and 8 EiB" in err


@pytest.mark.parametrize("prompt", ["-", "caf\udce9"])
def test_a_prompt_that_is_no_text(run: Run, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("the base is loaded before what is wrong is said")

    monkeypatch.setattr(generate, "open_base", never)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    status, out, err = run("generate", prompt, "--json")
    assert (status, err) == (1, "error: the prompt is no UTF-8 text\n")
    assert json.loads(out)["error"] == {"message": "the prompt is no UTF-8 text", "type": "InvalidRequest",
                                        "param": "prompt"}  # fmt: skip


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [
        ("é\r\nß\n".encode(), "é\nß"),  # as `echo` ends it
        (b"a\n\n", "a\n"),
        (b"a", "a"),
        (b"\xef\xbb\xbfa\r\n", "a"),  # as some editors and shells begin it
    ],
)
def test_a_prompt_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch, piped: bytes, prompt: str) -> None:
    said: list[Any] = []

    async def answer(settings: object, base: object, prompt: str, *_: object, **__: object) -> dict[str, Any]:
        said.append(prompt)
        return {}

    monkeypatch.setattr(generate, "open_base", lambda *_, **__: None)
    monkeypatch.setattr(generate, "_answer", answer)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="ascii"))
    assert run("generate", "-")[0] == 0 and said == [prompt]


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: str) -> None:
    """What a parent leaves out is nothing to fall over."""
    check = ("adapters", "check", str(LIBRARY / "sentiment"), "--state-dir", str(tmp_path), "--json")
    monkeypatch.setattr(sys, closed, None)
    status, out, err = run(*check)
    assert (status, err) == (0, "") and (closed == "stdout" or json.loads(out)["ranks"] == [8])
    with getattr(sys, closed) as stands_in:
        assert stands_in.name == os.devnull


def test_an_answer_that_a_full_disk_or_a_locale_does_not_take(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = ("adapters", "check", str(LIBRARY / "sentiment"), "--state-dir", str(tmp_path), "--json")

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert run(*check) == (1, "", "error: a file cannot be written: no space left on the disk\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(generate, "open_base", lambda *_, **__: sys.stdout.write("é"))

    async def answer(*_: object, **__: object) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(generate, "_answer", answer)
    assert run("generate", "x")[0] == 0


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_a_command_takes_its_folder_with_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupts: Any, number: signal.Signals
) -> None:
    async def answer(*_: object, **__: object) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=tmp_path, prefix="own-"):
            signal.raise_signal(number)
            await asyncio.sleep(60)
        raise AssertionError("it went on")

    monkeypatch.setattr(generate, "open_base", lambda *_, **__: None)
    monkeypatch.setattr(generate, "_answer", answer)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, interrupts)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert run("generate", "x") == (130, "", "interrupted\n")
        status, out, err = run("generate", "x", "--json")
        told = {"message": "interrupted", "type": "Interrupted", "param": None}
        assert (status, json.loads(out), err) == (130, {"error": told}, "interrupted\n")
        assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        for each in (signal.SIGHUP, signal.SIGINT):
            signal.signal(each, handlers[each])
    assert not list(tmp_path.glob("own-*"))


def test_ctrl_c_while_a_base_is_fetched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.sources.resolve_model", interrupted)
    for command in (("pull",), ("quantize", "x", "y")):
        assert run(*command) == (130, "", "interrupted\n")
        status, out, err = run(*command, "--json")
        assert (status, json.loads(out)["error"]["message"], err) == (130, "interrupted", "interrupted\n")


def test_an_answer_that_is_cut_short_ends_its_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Base
) -> None:
    async def steps(self: Generation) -> Any:
        yield [(0, SimpleNamespace(text="Once upon"))]
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "open_base", lambda *_, **__: tiny_base)
    monkeypatch.setattr(Generation, "steps", steps)
    status, out, err = run("generate", "x", "--library", "none", "--state-dir", str(tmp_path))
    assert (status, out, err) == (130, "Once upon\n", "interrupted\n")


def test_what_gives_fewer_threads_than_were_asked_for_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ("adapters", "check", str(LIBRARY / "sentiment"))
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    status, _, err = run(*check)
    assert status == 0 and err == f"{LEFT_OUT % 'OMP_THREAD_LIMIT'}\n"
    assert "OMP_THREAD_LIMIT" not in os.environ, "nor do jobs get it"
    assert run(*check)[2] == ""


@pytest.mark.parametrize(("form", "start"), [("json", '{"time": '), ("text", "error: ")])
def test_an_error_is_told_in_the_form_of_the_log(
    run: Run, monkeypatch: pytest.MonkeyPatch, form: str, start: str
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise MemoryError

    handlers = logging.getLogger().handlers[:]
    monkeypatch.setenv("LORAMUX_LOG_FORMAT", form)
    monkeypatch.setattr(generate, "open_base", lost)
    try:
        status, _, err = run("generate", "x")
    finally:
        logging.getLogger().handlers[:] = handlers
    assert status == 1 and err.startswith(start) and err.count("out of memory") == err.count("\n") == 1


@pytest.mark.parametrize("begin", [run_in_thread, _begin])
def test_an_interpreter_does_not_end_while_a_thread_is_within_a_library(
    run: Run, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Callable[[], object]], object]
) -> None:
    """Python would end that thread, and by that the process, with a signal: Ctrl-C while a base is packed, or the end
    of a server while a schema is compiled."""
    ended: list[int | str] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("server.cli.logs.flush", lambda: ended.append("its log is written"))
    over = threading.Event()
    waiting = threading.Thread(target=begin, args=(over.wait,))
    waiting.start()
    try:
        until(lambda: any(thread.name in APART for thread in threading.enumerate()))
        assert run("--version")[0] == 0 and ended == ["its log is written", 0]
    finally:
        over.set()
        waiting.join()
    until(lambda: not any(thread.name in APART for thread in threading.enumerate()))
    assert run("--version")[0] == 0 and ended == ["its log is written", 0], "without such a thread it ends as ever"
