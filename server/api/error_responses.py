"""The error responses of routes, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.api.schemas import ErrorBody

_DESCRIPTIONS = {
    400: "invalid request",
    401: "missing or unknown key",
    403: "key, host or origin not allowed",
    404: "unknown name",
    408: "the body arrives too slowly",
    409: "in use, or in another state; do not retry",
    412: "If-Match does not match",
    413: "body too large",
    422: "body or query does not match the schema",
    429: "queue full or rate exceeded; retry after `Retry-After`",
    500: "internal error; the log has details",
    503: "loading or draining; retry after `Retry-After`",
    504: "deadline exceeded",
    507: "no room in a memory budget or on the disk",
}
ALWAYS = (401, 403, 408, 413)
"""Statuses that the middleware may answer on every route."""

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """`responses=` of a route: these statuses and those of the middleware."""
    return {
        status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in sorted({*statuses, *ALWAYS})
    }
