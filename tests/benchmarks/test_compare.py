"""The rounds of the peers: what was measured stays when one of them fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import Contestant, Job, PeerFailed, Rates, llama_peer, ratios, rounds, script_peer
from tests.benchmarks.conftest import runs
from tests.waiting import until

JOB = Job([[1, 2, 3]] * 2, ["a"] * 2, [], [-1, -1], 5)


def failing(after: int) -> Contestant:
    """Answers so many times, then no more."""
    left = iter(range(after))

    def run(job: Job) -> Rates:
        if next(left, None) is None:
            raise PeerFailed("it fell over")
        return Rates(2.0, 2.0)

    return run


def test_a_peer_that_fails_later_keeps_what_it_gave() -> None:
    heard: list[str] = []
    measured = rounds(
        JOB, {"loramux": lambda job: Rates(6.0, 8.0), "one": failing(2), "two": failing(0)}, 4, heard.append
    )
    assert [len(row.rounds) for row in measured.rows.values()] == [4, 2, 0]
    assert measured.failed == {"one": "it fell over", "two": "it fell over"}
    assert list(measured.table) == ["loramux", "one"]
    assert ratios(measured.table) == {"one": {"prefill": 3.0, "decode": 4.0}}
    assert [line for line in heard if "failed" in line] == [
        "two failed in round 1 of 4: it fell over",
        "one failed in round 3 of 4: it fell over",
    ]
    json.dumps(compare.as_json(measured.table), allow_nan=False)


def test_without_our_own_there_are_no_ratios() -> None:
    measured = rounds(JOB, {"loramux": failing(0), "one": lambda job: Rates(1.0, 1.0)}, 2, lambda line: None)
    assert ratios(measured.table) == {} and list(measured.table) == ["one"]


def test_every_second_round_is_backwards_and_medians_are_told_of_both_rates() -> None:
    asked: list[str] = []
    given = iter(Rates(prefill, 100 * prefill) for prefill in (1.0, 2.0, 30.0, 4.0, 7.0, 8.0))

    def contestant(name: str) -> Contestant:
        def run(job: Job) -> Rates:
            asked.append(name)
            return next(given)

        return run

    measured = rounds(JOB, {name: contestant(name) for name in ("loramux", "one")}, 3, lambda line: None)
    assert asked == ["loramux", "one", "one", "loramux", "loramux", "one"]
    told = compare.as_json(measured.table)
    assert told["loramux"] == {
        "prefill": 4.0,
        "decode": 400.0,
        "rounds": [{"prefill": rate, "decode": 100 * rate} for rate in (1.0, 4.0, 7.0)],
    }
    assert (told["one"]["prefill"], told["one"]["decode"]) == (8.0, 800.0)


@pytest.mark.parametrize(("requests", "context"), [(2, "16384"), (2100, "16800")])
def test_the_bench_of_llama_cpp_is_asked_for_the_job(
    monkeypatch: pytest.MonkeyPatch, requests: int, context: str
) -> None:
    asked: list[list[str]] = []

    def output(command: list[str], stdin: str) -> str:
        asked.append(command)
        return 'a line\n{"speed_pp": 9, "speed_tg": 9}\n{"speed_pp": 2, "speed_tg": 1}\n'

    monkeypatch.setattr(compare, "output", output)
    job = Job([[1, 2, 3]] * requests, ["a"] * requests, [], [-1] * requests, 5)
    assert llama_peer(Path("bench"), Path("x.gguf"), 7)(job) == Rates(2.0, 1.0), "the last line is the whole job's"
    wanted = {"-m": "x.gguf", "-c": context, "-npp": "3", "-ntg": "5", "-npl": f"{requests}", "-t": "7", "-tb": "7"}
    (command,) = asked
    assert {flag: command[command.index(flag) + 1] for flag in wanted} == wanted


def test_a_script_is_told_the_whole_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def output(command: list[str], stdin: str) -> str:
        asked.append(json.loads(stdin))
        return '{"first": [1.0], "all": [2.0]}'

    monkeypatch.setattr(compare, "output", output)
    job = Job([[1, 2], [3, 4], [5, 6]], ["a", "b", "c"], [Path("x"), Path("y")], [1, 0, -1], 5)
    assert script_peer("vllm", "python", Path("base"), 7)(job) == Rates(6.0, 12.0)
    assert asked == [
        {
            "base": "base",
            "adapters": ["x", "y"],
            "prompts": [[1, 2], [3, 4], [5, 6]],
            "texts": ["a", "b", "c"],
            "adapter_of": [1, 0, -1],
            "new_tokens": 5,
            "threads": 7,
            "repeats": 1,
        }
    ]


def test_the_bench_of_llama_cpp_is_no_contestant_with_adapters() -> None:
    named = {"llama": {"bench": "b", "gguf": "g"}, "peft": "python"}
    assert list(compare.contestants(named, Path("base"), 1, with_adapters=False)) == ["llama.cpp", "peft"]
    assert list(compare.contestants(named, Path("base"), 1, with_adapters=True)) == ["peft"]
    only_server = {"llama": {"server": "s", "gguf": "g"}}
    assert not compare.contestants(only_server, Path("base"), 1, with_adapters=False)


@pytest.mark.parametrize(
    ("end", "status"), [("exit 3", "3"), ("kill -9 $$", "-9")], ids=["with a status", "by a signal"]
)
def test_a_peer_that_ends_badly_is_told_with_its_last_words(tmp_path: Path, end: str, status: str) -> None:
    peer = tmp_path / "peer"
    peer.write_text(f"#!/bin/sh\nfor i in 1 2 3 4 5 6 7; do echo line $i >&2; done\n{end}\n")
    peer.chmod(0o755)
    with pytest.raises(PeerFailed, match=f"'peer' ended with status {status}:") as caught:
        compare.output([str(peer)], "")
    assert caught.value.message.splitlines()[1:] == [f"line {i}" for i in range(3, 8)]


def test_a_peer_that_does_not_end_has_failed_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A peer that is a script, and one with processes of its own: what they start goes on when they alone are ended."""
    pids, peer = tmp_path / "pids", tmp_path / "peer"
    peer.write_text(f"#!/bin/sh\nsleep 100 &\necho $! > {pids}\nwait\n")
    peer.chmod(0o755)
    monkeypatch.setattr(compare, "TIMEOUT", 3.0)
    with pytest.raises(PeerFailed, match="did not end within 3 s"):
        script_peer("peft", str(peer), tmp_path, 1)(JOB)
    until(lambda: not runs(int(pids.read_text())))


