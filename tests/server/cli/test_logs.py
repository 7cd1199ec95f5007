"""The log of a server: whoever reads it slowly, or not at all, holds nobody up."""

from __future__ import annotations

import logging
import os
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
    monkeypatch.setattr(logs, "LAST_WORDS", 0.02)
    handler = Behind(pipe[1])
    log.addHandler(handler)
    log.warning("stuck")
    until(lambda: handler._lines.empty())
    for number in range(7):
        log.warning("line %d", number)
    handler.flush()
    told = "4 lines of the log are lost: whoever reads it was too slow"
    assert read(pipe[0], told.encode()) == ["stuck", "line 0", "line 1", "line 2", told]
    log.warning("after")
    assert read(pipe[0], b"after") == ["after"]


def test_lines_keep_their_order_and_are_written_when_a_flush_is_over(log: logging.Logger) -> None:
    reader, writer = os.pipe()
    handler = Behind(writer)
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


def test_a_message_that_does_not_fit_costs_itself_alone(
    pipe: tuple[int, int], log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.addHandler(Behind(pipe[1]))
    log.warning("%d", "no number")
    log.warning("the next")
    assert read(pipe[0], b"next") == ["the next"] and "no number" in capsys.readouterr().err


def test_a_terminal_that_does_not_wait_is_waited_for(pipe: tuple[int, int], log: logging.Logger) -> None:
    os.set_blocking(pipe[1], False)
    log.addHandler(Behind(pipe[1]))
    log.warning("whole")
    assert read(pipe[0], b"whole") == ["whole"]
