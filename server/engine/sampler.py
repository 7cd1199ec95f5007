"""`Sampler`: selects tokens from logits, and computes log-probabilities.

Order of operations: raw logits -> reported log-probabilities -> penalties -> masks -> temperature -> top_k -> top_p ->
min_p -> one uniform random number against the cumulative probabilities, by ascending id. Each row is treated alone, and
its random number is a function of (seed, token index), so a request's answer does not depend on the batch.
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
    """Tokens that the runner samples asynchronously."""

    def read(self) -> npt.NDArray[np.int32]:
        """Wait for the tokens: int32 [L], -1 for a row that is not finite."""


class GreedySamples(NamedTuple):
    """The maxima of all rows, if the runner computes them with the step."""

    logits: Logits

    def read(self) -> npt.NDArray[np.int32]:
        return self.logits.largest.astype(np.int32)


DeviceSampler = Callable[[Logits, npt.NDArray[np.float32], npt.NDArray[np.int32]], DeviceSamples]
"""Starts sampling on the device.

Arguments: a step's logits; float32 [L, 4] with temperature (0 is greedy), top_p, min_p and a uniform random number;
int32 [L] with top_k.
"""

_STRIDE = 256
"""Probabilities are summed in groups of this size, so that sampling searches one group only."""

_TINY = float(np.finfo(np.float32).tiny)
"""Temperatures below this are greedy. Dividing by them overflows float32."""

_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
"""Largest float32 below 1."""


class SampledToken(NamedTuple):
    """Result for one row: a token with its log-probability if requested, or the error that ends the request."""

    token: int
    logprob: TokenLogprob | None = None
    error: Exception | None = None


class Sampler:
    """Samples tokens for a step.

    Args:
        vocab: Number of logits of a row.
        eos_ids: Ids that are masked before a request's `min_tokens`. If a constraint allows only an end, the answer
            ends earlier.
        draw: The runner's sampler. It samples the rows that need only a token.
    """

    def __init__(self, vocab: int, eos_ids: frozenset[int], draw: DeviceSampler | None = None) -> None:
        self._device_sampler = draw
        self._eos = np.asarray(sorted(eos_ids), np.int64)
        self._row = np.empty(vocab, np.float32)
        self._weights = np.zeros(-(-vocab // _STRIDE) * _STRIDE, np.float32)

    def sample(self, logits: Logits, scheduled: Sequence[ScheduledRequest]) -> list[SampledToken]:
        """Sample one token for each row of `logits`, whose rows are those of `scheduled`, in order."""
        if self._device_sampler is not None:
            return self._sample_on_device(logits, scheduled, self._device_sampler)
        return self._sample_on_host(logits, scheduled)

    def sample_async(self, logits: Logits, scheduled: Sequence[ScheduledRequest]) -> DeviceSamples | None:
        """Start sampling on the device. Returns None if that is impossible because a row needs more than a token."""
        with_logits = [item for item in scheduled if item.logits]
        if self._device_sampler is None or not all(is_simple(item.request) for item in with_logits):
            return None
        return self._launch(logits, with_logits, self._device_sampler)

    def _sample_on_host(self, logits: Logits, scheduled: Sequence[ScheduledRequest]) -> list[SampledToken]:
        greedy = [SampledToken(token) if token >= 0 else _not_finite() for token in logits.largest.tolist()]
        if all(item.logits == 0 or is_greedy(item.request) for item in scheduled):
            return greedy
        rows = logits.rows.numpy(force=True)
        samples: list[SampledToken] = []
        for item in scheduled:
            for i in range(item.logits):
                row = len(samples)
                samples.append(greedy[row] if is_greedy(item.request) else self._sample_row(rows[row], item.request, i))
        return samples

    def _sample_on_device(
        self, logits: Logits, scheduled: Sequence[ScheduledRequest], sampler: DeviceSampler
    ) -> list[SampledToken]:
        """Sample simple rows on the device, and the others on the host."""
        with_logits = [item for item in scheduled if item.logits]
        if not any(_needs_device(item.request, logits) for item in with_logits):
            return self._sample_on_host(logits if logits.has_largest else Logits(logits.rows.cpu()), scheduled)
        tokens = self._launch(logits, with_logits, sampler).read()
        samples: list[SampledToken] = []
        for item in with_logits:
            row = len(samples)
            if is_simple(item.request):
                samples += to_sampled_tokens(tokens[row : row + 1])
            else:
                samples += self._sample_on_host(logits.part(row, row + item.logits), [item])
        return samples

    @staticmethod
    def _launch(logits: Logits, with_logits: Sequence[ScheduledRequest], sampler: DeviceSampler) -> DeviceSamples:
        """Start sampling all rows. Rows of requests that are not simple are greedy, and their tokens unused."""
        rows = 0
        random: list[tuple[int, Request]] = []
        for request, _, count in with_logits:
            if request.sampling.temperature >= _TINY and is_simple(request):
                random.append((rows, request))
            rows += count
        if logits.has_largest and not random:
            return GreedySamples(logits)
        parameters, top_k = np.zeros((rows, 4), np.float32), np.zeros(rows, np.int32)
        for row, request in random:
            sampling = request.sampling
            parameters[row] = sampling.temperature, sampling.top_p, sampling.min_p, _noise(request)
            top_k[row] = sampling.top_k
        return sampler(logits, parameters, top_k)

    def _sample_row(self, raw: Row, request: Request, i: int) -> SampledToken:
        if not np.isfinite(raw).all():
            return _not_finite()
        if request.scored:
            token = request.prompt[len(request.prompt) - request.scored + len(request.scores) + i]
            return SampledToken(token, token_logprob(self._copy(raw), token, request.sampling.logprobs or 0))
        try:
            token = self._choose(raw, request)
        except InvalidRequest as e:
            return SampledToken(-1, error=e)
        k = request.sampling.logprobs
        return SampledToken(token, None if k is None else token_logprob(self._copy(raw), token, k))

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
            self._mask_ends(row, request)
        best = int(row.argmax())
        if row[best] == -np.inf:
            raise InvalidRequest("no token is allowed here: the limits on this answer contradict each other")
        if sampling.temperature < _TINY:
            return best
        return self._draw(row, row[best], sampling, _noise(request))

    def _mask_ends(self, row: Row, request: Request) -> None:
        """Mask the end tokens before `min_tokens`, unless a constraint allows nothing else."""
        ends = [*self._eos, *request.sampling.stop_token_ids]
        kept = row[ends]
        row[ends] = -np.inf
        if request.constraint is None or row.max() > -np.inf:
            return
        row[ends] = kept  # a stop token does not end the answer yet
        if row[self._eos].max(initial=-np.inf) > -np.inf:  # the constraint is complete
            request.sampling = replace(request.sampling, min_tokens=0)

    def _draw(self, row: Row, best: np.float32, sampling: Sampling, u: float) -> int:
        """Return the id at which the cumulative probability exceeds `u`."""
        weights = self._weights[: len(row)]
        np.subtract(row, best, out=weights)
        with np.errstate(over="ignore"):  # very low temperatures give -inf for all but the best, as intended
            np.divide(weights, np.float32(sampling.temperature), out=weights)
        np.exp(weights, out=weights)
        if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
            ids = _candidates(weights, sampling)
            sums = np.cumsum(weights[ids], dtype=np.float64)
            return int(ids[min(int(np.searchsorted(sums, u * sums[-1], side="right")), len(ids) - 1)])
        groups = np.cumsum(self._weights.reshape(-1, _STRIDE).sum(1), dtype=np.float64)
        goal = u * groups[-1]
        group = min(int(np.searchsorted(groups, goal, side="right")), len(groups) - 1)
        inside = np.cumsum(self._weights[group * _STRIDE : (group + 1) * _STRIDE], dtype=np.float64)
        inside += groups[group - 1] if group else 0.0
        at = int(np.searchsorted(inside, goal, side="right"))
        if at == _STRIDE:  # the two sums are rounded differently: take the last id with a probability
            at = int(np.searchsorted(inside, inside[-1], side="left"))
        return group * _STRIDE + at


def to_sampled_tokens(ids: npt.NDArray[np.int32]) -> list[SampledToken]:
    """Convert the ids of a device sampler, -1 for rows that are not finite."""
    return [SampledToken(token) if token >= 0 else _not_finite() for token in ids.tolist()]


def _needs_device(request: Request, logits: Logits) -> bool:
    """Whether the device still has to sample the request's token, and can."""
    return is_simple(request) and not (logits.has_largest and is_greedy(request))


