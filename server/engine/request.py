"""The vocabulary of a run: what a request asks for, what it becomes, and what is delivered while it runs.

Owns no behaviour beyond simple derived values. The scheduler and its loads alone change a request's state.
"""

from __future__ import annotations

import enum
import math
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adapters.weights import BASE_MIX, LoraWeights, Mix

if TYPE_CHECKING:
    from server.model.tokenizer import Detokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. All bounds are checked by the API before this is built."""

    max_tokens: int = 64
    min_tokens: int = 0
    """Before so many an answer ends only where its constraint allows nothing else."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    """None: none wanted. k from 0 to 20: the chosen token's and the k best's."""

    @cached_property
    def is_simple(self) -> bool:
        """Whether tokens alone are wanted, by temperature and limits alone."""
        plain = self.repetition_penalty == 1.0 and self.presence_penalty == 0.0 and self.frequency_penalty == 0.0
        return plain and self.logprobs is None


class Constraint(Protocol):
    """A limit on the next token that depends on those before it. Called on the engine's thread, so it must be quick."""

    def mask(self) -> npt.NDArray[np.generic]:
        """A bit for each id, 1 if it may come next: contiguous, id i is bit i % 8 of byte i // 8."""
        ...

    def accept(self, token: int) -> None:
        """`token` has been chosen."""
        ...


class State(enum.Enum):
    """Where a request is. QUEUED -> (LOADING) -> RUNNING -> DONE; a preempted one is QUEUED again."""

    QUEUED = "queued"
    LOADING = "loading"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-softmax of the raw logits, before temperature, penalties and masks. `top` is best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delivery(NamedTuple):
    """What one step adds to a request. `text` never ends within a character or within the start of a stop string.

    The last one has `finish_reason` ("stop", "length", "cancelled", "error") and, if that is "error", `error`.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """One sequence. The API builds it, hands it to `Engine.submit`, and hears of it through `deliver`.

    `deliver` is called on the engine's thread, at most once a step, and must not block; after the last delivery the
    request has neither it nor its `constraint` any more. `scored` is the number of last prompt tokens whose
    log-probabilities are wanted (label scoring); such a request generates nothing and its one delivery carries them.
    Times are `time.monotonic()` seconds, nan until they happen.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    deliver: Callable[[Delivery], None]
    mix: Mix = BASE_MIX
    check_fits: Callable[[], None] = lambda: None
    """Raises NoRoom once the mix can never be in RAM any more, since its lease keeps nothing else from being pinned.

    Called on the engine's thread, so it must be quick.
    """
    fair_key: str = ""
    """Who shares a place in the fair queue: the task's name, else the mix's."""
    tenant: str = ""
    priority: int = 0
    """Lower goes first; evaluation traffic has 1."""
    deadline: float = math.inf
    scored: int = 0
    constraint: Constraint | None = None
    """What limits the tokens of this answer, such as a grammar."""

    # written by the engine
    state: State = State.QUEUED
    begun: Future[tuple[LoraWeights, ...]] | None = None
    """The load of its adapters, until the engine's thread has heard of the request."""
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens of prompt + output whose keys and values are in the cache."""
    cached: int = 0
    """Prompt tokens that came from the prefix cache at the first admission."""
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    """The prefix cache's names for its full blocks, as far as they have been worked out; the first is the root."""
    kept: int = 0
    """How many of its blocks have been offered to the prefix cache, or came from it."""
    slots: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """`sampling.seed`, or one that was drawn."""
    scores: list[TokenLogprob] = field(default_factory=list)
    reader: Detokenizer | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = math.nan
    load_seconds: float = 0.0
    first_token: float = math.nan
    finished: float = math.nan

    @property
    def tokens(self) -> int:
        """Length of prompt and output together."""
        return len(self.prompt) + len(self.output)

    def slice(self, start: int, stop: int) -> Sequence[int]:
        """Tokens `start` to `stop` of prompt and output together."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        return (*self.prompt[start:], *self.output[max(0, start - n) : stop - n])

    @property
    def goal(self) -> int:
        """Tokens whose keys and values have to be in the cache before there is something to deliver."""
        return len(self.prompt) + len(self.output) - (self.scored > 0)

    @property
    def first_logit(self) -> int:
        """The first position whose logits are needed, and so the most tokens that the prefix cache may spare."""
        return self.tokens - 1 - self.scored

    @property
    def most_tokens(self) -> int:
        """Tokens that the cache has to hold at the end, at most: the last one is never put in."""
        return len(self.prompt) - 1 + (0 if self.scored else self.sampling.max_tokens)
