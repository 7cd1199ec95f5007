"""What names mean after each change, without a disk."""

from __future__ import annotations

import pytest

from adapters.catalog_state import API, LIBRARY, WATCH, CatalogState, ImportedFolder

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def put(journal: CatalogState, digest: str, source: str = WATCH) -> CatalogState:
    """The folder `m` of the user's directory, or of the library, is taken in with this content."""
    return journal.take(f"{source}/m", ImportedFolder(digest, ())).point("m", digest, source, 2.0)


@pytest.mark.parametrize("source", [API, LIBRARY])
def test_a_folder_that_is_changed_and_removed_leaves_what_it_was_put_over_with_its_pin(source: str) -> None:
    below = put(CatalogState(), A, LIBRARY) if source == LIBRARY else CatalogState().point("m", A, API, 1.0)
    journal = put(put(below.pin("m", True), B), C)
    assert journal.names["m"].below == A and journal.names["m"].pinned
    left = journal.withdraw("m", 3.0).names["m"]
    assert (left.history, left.source, left.pinned) == ((A,), source, True)


def test_what_somebody_publishes_too_does_not_go_with_its_folder() -> None:
    journal = put(CatalogState(), A)
    assert journal.point("m", A, WATCH, 3.0) is journal
    both = journal.point("m", A, API, 3.0)
    assert both.names["m"].source == API and both.names["m"].history == (A,)


def test_the_library_takes_no_name_from_a_folder_of_the_same_content() -> None:
    journal = put(CatalogState(), A)
    assert journal.point("m", A, LIBRARY, 3.0) is journal


def test_a_folder_over_what_was_published_over_the_librarys_gives_back_what_was_published() -> None:
    journal = put(put(CatalogState(), A, LIBRARY).point("m", B, API, 1.0), C)
    left = journal.withdraw("m", 3.0).names["m"]
    assert (left.history[0], left.source) == (B, API)
