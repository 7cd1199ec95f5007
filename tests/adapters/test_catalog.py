"""What a name, a digest and an `If-Match` mean, without a store."""

from __future__ import annotations

import pytest

from adapters.catalog import Catalog
from adapters.errors import InvalidChoice, VersionMismatch
from adapters.weights import Version

OLD, NEW, LIKE_NEW = "a1b2c3" + "0" * 58, "d4e5f6" + "0" * 58, "d4e5f6" + "1" * 58
NAMES = Catalog(histories={"m": (NEW, LIKE_NEW, OLD), "n": (LIKE_NEW,)})


def test_first_digits_that_two_versions_have_mean_neither() -> None:
    with pytest.raises(InvalidChoice, match="names 2 versions; give more digits"):
        NAMES.find("m@d4e5f6")
    assert NAMES.find("m@d4e5f61") == Version("m", LIKE_NEW)
    assert NAMES.find("n@d4e5f6") == Version("n", LIKE_NEW), "of that name alone"


def test_labels_are_of_all_that_is_found() -> None:
    names = Catalog(histories={"m": (NEW, OLD)}, behind={"n": (OLD,)})
    versions = [Version("m", NEW), Version("m", OLD), Version("n", OLD)]
    assert names.labels == {version.label for version in versions} and names.labels is names.labels
    assert [names.find(version.label) for version in versions] == versions
    assert names.current == {"m": NEW} and names.current is names.current, "every request asks for it"


def test_digits_may_be_capitals() -> None:
    assert NAMES.find("m@A1B2C3") == Version("m", OLD)
    for same in ("m@D4E5F6", "D4E5F6"):
        NAMES.expect("m", same)


@pytest.mark.parametrize("expected", ["m@d4e5f", "d", "", "m@", "n@d4e5f6", "m@a1b2c3"])
def test_too_few_digits_or_another_version_are_not_what_is_expected(expected: str) -> None:
    with pytest.raises(VersionMismatch, match="the adapter is at m@d4e5f6"):
        NAMES.expect("m", expected)
    for same in ("m@d4e5f6", NEW, "*", None):
        NAMES.expect("m", same)
