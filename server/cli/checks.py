"""Checks before the server starts: the state directory is writable, and the address is free."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from pathlib import Path

from server.errors import BadSetting


def check_state_dir(state_dir: Path) -> Path:
    """Check that the state directory can be written and no other process uses it. Creates nothing.

    Returns:
        The existing folder: `state_dir`, or the parent in which it would be created.

    Raises:
        BadSetting: it cannot be written, or it is in use.
    """
    store = state_dir / "store"
    try:
        existing = next(folder for folder in (state_dir, *state_dir.absolute().parents) if _exists(folder))
        for folder in (existing, store, store / "versions", store / "incoming"):
            if folder == existing or _exists(folder):
                tempfile.TemporaryFile(dir=folder).close()
        if _exists(store / "lock"):
            with (store / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadSetting(
            f"The state directory {state_dir} is in use by another process. Stop that process, or choose another "
            "directory with --state-dir.",
            "state_dir",
        ) from None
    except OSError as e:
        user = f" Give user {os.geteuid()} write permission, or" if isinstance(e, PermissionError) else " Please"
        raise BadSetting(
            f"The state directory {state_dir} cannot be written: {e.strerror or e}.{user} choose another directory "
            "with --state-dir.",
            "state_dir",
        ) from None
    return existing


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Port 0 picks a free port. Raises BadSetting if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        dual_stack = address[0] == "::" and socket.has_dualstack_ipv6()  # accept IPv4 too
        return socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=dual_stack)
    except (OSError, OverflowError, UnicodeError) as e:
        number = getattr(e, "errno", None) or 0  # negative if the name is unknown
        reason = os.strerror(number) if number > 0 else getattr(e, "strerror", None) or str(e)
        is_host = isinstance(e, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL
        advice = (
            "Set --host to an address of this machine." if is_host else "Choose another --port; 0 picks a free one."
        )
        param = "host" if is_host else "port"
        raise BadSetting(f"Cannot listen on {host}:{port}: {reason}. {advice}", param) from None


def _exists(path: Path) -> bool:
    """Like Path.exists, but raises OSError if it cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
