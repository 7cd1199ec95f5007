"""`Sources`: opens an adapter's `source` as a local folder."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ParamSpec, TypeVar

from server.errors import InvalidRequest
from server.sources import folder, hub, urls
from server.sources.budget import Budget, Spend

P = ParamSpec("P")
R = TypeVar("R")

_PREFIX = "fetch-"


class Sources:
    """The places that adapters may come from.

    Args:
        directory: The adapter directory.
        scratch: Where downloads go. Leftovers of an earlier process are removed.
        hub_allow: Hub ids that may be downloaded (org/name, or org/* for an organization).
        url_allow: URL prefixes that may be downloaded.
        max_bytes: Limit of one adapter. `disk` limits all downloads at one time, `seconds` the duration of each.
    """

    def __init__(
        self,
        directory: Path,
        scratch: Path,
        *,
        hub_allow: Sequence[str] = (),
        url_allow: Sequence[str] = (),
        max_bytes: int = 1 << 30,
        disk: int = 4 << 30,
        seconds: float = 300.0,
    ) -> None:
        self._directory, self._scratch = directory, scratch
        self._hub_allow, self._url_allow = tuple(hub_allow), tuple(url_allow)
        self._max_bytes, self._seconds = max_bytes, seconds
        self.budget = Budget(disk)
        for leftover in scratch.glob(f"{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @asynccontextmanager
    async def open(self, source: str) -> AsyncIterator[tuple[Path, Path]]:
        """Yield the folder of `source`, and the directory that links in it may not leave.

        Downloads are deleted when the context ends.

        Args:
            source: A path inside the adapter directory, `org/name@revision`, or a URL.

        Raises:
            InvalidRequest: the source is not allowed or cannot be read.
            NoCapacity, QueueFull: the disk budget is too small or in use.
            OSError: the disk is full or fails.
        """
        if urls.is_url(source):
            url = urls.check(source, self._url_allow)
            async with self._download() as (directory, spend):
                await self._with_deadline(
                    directory,
                    urls.fetch,
                    url,
                    directory,
                    max_bytes=self._max_bytes,
                    seconds=self._seconds,
                    spend=spend,
                )
                yield directory, directory
            return
        found = await asyncio.to_thread(folder.resolve_inside, source, self._directory)
        if found is not None:
            yield found, self._directory
        elif hub.is_id(source) and self._is_hub_allowed(source):
            async with self._download() as (directory, spend):
                fetched = await self._with_deadline(
                    directory, hub.fetch_adapter, source, directory, self._max_bytes, spend
                )
                yield fetched, directory
        else:
            better = await asyncio.to_thread(folder.suggestion, source, self._directory)
            hint = f"; did you mean {better!r}?" if better else ""
            raise InvalidRequest(
                "the source is neither a folder relative to the adapter directory, nor a hub id that --hub-allow "
                f"permits{hint}",
                "source",
            )

    def _is_hub_allowed(self, source: str) -> bool:
        repo = source.partition("@")[0]
        return any(fnmatchcase(repo, pattern) for pattern in self._hub_allow)

    async def _with_deadline(self, directory: Path, fetch: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Run `fetch` in a daemon thread, and give up after the time limit.

        A source that hangs blocks only its own thread. If it ends later, its files in `directory` are removed.
        """
        given_up = threading.Event()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[R] = loop.create_future()

        def settle(result: R | None, error: Exception | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = fetch(*args, **options)
            except BaseException as raised:  # libraries in Rust panic with BaseExceptions
                error = raised if isinstance(raised, Exception) else RuntimeError(str(raised))
            if given_up.is_set():
                shutil.rmtree(directory, ignore_errors=True)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, name="fetch", daemon=True).start()
        try:
            async with asyncio.timeout(self._seconds):
                return await done
        except TimeoutError:
            raise InvalidRequest(f"the source did not answer within {self._seconds:g} s", "source") from None
        finally:
            given_up.set()

    @asynccontextmanager
    async def _download(self) -> AsyncIterator[tuple[Path, Spend]]:
        """Yield a temporary directory and the account of its bytes."""

        def make() -> Path:
            self._scratch.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._scratch))

        directory = await asyncio.to_thread(make)
        try:
            with self.budget.account() as spend:
                yield directory, spend
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, True)
