"""What a picked token means for its request: the text that it makes visible, and whether the answer ends with it.

Owns the rules of stopping. Does not know where the token came from, or blocks and slots.
"""

from __future__ import annotations

from server.engine.request import Delivery, Request
from server.engine.sampler import SampledToken


def accept(request: Request, pick: SampledToken, eos_ids: frozenset[int]) -> Delivery:
    """Add a picked token to the request and say what there is to deliver.

    End tokens and stop strings do not count before `min_tokens` are there. The end token has no text. One that a
    constraint has let through ends the answer even where end tokens are ignored: nothing that it allows can follow.
    """
    if pick.error is not None:
        return Delivery(finish_reason="error", error=pick.error)
    sampling, reader, token = request.sampling, request.reader, pick.token
    assert reader is not None, "the engine gives every request its reader"
    request.output.append(token)
    count = len(request.output)
    if request.constraint is not None:
        request.constraint.accept(token)
    text, reason = "", None
    ends = token in eos_ids and (request.constraint is not None or not sampling.ignore_eos)
    if count > sampling.min_tokens and (ends or token in sampling.stop_token_ids):
        text, reason = reader.rest(), "stop"
    else:
        text = reader.add(token, search=count > sampling.min_tokens)
        if reader.stopped:
            reason = "stop"
        elif count >= sampling.max_tokens:
            text, reason = text + reader.rest(), "length"
    return Delivery(text, (token,), () if pick.logprob is None else (pick.logprob,), reason)


def score(request: Request, picks: list[SampledToken]) -> Delivery | None:
    """Add the log-probabilities of scored prompt tokens; the one delivery when all are there."""
    for pick in picks:
        if pick.error is not None:
            return Delivery(finish_reason="error", error=pick.error)
        assert pick.logprob is not None, "a scored row comes with its log-probability"
        request.scores.append(pick.logprob)
    if len(request.scores) < request.scored:
        return None
    return Delivery(logprobs=tuple(request.scores), finish_reason="stop")
