"""Turns exceptions into HTTP error responses. Every error body has the same shape."""

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
"""Exception class -> (status, type, code). The nearest base class in the table counts."""

ADVICE: Mapping[type[Exception], str] = {adapter_errors.UnknownAdapter: "; GET /adapters lists all adapters"}
"""Added to messages of errors that are raised below the API."""
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request", 413: "body_too_large"}
INVALID_HTTP = "invalid_http"
"""Code for malformed HTTP, which the server answers below the application."""
NO_ROUTE = "there is no such route; /docs lists all routes (without a slash at the end)"
UNREADABLE = "There was an error parsing the body"
"""FastAPI's detail for a JSON body that it cannot parse."""
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
UNION_PREFIXES = ("function-", "list[", "literal[", "constrained-")
"""Pydantic adds the branch of a union to the location of an error, such as `list[int]`."""
MIX_FIELDS = frozenset({"adapters", "choice", "from"})
MIX_EXAMPLE = '{"name": "sentiment", "weight": 0.7}'
NO_RETRY = frozenset({409, 504, 507})
"""Statuses that OpenAI's clients would retry, although it cannot help or would take as long again."""


@dataclass(frozen=True)
class ErrorReply:
    """An error response."""

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
        """The JSON body, in ASCII: messages may quote lone surrogates from the request."""
        return json.dumps(self.body).encode()

    def response(self) -> Response:
        return Response(self.encode(), self.status, self.headers, media_type="application/json")


def error_reply(error: Exception, request_id: str = "", *, openai: bool = False) -> ErrorReply:
    """The response for an exception. Exceptions that are not in the table are logged and answered with a bare 500."""
    if isinstance(error, RequestValidationError):
        return _validation_reply(error.errors(), openai)
    if isinstance(error, HTTPException):
        return _framework_reply(error)
    for kind in type(error).__mro__:
        if kind in TABLE:
            return _table_reply(error, *TABLE[kind])
    log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    return ErrorReply(500, f"internal error; see the log for {request_id or 'details'}", SERVER, None, "internal")


def _table_reply(error: Any, status: int, kind: str, code: str) -> ErrorReply:
    headers: dict[str, str] = {}
    if status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(getattr(error, "retry_after", None) or 1.0)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 408:
        headers["connection"] = "close"  # the rest of the body must not be read as the next request
    if status in NO_RETRY:
        headers["x-should-retry"] = "false"
    return ErrorReply(status, error.message + ADVICE.get(type(error), ""), kind, error.param, code, headers)


def _framework_reply(error: HTTPException) -> ErrorReply:
    status, detail = error.status_code, str(error.detail)
    if detail.startswith(UNREADABLE):
        message = "the body cannot be read; send valid JSON in UTF-8, uncompressed, as application/json"
        return ErrorReply(status, message, INVALID, None, "invalid_json")
    message = {404: NO_ROUTE, 400: f"the upload cannot be read: {detail}"}.get(status, detail)
    code = HTTP_CODES.get(status, "invalid_request" if status < 500 else "internal")
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    return ErrorReply(status, message, INVALID if status < 500 else SERVER, None, code, headers)


def _validation_reply(problems: Sequence[Any], openai: bool) -> ErrorReply:
    """The response for a body or query that does not match its schema: the first five problems."""
    named = list(dict.fromkeys((_field(p), _explain(p)) for p in _relevant(problems)))
    message = "; ".join(f"{name}: {text}" if name else text for name, text in named[:5])
    if len(named) > 5:
        message += f" (and {len(named) - 5} more)"
    code = "invalid_json" if problems and problems[0]["type"] == "json_invalid" else "invalid_request"
    return ErrorReply(400 if openai else 422, message, INVALID, named[0][0] or None if named else None, code)


