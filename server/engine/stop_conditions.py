"""Applies sampled tokens to requests and decides when an answer ends."""

from __future__ import annotations

from server.engine.request import Delivery, Request
from server.engine.sampler import SampledToken


def append_token(request: Request, sample: SampledToken, eos_ids: frozenset[int]) -> Delivery:
    """Append a sampled token to the request and return what to deliver.

    End tokens and stop strings have no effect before `min_tokens`. End tokens have no text. An end token that a
    constraint allows ends the answer even with `ignore_eos`, because nothing can follow it.
    """
    if sample.error is not None:
        return Delivery(finish_reason="error", error=sample.error)
    sampling, detokenizer, token = request.sampling, request.detokenizer, sample.token
    assert detokenizer is not None, "Engine.submit sets the detokenizer"
    request.output.append(token)
    count = len(request.output)
    if request.constraint is not None:
        request.constraint.accept(token)
    text, reason = "", None
    is_end = token in eos_ids and (request.constraint is not None or not sampling.ignore_eos)
    if count > sampling.min_tokens and (is_end or token in sampling.stop_token_ids):
        text, reason = detokenizer.rest(), "stop"
    else:
        text = detokenizer.add(token, search=count > sampling.min_tokens)
        if detokenizer.stopped:
            reason = "stop"
        elif count >= sampling.max_tokens:
            text, reason = text + detokenizer.rest(), "length"
    return Delivery(text, (token,), () if sample.logprob is None else (sample.logprob,), reason)


def append_scores(request: Request, samples: list[SampledToken]) -> Delivery | None:
    """Append log-probabilities of scored prompt tokens. Return the one delivery when all are known, else None."""
    for sample in samples:
        if sample.error is not None:
            return Delivery(finish_reason="error", error=sample.error)
        assert sample.logprob is not None, "scored rows have a log-probability"
        request.scores.append(sample.logprob)
    if len(request.scores) < request.scored:
        return None
    return Delivery(logprobs=tuple(request.scores), finish_reason="stop")
