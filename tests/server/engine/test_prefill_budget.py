"""How many rows prompts are given, on machines that are made up here: a step takes what the test says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.prefill_budget import DEPTHS, FIRST_TOKENS, MIN_TOKENS, PrefillBudget, PrefillLoad

LIMIT = 30.0


def step(pace: PrefillBudget, depth: int, most: int = 512) -> PrefillLoad:
    """A step of one prompt at this depth that has as many rows as there is room for."""
    share = PrefillLoad()
    pace.add(depth, min(most, pace.room(depth, share)), share)
    return share


def settled(pace: PrefillBudget, smallest: float, seconds: Callable[[int], float]) -> int:
    """Rows of a full step at last, where two steps without prompts have taken `smallest` seconds."""
    for _ in range(2):
        pace.update(PrefillLoad(), smallest)
    for _ in range(30):
        share = step(pace, 0)
        pace.update(share, seconds(share.tokens.total()))
    return share.tokens.total()


def test_without_a_limit_every_prompt_has_all_rows() -> None:
    pace = PrefillBudget(300)
    for depth in (0, *DEPTHS):
        share = PrefillLoad()
        for rows in (37, 100, 162):
            assert pace.room(depth, share) >= 300 - share.tokens.total()
            pace.add(depth, rows, share)
        pace.update(share, 1e6)
        pace.update(share, 1e6)
    assert step(pace, 0, 300).tokens.total() == 300


def test_a_quick_machine_has_all_rows_after_its_first_step() -> None:
    pace = PrefillBudget(512, LIMIT)
    first = step(pace, 0)
    assert first.tokens.total() == FIRST_TOKENS
    pace.update(first, 0.01)
    assert step(pace, 0).tokens.total() == 512


def test_rows_grow_no_further_than_a_twelfth_of_the_limit() -> None:
    pace = PrefillBudget(512, LIMIT)
    pace.update(step(pace, 0), 1.0)  # 64 rows a second
    assert step(pace, 0).tokens.total() == 160  # 2.5 s


def test_one_long_step_lowers_nothing_and_a_second_does() -> None:
    pace = PrefillBudget(512, LIMIT)
    pace.update(step(pace, 0), 0.01)
    for seconds in (3600.0, 0.1, 3600.0, 0.1):  # the process was stopped
        pace.update(step(pace, 0), seconds)
    assert step(pace, 0).tokens.total() == 512
    pace.update(step(pace, 0), 20.0)
    pace.update(step(pace, 0), 20.0)
    assert step(pace, 0).tokens.total() == 64


def test_what_is_too_long_is_lowered_between_short_steps_of_answers_and_of_other_depths() -> None:
    pace = PrefillBudget(512, LIMIT)
    for _ in range(3):
        pace.update(step(pace, 0), 0.01)
    for _ in range(2):
        pace.update(step(pace, 0), 27.0)
        pace.update(PrefillLoad(), 0.3)
        pace.update(step(pace, 600), 0.3)
    assert step(pace, 0).tokens.total() < 64


def test_a_long_step_of_few_rows_is_not_taken_for_a_full_one() -> None:
    pace = PrefillBudget(512, LIMIT)
    for _ in range(3):
        pace.update(step(pace, 0), 0.01)
    for _ in range(2):
        pace.update(step(pace, 0, 30), 6.0)
    assert step(pace, 0).tokens.total() * 6.0 / 30 < LIMIT


def test_one_short_step_after_a_long_one_raises_nothing() -> None:
    pace = PrefillBudget(512, LIMIT)
    pace.update(step(pace, 0), 9.0)
    pace.update(step(pace, 0), 0.001)
    assert step(pace, 0).tokens.total() == FIRST_TOKENS


def test_smallest_steps_that_took_long_once_are_forgotten_with_shorter_ones() -> None:
    pace = PrefillBudget(512, LIMIT)
    assert 0.1 + settled(pace, 9.0, lambda rows: 0.1 + rows / 20) / 20 <= 5.0


def test_however_slow_it_is_prompts_go_on() -> None:
    pace = PrefillBudget(512, LIMIT)
    for _ in range(10):
        pace.update(step(pace, 4096), 29.0)
    share = step(pace, 4096)
    assert share.tokens.total() == MIN_TOKENS
    assert pace.room(0, share) == 0
    small = PrefillLoad()
    pace.add(4096, 5, small)
    assert pace.room(4096, small) == MIN_TOKENS - 5


def test_where_every_step_takes_long_prompts_have_a_third_of_it() -> None:
    """Steps of 16 rows that take 4 s, of which 3.9 are the weights', would save nothing and take hours."""
    pace = PrefillBudget(512, LIMIT)
    assert 300 <= settled(pace, 3.9, lambda rows: 3.9 + rows / 160) <= 312


