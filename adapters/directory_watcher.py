"""`DirectoryWatcher`: the user's directory of adapters becomes what is served; `scan_library`: so do the
adapters that ship.

Owns when a folder is read, when it is not read again, and what is told of the ones that are refused. Writes nothing
there. Does not read adapters itself: the registry does, from its own copy.

A folder is taken in when both files are there and they, and what is copied to be one, have not changed for a second,
and again only when its content changes; so an adapter that was deleted or replaced through the API stays so. Where the
config alone is another than before, that takes longer: the tensors may be on their way. A folder that is removed while
it is watched takes its adapter with it, unless the name has got other content since, or was published with the same;
what it was put over, the library's or what was published, is served again.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from adapters.catalog_state import LIBRARY, WATCH, FolderSignature, ImportedFolder
from adapters.errors import AdapterError, InvalidAdapter, NoRoom, StoreFailed, reason, unreadable
from adapters.format_hints import (
    MAX_ENTRIES,
    MODEL_FILE,
    WHOLE_MODEL,
    folders_with,
    leads_out,
    lying_loose,
    shown,
    told_below,
)
from adapters.peft_format import CONFIG_FILE, OPTIONAL, REQUIRED, TENSOR_FILE
from adapters.registry import Registry

log = logging.getLogger(__name__)

SHARE = 0.02
"""Of one processor, what looking takes at most, reading not counted: of thousands of folders it looks less often."""
RETRY_SECONDS = 30.0
"""After how long a folder is tried again that failed for want of room, which its content says nothing about."""
CONFIG_SECONDS = 5.0
"""How long a folder must not have changed whose config alone is new: copies go by name, and tensors may be coming."""
MAX_LINES = 10
"""How many adapters are named in the log whose folders are gone."""
_STEMS = tuple(name.split(".")[0] for name in REQUIRED)
MODEL_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class _Seen:
    """The state of what is in a folder, and since when on the monotonic clock it is so."""

    signature: FolderSignature
    since: float


@dataclass(frozen=True)
class _Refused:
    signature: FolderSignature
    retry_at: float | None


HERE = "."
"""The adapter directory itself, among what is refused."""

LOST = "lost+found"
"""What a file system keeps where it is mounted, for nobody else to read."""

GONE_SECONDS = 3.0
"""How long a folder must have been away before its adapter is retired."""


class DirectoryWatcher:
    """Looks at `directory` every `interval` seconds, or less often if there is that much to look at. `still` are the
    seconds that a folder must not have changed before it is read. `library` is where those are looked at again that a
    folder was put over. `clock` is monotonic.
    """

    def __init__(
        self,
        registry: Registry,
        directory: Path,
        *,
        library: Path | None = None,
        interval: float = 1.0,
        still: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._library = library
        self._interval = interval
        self._still = still
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._refused: dict[str, _Refused] = {}
        self._away: dict[str, float] = {}
        """Folders that were there and are not now, since when."""
        self._known: set[str] = set()
        """Folders that this process has seen and that adapters came from."""
        self._gone: set[str] = set()
        """Folders that adapters which are served came from, and that were not there at the first look."""
        self._unreadable = False
        self._first = True
        self._device: int | None = None
        """The file system that the directory was last seen on."""
        self._read = 0.0
        """Processor seconds of the last look that went into reading what had changed."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look now and then, on a thread. Call `poll` before, to have what is there served from the start."""
        self._thread = threading.Thread(target=self._run, name="loramux-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the folder that it may be at."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def poll(self) -> None:
        """Look once. Raises nothing that a folder is at fault for."""
        self._read = 0.0
        try:
            device = _device(self._directory)
            with os.scandir(self._directory) as entries:
                states = {entry.name: _state(entry) for entry in entries if entry.name[0] != "." and entry.name != LOST}
        except FileNotFoundError:  # nobody has to have one, and a mount that is away is no deletion
            if not (self._unreadable or self._first):
                log.info("the adapter directory is not there any more; its adapters are served on")
            self._unreadable = True
            return
        except OSError as error:
            if not self._unreadable:  # its adapters are served on: a mount that is away is no deletion
                log.warning("the adapter directory %s cannot be read: %s", self._directory, error.strerror)
            self._unreadable = True
            return
        self._unreadable = False
        if self._device not in (None, device):
            log.info("the adapter directory is on another file system now; what is not there is served on")
            self._known.clear()
            self._first = True
        self._device = device
        there = sorted(name for name, state in states.items() if state is not False)
        if self._first:
            self._first = False
            gone = sorted(self._taken_before() - set(there))
            self._gone = set(gone)
            for folder in gone[:MAX_LINES]:
                log.info("%s is served from the store; its folder is gone", folder)
            if gone[MAX_LINES:]:
                log.info("%d more are served from the store; their folders are gone", len(gone) - MAX_LINES)
        for folder in there:
            if self._stop.is_set():  # there may be hundreds to take in, and the process has seconds
                return
            if isinstance(why := states[folder], str):  # what cannot be read is not gone
                self._away.pop(folder, None)
                self._refuse(folder, (), f"cannot be read: {why}")
            else:
                self._look(folder)
        if there:  # else the mount of all of them may be away
            self._forget_deleted(states)
        there += self._refuse_loose(states.keys() - set(there), set(there))
        if CONFIG_FILE in states:
            self._refuse(
                HERE,
                (),
                f"{CONFIG_FILE} lies in the adapter directory itself: move the adapter's files into a folder of their "
                "own, whose name is the adapter's",
            )
            there.append(HERE)
        for folder in (self._known | set(self._refused) | set(self._seen)) - set(there):
            self._miss(folder)

    def _forget_deleted(self, there: Iterable[str]) -> None:
        """Of what was served on without its folder and has been deleted since, nothing need be remembered: the folder
        counts as one that was seen, and has been removed.
        """
        self._gone.difference_update(there)
        if self._gone and (deleted := self._gone.difference(self._registry.names())):
            self._gone -= deleted
            self._known |= deleted

    def _refuse_loose(self, files: Collection[str], folders: Collection[str]) -> list[str]:
        """Tell of adapters that lie beside the folders in a single file. Answers their names."""
        loose = {name: told for name in sorted(files) if (told := lying_loose(name, folders, CONFIG_FILE)) is not None}
        if CONFIG_FILE in files:  # they are told of together
            loose.pop(TENSOR_FILE, None)
        for name, told in loose.items():
            self._refuse(name, (), told)
        return list(loose)

    def _run(self) -> None:
        took = 0.0
        while not self._stop.wait(max(self._interval, took / SHARE)):
            before = time.thread_time()
            try:
                self.poll()
            except BaseException:  # one look that fails must not be the last, and a library's panic is no Exception
                log.exception("looking at the adapter directory failed")
            took = time.thread_time() - before - self._read

    def _look(self, folder: str) -> None:
        try:
            signature = signature_of(self._directory / folder, self._directory)
        except AdapterError as error:
            self._away.pop(folder, None)
            self._refuse(folder, (), error.message)
            return
        now = self._clock()
        if not signature:  # no adapter, or none any more
            instead, state = _instead_of_an_adapter(self._directory / folder)
            if instead and folder not in self._known:
                self._refuse_other(folder, f"{CONFIG_FILE} is missing{instead}", state, now)
            else:
                self._miss(folder)
            return
        self._away.pop(folder, None)
        taken = self._registry.imported_folder(origin(WATCH, folder))
        if taken is not None and taken.signature == signature:
            self._known.add(folder)
            self._settle(folder)
            return
        refused = self._refused.get(folder)
        if refused is not None and refused.signature == signature and not _due(refused.retry_at, now):
            return
        early = taken is not None and _is_config_alone(taken, signature)
        seconds = max(self._still, CONFIG_SECONDS) if early else self._still
        copies = _copies(self._directory / folder)
        if copies is not None and self._is_still(folder, signature + copies, now, seconds):
            before = time.thread_time()
            self._take_in(folder, signature, now)
            self._read += time.thread_time() - before

    def _refuse_other(self, folder: str, reason: str, signature: FolderSignature, now: float) -> None:
        """`folder` is no adapter, unless it is being copied and its own files come last."""
        self._away.pop(folder, None)
        refused = self._refused.get(folder)
        if (refused is None or refused.signature != signature) and self._is_still(folder, signature, now, self._still):
            self._seen.pop(folder, None)
            self._refuse(folder, signature, reason)

    def _is_still(self, folder: str, signature: FolderSignature, now: float, seconds: float) -> bool:
        """Whether nothing of what is in the folder has changed for so long."""
        seen = self._seen.get(folder)
        if seen is None or seen.signature != signature:
            seen = self._seen[folder] = _Seen(signature, now)
        return now - seen.since >= seconds or _old(signature, seconds)

    def _taken_before(self) -> set[str]:
        """The folders whose content is served, as far as the store remembers."""
        served = {name: self._registry.imported_folder(origin(WATCH, name)) for name in self._registry.names()}
        return {name for name, taken in served.items() if taken and self._registry.is_current(name, taken.digest)}

    def _take_in(self, folder: str, signature: FolderSignature, now: float) -> None:
        try:
            published = self._registry.publish_now(
                folder,
                self._directory / folder,
                source=WATCH,
                within=self._directory,
                imported=(origin(WATCH, folder), signature),
            )
        except AdapterError as error:
            retry_at = now + RETRY_SECONDS if isinstance(error, (StoreFailed, NoRoom)) else None
            self._refuse(folder, signature, error.message, retry_at)
            return
        except BaseException:  # a fault of ours, which must not keep the other folders from being served
            log.exception("%s cannot be taken in", shown(folder))
            self._refuse(folder, signature, "the server failed on it; its log says how", now + RETRY_SECONDS)
            return
        self._known.add(folder)
        self._settle(folder)
        if published.created:
            log.info("%s is served from its folder", published.version.label)

    def _refuse(self, folder: str, signature: FolderSignature, reason: str, retry_at: float | None = None) -> None:
        """`folder` is not served as it is; it is looked at again once it has changed, or at `retry_at`."""
        self._refused[folder] = _Refused(signature, retry_at)
        self._registry.rejections.add(shown(folder), reason)

    def _settle(self, folder: str) -> None:
        """Nothing is to be done about `folder` until it changes."""
        self._seen.pop(folder, None)
        self._refused.pop(folder, None)
        self._registry.rejections.drop(shown(folder))

    def _miss(self, folder: str) -> None:
        """`folder` is not there, or holds nothing: the adapter that came from it goes too, if it stays so."""
        since = self._away.setdefault(folder, self._clock())
        if folder in self._known and self._clock() - since < GONE_SECONDS:
            return
        self._settle(folder)
        self._away.pop(folder, None)
        if folder not in self._known:
            return
        try:
            lost = self._registry.remove_folder(folder, origin(WATCH, folder))
        except AdapterError as error:  # it is tried again at the next look
            log.warning("%s was removed, but is not retired: %s", folder, error.message)
            return
        self._known.discard(folder)
        if lost and folder in self._registry.names(LIBRARY):
            log.info("%s is the library's again: the folder that was put over it was removed", folder)
            if self._library is not None:
                _scan(self._registry, self._library / folder)
        elif lost and folder in self._registry.names():
            log.info("%s is again what was published before: the folder that was put over it was removed", folder)
        elif lost:
            log.info("%s is retired: its folder was removed", folder)


def scan_library(registry: Registry, library: Path) -> list[str]:
    """Register the adapters that ship in `library` and fit the base; one log line for each that is skipped.

    A newer content replaces what the library put there before, never what somebody else gave that name, and what was
    deleted stays deleted until its content changes. Answers the names that are served from it.
    """
    try:
        folders = sorted(path for path in library.iterdir() if path.is_dir() and path.name[0] not in "._")
    except OSError as error:
        log.warning("the library of adapters, %s, cannot be read: %s", library, error.strerror)
        return []
    return [folder.name for folder in folders if _scan(registry, folder)]


def _scan(registry: Registry, folder: Path) -> bool:
    """Register one adapter of the library. Answers whether it is served from there."""
    name, key = folder.name, origin(LIBRARY, folder.name)
    try:
        signature = signature_of(folder, None)
        if not signature:
            return False
        taken = registry.imported_folder(key)
        ours = taken is not None and registry.is_current(name, taken.digest)
        if name in registry.names() and not ours:
            log.info("the library's %s is skipped: the name has another adapter", name)
            return False
        if taken is None or taken.signature != signature:
            registry.publish_now(name, folder, source=LIBRARY, imported=(key, signature))
        if name in registry.names():
            return True
        log.info("the library's %s is skipped: it was deleted, or was made for another base", name)
    except AdapterError as error:
        log.info("the library's %s is skipped: %s", name, error.message)
    except Exception:  # a fault of ours, which must not keep the server from starting
        log.exception("the library's %s is skipped", name)
    return False


def signature_of(folder: Path, within: Path | None) -> FolderSignature:
    """The state of the folder's files; empty if neither of the two that make an adapter is there.

    Raises InvalidAdapter for a link that leads out of `within`, which `folder` is an entry of, and that or StoreFailed
    where it cannot be told whether a file is there.
    """
    entries = []
    root = os.fspath(folder)
    linked = os.path.islink(root)
    for name in (*REQUIRED, *OPTIONAL):
        path = f"{root}/{name}"
        try:
            state = os.lstat(path)
            if linked or stat.S_ISLNK(state.st_mode):  # else there is nothing to follow: a thousand are looked at
                if within is not None and not Path(path).resolve().is_relative_to(within.resolve()):
                    raise InvalidAdapter(leads_out(name))
                state = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, RuntimeError) as error:  # a folder that may not be entered is no folder that was emptied
            raise unreadable(name, error) from None
        entries.append((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    return tuple(entries) if any(entry[0] in REQUIRED for entry in entries) else ()


def watched_folder_state(name: str, folder: Path, directory: Path) -> tuple[str, FolderSignature] | None:
    """What the registry is to remember of a `folder` that somebody publishes as `name`, if `directory` is watched and
    would give it that name too: a watch that has not seen it yet does not bring back what is deleted before it does.

    `folder` has no links in it. Raises InvalidAdapter and StoreFailed as `signature_of`.
    """
    if folder != directory.resolve() / name:
        return None
    return origin(WATCH, name), signature_of(folder, directory)


def _instead_of_an_adapter(folder: Path) -> tuple[str, FolderSignature]:
    """What a folder without an adapter's config holds that its owner may take for one, and the state of all files
    there: of all, since a folder that is being copied may get its own config last. Empty if it holds nothing such.
    """
    try:
        if below := folders_with(folder, CONFIG_FILE):
            told = told_below(below, "register", folder, "under a name")
            return told, sum((_files(folder, name) for name in ("", *below)), ())
        if (folder / MODEL_FILE).is_file():
            files = _files(folder, "")
            if any(name.endswith(MODEL_WEIGHTS) for name, *_ in files):
                return f": {WHOLE_MODEL}", files
    except OSError:  # it goes as we look, or is not to be read
        return "", ()
    return "", ()


def _copies(folder: Path) -> FolderSignature | None:
    """The state of what may become one of the two files, as far as the folder may be listed; None if something goes as
    we look. What copies a file writes it under another name first, mostly a hidden one, which has the file's within.
    """
    try:
        return tuple(state for state in _files(folder, "", every=True) if any(part in state[0] for part in _STEMS))
    except PermissionError:
        return ()
    except OSError:
        return None


def _is_config_alone(taken: ImportedFolder, signature: FolderSignature) -> bool:
    """Whether the config has been replaced since the folder was `taken` in, and the tensors have not."""
    before, now = ({file[0]: file for file in files} for files in (taken.signature, signature))
    return before.get(CONFIG_FILE) != now.get(CONFIG_FILE) and before.get(TENSOR_FILE) == now.get(TENSOR_FILE)


def _files(folder: Path, below: str, every: bool = False) -> FolderSignature:
    """The states of the files in a folder below `folder`, sorted, without what is hidden; links are taken for files.
    With `every` those of folders, and of what is hidden, too.
    """
    files = []
    with os.scandir(folder / below) as entries:
        for entry in islice(entries, MAX_ENTRIES):
            if every or (entry.name[0] != "." and not entry.is_dir(follow_symlinks=False)):
                state = entry.stat(follow_symlinks=False)
                name = f"{below}/{entry.name}" if below else entry.name
                files.append((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    return tuple(sorted(files))


def origin(kind: str, folder: str) -> str:
    """The key under which it is remembered what a folder held."""
    return f"{kind}/{shown(folder)}"


def _device(directory: Path) -> int:
    """Another one where something was mounted or unmounted there, which is no deletion."""
    return directory.stat().st_dev


def _state(entry: os.DirEntry[str]) -> bool | str:
    """Whether it is a folder, or why that cannot be told."""
    try:
        return entry.is_dir()
    except OSError as error:
        return reason(error)


def _old(signature: FolderSignature, seconds: float) -> bool:
    """Whether all files were left alone for `seconds`, by the wall clock; if that jumped, we wait and see."""
    newest = max(max(mtime, ctime) for _, _, mtime, ctime, _ in signature)
    return newest < time.time_ns() - int(seconds * 1e9)


def _due(retry_at: float | None, now: float) -> bool:
    return retry_at is not None and now >= retry_at
