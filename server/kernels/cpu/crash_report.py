"""Text that is printed if a signal kills the process in native code, where no Python runs any more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from server.kernels.cpu import bindings, unavailable

SIZE = 1 << 14
"""Most bytes of the text."""


@lru_cache(maxsize=1)
def crash_report() -> Callable[[str], None]:
    """A function that sets the text, in about a microsecond. It does nothing without the native library.

    The text is printed before the output of `faulthandler`, if that was enabled earlier.
    """
    if unavailable() is not None:
        return lambda text: None
    buffer = ctypes.create_string_buffer(b"nothing", SIZE)  # its last byte stays 0
    bindings.library().loramux_crash_report(buffer)
    address = ctypes.addressof(buffer)

    def set_text(text: str, buffer: object = buffer) -> None:
        encoded = text.encode("ascii", "replace")[: SIZE - 2] + b"\0"
        ctypes.memmove(address, encoded, len(encoded))

    return set_text
