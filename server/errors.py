"""The exceptions of this package. Each message says what is wrong and what to do.

ServerError
├── InvalidRequest           a value is wrong in a way that only the server can tell (400)
│   ├── UnsupportedParameter    it would change the answer and is not served (400)
│   └── ContextExceeded         prompt and answer are longer than the context (400)
├── UnknownName              no task, model, file or job of that name (404)
├── Conflict                 the thing is in use or in another state (409)
├── Unauthorized             no key, or a wrong one (401)
├── Forbidden                the key does not open this (403)
├── BodyTooLarge             over --max-body or --max-upload (413)
├── BodyTooSlow              it took longer to arrive than --body-time lets it (408)
├── QueueFull                too much is waiting; come back after `retry_after` seconds (429)
│   └── RateLimited             one key or one task has what it may have, whatever else waits
├── NotReady                 loading, draining or restarting; come back after `retry_after` seconds (503)
│   └── NotServing              the same, before a route has looked at the request
├── DeadlineExceeded         the request's time was over before it could finish (504)
├── NoCapacity               it could never fit into the budget (507)
├── EngineFailed             a step failed; the request was lost and can be sent again (500)
│   └── NotFinite               the numbers of this request alone were of no use
├── RemoteError              the server that a command has called answers with this error of its own
├── BadModel                 a model folder or file cannot be served; says why
└── BadSetting               a setting is unknown or out of range; says which
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapters.errors import AdapterError

SHUTTING_DOWN = "the server is shutting down"
"""What whoever comes too late is told, wherever that is noticed."""


class ServerError(Exception):
    """Base of all errors of the server. `param` names the input at fault; `retry_after` is in seconds."""

    def __init__(self, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(ServerError):
    """A value is wrong in a way that the schema cannot tell."""


class UnsupportedParameter(InvalidRequest):
    """A parameter that would change the answer is not served."""


class ContextExceeded(InvalidRequest):
    """Prompt and answer are longer than the context."""


class UnknownName(ServerError):
    """No task, model, file or job is known by that name."""


class Conflict(ServerError):
    """The thing is in use, or not in a state that allows this."""


class Unauthorized(ServerError):
    """No key was sent, or one that is not known."""


class Forbidden(ServerError):
    """The key, the host or the origin is not allowed here."""


class BodyTooLarge(ServerError):
    """The body is over the limit."""


class BodyTooSlow(ServerError):
    """The body takes longer to arrive than it may."""


class QueueFull(ServerError):
    """Too many requests or tokens are waiting."""


class RateLimited(QueueFull):
    """A key or a task has used up its rate, or has as many requests in flight as it may have."""


class NotReady(ServerError):
    """The server is loading, draining or restarting."""


class NotServing(NotReady):
    """The same, found before a route has looked at the request."""


class DeadlineExceeded(ServerError):
    """The request's deadline passed."""


class NoCapacity(ServerError):
    """The request could never fit into the memory that it needs."""


class EngineFailed(ServerError):
    """A step failed; its running requests are lost, the registry and the queue are not."""


class NotFinite(EngineFailed):
    """The logits of a request are not finite, which no other request of the step had a part in."""


class RemoteError(ServerError):
    """A server has answered a command with an error, which is `told` as it came."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__(str(told["message"]), told.get("param"))
        self.told = told


class BadModel(ServerError):
    """A model folder, file or id cannot be served."""


class BadSetting(ServerError):
    """A setting is unknown, malformed or out of range."""


_TORCH_WANTED = re.compile(r"DefaultCPUAllocator: .* allocate (\d+) bytes")


def too_little_memory(error: BaseException) -> str | None:
    """In words what the processor's memory was too small for, None if the error is another one. torch has no class of
    its own for it: what its allocator raises is a RuntimeError."""
    if isinstance(error, MemoryError):
        return f"there is too little memory: {str(error) or 'none is left'}"
    wanted = _TORCH_WANTED.search(str(error))
    return wanted and f"there is too little memory: {int(wanted[1]) / 1e9:,.1f} GB were wanted at once"


def to_install(extra: str) -> str:
    """The command that brings an extra into the environment that runs: a bare `pip` may be another's."""
    return f"{shlex.quote(sys.executable)} -m pip install 'loramux[{extra}]'"


@contextmanager
def called(**fields: str) -> Iterator[None]:
    """Errors inside name the input as the request does: with `adapters="from"`, a mix that comes in as `from`."""
    try:
        yield
    except (AdapterError, ServerError) as error:
        error.param = fields.get(error.param or "", error.param)
        raise
