"""The CUDA library path: cuDNN's fused convolution through ATen, or its plain one followed by our one-pass
epilogue.

``aten::cudnn_convolution_relu`` and ``aten::cudnn_convolution_add_relu`` are private names of PyTorch's;
where they are missing, or do not fit the activation or the dtype, the convolution and the epilogue are two
launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[..., Tensor]  # (x, residual, in_place=False)


@functools.cache
def _fused_calls() -> tuple[Callable, Callable] | None:
    relu = getattr(torch.ops.aten, "cudnn_convolution_relu", None)
    add_relu = getattr(torch.ops.aten, "cudnn_convolution_add_relu", None)
    return (relu.default, add_relu.default) if relu is not None and add_relu is not None else None


def fuses(dtype: torch.dtype, activation: str) -> bool:
    """Whether cuDNN's fused convolution covers this activation and dtype."""
    return activation == "relu" and dtype in (torch.float32, torch.float16) and _fused_calls() is not None


def prepare_convolution(
    x: Tensor,
    folded: tuple[Tensor, Tensor | None],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    negative_slope: float,
    has_residual: bool,
    pack: bool,
) -> Run:
    """``run(x, residual)``: convolution, folded BN, residual and ReLU in one cuDNN call.

    The arguments are those of ``onednn.prepare_convolution``, of which cuDNN needs neither ``x`` nor
    ``pack``.
    """
    relu, add_relu = _fused_calls()
    channels_last = torch.channels_last
    weight = folded[0].contiguous(memory_format=channels_last)
    bias = folded[1]
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])

    if has_residual:

        def run(x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
            x = x.contiguous(memory_format=channels_last)
            residual = residual.contiguous(memory_format=channels_last)
            return add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
    else:

        def run(x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
            x = x.contiguous(memory_format=channels_last)
            return relu(x, weight, bias, stride, padding, dilation, groups)

    return run
