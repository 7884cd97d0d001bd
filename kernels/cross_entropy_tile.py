"""What the cross-entropy kernels share: rows [N, V, D] of any strides in tiles, and how tiles are chosen."""

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import vector_width
from fastnets.kernels.device import Device
from fastnets.kernels.launch import DTYPES, Config

__all__ = [
    "as_rows",
    "check_logits",
    "clamp_classes",
    "classes_at_once",
    "configs_of_rows",
    "extent",
    "pick",
    "row_offset",
    "steps",
]


REDUCTIONS = ("none", "mean", "sum")


@triton.jit
def row_offset(n, d, n_step, d_step, VEC: tl.constexpr):
    """Where rows begin, [rows, 1], from steps in units of VEC: what they are multiples of shows."""
    return ((n * n_step + d * d_step) * VEC)[:, None]


@triton.jit
def clamp_classes(v, mask, VEC: tl.constexpr):
    """Class 0 where masked; VEC classes are masked together and stay side by side."""
    return tl.max_contiguous(tl.multiple_of(tl.where(mask, v, 0), VEC), VEC)


def _config(rows: int, classes: int) -> Config:
    return Config(BLOCK_ROWS=rows, BLOCK_V=classes, num_warps=8 if classes >= 4096 else 4, num_stages=1)


# (rows, classes) of a tile: classes that lie side by side, the whole row up to 4096 of them; or rows that do.
_CLASSES_FAST = ((128, 16), (32, 64), (8, 256), (2, 1024), (1, 4096))
_ROWS_FAST = ((128, 16), (64, 32))


def configs_of_rows(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernels are bound by memory."""
    return [_config(*tile) for tile in dict.fromkeys((*_CLASSES_FAST, *_ROWS_FAST))]


def pick(V: int, classes_side_by_side: bool) -> Config:
    table = _CLASSES_FAST if classes_side_by_side else _ROWS_FAST
    return _config(*next((tile for tile in table if tile[1] >= V), table[-1]))


def as_rows(logits: torch.Tensor) -> torch.Tensor:
    """[N, V, d...] as [N, V, D]; a copy only where the trailing dims are no run."""
    return logits.unsqueeze(2) if logits.dim() == 2 else logits.flatten(2)


def classes_at_once(V: int, *tensors: torch.Tensor) -> int:
    """How many classes are neighbours, aligned to as many, in all of the tensors."""
    if any(t.stride(1) != 1 for t in tensors):
        return 1
    size = min(t.element_size() for t in tensors)
    return vector_width(size, V, *(t.stride(i) for t in tensors for i in (0, 2) if t.shape[i] > 1))


def steps(tensor: torch.Tensor, vec: int) -> tuple[int, int, int]:
    """Strides as the kernels take them: rows in units of ``vec``, classes in elements."""
    n, v, d = tensor.stride()
    return n // vec, v, d // vec


def extent(*tensors: torch.Tensor) -> int:
    return max(sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride())) for t in tensors)


def check_logits(logits, target, weight, reduction, teacher) -> None:
    """Raises ``ValueError`` or ``TypeError`` where the arguments of ``cross_entropy`` do not fit."""
    if logits.dim() < 2 or logits.shape[1] == 0:
        raise ValueError(f"cross_entropy: logits are {tuple(logits.shape)}, expected [N, V, ...] with V > 0")
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"cross_entropy: target is {tuple(target.shape)}, expected {expected}, as the logits"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"cross_entropy: target is {target.dtype}, expected int64 class indices")
    if weight is not None and tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(
            f"cross_entropy: weight is {tuple(weight.shape)}, not one for each of {logits.shape[1]} classes"
        )
    if teacher is not None and teacher.shape != logits.shape:
        raise ValueError(
            f"cross_entropy: teacher is {tuple(teacher.shape)}, the logits {tuple(logits.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
    for name, tensor in (("logits", logits), ("teacher", teacher)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"cross_entropy: {name} are {tensor.dtype}, expected float32, float16 or bfloat16"
            )
