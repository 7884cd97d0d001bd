"""Batch statistics of training: what the tiles of a tensor say of its channels."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Statistics"]


class Statistics(NamedTuple):
    """Of T disjoint tiles: mean and m2 (sum of squared deviations from it) [T, C], count [T], all fp32."""

    mean: torch.Tensor
    m2: torch.Tensor
    count: torch.Tensor
