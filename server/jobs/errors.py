"""The one exception of this package."""

from __future__ import annotations


class JobError(Exception):
    """Why a job failed, by OpenAI's three words for it. The message is shown to clients."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param
