"""Tiles of the attention kernels, by head dim, dtype and device."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config

__all__ = [
    "backward_config",
    "backward_configs",
    "backward_configs_for",
    "bias_config",
    "bias_configs",
    "decode_config",
    "decode_configs",
    "forward_config",
    "forward_configs",
    "forward_configs_for",
]


# Triton has no matrix units before this compute capability: attention is the vendor's there.
MATRIX_UNITS = 80


def _forward(m: int, n: int, warps: int, stages: int) -> Config:
    return Config(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)


def _backward(n: int, step_m: int, m: int, step_n: int, warps: int, stages: int) -> Config:
    """Tiles of keys n that go through queries by step_m, and of queries m that go through keys by step_n."""
    return Config(BLOCK_N=n, STEP_M=step_m, BLOCK_M=m, STEP_N=step_n, num_warps=warps, num_stages=stages)


def _by_length(short: Config, long: Config) -> tuple:
    return (64, short), (None, long)


# By padded head dim: (the most queries, config), the first that fits. Two-byte dtypes, those on sm_90, fp32.
_FORWARD = {
    16: _by_length(_forward(64, 64, 4, 3), _forward(128, 64, 4, 3)),
    32: _by_length(_forward(64, 64, 4, 3), _forward(128, 64, 4, 3)),
    64: _by_length(_forward(64, 64, 4, 3), _forward(128, 64, 4, 3)),
    128: _by_length(_forward(64, 64, 4, 2), _forward(128, 64, 8, 2)),
    256: ((None, _forward(64, 32, 8, 2)),),
}
# The quickest of those tried on an H200 with 197 queries of head dim 64 and 4,096 causal ones of 64 and 128.
_FORWARD_SM90 = {
    **_FORWARD,
    64: ((64, _forward(64, 32, 4, 3)), (512, _forward(128, 32, 4, 3)), (None, _forward(64, 64, 4, 3))),
    128: ((None, _forward(64, 64, 4, 3)),),
}
_FORWARD_FP32 = {
    16: _by_length(_forward(32, 32, 4, 2), _forward(64, 32, 4, 2)),
    32: _by_length(_forward(32, 32, 4, 2), _forward(64, 32, 4, 2)),
    64: _by_length(_forward(32, 32, 4, 2), _forward(64, 32, 4, 2)),
    128: ((None, _forward(32, 32, 4, 1)),),
    256: ((None, _forward(16, 16, 8, 1)),),
}
_BACKWARD = {
    16: _backward(64, 32, 64, 32, 4, 2),
    32: _backward(64, 64, 64, 64, 4, 2),
    64: _backward(128, 64, 128, 64, 8, 2),
    128: _backward(64, 32, 64, 32, 8, 2),
    256: _backward(32, 32, 32, 32, 8, 1),
}
# Measured likewise. At head dim 128 tiles of 128/64 with 8 warps were tried: they spill.
_BACKWARD_SM90 = {
    **_BACKWARD,
    64: _backward(64, 32, 64, 32, 4, 3),
}
_BACKWARD_FP32 = {
    16: _backward(32, 32, 32, 32, 4, 2),
    32: _backward(32, 32, 32, 32, 4, 2),
    64: _backward(32, 32, 32, 32, 4, 1),
    128: _backward(16, 16, 16, 16, 8, 1),
}


# Calls with a mask, bias, ALiBi or soft-capping hold more of each score: tiles that then do not spill.
_FORWARD_WITH_TERMS = {
    16: _forward(64, 64, 4, 3),
    32: _forward(64, 32, 4, 3),
    64: _forward(64, 64, 4, 3),
    128: _forward(64, 32, 4, 2),
}
_FORWARD_WITH_TERMS_FP32 = {
    64: _forward(32, 32, 4, 2),
    128: _forward(16, 16, 8, 1),
}
_BACKWARD_WITH_TERMS = {
    32: _backward(64, 32, 64, 32, 4, 2),
    64: _backward(64, 32, 64, 32, 4, 2),
}
_BACKWARD_WITH_TERMS_FP32 = {64: _backward(16, 32, 32, 16, 4, 1)}
# With several heads to a key head there is one loop more around, whose addresses take registers.
_BACKWARD_GROUPED = {64: _backward(64, 32, 64, 32, 8, 2)}
_BACKWARD_GROUPED_SM90 = {**_BACKWARD_GROUPED, 128: _backward(64, 16, 64, 32, 8, 2)}


def _forward_table(dtype: torch.dtype, device: Device) -> dict:
    if dtype == torch.float32:
        return _FORWARD_FP32
    return _FORWARD_SM90 if device.capability == 90 else _FORWARD


def _backward_table(dtype: torch.dtype, device: Device) -> dict:
    if dtype == torch.float32:
        return _BACKWARD_FP32
    return _BACKWARD_SM90 if device.capability == 90 else _BACKWARD


def _backward_tables(dtype: torch.dtype, device: Device, plain: bool, grouped: bool) -> tuple[dict, ...]:
    """The first that has the head dim counts."""
    tables = [_backward_table(dtype, device)]
    if not plain:
        tables.insert(0, _BACKWARD_WITH_TERMS_FP32 if dtype == torch.float32 else _BACKWARD_WITH_TERMS)
    if grouped and dtype != torch.float32:
        tables.insert(0, _BACKWARD_GROUPED_SM90 if device.capability == 90 else _BACKWARD_GROUPED)
    return tuple(tables)


def forward_configs_for(dtype: torch.dtype, head_dim: int, device: Device, plain: bool) -> list[Config]:
    """Those that ``forward_config`` may pick for a dtype, a padded head dim and any number of queries."""
    lengths = [most or 1 << 20 for most, _ in _forward_table(dtype, device)[head_dim]]
    return list(dict.fromkeys(forward_config(dtype, head_dim, M, device, plain) for M in lengths))


def backward_configs_for(
    dtype: torch.dtype, head_dim: int, device: Device, plain: bool, grouped: bool
) -> list[Config]:
    """The one that ``backward_config`` picks for a dtype and a padded head dim; none where there is none."""
    if head_dim not in _backward_table(dtype, device):
        return []
    return [backward_config(dtype, head_dim, device, plain, grouped)]


def forward_configs(device: Device) -> list[Config]:
    """Every config that ``forward_config`` may pick; none without matrix units."""
    return _all_of(forward_configs_for, device, (True, False))


def backward_configs(device: Device) -> list[Config]:
    """Every config that ``backward_config`` may pick; none without matrix units."""
    return _all_of(backward_configs_for, device, (True, False), (True, False))


def _all_of(configs_for: Callable, device: Device, *kinds: tuple[bool, ...]) -> list[Config]:
    if device.capability < MATRIX_UNITS:
        return []
    found: dict[Config, None] = {}
    for dtype, head_dim, *kind in itertools.product((torch.float16, torch.float32), _FORWARD, *kinds):
        found.update(dict.fromkeys(configs_for(dtype, head_dim, device, *kind)))
    return list(found)


def forward_config(dtype: torch.dtype, head_dim: int, M: int, device: Device, plain: bool = True) -> Config:
    """head_dim: the greater of q's and v's, a power of two; plain: nothing is added to the scores."""
    with_terms = _FORWARD_WITH_TERMS_FP32 if dtype == torch.float32 else _FORWARD_WITH_TERMS
    if not plain and head_dim in with_terms:
        return with_terms[head_dim]
    row = _forward_table(dtype, device)[head_dim]
    return next(config for most, config in row if most is None or M <= most)


def backward_config(
    dtype: torch.dtype, head_dim: int, device: Device, plain: bool = True, grouped: bool = False
) -> Config:
    """As ``forward_config``; head_dim is at most 128 in fp32, wider ones do not fit. grouped: heads share
    key heads."""
    if dtype == torch.float32 and head_dim > 128:
        raise ValueError("attention: the backward kernel takes head dims up to 128 in float32")
    tables = _backward_tables(dtype, device, plain, grouped)
    return next(table[head_dim] for table in tables if head_dim in table)


def bias_config(dtype: torch.dtype, head_dim: int, device: Device) -> Config:
    """Of the bias's gradient: square tiles of it, the largest that do not spill."""
    if dtype == torch.float32:
        return _bias(16, 64 if head_dim <= 64 else 16, 4)
    if head_dim <= 128:
        return _bias(32, 128, 2 if head_dim <= 64 else 4)
    return _bias(16, 256, 4)


