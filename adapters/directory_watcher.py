"""`DirectoryWatcher`: serves the adapters in the user's directory. `scan_library`: serves the bundled adapters.

A folder is imported when it has been unchanged for a second, and again only when its content changes; so an adapter
that was deleted or replaced through the API stays so. If only the config has changed, the wait is longer, since the
tensors may still be copied. Removing a folder retires its adapter, unless the name has other content meanwhile; the
version that the folder replaced is served again. Nothing is written to the directory.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from watchfiles import watch

from adapters.catalog_state import LIBRARY, WATCH, FolderSignature, ImportedFolder
from adapters.errors import AdapterError, InvalidAdapter, NoRoom, StoreFailed, unreadable
from adapters.format_hints import (
    MODEL_CONFIG,
    WHOLE_MODEL,
    folders_with,
    nested_folder_hint,
    outside_error,
    printable,
    stray_file_hint,
)
from adapters.peft_format import CONFIG_FILE, OPTIONAL, REQUIRED, TENSOR_FILE
from adapters.registry import Registry

log = logging.getLogger(__name__)

STILL_SECONDS = 1.0
"""How long a folder must be unchanged before it is imported."""
CONFIG_SECONDS = 5.0
"""The same if only its config has changed."""
REMOVED_SECONDS = 3.0
"""How long a folder must be gone before its adapter is retired."""
SCAN_SECONDS = 30.0
"""Interval of full scans, for file systems without change events, and for retries after a lack of room."""
EVENT_MILLISECONDS = 250
"""How long the thread waits for change events before it looks at pending folders."""
MAX_LOGGED = 10
HERE = "."
"""The key of the adapter directory itself among the rejections."""
IGNORED = "lost+found"
MODEL_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class _Seen:
    """The state of a folder's files, and since when it is unchanged (monotonic seconds)."""

    signature: FolderSignature
    since: float


@dataclass(frozen=True)
class _Rejected:
    signature: FolderSignature
    retry_at: float | None


