"""Exceptions of the server. Each message says what is wrong and what to do.

ServerError
├── InvalidRequest           a value is wrong (400)
│   ├── UnsupportedParameter    it would change the answer and is not supported (400)
│   └── ContextExceeded         prompt and answer are longer than the context (400)
├── UnknownName              no task, model, file or job has that name (404)
├── Conflict                 the resource is in use or in another state (409)
├── Unauthorized             missing or unknown key (401)
├── Forbidden                the key, the host or the origin is not allowed (403)
├── BodyTooLarge             over --max-body or --max-upload (413)
├── BodyTooSlow              over --body-time (408)
├── QueueFull                too much is waiting; retry after `retry_after` seconds (429)
│   └── RateLimited             a key or a task is over its limit (429)
├── NotReady                 loading, draining or restarting; retry after `retry_after` seconds (503)
│   └── NotServing              the same, before the route ran
├── DeadlineExceeded         the deadline passed (504)
├── NoCapacity               it can never fit into a memory budget (507)
├── EngineFailed             a step failed; the request is lost and can be sent again (500)
│   └── NotFinite               the logits of this request alone are not finite
├── RemoteError              another server answered a command with an error
├── BadModel                 a model cannot be served
└── BadSetting               a setting is unknown or out of range
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapters.errors import AdapterError, shortened

SHUTTING_DOWN = "the server is shutting down"


class ServerError(Exception):
    """Base of all errors of the server.

    Args:
        param: name of the input at fault.
        retry_after: seconds.
    """

    def __init__(self, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(ServerError):
    """A value is wrong."""


class UnsupportedParameter(InvalidRequest):
    """A parameter would change the answer and is not supported."""


class ContextExceeded(InvalidRequest):
    """Prompt and answer are longer than the context."""


class UnknownName(ServerError):
    """No task, model, file or job has that name."""


class Conflict(ServerError):
    """The resource is in use or in another state."""


class Unauthorized(ServerError):
    """The key is missing or unknown."""


class Forbidden(ServerError):
    """The key, the host or the origin is not allowed."""


class BodyTooLarge(ServerError):
    """The body is over its limit."""


class BodyTooSlow(ServerError):
    """The body arrives too slowly."""


class QueueFull(ServerError):
    """Too many requests or tokens are waiting."""


class RateLimited(QueueFull):
    """A key or a task is over its rate or its number of concurrent requests."""


class NotReady(ServerError):
    """The server is loading, draining or restarting."""


class NotServing(NotReady):
    """The same, before the route ran."""


class DeadlineExceeded(ServerError):
    """The deadline of the request passed."""


class NoCapacity(ServerError):
    """The request can never fit into a memory budget."""


class EngineFailed(ServerError):
    """A step failed. Its running requests are lost; waiting ones and adapters are not."""


class NotFinite(EngineFailed):
    """The logits of one request are not finite. Other requests of the step are not affected."""


class RemoteError(ServerError):
    """Another server answered with an error. `body` is its `error` object."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(str(body["message"]), body.get("param"))
        self.body = body


class BadModel(ServerError):
    """A model cannot be served."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(shortened(message), param)  # files contain names of any length


class BadSetting(ServerError):
    """A setting is unknown, malformed or out of range."""


_TORCH_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: .* allocate (\d+) bytes")


def out_of_memory_message(error: BaseException) -> str | None:
    """A message for an error of too little RAM, None for other errors. torch raises a RuntimeError for it."""
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'an allocation failed'}"
    wanted = _TORCH_OUT_OF_MEMORY.search(str(error))
    return wanted and f"out of memory: an allocation of {int(wanted[1]) / 1e9:,.1f} GB failed"


def install_command(extra: str) -> str:
    """The command that installs an extra into the running environment."""
    return f"{shlex.quote(sys.executable)} -m pip install 'loramux[{extra}]'"


@contextmanager
def rename_params(**names: str) -> Iterator[None]:
    """Rename the `param` of errors to the field of the request: `adapters="from"` if the mix came in as `from`."""
    try:
        yield
    except (AdapterError, ServerError) as error:
        error.param = names.get(error.param or "", error.param)
        raise
