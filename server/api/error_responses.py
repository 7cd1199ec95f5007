"""The error answers that a route may give, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.api.schemas import ErrorBody

_TEXTS = {
    400: "invalid in a way that the schema can not tell",
    401: "no key, or a wrong one",
    403: "the key, the host or the origin is not allowed",
    404: "unknown name",
    408: "the body takes too long to arrive",
    409: "in use, or in another state; retrying does not help",
    412: "compare-and-set failed",
    413: "the body is too large",
    422: "the schema refuses it",
    429: "too much is waiting already; `Retry-After` says when to come back",
    500: "a failure of ours; the log has more under the id that is told",
    503: "loading or draining; `Retry-After` says when to come back",
    504: "the deadline passed",
    507: "no room within a budget or on the disk",
}
ALWAYS = (401, 403, 408, 413)
"""Statuses that the middleware may answer on every route."""

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """`responses=` of a route: these statuses and those of the middleware, all with the one body."""
    return {status: {"model": ErrorBody, "description": _TEXTS[status]} for status in sorted({*statuses, *ALWAYS})}
