"""Which records a training run learns, which it validates on, and which its result is evaluated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters import data
from adapters.data import Chat, Encode, Pair, Record, Tokens
from adapters.errors import InvalidData, TrainingStopped
from server.jobs.encoding import Template, encoder
from server.jobs.errors import JobError
from server.jobs.worker_messages import VALIDATION_PAIRS, WorkerSpec
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from server.tasks.scores import too_long

MAX_HELD_OUT = 200
MAX_EVALUATED = 1000
"""Examples of a validation file that a result is evaluated on."""
MAX_VALIDATION = 500
"""Examples of a validation file that a run validates on."""


@dataclass(frozen=True)
class Examples:
    """The data of a run.

    Attributes:
        training: What the run learns.
        validation: What the run validates on.
        records: What its result is evaluated on, as records for the engine.
        evaluation: The same as tokens.
        held_out: Number of examples held out of the training file for validation.
        left_out: Number of examples that the result cannot be evaluated on.
    """

    training: Tokens
    validation: Tokens | None = None
    records: tuple[Record, ...] = ()
    evaluation: Tokens | None = None
    held_out: int = 0
    left_out: int = 0


def prepare(spec: WorkerSpec, base: Base, stop: Callable[[], bool] = lambda: False) -> Examples:
    """Read and tokenize the files of a spec.

    Raises:
        JobError: A file is wrong; the message names the file, the line and the fault.
        TrainingStopped: `stop` returned True.
    """
    max_length = min(spec.config.max_length, base.config.context_length)
    encode_record = encoder(ModelTokenizer(base.vocabulary), Template.of(spec.template), max_length)

    def encode(record: Record) -> tuple[Sequence[int], Sequence[bool]]:
        if stop():
            raise TrainingStopped("stopped before training began")
        return encode_record(record)

    training = _File(spec.data_name, "training_file", encode, max_length)
    records = training.read(spec.data)
    # The context length of the server may change before a run resumes, so it must not change what the run validates on.
    context_length = min(max_length, spec.context_length or max_length)
    if spec.validation is not None:
        validation = _File(spec.validation_name, "validation_file", encode, max_length)
        held = validation.read(spec.validation)
        tokens, seen = training.tokens(records), validation.tokens(held[:MAX_VALIDATION])
        return Examples(tokens, seen, **validation.evaluation(held[:MAX_EVALUATED], seen, context_length))
    positions = set(held_out(records, spec.held_out))
    tokens = training.tokens([r for i, r in enumerate(records) if i not in positions])
    if not positions:
        return Examples(tokens)
    held = [records[i] for i in sorted(positions)]
    seen = training.tokens(held, f"{spec.data_name}, held out for validation")
    return Examples(tokens, seen, held_out=len(held), **training.evaluation(held, seen, context_length))


@dataclass(frozen=True)
class _File:
    """A data file of a job. Its errors become those of the job."""

    name: str
    param: str
    encode: Encode
    max_length: int

    def read(self, path: Path) -> list[Record]:
        try:
            return data.parse(path.read_bytes(), self.name)
        except OSError as error:
            message = f"{self.name} cannot be read: {error.strerror}"
            raise JobError(f"invalid_{self.param}", message, self.param) from error
        except InvalidData as error:
            raise JobError(f"invalid_{self.param}", error.message, self.param) from error

    def tokens(self, records: Sequence[Record], name: str | None = None) -> Tokens:
        with self._job_errors(name or self.name):
            return data.tokenize(records, self.encode, self.max_length, name or self.name)

    def evaluation(self, records: Sequence[Record], seen: Tokens, context_length: int) -> dict[str, Any]:
        """Fields of `Examples`. Records that are not all pairs are evaluated by loss, in the training process."""
        if not all(isinstance(record, Pair) for record in records):
            return {"records": tuple(records), "evaluation": seen, "left_out": seen.too_long}
        with self._job_errors(self.name):
            fitting = answerable(records, self.encode, context_length)
        evaluation = self.tokens(fitting) if fitting else seen
        return {"records": tuple(fitting), "evaluation": evaluation, "left_out": len(records) - len(fitting)}

    @contextmanager
    def _job_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except InvalidData as error:
            message = error.message if error.message.startswith(name) else f"{name}, {error.message}"
            raise JobError(f"invalid_{self.param}", message, self.param) from error


def answerable(records: Sequence[Record], encode: Encode, max_length: int) -> list[Record]:
    """The records that an engine can be evaluated on, because it refuses an evaluation with any other record.

    They have at most `max_length` tokens, a prompt that is not empty, and an answer that is short enough to compare.
    Raises InvalidData as `encode` does.
    """

    def fits(record: Record) -> bool:
        ids, learned = encode(record)
        return (
            len(ids) <= max_length and not all(learned) and not (isinstance(record, Pair) and too_long(record.output))
        )

    return [record for record in records if fits(record)]


def held_out(records: Sequence[Record], fraction: float) -> tuple[int, ...]:
    """Positions of the records to hold out, ascending. Empty if the fraction is less than one record.

    The choice depends on the content of the records alone, not on their order or a seed. Duplicates are held out
    together or not at all.
    """
    wanted = min(MAX_HELD_OUT, int(fraction * len(records)), len(records) - 1)
    positions: dict[bytes, list[int]] = {}
    for position, record in enumerate(records):
        positions.setdefault(hashlib.sha256(_content(record).encode()).digest(), []).append(position)
    chosen: list[int] = []
    for _, duplicates in sorted(positions.items()):
        if len(chosen) + len(duplicates) <= wanted:
            chosen += duplicates
    return tuple(sorted(chosen))


def _content(record: Record) -> str:
    """Equal for records with the same content, whatever their line or the order of keys."""
    if isinstance(record, Chat):
        record = replace(record, messages=tuple(map(_normalized, record.messages)))
    return repr(replace(record, line=0, unit=""))


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message in a fixed key order, without keys that have no effect."""
    keys = ["role", "content", *sorted(message.keys() - {"role", "content", "weight"})]
    weight = {"weight": 0} if message["role"] == "assistant" and message.get("weight", 1) == 0 else {}
    return {key: message[key] for key in keys if message[key] not in (None, [])} | weight


def write_pairs(records: Sequence[Record], folder: Path) -> None:
    """Write the evaluation records for the server, if all have an input and an output."""
    pairs = [record for record in records if isinstance(record, Pair)]
    (folder / VALIDATION_PAIRS).unlink(missing_ok=True)
    if pairs and len(pairs) == len(records):
        lines = (json.dumps({"input": pair.input, "output": pair.output}) for pair in pairs)
        (folder / VALIDATION_PAIRS).write_text("\n".join(lines), encoding="utf-8")
