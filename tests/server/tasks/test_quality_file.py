"""The file of the quality records on a disk that is full, or nearly."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import StoreFailed
from server.tasks.quality import Quality


@pytest.mark.parametrize(("left", "full"), [(4096, True), (1 << 30, False)])
def test_a_disk_with_a_few_bytes_left_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, full: bool
) -> None:
    """That of the file, whatever another one has."""
    file, connect = tmp_path / "quality.db", sqlite3.connect
    Quality(file).close()

    class Refusing:
        def execute(self, *_: Any) -> Any:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error

        def close(self) -> None: ...

    monkeypatch.setattr(sqlite3, "connect", lambda at, **how: Refusing() if at == file else connect(at, **how))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: SimpleNamespace(free=left if Path(at) == tmp_path else (1 << 30) + 4096 - left)
    )
    if full:
        Quality(file).close()
    else:
        with pytest.raises(StoreFailed, match="disk I/O error"):
            Quality(file)
