"""The S-LoRA workload is the published one, draw for draw."""

import numpy as np
import pytest

from benchmarks.workloads import Arrival, Poisson, closed, generate, spread


def test_draws_follow_the_published_order() -> None:
    spec = Poisson(rate=3, duration=40, adapters=200, alpha=0.3, cv=2, prompt=(8, 128), output=(8, 64), seed=42)
    got = generate(spec)
    np.random.seed(42)
    popularity = np.random.power(0.3, 120)
    prompts = np.random.randint(8, 128, 120)
    outputs = np.random.randint(8, 64, 120)
    times = np.cumsum(np.random.gamma(0.25, 4 / 3, 120))
    assert [a.adapter for a in got] == (popularity * 200).astype(int).tolist()
    assert [a.prompt_tokens for a in got] == prompts.tolist()
    assert [a.output_tokens for a in got] == outputs.tolist()
    assert np.allclose([a.time for a in got], times)


def test_small_alpha_is_skewed_and_one_is_uniform() -> None:
    def top_share(alpha: float) -> float:
        spec = Poisson(rate=1000, duration=50, adapters=200, alpha=alpha)
        counts = np.bincount([a.adapter for a in generate(spec)], minlength=200)
        return float(counts.max() / counts.sum())

    assert top_share(1.0) < 0.01
    assert 0.17 < top_share(0.3) < 0.24


def test_a_draw_that_is_rounded_to_one_is_of_the_last_adapter() -> None:
    assert {a.adapter for a in generate(Poisson(rate=10, duration=1, adapters=5, alpha=1e18))} == {4}


@pytest.mark.parametrize(
    "spec",
    [
        Poisson(rate=0.1, duration=1, adapters=5),
        Poisson(rate=10, duration=1, adapters=0),
        Poisson(rate=10, duration=1, adapters=5, alpha=0.0),
        Poisson(rate=10, duration=1, adapters=5, cv=0.0),
    ],
    ids=["no request", "no adapter", "no popularity", "no variation"],
)
def test_a_workload_that_gives_no_request_is_refused(spec: Poisson) -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        generate(spec)


def test_closed_lists_go_round_the_adapters() -> None:
    assert closed(3, [4, -1], 128, 64) == [
        Arrival(0.0, 4, 128, 64),
        Arrival(0.0, -1, 128, 64),
        Arrival(0.0, 4, 128, 64),
    ]


def test_lists_are_spread_over_time_as_the_generator_does_it() -> None:
    plain = closed(2000, [0, 1], 8, 4)
    for cv in (1.0, 0.5):
        told = spread(plain, rate=20, cv=cv)
        assert [(a.adapter, a.prompt_tokens, a.output_tokens) for a in told] == [(i % 2, 8, 4) for i in range(2000)]
        gaps = np.diff([a.time for a in told])
        assert gaps.min() > 0 and gaps.mean() == pytest.approx(1 / 20, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert spread(plain, 20) == spread(plain, 20) != spread(plain, 20, seed=1)
