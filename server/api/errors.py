"""Errors over HTTP: one table from exception classes to answers, and one shape for every body that is not 2xx.

Every error of the server, the framework's own included, leaves through `answer`. Knows no route.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

import adapters.errors as adapter_errors
import server.errors as server_errors
from adapters.peft_format import PICKLE_FILE
from server.api.schemas import PATTERNS

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"

TABLE: Mapping[type[Exception], tuple[int, str, str]] = {
    adapter_errors.InvalidAdapter: (400, INVALID, "invalid_adapter"),
    adapter_errors.UnsupportedAdapter: (400, INVALID, "unsupported_adapter"),
    adapter_errors.BaseMismatch: (400, INVALID, "base_mismatch"),
    adapter_errors.InvalidChoice: (400, INVALID, "invalid_mix"),
    adapter_errors.UnknownAdapter: (404, INVALID, "adapter_not_found"),
    adapter_errors.AdapterConflict: (409, INVALID, "conflict"),
    adapter_errors.VersionMismatch: (412, INVALID, "version_mismatch"),
    adapter_errors.NoRoom: (507, SERVER, "no_room"),
    adapter_errors.StoreFailed: (507, SERVER, "store_failed"),
    adapter_errors.InvalidData: (400, INVALID, "invalid_data"),
    adapter_errors.AdapterError: (400, INVALID, "invalid_adapter"),
    server_errors.InvalidRequest: (400, INVALID, "invalid_request"),
    server_errors.UnsupportedParameter: (400, INVALID, "unsupported_parameter"),
    server_errors.ContextExceeded: (400, INVALID, "context_length_exceeded"),
    server_errors.UnknownName: (404, INVALID, "not_found"),
    server_errors.Conflict: (409, INVALID, "conflict"),
    server_errors.Unauthorized: (401, "authentication_error", "invalid_api_key"),
    server_errors.Forbidden: (403, "permission_error", "forbidden"),
    server_errors.BodyTooLarge: (413, INVALID, "body_too_large"),
    server_errors.BodyTooSlow: (408, INVALID, "body_too_slow"),
    server_errors.QueueFull: (429, "rate_limit_error", "queue_full"),
    server_errors.RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    server_errors.NotReady: (503, SERVER, "not_ready"),
    server_errors.DeadlineExceeded: (504, SERVER, "deadline_exceeded"),
    server_errors.NoCapacity: (507, SERVER, "no_capacity"),
    server_errors.EngineFailed: (500, SERVER, "engine_failed"),
}
"""Exception class -> (status, type, code). The nearest class of an exception's ancestry counts."""

ADVICE: Mapping[type[Exception], str] = {adapter_errors.UnknownAdapter: "; GET /adapters lists what is"}
"""What a client may do next, of errors that are raised where no route is known."""
STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request", 413: "body_too_large"}
INVALID_HTTP = "invalid_http"
"""The code of the 400 for what is no request at all, which the protocol below the application answers."""
NO_ROUTE = "there is no such route; /docs lists them all, none with a slash at its end"
UNREADABLE = "There was an error parsing the body"
"""What the framework says of JSON that it cannot read; its other words for a 400 are of multipart bodies."""
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
"""Those that any route has."""
UNION_PARTS = ("function-", "list[", "literal[", "constrained-")
"""How the validator names the kinds of a field that takes several, which are no part of the field's name."""
MIXES = frozenset({"adapters", "choice", "from"})
"""The fields that hold a mix, and `MEMBER`, what one adapter of it looks like."""
MEMBER = '{"name": "sentiment", "weight": 0.7}'
PERMANENT = frozenset({409, 504, 507})
"""Statuses that a client's own retry rules would retry, though it can not help, or would take the time that a call may
have as often again."""


@dataclass(frozen=True)
class Answer:
    """What a client is told about an error."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        """The JSON body. Lone surrogates of a client's input cannot break it: only ASCII is written."""
        return json.dumps(self.body).encode()

    def response(self) -> Response:
        return Response(self.encode(), self.status, self.headers, media_type="application/json")


def answer(error: Exception, request_id: str = "", *, openai: bool = False) -> Answer:
    """The answer to an exception. What is not in the table is a 500 that tells nothing but the request's id."""
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), openai)
    if isinstance(error, HTTPException):
        return _framework(error)
    for kind in type(error).__mro__:
        if kind in TABLE:
            return _known(error, *TABLE[kind])
    log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    return Answer(500, f"internal error; the log has more under {request_id or 'this time'}", SERVER, None, "internal")


def _known(error: Any, status: int, kind: str, code: str) -> Answer:
    headers: dict[str, str] = {}
    if status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(getattr(error, "retry_after", None) or 1.0)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 408:
        headers["connection"] = "close"  # what is still to come of the body would be read as a request
    if status in PERMANENT:
        headers["x-should-retry"] = "false"
    return Answer(status, error.message + ADVICE.get(type(error), ""), kind, error.param, code, headers)


