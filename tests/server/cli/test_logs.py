"""Log lines as text and JSON, and the levels of other libraries."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from server.cli import logs


@pytest.fixture(autouse=True)
def _restore_levels() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in logs.LIBRARIES}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    logging.getLogger("a.b").warning("%s is late", "it", extra={"request_id": "gen-1"})
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "logger": "a.b", "message": "it is late", "request_id": "gen-1"}
    assert logs.is_json()


def test_exceptions_are_part_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in ("json", "text"):
        logs.configure(log_format, "info")
        try:
            raise ValueError("wrong")
        except ValueError:
            logging.getLogger("a").exception("failed")
        err = capsys.readouterr().err
        text = json.loads(err)["exception"] if log_format == "json" else err
        assert "Traceback" in text and "ValueError: wrong" in text


def test_text_lines_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    logging.getLogger("a").info("%s has %r", "a\n12:00:00 INFO ready\x1b[2J\u2028", 1)
    assert capsys.readouterr().err[9:] == "INFO a\\n12:00:00 INFO ready\\x1b[2J\\u2028 has 1\n"
    assert not logs.is_json()


def test_other_libraries_log_warnings_only() -> None:
    """Their info messages may contain signed URLs."""
    logs.configure("text", "info")
    assert not any(logging.getLogger(name).isEnabledFor(logging.INFO) for name in logs.LIBRARIES)


@pytest.mark.parametrize(("level", "shown"), [("info", "warning"), ("debug", "debug"), ("error", "error")])
def test_commands_log_warnings_by_default(level: str, shown: str) -> None:
    logs.configure_for_command("text", level)
    assert logging.getLogger().level == logging.getLevelName(shown.upper())


def test_final_error_in_the_format_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    logs.report_error("no base")
    assert json.loads(capsys.readouterr().err)["message"] == "no base"
    logs.configure("text", "info")
    logs.report_error("no base")
    assert capsys.readouterr().err == "error: no base\n"


def test_records_that_cannot_be_formatted_do_not_raise(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    logging.getLogger("a").warning("%d", "not a number")
    logging.getLogger("a").warning("next")
    assert "next" in capsys.readouterr().err
    assert sys.stderr is not None
