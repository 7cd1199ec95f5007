"""The training process: how it reports errors, resumes on another day, and what it does when its server has ended."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.jobs import worker
from server.jobs.training_data import prepare
from server.jobs.worker_messages import WorkerSpec
from server.model import chat_template
from server.model.chat_template import template_time
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from tests.server.jobs.conftest import CONFIG


def run(folder: Path, stop_at: int = 0) -> list[dict[str, Any]]:
    """The messages of a run in this process. It is asked to stop after a step."""
    messages: list[dict[str, Any]] = []
    stop = threading.Event()

    def send(message: dict[str, Any]) -> None:
        messages.append(message)
        if message["kind"] == "step" and message["step"] == stop_at:
            stop.set()

    worker.run(folder, send, stop)
    return messages


def test_a_spec_is_read_as_it_was_written(spec: WorkerSpec, tmp_path: Path) -> None:
    whole = replace(
        spec,
        gpu_share={"memory": 1, "base": None},
        init=tmp_path,
        task={"task": "x"},
        config=replace(CONFIG, lora_rank_of={"a": 1}),
    )
    whole.write(tmp_path)
    assert WorkerSpec.read(tmp_path) == whole


@pytest.fixture
def time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def move(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


def test_a_run_with_a_date_in_its_template_resumes_on_another_day_and_in_another_time_zone(
    spec: WorkerSpec,
    tiny_base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    time_zone: Callable[[str], None],
) -> None:
    time_zone("HERE0")
    dated = "Today is {{ strftime_now('%d %b %Y') }}\n" + str(tiny_base.vocabulary.chat_template)
    base = replace(tiny_base, vocabulary=replace(tiny_base.vocabulary, chat_template=dated))
    monkeypatch.setattr(worker, "_load_base", lambda spec: base)
    created = datetime(2030, 5, 4, 12, tzinfo=UTC).timestamp()
    replace(spec, created_at=created, held_out=0.2).write(tmp_path)
    with template_time(created):
        assert "04 May 2030" in ModelTokenizer(base.vocabulary).decode(prepare(spec, base).training.examples[0].ids)
    assert run(tmp_path, stop_at=2)[-1]["kind"] == "stopped"

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2031, 1, 2)

    monkeypatch.setattr(chat_template, "datetime", Tomorrow)
    time_zone("ELSEWHERE-14")
    messages = run(tmp_path)
    assert [m["step"] for m in messages if m["kind"] == "step"] == [3, 4] and messages[-1]["kind"] == "trained"
    assert "02 Jan 2031" in ModelTokenizer(base.vocabulary).decode(prepare(spec, base).training.examples[0].ids)


def test_errors_become_the_last_message(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/a/secret/file")

    monkeypatch.setattr(worker, "_load_base", lambda spec: tiny_base)
    spec.write(tmp_path)
    for name in ("server.jobs.fine_tune.write_pairs", "adapters.atomic_files.open"):  # the latter for a checkpoint
        with monkeypatch.context() as patch:
            patch.setattr(name, full, raising=False)
            end = run(tmp_path)[-1]
        assert (end["kind"], end["code"]) == ("failed", "failed")
        assert "No space left on device" in end["message"] and "secret" not in end["message"]
    replace(spec, config=replace(CONFIG, target_modules=("nothing",))).write(tmp_path)
    end = run(tmp_path)[-1]
    assert end["kind"] == "failed" and end["code"] == "invalid_settings" and "target_modules" in end["message"]


@contextlib.contextmanager
def broken_pipe() -> Iterator[Any]:
    """A stream to a server that has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as stream:
        yield stream


def test_progress_that_a_server_did_not_hear_is_sent_to_the_next(tmp_path: Path) -> None:
    unsent, heard = tmp_path / "unsent", io.StringIO()
    with broken_pipe() as gone:
        send = worker.sender(gone, unsent)
        for message in ({"kind": "step", "step": 6}, {"kind": "checkpoint", "step": 6}, {"kind": "stopped"}):
            send(message)
    with unsent.open("a") as truncated:
        truncated.write('{"kind": "st')
    with broken_pipe() as gone:  # the next server ends too
        worker.resend(unsent, worker.sender(gone, unsent))
    for _ in range(2):
        worker.resend(unsent, worker.sender(heard, unsent))
    sent = [json.loads(line) for line in heard.getvalue().splitlines()]
    assert sent == [{"kind": "step", "step": 6}, {"kind": "checkpoint", "step": 6}]


def test_a_process_waits_for_the_one_of_an_earlier_server(tmp_path: Path) -> None:
    def locked(stop: threading.Event) -> bool:
        with worker.lock_folder(tmp_path, stop) as held:
            return held

    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        with (tmp_path / worker.LOCK).open("w") as earlier:
            fcntl.flock(earlier, fcntl.LOCK_EX)
            waiting, stopped = pool.submit(locked, threading.Event()), pool.submit(locked, stop)
            stop.set()
            assert stopped.result(10) is False
            assert not waiting.done()
        assert waiting.result(10) is True


def test_a_signal_ends_the_wait_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler runs on the waiting thread, which must not hold the lock of the event."""
    stop = threading.Event()
    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=lambda seconds: signal.raise_signal(signal.SIGTERM)))
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        with (tmp_path / worker.LOCK).open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with worker.lock_folder(tmp_path, stop) as held:
                assert not held
    finally:
        signal.signal(signal.SIGTERM, before)
