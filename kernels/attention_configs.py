"""Tiles of the attention kernels, by head dim, dtype and device."""

from __future__ import annotations

import torch

from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config

__all__ = [
    "backward_config",
    "backward_configs",
    "backward_configs_for",
    "bias_config",
    "bias_configs",
    "forward_config",
    "forward_configs",
    "forward_configs_for",
]


# Triton has no matrix units before this compute capability: attention is the vendor's there.
MATRIX_UNITS = 80


def _forward(m: int, n: int, warps: int, stages: int) -> Config:
    return Config(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)


# By head dim, padded: (whole tiles of queries, short ones). Two-byte dtypes, then fp32.
_FORWARD = {
    16: (_forward(128, 64, 4, 3), _forward(64, 64, 4, 3)),
    32: (_forward(128, 64, 4, 3), _forward(64, 64, 4, 3)),
    64: (_forward(128, 64, 4, 3), _forward(64, 64, 4, 3)),
    128: (_forward(128, 64, 8, 2), _forward(64, 64, 4, 2)),
    256: (_forward(64, 32, 8, 2), _forward(64, 32, 8, 2)),
}
_FORWARD_FP32 = {
    16: (_forward(64, 32, 4, 2), _forward(32, 32, 4, 2)),
    32: (_forward(64, 32, 4, 2), _forward(32, 32, 4, 2)),
    64: (_forward(64, 32, 4, 2), _forward(32, 32, 4, 2)),
    128: (_forward(32, 32, 4, 1), _forward(32, 32, 4, 1)),
    256: (_forward(16, 16, 8, 1), _forward(16, 16, 8, 1)),
}


def forward_configs(device: Device) -> list[Config]:
    """Every config that ``forward_config`` may pick; none without matrix units."""
    if device.capability < MATRIX_UNITS:
        return []
    return list(
        dict.fromkeys(c for table in (_FORWARD, _FORWARD_FP32) for pair in table.values() for c in pair)
    )


def forward_configs_for(dtype: torch.dtype, head_dim: int) -> tuple[Config, ...]:
    """Those that may be picked for a dtype and a padded head dim."""
    return (_FORWARD_FP32 if dtype == torch.float32 else _FORWARD)[head_dim]


def backward_configs_for(dtype: torch.dtype, head_dim: int) -> tuple[Config, ...]:
    """Those that may be picked for a dtype and a padded head dim."""
    found = (_BACKWARD_FP32 if dtype == torch.float32 else _BACKWARD).get(head_dim)
    return () if found is None else (found,)


def forward_config(dtype: torch.dtype, head_dim: int, M: int, device: Device) -> Config:
    """head_dim: the greater of q's and v's, a power of two."""
    table = _FORWARD_FP32 if dtype == torch.float32 else _FORWARD
    return table[head_dim][M <= 64]


def _backward(n: int, step_m: int, m: int, step_n: int, warps: int, stages: int) -> Config:
    """Tiles of keys n that go through queries by step_m, and of queries m that go through keys by step_n."""
    return Config(BLOCK_N=n, STEP_M=step_m, BLOCK_M=m, STEP_N=step_n, num_warps=warps, num_stages=stages)


_BACKWARD = {
    16: _backward(64, 64, 64, 64, 4, 2),
    32: _backward(64, 64, 64, 64, 4, 2),
    64: _backward(128, 64, 128, 64, 8, 2),
    128: _backward(64, 32, 64, 32, 8, 2),
    256: _backward(32, 32, 32, 32, 8, 1),
}
_BACKWARD_FP32 = {
    16: _backward(32, 32, 32, 32, 4, 2),
    32: _backward(32, 32, 32, 32, 4, 2),
    64: _backward(32, 32, 32, 32, 4, 1),
    128: _backward(16, 16, 16, 16, 8, 1),
}


def backward_configs(device: Device) -> list[Config]:
    """Every config that ``backward_config`` may pick; none without matrix units."""
    if device.capability < MATRIX_UNITS:
        return []
    return list(dict.fromkeys((*_BACKWARD.values(), *_BACKWARD_FP32.values())))


def backward_config(dtype: torch.dtype, head_dim: int, device: Device) -> Config:
    """head_dim: the greater of q's and v's, a power of two; in fp32 at most 128, wider ones do not fit."""
    if dtype == torch.float32 and head_dim > 128:
        raise ValueError("attention: the backward kernel takes head dims up to 128 in float32")
    return (_BACKWARD_FP32 if dtype == torch.float32 else _BACKWARD)[head_dim]


def bias_config(dtype: torch.dtype, head_dim: int, device: Device) -> Config:
    """Of the bias's gradient: square tiles of it."""
    tile = 64 if dtype != torch.float32 and head_dim <= 64 else 32 if head_dim <= 128 else 16
    return Config(BLOCK_M=tile, BLOCK_N=tile, num_warps=4, num_stages=1)


def bias_configs(device: Device) -> list[Config]:
    """Every config that ``bias_config`` may pick; none without matrix units."""
    if device.capability < MATRIX_UNITS:
        return []
    picked = [bias_config(dtype, d, device) for dtype in (torch.float16, torch.float32) for d in _BACKWARD]
    return list(dict.fromkeys(picked))
