"""From logits to tokens: greedy, sampled, penalized, constrained; and the log-probabilities that are told.

Each row is treated alone, in buffers of one alignment, and its noise is a function of (seed, index of the token): what
a request draws does not depend on the batch. Knows nothing of blocks, slots or text.

The order is: raw logits -> log-probabilities that are told -> penalties -> masks -> temperature -> top_k -> top_p ->
min_p -> one uniform number against the distribution's sum over ids, ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from server.engine.batch import Logits, ScheduledRequest
from server.engine.request import Request, Sampling, TokenLogprob
from server.errors import InvalidRequest, NotFinite

Row = npt.NDArray[np.float32]


class DeviceSamples(Protocol):
    """Tokens that a runner has been told to draw."""

    def read(self) -> npt.NDArray[np.int32]:
        """int32 [L], -1 for a row that is not finite. Waits for a device."""


class DrawnLargest(NamedTuple):
    """The largest of each row, of a runner that finds it with the step."""

    logits: Logits

    def read(self) -> npt.NDArray[np.int32]:
        return self.logits.largest.astype(np.int32)


DeviceSampler = Callable[[Logits, npt.NDArray[np.float32], npt.NDArray[np.int32]], DeviceSamples]
"""Of a step's logits where the runner has them, a float32 [L, 4] of temperature (0: the largest), top_p, min_p and
noise, and an int32 [L] of top_k: the tokens, without waiting for them."""

_STRIDE = 256
"""Ids whose probabilities are summed before the sums are: the draw then looks into one stretch alone."""

_TINY = float(np.finfo(np.float32).tiny)
"""Temperatures below it are 0: no logit can be divided by them in float32."""
_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
"""The most noise of float32, to which that of 53 bits above it is not rounded: 1 would be no share of anything."""


class SampledToken(NamedTuple):
    """What one row of logits came to: a token, its log-probability if wanted, or the error that ends the request."""

    token: int
    logprob: TokenLogprob | None = None
    error: Exception | None = None


class Sampler:
    """Picks tokens for `vocab` ids. `eos_ids` are masked while a request is under its min_tokens.

    Where a constraint allows nothing but an end, min_tokens is lifted and the answer ends.
    With `draw`, rows that want no more than a token are drawn by the runner, and only the others come here.
    """

    def __init__(self, vocab: int, eos_ids: frozenset[int], draw: DeviceSampler | None = None) -> None:
        self._draw_there = draw
        self._eos = np.asarray(sorted(eos_ids), np.int64)
        self._row = np.empty(vocab, np.float32)
        self._weights = np.zeros(-(-vocab // _STRIDE) * _STRIDE, np.float32)

    def pick(self, logits: Logits, work: Sequence[ScheduledRequest]) -> list[SampledToken]:
        """One pick for each row of `logits`, whose rows are those that `work` asks for, in order."""
        if self._draw_there is not None:
            return self._pick_there(logits, work, self._draw_there)
        return self._pick_here(logits, work)

    def _pick_here(self, logits: Logits, work: Sequence[ScheduledRequest]) -> list[SampledToken]:
        greedy = [SampledToken(token) if token >= 0 else _not_finite() for token in logits.largest.tolist()]
        if all(item.logits == 0 or is_plain(item.request) for item in work):
            return greedy
        rows = logits.rows.numpy(force=True)
        picks: list[SampledToken] = []
        for item in work:
            for i in range(item.logits):
                row = len(picks)
                picks.append(greedy[row] if is_plain(item.request) else self._pick_row(rows[row], item.request, i))
        return picks

    def ahead(self, logits: Logits, work: Sequence[ScheduledRequest]) -> DeviceSamples | None:
        """The tokens of a step, drawn on the device while others go on; None if a row wants more than a token."""
        asked = [item for item in work if item.logits]
        if self._draw_there is None or not all(is_simple(item.request) for item in asked):
            return None
        return self._ask(logits, asked, self._draw_there)

    def _pick_there(self, logits: Logits, work: Sequence[ScheduledRequest], draw: DeviceSampler) -> list[SampledToken]:
        asked = [item for item in work if item.logits]
        if not any(_is_to_draw(item.request, logits) for item in asked):
            # both what is largest and the rows are looked at
            return self._pick_here(logits if logits.knows_largest else Logits(logits.rows.cpu()), work)
        tokens = self._ask(logits, asked, draw).read()
        picks: list[SampledToken] = []
        for item in asked:
            row = len(picks)
            if is_simple(item.request):
                picks += drawn_picks(tokens[row : row + 1])
            else:
                picks += self._pick_here(logits.part(row, row + item.logits), [item])
        return picks

    @staticmethod
    def _ask(logits: Logits, asked: Sequence[ScheduledRequest], draw: DeviceSampler) -> DeviceSamples:
        """Have the rows of simple requests drawn as they want it; the largest of the others, for nobody."""
        rows = 0
        drawn: list[tuple[int, Request]] = []
        for request, _, count in asked:
            if request.sampling.temperature >= _TINY and is_simple(request):
                drawn.append((rows, request))
            rows += count
        if logits.knows_largest and not drawn:
            return DrawnLargest(logits)
        how, top_k = np.zeros((rows, 4), np.float32), np.zeros(rows, np.int32)
        for row, request in drawn:
            sampling = request.sampling
            how[row] = sampling.temperature, sampling.top_p, sampling.min_p, _noise(request)
            top_k[row] = sampling.top_k
        return draw(logits, how, top_k)

    def _pick_row(self, raw: Row, request: Request, i: int) -> SampledToken:
        if not np.isfinite(raw).all():
            return _not_finite()
        if request.scored:
            return self._score(raw, request, i)
        try:
            token = self._choose(raw, request)
        except InvalidRequest as e:
            return SampledToken(-1, error=e)
        k = request.sampling.logprobs
        return SampledToken(token, None if k is None else token_logprob(self._copy(raw), token, k))

    def _score(self, raw: Row, request: Request, i: int) -> SampledToken:
        token = request.prompt[len(request.prompt) - request.scored + len(request.scores) + i]
        return SampledToken(token, token_logprob(self._copy(raw), token, request.sampling.logprobs or 0))

    def _copy(self, raw: Row) -> Row:
        np.copyto(self._row, raw)
        return self._row

    def _choose(self, raw: Row, request: Request) -> int:
        sampling = request.sampling
        row = self._copy(raw)
        penalize(row, request)
        if request.constraint is not None:
            allowed = np.unpackbits(request.constraint.mask().view(np.uint8), count=len(row), bitorder="little")
            row[allowed == 0] = -np.inf
        if len(request.output) < sampling.min_tokens:
            ends = [*self._eos, *sampling.stop_token_ids]
            kept = row[ends]
            row[ends] = -np.inf
            if request.constraint is not None and row.max() == -np.inf:
                row[ends] = kept  # a token that would stop the answer later on is none of its ends yet
                if row[[*self._eos]].max(initial=-np.inf) > -np.inf:  # it is whole: nothing can follow but the end
                    request.sampling = replace(sampling, min_tokens=0)
        best = int(row.argmax())
        if row[best] == -np.inf:
            raise InvalidRequest("no token is allowed here: the limits on this answer contradict each other")
        if sampling.temperature < _TINY:
            return best
        return self._draw(row, row[best], sampling, _noise(request))

    def _draw(self, row: Row, best: np.float32, sampling: Sampling, u: float) -> int:
        """The id at which the summed probabilities pass `u`."""
        weights = self._weights[: len(row)]
        np.subtract(row, best, out=weights)
        # a temperature that is very low makes -inf of all but the best, which is what is meant
        with np.errstate(over="ignore"):
            np.divide(weights, np.float32(sampling.temperature), out=weights)
        np.exp(weights, out=weights)
        if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
            ids = _candidates(weights, sampling)
            sums = np.cumsum(weights[ids], dtype=np.float64)
            return int(ids[min(int(np.searchsorted(sums, u * sums[-1], side="right")), len(ids) - 1)])
        stretches = np.cumsum(self._weights.reshape(-1, _STRIDE).sum(1), dtype=np.float64)
        goal = u * stretches[-1]
        stretch = min(int(np.searchsorted(stretches, goal, side="right")), len(stretches) - 1)
        inside = np.cumsum(self._weights[stretch * _STRIDE : (stretch + 1) * _STRIDE], dtype=np.float64)
        inside += stretches[stretch - 1] if stretch else 0.0
        at = int(np.searchsorted(inside, goal, side="right"))
        if at == _STRIDE:  # the two ways to sum round differently: take the last that has a chance
            at = int(np.searchsorted(inside, inside[-1], side="left"))
        return stretch * _STRIDE + at


def drawn_picks(tokens: npt.NDArray[np.int32]) -> list[SampledToken]:
    """What a device has drawn, as picks."""
    return [SampledToken(token) if token >= 0 else _not_finite() for token in tokens.tolist()]


def _is_to_draw(request: Request, logits: Logits) -> bool:
    """Whether the runner has still to find the request's token, and can."""
    return is_simple(request) and not (logits.knows_largest and is_plain(request))


