"""Request workloads: the S-LoRA generator, and lists for closed and open loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

S2_RANKS = (64, 32, 16, 8)
"""Adapter ranks of S-LoRA's setting S2, used in turn."""


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, number of the adapter (-1 is the base), lengths in tokens."""

    time: float
    adapter: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Poisson:
    """Parameters of S-LoRA's synthetic workload (arXiv 2311.03285, section 7).

    Attributes:
        rate: requests per second over `duration` seconds.
        alpha: exponent of the power law of adapter popularity; 1 is uniform.
        cv: coefficient of variation of the gaps (Gamma distribution); 1 is Poisson.
        prompt, output: lengths in tokens, uniform in [low, high).
    """

    rate: float
    duration: float
    adapters: int
    alpha: float = 1.0
    cv: float = 1.0
    prompt: tuple[int, int] = (8, 128)
    output: tuple[int, int] = (8, 128)
    seed: int = 42


def generate(spec: Poisson) -> list[Arrival]:
    """The arrivals of `spec` by time. The random numbers are drawn in the order of S-LoRA's generator.

    Raises:
        ValueError: the parameters give no request.
    """
    count = int(spec.rate * spec.duration)
    if count < 1 or spec.adapters < 1 or spec.alpha <= 0 or spec.cv <= 0:
        raise ValueError("a workload needs rate * duration >= 1, at least one adapter, and alpha and cv above 0")
    random = np.random.RandomState(spec.seed)
    # A value may be rounded up to 1, which is past the last adapter.
    adapter = np.minimum(random.power(spec.alpha, count) * spec.adapters, spec.adapters - 1).astype(int)
    prompt = random.randint(*spec.prompt, count)
    output = random.randint(*spec.output, count)
    shape = 1 / (spec.cv * spec.cv)
    times = np.cumsum(random.gamma(shape, spec.cv * spec.cv / spec.rate, count))
    rows = zip(times, adapter, prompt, output, strict=True)
    return [Arrival(float(t), int(a), int(p), int(o)) for t, a, p, o in rows]


def closed(count: int, adapters: Sequence[int], prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    """`count` requests without times, with `adapters` in turn."""
    return [Arrival(0.0, adapters[i % len(adapters)], prompt_tokens, output_tokens) for i in range(count)]


def spread(arrivals: Sequence[Arrival], rate: float, cv: float = 1.0, seed: int = 42) -> list[Arrival]:
    """The same requests at `rate` per second, with gaps as in `Poisson`."""
    shape = 1 / (cv * cv)
    gaps = np.random.RandomState(seed).gamma(shape, cv * cv / rate, len(arrivals))
    return [replace(a, time=float(t)) for a, t in zip(arrivals, np.cumsum(gaps), strict=True)]
