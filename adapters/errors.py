"""The exceptions of this package. Each message says what is wrong and what to do.

AdapterError
├── InvalidAdapter        the folder or file cannot be read as a LoRA (truncated, missing, not finite, ...)
│   └── UnsupportedAdapter   it is a LoRA, but asks for something that is no sum of B A x; named in the message
├── BaseMismatch          its modules or shapes are not those of the base that is served
├── InvalidChoice         a choice names one adapter twice, has a weight that is not finite, or is too long
├── UnknownAdapter        no adapter, or no version, of that name
├── AdapterConflict       the name is in use: by other content, or by a task
├── VersionMismatch       compare-and-set: the name is not at the version that the caller expected
├── NoRoom                it does not fit the budget, and never could
├── StoreFailed           the disk or the machine refused (full, read-only, out of files); nothing was changed
├── InvalidData           a training or evaluation line is not usable; names the line
└── TrainingStopped       somebody asked for it; the checkpoint is written
"""

import errno

MACHINE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that tell of this machine at this moment, and nothing of the file that was asked for."""


MOST_TOLD = 1000
"""Characters of a message or a name: files name things at any length, and what is said of one is listed and logged."""


def encodable(text: str) -> str:
    """A text as it can be sent: halves of surrogate pairs, which JSON's escapes can name, as escapes again."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(text: str) -> str:
    """A text as it is told: such that it can be sent, and of one that is too long the beginning and the end."""
    text = encodable(text)
    return text if len(text) <= MOST_TOLD else f"{text[: MOST_TOLD // 2]} ... {text[-MOST_TOLD // 2 :]}"


class AdapterError(Exception):
    """Base of all errors about adapters. `param` names the input that is at fault, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message = shortened(message)
        self.param = None if param is None else shortened(param)
        super().__init__(self.message)


class InvalidAdapter(AdapterError):
    """The folder or file cannot be read as a LoRA adapter."""


class UnsupportedAdapter(InvalidAdapter):
    """The adapter needs something that this round does not serve; the message names it."""


class BaseMismatch(AdapterError):
    """The adapter's modules or shapes are not those of the resident base."""


class InvalidChoice(AdapterError):
    """A choice cannot be made into a mix."""


class UnknownAdapter(AdapterError):
    """No adapter or version is known by that name."""


class AdapterConflict(AdapterError):
    """The name is taken, or routed to by a task."""


class VersionMismatch(AdapterError):
    """Compare-and-set failed: the name points to another version than expected."""


class NoRoom(AdapterError):
    """The adapter, or the mix, could never fit into its budget."""


class StoreFailed(AdapterError):
    """The disk refused a write or a read; the state is what it was before."""


class InvalidData(AdapterError):
    """A line of a data file is not usable; the message gives its number and what is wrong."""


class Diverged(AdapterError):
    """A training run came to numbers that are not finite; by a lower learning rate it may not."""


class TrainingStopped(AdapterError):
    """A training run was asked to stop, and did after writing its checkpoint; it can be resumed from there."""


def unreadable(file: str, error: Exception) -> AdapterError:
    """What to raise for a file of an adapter that cannot be read, without a path of this machine.

    InvalidAdapter, or StoreFailed where it is the machine that has no more of something: the file may be good.
    """
    told = f"{file} cannot be read: {reason(error)}"
    lacking = isinstance(error, OSError) and error.errno in MACHINE
    return StoreFailed(told, file) if lacking else InvalidAdapter(told, file)


def reason(error: Exception) -> str:
    """What an error says, without the path that one about a file carries."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    # What pathlib says of a link to itself, with its path.
    return "it is a link to itself" if isinstance(error, RuntimeError) else str(error)