def is_plain(request: Request) -> bool:
    """Whether nothing but the largest logit is wanted now."""
    return request.sampling.temperature < _TINY and is_simple(request)


def is_simple(request: Request) -> bool:
    """Whether nothing but a token is wanted now, by temperature and limits alone."""
    s = request.sampling
    return s.is_simple and request.scored == 0 and request.constraint is None and len(request.output) >= s.min_tokens


def _noise(request: Request) -> float:
    """What the request's next token is drawn by: a number of float32, as runners take it. So a request draws the same
    here as there, whatever else is wanted of its rows."""
    return float(np.float32(min(uniform(request.seed, len(request.output)), _BELOW_ONE)))


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) of 53 bits that is a function of the seed and the token's index alone (Philox)."""
    raw = np.random.Philox(key=seed & (2**64 - 1), counter=[index, 0, 0, 0]).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def penalize(row: Row, request: Request) -> None:
    """Apply the penalties in place: repetition counts prompt and output, presence and frequency the output alone."""
    s = request.sampling
    if s.repetition_penalty != 1.0:
        seen = np.fromiter({*request.prompt, *request.output}, np.int64)  # half the time of sorting them
        values, factor = row[seen], np.float32(s.repetition_penalty)
        row[seen] = np.where(values > 0, values / factor, values * factor)
    if (s.presence_penalty or s.frequency_penalty) and request.output:
        ids, counts = np.unique(np.asarray(request.output, np.int64), return_counts=True)
        row[ids] -= np.float32(s.presence_penalty) + np.float32(s.frequency_penalty) * counts.astype(np.float32)


