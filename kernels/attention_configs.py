"""Tiles of the attention kernels, by head dim, dtype and device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastnets.kernels.attention_problem import Kind
from fastnets.kernels.conv_configs import with_all_registers
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
    16: _by_length(_forward(64, 64, 4, 3), with_all_registers(_forward(128, 64, 4, 3))),
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


ANY = Kind()
DROPOUT, TERMS, GROUPED, PACKED = (Kind(**{name: True}) for name in Kind._fields)


class _Tables(NamedTuple):
    """Tiles by padded head dim. Those ``_of`` kinds come first: the first row counts whose kind a call has,
    whatever else it is, and that has its head dim. They are smaller, so that nothing spills.
    """

    forward_of: tuple[tuple[Kind, dict], ...]
    forward: dict
    backward_of: tuple[tuple[Kind, dict], ...]
    backward: dict


_FORWARD_WITH_TERMS = {
    16: _forward(64, 64, 4, 3),
    32: _forward(64, 32, 4, 3),
    64: _forward(64, 64, 4, 3),
    128: _forward(64, 32, 4, 2),
}
_FORWARD_WITH_DROPOUT = {**_FORWARD_WITH_TERMS, 64: _forward(64, 32, 4, 3), 128: _forward(64, 32, 8, 2)}
_BACKWARD_WITH_DROPOUT = (
    (Kind(dropout=True, grouped=True), {128: _backward(32, 32, 32, 32, 8, 1)}),
    (
        DROPOUT,
        {
            16: _backward(64, 32, 64, 32, 8, 1),
            32: _backward(64, 16, 64, 32, 4, 1),
            64: _backward(64, 16, 64, 16, 4, 1),
            128: _backward(64, 16, 64, 32, 8, 1),
        },
    ),
)
_SM80 = _Tables(
    forward_of=(
        (DROPOUT, _FORWARD_WITH_DROPOUT),
        (TERMS, _FORWARD_WITH_TERMS),
        (PACKED, {64: _forward(128, 32, 4, 3)}),
    ),
    forward=_FORWARD,
    backward_of=(
        *_BACKWARD_WITH_DROPOUT,
        (TERMS, {32: _backward(64, 32, 64, 32, 8, 2), 64: _backward(64, 16, 64, 32, 4, 2)}),
        (Kind(grouped=True, packed=True), {64: _backward(64, 16, 64, 32, 4, 2)}),
        (GROUPED, {32: _backward(64, 32, 64, 32, 4, 2), 64: _backward(64, 32, 64, 32, 8, 2)}),
        (PACKED, {64: _backward(128, 32, 128, 64, 8, 2)}),
    ),
    backward=_BACKWARD,
)
_SM90 = _Tables(
    forward_of=((DROPOUT, _FORWARD_WITH_DROPOUT), (TERMS, _FORWARD_WITH_TERMS)),
    forward=_FORWARD_SM90,
    backward_of=(
        *_BACKWARD_WITH_DROPOUT,
        (Kind(terms=True, grouped=True), {64: _backward(64, 32, 64, 32, 8, 2)}),
        (TERMS, dict.fromkeys((32, 64), _backward(64, 32, 64, 32, 4, 2))),
        (
            GROUPED,
            {
                32: _backward(64, 32, 64, 32, 4, 2),
                64: _backward(64, 32, 64, 32, 8, 2),
                128: _backward(64, 16, 64, 32, 8, 2),
            },
        ),
    ),
    backward=_BACKWARD_SM90,
)
_WITH_TERMS_FP32 = {64: with_all_registers(_forward(32, 32, 4, 2)), 128: _forward(16, 16, 8, 1)}
_BACKWARD_WITH_TERMS_FP32 = {64: _backward(16, 32, 32, 16, 4, 1)}
_FP32 = _Tables(
    forward_of=(
        (DROPOUT, _WITH_TERMS_FP32),
        (TERMS, _WITH_TERMS_FP32),
        (PACKED, {64: _forward(32, 32, 4, 2), 128: _forward(32, 32, 8, 1)}),
    ),
    forward=_FORWARD_FP32,
    backward_of=(
        (DROPOUT, _BACKWARD_WITH_TERMS_FP32),
        (TERMS, _BACKWARD_WITH_TERMS_FP32),
        (GROUPED, _BACKWARD_WITH_TERMS_FP32),
    ),
    backward=_BACKWARD_FP32,
)


def _tables(dtype: torch.dtype, device: Device) -> _Tables:
    if dtype == torch.float32:
        return _FP32
    return _SM90 if device.capability == 90 else _SM80


def _of_kind(rows: tuple[tuple[Kind, dict], ...], kind: Kind, head_dim: int) -> Config | None:
    for needed, table in rows:
        if head_dim in table and all(has or not needs for needs, has in zip(needed, kind)):
            return table[head_dim]
    return None


def forward_configs_for(dtype: torch.dtype, head_dim: int, device: Device, kind: Kind) -> list[Config]:
    """Those that ``forward_config`` may pick for a dtype, a padded head dim and any number of queries."""
    lengths = [most or 1 << 20 for most, _ in _tables(dtype, device).forward[head_dim]]
    return list(dict.fromkeys(forward_config(dtype, head_dim, M, device, kind) for M in lengths))


def backward_configs_for(dtype: torch.dtype, head_dim: int, device: Device, kind: Kind) -> list[Config]:
    """The one that ``backward_config`` picks for a dtype and a padded head dim; none where there is none."""
    if head_dim not in _tables(dtype, device).backward:
        return []
    return [backward_config(dtype, head_dim, device, kind)]


def forward_configs(device: Device) -> list[Config]:
    """Every config that ``forward_config`` may pick; none without matrix units."""
    return _all_of(forward_configs_for, device)


def backward_configs(device: Device) -> list[Config]:
    """Every config that ``backward_config`` may pick; none without matrix units."""
    return _all_of(backward_configs_for, device)


def _all_of(configs_for: Callable, device: Device) -> list[Config]:
    if device.capability < MATRIX_UNITS:
        return []
    found: dict[Config, None] = {}
    kinds = itertools.starmap(Kind, itertools.product((False, True), repeat=len(Kind._fields)))
    for kind, dtype, head_dim in itertools.product(kinds, (torch.float16, torch.float32), _FORWARD):
        found.update(dict.fromkeys(configs_for(dtype, head_dim, device, kind)))
    return list(found)


def forward_config(dtype: torch.dtype, head_dim: int, M: int, device: Device, kind: Kind = ANY) -> Config:
    """head_dim: the greater of q's and v's, a power of two."""
    tables = _tables(dtype, device)
    row = tables.forward[head_dim]
    chosen = _of_kind(tables.forward_of, kind, head_dim)
    return chosen or next(config for most, config in row if most is None or M <= most)


def backward_config(dtype: torch.dtype, head_dim: int, device: Device, kind: Kind = ANY) -> Config:
    """As ``forward_config``; head_dim is at most 128 in fp32, wider ones do not fit."""
    if dtype == torch.float32 and head_dim > 128:
        raise ValueError("attention: the backward kernel takes head dims up to 128 in float32")
    tables = _tables(dtype, device)
    return _of_kind(tables.backward_of, kind, head_dim) or tables.backward[head_dim]


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
