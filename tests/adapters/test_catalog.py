"""`CatalogState`: the version history of names. `Catalog`: looking up names, versions and If-Match."""

from __future__ import annotations

import pytest

from adapters.catalog import Catalog
from adapters.catalog_state import API, LIBRARY, WATCH, CatalogState, ImportedFolder
from adapters.errors import InvalidChoice, VersionMismatch
from adapters.weights import Version

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
OLD, NEW, LIKE_NEW = "a1b2c3" + "0" * 58, "d4e5f6" + "0" * 58, "d4e5f6" + "1" * 58
CATALOG = Catalog(histories={"m": (NEW, LIKE_NEW, OLD), "n": (LIKE_NEW,)})


def import_folder(state: CatalogState, digest: str, source: str = WATCH) -> CatalogState:
    """Import the folder `m` of the watched directory or the library."""
    return state.set_folder(f"{source}/m", ImportedFolder(digest, ())).set_version("m", digest, source, 2.0)


@pytest.mark.parametrize("source", [API, LIBRARY])
def test_removing_a_folder_restores_the_version_that_it_replaced_with_its_pin(source: str) -> None:
    first = CatalogState().set_version("m", A, API, 1.0)
    first = import_folder(CatalogState(), A, LIBRARY) if source == LIBRARY else first
    state = import_folder(import_folder(first.set_pinned("m", True), B), C)
    assert state.names["m"].replaced == A and state.names["m"].pinned
    restored = state.undo_folder("m", 3.0).names["m"]
    assert (restored.history, restored.source, restored.pinned) == ((A,), source, True)


def test_removing_a_folder_restores_what_was_published_over_the_library() -> None:
    state = import_folder(import_folder(CatalogState(), A, LIBRARY).set_version("m", B, API, 1.0), C)
    restored = state.undo_folder("m", 3.0).names["m"]
    assert (restored.history[0], restored.source) == (B, API)
    assert "m" not in import_folder(CatalogState(), A).undo_folder("m", 3.0).names


def test_content_of_a_folder_becomes_its_publishers_but_not_the_librarys() -> None:
    state = import_folder(CatalogState(), A)
    for source in (WATCH, LIBRARY):
        assert state.set_version("m", A, source, 3.0) is state
    published = state.set_version("m", A, API, 3.0).names["m"]
    assert published.source == API and published.history == (A,)


def test_an_ambiguous_digest_prefix_is_refused() -> None:
    with pytest.raises(InvalidChoice, match="matches 2 versions; give more digits"):
        CATALOG.find("m@d4e5f6")
    assert CATALOG.find("m@d4e5f61") == Version("m", LIKE_NEW)
    assert CATALOG.find("n@d4e5f6") == Version("n", LIKE_NEW)


def test_labels_are_those_of_the_versions_that_can_be_found() -> None:
    catalog = Catalog(histories={"m": (NEW, OLD)}, rejected_histories={"n": (OLD,)})
    versions = [Version("m", NEW), Version("m", OLD), Version("n", OLD)]
    assert catalog.labels == {version.label for version in versions}
    assert [catalog.find(version.label) for version in versions] == versions
    assert catalog.current == {"m": NEW}


@pytest.mark.parametrize("expected", ["m@d4e5f", "d", "", "m@", "n@d4e5f6", "m@a1b2c3"])
def test_if_match_needs_six_digits_of_the_current_version(expected: str) -> None:
    with pytest.raises(VersionMismatch, match="the adapter is at m@d4e5f6"):
        CATALOG.check_match("m", expected)
    for same in ("m@d4e5f6", "m@D4E5F6", "D4E5F6", NEW, "*", None):
        CATALOG.check_match("m", same)
    assert CATALOG.find("m@A1B2C3") == Version("m", OLD)
