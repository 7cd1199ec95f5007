"""`MixKey` identifies a mix in quality records; `AnswerRecord` is the part of an answer that they keep."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters.weights import Choice, Version, is_nonzero
from server.tasks.generation import Generation, request_record


@dataclass(frozen=True)
class MixKey:
    """A task, a mix with its versions and weights, and the base model.

    `mix` is canonical JSON: `[[version label, float32 weight], ...]`, sorted.
    """

    task: str
    mix: str
    base: str

    @staticmethod
    def of(task: str, versions: Iterable[tuple[Version, float]], base: str) -> MixKey:
        # str() of a float32 has the fewest digits that identify it.
        pairs = sorted([v.label, float(str(np.float32(w)))] for v, w in versions if is_nonzero(w))
        return MixKey(task, json.dumps(pairs), base)

    @property
    def choice(self) -> Choice:
        """Version labels with their weights."""
        return [(label, weight) for label, weight in json.loads(self.mix)]

    @property
    def versions(self) -> list[str]:
        return [label for label, _ in self.choice]

    def uses_only(self, labels: frozenset[str]) -> bool:
        """Whether all versions are among `labels`. Avoids parsing the JSON: labels contain no quotes."""
        return labels.issuperset(self.mix.split('"')[1::2])

    @property
    def label(self) -> str:
        """The text shown to users: `name@digest`, `a@...*0.7+b@...*0.3` or `base`. Unique for each mix."""
        return "+".join(v if w == 1.0 else f"{v}*{w:.9g}" for v, w in self.choice) or "base"

    @property
    def adapter(self) -> str:
        """Adapter names without versions, as in metrics."""
        return "+".join(sorted(v.partition("@")[0] for v in self.versions)) or "base"


@dataclass(frozen=True)
class AnswerRecord:
    """One answer of a task. Latencies are in seconds, nan if there is none.

    `routed` is False if a client chose a mix that the task's route does not allow.
    """

    id: str
    key: MixKey
    tenant: str
    text: str
    failed: bool = False
    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft: float = float("nan")
    tpot: float = float("nan")
    e2e: float = float("nan")
    routed: bool = True
    at: float = field(default_factory=time.time)

    @staticmethod
    def from_generation(generation: Generation, base: str) -> AnswerRecord | None:
        """The record of a finished generation. None without a task, for cancelled ones and for evaluation traffic."""
        task = generation.target.task
        if task is None or generation.status == "cancelled" or not generation.caller.client:
            return None
        record = request_record(generation)
        return AnswerRecord(
            id=generation.id,
            key=MixKey.of(task.name, generation.versions, base),
            tenant=generation.caller.tenant,
            text=generation.answer_text() if generation.status == "200" else "",
            failed=generation.status != "200",
            prompt_tokens=record.prompt_tokens,
            generated_tokens=record.generated_tokens,
            ttft=record.first_token - record.submitted,
            tpot=record.tpot,
            e2e=record.finished - record.submitted,
            routed=task.route.allows(generation.target.choice),
        )


def adapters_json(versions: Iterable[tuple[Version, float]]) -> list[dict[str, Any]]:
    """The `adapters` of an answer, in the order of the request."""
    return [{"name": v.name, "version": v.label, "weight": weight} for v, weight in versions]
