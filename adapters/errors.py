"""The exceptions of this package. Each message says what is wrong and what to do.

AdapterError
├── InvalidAdapter           the folder or file is not a readable LoRA (truncated, missing, not finite, ...)
│   └── UnsupportedAdapter   it needs a feature that is not served (DoRA, a trained bias, ...)
├── BaseMismatch             its modules or shapes differ from the served base
├── InvalidChoice            a choice repeats an adapter, is too long, or has an invalid weight
├── UnknownAdapter           no adapter or version has that name
├── AdapterConflict          the name is in use by other content or by a task
├── VersionMismatch          compare-and-set: the name is at another version
├── NoRoom                   it exceeds the memory budget
├── StoreFailed              a disk or system error; nothing was changed
├── InvalidData              a line of training or evaluation data is not usable
├── Diverged                 training produced values that are not finite
└── TrainingStopped          training was stopped; its checkpoint is written
"""

import errno

RESOURCE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of the system (too many open files, no memory), as opposed to errors of the file."""

MAX_MESSAGE = 1000
"""Characters of a message. Names in adapter files can have any length."""


def valid_unicode(text: str) -> str:
    """Escape surrogates, which JSON escapes can produce and UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(text: str) -> str:
    """Return `text` as valid Unicode of at most about `MAX_MESSAGE` characters, cut in the middle."""
    text = valid_unicode(text)
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"


class AdapterError(Exception):
    """Base class of adapter errors. `param` names the input at fault, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message = shortened(message)
        self.param = None if param is None else shortened(param)
        super().__init__(self.message)


class InvalidAdapter(AdapterError):
    """The folder or file is not a readable LoRA adapter."""


class UnsupportedAdapter(InvalidAdapter):
    """The adapter needs a feature that is not served; the message names it."""


class BaseMismatch(AdapterError):
    """The adapter's modules or shapes differ from the served base."""


class InvalidChoice(AdapterError):
    """A choice of adapters cannot be made into a mix."""


class UnknownAdapter(AdapterError):
    """No adapter or version has that name."""


class AdapterConflict(AdapterError):
    """The name is in use by other content or by a task."""


class VersionMismatch(AdapterError):
    """Compare-and-set failed: the name is at another version."""


class NoRoom(AdapterError):
    """The adapter or mix exceeds its memory budget."""


class StoreFailed(AdapterError):
    """A disk or system error; the state is unchanged."""


class InvalidData(AdapterError):
    """A line of a data file is not usable; the message gives its number."""


class Diverged(AdapterError):
    """Training produced values that are not finite; a lower learning rate may help."""


class TrainingStopped(AdapterError):
    """Training was stopped after its checkpoint was written; it can be resumed."""


def unreadable(file: str, error: Exception) -> AdapterError:
    """Return the error for a file that cannot be read: StoreFailed for a system error, else InvalidAdapter.

    The message has no path of this machine.
    """
    message = f"{file} cannot be read: {error_text(error)}"
    of_system = isinstance(error, OSError) and error.errno in RESOURCE_ERRORS
    return StoreFailed(message, file) if of_system else InvalidAdapter(message, file)


def error_text(error: Exception) -> str:
    """Return the text of an error without the path that an OSError carries."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    # pathlib raises RuntimeError, with the path, for a link to itself.
    return "it is a link to itself" if isinstance(error, RuntimeError) else str(error)
