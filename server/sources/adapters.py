"""`Sources.open`: what a client's `source` says, as a folder on this machine for as long as it is being read."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from server.errors import InvalidRequest
from server.sources import folder, hub, urls
from server.sources.budget import Budget, Spend

P = ParamSpec("P")
R = TypeVar("R")

_PREFIX = "fetch-"


class Sources:
    """The places that adapters may come from.

    `directory` is the user's adapter directory. `hub_allow` has hub ids (org/name, or org/* for all of an
    organization) and `url_allow` URL prefixes; both are empty unless the operator says otherwise. Fetched files go to
    `scratch`, at most `max_bytes` an adapter and `disk` bytes in all at one time, within `seconds`. What an earlier
    process left in `scratch` is removed.
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
        for left in scratch.glob(f"{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    @asynccontextmanager
    async def open(self, source: str) -> AsyncIterator[tuple[Path, Path]]:
        """The folder of `source`, and the directory that links in it may not leave.

        `source` is a path inside the adapter directory, `org/name@revision`, or a URL. What was fetched is gone when
        the context ends. Raises InvalidRequest, with the reason; NoCapacity or QueueFull if the disk budget is too
        small or used up; OSError if the disk refuses.
        """
        if urls.is_url(source):
            url = urls.check(source, self._url_allow)
            async with self._temporary() as (place, spend):
                limits: dict[str, Any] = {"max_bytes": self._max_bytes, "seconds": self._seconds}
                await self._limited(place, urls.fetch, url, place, **limits, spend=spend)
                yield place, place
            return
        found = await asyncio.to_thread(folder.inside, source, self._directory)
        if found is not None:
            yield found, self._directory
        elif hub.is_id(source) and self._hub_allowed(source):
            async with self._temporary() as (place, spend):
                fetched = await self._limited(place, hub.fetch_adapter, source, place, self._max_bytes, spend)
                yield fetched, place
        else:
            meant = await asyncio.to_thread(folder.meant, source, self._directory)
            how = f": give it as {meant!r}" if meant else ", as `formal`"
            raise InvalidRequest(
                f"the source is no folder inside the adapter directory (a path from there on{how}), and no hub id that "
                "--hub-allow names",
                "source",
            )

    def _hub_allowed(self, source: str) -> bool:
        repo = source.partition("@")[0]
        return any(fnmatchcase(repo, pattern) for pattern in self._hub_allow)

    async def _limited(self, place: Path, fetch: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """`fetch` into `place` in a thread of its own, given up after the time limit.

        A source that hangs costs that thread, no more: it is none of a pool's, and the process ends without it. What
        it still writes once nobody waits for it, it takes away.
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
                done.set_result(cast(R, result))

        def run() -> None:
            result, error = None, None
            try:
                result = fetch(*args, **options)
            except BaseException as e:  # a panic of a library is no Exception, and who waits has to hear of it
                error = e if isinstance(e, Exception) else RuntimeError(str(e))
            if given_up.is_set():
                shutil.rmtree(place, ignore_errors=True)
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
    async def _temporary(self) -> AsyncIterator[tuple[Path, Spend]]:
        def make() -> Path:
            self._scratch.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._scratch))

        place = await asyncio.to_thread(make)
        try:
            with self.budget.account() as spend:
                yield place, spend
        finally:
            await asyncio.to_thread(shutil.rmtree, place, True)
