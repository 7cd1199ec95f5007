"""The exception that fails a job, and the message for errors of the operating system."""

from __future__ import annotations

from adapters.errors import valid_unicode


class JobError(Exception):
    """Why a job failed: `code`, `message` and `param` as in OpenAI's fine-tuning jobs. Clients see all three."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code, self.message, self.param = code, valid_unicode(message), param
        super().__init__(self.message)


def os_error_message(error: OSError) -> str:
    """What clients see of an operating system error: its reason without any path."""
    return f"the operating system refused a file operation: {error.strerror or 'no reason given'}"