def is_greedy(request: Request) -> bool:
    """Whether the request's next token is the one with the largest logit."""
    return request.sampling.temperature < _TINY and is_simple(request)


def is_simple(request: Request) -> bool:
    """Whether the request's next step needs only a token, without penalties, masks and log-probabilities."""
    s = request.sampling
    return s.is_simple and request.scored == 0 and request.constraint is None and len(request.output) >= s.min_tokens


def _noise(request: Request) -> float:
    """Return the random number for the request's next token, as float32, the same on host and device."""
    return float(np.float32(min(uniform(request.seed, len(request.output)), _BELOW_ONE)))


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) with 53 random bits, a function of the seed and the token's index (Philox)."""
    raw = np.random.Philox(key=seed & (2**64 - 1), counter=[index, 0, 0, 0]).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def penalize(row: Row, request: Request) -> None:
    """Apply penalties in place. Repetition counts prompt and output, presence and frequency the output only."""
    s = request.sampling
    if s.repetition_penalty != 1.0:
        seen = np.fromiter({*request.prompt, *request.output}, np.int64)  # faster than np.unique
        values, factor = row[seen], np.float32(s.repetition_penalty)
        row[seen] = np.where(values > 0, values / factor, values * factor)
    if (s.presence_penalty or s.frequency_penalty) and request.output:
        ids, counts = np.unique(np.asarray(request.output, np.int64), return_counts=True)
        row[ids] -= np.float32(s.presence_penalty) + np.float32(s.frequency_penalty) * counts.astype(np.float32)