def test_a_peer_that_is_not_there_has_failed(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="cannot be run"):
        llama_peer(tmp_path / "none", tmp_path / "x.gguf", 1)(JOB)


NONE_AT_ALL = '{"speed_pp": 0, "speed_tg": 3, '
"""What llama.cpp's bench may say, which has no rate either."""


@pytest.mark.parametrize(
    "told",
    [
        "",
        "no JSON",
        "{}",
        '{"first": [1.0], "all": [1.0]}',
        '{"first": [], "all": []}',
        NONE_AT_ALL + '"first": [2.0], "all": [1.0]}',
        NONE_AT_ALL + '"first": [NaN], "all": [NaN]}',
        NONE_AT_ALL + '"first": [1.0], "all": [2.0], "new_tokens": [2]}',
    ],
)
def test_an_answer_that_cannot_be_read_is_a_failure(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setattr(compare, "output", lambda command, stdin: told)
    with pytest.raises(PeerFailed, match="cannot be read"):
        script_peer("peft", "python", Path("base"), 1)(JOB)
    with pytest.raises(PeerFailed, match="cannot be read"):
        llama_peer(Path("bench"), Path("x.gguf"), 1)(JOB)


def test_a_peer_that_tells_its_tokens_is_credited_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: dict[str, Any] = {"first": [2.0], "all": [4.0]}
    monkeypatch.setattr(compare, "output", lambda command, stdin: "a line\n" + json.dumps(answer))
    assert script_peer("mistralrs", "python", Path("base"), 1)(JOB) == Rates(6 / 2, 8 / 2)
    answer |= {"prompt_tokens": [10], "new_tokens": [6]}
    assert script_peer("mistralrs", "python", Path("base"), 1)(JOB) == Rates(10 / 2, 4 / 2)


def test_what_a_peer_says_need_not_be_text(tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    peer.write_bytes(
        b"#!/bin/sh\nprintf '\\304 cut off\\n' >&2\nprintf '\\304\\n{\"speed_pp\": 2, \"speed_tg\": 1}\\n'\n"
    )
    peer.chmod(0o755)
    assert llama_peer(peer, tmp_path / "x.gguf", 1)(JOB) == Rates(2.0, 1.0)
