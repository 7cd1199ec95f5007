"""What quality is known of: a `MixKey` is a task, a mix with its versions and weights, and the base.

Owns how a mix is written. What is learned of one subject says nothing of another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters.weights import Choice, Version, is_nonzero
from server.tasks.inference import Generation, request_record


@dataclass(frozen=True)
class MixKey:
    """What a score is about. `mix` is canonical JSON of `[[version label, float32 weight], ...]`, sorted."""

    task: str
    mix: str
    base: str

    @staticmethod
    def of(task: str, versions: Iterable[tuple[Version, float]], base: str) -> MixKey:
        pairs = sorted([v.label, _written(w)] for v, w in versions if is_nonzero(w))
        return MixKey(task, json.dumps(pairs), base)

    @property
    def versions(self) -> list[str]:
        """Labels of the versions, without weights."""
        return [label for label, _ in json.loads(self.mix)]

    @property
    def choice(self) -> Choice:
        """Labels of the versions, with their weights."""
        return [(label, weight) for label, weight in json.loads(self.mix)]

    def uses_only(self, labels: frozenset[str]) -> bool:
        """Whether all its versions are among these. Without a look at the JSON: no label has a quote in it."""
        return labels.issuperset(self.mix.split('"')[1::2])

    def check(self) -> None:
        """Raises ValueError if the mix is none."""
        mix = json.loads(self.mix)
        pairs = isinstance(mix, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in mix)
        if not pairs or not all(isinstance(label, str) and isinstance(weight, float) for label, weight in mix):
            raise ValueError(f"{self.mix[:64]!r} is no mix")

    @property
    def label(self) -> str:
        """What people see: `name@digest`, `a@...*0.7+b@...*0.3`, or `base`. No two mixes have one label."""
        return "+".join(v if w == 1.0 else f"{v}*{w:.9g}" for v, w in self.choice) or "base"

    @property
    def adapter(self) -> str:
        """The names alone, as metrics have them."""
        return "+".join(sorted(v.partition("@")[0] for v in self.versions)) or "base"


@dataclass(frozen=True)
class AnswerRecord:
    """One answer of a task, as far as quality needs it. Latencies in seconds, nan for none.

    `routed` says whether the task's route leads to this mix, so that it is no client's own.
    """

    id: str
    subject: MixKey
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
        """The answer of a generation that has ended. Those without a task, cancelled ones and evaluation traffic are
        nobody's."""
        task = generation.target.task
        if task is None or generation.status == "cancelled" or not generation.caller.client:
            return None
        record = request_record(generation)
        return AnswerRecord(
            id=generation.id,
            subject=MixKey.of(task.name, generation.versions, base),
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


def _written(weight: float) -> float:
    """A weight as a mix has it, in float32, by the fewest digits that tell it from all others."""
    return float(str(np.float32(weight)))