def test_one_small_step_in_which_the_process_was_stopped_raises_nothing() -> None:
    pace = PrefillBudget(512, LIMIT)
    for seconds in (20.0, 20.0, 2.5, 2.5, 2.5):
        pace.update(step(pace, 0), seconds)
    rows = step(pace, 0).tokens.total()
    for seconds in (3600.0, 0.004, 3600.0, 0.004):
        pace.update(PrefillLoad(), seconds)
    pace.update(step(pace, 0), 2.5)
    assert step(pace, 0).tokens.total() == rows


def test_prompts_of_different_depths_share_a_step() -> None:
    pace = PrefillBudget(512, LIMIT)
    share = PrefillLoad()
    assert (pace.room(0, share), pace.room(600, share)) == (64, 32)
    pace.add(600, 16, share)
    assert (pace.room(0, share), pace.room(600, share)) == (32, 16)
    pace.add(600, -16, share)
    assert (pace.room(0, share), share.tokens.total()) == (64, 0)


def test_what_deep_rows_take_does_not_raise_others_beside_them() -> None:
    """Of a short step only what was measured is trusted: a part of a hundredth may be no more than a hundred times."""
    pace = PrefillBudget(512, LIMIT)
    share = PrefillLoad()
    pace.add(0, 62, share)
    pace.add(9000, 1, share)
    pace.update(share, 0.5)
    assert pace.room(0, PrefillLoad()) == math.floor(64 * (62 / 64) * 5)
    deep = pace.room(9000, PrefillLoad())
    pace.update(step(pace, 9000), 40.0)
    assert pace.room(9000, PrefillLoad()) == deep


def test_a_deep_prompt_does_not_take_rows_from_short_ones_for_good() -> None:
    pace = PrefillBudget(512, LIMIT)
    for _ in range(4):
        pace.update(step(pace, 0), 0.2)
    pace.update(step(pace, 8192), 8.0)
    pace.update(step(pace, 8192), 8.0)
    assert step(pace, 0).tokens.total() == 512
    lowered = step(pace, 8192).tokens.total()
    assert lowered < 200
    for _ in range(2):
        pace.update(step(pace, 8192), 0.1)
    assert step(pace, 8192).tokens.total() > lowered


@settings(max_examples=200, deadline=None)
@given(
    row=st.floats(1e-6, 0.1, allow_nan=False),
    key=st.floats(0, 1 / 512, allow_nan=False),
    fixed=st.floats(0, 1.0, allow_nan=False) | st.floats(0, 20.0, allow_nan=False),
    prompts=st.lists(st.integers(1, 40_000), min_size=1, max_size=6),
)
def test_no_step_hangs_on_any_machine_and_every_prompt_ends(
    row: float, key: float, fixed: float, prompts: list[int]
) -> None:
    """A machine that takes `row` seconds a row, `row * key` more for each token before it, and `fixed` a step."""
    pace = PrefillBudget(512, LIMIT)

    def takes(depth: int, rows: int) -> float:
        return row * rows * (1 + key * (depth + rows / 2))

    for length in prompts:
        done = 0
        while done < length:
            share = step(pace, done, min(512, length - done))
            assert share.tokens.total() >= min(MIN_TOKENS, length - done)
            took = fixed + takes(done, share.tokens.total())
            assert took <= max(LIMIT, fixed + takes(done, MIN_TOKENS)), (done, share.tokens.total())
            pace.update(share, took)
            done += share.tokens.total()
    if fixed + takes(0, 512) < LIMIT / 24:
        for _ in range(10):
            share = step(pace, 0)
            pace.update(share, fixed + takes(0, share.tokens.total()))
        assert share.tokens.total() == 512


@pytest.mark.parametrize("most", [16, 40, 2048])
def test_rows_stay_within_a_step(most: int) -> None:
    pace = PrefillBudget(most, LIMIT)
    for depth in (0, 100, 700, 5000, 100_000):
        for seconds in (1e-6, 0.0, 9.0, 9.0, 1e-6):
            share = step(pace, depth, most)
            assert 0 < share.tokens.total() <= most
            pace.update(share, seconds)