def _relevant(problems: Sequence[Any]) -> list[Any]:
    """For each field with a union type, the problems of the branch that is closest to the value."""
    branches = [_union_branch(p) for p in problems]
    distances: dict[Any, dict[Any, int]] = {}
    for place, branch, distance in branches:
        of_field = distances.setdefault(place, {})
        of_field[branch] = max(distance, of_field.get(branch, 0))
    return [
        p
        for p, (place, branch, _) in zip(problems, branches, strict=True)
        if distances[place][branch] == min(distances[place].values())
    ]


def _union_branch(problem: Mapping[str, Any]) -> tuple[Sequence[Any] | None, str, int]:
    """The location of the union field, the branch, and a distance: 2 wrong type, 1 wrong type inside, 0 wrong value."""
    location = tuple(problem["loc"])
    for i, part in enumerate(location):
        if isinstance(part, str) and part.startswith(UNION_PREFIXES):
            wrong_type = problem["type"].endswith(("_type", "literal_error"))
            return location[:i], part, (2 if i + 1 == len(location) else 1) if wrong_type else 0
    return None, "", 0


def _field(problem: Mapping[str, Any]) -> str:
    """The name of a field as clients write it, such as `adapters.0.weight`."""
    location = problem["loc"]
    if problem["type"] == "json_invalid":
        return ""
    parts = [p for p in location[1:] if not (isinstance(p, str) and p.startswith(UNION_PREFIXES))]
    return ".".join(str(p)[:64] for p in parts)


def _explain(problem: Mapping[str, Any]) -> str:
    """What is wrong with a field and what to send instead."""
    kind, location = problem["type"], tuple(problem["loc"])
    not_object = kind in ("model_type", "model_attributes_type", "dict_type")
    if kind == "json_invalid":
        return "the body is not valid JSON" + (f", at character {location[1]}" if location[1:] else "")
    if location == ("body",) and kind == "missing":
        return "a JSON body is needed, sent as application/json"
    if location == ("body",) and not_object:
        return "the body must be a JSON object, sent as application/json"
    if kind == "list_type" and location[-1] in MIX_FIELDS:
        return f"Input should be a list, such as [{MIX_EXAMPLE}]"
    if not_object:
        return "Input should be a JSON object" + (f", such as {MIX_EXAMPLE}" if location[-2:][0] in MIX_FIELDS else "")
    if kind == "string_pattern_mismatch":
        return f"String should be {PATTERNS[problem['ctx']['pattern']]}"
    if kind == "extra_forbidden" and location[-1] == PICKLE_FILE:
        return "pickle files can run code when they are read; save the adapter as adapter_model.safetensors"
    if kind == "extra_forbidden":
        return "there is no such field; /docs lists all fields"
    return str(problem["msg"]).removeprefix("Value error, ").replace("Field required", "it is missing")


def is_openai(path: str) -> bool:
    """Whether a path follows OpenAI's conventions: a malformed body is 400 there, not 422."""
    return path.startswith("/v1/")


def install(app: FastAPI, on_refused: Callable[[str, str, int], None]) -> None:
    """Answer all exceptions of routes with `error_reply`.

    Args:
        on_refused: called with method, path and status of requests that were refused before their route ran.
    """

    async def handler(request: Request, error: Exception) -> Response:
        request_id = request.scope.get("state", {}).get("request_id", "")
        reply = error_reply(error, request_id, openai=is_openai(request.url.path))
        if reply.status == 405:
            allowed = ", ".join(_allowed_methods(request))
            message = f"this route does not support {request.method[:16]}; it supports {allowed}"
            reply = replace(reply, message=message, headers={**reply.headers, "allow": allowed})
        request.scope.setdefault("state", {})["code"] = reply.code
        if isinstance(error, RequestValidationError | HTTPException | server_errors.NotServing):
            on_refused(request.method, request.url.path, reply.status)
        return reply.response()

    for kind in (RequestValidationError, HTTPException, adapter_errors.AdapterError, server_errors.ServerError):
        app.add_exception_handler(kind, handler)


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes with this path; Starlette names those of the first one only."""
    scopes = ((method, {**request.scope, "method": method}) for method in METHODS)
    return [method for method, scope in scopes if any(r.matches(scope)[0] is Match.FULL for r in request.app.routes)]
