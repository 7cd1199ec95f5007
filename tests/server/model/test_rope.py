"""Angles of many positions, made in pieces."""

from __future__ import annotations

import pytest
import torch

from server.model import rope
from server.model.rope import angles, angles_before, frequencies
from tests.server.kernels.tiny import llama

CONFIG = llama(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=512,
)


@pytest.mark.parametrize("end", [0, 1, 7, 14, 500])
def test_chunked_angles_equal_all_at_once(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    asked = []

    def piece(inverse: torch.Tensor, factor: float, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(positions))
        return angles(inverse, factor, positions)

    monkeypatch.setattr(rope, "_CHUNK", 7)
    monkeypatch.setattr(rope, "angles", piece)
    inverse, _ = frequencies(CONFIG)
    for ours, whole in zip(angles_before(inverse, 1.1, end), angles(inverse, 1.1, torch.arange(end)), strict=True):
        assert torch.equal(ours, whole) and ours.is_contiguous()
    assert sum(asked) == end and max(asked, default=0) <= 7
