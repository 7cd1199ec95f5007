"""The one exception of this package, and the words for what the system refuses."""

from __future__ import annotations

from adapters.errors import encodable


class JobError(Exception):
    """Why a job failed, by OpenAI's three words for it. The message is shown to clients."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code, self.message, self.param = code, encodable(message), param
        super().__init__(self.message)


def refused(error: OSError) -> str:
    """What clients are shown of an error of the system: its reason, and no path."""
    return f"the system refuses what the job needs: {error.strerror or 'it gives no reason'}"
