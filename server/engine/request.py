"""What a request contains: sampling parameters, state while it runs, and the deliveries that carry its answer."""

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
    from server.model.detokenizer import Detokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled and when an answer stops. The API validates all values before it builds this."""

    max_tokens: int = 64
    min_tokens: int = 0
    """Minimum length of an answer. A constraint that allows only an end token overrides it."""
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
    """None: no log-probabilities. k (0 to 20): those of the sampled token and of the k most likely tokens."""

    @cached_property
    def is_simple(self) -> bool:
        """Whether sampling needs no penalties and no log-probabilities."""
        no_penalty = self.repetition_penalty == 1.0 and self.presence_penalty == 0.0 and self.frequency_penalty == 0.0
        return no_penalty and self.logprobs is None


class Constraint(Protocol):
    """Restricts the next token, for example to a grammar. Runs on the engine's thread, so it must be fast."""

    def mask(self) -> npt.NDArray[np.generic]:
        """Return a contiguous bit mask of the allowed ids: id i is bit i % 8 of byte i // 8."""
        ...

    def accept(self, token: int) -> None:
        """Advance by a sampled token."""
        ...


class State(enum.Enum):
    """QUEUED -> (LOADING) -> RUNNING -> DONE. A preempted request is QUEUED again."""

    QUEUED = "queued"
    LOADING = "loading"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-softmax of the raw logits, before temperature, penalties and masks. `top` is sorted, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delivery(NamedTuple):
    """What one step adds to an answer.

    `text` contains only whole characters and never the start of a stop string. The last delivery has a
    `finish_reason` ("stop", "length", "cancelled" or "error") and, for "error", the `error`.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """One sequence. The caller builds it, passes it to `Engine.submit` and receives its answer through `deliver`.

    Only the scheduler and the adapter loader change the state. Times are `time.monotonic()` seconds, NaN until known.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    deliver: Callable[[Delivery], None]
    """Called on the engine's thread, at most once per step. Must not block."""
    mix: Mix = BASE_MIX
    check_fits: Callable[[], None] = lambda: None
    """Raises NoRoom if the mix can never be in RAM, because other adapters are pinned. Must be fast."""
    fair_key: str = ""
    """Key for fair queueing: the task's name, or the mix's."""
    tenant: str = ""
    priority: int = 0
    """Lower numbers run first. Evaluation traffic has priority 1."""
    deadline: float = math.inf
    scored: int = 0
    """Number of last prompt tokens to score (label scoring). Such a request generates nothing."""
    constraint: Constraint | None = None

    # Set by the engine.
    state: State = State.QUEUED
    prefetch: Future[tuple[LoraWeights, ...]] | None = None
    """Adapter load that `Engine.submit` has started, until the engine's thread takes it over."""
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens of prompt and output whose keys and values are in the KV cache (vLLM: num_computed_tokens)."""
    cached: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    blocks: array[int] = field(default_factory=lambda: array("i"))
    """Block table: the KV blocks of the sequence, in order."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Prefix-cache hashes computed so far: the root's, then one for each full block."""
    num_hashed_blocks: int = 0
    """How many of `blocks` are registered in the prefix cache or came from it."""
    slots: tuple[tuple[int, float], ...] = ()
    """(adapter slot, weight) pairs of the mix while the request runs."""
    seed: int = 0
    """`sampling.seed`, or a random one."""
    scores: list[TokenLogprob] = field(default_factory=list)
    detokenizer: Detokenizer | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = math.nan
    load_seconds: float = 0.0
    """Seconds spent waiting for adapters before the first admission."""
    first_token: float = math.nan
    finished: float = math.nan

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output together."""
        return len(self.prompt) + len(self.output)

    def slice(self, start: int, stop: int) -> Sequence[int]:
        """Return tokens `start` to `stop` of prompt and output together."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        return (*self.prompt[start:], *self.output[max(0, start - n) : stop - n])

    @property
    def required(self) -> int:
        """Number of tokens to compute before the next delivery."""
        return len(self.prompt) + len(self.output) - (self.scored > 0)

    @property
    def first_logit(self) -> int:
        """First position whose logits are needed. The prefix cache can skip only positions before it."""
        return self.num_tokens - 1 - self.scored

    @property
    def max_cache_tokens(self) -> int:
        """Most tokens in the KV cache at the end. The last output token is never computed."""
        return len(self.prompt) - 1 + (0 if self.scored else self.sampling.max_tokens)
