"""Rotary position embedding: the frequencies of each scaling type, and cos and sin of positions.

The formulas equal Transformers' `ROPE_INIT_FUNCTIONS`, without its import (2 s and 90 MB at start-up).
"""

from __future__ import annotations

import math

import torch

from server.model.config import ModelConfig, RopeScaling

_CHUNK = 4096  # positions computed at a time


def frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Rotary frequencies of a model.

    `dynamic` equals `default` up to `max_position_embeddings`, where the context ends. `linear` is position
    interpolation (Chen et al. 2023), `yarn` is Peng et al. 2023.

    Returns:
        Radians per position, float32 [head_dim / 2], and the attention factor, which multiplies cos and sin.
    """
    scaling = config.rope_scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    if scaling.type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.type == "llama3":
        return llama3_frequencies(plain, scaling), 1.0
    if scaling.type == "yarn":
        return _yarn(config, config.rope_theta**exponents), _yarn_attention_factor(scaling)
    return plain, 1.0


def angles(inverse: torch.Tensor, factor: float, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each position's angles, float32 [T, head_dim / 2], times the attention factor."""
    radians = positions[:, None].float() * inverse
    return radians.cos() * factor, radians.sin() * factor


def angles_before(inverse: torch.Tensor, factor: float, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`angles` of all positions below `end`, computed in chunks to keep the peak memory at that of the result."""
    cosine, sine = torch.empty(end, len(inverse)), torch.empty(end, len(inverse))
    for start in range(0, end, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, end))
        cosine[chunk], sine[chunk] = angles(inverse, factor, torch.arange(chunk.start, chunk.stop))
    return cosine, sine


def llama3_frequencies(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies scaled as in Llama 3.1's `apply_scaling`."""
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert original is not None and low is not None and high is not None
    wavelength = 2 * math.pi / plain
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)  # 0: scaled, 1: unscaled
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _yarn(config: ModelConfig, periods: torch.Tensor) -> torch.Tensor:
    scaling, dim = config.rope_scaling, config.head_dim
    original = scaling.original_max_position_embeddings
    assert original is not None

    def pair_with(rotations: float) -> float:
        """Index (not rounded) of the pair that makes so many rotations over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return ramp / (scaling.factor * periods) + (1 - ramp) / periods


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(scale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
