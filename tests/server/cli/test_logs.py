"""The log of a server: whoever reads it slowly, or not at all, holds nobody up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator

import pytest

from server.cli import logs
from server.cli.logs import Behind
from tests.waiting import until

PIPE = 1 << 16


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of one that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"." * PIPE)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    one = logging.Logger("a")
    yield one
    one.handlers.clear()


def behind(descriptor: int) -> Behind:
    return Behind(open(descriptor, "w", encoding="utf-8", closefd=False))


def read(reader: int, end: bytes) -> list[str]:
    """The lines up to one with `end`, without what the pipe was full of."""
    text = b""
    while end not in text or not text.endswith(b"\n"):
        text += os.read(reader, PIPE).lstrip(b".")
    return text.decode().splitlines()


def test_a_log_that_nobody_reads_holds_nobody_up(
    pipe: tuple[int, int], log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who reads on finds what came meanwhile, and how much of it there was no room for."""
    monkeypatch.setattr(logs, "MOST_LINES", 3)
    monkeypatch.setattr(logs, "PATIENCE", 0.02)
    handler = behind(pipe[1])
    log.addHandler(handler)
    log.warning("stuck")
    until(lambda: handler._waiting.empty())
    for number in range(7):
        log.warning("line %d", number)
    handler.flush()
    told = "4 lines of the log are lost: whoever reads it is too slow"
    assert read(pipe[0], told.encode()) == ["stuck", "line 0", "line 1", "line 2", told]
    log.warning("after")
    assert read(pipe[0], b"after") == ["after"]


def test_lines_that_wait_are_bounded_in_bytes_too(
    pipe: tuple[int, int], log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is longer than that is written all the same, where none waits before it."""
    monkeypatch.setattr(logs, "MOST_BYTES", 100_000)
    monkeypatch.setattr(logs, "PATIENCE", 0.02)
    handler = behind(pipe[1])
    log.addHandler(handler)
    for number in range(5):
        log.warning("%s line %d", "x" * 40_000, number)
    handler.flush()
    told = "3 lines of the log are lost: whoever reads it is too slow"
    assert [line.lstrip("x") for line in read(pipe[0], told.encode())] == [" line 0", " line 1", told]
    until(lambda: not handler._behind)
    log.warning("%s after", "x" * 200_000)
    assert len(read(pipe[0], b"after")[0]) > 200_000


def test_lines_keep_their_order_and_are_written_when_a_flush_is_over(log: logging.Logger) -> None:
    reader, writer = os.pipe()
    handler = behind(writer)
    handler.setFormatter(logs.TextLines())
    log.addHandler(handler)
    for number in range(100):
        log.info("line %d, half a pair: \ud800", number)
    handler.flush()
    lines = os.read(reader, PIPE).decode().splitlines()
    assert [line.split("line ")[1] for line in lines] == [f"{n}, half a pair: \\ud800" for n in range(100)]
    os.close(reader)
    log.info("nobody reads it any more")
    handler.flush()
    os.close(writer)


@pytest.mark.parametrize("held", ["lock", "_own"])
def test_a_flush_that_holds_a_lock_waits_for_nothing_else(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    """As the process ends, within the handler's lock, and in a signal's handler amid a line."""
    monkeypatch.setattr(logs, "PATIENCE", 60.0)
    reader, writer = os.pipe()
    log.addHandler(handler := behind(writer))
    with getattr(handler, held):
        handler._waiting.put(b"a line that waits\n")
        start = time.monotonic()
        handler.flush()
        assert time.monotonic() - start < 30
    assert os.read(reader, PIPE) == b"a line that waits\n"
    for end in (reader, writer):
        os.close(end)


def test_what_there_is_room_for_is_written_at_once(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash that follows costs no line. One that is longer than a pipe takes in one piece is the thread's."""
    reader, writer = os.pipe()
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    log.addHandler(handler := behind(writer))
    log.warning("once")
    log.warning("twice")
    assert os.read(reader, PIPE) == b"once\ntwice\n"
    for line in ("x" * 5000, "after"):
        log.warning(line)
    assert handler._waiting.qsize() == 2, "in their order"
    for end in (reader, writer):
        os.close(end)


def test_a_slow_reader_is_told_now_and_then_what_it_has_lost(
    pipe: tuple[int, int], log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no moment when no line waits."""
    monkeypatch.setattr(logs, "MOST_LINES", 2)
    monkeypatch.setattr(logs, "BETWEEN", -1.0)
    log.addHandler(handler := behind(pipe[1]))
    log.warning("stuck")
    until(lambda: handler._waiting.empty())
    for number in range(5):
        log.warning("line %d", number)
    told = "3 lines of the log are lost: whoever reads it is too slow"
    assert read(pipe[0], b"line 1") == ["stuck", told, "line 0", "line 1"]


def test_lines_have_the_encoding_of_their_stream(log: logging.Logger) -> None:
    reader, writer = os.pipe()
    with open(writer, "w", encoding="ascii") as stream:
        log.addHandler(Behind(stream))
        log.warning("na\u00efve")
    assert os.read(reader, PIPE) == b"na\\xefve\n"
    os.close(reader)


def test_a_message_that_does_not_fit_costs_itself_alone(
    pipe: tuple[int, int], log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.addHandler(behind(pipe[1]))
    log.warning("%d", "no number")
    log.warning("the next")
    assert read(pipe[0], b"next") == ["the next"] and "no number" in capsys.readouterr().err


def test_a_terminal_that_does_not_wait_is_waited_for(pipe: tuple[int, int], log: logging.Logger) -> None:
    os.set_blocking(pipe[1], False)
    log.addHandler(behind(pipe[1]))
    log.warning("whole")
    assert read(pipe[0], b"whole") == ["whole"]