def _bias(side: int, step_d: int, warps: int) -> Config:
    return Config(BLOCK_M=side, BLOCK_N=side, STEP_D=step_d, num_warps=warps, num_stages=1)


def bias_configs(device: Device) -> list[Config]:
    """Every config that ``bias_config`` may pick; none without matrix units."""
    if device.capability < MATRIX_UNITS:
        return []
    picked = [bias_config(dtype, d, device) for dtype in (torch.float16, torch.float32) for d in _BACKWARD]
    return list(dict.fromkeys(picked))


def decode_config(dtype: torch.dtype, head_dim: int) -> Config:
    """Of a few queries; head_dim: the greater of q's and v's, a power of two."""
    n = 64 if dtype != torch.float32 and head_dim <= 128 else 32 if head_dim <= 128 else 16
    if dtype != torch.float32 and head_dim == 256:
        n = 32
    return Config(BLOCK_ROWS=16, BLOCK_N=n, num_warps=4, num_stages=2 if dtype == torch.float32 else 3)


def decode_configs(device: Device) -> list[Config]:
    """Every config that ``decode_config`` may pick; none without matrix units."""
    if device.capability < MATRIX_UNITS:
        return []
    picked = [decode_config(dtype, d) for dtype in (torch.float16, torch.float32) for d in _BACKWARD]
    return list(dict.fromkeys(picked))
