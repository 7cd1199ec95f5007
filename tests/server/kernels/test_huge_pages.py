"""Memory on huge pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from server.kernels import huge_pages
from server.kernels.huge_pages import HUGE


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Advice that the system refused."""
    refused: list[int] = []

    class Without(huge_pages.mmap.mmap):
        def madvise(self, advice: int, *_: int) -> None:
            refused.append(advice)
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Without)
    return refused


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", [0, 7, HUGE // 4, HUGE // 4 + 1, 3 * HUGE])
def test_large_zeros_are_aligned_to_huge_pages(size: int) -> None:
    made = huge_pages.zeros(size, torch.float32)
    assert made.shape == (size,) and made.dtype == torch.float32 and not made.any()
    assert made.nbytes < HUGE or made.data_ptr() % HUGE == 0
    made += 1
    assert bool((made == 1).all())


@pytest.mark.parametrize("size", [1, 4097, 2 * HUGE, 2 * HUGE + 5])
def test_a_mapped_file_is_copy_on_write(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(size))
    found = huge_pages.mapped(path)
    assert found.dtype == torch.uint8 and found.numpy().tobytes() == content(size)
    assert str(path) in Path("/proc/self/maps").read_text()
    found.zero_()
    assert path.read_bytes() == content(size)
    path.unlink()
    assert not found.any()


def resident(path: Path) -> int:
    """Resident bytes of a file's mappings."""
    kilobytes, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            of_file = line.endswith(str(path))
        elif of_file and name == "Rss:":
            kilobytes += int(rest[0])
    return kilobytes << 10


def test_a_mapped_file_is_not_resident_until_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(8 * HUGE))
    found = huge_pages.mapped(path)
    assert resident(path) <= HUGE
    assert int(found.max()) == 255 and resident(path) == 8 * HUGE


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        huge_pages.mapped(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        huge_pages.mapped(tmp_path / "empty")


def test_systems_without_huge_pages_get_no_advice(
    tmp_path: Path, without: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "HUGE_PAGES", False)
    path = tmp_path / "file"
    path.write_bytes(content(HUGE + 3))
    assert huge_pages.mapped(path).numpy().tobytes() == content(HUGE + 3)
    assert not huge_pages.zeros(HUGE, torch.uint8).any() and not without


def test_huge_pages_are_requested_for_all_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []

    class Noting(huge_pages.mmap.mmap):
        def madvise(self, advice: int, start: int = 0, length: int = 0) -> None:
            advised.append((start, length))

    monkeypatch.setattr(huge_pages.mmap, "mmap", Noting)
    made = huge_pages.zeros(3 * HUGE // 4 + 1, torch.float32)
    ((start, length),) = advised
    assert made.data_ptr() % HUGE == 0 and 0 <= start < HUGE and length == made.nbytes


def test_refused_advice_is_ignored(tmp_path: Path, without: list[int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(HUGE + 3))
    assert huge_pages.mapped(path).numpy().tobytes() == content(HUGE + 3) and len(without) == 3
    assert not huge_pages.zeros(HUGE, torch.uint8).any() and len(without) == 4
