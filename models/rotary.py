"""Rotary position embeddings: queries and keys turned by angles that grow with the position.

J. Su et al., "RoFormer", 2021 (arXiv:2104.09864). After it, the score of a query and a key depends on how far
apart they are. The pairs that turn together are neighbours (RoFormer, EVA-02) or lie half a head apart
(Llama as Hugging Face has it).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["angles_to_tables", "inverse_frequencies", "rotate_halves", "rotate_neighbours"]


def inverse_frequencies(count: int, temperature: float) -> Tensor:
    """temperature^(-i / count) for i in 0 … count - 1, (count,) float32."""
    return 1.0 / temperature ** (torch.arange(count, dtype=torch.float32) / count)


def angles_to_tables(angles: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines for whole heads, (L, head_dim) each, from one angle a pair, (L, head_dim / 2)."""
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, L, head_dim) with each pair (0, 1), (2, 3), … turned; cos, sin (L, head_dim)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, L, head_dim) with each pair (i, i + head_dim / 2) turned; cos, sin (L, head_dim)."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
