"""The prefill budget on simulated machines, whose steps take the seconds that a test gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.prefill_budget import DEPTHS, FIRST_TOKENS, MIN_TOKENS, PrefillBudget, PrefillLoad

LIMIT = 30.0


def step(budget: PrefillBudget, depth: int = 0, most: int = 512) -> PrefillLoad:
    """A step with one prompt at this depth that uses all of the room."""
    load = PrefillLoad()
    budget.add(depth, min(most, budget.room(depth, load)), load)
    return load


def tokens_after(budget: PrefillBudget, seconds: list[float], depth: int = 0) -> int:
    """Tokens of the step that follows full steps with these times."""
    for each in seconds:
        budget.update(step(budget, depth), each)
    return step(budget, depth).tokens.total()


def settled(budget: PrefillBudget, smallest: float, seconds: Callable[[int], float]) -> int:
    """Tokens of a full step in the end, after two steps without prefill of `smallest` seconds."""
    for _ in range(2):
        budget.update(PrefillLoad(), smallest)
    for _ in range(30):
        load = step(budget)
        budget.update(load, seconds(load.tokens.total()))
    return load.tokens.total()


def test_without_a_limit_the_budget_is_the_whole_step() -> None:
    budget = PrefillBudget(300)
    for depth in (0, *DEPTHS):
        load = PrefillLoad()
        for tokens in (37, 100, 162):
            assert budget.room(depth, load) >= 300 - load.tokens.total()
            budget.add(depth, tokens, load)
    assert tokens_after(budget, [1e6, 1e6]) == 300


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [
        ([], FIRST_TOKENS),
        ([0.01], 512),
        ([1.0], 160),  # 64 tokens/s, for 2.5 s
        ([0.01, 3600.0, 0.1, 3600.0, 0.1], 512),  # single long steps lower nothing
        ([0.01, 3600.0, 0.1, 20.0, 20.0], 64),  # two do
        ([9.0, 0.001], FIRST_TOKENS),  # one short step after a long one raises nothing
    ],
)
def test_budget_after_full_steps(seconds: list[float], tokens: int) -> None:
    assert tokens_after(PrefillBudget(512, LIMIT), seconds) == tokens


def test_long_steps_are_remembered_across_decodes_and_other_depths() -> None:
    budget = PrefillBudget(512, LIMIT)
    tokens_after(budget, [0.01] * 3)
    for _ in range(2):
        budget.update(step(budget), 27.0)
        budget.update(PrefillLoad(), 0.3)
        budget.update(step(budget, 600), 0.3)
    assert step(budget).tokens.total() < 64


def test_a_long_step_of_few_tokens_does_not_count_as_a_full_one() -> None:
    budget = PrefillBudget(512, LIMIT)
    tokens_after(budget, [0.01] * 3)
    for _ in range(2):
        budget.update(step(budget, most=30), 6.0)
    assert step(budget).tokens.total() * 6.0 / 30 < LIMIT


def test_slow_smallest_steps_are_forgotten_when_larger_ones_are_faster() -> None:
    assert 0.1 + settled(PrefillBudget(512, LIMIT), 9.0, lambda tokens: 0.1 + tokens / 20) / 20 <= 5.0


def test_where_all_steps_are_slow_prefill_gets_a_third_of_the_step() -> None:
    """A step of 16 tokens takes 4 s, 3.9 of them for reading the weights."""
    assert 300 <= settled(PrefillBudget(512, LIMIT), 3.9, lambda tokens: 3.9 + tokens / 160) <= 312


def test_one_suspended_small_step_raises_nothing() -> None:
    budget = PrefillBudget(512, LIMIT)
    before = tokens_after(budget, [20.0, 20.0, 2.5, 2.5, 2.5])
    for seconds in (3600.0, 0.004, 3600.0, 0.004):
        budget.update(PrefillLoad(), seconds)
    assert tokens_after(budget, [2.5]) == before


def test_depths_share_a_step() -> None:
    budget, load = PrefillBudget(512, LIMIT), PrefillLoad()
    assert (budget.room(0, load), budget.room(600, load)) == (64, 32)
    budget.add(600, 16, load)
    assert (budget.room(0, load), budget.room(600, load)) == (32, 16)
    budget.add(600, -16, load)
    assert (budget.room(0, load), load.tokens.total()) == (64, 0)


def test_a_short_step_raises_each_depth_by_its_own_tokens() -> None:
    budget, load = PrefillBudget(512, LIMIT), PrefillLoad()
    budget.add(0, 62, load)
    budget.add(9000, 1, load)
    budget.update(load, 0.5)
    assert budget.room(0, PrefillLoad()) == math.floor(64 * (62 / 64) * 5)


def test_deep_prompts_lower_only_their_own_budget_and_not_for_ever() -> None:
    budget = PrefillBudget(512, LIMIT)
    tokens_after(budget, [0.2] * 4)
    lowered = tokens_after(budget, [8.0, 8.0], depth=8192)
    assert step(budget).tokens.total() == 512 and lowered < 200
    assert tokens_after(budget, [0.1, 0.1], depth=8192) > lowered


def test_prompts_proceed_on_the_slowest_machine() -> None:
    budget = PrefillBudget(512, LIMIT)
    assert tokens_after(budget, [29.0] * 10, depth=4096) == MIN_TOKENS
    assert budget.room(0, step(budget, 4096)) == 0
    small = PrefillLoad()
    budget.add(4096, 5, small)
    assert budget.room(4096, small) == MIN_TOKENS - 5


@settings(max_examples=200, deadline=None)
@given(
    row=st.floats(1e-6, 0.1, allow_nan=False),
    key=st.floats(0, 1 / 512, allow_nan=False),
    fixed=st.floats(0, 1.0, allow_nan=False) | st.floats(0, 20.0, allow_nan=False),
    prompts=st.lists(st.integers(1, 40_000), min_size=1, max_size=6),
)
def test_no_step_exceeds_the_limit_on_any_machine(row: float, key: float, fixed: float, prompts: list[int]) -> None:
    """A machine takes `fixed` seconds per step, `row` per token, and `row * key` more for each token before it."""
    budget = PrefillBudget(512, LIMIT)

    def takes(depth: int, tokens: int) -> float:
        return fixed + row * tokens * (1 + key * (depth + tokens / 2))

    for length in prompts:
        done = 0
        while done < length:
            load = step(budget, done, min(512, length - done))
            tokens = load.tokens.total()
            assert tokens >= min(MIN_TOKENS, length - done)
            assert takes(done, tokens) <= max(LIMIT, takes(done, MIN_TOKENS)), (done, tokens)
            budget.update(load, takes(done, tokens))
            done += tokens
    if takes(0, 512) < LIMIT / 24:
        for _ in range(10):
            load = step(budget)
            budget.update(load, takes(0, load.tokens.total()))
        assert load.tokens.total() == 512


@pytest.mark.parametrize("most", [16, 40, 2048])
def test_the_budget_stays_within_the_step(most: int) -> None:
    budget = PrefillBudget(most, LIMIT)
    for depth in (0, 100, 700, 5000, 100_000):
        for seconds in (1e-6, 0.0, 9.0, 9.0, 1e-6):
            load = step(budget, depth, most)
            assert 0 < load.tokens.total() <= most
            budget.update(load, seconds)
