"""`crash_report`: what a process says if a signal ends it, such as a crash in native code, where no Python
runs any more.

Owns the text's memory, which lives as long as the process. Does not know what is said.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from server.kernels.cpu import bindings, unavailable

SIZE = 1 << 14
"""Bytes that are said at most."""


@lru_cache(maxsize=1)
def crash_report() -> Callable[[str], None]:
    """A function that keeps a text for that moment, in a microsecond; where there is no library it does nothing.

    It is the only one of the process. Its line comes before what `faulthandler` prints, if that was enabled earlier.
    """
    if unavailable() is not None:
        return lambda text: None
    buffer = ctypes.create_string_buffer(b"nothing", SIZE)  # its last byte stays 0
    bindings.library().loramux_crash_report(buffer)
    address = ctypes.addressof(buffer)

    def keep(text: str, buffer: object = buffer) -> None:
        said = text.encode("ascii", "replace")[: SIZE - 2] + b"\0"
        ctypes.memmove(address, said, len(said))

    return keep
