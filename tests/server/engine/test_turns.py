"""When a process that takes turns with the engine runs, and when it stands still."""

from __future__ import annotations

import signal

import pytest

from server.engine.turns import Turns

STOP, CONT = signal.SIGSTOP, signal.SIGCONT


@pytest.fixture
def heard() -> list:
    return []


@pytest.fixture
def turns(heard: list) -> Turns:
    return Turns(share=0.25, turn=0.004, sleep=lambda seconds: heard.append(round(seconds, 6)))


def test_without_a_process_nothing_waits(turns, heard):
    turns.hold()
    turns.after(10.0)
    turns.free()
    turns.leave()
    assert heard == []


def test_it_stands_still_within_steps_and_gets_its_share_between_them(turns, heard):
    turns.join(heard.append)
    for _ in range(8):
        turns.hold()
        turns.after(0.003)  # of which a third is owed
    assert heard == [STOP, CONT, 0.004, STOP, CONT, 0.004]
    heard.clear()
    turns.hold()
    turns.free()
    turns.free()
    assert heard == [STOP, CONT]
    for _ in range(3):
        turns.hold()
        turns.after(0.003)
    assert 0.004 not in heard, "what was owed before there was nothing to run is paid"


def test_it_goes_on_when_it_leaves(turns, heard):
    turns.join(heard.append)
    turns.hold()
    turns.leave()
    turns.hold()
    turns.after(1.0)
    assert heard == [STOP, CONT]


def test_one_that_has_ended_is_no_failure(turns):
    def gone(number: int) -> None:
        raise ProcessLookupError

    turns.join(gone)
    turns.hold()
    turns.after(1.0)
    turns.leave()