def _framework(error: HTTPException) -> Answer:
    status = error.status_code
    if str(error.detail).startswith(UNREADABLE):
        message = "the body cannot be read; send valid JSON, in UTF-8 and not compressed, as application/json"
        return Answer(status, message, INVALID, None, "invalid_json")
    message = {
        404: NO_ROUTE,
        400: f"the upload cannot be read: {error.detail}",
    }.get(status, str(error.detail))
    code = STATUS_CODES.get(status, "invalid_request" if status < 500 else "internal")
    return Answer(
        status,
        message,
        INVALID if status < 500 else SERVER,
        None,
        code,
        {k.lower(): v for k, v in (error.headers or {}).items()},
    )


def _invalid(problems: Sequence[Any], openai: bool) -> Answer:
    """A body or query that the schema refuses: the first few problems by the name of their field."""
    problems = _applying(problems)
    named = list(dict.fromkeys(("" if p["type"] == "json_invalid" else _where(p["loc"]), _what(p)) for p in problems))
    shown = "; ".join(f"{where}: {what}" if where else what for where, what in named[:5])
    more = f" (and {len(named) - 5} more)" if len(named) > 5 else ""
    broken = bool(problems) and problems[0]["type"] == "json_invalid"
    return Answer(
        400 if openai else 422, shown + more, INVALID, named[0][0] or None if named else None,
        "invalid_json" if broken else "invalid_request",
    )  # fmt: skip


def _applying(problems: Sequence[Any]) -> list[Any]:
    """The problems, of a field that takes several kinds those of what its value is nearest to: a long list is no bad
    text, and a list of numbers no bad list of texts.
    """
    kinds = [_kind(p) for p in problems]
    misses: dict[Any, dict[Any, int]] = {}
    for place, kind, miss in kinds:
        there = misses.setdefault(place, {})
        there[kind] = max(miss, there.get(kind, 0))
    return [
        p
        for p, (place, kind, _) in zip(problems, kinds, strict=True)
        if misses[place][kind] == min(misses[place].values())
    ]


def _kind(problem: Mapping[str, Any]) -> tuple[Sequence[Any] | None, str, int]:
    """The place of a field of several kinds that a problem lies in, if it does, the kind, and how far the value is from
    being one: 2 where it is none at all, 1 where something inside of it is not.
    """
    location = tuple(problem["loc"])
    for i, part in enumerate(location):
        if isinstance(part, str) and part.startswith(UNION_PARTS):
            missed = problem["type"].endswith(("_type", "literal_error"))
            return location[:i], part, (2 if i + 1 == len(location) else 1) if missed else 0
    return None, "", 0


def _where(location: Sequence[Any]) -> str:
    parts = [p for p in location[1:] if not (isinstance(p, str) and p.startswith(UNION_PARTS))]
    return ".".join(str(p)[:64] for p in parts) if location[:1] != ("body",) or len(location) > 1 else ""


def _what(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        at = problem["loc"][1:]  # not a field: where in the body it breaks
        return f"the body is not valid JSON{f', at character {at[0]}' if at else ''}"
    if problem["type"] in ("model_type", "model_attributes_type") and tuple(problem["loc"]) == ("body",):
        return "the body must be a JSON object, sent as application/json"
    if problem["type"] == "list_type" and problem["loc"][-1] in MIXES:
        return f"Input should be a list, such as [{MEMBER}]"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "Input should be a JSON object" + (f", such as {MEMBER}" if problem["loc"][-2:][0] in MIXES else "")
    if problem["type"] == "string_pattern_mismatch":
        return f"String should be {PATTERNS[problem['ctx']['pattern']]}"
    if problem["type"] == "extra_forbidden" and problem["loc"][-1] == PICKLE_FILE:
        return "it is a pickle, which can run code when it is read, and is refused; save adapter_model.safetensors"
    if problem["type"] == "extra_forbidden":
        return "there is no such field; /docs lists those that there are"
    if problem["type"] == "missing" and tuple(problem["loc"]) == ("body",):
        return "a JSON body is needed, sent as application/json"
    return str(problem["msg"]).removeprefix("Value error, ").replace("Field required", "it is missing")


def _methods(request: Request) -> list[str]:
    """What a path knows, over all routes that match it: the framework tells of the first one alone."""
    asked = ((method, {**request.scope, "method": method}) for method in METHODS)
    return [method for method, scope in asked if any(r.matches(scope)[0] is Match.FULL for r in request.app.routes)]


def is_openai(path: str) -> bool:
    """Whether a path follows OpenAI's conventions, by which a malformed body is 400."""
    return path.startswith("/v1/")


def install(app: FastAPI, unread: Callable[[str, str, int], None]) -> None:
    """Answer every exception that reaches the framework's own layer by the table.

    `unread` hears of each request that the framework refuses before a route sees it: method, path and status.
    """

    async def handler(request: Request, error: Exception) -> Response:
        request_id = request.scope.get("state", {}).get("request_id", "")
        told = answer(error, request_id, openai=is_openai(request.url.path))
        if told.status == 405:
            known = ", ".join(_methods(request))
            message = f"this route does not know {request.method[:16]}; what it knows: {known}"
            told = replace(told, message=message, headers={**told.headers, "allow": known})
        request.scope.setdefault("state", {})["code"] = told.code
        if isinstance(error, RequestValidationError | HTTPException | server_errors.NotServing):
            unread(request.method, request.url.path, told.status)
        return told.response()

    for kind in (RequestValidationError, HTTPException, adapter_errors.AdapterError, server_errors.ServerError):
        app.add_exception_handler(kind, handler)