def token_logprob(row: Row, token: int, k: int) -> TokenLogprob:
    """Return the natural log-softmax at `token` and at the `k` largest, best first and lower ids first among equals."""
    top = row.max()
    total = float(top) + float(np.log(np.exp(row - top).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if k:
        best = tuple((int(i), float(row[i]) - total) for i in _largest(row, k))
    return TokenLogprob(token, float(row[token]) - total, best)


def _not_finite() -> SampledToken:
    return SampledToken(-1, error=NotFinite("the logits of this request are not finite"))


def _candidates(weights: Row, sampling: Sampling) -> npt.NDArray[np.int64]:
    """Return the ids, ascending, that top_k, then top_p, then min_p keep. Among equals the lower ids are kept.

    `weights` are probabilities up to a factor, with a maximum of 1. Sorting values instead of ids is many times faster
    for flat distributions.
    """
    k, total = len(weights), 0.0
    limited, top_p = 0 < sampling.top_k < k, float(np.float32(sampling.top_p))  # float32, as on the device
    if not limited and top_p >= 1.0:
        return np.flatnonzero(weights >= np.float32(sampling.min_p))
    if limited:
        k = sampling.top_k
        values = np.sort(np.partition(weights, len(weights) - k)[len(weights) - k :])[::-1]
    else:
        total = float(weights.sum(dtype=np.float64))
        # values below this bound add up to less than top_p excludes
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
    """Return the ids of the `k` largest, best first, lower ids first among equals."""
    ids = np.arange(len(row))
    if k < len(row):
        ids = np.flatnonzero(row >= np.partition(row, len(row) - k)[len(row) - k])
    return ids[np.argsort(-row[ids], kind="stable")][:k]