def token_logprob(row: Row, token: int, k: int) -> TokenLogprob:
    """The natural log-softmax of `row` at `token` and at its `k` largest, best first, lower ids first among equals."""
    top = row.max()
    total = float(top) + float(np.log(np.exp(row - top).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if k:
        ids = _largest(row, k)
        best = tuple((int(i), float(row[i]) - total) for i in ids)
    return TokenLogprob(token, float(row[token]) - total, best)


def _not_finite() -> SampledToken:
    return SampledToken(-1, error=NotFinite("the logits of this request are not finite"))


def _candidates(weights: Row, sampling: Sampling) -> npt.NDArray[np.int64]:
    """The ids, ascending, that top_k, then top_p, then min_p leave; among equals the lower ids stay.

    `weights` are probabilities up to a factor, the largest being 1. Values are sorted, never ids, which is many times
    faster where a flat distribution leaves thousands of them.
    """
    k, total = len(weights), 0.0
    limited, top_p = 0 < sampling.top_k < k, float(np.float32(sampling.top_p))  # as runners take it
    if not limited and top_p >= 1.0:
        return np.flatnonzero(weights >= np.float32(sampling.min_p))
    if limited:
        k = sampling.top_k
        values = np.sort(np.partition(weights, len(weights) - k)[len(weights) - k :])[::-1]
    else:
        total = float(weights.sum(dtype=np.float64))
        # what is below this adds up to less than what top_p leaves out
        values = np.sort(weights[weights >= (1.0 - top_p) * total / len(weights)])[::-1]
    count = len(values)
    if top_p < 1.0:
        sums = np.cumsum(values, dtype=np.float64)
        goal = top_p * (total or sums[-1])
        count = min(count, int(np.searchsorted(sums, goal)) + 1)
    least = values[count - 1]
    ids = np.flatnonzero(weights >= max(least, np.float32(sampling.min_p)))
    surplus = len(ids) - count
    if surplus > 0:
        ids = np.delete(ids, np.flatnonzero(weights[ids] == least)[-surplus:])
    return ids


def _largest(row: Row, k: int) -> npt.NDArray[np.int64]:
    """The ids of the `k` largest, the largest first, lower ids first among equals."""
    if k >= len(row):
        return _by_size(row, np.arange(len(row)))
    at_least = np.partition(row, len(row) - k)[len(row) - k]
    return _by_size(row, np.flatnonzero(row >= at_least))[:k]


def _by_size(row: Row, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return ids[np.argsort(-row[ids], kind="stable")]