class DirectoryWatcher:
    """Imports, updates and retires the adapters of a directory.

    Args:
        registry: where adapters are published.
        directory: the watched directory; it need not exist.
        library: the bundled adapters, restored when a folder that replaced one is removed.
        force_polling: poll instead of using the operating system's change events.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        registry: Registry,
        directory: Path,
        *,
        library: Path | None = None,
        force_polling: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._library = library
        self._force_polling = force_polling
        self._clock = clock
        self._pending: dict[str, _Seen] = {}
        """Folders that have changed and are not handled yet."""
        self._event_at: dict[str, float] = {}
        """The last change event of each pending folder."""
        self._rejected: dict[str, _Rejected] = {}
        self._imported: set[str] = set()
        """Folders that exist, or existed during this process, and that adapters came from."""
        self._identity: tuple[int, int] | None = None
        """Device and inode of the directory."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. Call `scan` before, so that existing adapters are served from the start."""
        self._thread = threading.Thread(target=self._run, name="loramux-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; an import that is running is finished."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def scan(self) -> None:
        """Look at every folder of the directory once."""
        try:
            identity = _identity(self._directory)
            with os.scandir(self._directory) as entries:
                names = {entry.name: _is_folder(entry) for entry in entries if not _is_ignored(entry.name)}
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("the adapter directory %s cannot be read: %s", self._directory, error.strerror)
            return
        first = self._identity is None
        if self._identity not in (None, identity):  # something was mounted or unmounted: no folder was removed
            self._imported.clear()
        self._identity = identity
        folders = {name for name, is_folder in names.items() if is_folder}
        if first:
            self._log_missing(folders)
        for folder in sorted(folders):
            if self._stop.is_set():
                return
            self._check(folder)
        if folders:
            self._forget_deleted(folders)
        stray = self._reject_stray_files(names.keys() - folders, folders)
        for name in (self._imported | self._rejected.keys() | self._pending.keys()) - folders - stray:
            self._check_removed(name)

    def _run(self) -> None:
        """Thread: handle change events, and scan everything now and then."""
        while not self._stop.is_set():
            next_scan = self._clock()
            try:
                for changes in watch(
                    self._directory,
                    watch_filter=None,
                    debounce=EVENT_MILLISECONDS,
                    rust_timeout=EVENT_MILLISECONDS,
                    yield_on_timeout=True,
                    stop_event=self._stop,
                    force_polling=self._force_polling or None,
                    raise_interrupt=False,
                ):
                    changed = self._note_events(path for _, path in changes)
                    if changed or self._clock() >= next_scan:
                        self.scan()
                        next_scan = self._clock() + SCAN_SECONDS
                    for folder in sorted(self._pending.keys() | self._event_at.keys()):
                        self._check(folder)
                    if _identity(self._directory) != self._identity:  # removed or replaced: watch the new one
                        break
            except FileNotFoundError:  # there is no directory yet
                pass
            except BaseException:  # the watch must go on; a panic of a Rust library is not an Exception
                log.exception("watching the adapter directory failed")
            self._stop.wait(STILL_SECONDS)

    def _note_events(self, paths: Iterable[str]) -> bool:
        """Record change events per folder. Returns whether something other than a known folder has changed."""
        other = False
        for path in paths:
            name = os.path.relpath(path, self._directory).split(os.sep)[0]
            if _is_ignored(name):
                continue
            if name in self._imported or (self._directory / name).is_dir():
                self._event_at[name] = self._clock()
            else:
                other = True
        return other

    def _check(self, folder: str) -> None:
        """Import, reject or retire one folder, if its state has been unchanged long enough."""
        try:
            signature = signature_of(self._directory / folder, self._directory)
        except AdapterError as error:
            self._reject(folder, (), error.message)
            return
        if not signature:
            self._check_removed(folder)
            return
        imported = self._registry.imported_folder(folder_key(WATCH, folder))
        if imported is not None and imported.signature == signature:
            self._imported.add(folder)
            self._settle(folder)
            return
        rejected = self._rejected.get(folder)
        if rejected and rejected.signature == signature and not self._is_due(rejected):
            self._forget_change(folder)
            return
        only_config = imported is not None and _only_config_changed(imported, signature)
        if self._is_still(folder, signature, CONFIG_SECONDS if only_config else STILL_SECONDS):
            self._import(folder, signature)

    def _check_removed(self, folder: str) -> None:
        """Handle a folder that is gone or holds no adapter."""
        hint = "" if folder in self._imported or folder == HERE else _other_content(self._directory / folder)
        if hint:
            if self._is_still(folder, (), STILL_SECONDS):
                self._reject(folder, (), f"{CONFIG_FILE} is missing{hint}")
            return
        if folder in self._imported:
            if not self._is_still(folder, (), REMOVED_SECONDS):
                return
            if not self._remove(folder):
                return
        self._settle(folder)

    def _is_still(self, folder: str, signature: FolderSignature, seconds: float) -> bool:
        """Return whether the folder has been unchanged for so long."""
        now = self._clock()
        seen = self._pending.get(folder)
        if seen is None or seen.signature != signature:
            seen = self._pending[folder] = _Seen(signature, now)
        if folder not in self._event_at and _older_than(signature, seconds):
            return True
        return now - max(seen.since, self._event_at.get(folder, seen.since)) >= seconds

    def _import(self, folder: str, signature: FolderSignature) -> None:
        try:
            published = self._registry.publish_now(
                folder,
                self._directory / folder,
                source=WATCH,
                within=self._directory,
                imported=(folder_key(WATCH, folder), signature),
            )
        except AdapterError as error:
            retry = isinstance(error, (StoreFailed, NoRoom))
            self._reject(folder, signature, error.message, retry)
        except BaseException:  # must not keep the other folders from being served
            log.exception("%s cannot be imported", printable(folder))
            self._reject(folder, signature, "the server failed to read it; see its log", retry=True)
        else:
            self._imported.add(folder)
            self._settle(folder)
            if published.created:
                log.info("%s is served from its folder", published.version.label)

    def _remove(self, folder: str) -> bool:
        """Undo what a removed folder published. Returns false if that failed and must be tried again."""
        try:
            changed = self._registry.remove_folder(folder, folder_key(WATCH, folder))
        except AdapterError as error:
            log.warning("the folder %s was removed, but its adapter is not retired: %s", folder, error.message)
            return False
        self._imported.discard(folder)
        if changed and folder in self._registry.names(LIBRARY):
            log.info("%s: the folder was removed; the library's adapter is served again", folder)
            if self._library is not None:
                _import_from_library(self._registry, self._library / folder)
        elif changed and folder in self._registry.names():
            log.info("%s: the folder was removed; the version that it replaced is served again", folder)
        elif changed:
            log.info("%s is retired: its folder was removed", folder)
        return True

    def _forget_deleted(self, folders: Collection[str]) -> None:
        """Forget folders that are gone and whose adapters were deleted: put back, they are imported again."""
        served = set(self._registry.names())
        for name in self._registry.imported_folders(WATCH):
            if name not in folders and name not in served and name not in self._imported:
                with suppress(StoreFailed):
                    self._registry.remove_folder(name, folder_key(WATCH, name))

    def _log_missing(self, folders: Collection[str]) -> None:
        """Log the adapters that are served although their folders are gone."""
        served = set(self._registry.names(WATCH))
        missing = [n for n in self._registry.imported_folders(WATCH) if n not in folders and n in served]
        if missing:
            more = f" and {len(missing) - MAX_LOGGED} more" if len(missing) > MAX_LOGGED else ""
            log.info("served from the store, without a folder: %s%s", ", ".join(missing[:MAX_LOGGED]), more)

    def _reject_stray_files(self, files: Collection[str], folders: Collection[str]) -> set[str]:
        """Reject adapters that are not in a folder of their own. Returns the keys of the rejections."""
        hints = {name: hint for name in files if (hint := stray_file_hint(name, folders, CONFIG_FILE)) is not None}
        if CONFIG_FILE in files:
            hints.pop(TENSOR_FILE, None)
            hints[HERE] = (
                f"{CONFIG_FILE} is in the adapter directory itself: move the adapter's files into a folder of their "
                "own, named after the adapter"
            )
        for name, hint in sorted(hints.items()):
            self._reject(name, (), hint)
        return set(hints)

    def _reject(self, folder: str, signature: FolderSignature, reason: str, retry: bool = False) -> None:
        """Record that a folder is not served. It is read again when it changes, or later with `retry`."""
        self._rejected[folder] = _Rejected(signature, self._clock() + SCAN_SECONDS if retry else None)
        self._forget_change(folder)
        self._registry.rejections.add(printable(folder), reason)

    def _settle(self, folder: str) -> None:
        """Nothing is to be done about a folder until it changes."""
        self._forget_change(folder)
        self._rejected.pop(folder, None)
        self._registry.rejections.remove(printable(folder))

    def _forget_change(self, folder: str) -> None:
        self._pending.pop(folder, None)
        self._event_at.pop(folder, None)

    def _is_due(self, rejected: _Rejected) -> bool:
        return rejected.retry_at is not None and self._clock() >= rejected.retry_at


def scan_library(registry: Registry, library: Path) -> list[str]:
    """Publish the bundled adapters that fit the base, and return the names that are served from the library.

    New content replaces what the library published before, never what others published under the name. An adapter that
    was deleted stays deleted until its content changes.
    """
    try:
        folders = sorted(path for path in library.iterdir() if path.is_dir() and path.name[0] not in "._")
    except OSError as error:
        log.warning("the adapter library %s cannot be read: %s", library, error.strerror)
        return []
    return [folder.name for folder in folders if _import_from_library(registry, folder)]


def _import_from_library(registry: Registry, folder: Path) -> bool:
    """Publish one bundled adapter. Returns whether it is served."""
    name, key = folder.name, folder_key(LIBRARY, folder.name)
    try:
        signature = signature_of(folder, None)
        if not signature:
            return False
        imported = registry.imported_folder(key)
        if name in registry.names() and not (imported and registry.is_current(name, imported.digest)):
            log.info("the library's %s is skipped: the name has another adapter", name)
            return False
        if imported is None or imported.signature != signature:
            registry.publish_now(name, folder, source=LIBRARY, imported=(key, signature))
        if name in registry.names():
            return True
        log.info("the library's %s is skipped: it was deleted, or it was made for another base", name)
    except AdapterError as error:
        log.info("the library's %s is skipped: %s", name, error.message)
    except Exception:  # must not keep the server from starting
        log.exception("the library's %s is skipped", name)
    return False


def signature_of(folder: Path, within: Path | None) -> FolderSignature:
    """Return the state of an adapter folder's files; empty if it has neither config nor tensors.

    Args:
        folder: the folder.
        within: if given, links may not lead out of this folder.

    Raises:
        InvalidAdapter: a link leads out, or a file cannot be accessed.
        StoreFailed: a system error.
    """
    entries = []
    linked = folder.is_symlink()
    for name in (*REQUIRED, *OPTIONAL):
        path = folder / name
        try:
            state = path.lstat()
            if linked or stat.S_ISLNK(state.st_mode):
                if within is not None and not path.resolve().is_relative_to(within.resolve()):
                    raise InvalidAdapter(outside_error(name))
                state = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, RuntimeError) as error:
            raise unreadable(name, error) from None
        entries.append((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    return tuple(entries) if any(entry[0] in REQUIRED for entry in entries) else ()


def watched_folder_state(name: str, folder: Path, directory: Path) -> tuple[str, FolderSignature] | None:
    """Return what the registry must remember when `folder` is published as `name`, if it is in a watched directory.

    The watcher then treats it as imported: if the adapter is deleted, the folder does not bring it back. `folder` must
    not contain links. Raises as `signature_of`.
    """
    if folder != directory.resolve() / name:
        return None
    return folder_key(WATCH, name), signature_of(folder, directory)


def folder_key(source: str, folder: str) -> str:
    """Return the catalog key of an imported folder."""
    return f"{source}/{printable(folder)}"


def _other_content(folder: Path) -> str:
    """Return what a folder without an adapter holds instead, as the end of an error message; empty if unknown."""
    try:
        if below := folders_with(folder, CONFIG_FILE):
            return nested_folder_hint(below, "register", folder, "under a name")
        if (folder / MODEL_CONFIG).is_file() and any(file.suffix in MODEL_WEIGHTS for file in folder.iterdir()):
            return f": {WHOLE_MODEL}"
    except OSError:
        pass
    return ""


def _only_config_changed(imported: ImportedFolder, signature: FolderSignature) -> bool:
    before, now = ({file[0]: file for file in files} for files in (imported.signature, signature))
    return before.get(CONFIG_FILE) != now.get(CONFIG_FILE) and before.get(TENSOR_FILE) == now.get(TENSOR_FILE)


def _older_than(signature: FolderSignature, seconds: float) -> bool:
    """Return whether all files were last changed more than `seconds` ago; false without files."""
    newest = max((max(mtime, ctime) for _, _, mtime, ctime, _ in signature), default=None)
    return newest is not None and newest < time.time_ns() - int(seconds * 1e9)


def _identity(directory: Path) -> tuple[int, int] | None:
    """Return device and inode of a directory; None if it does not exist."""
    try:
        state = directory.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _is_ignored(name: str) -> bool:
    return name[0] == "." or name == IGNORED


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a broken link: `signature_of` raises the error
        return True
